"""Reading keys back from a layer's KV cache, whatever the kernels' layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from vllm import _custom_ops as custom_ops


@dataclass(frozen=True)
class KeyCache:
    """The keys of attention layers whose caches lie at equal distances in memory.

    ``kv_cache`` is vLLM's logical ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``
    (vllm/v1/kv_cache_interface.py, ``create_kv_cache_views``), in kernel blocks, with the
    layers in front.
    """

    kv_cache: torch.Tensor  # [num_layers, num_blocks, num_kv_heads, block_size, 2 * head_size]
    head_size: int
    kernel_blocks: int
    """Kernel blocks in one block of the block manager."""

    places: torch.Tensor | None = None
    """``[block_size * head_size]`` int64: where the kernels keep channel ``c`` of token ``t``
    among a head's keys, at index ``t * head_size + c``. ``None``: next to its value."""

    @cached_property
    def keys(self) -> torch.Tensor | None:
        """All keys as a view, ``[num_layers, num_kernel_blocks, num_kv_heads,
        kernel_block_size, head_size]``; ``None`` if the kernels scatter them."""
        if self.places is None:
            return self.kv_cache[..., : self.head_size]
        block_size = self.kv_cache.shape[3]
        transpose = torch.arange(len(self.places)).view(self.head_size, block_size).t().flatten()
        if not torch.equal(self.places, transpose):
            return None
        channel_by_channel = self._packed.unflatten(3, (self.head_size, block_size))
        return channel_by_channel.transpose(3, 4)

    @property
    def _packed(self) -> torch.Tensor:
        """A head's keys of one block, in the kernels' order, in front of its values."""
        return self.kv_cache.flatten(3)[..., : self.kv_cache.shape[3] * self.head_size]

    def gather(self, block_ids: torch.Tensor) -> torch.Tensor:
        """Keys of some blocks, in all layers at once.

        Args:
            block_ids: ``[num_blocks]`` ids of the block manager.

        Returns:
            ``[num_layers, num_blocks, num_kv_heads, block_size, head_size]`` in the cache's
            dtype.
        """
        if self.kernel_blocks == 1:
            return self._gather_kernel_blocks(block_ids)
        offsets = torch.arange(self.kernel_blocks, device=block_ids.device)
        kernel_ids = (block_ids.unsqueeze(1) * self.kernel_blocks + offsets).flatten()
        keys = self._gather_kernel_blocks(kernel_ids)
        return keys.unflatten(1, (-1, self.kernel_blocks)).transpose(2, 3).flatten(3, 4)

    def _gather_kernel_blocks(self, kernel_ids: torch.Tensor) -> torch.Tensor:
        if self.keys is not None:
            return self.keys[:, kernel_ids]
        packed = self._packed[:, kernel_ids]
        block_size = self.kv_cache.shape[3]
        return packed.index_select(3, self.places).unflatten(3, (block_size, self.head_size))


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


def cpu_key_places(block_size: int, head_size: int, dtype: torch.dtype, isa: str) -> torch.Tensor:
    """Find where vLLM's CPU kernels put each key channel, by writing known keys.

    Each instruction set packs keys in an order of its own (csrc/cpu/cpu_attn_*.hpp), so the
    kernel that will run is asked rather than its layout repeated here.

    Returns:
        ``[block_size * head_size]`` int64, see :attr:`KeyCache.places`.

    Raises:
        RuntimeError: the keys read back are not a permutation of those written.
    """
    identity = torch.arange(block_size * head_size)
    # Two bytes of the index, each exact in bfloat16, one probe for each.
    high, low = (
        _write_probe(part.view(block_size, 1, head_size).to(dtype), isa)
        for part in (identity // 256, identity % 256)
    )
    written = (high * 256 + low).long()
    if not torch.equal(written.sort().values, identity):
        raise RuntimeError(
            f"the CPU attention kernels ({isa}, {dtype}) pack keys in a way "
            "that --kv-policy cannot read"
        )
    return written.argsort()


def _write_probe(keys: torch.Tensor, isa: str) -> torch.Tensor:
    block_size, _, head_size = keys.shape
    key_cache, value_cache = keys.new_zeros(1, 1, block_size * 2, head_size).chunk(2, dim=2)
    slots = torch.arange(block_size)
    custom_ops.cpu_attn_reshape_and_cache(keys, keys, key_cache, value_cache, slots, isa)
    return key_cache.flatten().float()
