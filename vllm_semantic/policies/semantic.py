"""Semantic: keep the older blocks that are most similar to the current query."""

from dataclasses import dataclass
from typing import ClassVar

from ..ops.scoring import cached_mean_key_cosine, mean_key_cosine
from .base import KVPolicy


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

    score = staticmethod(mean_key_cosine)
    score_cached = staticmethod(cached_mean_key_cosine)
