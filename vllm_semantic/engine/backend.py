"""vLLM's attention backends with a policy: kernels read kept blocks only.

``register_backend`` wants a class path, so each wrapped backend is an attribute of this
module under the name of its ``AttentionBackendEnum`` member: ``...engine.backend.CPU_ATTN``.
vLLM keeps its own choice of the base.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from ..ops.compaction import compact_block_table
from .capture import QueryCapture

WRAPPED_BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN", "FLASHINFER")


class CompactingBuilder:
    """Mixin before an ``AttentionMetadataBuilder``: builds from the compacted table."""

    # Sharing metadata between groups would skip `build`, and with it the compaction.
    supports_update_block_table = False

    num_null_ids = 1
    """Kernel block ids below this are the null block. Written by the worker."""

    has_holes = False
    """Whether a request may have lost blocks. Written by the worker before each step."""

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        if self.has_holes:
            common_attn_metadata = self._compact(common_attn_metadata)
        metadata = super().build(  # type: ignore[misc]
            common_prefix_len, common_attn_metadata, fast_build
        )
        metadata.last_query_rows = common_attn_metadata.query_start_loc[1:] - 1
        return metadata

    def _compact(self, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
        block_table, seq_lens = compact_block_table(
            common.block_table_tensor,
            common.seq_lens,
            self.kv_cache_spec.block_size,  # type: ignore[attr-defined]
            common.max_seq_len,
            self.num_null_ids,
        )
        seq_lens_cpu = seq_lens.cpu()
        return common.replace(
            block_table_tensor=block_table,
            seq_lens=seq_lens,
            seq_lens_cpu_upper_bound=seq_lens_cpu,
            max_seq_len=int(seq_lens_cpu.max()),
            _num_computed_tokens_cache=None,
        )


class CapturingImpl:
    """Mixin before an ``AttentionImpl``: keeps the newest query of each request."""

    query_capture: QueryCapture | None = None
    """Written by the worker once the KV cache exists; ``None`` for layers not scored."""

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,  # [num_tokens, num_heads, head_size]
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        if self.query_capture is not None and attn_metadata is not None:
            self.query_capture.record(query, attn_metadata.last_query_rows)
        return super().forward(  # type: ignore[misc, no-any-return]
            layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
        )


@cache
def wrap_backend(name: str) -> type[AttentionBackend]:
    """The backend of ``AttentionBackendEnum[name]`` with both mixins.

    Raises:
        KeyError: ``name`` is not one of :data:`WRAPPED_BACKENDS`.
    """
    if name not in WRAPPED_BACKENDS:
        raise KeyError(name)
    base: type[AttentionBackend] = resolve_obj_by_qualname(AttentionBackendEnum[name].value)

    def get_impl_cls() -> type:
        impl = base.get_impl_cls()
        return type(f"Semantic{impl.__name__}", (CapturingImpl, impl), {})

    def get_builder_cls() -> type:
        builder = base.get_builder_cls()
        return type(f"Semantic{builder.__name__}", (CompactingBuilder, builder), {})

    return type(
        name,
        (base,),
        {
            "__module__": __name__,
            "get_impl_cls": staticmethod(cache(get_impl_cls)),
            "get_builder_cls": staticmethod(cache(get_builder_cls)),
        },
    )


def __getattr__(name: str) -> type[AttentionBackend]:
    try:
        return wrap_backend(name)
    except KeyError as error:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from error
