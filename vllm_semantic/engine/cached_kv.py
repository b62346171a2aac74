"""Reading keys and values back from a layer's KV cache, whatever the kernels' layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from vllm import _custom_ops as custom_ops

if TYPE_CHECKING:
    from vllm.model_executor.layers.attention import Attention


class Loop(NamedTuple):
    """One of the nested loops over what a kernel keeps of a head in a block."""

    size: int
    """Iterations."""
    tokens: int
    """Tokens that an iteration moves on, within the block."""
    channels: int
    """Channels that an iteration moves on."""


class Packing(NamedTuple):
    """In which order kernels keep a head's keys, and its values, of one kernel block: as nested
    loops over tokens and channels, the outermost first."""

    keys: tuple[Loop, ...]
    values: tuple[Loop, ...]


class Quantized(NamedTuple):
    """How a quantised cache is read: an element times its head's scale or its token's."""

    dtype: torch.dtype
    """Of the elements, which vLLM may keep as uint8."""
    keys: torch.Tensor | None = None
    """``[num_layers, num_kv_heads]`` fp32. ``None``: behind each head's key lies its own scale,
    fp32."""
    values: torch.Tensor | None = None


FP8_DTYPES = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""By ``--kv-cache-dtype``, the quantised caches that can be read of which each layer, or each of
its heads, has a scale for its keys, and one for its values."""

PER_TOKEN_DTYPES = {
    "fp8_per_token_head": torch.float8_e4m3fn,
    "int8_per_token_head": torch.int8,
}
"""The same of those with a scale for each key of a head, and for each value."""


