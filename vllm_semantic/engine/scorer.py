"""Block scores of one step: captured queries against the cache, averaged over layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..messages import BlockScores, ScoreRequest
from ..policies import KVPolicy
from .capture import QueryCapture
from .key_cache import KeyCache


@dataclass(frozen=True)
class ScoredLayers:
    """Layers that are scored in one go."""

    key_cache: KeyCache
    queries: torch.Tensor  # [num_layers, max_num_reqs, num_heads, head_size]

    @property
    def captures(self) -> list[QueryCapture]:
        """What fills ``queries``: one per layer."""
        return [QueryCapture(buffer) for buffer in self.queries]


class BlockScorer:
    """Answers score requests after a forward pass.

    Args:
        policy: says how similar a block is.
        groups: the layers of each KV cache group under the policy.
    """

    def __init__(self, policy: KVPolicy, groups: Mapping[int, Sequence[ScoredLayers]]) -> None:
        self.policy = policy
        self.groups = groups

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
        self,
        group: Sequence[ScoredLayers],
        asked: Mapping[str, ScoreRequest],
        rows: Mapping[str, int],
    ) -> dict[str, list[float]]:
        device = group[0].queries.device
        counts = [len(request.block_ids) for request in asked.values()]
        row_of_block = torch.tensor(
            [
                rows[request_id]
                for request_id, n in zip(asked, counts, strict=True)
                for _ in range(n)
            ],
            device=device,
        )
        block_ids = torch.tensor(
            [block_id for request in asked.values() for block_id in request.block_ids],
            device=device,
        )
        total = torch.zeros(len(block_ids), device=device)
        for layers in group:
            keys = layers.key_cache.gather(block_ids)
            queries = layers.queries.index_select(1, row_of_block).float()
            scores = self.policy.score(queries.flatten(0, 1), keys.flatten(0, 1))
            total += scores.view(len(keys), -1).sum(0)
        means = total / sum(len(layers.queries) for layers in group)
        return {
            request_id: part.tolist()
            for request_id, part in zip(asked, means.split(counts), strict=True)
        }
