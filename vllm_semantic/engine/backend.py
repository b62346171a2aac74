"""vLLM's attention backends with a policy: kernels read kept blocks only.

``register_backend`` wants a class path, so each wrapped backend is an attribute of this
module under the name of its ``AttentionBackendEnum`` member: ``...engine.backend.CPU_ATTN``.
vLLM keeps its own choice of the base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from ..config import WRAPPED_BACKENDS
from ..ops.queries import Keep
from .cached_kv import token_scales
from .held_blocks import HeldRows
from .host_reads import HostRead, Staging, plan_read
from .query_windows import QueryWindows

HeldRowsOf = Callable[[CommonAttentionMetadata], "HeldRows | None"]
"""Says which entries of their block tables the rows of a batch hold; ``None`` for all."""

QueryRows = Callable[[CommonAttentionMetadata], "np.ndarray | None"]
"""Says which queries of a batch to keep and where, see ``QueryWindows.place``; ``None`` for
none."""


ReadsOf = Callable[[CommonAttentionMetadata], "Mapping[int, Mapping[int, int]]"]
"""Says which rows of a batch see host memory: by row, slots by logical index of the blocks."""


class StepBuffers:
    """The block table and lengths without evicted blocks, at addresses that never change.

    A full CUDA graph reads what its capture saw, so whatever changes from step to step is
    written here.

    Args:
        max_num_reqs: rows.
        max_num_blocks: the most kernel blocks that one request keeps.
        windows: where queries are kept; ``None`` where none are.
        device: of the KV cache.
    """

    def __init__(
        self,
        max_num_reqs: int,
        max_num_blocks: int,
        windows: QueryWindows | None,
        device: torch.device,
    ) -> None:
        self.windows = windows
        self.block_table = torch.zeros(
            max_num_reqs, max_num_blocks, dtype=torch.int32, device=device
        )
        self.seq_lens = torch.zeros(max_num_reqs, dtype=torch.int32, device=device)
        num_rows = 0 if windows is None else windows.num_rows
        self.query_places = torch.zeros(1 + num_rows, 2, dtype=torch.int64, device=device)
        """See :data:`~..ops.queries.Keep`."""
        self.num_kept = 0
        """What :attr:`query_places` says on the device."""

    def place_queries(self, places: np.ndarray | None) -> None:
        """Say which queries of the step to keep.

        Args:
            places: ``[num_kept, 2]``, see ``QueryWindows.place``; ``None`` for none.
        """
        num_kept = 0 if places is None else len(places)
        if num_kept or self.num_kept:
            rows = np.zeros((1 + num_kept, 2), dtype=np.int64)
            rows[0, 0] = num_kept
            if places is not None:
                rows[1:] = places
            device = self.query_places.device
            self.query_places[: len(rows)].copy_(async_tensor_h2d(rows, device, torch.int64))
        self.num_kept = num_kept

    def settle_places(self, common: CommonAttentionMetadata) -> None:
        """Move what was placed to where its tokens really are, on the device.

        Args:
            common: of the step. Its lengths on the host are those without rejected drafts.
        """
        assert self.windows is not None
        assert common.seq_lens_cpu_upper_bound is not None
        size, device = self.windows.num_queries, self.query_places.device
        sources, rows = self.query_places[1 : 1 + self.num_kept].unbind(1)
        ends = common.query_start_loc[1:].long()
        in_batch = torch.searchsorted(ends, sources.contiguous(), right=True)
        assumed = async_tensor_h2d(common.seq_lens_cpu_upper_bound.numpy(), device, torch.int32)
        num_rejected = (assumed - common.seq_lens)[in_batch]
        in_ring = rows % size
        rows += (in_ring - num_rejected) % size - in_ring


class CompactingBuilder:
    """Mixin before an ``AttentionMetadataBuilder``: a block table without evicted blocks."""

    # Sharing metadata between groups would skip `build`, and with it the compaction.
    supports_update_block_table = False

    drafts_ahead = False
    """Whether a step is scheduled before it is known which drafts of the last were right: then the
    device alone knows how long sequences are. Written by the worker with :attr:`buffers`."""

    buffers: StepBuffers | None = None
    """Written by the worker once the KV cache exists; ``None`` for layers without a policy."""

    held_rows: HeldRowsOf
    """Written by the worker with :attr:`buffers`."""

    query_rows: QueryRows
    """Written by the worker with :attr:`buffers`."""

    reads: ReadsOf
    """Written by the worker with :attr:`buffers`."""

    kernel_blocks: int
    """Kernel blocks in a block of the manager. Written by the worker with :attr:`buffers`."""

    captured = False
    """Whether a CUDA graph reads the buffers, in every step from then on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # So would a graph of all steps of a draft.
        self.supports_draft_decode_metadata_update = False
        self._arguments = args, kwargs

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        """Build the backend's metadata of a step over the blocks that its requests still hold.

        Args:
            common_prefix_len: as in vLLM, passed on.
            common_attn_metadata: of the step, evicted blocks included: ``block_table_tensor``
                ``[num_reqs, max_num_blocks]`` int32 in kernel blocks, ``seq_lens``
                ``[num_reqs]`` int32 in tokens.
            fast_build: as in vLLM, passed on.

        Returns:
            The backend's own metadata with two attributes more: ``query_places``,
            ``[1 + n, 2]`` int64, which queries to keep and where (see
            :data:`~..ops.queries.Keep`), ``None`` for none; and ``host_reads``, a
            :class:`~.host_reads.HostRead` for each row that reads host memory.
        """
        common, query_places = common_attn_metadata, None
        reads: list[HostRead] = []
        if self.buffers is not None:
            held = self.held_rows(common)
            if held is not None:
                common = self._compact(common, self.buffers, held)
                reads = [
                    plan_read(self._reader, common, row, held, away, self.kernel_blocks)
                    for row, away in self.reads(common_attn_metadata).items()
                ]
            elif self.captured:
                common = self._stage(common, self.buffers)
            if self.buffers.windows is not None:
                self.buffers.place_queries(self.query_rows(common_attn_metadata))
                if self.drafts_ahead and self.buffers.num_kept:
                    self.buffers.settle_places(common_attn_metadata)
                if self.captured:  # a graph has one launch, for as many as there may be
                    query_places = self.buffers.query_places
                elif num_kept := self.buffers.num_kept:
                    query_places = self.buffers.query_places[: 1 + num_kept]
        metadata = super().build(  # type: ignore[misc]
            common_prefix_len, common, fast_build
        )
        metadata.query_places = query_places
        metadata.host_reads = reads
        return metadata

    @cached_property
    def _reader(self) -> Any:
        """A builder of vLLM's own, for single requests of the same step: what it writes to
        buffers of its own is not in the way of the batch's."""
        args, kwargs = self._arguments
        return self.base(*args, **kwargs)  # type: ignore[attr-defined]

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        self.captured = True
        return super().build_for_cudagraph_capture(common_attn_metadata)  # type: ignore[misc]

    def _compact(
        self, common: CommonAttentionMetadata, buffers: StepBuffers, held: HeldRows
    ) -> CommonAttentionMetadata:
        """The batch without evicted blocks; the host knows the lengths without asking.

        Keys are cached after RoPE, so the order and positions of what is kept do not change, and
        a request's newest tokens, never evicted, stay last: bottom-right causal masks hold.
        """
        block_table, seq_lens = self._rows(buffers, common.num_reqs)
        table = common.block_table_tensor
        # Behind a sequence's end a column may lie behind the table's too.
        columns = np.minimum(held.columns, table.shape[1] - 1)
        num_columns = columns.shape[1]
        parts = [held.evicted_tokens, columns]
        if held.block_ids is not None:
            parts.append(held.block_ids)
        on_device = async_tensor_h2d(np.column_stack(parts), table.device, torch.int64)
        evicted, columns = on_device[:, 0], on_device[:, 1 : 1 + num_columns]
        rows = block_table[:, :num_columns]
        torch.gather(table, 1, columns, out=rows)
        if held.block_ids is not None:
            block_ids = on_device[:, 1 + num_columns :]
            torch.where(block_ids > 0, block_ids.int(), rows, out=rows)
        torch.sub(common.seq_lens, evicted, out=seq_lens)
        return common.replace(
            block_table_tensor=block_table,
            seq_lens=seq_lens,
            seq_lens_cpu_upper_bound=torch.from_numpy(held.seq_lens),
            max_seq_len=int(held.seq_lens.max()),
            _num_computed_tokens_cache=None,
        )

    def _stage(
        self, common: CommonAttentionMetadata, buffers: StepBuffers
    ) -> CommonAttentionMetadata:
        """The batch as it is, where a CUDA graph will look for it."""
        block_table, seq_lens = self._rows(buffers, common.num_reqs)
        num_columns = min(block_table.shape[1], common.block_table_tensor.shape[1])
        block_table[:, :num_columns] = common.block_table_tensor[:, :num_columns]
        seq_lens.copy_(common.seq_lens)
        max_num_tokens = block_table.shape[1] * self.kv_cache_spec.block_size  # type: ignore[attr-defined]
        return common.replace(
            block_table_tensor=block_table,
            seq_lens=seq_lens,
            max_seq_len=min(common.max_seq_len, max_num_tokens),
        )

    @staticmethod
    def _rows(buffers: StepBuffers, num_reqs: int) -> tuple[torch.Tensor, torch.Tensor]:
        return buffers.block_table[:num_reqs], buffers.seq_lens[:num_reqs]


