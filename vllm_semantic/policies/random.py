"""Random: what a choice without any sense is worth."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .base import SelectivePolicy


@dataclass(frozen=True, kw_only=True)
class RandomPolicy(SelectivePolicy):
    """Keeps blocks drawn anew at each eviction point, the same for the same seed."""

    name: ClassVar[str] = "random"

    seed: int = 0

    def rank(
        self, candidates: Sequence[int], num_tokens: int, extra_args: Mapping[str, Any]
    ) -> Sequence[float]:
        return [zlib.crc32(f"{self.seed} {num_tokens} {block}".encode()) for block in candidates]
