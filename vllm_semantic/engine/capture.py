"""The newest query of every request in a step, for one layer."""

from __future__ import annotations

import torch


class QueryCapture:
    """Filled by an attention layer during a forward pass, read by the scorer after it.

    Args:
        buffer: ``[max_num_reqs, num_heads, head_size]`` of the layer's dtype.
    """

    def __init__(self, buffer: torch.Tensor) -> None:
        self.buffer = buffer
        self.active = False
        """Written by the worker before each step: nothing is copied that is not asked for."""

    def record(self, query: torch.Tensor, rows: torch.Tensor) -> None:
        """Copy each request's last query.

        Args:
            query: ``[num_tokens, num_heads, head_size]`` after RoPE.
            rows: ``[num_reqs]`` the row of each request's newest token.
        """
        if self.active:
            torch.index_select(query, 0, rows, out=self.buffer[: len(rows)])
