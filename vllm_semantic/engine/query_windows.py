"""The newest queries of each request: a ring of rows per request, in every scored layer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class QueryWindows:
    """Which row of the layers' buffers holds the query of which token.

    Batch rows move from step to step; a request's ring does not. Written by the worker.

    Args:
        num_queries: queries kept of each request.
        max_num_reqs: requests at a time.
        num_drafts: tokens that steps in flight may guess for a request. Their queries take no row
            of one that is looked at, even where a session's next turn ends before the last guess.
    """

    def __init__(self, num_queries: int, max_num_reqs: int, num_drafts: int = 0) -> None:
        self.num_queries = num_queries + num_drafts
        self.num_rows = max_num_reqs * self.num_queries
        """Of all rings together."""
        self._free = list(range(max_num_reqs - 1, -1, -1))
        self._rings: dict[str, int] = {}

    def buffer(
        self,
        num_layers: int,
        num_heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        """Rows for layers of one shape, ``[num_layers, num_rows, num_heads, head_size]``."""
        shape = (num_layers, self.num_rows, num_heads, head_size)
        return torch.zeros(shape, dtype=dtype, device=device)

    def place(
        self,
        wanted: Collection[str],
        request_ids: Sequence[str],
        query_starts: np.ndarray,
        seq_lens: np.ndarray,
    ) -> np.ndarray:
        """Find the row of the buffers for each query of a step that is to be kept.

        Args:
            wanted: requests whose queries will be looked at.
            request_ids: the batch's requests, row by row.
            query_starts: ``[num_reqs + 1]``, first token of each in the batch.
            seq_lens: ``[num_reqs]``, tokens of each once the step has run, evicted ones too.

        Returns:
            ``[num_kept, 2]`` int64: rows of the step's query tensor, rows of the buffers.
        """
        batch = [i for i, request_id in enumerate(request_ids) if request_id in wanted]
        rings = np.array([self._ring(request_ids[i]) for i in batch], np.int64)
        ends = query_starts[1:][batch].astype(np.int64)
        kept = np.minimum(ends - query_starts[batch], self.num_queries)
        # For each kept query: how many of its request's are kept before it.
        before = np.arange(kept.sum()) - np.repeat(kept.cumsum() - kept, kept)
        sources = np.repeat(ends - kept, kept) + before
        tokens = np.repeat(seq_lens[batch] - kept, kept) + before
        rows = np.repeat(rings, kept) * self.num_queries + tokens % self.num_queries
        return np.column_stack([sources, rows])

    def window(self, request_id: str, num_tokens: int, num_queries: int) -> list[int]:
        """The rows of the last queries before ``num_tokens``, the newest last."""
        size = self.num_queries
        first_row = self._ring(request_id) * size
        tokens = range(max(0, num_tokens - num_queries), num_tokens)
        return [first_row + token % size for token in tokens]

    def forget(self, request_ids: Iterable[str]) -> None:
        """Free the rings of requests that are gone or were preempted."""
        for request_id in request_ids:
            if request_id in self._rings:
                self._free.append(self._rings.pop(request_id))

    def _ring(self, request_id: str) -> int:
        ring = self._rings.get(request_id)
        if ring is None:
            ring = self._rings[request_id] = self._free.pop()
        return ring


def num_drafts_in_flight(vllm_config: VllmConfig) -> int:
    """Tokens that steps in flight may guess for a request, at most."""
    return vllm_config.num_speculative_tokens * vllm_config.max_concurrent_batches
