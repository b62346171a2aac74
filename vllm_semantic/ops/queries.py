"""Keeping the queries that an eviction will look at."""

import torch

from .platform import runs_triton


def keep_queries(rings: torch.Tensor, queries: torch.Tensor, places: torch.Tensor) -> None:
    """Copy some queries of a step to where the scorer looks for them.

    How many there are is read from memory: a CUDA graph that has captured the one kernel launch
    of a layer copies what ``places`` says when it is replayed, and returns at once if that is
    nothing.

    Args:
        rings: ``[num_rows, num_heads, head_size]``, contiguous; written in place.
        queries: ``[num_tokens, num_heads, head_size]`` with any strides.
        places: ``[1 + n, 2]`` int64, n at least num_kept. First ``(num_kept, 0)``; then, for each,
            its row of ``queries`` and its row of ``rings``.
    """
    if runs_triton(queries.device):
        from .kernels import queries as kernels

        kernels.keep_queries(rings, queries, places)
        return
    num_kept = int(places[0, 0])
    sources, rows = places[1 : 1 + num_kept].unbind(1)
    rings[rows] = queries[sources]  # in a loop, half the time of index_copy_
