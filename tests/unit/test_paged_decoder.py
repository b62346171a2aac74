"""What the benchmarks compute without an engine, against transformers and the oracle."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.foresight import HORIZON, Foresight
from benchmarks.paged_decoder import PagedDecoder
from benchmarks.variants import FAMILIES, contribution, decayed, mass, similar, unrotated
from vllm_semantic.policies.base import BlockBudget

from ..models import random_prompts
from ..oracle import Case, judge

NUM_PROMPT = 300
DOCUMENTS = [prompt["prompt_token_ids"] for prompt in random_prompts([520, 520])]


@pytest.fixture(scope="module")
def decoder(llama: str) -> PagedDecoder:
    return PagedDecoder(llama)


def test_without_a_budget_losses_are_the_models(decoder: PagedDecoder, llama: str) -> None:
    documents = torch.tensor(DOCUMENTS)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(documents[:, :-1]).logits.log_softmax(-1)
    expected = -expected.gather(2, documents[:, 1:, None])[:, NUM_PROMPT - 1 :, 0]
    torch.testing.assert_close(
        decoder.losses(documents, NUM_PROMPT), expected, rtol=0, atol=2**-24 * 256 * 2 * 16
    )


@pytest.mark.parametrize(
    ("rule", "num_groups", "skew"),
    [
        ("age", 1, 0),
        ("study", 1, 0),
        ("attention", 1, 0),
        ("tova", 1, 0),
        ("contribution, max", 2, 0),
        ("contribution, max", 2, 2),
        ("attention", 2, -2),
    ],
)
def test_a_rule_loses_what_the_oracle_loses(
    decoder: PagedDecoder, llama: str, rule: str, num_groups: int, skew: int
) -> None:
    """The same rule in the search, in the oracle and (tests/e2e/test_oracle.py) in the engine."""
    rules = {
        "age": None,
        "study": similar(),
        "attention": decayed(mass(8), 0.8),
        "tova": mass(1),
        "contribution, max": decayed(contribution(), 0.9),
    }
    split = BlockBudget(1, 2, 0 if rule == "age" else 4)
    documents = torch.tensor(DOCUMENTS)
    losses = decoder.losses(documents, NUM_PROMPT, split, rules[rule], num_groups, skew)
    verdicts = judge(
        [
            Case(
                llama,
                tokens,
                NUM_PROMPT,
                block_size=32,
                prefill_interval=NUM_PROMPT,
                sink_tokens=8,
                recent_tokens=64,
                selected_tokens=0 if rule == "age" else 128,
                rule=rule,
                layer_groups=num_groups,
                layer_skew_tokens=32 * skew,
            )
            for tokens in DOCUMENTS
        ]
    )
    assert all(verdict.evictions for verdict in verdicts)
    for mine, verdict in zip(losses.tolist(), verdicts, strict=True):
        assert [-loss for loss in mine] == pytest.approx(verdict.logprobs, abs=2**-24 * 2**13)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_variant_runs(decoder: PagedDecoder, family: str) -> None:
    documents = torch.tensor(DOCUMENTS)[:, :420]
    found = {
        name: decoder.losses(
            documents, 330, variant.split, variant.rule, decoder.num_layers, variant.skew
        )
        for name, variant in FAMILIES[family](10_000.0).items()
    }
    assert all(losses.isfinite().all() for losses in found.values())
    assert len({round(float(losses.sum()), 4) for losses in found.values()}) > len(found) // 2


def test_taking_rope_out() -> None:
    """A rotated vector comes back; distances of position turn into nothing."""
    torch.manual_seed(0)
    x = torch.randn(5, 16)
    angle = torch.arange(5).unsqueeze(-1) * 100.0 ** (-torch.arange(8) / 8)
    low, high = x.chunk(2, dim=-1)
    turned = torch.cat(
        (low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()), dim=-1
    )
    torch.testing.assert_close(unrotated(turned, torch.arange(5), 100.0), x)


def test_foresight_is_the_attention_to_come(llama: str) -> None:
    tokens, num_prompt, size = DOCUMENTS[0][:400], 100, 32
    future = Foresight(llama, size)(tokens, num_prompt)
    assert list(future) == ["100", *(str(n) for n in range(128, 400, 32))]
    model = AutoModelForCausalLM.from_pretrained(
        llama, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        attentions = model(torch.tensor([tokens]), output_attentions=True).attentions
    weights = torch.cat(attentions).mean((0, 1))  # [length, length]
    for point, by_block in future.items():
        rows = weights[int(point) : int(point) + HORIZON]
        expected = [float(rows[:, b * size : (b + 1) * size].sum()) for b in range(13)]
        assert by_block == pytest.approx(expected, abs=2**-12)
