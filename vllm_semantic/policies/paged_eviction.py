"""PagedEviction (Chitty-Venkata et al., 2025, arXiv:2509.04377)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import SelectivePolicy
from .view import BlockView


@dataclass(frozen=True, kw_only=True)
class PagedEvictionPolicy(SelectivePolicy):
    """Keeps the blocks with the largest mean ratio of value norm to key norm."""

    name: ClassVar[str] = "paged_eviction"

    def score(self, view: BlockView) -> torch.Tensor:
        full = view.full
        ratio = full.values.norm(dim=-1) / full.keys.norm(dim=-1).clamp_min(1e-8)
        return ratio.mean((2, 3))
