"""What a policy did, in numbers, and how they reach the process that serves ``/metrics``."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.metrics.stats import SchedulerStats

KEY_PREFIX = "kv_policy:"
"""What our keys begin with, ``kv_policy:NAME:POLICY``, among those of vLLM's own."""


@dataclass
class EvictionStats:
    """Counters of one policy in one block manager since the start of the engine.

    Written by the manager; the time by the scheduler. What happens to a request in all groups of
    layers at once is counted in the first.
    """

    evictions: int = 0
    """Times that a request gave up blocks, in whatever number of groups."""

    evicted_blocks: int = 0
    """Blocks that requests gave up; one that is evicted again after a recall counts again."""

    scored_blocks: int = 0
    """Blocks on the device that the workers were asked to score, at every eviction point anew."""

    evicting_requests: int = 0
    """Requests that went over budget; one that was preempted since counts again."""

    scoring_microseconds: int = 0
    """Host time of a worker."""

    fallbacks: int = 0
    """Evictions by age where the policy should have chosen and failed."""

    copied_blocks: int = 0
    """Evicted blocks that were copied to host memory."""

    read_blocks: int = 0
    """Blocks that were read where they are in host memory, by attention or for a score."""

    recalled_blocks: int = 0
    """Blocks that came back from host memory."""

    wanted_blocks: int = 0
    """Blocks that were chosen where some could come back, those that did included."""

    dropped_blocks: int = 0
    """Evicted blocks that requests could no longer have back: host memory was full."""

    recovered_blocks: int = 0
    """Blocks evicted from requests that are running now, less those that came back. A gauge."""

    host_bytes: int = 0
    """Host memory that evicted blocks take now, of all tensor-parallel ranks; counted under the
    server's own policy. Not a counter. Written by the scheduler."""

    score_ages: Counter[int] = field(default_factory=Counter)
    """Evictions by how many scheduler steps ago their scores were asked for."""

    _taken: dict[str, int] = field(default_factory=dict, repr=False, compare=False)
    _taken_at: tuple[int, ...] = field(default=(), repr=False, compare=False)

    def __add__(self, other: EvictionStats) -> EvictionStats:
        """The counters of two policies together."""
        names = [field.name for field in fields(self) if field.compare]
        return EvictionStats(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def take_changes(self) -> dict[str, int]:
        """What changed since the last call, by name; an age as ``score_age_steps=AGE``.

        Differences, also of what is no counter: any of several API servers gets them, and
        their sum is right wherever they are added up.
        """
        # Asked for in every step; nothing else changes without one of these.
        now = (
            self.evicted_blocks,
            self.scored_blocks,
            self.recovered_blocks,
            self.scoring_microseconds,
            self.host_bytes,
        )
        if now == self._taken_at:
            return {}
        self._taken_at = now
        numbers = {name: number for name, number in vars(self).items() if isinstance(number, int)}
        numbers |= {f"score_age_steps={age}": count for age, count in self.score_ages.items()}
        taken, self._taken = self._taken, numbers
        changes = {name: number - taken.get(name, 0) for name, number in numbers.items()}
        return {name: change for name, change in changes.items() if change}


def attach_changes(scheduler_stats: SchedulerStats, policy: str, stats: EvictionStats) -> None:
    """Send changes along with vLLM's ``SchedulerStats``.

    They go where numbers by name travel already, since only declared fields do: beside the counts
    of KV connectors, under names of our own. Who does not know of them ignores them.
    """
    numbers = scheduler_stats.num_kv_fetch_reqs_by_stage
    for name, change in stats.take_changes().items():
        key = f"{KEY_PREFIX}{name}:{policy}"
        numbers[key] = numbers.get(key, 0) + change


def take_changes(scheduler_stats: SchedulerStats) -> dict[tuple[str, str], int]:
    """Take the changes out again, before vLLM's own loggers see them; by policy and name."""
    numbers = scheduler_stats.num_kv_fetch_reqs_by_stage
    changes = {}
    for key in [key for key in numbers if key.startswith(KEY_PREFIX)]:
        name, policy = key.removeprefix(KEY_PREFIX).split(":", 1)
        changes[policy, name] = numbers.pop(key)
    return changes
