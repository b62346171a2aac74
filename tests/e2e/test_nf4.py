"""NF4 weights under a policy: 4-bit for real, the same guarantees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from vllm import SamplingParams

from ..engines import engine, manager_of, scheduler_of, worker_of
from ..models import make_llama, make_prequantised, random_prompts
from ..oracle import Case, judge
from ..platforms import eviction_delay
from .test_oracle import case_options

OPTIONS = {"sink_tokens": 8, "recent_tokens": 64, "semantic_tokens": 128}
NF4 = {"quantization": "bitsandbytes", "dtype": "bfloat16"}
PROMPTS = random_prompts([600, 60, 900])
PARAMS = SamplingParams(
    max_tokens=260, temperature=0, ignore_eos=True, detokenize=False, logprobs=1
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_llama(tmp_path_factory.mktemp("bf16-llama"), dtype=torch.bfloat16)


def run(llm: Any, prompts: Any = PROMPTS, params: SamplingParams = PARAMS) -> list[Any]:
    return [o.outputs[0] for o in llm.generate(prompts, params, use_tqdm=False)]


def answers(completions: list[Any]) -> list[tuple[list[int], list[float]]]:
    return [
        (
            list(c.token_ids),
            [row[t].logprob for t, row in zip(c.token_ids, c.logprobs, strict=True)],
        )
        for c in completions
    ]


def linear_weights(llm: Any) -> dict[str, Any]:
    """The decoder's linear weights, as they lie in memory."""
    worker = worker_of(llm)
    parameters = worker.get_model().named_parameters()
    return {name: parameter for name, parameter in parameters if "_proj" in name}


@pytest.mark.parametrize("num_groups", [1, 2])
def test_nf4_agrees_with_oracle(num_groups: int, model: str) -> None:
    """Evictions and logprobs are the dequantised model's, up to what bfloat16 itself costs."""
    options = OPTIONS | {"layer_groups": num_groups}
    with engine(model, policy="semantic", kv_policy_config=options, **NF4) as llm:
        completions, trace = run(llm), llm.trace.by_index()
        _assert_packed_by_the_plugin(llm)
        # Half a byte a weight, where the file has two (statistics are kept apart).
        in_memory = sum(weight.nbytes for weight in linear_weights(llm).values())
    on_disk = load_file(Path(model) / "model.safetensors")
    assert 4 * in_memory == sum(w.nbytes for name, w in on_disk.items() if "_proj" in name)
    cases = [
        Case(
            model=model,
            token_ids=prompt["prompt_token_ids"] + list(completion.token_ids),
            num_prompt_tokens=len(prompt["prompt_token_ids"]),
            block_size=32,
            prefill_interval=512,
            nf4=True,
            forced={at - eviction_delay(): gone for at, gone in evictions.items()},
            eviction_delay=eviction_delay(),
            **case_options("semantic", options),
        )
        for prompt, completion, evictions in zip(PROMPTS, completions, trace, strict=True)
    ]
    exact = judge(cases)
    rounded = judge([replace(case, dtype="bfloat16") for case in cases])
    for case, completion, verdict, noisy in zip(cases, completions, exact, rounded, strict=True):
        assert case.forced and verdict.evictions == case.forced
        noise = max(abs(a - b) for a, b in zip(verdict.logprobs, noisy.logprobs, strict=True))
        for token, row, expected, best in zip(
            completion.token_ids, completion.logprobs, verdict.logprobs, verdict.greedy, strict=True
        ):
            assert row[token].logprob == pytest.approx(expected, abs=2 * noise)
            assert token == best or row[token].logprob > expected - 2 * noise
        # A block kept instead of a better one was a tie in bfloat16 (8 bits of mantissa).
        assert min(verdict.margins.values()) > -(2**-8)


def _assert_packed_by_the_plugin(llm: Any) -> None:
    from vllm_bnb_plugin.quantization.params import BitsAndBytes4bitParameter

    weights = linear_weights(llm)
    assert len(weights) == 2 * 4
    for parameter in weights.values():
        assert isinstance(parameter, BitsAndBytes4bitParameter)
        assert parameter.dtype == torch.uint8
        states = parameter.bnb_quant_state.values()
        assert {state.quant_type for state in states} == {"nf4"}
    loader = llm.llm_engine.vllm_config.load_config.load_format
    assert loader == "bitsandbytes"


def test_nf4_ample_budget_changes_nothing(model: str) -> None:
    results = []
    for policy, options in ((None, None), ("full", {}), ("semantic", {"semantic_tokens": 4096})):
        with engine(model, policy=policy, kv_policy_config=options, **NF4) as llm:
            results.append(answers(run(llm)))
    assert results[0] == results[1] == results[2]


def test_prequantised_checkpoint_is_the_same_model(
    model: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = make_prequantised(model, tmp_path_factory.mktemp("nf4-llama"))
    packed = []
    for source, kwargs in ((model, NF4), (path, {"dtype": "bfloat16"})):
        with engine(source, policy="semantic", kv_policy_config=OPTIONS, **kwargs) as llm:
            completions = run(llm)
            assert [len(c.token_ids) for c in completions] == [PARAMS.max_tokens] * len(PROMPTS)
            assert all(llm.trace.by_index())
            _assert_packed_by_the_plugin(llm)
            packed.append({name: w.data.clone() for name, w in linear_weights(llm).items()})
    # The codes are the same bits. Outputs may differ: the bnb plugin reads the offset of the
    # nested statistics back in the model's dtype.
    assert packed[0].keys() == packed[1].keys()
    assert all(torch.equal(packed[0][name], packed[1][name]) for name in packed[0])


def test_nf4_prompt_three_times_the_pool(model: str) -> None:
    pool_blocks = 40
    prompts = random_prompts([3 * pool_blocks * 32])
    few = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True, detokenize=False)
    with engine(
        model,
        policy="semantic",
        kv_policy_config=OPTIONS,
        max_model_len=8192,
        num_gpu_blocks_override=pool_blocks,
        **NF4,
    ) as llm:
        assert scheduler_of(llm).kv_cache_manager.block_pool.num_gpu_blocks == pool_blocks
        (completion,) = run(llm, prompts, few)
        assert len(completion.token_ids) == 40
        assert manager_of(llm).stats.evicted_blocks > 2 * pool_blocks


def test_float32_with_nf4_is_refused(model: str) -> None:
    with (
        pytest.raises(ValueError, match=r"--dtype float32 .*\(allowed: bfloat16, float16\)"),
        engine(model, policy="semantic", quantization="bitsandbytes", dtype="float32"),
    ):
        pass
