"""Keeping the queries that an eviction will look at."""

from collections.abc import Callable
from functools import partial

import torch

from .platform import runs_triton

Keep = Callable[[torch.Tensor, torch.Tensor], None]
"""Copies some queries of a step to where the scorer looks for them.

How many there are is read from memory: a CUDA graph that has captured the one kernel launch of a
layer copies what ``places`` says when it is replayed, and returns at once if that is nothing.

Args:
    queries: ``[num_tokens, num_heads, head_size]``; on a GPU with any strides, else each head's
        channels lie together.
    places: ``[1 + n, 2]`` int64, n at least num_kept. First ``(num_kept, 0)``; then, for each,
        its row of ``queries`` and its row of the rings.
"""


def keeper(rings: torch.Tensor) -> Keep:
    """What keeps queries in the rings of a layer.

    Args:
        rings: ``[num_rows, num_heads, head_size]``, contiguous; written in place.
    """
    if runs_triton(rings.device):
        from .kernels.queries import keep_queries

        return partial(keep_queries, rings)
    # numpy takes a third of the time of torch's operations for a few rows; it knows no bf16.
    elements = torch.int16 if rings.itemsize == 2 else torch.int32
    written = rings.view(elements).numpy()

    def keep(queries: torch.Tensor, places: torch.Tensor) -> None:
        kept = places.numpy()
        sources, rows = kept[1 : 1 + kept[0, 0]].T
        written[rows] = queries.view(elements).numpy()[sources]

    return keep
