"""KeyDiff: keys unlike the others (Park et al., 2025, arXiv:2504.15364)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import SelectivePolicy
from .view import BlockView


@dataclass(frozen=True, kw_only=True)
class KeyDiffPolicy(SelectivePolicy):
    """Keeps the blocks whose keys differ most from the mean direction of all keys.

    Minus the cosine of a key and the mean of all normalised keys of its head, in the mean over
    a block's tokens and heads.
    """

    name: ClassVar[str] = "keydiff"

    def score(self, view: BlockView) -> torch.Tensor:
        keys = view.full.keys  # [num_layers, num_blocks, num_kv_heads, block_size, head_size]
        unit = torch.nn.functional.normalize(keys, dim=-1)
        anchor = unit.mean((1, 3), keepdim=True)
        return -torch.nn.functional.cosine_similarity(keys, anchor, dim=-1).mean((2, 3))
