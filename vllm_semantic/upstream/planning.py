"""How vLLM plans the groups and the pool of its KV cache, wherever its versions keep that."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm.utils.math_utils import cdiv

try:
    from vllm.v1.core.kv_cache_planning import _pool_bytes_per_block, get_kv_cache_groups
except ModuleNotFoundError:  # before vLLM 0.33
    from vllm.v1.core.kv_cache_utils import _pool_bytes_per_block, get_kv_cache_groups

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheGroupSpec

__all__ = ["_pool_bytes_per_block", "get_kv_cache_groups", "request_blocks"]


def request_blocks(vllm_config: VllmConfig, groups: Iterable[KVCacheGroupSpec]) -> int:
    """Blocks of the pool that a request of ``max_model_len`` tokens needs in all groups.

    As vLLM counts them (``_max_memory_usage_bytes_from_groups``).
    """
    num_blocks = 0
    for spec in (group.kv_cache_spec for group in groups):
        if hasattr(spec, "max_memory_usage_pages"):  # layers that differ in size
            num_blocks += spec.max_memory_usage_pages(vllm_config)
        else:
            num_blocks += cdiv(spec.max_memory_usage_bytes(vllm_config), spec.page_size_bytes)
    return num_blocks
