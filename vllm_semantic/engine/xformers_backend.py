"""vLLM attention on xformers' operators over a paged cache: ``--attention-backend XFORMERS``.

Decode reads pages where they lie, through ``xformers.ops.fmha.triton_splitk`` (split-K as in
Flash-Decoding) under a paged bias. Every other step first gathers the pages of its requests,
which a policy keeps few. ``xformers`` is imported when vLLM chooses the backend, not before.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.ops.triton_reshape_and_cache_flash import triton_reshape_and_cache_flash
from vllm.v1.kv_cache_interface import KVCacheLayout

NAME = "XFORMERS"

HEAD_SIZES = [16, 32, 64, 128, 256]
"""What both ``triton_splitk`` (decode) and ``flash`` (prefill) take."""

PAGE_MULTIPLE = 64
"""``triton_splitk.FwOp.BLOCK_N``: a block of keys never straddles two pages."""

MAX_DECODE_QUERIES = 16
"""``triton_splitk`` takes causal masks for at most this many queries a request, all equal."""


def load_fmha() -> ModuleType:
    """``xformers.ops.fmha``.

    Raises:
        ImportError: xformers is missing or refuses what is installed beside it.
    """
    try:
        from xformers.ops import fmha
    except ImportError as error:
        raise ImportError(
            f"--attention-backend {NAME} needs xformers: pip install xformers ({error})"
        ) from error
    return fmha


# -- the cache as xformers wants it ----------------------------------------------------


def _keys_and_values(
    tokens: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:  # [1, T, num_kv_heads, 2 * head_size]
    grouped = tokens.unsqueeze(3).expand(-1, -1, -1, group_size, -1)
    keys, values = grouped.chunk(2, dim=-1)
    return keys, values


def paged_keys_and_values(
    kv_cache: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole cache as two views; query heads of a group share a key head (stride 0).

    Args:
        kv_cache: ``[num_pages, num_kv_heads, page_size, 2 * head_size]``, in memory
            ``[num_pages, page_size, num_kv_heads, 2 * head_size]``.
        group_size: query heads of each key head.

    Returns:
        Keys and values ``[1, num_pages * page_size, num_kv_heads, group_size, head_size]``.

    Raises:
        ValueError: the cache has another layout, and a view is impossible.
    """
    pages = kv_cache.transpose(1, 2)
    try:
        tokens = pages.view(1, -1, *pages.shape[2:])
    except RuntimeError as error:
        raise ValueError(
            f"--attention-backend {NAME} does not support KV cache strides {kv_cache.stride()}; "
            "allowed: layout LBNHC"
        ) from error
    return _keys_and_values(tokens, group_size)


