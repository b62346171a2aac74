"""Block scores of one step: captured queries against the cache, averaged over layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..messages import BlockScores, ScoreRequest
from ..policies import KVPolicy
from .capture import QueryCapture
from .key_cache import KeyCache

if TYPE_CHECKING:
    from .spec import SemanticSpec


@dataclass(frozen=True)
class ScoredGroup:
    """One KV cache group under a policy, as the workers see it."""

    spec: SemanticSpec
    layers: dict[str, KeyCache]

    @property
    def kernel_blocks(self) -> int:
        """Kernel blocks in one block of the block manager, the same for all layers."""
        return next(iter(self.layers.values())).kernel_blocks


class BlockScorer:
    """Answers score requests after a forward pass."""

    def __init__(self, groups: Mapping[int, ScoredGroup], capture: QueryCapture) -> None:
        self.groups = groups
        self.capture = capture

    def __call__(
        self,
        score_requests: Mapping[int, Mapping[str, ScoreRequest]],
        rows: Mapping[str, int],
    ) -> BlockScores:
        """Score what was asked for.

        Args:
            score_requests: by KV cache group and request.
            rows: each request's row in the batch that just ran.

        Returns:
            One score per block asked for, in order.
        """
        return {
            group_id: self._score_group(self.groups[group_id], asked, rows)
            for group_id, asked in score_requests.items()
        }

    def _score_group(
        self, group: ScoredGroup, asked: Mapping[str, ScoreRequest], rows: Mapping[str, int]
    ) -> dict[str, list[float]]:
        policy: KVPolicy = group.spec.policy
        counts = [len(request.block_ids) for request in asked.values()]
        device = next(iter(self.capture.queries.values())).device
        row_of_block = torch.tensor(
            [rows[request_id] for request_id in asked], device=device
        ).repeat_interleave(torch.tensor(counts, device=device))
        block_ids = torch.tensor(
            [block_id for request in asked.values() for block_id in request.block_ids],
            device=device,
        )
        total: Any = 0
        for name, key_cache in group.layers.items():
            queries = self.capture.queries[name].float()[row_of_block]
            total = total + policy.score(queries, key_cache.gather(block_ids))
        scores = (total / len(group.layers)).split(counts)
        return {request_id: part.tolist() for request_id, part in zip(asked, scores, strict=True)}
