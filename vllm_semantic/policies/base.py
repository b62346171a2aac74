"""What a KV policy is: a token budget and a score for the blocks between sink and recent ones."""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch

from ..ops.cached_blocks import CachedBlocks
from .view import BlockView

SINK, RECENT = "sink_tokens", "recent_tokens"
"""The parts of a budget that no score decides about."""

RECALL = "recall"
"""The option that says whether evicted blocks may come back from host memory."""

FINAL = ("budget", "budget_tokens", "options", "parts", "recalls", "scores_blocks")
"""Names that no policy may override. The engine uses them in every step, outside the code that
catches what a policy raises."""


@dataclass(frozen=True)
class BlockBudget:
    """A policy's budget in whole blocks of one block size."""

    sink: int
    recent: int
    selected: int

    @property
    def total(self) -> int:
        """Blocks of all parts together."""
        return self.sink + self.recent + self.selected

    def shifted(self, blocks: int) -> BlockBudget:
        """With so many selected blocks more, or fewer below 0: at most as many as there are."""
        moved = max(-self.selected, min(blocks, self.selected))
        return dataclasses.replace(self, selected=self.selected + moved) if moved else self

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

    A subclass is a ``@dataclass(frozen=True, kw_only=True)`` with a :attr:`name`. It names its
    parts of the budget as ``*_tokens`` integer fields with defaults: beside ``sink_tokens`` and
    ``recent_tokens`` each is kept by score. It overrides either :meth:`score`, which sees
    queries, keys and values, or :meth:`rank`, which needs none of them. Other options are
    fields of type ``bool``, ``int``, ``float``, ``str``, ``Literal``, an ``Enum``, tuples of
    these, or ``None``.

    What breaks these rules is refused at start, see :mod:`~vllm_semantic.policies.check`.
    """

    name: ClassVar[str]
    """The name on the command line."""

    bounded: ClassVar[bool] = True
    """False for a policy that never evicts."""

    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """The words that an option allows, by option, for those that take words."""

    num_queries: ClassVar[int] = 1
    """How many of the newest queries :meth:`score` sees: the query window that ends at the
    eviction point. The window takes ``num_queries x max_num_seqs x num_heads x head_size``
    elements of device memory in every layer."""

    decay: ClassVar[float] = 0.0
    """The share of a block's score that still counts at the next eviction point, where the new
    score is added to it: 0 forgets it, 1 makes the score a sum over all points."""

    over_ranks: ClassVar[Literal["mean", "max"]] = "mean"
    """How the scores of a block in a layer become one where tensor-parallel ranks score it, each
    with its own heads: their mean, or their maximum."""

    sink_tokens: int = 0
    """First tokens of a sequence, never evicted."""

    recent_tokens: int = 0
    """Last tokens of a sequence, never evicted."""

    _judge: ClassVar[Literal["score", "rank"] | None] = None
    """Which of the two says what a block is worth: the one that the class overrides."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Check what a subclass overrides, and note which of :meth:`score` and :meth:`rank` it has.

        Properties named ``num_queries``, ``decay`` or ``over_ranks`` are computed once for each
        policy. A class with a new :meth:`score` does not inherit :meth:`score_cached`, the kernel
        of the old one.

        Raises:
            TypeError: the class overrides one of :data:`FINAL`, equality or hash, or both
                :meth:`score` and :meth:`rank`.
        """
        super().__init_subclass__(**kwargs)
        for method in FINAL:
            if _definer(cls, method) is not KVPolicy:
                raise TypeError(f"{cls.__qualname__} must not override {method}: it is final")
        for method in ("__eq__", "__ne__", "__hash__"):
            definer = _definer(cls, method)
            if definer is not object and "__dataclass_fields__" not in vars(definer):
                raise TypeError(
                    f"{cls.__qualname__} must not override {method}: two policies are equal "
                    "where their options are"
                )
        # Computed once: what start has checked is what the engine gets ever after.
        for name in ("num_queries", "decay", "over_ranks"):
            found = inspect.getattr_static(cls, name)
            if isinstance(found, property) and found.fget is not None:
                computed_once = cached_property(found.fget)
                computed_once.__set_name__(cls, name)
                setattr(cls, name, computed_once)
        judge = _definer(cls, "score", "rank")
        if judge is not KVPolicy:
            names = [name for name in ("score", "rank") if name in vars(judge)]
            if len(names) > 1:
                raise TypeError(f"{judge.__qualname__} overrides both score and rank")
            cls._judge = names[0]  # type: ignore[assignment]
        # A new score leaves an inherited kernel behind, which computes the old one.
        order = cls.__mro__
        if order.index(_definer(cls, "score")) < order.index(_definer(cls, "score_cached")):
            cls.score_cached = KVPolicy.score_cached  # type: ignore[method-assign]

    @property
    def selected_tokens(self) -> int:
        """Tokens kept by score between the sink and the recent ones."""
        return sum(self._selected_parts)

    @cached_property
    def _selected_parts(self) -> tuple[int, ...]:
        """Every part of the budget but the sink and the recent tokens."""
        return tuple(n for option, n in self.parts().items() if option not in (SINK, RECENT))

    @property
    def budget_tokens(self) -> int:
        """Tokens asked for, before rounding up to whole blocks."""
        return self.sink_tokens + self.recent_tokens + sum(self._selected_parts)

    @cached_property
    def scores_blocks(self) -> bool:
        """Whether the workers are asked for scores: not where :meth:`rank` answers."""
        return self._judge == "score" and any(self._selected_parts)

    @cached_property
    def recalls(self) -> bool:
        """Whether blocks that were evicted may come back, where there is host memory for them:
        those of a policy that scores blocks, unless it has an option ``recall`` that is off."""
        return self.scores_blocks and bool(getattr(self, RECALL, True))

    def budget(self, block_size: int) -> BlockBudget:
        """Round each part of the budget up to whole blocks of ``block_size`` tokens."""
        return BlockBudget(
            -(-self.sink_tokens // block_size),
            -(-self.recent_tokens // block_size),
            sum(-(-tokens // block_size) for tokens in self._selected_parts),
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
            ``[num_layers, num_full_blocks]`` fp32, higher = keep. The engine reduces it over
            ranks as :attr:`over_ranks` says, takes the mean over layers and applies
            :attr:`decay`; at the end of a question it takes the highest layer, and earlier
            scores do not count.

        Raises:
            TypeError: the policy keeps blocks by age alone.
        """
        raise TypeError(f"policy {self.name!r} keeps blocks by age and has no score")

    def score_cached(self, cached: CachedBlocks) -> torch.Tensor | None:
        """The same scores by a fused kernel that reads the cache in place, if there is one.

        Args:
            cached: blocks of one or more requests; their keys are ``None`` where no view shows
                them, see :class:`~..ops.cached_blocks.CachedLayers`.

        Returns:
            ``[num_layers, num_blocks]`` fp32, also for a block that is being filled; or
            ``None``: there is no kernel for these layers, use :meth:`score` from now on.
        """
        return None

    def parts(self) -> dict[str, int]:
        """The parts of the budget in tokens, by option name."""
        return {name: getattr(self, name) for name in self.options() if name.endswith("_tokens")}

    @classmethod
    def options(cls) -> dict[str, Any]:
        """Option names and their defaults; none of a policy that keeps everything."""
        if not cls.bounded:
            return {}
        return {
            f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            for f in dataclasses.fields(cls)
        }


def _definer(cls: type, *names: str) -> type:
    """The most derived class that defines one of these attributes."""
    return next(base for base in cls.__mro__ if any(name in vars(base) for name in names))


@dataclass(frozen=True, kw_only=True)
class SelectivePolicy(KVPolicy):
    """Sink, recent and, between them, the blocks with the highest scores: what a rule needs."""

    sink_tokens: int = 8
    recent_tokens: int = 64
    selected_tokens: int = 192  # type: ignore[assignment, unused-ignore]
    recall: bool = True
