"""H2O: heavy hitters (Zhang et al., 2023, arXiv:2306.14048)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import SelectivePolicy
from .view import BlockView


@dataclass(frozen=True, kw_only=True)
class H2OPolicy(SelectivePolicy):
    """Keeps the blocks that have received the most attention so far, and a recent half.

    Attention adds up over the queries of all tokens since the first eviction point, over the
    last :attr:`num_queries` of a prompt; a block's is the sum over its tokens, the mean over
    heads.
    """

    name: ClassVar[str] = "h2o"
    num_queries: ClassVar[int] = 32
    decay: ClassVar[float] = 1.0

    recent_tokens: int = 128
    selected_tokens: int = 128

    def score(self, view: BlockView) -> torch.Tensor:
        since_last_point = view.attention_to_blocks(view.block_size)
        return since_last_point.mean(1).sum(1)
