"""What policies did, as Prometheus metrics beside vLLM's own on ``/metrics``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from ..served import CONFIG_KEY, ServedPolicies
from .stats import take_changes

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import SchedulerStats

COUNTERS = {
    "evictions": "Times that a request gave up KV cache blocks.",
    "evicted_blocks": (
        "KV cache blocks that requests gave up, in all groups of layers. One that requests shared "
        "returns to the pool with the last of them."
    ),
    "scored_blocks": "KV cache blocks that workers were asked to score.",
    "evicting_requests": (
        "Requests that went over the budget of their policy. One that was preempted since "
        "counts again."
    ),
    "copied_blocks": "Evicted KV cache blocks that were copied to host memory.",
    "read_blocks": (
        "Evicted KV cache blocks that were read in host memory, by attention or for a score. With "
        "those copied and recalled, and the bytes of a block, what went over the bus."
    ),
    "recalled_blocks": "KV cache blocks that came back from host memory.",
    "wanted_blocks": (
        "KV cache blocks that were chosen by score where evicted ones could be, those that came "
        "back included: without them, what was on the device already."
    ),
    "dropped_blocks": (
        "Evicted KV cache blocks that requests could no longer recall: host memory was full."
    ),
    "fallbacks": "Evictions by age where a policy should have chosen and failed.",
}

SCORING_SECONDS = (
    "Time that the host of a worker spent on scores. Nothing waits for a GPU: there it is the "
    "time to launch the kernels, not the time they run."
)

RECOVERED_BLOCKS = (
    "KV cache blocks that the running requests would hold in the full cache and have given up."
)

HOST_BYTES = (
    "Host memory that evicted KV cache blocks take, those of requests that have ended included as "
    "long as nothing else needs their place."
)

SCORE_AGE_STEPS = (
    "Scheduler steps between the one after which a request was scored and the one in which it "
    "gave up blocks: 1, or 2 where the next step is scheduled before the last has run, and more "
    "where a request had to wait."
)


class KVPolicyStatLogger(AggregateStatLoggerBase):
    """Adds up what the engines report, by engine and policy.

    Several API servers work as in vLLM: each counts the reports that it gets, and
    ``prometheus_client`` adds the servers up.
    """

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        labels = ("model_name", "engine", "policy")
        self._model_name = vllm_config.model_config.served_model_name
        self._metrics: dict[str, Any] = {
            name: Counter(f"vllm:kv_policy_{name}", documentation, labels)
            for name, documentation in COUNTERS.items()
        }
        self._metrics["scoring_microseconds"] = Counter(
            "vllm:kv_policy_scoring_time_seconds", SCORING_SECONDS, labels
        )
        self._metrics["recovered_blocks"] = Gauge(
            "vllm:kv_policy_recovered_blocks", RECOVERED_BLOCKS, labels, multiprocess_mode="sum"
        )
        self._metrics["host_bytes"] = Gauge(
            "vllm:kv_policy_host_bytes", HOST_BYTES, labels, multiprocess_mode="sum"
        )
        self._metrics["score_age_steps"] = Histogram(
            "vllm:kv_policy_score_age_steps", SCORE_AGE_STEPS, labels, buckets=(1, 2, 4, 8, 16, 64)
        )
        policy = ServedPolicies.from_config(vllm_config.additional_config[CONFIG_KEY]).default
        for metric in self._metrics.values():
            for engine_index in engine_indexes:
                metric.labels(self._model_name, engine_index, policy.name)  # is there from zero

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Take an engine's changes out of vLLM's numbers of a step, and add them."""
        if scheduler_stats is None:
            return
        for (policy, number), change in take_changes(scheduler_stats).items():
            name, _, age = number.partition("=")
            metric = self._metrics[name].labels(self._model_name, engine_idx, policy)
            if age:
                for _ in range(change):
                    metric.observe(int(age))
            else:
                metric.inc(change / 1e6 if number == "scoring_microseconds" else change)

    def log_engine_initialized(self) -> None:
        """Nothing to say: the scheduler logs the policy."""