@dataclass(frozen=True)
class CachedKV:
    """Keys and values of attention layers whose caches lie at equal distances in memory.

    ``kv_cache`` is vLLM's logical ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``
    (vllm/v1/kv_cache_interface.py, ``create_kv_cache_views``), in kernel blocks, with the
    layers in front. Scales of tokens are further elements behind a head's key, and its value
    (vllm/v1/attention/backends/triton_attn.py, ``_ensure_scale_caches``).
    """

    kv_cache: torch.Tensor  # [num_layers, num_blocks, num_kv_heads, block_size, 2 * head_size]
    head_size: int
    kernel_blocks: int
    """Kernel blocks in one block of the block manager."""

    packing: Packing | None = None
    """``None``: a key lies next to its value. Else all of a head's keys come first."""

    quantized: Quantized | None = None
    """``None``: elements are what they say."""

    @property
    def block_size(self) -> int:
        """Tokens of a block of the block manager."""
        return self.kernel_blocks * self.kv_cache.shape[3]

    @property
    def block_numel(self) -> int:
        """Elements of the keys of one block of the block manager, in one layer."""
        return self.kernel_blocks * self.kv_cache[0, 0].numel() // 2

    def layers(self, part: slice) -> CachedKV:
        """Some of the layers."""
        of_part = self.quantized
        if of_part is not None and of_part.keys is not None and of_part.values is not None:
            of_part = of_part._replace(keys=of_part.keys[part], values=of_part.values[part])
        return replace(self, kv_cache=self.kv_cache[part], quantized=of_part)

    @cached_property
    def keys(self) -> torch.Tensor | None:
        """All keys as a view, ``[num_layers, num_kernel_blocks, num_kv_heads,
        kernel_block_size, head_size]``, without their scale; ``None`` if the kernels pack them in
        tiles."""
        return self._view(0)

    @cached_property
    def values(self) -> torch.Tensor | None:
        """All values, as :attr:`keys`."""
        return self._view(1)

    @cached_property
    def pairs(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """All keys and all values as words of two bf16 each, as AMX takes them, ``[num_layers,
        num_kernel_blocks, num_kv_heads, kernel_block_size * head_size / 2]`` int32; ``None`` where
        they are not kept so."""
        as_amx = amx_packing(self.kv_cache.shape[3], self.head_size)
        if self.packing != as_amx or self.kv_cache.dtype != torch.bfloat16:
            return None
        keys, values = (self._packed(which).view(torch.int32) for which in (0, 1))
        return keys, values

    @cached_property
    def key_scales(self) -> torch.Tensor | None:
        """The scale of each key as a view, ``[num_layers, num_kernel_blocks, num_kv_heads,
        kernel_block_size]`` fp32; ``None`` where they have none of their own."""
        return self._token_scales(0)

    @cached_property
    def value_scales(self) -> torch.Tensor | None:
        """The scale of each value, as :attr:`key_scales`."""
        return self._token_scales(1)

    def gather_keys(self, block_ids: torch.Tensor) -> torch.Tensor:
        """Keys of some blocks, in all layers at once.

        Args:
            block_ids: ``[num_blocks]`` ids of the block manager.

        Returns:
            ``[num_layers, num_blocks, num_kv_heads, block_size, head_size]`` fp32. In memory, a
            channel of all blocks is one row, as a product with queries takes it.
        """
        return self._gather(0, block_ids)

    def gather_values(self, block_ids: torch.Tensor) -> torch.Tensor:
        """Values of some blocks, as :meth:`gather_keys`; a token's are one row."""
        return self._gather(1, block_ids)

    def _view(self, which: int) -> torch.Tensor | None:
        if self.packing is None:
            return self._elements.unflatten(4, (2, -1))[..., which, : self.head_size]
        packed, loops = self._packed(which), self.packing[which]
        if len(loops) != 2:
            return None
        by_loop = packed.unflatten(3, [loop.size for loop in loops])
        return by_loop if loops[0].tokens else by_loop.transpose(3, 4)

    def _token_scales(self, which: int) -> torch.Tensor | None:
        if self.quantized is None or self.quantized.keys is not None:
            return None
        return token_scales(self.kv_cache, self.head_size)[which]

    def _packed(self, which: int) -> torch.Tensor:
        """A head's keys, or values, of one block in the kernels' order."""
        return self._elements.flatten(3).unflatten(3, (2, -1))[..., which, :]

    @property
    def _elements(self) -> torch.Tensor:
        return self.kv_cache if self.quantized is None else self.kv_cache.view(self.quantized.dtype)

    def _gather(self, which: int, block_ids: torch.Tensor) -> torch.Tensor:
        size = self.kernel_blocks
        if size > 1:
            offsets = torch.arange(size, device=block_ids.device)
            block_ids = (block_ids.unsqueeze(1) * size + offsets).flatten()
        found = self._gather_kernel_blocks(which, block_ids)
        scales = self.value_scales if which else self.key_scales
        if scales is not None:
            found *= scales[:, block_ids].unsqueeze(4)
        if size > 1:
            found = found.unflatten(1, (-1, size)).transpose(2, 3).flatten(3, 4)
        if self.quantized is not None and scales is None:
            found *= self.quantized[1 + which][:, None, :, None, None]
        return found

    def _gather_kernel_blocks(self, which: int, kernel_ids: torch.Tensor) -> torch.Tensor:
        if self.packing is None:
            by_head = self.kv_cache.unflatten(4, (2, -1))[..., which, : self.head_size]
            return by_head[:, kernel_ids].view(self._elements.dtype).float()
        # Whole blocks as they lie in memory, and eight bytes at a time: a third of the time.
        packed = self._packed(which)
        packed = packed.view(torch.int64)[:, kernel_ids].view(packed.dtype)
        num_layers, num_blocks, num_kv_heads, _ = packed.shape
        block_size = self.kv_cache.shape[3]
        if which:
            shape = (num_layers, num_blocks, num_kv_heads, block_size, self.head_size)
            unpacked = packed.new_empty(shape, dtype=torch.float32)
        else:
            shape = (num_layers, num_kv_heads, self.head_size, num_blocks, block_size)
            unpacked = packed.new_empty(shape, dtype=torch.float32).permute(0, 3, 1, 4, 2)
        loops, (*outer, token, channel) = self.packing[which], unpacked.stride()
        in_loops = unpacked.as_strided(
            (*unpacked.shape[:3], *(loop.size for loop in loops)),
            (*outer, *(loop.tokens * token + loop.channels * channel for loop in loops)),
        )
        in_loops.copy_(packed.unflatten(3, [loop.size for loop in loops]))  # and made fp32
        return unpacked


def token_scales(kv_cache: torch.Tensor, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales of tokens in a cache that has some, as views.

    Args:
        kv_cache: ``[..., num_kv_heads, block_size, 2 * (head_size + scale)]``.
        head_size: elements of a key.

    Returns:
        Of the keys and of the values ``[..., num_kv_heads, block_size]`` fp32.
    """
    keys, values = kv_cache.unflatten(-1, (2, -1))[..., head_size:].view(torch.float32).unbind(-2)
    return keys[..., 0], values[..., 0]


def stack_layers(kv_caches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """One view over the caches of all layers, or one of each where that cannot be.

    Args:
        kv_caches: per layer ``[num_blocks, ...]``; vLLM lays a group's layers out in one
            allocation, at equal distances.

    Returns:
        Views ``[num_layers, num_blocks, ...]`` that together hold the layers in order.
    """
    first = kv_caches[0]
    offsets = [kv_cache.storage_offset() for kv_cache in kv_caches]
    step = offsets[1] - offsets[0] if len(offsets) > 1 else 0
    alike = all(
        kv_cache.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and (kv_cache.shape, kv_cache.stride(), kv_cache.dtype)
        == (first.shape, first.stride(), first.dtype)
        and offset == offsets[0] + i * step
        for i, (kv_cache, offset) in enumerate(zip(kv_caches, offsets, strict=True))
    )
    if not alike or step < 0:
        return [kv_cache.unsqueeze(0) for kv_cache in kv_caches]
    shape, stride = (len(kv_caches), *first.shape), (step, *first.stride())
    return [first.as_strided(shape, stride, offsets[0])]


def quantized(layers: Sequence[Attention]) -> Quantized | None:
    """How the caches of some layers of one ``--kv-cache-dtype`` are read.

    Scales of layers and heads are a checkpoint's, or 1 (vllm/model_executor/layers/quantization/,
    ``kv_cache.py`` and ``compressed_tensors/compressed_tensors.py``).
    """
    if per_token := PER_TOKEN_DTYPES.get(layers[0].kv_cache_dtype):
        return Quantized(per_token)
    dtype = FP8_DTYPES.get(layers[0].kv_cache_dtype)
    if dtype is None:
        return None
    return Quantized(dtype, head_scales(layers, "_k_scale"), head_scales(layers, "_v_scale"))


def head_scales(layers: Sequence[Attention], name: str) -> torch.Tensor:
    """The scales of some layers, ``[num_layers, num_kv_heads]`` fp32.

    Args:
        layers: of one number of KV heads and one backend.
        name: of the attribute; it has one scale, or one for each KV head. A backend that knows only
            one takes the number of the attribute that ends in ``_float``.
    """
    first = layers[0]
    if first.attn_backend.supports_per_head_quant_scales():
        scales = [getattr(layer, name).detach().float().flatten() for layer in layers]
    else:
        numbers = [getattr(layer, f"{name}_float") for layer in layers]
        scales = list(torch.tensor(numbers, device=first.kv_cache.device))
    return torch.stack([of.expand(first.num_kv_heads) for of in scales])


def cpu_packing(
    block_size: int, head_size: int, dtype: torch.dtype, isa: str, kv_cache_dtype: str = "auto"
) -> Packing:
    """Find where vLLM's CPU kernels put each key and value, by writing known ones.

    Each instruction set packs them in an order of its own (csrc/cpu/cpu_attn_*.hpp), so the
    kernel that will run is asked rather than its layout repeated here.

    Raises:
        RuntimeError: what is read back is not what was written, in nested loops.
    """
    identity = torch.arange(block_size * head_size)
    written = torch.zeros(2, len(identity), dtype=torch.long)
    # The octal digits of the index, each exact in any dtype, one probe for each.
    for power in (8**i for i in range(math.ceil(math.log(len(identity), 8)))):
        digit = (identity // power % 8).view(block_size, 1, head_size).to(dtype)
        written += power * _write_probe(digit, isa, kv_cache_dtype).long()
    keys, values = (_loops(half.tolist(), head_size) for half in written)
    if keys is None or values is None:
        raise RuntimeError(
            f"the CPU attention kernels ({isa}, {dtype}) pack keys in a way "
            "that --kv-policy cannot read"
        )
    return Packing(keys, values)


def amx_packing(block_size: int, head_size: int) -> Packing:
    """How vLLM's CPU kernels for AMX keep two-byte elements (csrc/cpu/cpu_attn_amx.hpp)."""
    return Packing(
        (Loop(block_size // 16, 16, 0), Loop(head_size // 2, 0, 2), Loop(16, 1, 0), Loop(2, 0, 1)),
        (Loop(head_size // 16, 0, 16), Loop(block_size // 2, 2, 0), Loop(16, 0, 1), Loop(2, 1, 0)),
    )


def _loops(order: list[int], head_size: int) -> tuple[Loop, ...] | None:
    """The nested loops that visit ``token * head_size + channel`` in an order, if there are any."""
    loops: list[Loop] = []
    inner = 1  # elements that the loops so far visit
    while inner < len(order):
        stride, size = order[inner] - order[0], 1
        if stride <= 0:
            return None
        # A loop over channels ends with the channels, even where the next token follows.
        most = head_size // stride if stride < head_size else len(order)
        while (
            size < most
            and (size + 1) * inner <= len(order)
            and order[size * inner] - order[0] == size * stride
        ):
            size += 1
        loops.insert(0, Loop(size, *divmod(stride, head_size)))
        inner *= size
    visited = torch.zeros(1, dtype=torch.long)
    for loop in reversed(loops):
        steps = torch.arange(loop.size) * (loop.tokens * head_size + loop.channels)
        visited = (steps.unsqueeze(1) + visited).flatten()
    return tuple(loops) if visited.tolist() == order else None


def _write_probe(numbers: torch.Tensor, isa: str, kv_cache_dtype: str) -> torch.Tensor:
    """A cache of one block that holds ``numbers`` as keys and as values, ``[2, ...]`` fp32."""
    block_size, _, head_size = numbers.shape
    fp8 = FP8_DTYPES.get(kv_cache_dtype)
    dtype = torch.uint8 if fp8 else numbers.dtype
    kv_cache = torch.zeros(1, 1, block_size * 2, head_size, dtype=dtype)
    key_cache, value_cache = kv_cache.chunk(2, dim=2)
    slots = torch.arange(block_size)
    custom_ops.cpu_attn_reshape_and_cache(
        numbers, numbers, key_cache, value_cache, slots, isa, kv_cache_dtype=kv_cache_dtype
    )
    return kv_cache.view(fp8 or dtype).view(2, -1).float()
