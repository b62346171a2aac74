"""N-gram speculation under a policy: the same tokens and evictions as without, in fewer steps."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
from vllm import SamplingParams

from ..engines import engine, manager_of
from .test_recall import PROMPTS, Result, run

NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}
OPTIONS = {
    "sink_tokens": 8,
    "recent_tokens": 64,
    "semantic_tokens": 128,
    "layer_groups": 2,
    "recall_gib": 0.125,
    "recall_blocks": 1,
}
PARAMS = SamplingParams(max_tokens=150, temperature=0, ignore_eos=True, detokenize=False)


def counted(llm: Any, name: str) -> int:
    (metric,) = (of for of in llm.get_metrics() if of.name == f"vllm:spec_decode_num_{name}")
    return int(metric.value)


@pytest.fixture(scope="module")
def without(llama: str) -> Result:
    kwargs = {"async_scheduling": False}  # as n-gram speculation has it
    with engine(llama, policy="semantic", kv_policy_config=OPTIONS, **kwargs) as llm:
        return run(llm, PROMPTS, PARAMS)


def speculate(model: str, num_blocks: int) -> dict[str, Any]:
    """What comes of the prompts together and alone, and what was drafted."""
    with engine(
        model,
        policy="semantic",
        kv_policy_config=OPTIONS,
        speculative_config=NGRAM,
        disable_log_stats=False,
        enable_prefix_caching=True,
        num_gpu_blocks_override=num_blocks,
    ) as llm:
        together = run(llm, PROMPTS, PARAMS)
        num_preemptions = llm.trace.num_preemptions
        return {
            "together": together,
            "preemptions": num_preemptions,
            "alone": [run(llm, [prompt], PARAMS)[0] for prompt in PROMPTS],
            "accepted": counted(llm, "accepted_tokens"),
            "drafted": counted(llm, "draft_tokens"),
            "fallbacks": manager_of(llm).stats.fallbacks,
        }


def test_drafts_change_nothing(without: Result, llama: str) -> None:
    """A block goes when every token in it is settled, whatever was drafted and rejected.

    In a process of its own: speculation loads numba, and vLLM's search for the kernels of the next
    engine (vllm/triton_utils/dispatcher.py) fails on an object of it.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        found = pool.submit(speculate, llama, 2 * 34).result()
    assert found["together"] == without
    assert found["alone"] == without
    assert found["preemptions"] > 0
    assert 0 < found["accepted"] < found["drafted"], "all were right, or none"
    assert found["fallbacks"] == 0
    assert sum(bool(evicted) for _, evicted, _ in without) == 5
    assert any(recalled for _, _, recalled in without)
