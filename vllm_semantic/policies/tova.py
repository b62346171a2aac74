"""TOVA: token omission via attention (Oren et al., 2024, arXiv:2401.06104)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import SelectivePolicy
from .view import BlockView


@dataclass(frozen=True, kw_only=True)
class TOVAPolicy(SelectivePolicy):
    """Keeps the blocks that the newest query attends to most, in the mean over heads."""

    name: ClassVar[str] = "tova"

    def score(self, view: BlockView) -> torch.Tensor:
        return view.attention_to_blocks(1)[:, :, 0].mean(1)
