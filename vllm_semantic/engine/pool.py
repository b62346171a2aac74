"""Whether vLLM's block pool has room for what a request may hold, in words that name flags."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vllm.utils.math_utils import cdiv

from ..config import CONFIG_FLAG
from ..upstream.planning import _pool_bytes_per_block, get_kv_cache_groups, request_blocks
from .spec import SemanticSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec


def explain_shortage(
    vllm_config: VllmConfig, specs: Mapping[str, KVCacheSpec], available_bytes: int
) -> str | None:
    """Why vLLM is about to refuse a pool, and what helps.

    vLLM counts as here (``get_kv_cache_configs``), and says so in bytes. It does not know that
    under a policy most of what a request needs may be for the tokens in flight.

    Args:
        vllm_config: of the worker.
        specs: by layer, of one worker.
        available_bytes: that this worker has for the KV cache.

    Returns:
        ``None`` where there is room, or where a request is too short to evict.
    """
    spec = next((spec for spec in specs.values() if isinstance(spec, SemanticSpec)), None)
    if spec is None or spec.max_admission_blocks is None:
        return None
    max_model_len = vllm_config.model_config.max_model_len
    if cdiv(max_model_len, spec.block_size) <= spec.max_admission_blocks:
        return None
    groups = get_kv_cache_groups(vllm_config, dict(specs))
    block_bytes = _pool_bytes_per_block(vllm_config, groups)
    num_blocks = vllm_config.cache_config.num_gpu_blocks_override
    if num_blocks is None:
        num_blocks = available_bytes // block_bytes
    room = num_blocks - 1  # the null block
    needed = request_blocks(vllm_config, groups)
    if needed <= room:
        return None
    scheduler = vllm_config.scheduler_config
    num_groups = sum(isinstance(group.kv_cache_spec, SemanticSpec) for group in groups)
    num_in_flight = num_groups * cdiv(spec.max_in_flight_tokens, spec.block_size)
    steps_in_flight = spec.max_in_flight_tokens // scheduler.max_num_batched_tokens
    left_for_them = (room - needed + num_in_flight) // num_groups
    fits = left_for_them * spec.block_size // steps_in_flight
    smaller = "a smaller --max-num-batched-tokens"
    if fits > 0:
        smaller += f" (at most {fits}"
        smaller += ", and no more --max-num-seqs)" if fits < scheduler.max_num_seqs else ")"
    return (
        f"KV policy {spec.policy.name}: a request of {max_model_len} tokens needs {needed} blocks "
        f"of {spec.block_size} tokens, {num_in_flight} of them for the {spec.max_in_flight_tokens} "
        f"tokens that may be in flight beside its budget; the KV cache has {max(room, 0)}. "
        f"What helps: {smaller}, more memory (--gpu-memory-utilization, --kv-cache-memory-bytes), "
        f"a smaller budget ({CONFIG_FLAG}) or a smaller --max-model-len"
    )