class CapturingImpl:
    """Mixin before an ``AttentionImpl``: keeps the newest queries of each request."""

    keep_queries: Keep | None = None
    """Keeps queries of the layer, after RoPE, in the rows of :class:`QueryWindows`. Written by the
    worker once the KV cache exists; ``None`` for layers not scored."""

    host_kv: torch.Tensor | None = None
    """``[num_kernel_slots, ...]`` like the layer's cache: its evicted blocks in host memory.
    Written by the worker, with :attr:`staging`, where blocks may come back."""

    staging: Staging

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
        """Attend as the backend does, and keep the queries that an eviction will look at.

        Rows that read host memory attend once more, to their blocks on the device and in host
        memory together, which overwrites their part of ``output``.

        Args:
            layer: the attention layer.
            query: ``[num_tokens, num_heads, head_size]`` of the model's dtype, after RoPE.
            key: ``[num_tokens, num_kv_heads, head_size]``, after RoPE.
            value: ``[num_tokens, num_kv_heads, head_size]``.
            kv_cache: the layer's, ``[num_blocks, ...]`` in kernel blocks.
            attn_metadata: from :meth:`CompactingBuilder.build`; ``None`` in a profiling run.
            output: as the backend takes it, tokens first; written in place.
            *args: as in vLLM, passed on.
            **kwargs: as in vLLM, passed on.

        Returns:
            What the backend returns.
        """
        if self.keep_queries is not None and attn_metadata is not None:
            places = attn_metadata.query_places
            if places is not None:
                self.keep_queries(query, places)
        attend = super().forward  # type: ignore[misc]
        attended: torch.Tensor = attend(
            layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
        )
        if self.host_kv is not None and attn_metadata is not None:
            for read in attn_metadata.host_reads:
                together = read.gather(kv_cache, self.host_kv, self.staging)
                of_read = (rows[read.tokens] for rows in (query, key, value))
                rows = output[read.tokens]
                with self._reading(together):
                    attend(layer, *of_read, together, read.metadata, rows, *args, **kwargs)
        return attended

    @contextmanager
    def _reading(self, kv_cache: torch.Tensor) -> Iterator[None]:
        """TRITON_ATTN remembers where its cache has the scales of tokens, and makes them 1 where
        it does not."""
        names = ("_k_scale_cache", "_v_scale_cache")
        remembered = {name: vars(self)[name] for name in names if name in vars(self)}
        if remembered:
            scales = token_scales(kv_cache, self.head_size)  # type: ignore[attr-defined]
            vars(self).update(zip(names, (of.transpose(1, 2) for of in scales), strict=True))
        try:
            yield
        finally:
            vars(self).update(remembered)


