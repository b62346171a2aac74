"""Block scores of one step: captured queries against the cache, averaged over layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from vllm.utils.torch_utils import async_tensor_h2d

from ..messages import BlockScores, ScoreRequest
from ..policies import KVPolicy
from .key_cache import KeyCache


@dataclass(frozen=True)
class ScoredLayers:
    """Layers that are scored in one go."""

    key_cache: KeyCache
    queries: torch.Tensor  # [num_layers, max_num_reqs, num_heads, head_size]


class PendingScores:
    """Scores on their way to the host.

    Args:
        asked: by KV cache group and request.
        means: per group, ``[num_blocks]`` fp32 on the device, requests in their order.
        copy_stream: what to copy on; ``None`` copies when they are collected.
    """

    def __init__(
        self,
        asked: Mapping[int, Mapping[str, ScoreRequest]],
        means: Mapping[int, torch.Tensor],
        copy_stream: torch.cuda.Stream | None,
    ) -> None:
        self._asked = asked
        self._on_device = means  # alive until it has been copied
        self._on_host = means
        self._copied: torch.cuda.Event | None = None
        if copy_stream is None:
            return
        ready = torch.cuda.current_stream().record_event()
        with torch.cuda.stream(copy_stream):
            copy_stream.wait_event(ready)
            self._on_host = {
                group_id: mean.to("cpu", non_blocking=True) for group_id, mean in means.items()
            }
            self._copied = torch.cuda.Event(blocking=True)
            self._copied.record()

    def collect(self) -> BlockScores:
        """Wait for the copy, for nothing else on the device."""
        if self._copied is not None:
            self._copied.synchronize()
        return {group_id: dict(self._split(group_id)) for group_id in self._asked}

    def _split(self, group_id: int) -> Iterator[tuple[str, list[float]]]:
        scores = iter(self._on_host[group_id].tolist())
        for request_id, request in self._asked[group_id].items():
            yield request_id, [next(scores) for _ in request.block_ids]


class BlockScorer:
    """Answers score requests after a forward pass, without waiting for the device.

    Args:
        policy: says how similar a block is.
        groups: the layers of each KV cache group under the policy.
        mean_over_ranks: means of a tensor over the tensor-parallel ranks.
    """

    def __init__(
        self,
        policy: KVPolicy,
        groups: Mapping[int, Sequence[ScoredLayers]],
        mean_over_ranks: Callable[[torch.Tensor], torch.Tensor] = lambda scores: scores,
    ) -> None:
        self.policy = policy
        self.groups = groups
        self.mean_over_ranks = mean_over_ranks

    def __call__(
        self,
        asked: Mapping[int, Mapping[str, ScoreRequest]],
        rows: Mapping[str, int],
        copy_stream: torch.cuda.Stream | None = None,
    ) -> PendingScores:
        """Score what was asked for.

        Args:
            asked: by KV cache group and request.
            rows: each request's row in the batch that just ran.
            copy_stream: what the scores travel to the host on.

        Returns:
            One score per block asked for, in order.
        """
        means = {
            group_id: self._score_group(self.groups[group_id], requests, rows)
            for group_id, requests in asked.items()
        }
        return PendingScores(asked, means, copy_stream)

    def _score_group(
        self,
        group: Sequence[ScoredLayers],
        asked: Mapping[str, ScoreRequest],
        rows: Mapping[str, int],
    ) -> torch.Tensor:
        device = group[0].queries.device
        row_of_block = [
            rows[request_id] for request_id, request in asked.items() for _ in request.block_ids
        ]
        block_ids = [block_id for request in asked.values() for block_id in request.block_ids]
        # One copy to the device for both.
        rows_and_ids = async_tensor_h2d([row_of_block, block_ids], device, torch.int64)
        scores = torch.cat([self._score_layers(layers, *rows_and_ids) for layers in group])
        return self.mean_over_ranks(scores.mean(0))

    def _score_layers(
        self, layers: ScoredLayers, rows: torch.Tensor, block_ids: torch.Tensor
    ) -> torch.Tensor:
        """Scores ``[num_layers, num_blocks]``."""
        key_cache = layers.key_cache
        if key_cache.keys is not None:
            scores = self.policy.score_cached(
                layers.queries, rows, key_cache.keys, block_ids, key_cache.kernel_blocks
            )
            if scores is not None:
                return scores
        keys = key_cache.gather(block_ids)
        queries = layers.queries.index_select(1, rows).float()
        scores = self.policy.score(queries.flatten(0, 1), keys.flatten(0, 1))
        return scores.view(len(keys), -1)
