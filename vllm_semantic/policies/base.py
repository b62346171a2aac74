"""What a KV policy is: a token budget and, if it chooses by content, a score."""

from __future__ import annotations

import dataclasses
from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch


@dataclass(frozen=True)
class BlockBudget:
    """A policy's budget in whole blocks of one block size."""

    sink: int
    recent: int
    selected: int

    @property
    def total(self) -> int:
        return self.sink + self.recent + self.selected

    def candidates(self, kept: Sequence[int]) -> Sequence[int]:
        """The blocks that may be evicted: neither sink nor recent.

        Args:
            kept: logical indices of the full blocks a request holds, ascending.

        Returns:
            The part of ``kept`` between the sink and the recent blocks.
        """
        return kept[self.sink : max(self.sink, len(kept) - self.recent)]


@dataclass(frozen=True, kw_only=True)
class KVPolicy(ABC):
    """Which full blocks a request keeps. The fields are the policy's options.

    A subclass names its options as ``*_tokens`` integer fields with defaults and,
    if it keeps blocks by content, overrides :meth:`score`.
    """

    name: ClassVar[str]
    """The name on the command line."""

    bounded: ClassVar[bool] = True
    """False for a policy that never evicts."""

    sink_tokens: int = 0
    """First tokens of a sequence, never evicted."""

    recent_tokens: int = 0
    """Last tokens of a sequence, never evicted."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A new score leaves an inherited kernel behind, which computes the old one."""
        super().__init_subclass__(**kwargs)
        if "score" in vars(cls) and "score_cached" not in vars(cls):
            cls.score_cached = KVPolicy.score_cached  # type: ignore[method-assign]

    @property
    def selected_tokens(self) -> int:
        """Tokens kept by score between the sink and the recent ones."""
        return 0

    @property
    def budget_tokens(self) -> int:
        """Tokens asked for, before rounding up to whole blocks."""
        return self.sink_tokens + self.recent_tokens + self.selected_tokens

    @property
    def scores_blocks(self) -> bool:
        """Whether blocks are kept by score, not by age alone."""
        return self.selected_tokens > 0

    def budget(self, block_size: int) -> BlockBudget:
        """Round the budget up to whole blocks of ``block_size`` tokens."""
        return BlockBudget(
            *(
                -(-tokens // block_size)
                for tokens in (self.sink_tokens, self.recent_tokens, self.selected_tokens)
            )
        )

    def score(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Score blocks of one layer; a block is paired with its request's query.

        Args:
            queries: ``[num_blocks, num_heads, head_size]`` fp32, the newest query.
            keys: ``[num_blocks, num_kv_heads, block_size, head_size]`` as cached: after
                RoPE, in the cache's dtype.

        Returns:
            ``[num_blocks]`` fp32, higher = keep. The engine averages over layers.

        Raises:
            TypeError: the policy keeps blocks by age alone.
        """
        raise TypeError(f"policy {self.name!r} keeps blocks by age and has no score")

    def score_cached(
        self,
        queries: torch.Tensor,
        rows: torch.Tensor,
        keys: torch.Tensor,
        block_ids: torch.Tensor,
        kernel_blocks: int,
    ) -> torch.Tensor | None:
        """The same scores by a fused kernel that reads the cache in place, if there is one.

        Args:
            queries: ``[num_layers, num_rows, num_heads, head_size]`` of the model's dtype.
            rows: ``[num_blocks]`` int64, the row of each block's query.
            keys: ``[num_layers, num_kernel_blocks, num_kv_heads, kernel_block_size,
                head_size]``, a view of the cache with any strides.
            block_ids: ``[num_blocks]`` int64 ids of the block manager.
            kernel_blocks: kernel blocks in a block of the manager.

        Returns:
            ``[num_layers, num_blocks]`` fp32, or ``None``: use :meth:`score`.
        """
        return None

    def parts(self) -> dict[str, int]:
        """The parts of the budget in tokens, by option name."""
        return {name: getattr(self, name) for name in self.options() if name.endswith("_tokens")}

    @classmethod
    def options(cls) -> dict[str, int]:
        """Option names and their defaults."""
        return {f.name: f.default for f in dataclasses.fields(cls)}  # type: ignore[misc]
