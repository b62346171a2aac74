"""vLLM's CPU worker with a policy. A file of its own: GPU machines never import it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
from vllm.v1.worker.cpu_worker import CPUWorker

from .cached_kv import Packing, cpu_packing
from .worker import KVPolicyWorkerMixin

if TYPE_CHECKING:
    from vllm.model_executor.layers.attention import Attention


class SemanticCPUWorker(KVPolicyWorkerMixin, CPUWorker):
    """vLLM's CPU worker with a policy."""

    def _packing(self, layer: Attention) -> Packing | None:
        if not isinstance(layer.impl, CPUAttentionBackendImpl):
            return None
        return cpu_packing(
            layer.kv_cache.shape[2],
            layer.head_size,
            self.model_config.dtype,
            layer.isa,  # type: ignore[attr-defined]
            layer.kv_cache_dtype,
        )
