"""StreamingLLM: attention sinks and a recent window (Xiao et al., 2023, arXiv:2309.17453)."""

from dataclasses import dataclass
from typing import ClassVar

from .base import KVPolicy


@dataclass(frozen=True, kw_only=True)
class StreamingPolicy(KVPolicy):
    """Keeps the first and the most recent blocks, whatever they hold.

    Positions stay the original ones, not the paper's positions within the cache.
    """

    name: ClassVar[str] = "streaming"

    sink_tokens: int = 4
    recent_tokens: int = 256
