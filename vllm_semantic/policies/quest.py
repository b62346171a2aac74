"""Quest: a bound on what a block can be asked for (Tang et al., 2024, arXiv:2406.10774)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import SelectivePolicy
from .view import BlockView


@dataclass(frozen=True, kw_only=True)
class QuestPolicy(SelectivePolicy):
    """Keeps the blocks whose largest possible dot product with the newest query is largest.

    Channel by channel, the larger of the products with a block's least and greatest key; summed
    over channels, the mean over heads.
    """

    name: ClassVar[str] = "quest"

    def score(self, view: BlockView) -> torch.Tensor:
        keys = view.full.keys
        query = view.queries[:, -1].unflatten(1, (keys.shape[2], -1))
        query = query.unsqueeze(1)  # [num_layers, 1, num_kv_heads, group, head_size]
        least, greatest = (k.unsqueeze(3) for k in (keys.amin(3), keys.amax(3)))
        return torch.maximum(query * least, query * greatest).sum(-1).mean((2, 3))
