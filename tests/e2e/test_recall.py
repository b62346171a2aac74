"""Blocks that come back from host memory: the same whatever else happens, and nothing is left.

What comes back, and that it is what it was, is held to the oracle in ``test_oracle.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
from vllm import SamplingParams

from vllm_semantic.served import REQUEST_KEY

from ..engines import engine, reset_trace, scheduler_of
from ..models import random_prompts
from ..platforms import eviction_delay, schedules_ahead

OPTIONS = {
    "sink_tokens": 8,
    "recent_tokens": 64,
    "semantic_tokens": 128,
    "similarity": "contribution",
    "heads": "max",
    "layer_groups": 2,
    "layer_skew_tokens": 64,
}
RECALL = OPTIONS | {"recall_gib": 0.125, "recall_blocks": 2}
PROMPTS = random_prompts([1200, 40, 700, 512, 900, 250])
PARAMS = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True, detokenize=False)

Result = list[tuple[tuple[int, ...], dict[int, list[Any]], dict[int, list[Any]]]]


def run(llm: Any, prompts: list[Any], params: SamplingParams = PARAMS) -> Result:
    """Tokens, evictions and recalls of each prompt."""
    reset_trace(llm)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    trace = llm.trace
    ids = sorted(trace.evictions, key=lambda request_id: int(request_id.split("-")[0]))
    return [
        (tuple(output.outputs[0].token_ids), trace.evictions[i], trace.recalls.get(i, {}))
        for output, i in zip(outputs, ids, strict=True)
    ]


def asking(**options: Any) -> SamplingParams:
    return SamplingParams(
        max_tokens=100,
        temperature=0,
        ignore_eos=True,
        detokenize=False,
        extra_args={REQUEST_KEY: options},
    )


def total(llm: Any, name: str) -> int:
    """A counter, over all policies and groups of layers."""
    managers = scheduler_of(llm).kv_policy_managers.values()
    return sum(getattr(manager.stats, name) for manager in managers)


@pytest.fixture(scope="module")
def alone(llama: str) -> Result:
    """The reference: one request at a time, nothing cached."""
    with engine(llama, policy="semantic", kv_policy_config=RECALL) as llm:
        results = [run(llm, [prompt])[0] for prompt in PROMPTS]
    for length, (_, evicted, recalled) in zip((1200, 700, 900), results[::2], strict=True):
        at = length + eviction_delay()
        assert at in recalled, "the end of the prompt asked for nothing"
        assert evicted
    assert any(at > 1200 + eviction_delay() for at in results[0][2]), "no answer asked"
    assert not results[1][2]
    return results


def test_together_and_with_a_cached_prefix(alone: Result, llama: str) -> None:
    with engine(
        llama, policy="semantic", kv_policy_config=RECALL, enable_prefix_caching=True
    ) as llm:
        assert run(llm, PROMPTS) == alone
        before = total(llm, "copied_blocks"), total(llm, "recalled_blocks")
        assert run(llm, PROMPTS) == alone
        copied = total(llm, "copied_blocks") - before[0]
        # Exact blocks were there from the first time: only what was computed later is copied.
        assert 0 < copied < before[0] / 2
        assert total(llm, "recalled_blocks") == 2 * before[1]
        assert scheduler_of(llm).host_pool.num_used > 0
        assert llm.llm_engine.reset_prefix_cache()
        assert scheduler_of(llm).host_pool.num_used == 0
        assert run(llm, PROMPTS) == alone
        assert total(llm, "copied_blocks") == 2 * before[0] + copied
        assert total(llm, "dropped_blocks") == 0


def test_after_a_preemption(alone: Result, llama: str) -> None:
    num_blocks = 2 * (42 if schedules_ahead() else 34)
    with engine(
        llama, policy="semantic", kv_policy_config=RECALL, num_gpu_blocks_override=num_blocks
    ) as llm:
        assert run(llm, PROMPTS) == alone
        assert llm.trace.num_preemptions > 0


def test_a_request_may_opt_out(alone: Result, llama: str) -> None:
    with engine(llama, policy="semantic", kv_policy_config=OPTIONS) as llm:
        without = run(llm, PROMPTS)
        assert scheduler_of(llm).host_pool is None
    with engine(llama, policy="semantic", kv_policy_config=RECALL) as llm:
        assert run(llm, PROMPTS, asking(recall=False)) == without
        assert total(llm, "copied_blocks") == 0
        assert run(llm, PROMPTS) == alone
        streaming = asking(name="streaming", sink_tokens=8, recent_tokens=64)
        assert not any(recalled for _, _, recalled in run(llm, PROMPTS, streaming))
    assert without != alone


def test_nothing_comes_back_where_nothing_went(llama: str) -> None:
    """With an ample budget, all is as without a policy."""
    with engine(llama) as llm:
        stock = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    options = {"semantic_tokens": 4096, "recall_gib": 0.125, "recall_blocks": 2}
    with engine(llama, policy="semantic", kv_policy_config=options) as llm:
        ours = run(llm, PROMPTS)
    for (tokens, evicted, recalled), output in zip(ours, stock, strict=True):
        assert tokens == tuple(output.outputs[0].token_ids)
        assert not evicted
        assert not recalled


def test_full_host_memory_costs_recall_and_no_more(llama: str) -> None:
    block_bytes = 2 * 64 * 32 * 2 * 4  # keys and values of one of two groups; more is no matter
    options = RECALL | {"recall_gib": 12 * block_bytes / 2**30}
    with engine(llama, policy="semantic", kv_policy_config=options, disable_log_stats=False) as llm:
        pool = scheduler_of(llm).host_pool
        assert 4 < pool.num_slots < 60
        first = run(llm, PROMPTS)
        assert pool.num_used <= pool.num_slots
        assert total(llm, "dropped_blocks") > 0
        assert all(len(tokens) == 100 for tokens, _, _ in first)
        metrics = {metric.name: metric for metric in llm.get_metrics()}
        counted = ("copied_blocks", "read_blocks", "recalled_blocks", "wanted_blocks")
        for name in (*counted, "dropped_blocks"):
            assert metrics[f"vllm:kv_policy_{name}"].value == total(llm, name)
        assert total(llm, "wanted_blocks") >= total(llm, "recalled_blocks") > 0
        # Nothing has a hash without prefix caching: nothing outlives its request.
        assert metrics["vllm:kv_policy_host_bytes"].value == 0 == pool.num_used


def test_requests_that_are_aborted_at_any_time(alone: Result, llama: str) -> None:
    """Also between asking and what comes back; the others are as they were."""
    with engine(llama, policy="semantic", kv_policy_config=RECALL) as llm:
        reset_trace(llm)
        for stop_after in range(2, 14, 2):
            for i, prompt in enumerate(PROMPTS):
                llm.llm_engine.add_request(f"{i}-{stop_after}", prompt, PARAMS)
            for _ in range(stop_after):
                llm.llm_engine.step()
            gone = [*scheduler_of(llm).requests][:2]
            llm.llm_engine.abort_request(gone, internal=True)
            llm.llm_engine.step()
            llm.llm_engine.abort_request([*scheduler_of(llm).requests], internal=True)
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
        assert run(llm, PROMPTS) == alone
