"""The KV cache format of a layer under a policy: full attention with a bounded request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self, TypeGuard

from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, replace_as

from ..config import POLICY_FLAG
from ..layer_groups import split_layers
from ..policies import KVPolicy
from ..policies.base import BlockBudget
from ..recall import host_slots
from ..served import ServedPolicies
from ..upstream.hooks import register_spec
from .manager import SemanticManager

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@register_spec(manager_class=SemanticManager, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class SemanticSpec(FullAttentionSpec):
    """A full-attention layer whose requests hold a bounded number of blocks.

    Derived from ``FullAttentionSpec`` (vllm/v1/kv_cache_interface.py): the page format is
    unchanged, only sizing and the manager differ.
    """

    served: ServedPolicies = None  # type: ignore[assignment]
    """Always set; a default only because a dataclass's bases have some."""

    prefill_interval: int = 0
    """Tokens of a prompt between two eviction points."""

    max_in_flight_tokens: int = 0
    """Tokens that one request may have scheduled but not settled, over all steps, and those that a
    model drafts behind them."""

    eviction_delay: int = 0
    """Tokens after an eviction point that still see the blocks evicted there: one where the
    next step is scheduled before the scores of the last have come (async scheduling)."""

    layer_group: int = 0
    """Which of the groups of layers that evict for themselves the layer is in."""

    host_slots: int = 0
    """Evicted blocks that host memory holds, each of all layers of a group."""

    slot_bytes: int = 0
    """Host memory of one of them, of all tensor-parallel ranks together."""

    @property
    def policy(self) -> KVPolicy:
        """The policy of a request that asks for none."""
        return self.served.default

    @property
    def recall_blocks(self) -> int:
        """See :class:`~..served.ServedPolicies`."""
        return self.served.recall_blocks

    @property
    def max_admission_blocks(self) -> int | None:
        """The most blocks that any request ever holds; ``None`` if that is not bounded."""
        largest = self.served.max_budget_blocks(self.block_size, self.layer_group)
        return self._admission_blocks(largest)

    def admission_blocks(self, policy: KVPolicy) -> int | None:
        """The most blocks that a request under ``policy`` ever holds."""
        return self._admission_blocks(self.budget(policy).total if policy.bounded else None)

    def budget(self, policy: KVPolicy) -> BlockBudget:
        """What a request under a bounded policy keeps in this group of layers."""
        return self.served.budget(policy, self.block_size, self.layer_group)

    def least_budget_blocks(self, policy: KVPolicy) -> int:
        """Blocks beyond which some group of layers evicts, and every group asks for scores."""
        return self.served.least_budget(policy, self.block_size).total

    def _admission_blocks(self, budget_blocks: int | None) -> int | None:
        """The budget, the tokens since the last eviction point or in flight, and the block that
        is being filled."""
        if budget_blocks is None:
            return None
        return budget_blocks + cdiv(self.max_in_flight_tokens, self.block_size) + 1

    def max_held_blocks(self, vllm_config: VllmConfig) -> int:
        """The most blocks that any request ever holds, the full cache included."""
        most = self.max_num_blocks_per_req(vllm_config, vllm_config.model_config.max_model_len)
        bounded = self.max_admission_blocks
        return most if bounded is None else min(most, bounded)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes that one request of ``max_model_len`` tokens needs of one layer."""
        needed = super().max_memory_usage_bytes(vllm_config)
        if self.max_admission_blocks is None:
            return needed
        return min(needed, self.max_admission_blocks * self.page_size_bytes)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether some layers can share a block table with this one."""
        return super().is_uniform_with_collection(kv_cache_specs) and self._is_group_of(
            kv_cache_specs.values()
        )

    def _is_group_of(self, specs: Iterable[KVCacheSpec]) -> bool:
        return all(
            getattr(spec, "layer_group", self.layer_group) == self.layer_group for spec in specs
        )

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """Merge the specs of one group; its layers share their policies.

        Raises:
            AssertionError: the layers are of several groups, by which vLLM knows not to put them
                into one.
            ValueError: a layer with a window of its own is in the group, and would lose blocks
                of its window with the others'.
        """
        first = specs[0]
        merged = super().merge(specs)
        assert first._is_group_of(specs), "Layers of different groups evict different blocks."
        if merged.sliding_window or merged.attention_chunk_size:
            raise ValueError(
                f"{POLICY_FLAG} {first.policy.name} does not support layers with and without a "
                "window in one KV cache group, as --disable-hybrid-kv-cache-manager makes it; "
                "allowed: --no-disable-hybrid-kv-cache-manager"
            )
        return replace(
            merged,
            served=first.served,
            prefill_interval=first.prefill_interval,
            max_in_flight_tokens=first.max_in_flight_tokens,
            eviction_delay=first.eviction_delay,
            layer_group=first.layer_group,
            host_slots=first.host_slots,
            slot_bytes=first.slot_bytes,
        )


def goes_under_policy(spec: KVCacheSpec | None) -> TypeGuard[FullAttentionSpec]:
    """Whether a layer has full attention.

    One with a window of its own already forgets, also where vLLM manages it as full attention.
    """
    return (
        type(spec) is FullAttentionSpec
        and not spec.sliding_window
        and not spec.attention_chunk_size
    )


def semantic_specs(
    specs: Mapping[str, KVCacheSpec], served: ServedPolicies, vllm_config: VllmConfig
) -> dict[str, KVCacheSpec]:
    """Put the full-attention layers of a model under a policy, in the groups that are served.

    Raises:
        ValueError: the layers cannot be split into so many groups, or host memory is too small.
    """
    page_sizes = {
        name: spec.page_size_bytes for name, spec in specs.items() if goes_under_policy(spec)
    }
    groups = split_layers(page_sizes, served.layer_groups)
    slot_bytes = sum(page_sizes.values()) // served.layer_groups
    slot_bytes *= vllm_config.parallel_config.tensor_parallel_size
    num_slots = host_slots(served.recall_gib, slot_bytes) if page_sizes else 0
    return {
        name: semantic_spec(spec, served, vllm_config, groups.get(name, 0), num_slots, slot_bytes)
        for name, spec in specs.items()
    }


def semantic_spec(
    spec: KVCacheSpec,
    served: ServedPolicies,
    vllm_config: VllmConfig,
    layer_group: int = 0,
    num_slots: int = 0,
    slot_bytes: int = 0,
) -> KVCacheSpec:
    """Put a full-attention layer under a policy; any other layer stays as it is."""
    if not goes_under_policy(spec):
        return spec
    return replace_as(
        spec,
        SemanticSpec,
        served=served,
        prefill_interval=vllm_config.scheduler_config.max_num_batched_tokens,
        max_in_flight_tokens=vllm_config.max_in_flight_tokens + vllm_config.num_lookahead_tokens,
        eviction_delay=int(vllm_config.scheduler_config.async_scheduling or 0),
        layer_group=layer_group,
        host_slots=num_slots,
        slot_bytes=slot_bytes,
    )
