"""Semantic: keep the older blocks that are most similar to what the model asks for now."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..ops.cached_blocks import CachedBlocks
from ..ops.scoring import (
    Reduction,
    cached_attention,
    cached_contribution,
    cached_mean_key_cosine,
    mean_key_cosine,
    over_heads,
)
from .base import KVPolicy
from .view import BlockView


@dataclass(frozen=True, kw_only=True)
class SemanticPolicy(KVPolicy):
    """Sink, recent, and the blocks whose keys are most similar to the newest queries.

    ``similarity`` says how the two are compared:

    - ``contribution``: softly, key by key, as attention itself compares them: the attention that
      the last eight queries give to each key times the norm of its value, averaged over the
      eviction points so far with a decay. Chosen by measurement, see ``docs/research.md``.
    - ``attention``: the same without the values: how much a block is looked at, not what it adds.
      Its decay is faster.
    - ``study``: the cosine of the newest query and a block's mean key, averaged over the heads.

    ``heads`` says how a block's scores under the heads of a layer become one score: ``max`` is the
    highest of them, ``mean`` their mean. With ``study`` it is the mean in any case.

    ``recall`` says whether evicted blocks may come back, where there is host memory for them.
    """

    name: ClassVar[str] = "semantic"
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "similarity": ("contribution", "attention", "study"),
        "heads": ("max", "mean"),
    }

    sink_tokens: int = 8
    recent_tokens: int = 128
    semantic_tokens: int = 128
    similarity: str = "contribution"
    heads: Reduction = "max"
    recall: bool = True

    @property
    def num_queries(self) -> int:  # type: ignore[override]
        return 1 if self.similarity == "study" else 8

    @property
    def over_ranks(self) -> Reduction:  # type: ignore[override]
        return "mean" if self.similarity == "study" else self.heads

    @property
    def decay(self) -> float:  # type: ignore[override]
        return DECAYS[self.similarity]

    def score(self, view: BlockView) -> torch.Tensor:
        if self.similarity == "study":
            return mean_key_cosine(view.queries[:, -1], view.full.keys)
        added = self.similarity == "contribution"
        by_head = view.contributions() if added else view.attention_to_blocks()
        return over_heads(by_head.mean(2), 1, self.heads)

    def score_cached(self, cached: CachedBlocks) -> torch.Tensor | None:
        if self.similarity == "study":
            return cached_mean_key_cosine(cached)
        return KERNELS[self.similarity](cached, self.heads)


DECAYS = {"attention": 0.8, "contribution": 0.9, "study": 0.0}
"""Chosen for each by measurement, see ``docs/research.md``."""

KERNELS = {
    "attention": cached_attention,
    "contribution": cached_contribution,
}
"""What computes each similarity in place."""
