"""Knorm: small keys are attended to (Devoto et al., 2024, arXiv:2406.11430)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import SelectivePolicy
from .view import BlockView


@dataclass(frozen=True, kw_only=True)
class KnormPolicy(SelectivePolicy):
    """Keeps the blocks whose keys have the smallest mean norm."""

    name: ClassVar[str] = "knorm"

    def score(self, view: BlockView) -> torch.Tensor:
        return -view.full.keys.norm(dim=-1).mean((2, 3))
