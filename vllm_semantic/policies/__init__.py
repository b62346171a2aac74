"""The policies by name. How to add one: docs/architecture.md."""

from .base import BlockBudget, KVPolicy, SelectivePolicy
from .full import FullPolicy
from .h2o import H2OPolicy
from .keydiff import KeyDiffPolicy
from .knorm import KnormPolicy
from .oracle import OraclePolicy
from .paged_eviction import PagedEvictionPolicy
from .quest import QuestPolicy
from .random import RandomPolicy
from .semantic import SemanticPolicy
from .snapkv import SnapKVPolicy
from .streaming import StreamingPolicy
from .tova import TOVAPolicy
from .ucm import UCMPolicy
from .view import BlockView

POLICIES: dict[str, type[KVPolicy]] = {
    policy.name: policy
    for policy in (
        FullPolicy,
        StreamingPolicy,
        SemanticPolicy,
        H2OPolicy,
        TOVAPolicy,
        SnapKVPolicy,
        PagedEvictionPolicy,
        KnormPolicy,
        KeyDiffPolicy,
        QuestPolicy,
        UCMPolicy,
        RandomPolicy,
        OraclePolicy,
    )
}

__all__ = [
    "POLICIES",
    "BlockBudget",
    "BlockView",
    "FullPolicy",
    "KVPolicy",
    "SelectivePolicy",
    "SemanticPolicy",
    "StreamingPolicy",
]
