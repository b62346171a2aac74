"""The full cache: every block is kept, as in vLLM without a policy."""

from dataclasses import dataclass
from typing import ClassVar

from .base import KVPolicy


@dataclass(frozen=True, kw_only=True)
class FullPolicy(KVPolicy):
    """Never evicts. The baseline the others are measured against."""

    name: ClassVar[str] = "full"
    bounded: ClassVar[bool] = False
