"""Real vLLM engines in the test process, one at a time, with what they did."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vllm_semantic.messages import step_of

from . import interpreter
from .platforms import on_gpu


@dataclass
class Trace:
    """What the scheduler of an engine decided, request by request."""

    evictions: dict[str, dict[int, list[Any]]] = field(default_factory=dict)
    """Request -> computed tokens at the eviction -> logical blocks; where layers are in several
    groups, a list of them for each group."""
    recalls: dict[str, dict[int, list[Any]]] = field(default_factory=dict)
    """The same of the blocks that came back."""
    max_held: dict[str, int] = field(default_factory=dict)
    """Request -> most blocks it held in a group of layers after any step."""
    num_preemptions: int = 0

    def by_index(self) -> list[dict[int, list[Any]]]:
        """Evictions in the order of the prompts (vLLM's ids begin with their number)."""
        return [self.evictions[key] for key in sorted(self.evictions, key=request_number)]


def request_number(request_id: str) -> int:
    return int(request_id.split("-")[0])


def evicting_requests(step: Any) -> set[str]:
    return {request_id for evictions in step.evictions.values() for request_id in evictions}


@contextmanager
def engine(model: str, *, policy: str | None = None, **kwargs: Any) -> Iterator[Any]:
    """A small engine; afterwards its block pool must be whole again.

    ``llm.trace`` holds what the scheduler did since the last ``reset_trace(llm)``.
    """
    from vllm.distributed import cleanup_dist_env_and_memory

    from vllm_semantic import LLM

    defaults: dict[str, Any] = {
        "dtype": "float32",
        "block_size": 32,
        "max_model_len": 2048,
        "max_num_batched_tokens": 512,
        "kv_cache_memory_bytes": 32 << 20,
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
    }
    if on_gpu():
        defaults["gpu_memory_utilization"] = 0.3  # of what has to be free at start
    if interpreter.wanted():
        interpreter.allow_async_scheduling()
        defaults |= {"distributed_executor_backend": "uni", "async_scheduling": True}
    llm = LLM(model, kv_policy=policy, **(defaults | kwargs))
    try:
        _follow(llm)
        yield llm
        assert_pool_whole(llm)
        assert take_fallbacks(llm) == 0, "a policy failed, see the log"
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def scheduler_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def worker_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def manager_of(llm: Any) -> Any:
    return scheduler_of(llm).kv_policy_managers[0]


def reset_trace(llm: Any) -> None:
    llm.trace = Trace()


def take_fallbacks(llm: Any) -> int:
    """Evictions by age since the last call where a policy failed."""
    total = 0
    for manager in getattr(scheduler_of(llm), "kv_policy_managers", {}).values():
        for stats in manager.stats_by_policy.values():
            total += stats.fallbacks
            stats.fallbacks = 0
    return total


def assert_pool_whole(llm: Any) -> None:
    """Every block but the null block is free, and nothing of a request is left behind."""
    scheduler = scheduler_of(llm)
    pool = scheduler.kv_cache_manager.block_pool
    assert not scheduler.requests
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert all(block.ref_cnt == 0 for block in pool.blocks if not block.is_null)
    for manager in getattr(scheduler, "kv_policy_managers", {}).values():
        assert not manager._requests
        assert not manager._evictions
        assert manager.recalls is None or not manager.recalls.take()
    if getattr(scheduler, "host_pool", None) is not None:
        assert not scheduler.host_pool._slots, "kept for a request that is gone"


def _follow(llm: Any) -> None:
    """Record every scheduler step; the engine itself is not changed."""
    reset_trace(llm)
    scheduler = scheduler_of(llm)
    schedule, preempt = scheduler.schedule, scheduler._preempt_request

    def following_schedule(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        step = step_of(output)
        for request_id in evicting_requests(step) if step else ():
            at = scheduler.requests[request_id].num_computed_tokens
            at -= output.num_scheduled_tokens.get(request_id, 0)
            managers = scheduler.kv_policy_managers
            groups = [step.evictions.get(i, {}).get(request_id, []) for i in managers]
            back = [sorted(step.recalls.get(i, {}).get(request_id, ())) for i in managers]
            if any(back):
                of_all = back if len(back) > 1 else back[0]
                llm.trace.recalls.setdefault(request_id, {})[at] = of_all
            elif not any(m.kv_cache_spec.served.layer_skew_tokens for m in managers.values()):
                assert len({len(blocks) for blocks in groups}) == 1, "as many blocks in each"
            blocks = groups if len(groups) > 1 else groups[0]
            llm.trace.evictions.setdefault(request_id, {})[at] = blocks
        for request_id in output.num_scheduled_tokens:
            llm.trace.evictions.setdefault(request_id, {})
            for manager in getattr(scheduler, "kv_policy_managers", {}).values():
                held = sum(not b.is_null for b in manager.req_to_blocks.get(request_id, ()))
                llm.trace.max_held[request_id] = max(held, llm.trace.max_held.get(request_id, 0))
        return output

    def following_preempt(*args: Any, **kwargs: Any) -> Any:
        llm.trace.num_preemptions += 1
        return preempt(*args, **kwargs)

    scheduler.schedule, scheduler._preempt_request = following_schedule, following_preempt
