"""Random: blocks drawn by lot, the baseline of every rule that scores blocks."""

import random
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
        drawn = (random.Random(f"{self.seed} {num_tokens} {block}") for block in candidates)
        return [generator.random() for generator in drawn]
