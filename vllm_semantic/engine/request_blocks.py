"""What the block manager knows of each request under a policy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..messages import BlockIndices
from ..policies import KVPolicy
from ..policies.trial import checked_ranks


@dataclass
class RequestBlocks:
    """One request's state under the policy. Written by :class:`SemanticManager` only."""

    kept: BlockIndices = field(default_factory=list)
    """Logical indices of the full blocks held, as of the last eviction point."""

    num_seen: int = 0
    """Full blocks there were at the last eviction point, evicted ones included."""

    evicted_at: int = -1
    """The last eviction point. Where the step that begins there finds no block, vLLM asks once more
    when another request has made room."""

    num_exact_tokens: int | None = None
    """Leading tokens computed before anything was evicted; ``None`` before that."""

    scores: dict[int, dict[int, float]] = field(default_factory=dict)
    """Scores by eviction point and logical index, until blocks have gone there."""

    past_scores: dict[int, float] = field(default_factory=dict)
    """By logical index, the scores of the last eviction and, as far as the policy's decay left
    them, of those before; finite."""

    asked_in_step: dict[int, int] = field(default_factory=dict)
    """The scheduler step after which scores were asked for, by eviction point. Scheduling ahead,
    the next point may come before the last is settled."""

    num_scored: int = 0
    """Blocks that scores were asked for, over all eviction points."""

    num_fallbacks: int = 0
    """Eviction points at which the policy failed and the oldest blocks went."""

    @property
    def num_evicted(self) -> int:
        """Full blocks that the request has lost and not got back, as of the last eviction point."""
        return self.num_seen - len(self.kept)

    def kept_at(self, num_full_blocks: int) -> BlockIndices:
        """The full blocks held once ``num_full_blocks`` have been computed."""
        return self.kept + list(range(self.num_seen, num_full_blocks))

    def judge(
        self,
        policy: KVPolicy,
        candidates: Sequence[int],
        point: int,
        extra_args: Mapping[str, Any],
        forgets: bool = False,
    ) -> Sequence[float]:
        """Score each candidate at an eviction point, as the policy says.

        Args:
            policy: of the request.
            candidates: blocks that may be evicted, or come back.
            point: the eviction point.
            extra_args: the request's own.
            forgets: whether earlier scores count no more, whatever the policy's decay.

        Raises:
            LookupError: the workers sent no scores.
            TypeError: the ranks are no numbers.
            ValueError: every score is NaN, or there is not one for each block.
            Exception: whatever a policy raises.
        """
        if policy.scores_blocks:
            scores = self._received(
                candidates, point, policy.decay, {} if forgets else self.past_scores
            )
        else:
            ranks = policy.rank(list(candidates), point, extra_args)  # a copy: they may change it
            scores = checked_ranks(ranks, len(candidates))
        if scores and all(score != score for score in scores):
            raise ValueError("every score is NaN")
        return scores

    def _received(
        self, candidates: Sequence[int], point: int, decay: float, past: Mapping[int, float]
    ) -> Sequence[float]:
        """What the workers sent, and what is left of earlier scores."""
        found = self.scores.get(point, {})
        if not all(i in found for i in candidates):
            raise LookupError("no scores came from the workers")
        if decay:
            found = {i: score + decay * past.get(i, 0.0) for i, score in found.items()}
            # What is not finite would never decay.
            self.past_scores = {i: score for i, score in found.items() if math.isfinite(score)}
        return [found[i] for i in candidates]
