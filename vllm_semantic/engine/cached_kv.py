"""Reading keys and values back from a layer's KV cache, whatever the kernels' layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import cached_property
from typing import NamedTuple

import torch
from vllm import _custom_ops as custom_ops


class Places(NamedTuple):
    """Where the kernels keep channel ``c`` of token ``t`` among a head's keys, or values, of one
    kernel block: at index ``t * head_size + c``. Each ``[block_size * head_size]`` int64."""

    keys: torch.Tensor
    values: torch.Tensor


class Order(Enum):
    """In which the elements of a head's keys, or values, of a block lie in memory."""

    BY_TOKEN = auto()
    BY_CHANNEL = auto()


@dataclass(frozen=True)
class CachedKV:
    """Keys and values of attention layers whose caches lie at equal distances in memory.

    ``kv_cache`` is vLLM's logical ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``
    (vllm/v1/kv_cache_interface.py, ``create_kv_cache_views``), in kernel blocks, with the
    layers in front.
    """

    kv_cache: torch.Tensor  # [num_layers, num_blocks, num_kv_heads, block_size, 2 * head_size]
    head_size: int
    kernel_blocks: int
    """Kernel blocks in one block of the block manager."""

    places: Places | None = None
    """``None``: a key lies next to its value. Else all of a head's keys come first."""

    @property
    def block_numel(self) -> int:
        """Elements of the keys of one block of the block manager, in one layer."""
        return self.kernel_blocks * self.kv_cache[0, 0].numel() // 2

    @cached_property
    def keys(self) -> torch.Tensor | None:
        """All keys as a view, ``[num_layers, num_kernel_blocks, num_kv_heads,
        kernel_block_size, head_size]``; ``None`` if the kernels scatter them."""
        return self._view(0)

    @cached_property
    def values(self) -> torch.Tensor | None:
        """All values, as :attr:`keys`."""
        return self._view(1)

    def gather_keys(self, block_ids: torch.Tensor) -> torch.Tensor:
        """Keys of some blocks, in all layers at once.

        Args:
            block_ids: ``[num_blocks]`` ids of the block manager.

        Returns:
            ``[num_layers, num_blocks, num_kv_heads, block_size, head_size]`` in the cache's
            dtype.
        """
        return self._gather(0, block_ids)

    def gather_values(self, block_ids: torch.Tensor) -> torch.Tensor:
        """Values of some blocks, as :meth:`gather_keys`."""
        return self._gather(1, block_ids)

    def _view(self, which: int) -> torch.Tensor | None:
        if self.places is None:
            return self.kv_cache.unflatten(4, (2, self.head_size))[..., which, :]
        return self._unpacked(which, self._packed(which))

    def _unpacked(self, which: int, packed: torch.Tensor) -> torch.Tensor | None:
        """What :meth:`_packed` gives, or some of its blocks, as a view by token and channel."""
        block_size = self.kv_cache.shape[3]
        match self._orders[which]:
            case Order.BY_TOKEN:
                return packed.unflatten(3, (block_size, self.head_size))
            case Order.BY_CHANNEL:
                return packed.unflatten(3, (self.head_size, block_size)).transpose(3, 4)
        return None

    @cached_property
    def _orders(self) -> tuple[Order | None, ...]:
        """Of keys and of values, where the kernels have one."""
        assert self.places is not None
        by_token = torch.arange(len(self.places.keys))
        by_channel = by_token.view(self.head_size, -1).t().flatten()
        return tuple(
            Order.BY_TOKEN
            if torch.equal(places, by_token)
            else Order.BY_CHANNEL
            if torch.equal(places, by_channel)
            else None
            for places in self.places
        )

    def _packed(self, which: int) -> torch.Tensor:
        """A head's keys, or values, of one block in the kernels' order."""
        return self.kv_cache.flatten(3).unflatten(3, (2, -1))[..., which, :]

    def _gather(self, which: int, block_ids: torch.Tensor) -> torch.Tensor:
        if self.kernel_blocks == 1:
            return self._gather_kernel_blocks(which, block_ids)
        offsets = torch.arange(self.kernel_blocks, device=block_ids.device)
        kernel_ids = (block_ids.unsqueeze(1) * self.kernel_blocks + offsets).flatten()
        found = self._gather_kernel_blocks(which, kernel_ids)
        return found.unflatten(1, (-1, self.kernel_blocks)).transpose(2, 3).flatten(3, 4)

    def _gather_kernel_blocks(self, which: int, kernel_ids: torch.Tensor) -> torch.Tensor:
        if self.places is None:
            view = self.values if which else self.keys
            assert view is not None
            return view[:, kernel_ids]
        packed = self._packed(which)
        if self._orders[which] is Order.BY_CHANNEL and len(kernel_ids):
            # Block by block into [layers, heads, channels, blocks, tokens], whose rows a product
            # with queries takes as they are: half the time of a gather and a transposition.
            by_channel = packed.unflatten(3, (self.head_size, -1))
            blocks = [by_channel[:, kernel_id] for kernel_id in kernel_ids.tolist()]
            return torch.stack(blocks, dim=3).permute(0, 3, 1, 4, 2)
        # Whole blocks as they lie in memory, and eight bytes at a time: a third of the time.
        packed = packed.view(torch.int64)[:, kernel_ids].view(self.kv_cache.dtype)
        unpacked = self._unpacked(which, packed)
        if unpacked is not None:
            return unpacked
        shape = (self.kv_cache.shape[3], self.head_size)
        return packed.index_select(3, self.places[which]).unflatten(3, shape)


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


def cpu_places(block_size: int, head_size: int, dtype: torch.dtype, isa: str) -> Places:
    """Find where vLLM's CPU kernels put each key and value, by writing known ones.

    Each instruction set packs them in an order of its own (csrc/cpu/cpu_attn_*.hpp), so the
    kernel that will run is asked rather than its layout repeated here.

    Raises:
        RuntimeError: what is read back is not a permutation of what was written.
    """
    identity = torch.arange(block_size * head_size)
    # Two bytes of the index, each exact in bfloat16, one probe for each.
    high, low = (
        _write_probe(part.view(block_size, 1, head_size).to(dtype), isa)
        for part in (identity // 256, identity % 256)
    )
    written = (high * 256 + low).long()  # [2, block_size * head_size]
    if not all(torch.equal(half.sort().values, identity) for half in written):
        raise RuntimeError(
            f"the CPU attention kernels ({isa}, {dtype}) pack keys in a way "
            "that --kv-policy cannot read"
        )
    return Places(*written.argsort(1))


def _write_probe(numbers: torch.Tensor, isa: str) -> torch.Tensor:
    """A cache of one block that holds ``numbers`` as keys and as values, ``[2, ...]`` fp32."""
    block_size, _, head_size = numbers.shape
    kv_cache = numbers.new_zeros(1, 1, block_size * 2, head_size)
    key_cache, value_cache = kv_cache.chunk(2, dim=2)
    slots = torch.arange(block_size)
    custom_ops.cpu_attn_reshape_and_cache(numbers, numbers, key_cache, value_cache, slots, isa)
    return kv_cache.view(2, -1).float()
