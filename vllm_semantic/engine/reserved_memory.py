"""What a policy needs of the device beside the KV cache, known before vLLM sizes the cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from vllm.utils.math_utils import cdiv

from ..policies.trial import AttentionShape
from ..recall import GIB
from .host_blocks import MAX_STAGED
from .query_windows import QueryWindows, num_drafts_in_flight
from .scorer import scratch_bytes
from .spec import SemanticSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.kv_cache_interface import KVCacheSpec


class ReservedMemory(NamedTuple):
    """Bytes, by what they are for."""

    queries: int
    """The rings of each layer, see :class:`~.query_windows.QueryWindows`."""

    tables: int
    """Block tables without holes, see :class:`~.backend.StepBuffers`."""

    scoring: int
    """What scoring a step takes at most for as long as it runs."""

    reading: int
    """Where the blocks of one layer and one request lie together, see
    :class:`~.host_reads.Staging`; 0 without host memory."""

    @property
    def total(self) -> int:
        """Bytes of all parts together."""
        return sum(self)

    def __str__(self) -> str:
        return (
            f"{self.total / GIB:.2f} GiB (kept queries {self.queries / GIB:.2f}, block tables "
            f"{self.tables / GIB:.2f}, scoring {self.scoring / GIB:.2f}"
            f"{f', reading host memory {self.reading / GIB:.2f}' if self.reading else ''})"
        )


def reserved_memory(
    vllm_config: VllmConfig,
    specs: Mapping[str, KVCacheSpec],
    layers: Mapping[str, Attention],
    available_bytes: int,
    device: torch.device,
) -> ReservedMemory:
    """What one worker needs.

    Args:
        vllm_config: of the worker.
        specs: of the KV cache, by layer, under the policy where they can be.
        layers: the attention layers by name, without those of a model that drafts.
        available_bytes: that this worker has for all of it and the KV cache.
        device: of the KV cache.
    """
    under_policy = {name: spec for name, spec in specs.items() if isinstance(spec, SemanticSpec)}
    spec = next(iter(under_policy.values()), None)
    if spec is None or not spec.served.bounded:
        return ReservedMemory(0, 0, 0, 0)
    groups = {spec.layer_group: spec for spec in under_policy.values()}
    max_num_reqs = vllm_config.scheduler_config.max_num_seqs
    # Entries of int32, and once more as the int64 columns that a step looks up.
    held_blocks = sum(spec.max_held_blocks(vllm_config) for spec in groups.values())
    tables = max_num_reqs * held_blocks * (4 + 8)
    if not spec.served.rules:
        return ReservedMemory(0, tables, 0, 0)
    scored = [layers[name] for name in under_policy if name in layers]
    num_drafts = num_drafts_in_flight(vllm_config)
    windows = QueryWindows(spec.served.num_queries, max_num_reqs, num_drafts)
    elements = windows.num_rows * sum(layer.num_heads * layer.head_size for layer in scored)
    block_bytes = sum(spec.page_size_bytes for spec in under_policy.values()) // len(groups)
    num_blocks = available_bytes // block_bytes
    budget_blocks = max(
        spec.served.max_budget_blocks(spec.block_size, group) or 0 for group in groups
    )
    if budget_blocks:  # else a request may hold any number
        # All at once: each request its budget and the block being filled, and a step's tokens.
        shared_blocks = cdiv(spec.max_in_flight_tokens, spec.block_size)
        num_blocks = min(num_blocks, max_num_reqs * (budget_blocks + 1) + shared_blocks)
    num_heads = max(layer.num_heads for layer in scored)
    shape = AttentionShape(num_heads, spec.num_kv_heads, spec.head_size, spec.block_size)
    num_recallable = reading = 0
    if spec.host_slots:
        num_recallable = cdiv(vllm_config.model_config.max_model_len, spec.block_size)
        reading = num_recallable * max(spec.page_size_bytes for spec in under_policy.values())
        num_recallable = min(num_recallable, spec.host_slots)
    scoring = max(
        scratch_bytes(policy, len(scored) // len(groups), num_blocks, shape, device, num_recallable)
        for policy in spec.served.rules
    )
    if spec.host_slots and device.type == "cuda":
        scoring += 2 * MAX_STAGED  # one block or many on their way out, and back
    queries = elements * vllm_config.model_config.dtype.itemsize
    return ReservedMemory(queries, tables, scoring, reading)
