"""What a KV policy is: a token budget and a score for the blocks between sink and recent ones."""

from __future__ import annotations

import dataclasses
from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..ops.cached_blocks import CachedBlocks
from .view import BlockView


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

    A subclass names its parts of the budget as ``*_tokens`` integer fields with defaults and
    overrides either :meth:`score`, which sees queries, keys and values, or :meth:`rank`,
    which needs none of them.
    """

    name: ClassVar[str]
    """The name on the command line."""

    bounded: ClassVar[bool] = True
    """False for a policy that never evicts."""

    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """What each option that is a word allows."""

    num_queries: ClassVar[int] = 1
    """How many of the newest queries :meth:`score` sees: a window that ends at the eviction
    point. Each costs ``max_num_seqs x heads x head_size`` elements a layer."""

    decay: ClassVar[float] = 0.0
    """What is left of a block's score at the next eviction point, where the new score is added
    to it: 0 forgets, 1 is a sum over all points."""

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
        """Whether the workers are asked for scores: not where :meth:`rank` answers."""
        return self.selected_tokens > 0 and type(self).rank is KVPolicy.rank

    def budget(self, block_size: int) -> BlockBudget:
        """Round the budget up to whole blocks of ``block_size`` tokens."""
        return BlockBudget(
            *(
                -(-tokens // block_size)
                for tokens in (self.sink_tokens, self.recent_tokens, self.selected_tokens)
            )
        )

    def rank(
        self, candidates: Sequence[int], num_tokens: int, extra_args: Mapping[str, Any]
    ) -> Sequence[float]:
        """Score blocks without looking at queries, keys or values; by age if not overridden.

        Args:
            candidates: logical indices of the blocks that may be evicted, ascending.
            num_tokens: the eviction point.
            extra_args: the request's own ``SamplingParams.extra_args``.

        Returns:
            One score per candidate, higher = keep.
        """
        return candidates

    def score(self, view: BlockView) -> torch.Tensor:
        """Score one request's blocks in layers of one shape.

        Args:
            view: queries, keys and values of the request.

        Returns:
            ``[num_layers, num_full_blocks]`` fp32, higher = keep. The engine averages over
            layers and tensor-parallel ranks, and applies :attr:`decay`.

        Raises:
            TypeError: the policy keeps blocks by age alone.
        """
        raise TypeError(f"policy {self.name!r} keeps blocks by age and has no score")

    def score_cached(self, cached: CachedBlocks) -> torch.Tensor | None:
        """The same scores by a fused kernel that reads the cache in place, if there is one.

        Returns:
            ``[num_layers, num_blocks]`` fp32, also for a block that is being filled; or
            ``None``: use :meth:`score`.
        """
        return None

    def parts(self) -> dict[str, int]:
        """The parts of the budget in tokens, by option name."""
        return {name: getattr(self, name) for name in self.options() if name.endswith("_tokens")}

    @classmethod
    def options(cls) -> dict[str, Any]:
        """Option names and their defaults."""
        return {f.name: f.default for f in dataclasses.fields(cls)}


@dataclass(frozen=True, kw_only=True)
class SelectivePolicy(KVPolicy):
    """Sink, recent and, between them, the blocks with the highest scores: what a rule needs."""

    sink_tokens: int = 8
    recent_tokens: int = 64
    selected_tokens: int = 192  # type: ignore[assignment, unused-ignore]
