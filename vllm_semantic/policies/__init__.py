"""The policies by name. Adding one touches its file, this dict and the test matrix."""

from .base import BlockBudget, KVPolicy
from .full import FullPolicy
from .semantic import SemanticPolicy
from .streaming import StreamingPolicy

POLICIES: dict[str, type[KVPolicy]] = {
    policy.name: policy for policy in (FullPolicy, StreamingPolicy, SemanticPolicy)
}

__all__ = [
    "POLICIES",
    "BlockBudget",
    "FullPolicy",
    "KVPolicy",
    "SemanticPolicy",
    "StreamingPolicy",
]
