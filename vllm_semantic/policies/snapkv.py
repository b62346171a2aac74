"""SnapKV: an observation window votes (Li et al., 2024, arXiv:2404.14469)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import SelectivePolicy
from .view import BlockView


@dataclass(frozen=True, kw_only=True)
class SnapKVPolicy(SelectivePolicy):
    """Keeps the blocks that the last queries attend to most.

    Their mean attention, average-pooled over neighbouring tokens, then the mean over a block's
    tokens and over heads.
    """

    name: ClassVar[str] = "snapkv"
    num_queries: ClassVar[int] = 32
    pooling: ClassVar[int] = 7
    """Tokens that an average goes over."""

    def score(self, view: BlockView) -> torch.Tensor:
        votes = view.attention().mean((1, 2)).flatten(1)  # [num_layers, num_keys]
        pooled = torch.nn.functional.avg_pool1d(
            votes, self.pooling, stride=1, padding=self.pooling // 2, count_include_pad=False
        )
        by_block = pooled.unflatten(1, (-1, view.block_size)).mean(2)
        return by_block[:, : view.num_full_blocks]
