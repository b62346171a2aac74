"""Semantic: keep the older blocks that are most similar to what the model asks for now."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..ops.cached_blocks import CachedBlocks
from ..ops.scoring import cached_attention, cached_mean_key_cosine, mean_key_cosine
from .base import KVPolicy
from .view import BlockView


@dataclass(frozen=True, kw_only=True)
class SemanticPolicy(KVPolicy):
    """Sink, recent, and the blocks whose keys are most similar to the newest queries.

    ``similarity`` says how the two are compared:

    - ``attention``: softly, key by key, as attention itself compares them: the attention that
      the last eight queries give to a block, the mean over heads, averaged over the eviction
      points so far with a decay. Chosen by measurement, see ``docs/research.md``.
    - ``study``: the cosine of the newest query and a block's mean key, averaged over KV heads.
    """

    name: ClassVar[str] = "semantic"
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {"similarity": ("attention", "study")}

    sink_tokens: int = 8
    recent_tokens: int = 64
    semantic_tokens: int = 192
    similarity: str = "attention"

    @property
    def num_queries(self) -> int:  # type: ignore[override]
        return 1 if self.similarity == "study" else 8

    @property
    def decay(self) -> float:  # type: ignore[override]
        return 0.0 if self.similarity == "study" else 0.8

    def score(self, view: BlockView) -> torch.Tensor:
        if self.similarity == "study":
            return mean_key_cosine(view.queries[:, -1], view.full.keys)
        return view.attention_to_blocks().mean(1)

    def score_cached(self, cached: CachedBlocks) -> torch.Tensor | None:
        by_kernel = cached_mean_key_cosine if self.similarity == "study" else cached_attention
        return by_kernel(cached)