@cache
def wrap_backend(name: str) -> type[AttentionBackend]:
    """The backend of ``AttentionBackendEnum[name]`` with both mixins.

    Raises:
        KeyError: ``name`` is not one of :data:`~..config.WRAPPED_BACKENDS`.
    """
    if name not in WRAPPED_BACKENDS:
        raise KeyError(name)
    base: type[AttentionBackend] = resolve_obj_by_qualname(AttentionBackendEnum[name].value)

    def get_impl_cls() -> type:
        impl = base.get_impl_cls()
        return type(f"Semantic{impl.__name__}", (CapturingImpl, impl), {})

    def get_builder_cls() -> type:
        builder = base.get_builder_cls()
        return type(f"Semantic{builder.__name__}", (CompactingBuilder, builder), {"base": builder})

    return type(
        name,
        (base,),
        {
            "__module__": __name__,
            "get_impl_cls": staticmethod(cache(get_impl_cls)),
            "get_builder_cls": staticmethod(cache(get_builder_cls)),
        },
    )


def is_wrapped(backend: type[AttentionBackend]) -> bool:
    """Whether a backend is what :func:`wrap_backend` made, and no class that a model derived."""
    name = backend.__name__
    return name in WRAPPED_BACKENDS and backend is wrap_backend(name)


def __getattr__(name: str) -> type[AttentionBackend]:
    try:
        return wrap_backend(name)
    except KeyError as error:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from error
