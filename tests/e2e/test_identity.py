"""A budget that is never reached: byte for byte what stock vLLM says."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from vllm_semantic.upstream.hooks import SCHEDULERS

from .. import interpreter
from ..engines import engine, manager_of, scheduler_of, worker_of
from ..models import random_prompts
from ..platforms import on_gpu, schedules_ahead

AMPLE: dict[str, dict[str, int]] = {
    "full": {},
    "streaming": {"recent_tokens": 4096},
    "semantic": {"semantic_tokens": 4096},
}
PARAMS = SamplingParams(max_tokens=64, temperature=0, ignore_eos=True, detokenize=False, logprobs=2)

# Longer than a step's 128 tokens, so that prefill is chunked and mixed with decode.
PROMPTS = random_prompts([300, 1, 33, 700, 128, 31])


def run(llm: Any) -> list[tuple[list[int], list[dict[int, float]]]]:
    """Generate twice, the second time with whatever is cached; keep tokens and logprobs."""
    answers = []
    for _ in range(2):
        for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False):
            completion = output.outputs[0]
            logprobs = [{t: lp.logprob for t, lp in row.items()} for row in completion.logprobs]
            answers.append((list(completion.token_ids), logprobs))
    return answers


@pytest.fixture(scope="module", params=[False, True], ids=["no-prefix-caching", "prefix-caching"])
def stock(llama: str, request: pytest.FixtureRequest) -> tuple[bool, Any]:
    caching: bool = request.param
    with engine(llama, enable_prefix_caching=caching, max_num_batched_tokens=128) as llm:
        return caching, run(llm)


@pytest.mark.parametrize("policy", AMPLE)
def test_ample_budget_changes_nothing(policy: str, stock: tuple[bool, Any], llama: str) -> None:
    caching, expected = stock
    with engine(
        llama,
        policy=policy,
        kv_policy_config=AMPLE[policy],
        enable_prefix_caching=caching,
        max_num_batched_tokens=128,
    ) as llm:
        assert run(llm) == expected
        assert manager_of(llm).stats.evicted_blocks == 0
        hits = scheduler_of(llm).kv_cache_manager.block_pool.cached_block_hash_to_block
        assert bool(len(hits)) == caching


@pytest.mark.parametrize("kv_cache_dtype", ["fp8_e4m3", "fp8_e5m2"])
def test_an_fp8_cache(kv_cache_dtype: str, llama: str) -> None:
    """The same as stock vLLM's where nothing goes; else each request as alone."""
    kwargs = {"kv_cache_dtype": kv_cache_dtype, "max_num_batched_tokens": 128}
    with engine(llama, **kwargs) as llm:
        expected = run(llm)
    with engine(llama, policy="semantic", kv_policy_config=AMPLE["semantic"], **kwargs) as llm:
        assert run(llm) == expected
    options = {"recent_tokens": 32, "semantic_tokens": 64, "recall_gib": 0.125}
    with engine(llama, policy="semantic", kv_policy_config=options, **kwargs) as llm:
        assert worker_of(llm).model_runner.kv_caches[0].dtype == torch.uint8
        together = run(llm)[: len(PROMPTS)]
        assert manager_of(llm).stats.recalled_blocks > 0
        assert manager_of(llm).stats.fallbacks == 0
        alone = [
            list(llm.generate([prompt], PARAMS, use_tqdm=False)[0].outputs[0].token_ids)
            for prompt in PROMPTS
        ]
        assert [tokens for tokens, _ in together] == alone
    assert together != expected


def qualname(of: Any) -> str:
    return f"{type(of).__module__}.{type(of).__name__}"


def test_policy_runs_where_it_says(llama: str) -> None:
    """The scheduler, worker, runner and backend in use are the ones that were hooked."""
    with engine(llama, policy="semantic") as llm:
        worker = worker_of(llm)
        scheduler = scheduler_of(llm)
        assert qualname(scheduler) == SCHEDULERS[schedules_ahead()]
        if on_gpu():
            expected = "SemanticWorker", "vllm.v1.worker.gpu.model_runner", "V2", "TritonAttention"
        elif interpreter.wanted():
            expected = "SemanticCPUWorker", "vllm.v1.worker.cpu.model_runner", "V2", "CPUAttention"
        else:
            expected = "SemanticCPUWorker", "vllm.v1.worker.cpu_model_runner", "V1", "CPUAttention"
        (group,) = worker.model_runner.attn_groups[0]
        assert group.backend.__module__ == "vllm_semantic.engine.backend"
        builder = type(group.metadata_builders[0]).__name__
        assert builder.startswith("Semantic")
        assert builder.endswith("MetadataBuilder")
        assert expected == (
            type(worker).__name__,
            type(worker.model_runner).__module__,
            worker.runner_access.name,
            builder.removeprefix("Semantic").removesuffix("MetadataBuilder"),
        )


def test_no_policy_is_stock_vllm(llama: str) -> None:
    """In the process where policies have just run, an engine without one has no trace of them."""
    with engine(llama) as llm:
        worker = worker_of(llm)
        (group,) = worker.model_runner.attn_groups[0]
        names = [
            type(scheduler_of(llm)).__module__,
            type(worker).__module__,
            group.backend.__module__,
            type(group.metadata_builders[0]).__module__,
            type(group.kv_cache_spec).__module__,
        ]
        assert not [name for name in names if name.startswith("vllm_semantic")]


def test_plain_vllm_with_additional_config(llama: str) -> None:
    """No import of the plugin: vLLM's own class finds it through its entry point."""
    code = f"""
import sys, vllm
llm = vllm.LLM({llama!r}, additional_config={{"kv_policy": {{"name": "semantic"}}}},
               dtype="float32", skip_tokenizer_init=True, enforce_eager=True,
               max_model_len=2048, kv_cache_memory_bytes=32 << 20)
params = vllm.SamplingParams(max_tokens=4, temperature=0, detokenize=False)
llm.generate([{{"prompt_token_ids": list(range(1, 500))}}], params, use_tqdm=False)
scheduler = llm.llm_engine.engine_core.engine_core.scheduler
assert scheduler.kv_policy_managers[0].stats.evicted_blocks > 0
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
