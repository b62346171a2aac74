"""Semantic: keep the older blocks that are most similar to the current query."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..ops.scoring import cached_mean_key_cosine, mean_key_cosine
from .base import KVPolicy
from .view import BlockView


@dataclass(frozen=True, kw_only=True)
class SemanticPolicy(KVPolicy):
    """Sink, recent, and the blocks whose mean key points where the query points."""

    name: ClassVar[str] = "semantic"

    sink_tokens: int = 8
    recent_tokens: int = 64
    semantic_tokens: int = 192

    @property
    def selected_tokens(self) -> int:
        return self.semantic_tokens

    def score(self, view: BlockView) -> torch.Tensor:
        return mean_key_cosine(view.queries[:, -1], view.full.keys)

    score_cached = staticmethod(cached_mean_key_cosine)
