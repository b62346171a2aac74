"""vLLM attention on xformers' operators over a paged cache: ``--attention-backend XFORMERS``.

Decode reads pages where they lie, through ``xformers.ops.fmha.triton_splitk`` (split-K as in
Flash-Decoding) under a paged bias. Every other step first gathers the pages of its requests,
which a policy keeps few. ``xformers`` is imported when vLLM chooses the backend, not before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

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

from .xformers_calls import NAME, PAGE_MULTIPLE, Call, load_fmha, plan_calls

HEAD_SIZES = [16, 32, 64, 128, 256]
"""What both ``triton_splitk`` (decode) and ``flash`` (prefill) take."""


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
