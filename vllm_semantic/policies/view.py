"""What a policy sees of a request whose blocks are to be scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from ..ops.attention import weights


@dataclass(frozen=True)
class BlockView:
    """One request at an eviction point, in attention layers of one shape.

    Queries and keys are as attention uses them: after RoPE, at their original positions.
    """

    queries: torch.Tensor
    """``[num_layers, num_queries, num_heads, head_size]`` fp32, those of the last tokens, the
    newest last."""

    keys: torch.Tensor
    """``[num_layers, num_blocks, num_kv_heads, block_size, head_size]`` fp32: the full blocks,
    and behind them the one being filled, if any; at the end of a question without the sink."""

    read_values: Callable[[], torch.Tensor]
    """Reads :attr:`values`, which most policies never look at."""

    block_indices: torch.Tensor
    """``[num_blocks]`` int64, logical, ascending."""

    num_tokens: int
    """Tokens computed: the eviction point."""

    scale: float
    """What attention multiplies a dot product with."""

    @cached_property
    def values(self) -> torch.Tensor:
        """As :attr:`keys`."""
        return self.read_values()

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.keys.shape[3]

    @property
    def num_full_blocks(self) -> int:
        """Blocks to score: without the one being filled."""
        num_blocks = self.keys.shape[1]
        return num_blocks - int(self.num_tokens % self.block_size > 0)

    @property
    def positions(self) -> torch.Tensor:
        """``[num_blocks, block_size]`` int64, the place of each key in the sequence."""
        offsets = torch.arange(self.block_size, device=self.block_indices.device)
        return self.block_indices.unsqueeze(1) * self.block_size + offsets

    def attention(self, num_queries: int | None = None) -> torch.Tensor:
        """What the last queries attend to, see :func:`~vllm_semantic.ops.attention.weights`.

        Args:
            num_queries: how many of the last; ``None``: all there are.

        Returns:
            ``[num_layers, num_heads, num_queries, num_blocks, block_size]`` fp32.
        """
        queries = self.queries if num_queries is None else self.queries[:, -num_queries:]
        return weights(queries, self.keys, self.positions, self.num_tokens, self.scale)

    def attention_to_blocks(self, num_queries: int | None = None) -> torch.Tensor:
        """The share of attention that each full block gets from each of the last queries.

        Returns:
            ``[num_layers, num_heads, num_queries, num_full_blocks]`` fp32.
        """
        return self.attention(num_queries).sum(4)[..., : self.num_full_blocks]

    def contributions(self, num_queries: int | None = None) -> torch.Tensor:
        """What each full block adds to what each of the last queries reads: the attention that
        its tokens receive times the norms of their values.

        Returns:
            ``[num_layers, num_heads, num_queries, num_full_blocks]`` fp32.
        """
        kept = slice(self.num_full_blocks)
        norms = self.values[:, kept].norm(dim=-1).transpose(1, 2)  # [layers, kv_heads, n, size]
        weights = self.attention(num_queries)[:, :, :, kept]
        by_group = weights.unflatten(1, (norms.shape[1], -1))
        return (by_group * norms[:, :, None, None]).sum(-1).flatten(1, 2)

    @property
    def full(self) -> BlockView:
        """This view without the block that is still being filled."""
        kept = slice(self.num_full_blocks)
        return BlockView(
            self.queries,
            self.keys[:, kept],
            lambda: self.values[:, kept],
            self.block_indices[kept],
            self.num_tokens,
            self.scale,
        )
