"""Oracle: the blocks with the most attention to come, which a request brings with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .base import SelectivePolicy

FUTURE_ATTENTION = "kv_future_attention"
"""Key of ``SamplingParams.extra_args``: by eviction point (a number of tokens, as a string), the
attention that each block will receive after it in the full cache."""


@dataclass(frozen=True, kw_only=True)
class OraclePolicy(SelectivePolicy):
    """Keeps the blocks with the largest true attention mass in the steps to come.

    For measurements: a request brings what it will attend to, known where its text is.
    """

    name: ClassVar[str] = "oracle"

    def rank(
        self, candidates: Sequence[int], num_tokens: int, extra_args: Mapping[str, Any]
    ) -> Sequence[float]:
        """By the request's own :data:`FUTURE_ATTENTION`; by age where it brought none."""
        future = extra_args.get(FUTURE_ATTENTION, {}).get(str(num_tokens))
        if future is None:
            return candidates
        return [future[block] for block in candidates]
