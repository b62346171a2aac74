"""The numbers of a policy, and the way they take to the process that serves them."""

from __future__ import annotations

import msgspec
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import KV_FETCH_STAGES, SchedulerStats

from vllm_semantic.engine.stats import EvictionStats, attach_changes, take_changes


def sent(stats: SchedulerStats) -> SchedulerStats:
    """As vLLM sends it from an engine process."""
    data = msgspec.msgpack.encode(EngineCoreOutputs(scheduler_stats=stats))
    received = msgspec.msgpack.decode(data, type=EngineCoreOutputs).scheduler_stats
    assert received is not None
    return received


def test_changes_are_told_once() -> None:
    stats = EvictionStats(evictions=2, evicted_blocks=7, recovered_blocks=7)
    stats.score_ages.update([1, 1])
    first = {"evictions": 2, "evicted_blocks": 7, "recovered_blocks": 7, "score_age_steps=1": 2}
    assert stats.take_changes() == first
    assert stats.take_changes() == {}
    stats.scored_blocks += 3
    stats.recovered_blocks -= 5
    stats.score_ages.update([1, 4])
    assert stats.take_changes() == {
        "scored_blocks": 3,
        "recovered_blocks": -5,
        "score_age_steps=1": 1,
        "score_age_steps=4": 1,
    }


def test_changes_reach_another_process_and_leave_vllms_own_alone() -> None:
    own = dict.fromkeys(KV_FETCH_STAGES, 0)
    stats = SchedulerStats(num_running_reqs=3, num_kv_fetch_reqs_by_stage=own.copy())
    attach_changes(stats, "semantic", EvictionStats(evictions=1, evicted_blocks=2))
    # Of another KV cache group.
    attach_changes(stats, "semantic", EvictionStats(evictions=1, evicted_blocks=1))
    attach_changes(stats, "a.module:Policy", EvictionStats(recovered_blocks=-4))
    received = sent(stats)
    assert take_changes(received) == {
        ("semantic", "evictions"): 2,
        ("semantic", "evicted_blocks"): 3,
        ("a.module:Policy", "recovered_blocks"): -4,
    }
    assert received == SchedulerStats(num_running_reqs=3, num_kv_fetch_reqs_by_stage=own)
    assert take_changes(received) == {}
