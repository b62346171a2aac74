"""The newest query of every request in a step, per layer."""

from __future__ import annotations

import torch


class QueryCapture:
    """Filled by the attention layers during a forward pass, read by the scorer after it.

    ``active`` is written by the worker before each step: nothing is copied in a step that
    scores nothing.
    """

    def __init__(self) -> None:
        self.active = False
        self.queries: dict[str, torch.Tensor] = {}  # layer name -> [num_reqs, num_heads, head_size]

    def record(self, layer_name: str, query: torch.Tensor, rows: torch.Tensor) -> None:
        """Copy each request's last query.

        Args:
            layer_name: the attention layer.
            query: ``[num_tokens, num_heads, head_size]`` after RoPE.
            rows: ``[num_reqs]`` the row of each request's newest token.
        """
        if self.active:
            self.queries[layer_name] = query[rows]