def gathered_keys_and_values(
    kv_cache: torch.Tensor, pages: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of some pages, one request after the other.

    Args:
        kv_cache: as in :func:`paged_keys_and_values`, in any layout.
        pages: ``[num_reqs, num_columns]`` int32 page ids.
        group_size: query heads of each key head.

    Returns:
        Keys and values
        ``[1, num_reqs * num_columns * page_size, num_kv_heads, group_size, head_size]``.
    """
    tokens = kv_cache.transpose(1, 2).index_select(0, pages.flatten())
    return _keys_and_values(tokens.view(1, -1, *tokens.shape[2:]), group_size)


# -- which requests go to which operator -----------------------------------------------


@dataclass
class Call:
    """Consecutive requests of a step that one call of xformers serves."""

    tokens: slice
    """Theirs among the step's tokens."""

    bias: Any
    """``PagedBlockDiagonalCausalWithOffsetPaddedKeysMask`` over the cache, or
    ``BlockDiagonalCausalWithOffsetPaddedKeysMask`` over gathered pages."""

    pages: torch.Tensor | None = None
    """``[num_reqs, num_columns]`` int32, what to gather; ``None`` reads pages in place."""

    num_padding: int = 0
    """Queries that the bias expects behind :attr:`tokens`."""

    def inputs(
        self, query: torch.Tensor, kv_cache: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Operands for the bias, in xformers' BMGHK form.

        Args:
            query: ``[num_tokens, num_heads, head_size]``, of the whole step.
            kv_cache: ``[num_pages, num_kv_heads, page_size, 2 * head_size]``.

        Returns:
            Query, keys and values ``[1, T, num_kv_heads, group_size, head_size]``; only
            gathered pages and padded queries are copies.
        """
        num_kv_heads = kv_cache.shape[1]
        query = query[self.tokens]
        if self.num_padding:
            query = torch.nn.functional.pad(query, (0, 0, 0, 0, 0, self.num_padding))
        query = query.unflatten(1, (num_kv_heads, -1)).unsqueeze(0)
        group_size = query.shape[3]
        if self.pages is None:
            return query, *paged_keys_and_values(kv_cache, group_size)
        return query, *gathered_keys_and_values(kv_cache, self.pages, group_size)


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << max(0, number - 1).bit_length()


def plan_calls(
    query_lens: list[int], seq_lens: list[int], block_table: torch.Tensor, page_size: int
) -> list[Call]:
    """Decodes in place, the rest gathered.

    The decodes are the leading requests with as many queries each as the first, at most
    :data:`MAX_DECODE_QUERIES`; vLLM puts requests with one query first.

    Args:
        query_lens: new tokens of each request; requests without any only at the end.
        seq_lens: tokens of each request in the cache, the new ones included.
        block_table: ``[num_reqs, num_columns]`` int32 page ids in order; what lies behind a
            sequence's end is not read.
        page_size: tokens of a page.
    """
    num_reqs = len(np.trim_zeros(query_lens, "b"))
    query_lens, seq_lens = query_lens[:num_reqs], seq_lens[:num_reqs]
    num_decodes = 0
    if query_lens and query_lens[0] <= MAX_DECODE_QUERIES:
        num_decodes = len(list(takewhile(lambda length: length == query_lens[0], query_lens)))
    split = sum(query_lens[:num_decodes])
    calls = []
    if num_decodes:
        call = _decode_call(
            query_lens[0], seq_lens[:num_decodes], block_table[:num_decodes], page_size
        )
        call.tokens = slice(0, split)
        calls.append(call)
    if num_decodes < num_reqs:
        rest = slice(num_decodes, num_reqs)
        call = _gathering_call(query_lens[rest], seq_lens[rest], block_table[rest], page_size)
        call.tokens = slice(split, sum(query_lens))
        calls.append(call)
    return calls


def _decode_call(
    query_len: int, seq_lens: list[int], block_table: torch.Tensor, page_size: int
) -> Call:
    """The kernel is compiled for each number of rows and columns: both become powers of two.

    Rows added read one key of the null block, and nobody reads what they attend to.
    """
    bias_class = load_fmha().attn_bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask
    num_columns = power_of_two(-(-max(seq_lens) // page_size))
    block_table = block_table[:, :num_columns]
    num_rows = power_of_two(len(seq_lens))
    num_added = num_rows - len(seq_lens)
    bias = bias_class.from_seqlens(
        q_seqlen=[query_len] * num_rows,
        kv_seqlen=[*seq_lens, *[1] * num_added],
        block_tables=torch.nn.functional.pad(block_table, (0, 0, 0, num_added)),
        page_size=page_size,
        device=block_table.device,
    )
    return Call(slice(0), bias, num_padding=num_added * query_len)


def _gathering_call(
    query_lens: list[int], seq_lens: list[int], block_table: torch.Tensor, page_size: int
) -> Call:
    """Rows are padded to the longest with the null block; a layer's copy is as large."""
    bias_class = load_fmha().attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask
    device = block_table.device
    num_pages = [-(-length // page_size) for length in seq_lens]
    num_columns = max(num_pages)
    column = torch.arange(num_columns)
    present = column < torch.tensor(num_pages).unsqueeze(1)
    bias = bias_class.from_seqlens(
        q_seqlen=query_lens,
        kv_padding=num_columns * page_size,
        kv_seqlen=seq_lens,
        device=device,
    )
    pages = block_table[:, :num_columns] * present.to(device, non_blocking=True)
    return Call(slice(0), bias, pages=pages)


# -- vLLM's interface ------------------------------------------------------------------


@dataclass
class XFormersMetadata:
    """What the layers of a KV cache group share in a step."""

    calls: list[Call]
    num_actual_tokens: int


class XFormersMetadataBuilder(AttentionMetadataBuilder[XFormersMetadata]):
    """Biases from the lengths that the host knows: no wait for the device.

    No full CUDA graphs: biases are Python objects with lengths in them, new in every step.

    Raises:
        ValueError: xformers cannot run on the device, or lengths are not known on the host.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if vllm_config.speculative_config is not None:
            raise ValueError(f"--attention-backend {NAME} does not support --speculative-config")
        # The choice of a backend knows the card, not whether xformers' library loaded.
        reasons = decode_unsupported_reasons(
            kv_cache_spec.head_size, kv_cache_spec.dtype, kv_cache_spec.block_size, device
        )
        if reasons:
            raise ValueError(
                f"--attention-backend {NAME} cannot run here: {'; '.join(reasons)} "
                "(python -m xformers.info says more)"
            )
        self._init_reorder_batch_threshold(1)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> XFormersMetadata:
        common = common_attn_metadata
        if common.causal is not True:
            raise ValueError(f"--attention-backend {NAME} supports causal attention only")
        if common.seq_lens_cpu_upper_bound is None:
            raise ValueError(f"--attention-backend {NAME} needs sequence lengths on the host")
        calls = plan_calls(
            common.query_start_loc_cpu.diff().tolist(),
            common.seq_lens_cpu_upper_bound.tolist(),
            common.block_table_tensor,
            self.kv_cache_spec.block_size,
        )
        return XFormersMetadata(calls, common.num_actual_tokens)


def decode_unsupported_reasons(
    head_size: int, dtype: torch.dtype, page_size: int, device: torch.device
) -> list[str]:
    """Why xformers would refuse a decode step, in its words; empty if it would not.

    Raises:
        ImportError: see :func:`load_fmha`.
    """
    fmha = load_fmha()
    kv_cache = torch.empty(1, 1, page_size, 2 * head_size, dtype=dtype, device=device)
    query = torch.empty(1, 1, head_size, dtype=dtype, device=device)
    block_table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    (call,) = plan_calls([1], [1], block_table, page_size)
    operands = call.inputs(query, kv_cache)
    inputs = fmha.Inputs(*operands, attn_bias=call.bias)
    reasons: list[str] = fmha.triton_splitk.FwOp.not_supported_reasons(inputs)
    return reasons


class XFormersImpl(AttentionImpl[XFormersMetadata]):
    """Causal attention of a decoder layer.

    Raises:
        ImportError: see :func:`load_fmha`.
        ValueError: a feature that the operators do not have.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        checks = {
            f"head size {head_size} (allowed: {HEAD_SIZES})": head_size not in HEAD_SIZES,
            "ALiBi": alibi_slopes is not None,
            "sliding windows": sliding_window is not None,
            "soft-capped logits": bool(logits_soft_cap),
            "attention sinks": sinks is not None,
            f"attention type {attn_type} (allowed: decoder)": attn_type != AttentionType.DECODER,
            f"--kv-cache-dtype {kv_cache_dtype}": not XFormersBackend.supports_kv_cache_dtype(
                kv_cache_dtype  # type: ignore[arg-type]
            ),
        }
        if unsupported := [feature for feature, present in checks.items() if present]:
            raise ValueError(
                f"--attention-backend {NAME} does not support {'; '.join(unsupported)}"
            )
        self.fmha = load_fmha()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: XFormersMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention over the cache, which holds the step's own keys already.

        Args:
            layer: unused.
            query: ``[num_tokens, num_heads, head_size]``, padding behind the actual tokens.
            key: unused, like ``value``.
            value: unused.
            kv_cache: ``[num_pages, num_kv_heads, page_size, 2 * head_size]``.
            attn_metadata: ``None`` in a profiling run.
            output: ``[num_tokens, num_heads, head_size]`` or with its last two axes as one;
                written for the actual tokens.
            output_scale: must be ``None``.
            output_block_scale: must be ``None``.

        Raises:
            NotImplementedError: quantised output.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(f"--attention-backend {NAME}: quantised output")
        if attn_metadata is None:
            return output.fill_(0)
        for call in attn_metadata.calls:
            operands = call.inputs(query, kv_cache)
            attended = self.fmha.memory_efficient_attention_forward(
                *operands,
                attn_bias=call.bias,
                scale=self.scale,
                op=self.fmha.triton_splitk.FwOp if call.pages is None else None,
            )
            rows = output[call.tokens]
            rows.copy_(attended[0, : len(rows)].reshape(rows.shape))
        return output

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store a step's keys and values.

        Args:
            layer: owner of the scales, which are not used without quantisation.
            key: ``[num_tokens, num_kv_heads, head_size]``.
            value: like ``key``.
            kv_cache: ``[num_pages, num_kv_heads, page_size, 2 * head_size]``.
            slot_mapping: ``[num_tokens]`` int64, ``page * page_size + offset``; negative for
                padding.
        """
        key_cache, value_cache = kv_cache.transpose(1, 2).chunk(2, dim=-1)
        triton_reshape_and_cache_flash(
            key,
            value,
            key_cache,
            value_cache,
            slot_mapping,
            self.kv_cache_dtype,
            layer._k_scale,
            layer._v_scale,
        )


class XFormersBackend(AttentionBackend):
    """Decoder attention in half precision on NVIDIA cards since Ampere.

    xformers refuses every card unless its library loads, which takes a wheel built for the
    CUDA version of torch. The decode kernel needs a Triton with block pointers, before 3.9.
    """

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type[XFormersImpl]:
        return XFormersImpl

    @staticmethod
    def get_builder_cls() -> type[XFormersMetadataBuilder]:
        return XFormersMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(PAGE_MULTIPLE)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return HEAD_SIZES

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Pages and their tokens adjacent, so that the cache is one sequence of tokens."""
        return (KVCacheLayout.LBNHC,)

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        return capability >= DeviceCapability(8, 0)

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: Any,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        use_mm_prefix: bool,
        device_capability: DeviceCapability,
    ) -> str | None:
        try:
            load_fmha()
        except ImportError as error:
            return str(error)
        if kv_cache_dtype not in (None, "auto") and kv_cache_dtype != str(dtype).split(".")[1]:
            return f"kv_cache_dtype {kv_cache_dtype} differs from dtype {dtype}"
        return None
