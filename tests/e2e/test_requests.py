"""Requests with policies of their own share an engine, each as if it were alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from vllm import SamplingParams

from ..engines import engine, manager_of, reset_trace
from ..models import random_prompts

OPTIONS = {"sink_tokens": 8, "recent_tokens": 64, "semantic_tokens": 128}
STREAMING = {"sink_tokens": 4, "recent_tokens": 192}
LENGTHS = [900, 620, 1100, 700, 840, 40]
PROMPTS = random_prompts(LENGTHS)
PINNED = 160

ASKED: list[Any] = [
    None,
    {"name": "streaming", **STREAMING},
    {"pin_prompt_tokens": PINNED, "semantic_tokens": 64},
    {"similarity": "study"},
    "full",
    {"semantic_tokens": 64},
]

Result = tuple[tuple[int, ...], dict[int, list[int]]]


def params(asked: Any) -> SamplingParams:
    return SamplingParams(
        max_tokens=150,
        temperature=0,
        ignore_eos=True,
        detokenize=False,
        extra_args=None if asked is None else {"kv_policy": asked},
    )


def run(llm: Any, prompts: list[Any], asked: list[Any]) -> list[Result]:
    """Tokens and evictions of each prompt."""
    reset_trace(llm)
    outputs = llm.generate(prompts, [params(each) for each in asked], use_tqdm=False)
    tokens = [tuple(output.outputs[0].token_ids) for output in outputs]
    return list(zip(tokens, llm.trace.by_index(), strict=True))


@pytest.fixture(scope="module")
def elsewhere(llama: str) -> dict[str, list[Result]]:
    """The same requests where each policy is the server's own."""
    results = {}
    with engine(llama, policy="streaming", kv_policy_config=STREAMING) as llm:
        results["streaming"] = run(llm, PROMPTS[1:2], [None])
    with engine(llama) as llm:
        results["stock"] = run(llm, PROMPTS[4:5], [None])
    with engine(llama, policy="full") as llm:
        # The other way round: requests ask a server with the full cache for less.
        asked = [{"name": "semantic", **OPTIONS}, {"name": "streaming", **STREAMING}, None]
        results["full"] = run(llm, [*PROMPTS[:2], PROMPTS[4]], asked)
    return results


@pytest.fixture(scope="module")
def generous(llama: str, elsewhere: Any) -> Iterator[Any]:
    """A server that runs the semantic policy and lets requests ask for the full cache.

    One engine at a time: it starts when the others are gone.
    """
    options = OPTIONS | {"max_request_tokens": 1024}
    with engine(llama, policy="semantic", kv_policy_config=options) as llm:
        yield llm


@pytest.fixture(scope="module")
def alone(generous: Any) -> list[Result]:
    return [
        run(generous, [prompt], [asked])[0] for prompt, asked in zip(PROMPTS, ASKED, strict=True)
    ]


def test_policies_share_a_batch(generous: Any, alone: list[Result]) -> None:
    assert run(generous, PROMPTS, ASKED) == alone
    assert [bool(evictions) for _, evictions in alone] == [True] * 4 + [False] * 2
    by_policy = manager_of(generous).stats_by_policy
    assert by_policy["semantic"].evicted_blocks > 0
    assert by_policy["streaming"].evicted_blocks > 0
    assert by_policy["streaming"].scored_blocks == 0
    assert by_policy["full"].evicted_blocks == 0


def test_what_is_pinned_is_never_evicted(alone: list[Result]) -> None:
    _, evictions = alone[ASKED.index({"pin_prompt_tokens": PINNED, "semantic_tokens": 64})]
    gone = {block for blocks in evictions.values() for block in blocks}
    assert min(gone) >= PINNED // 32
    others = {block for blocks in alone[0][1].values() for block in blocks}
    assert min(others) < PINNED // 32, "without a pin these blocks would have gone"


def test_as_on_a_server_with_that_policy(
    alone: list[Result], elsewhere: dict[str, list[Result]]
) -> None:
    assert elsewhere["streaming"] == [alone[1]]
    assert elsewhere["stock"] == [alone[4]]
    assert elsewhere["full"] == [alone[0], alone[1], alone[4]]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"semantic_tokens": 8192}, r"kv_policy .* allowed: 32 blocks, the server's --kv-policy"),
        ({"name": "tests.policy"}, r"kv_policy.name 'tests.policy' is not served; allowed: full"),
        ({"pin": "system"}, r"kv_policy.pin 'system' needs a chat"),
    ],
)
def test_a_refused_request_is_alone(
    asked: Any, message: str, generous: Any, alone: list[Result]
) -> None:
    with pytest.raises(ValueError, match=message):
        run(generous, [PROMPTS[0], PROMPTS[2]], [None, asked])
    assert run(generous, PROMPTS[:1], [None]) == alone[:1]
