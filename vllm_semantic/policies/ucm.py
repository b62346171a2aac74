"""UCM-ESA: the dot product in place of the cosine (unified-cache-management, 2025)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import SelectivePolicy
from .view import BlockView


@dataclass(frozen=True, kw_only=True)
class UCMPolicy(SelectivePolicy):
    """Keeps the blocks whose mean key has the largest dot product with the newest query."""

    name: ClassVar[str] = "ucm"

    def score(self, view: BlockView) -> torch.Tensor:
        mean_key = view.full.keys.mean(3)  # [num_layers, num_blocks, num_kv_heads, head_size]
        query = view.queries[:, -1].unflatten(1, (mean_key.shape[2], -1)).mean(2)
        return (query.unsqueeze(1) * mean_key).sum(-1).mean(2)
