"""Two engines behind one front end: each does what one alone does."""

from __future__ import annotations

import asyncio

import pytest
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

from ..engines import engine
from ..models import random_prompts

OPTIONS = {"sink_tokens": 8, "recent_tokens": 64, "semantic_tokens": 128}
PROMPTS = random_prompts([2000, 300])
PARAMS = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True, detokenize=False)
ENGINE = {"max_model_len": 4096, "num_gpu_blocks_override": 48}
"""Fewer blocks than the longer prompt has: without evictions it would not be served."""


@pytest.mark.devices(2)
def test_each_of_two_engines_evicts(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine(llama, policy="semantic", kv_policy_config=OPTIONS, **ENGINE) as llm:
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        assert all(llm.trace.by_index())
    expected = [list(output.outputs[0].token_ids) for output in outputs]
    # Engines in processes of their own, which share the cores.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    answers = asyncio.run(serve(llama))
    assert answers == {(rank, i): expected[i] for rank in (0, 1) for i in (0, 1)}


async def serve(model: str) -> dict[tuple[int, int], list[int]]:
    """Every prompt from every engine at once: tokens by engine and prompt."""
    llm = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model,
            data_parallel_size=2,
            dtype="float32",
            block_size=32,
            max_num_batched_tokens=512,
            kv_cache_memory_bytes=32 << 20,
            enable_prefix_caching=False,
            enforce_eager=True,
            skip_tokenizer_init=True,
            disable_log_stats=True,
            additional_config={"kv_policy": {"name": "semantic", **OPTIONS}},
            **ENGINE,
        )
    )

    async def ask(rank: int, i: int) -> list[int]:
        prompt, request_id = PROMPTS[i], f"{rank}-{i}"
        stream = llm.generate(prompt, PARAMS, request_id, data_parallel_rank=rank)
        outputs = [output async for output in stream]
        return list(outputs[-1].outputs[0].token_ids)

    try:
        asked = [(rank, i) for rank in (0, 1) for i in range(len(PROMPTS))]
        return dict(zip(asked, await asyncio.gather(*(ask(*one) for one in asked)), strict=True))
    finally:
        llm.shutdown()
