"""Evicted blocks in host memory: a worker's side of recall."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from vllm.v1.simple_kv_offload.cuda_mem_ops import pin_tensor

from ..messages import BlockCopy, HostCopies
from .cached_kv import CachedKV

MAX_STAGED = 256 << 20
"""Bytes on a GPU that blocks take at a time on their way to host memory and back."""


class _Side(NamedTuple):
    """The layers of a KV cache group on the device, and their evicted blocks on the host."""

    cache: CachedKV
    host: CachedKV
    """Slots in place of blocks."""


class HostBlocks:
    """Slots of host memory, each for one block in all layers of a KV cache group.

    For a CPU it is memory like the cache's. For a GPU it is pinned, and copied on a stream of its
    own: on the way out from a copy on the device, so that the forward pass may write the block
    meanwhile. The host waits for none of it.

    vLLM's own offloading (vllm/v1/kv_offload, vllm/v1/simple_kv_offload) moves prefixes for
    requests that wait, never blocks of one that runs, so none of its managers fits here.

    Args:
        groups: caches of the layers of each KV cache group.
        num_slots: blocks. Groups share them, as they share vLLM's pool of blocks.
        device: of the caches.

    Raises:
        ValueError: the groups are not alike.
    """

    def __init__(
        self, groups: Mapping[int, Sequence[CachedKV]], num_slots: int, device: torch.device
    ) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        first, *others = groups.values()
        memory = [self._allocate(cache, num_slots) for cache in first]
        self.num_bytes = sum(tensor.nbytes for tensor in memory)
        """Host memory taken."""
        if any([*map(_shape, caches)] != [*map(_shape, first)] for caches in others):
            raise ValueError("recall needs groups of layers whose blocks are alike")
        self._groups = {
            group_id: [
                _Side(cache, replace(cache, kv_cache=tensor))
                for cache, tensor in zip(caches, memory, strict=True)
            ]
            for group_id, caches in groups.items()
        }

    def caches(self, group_id: int) -> list[CachedKV]:
        """What is in host memory of a group's layers, slots in place of blocks."""
        return [side.host for side in self._groups[group_id]]

    def copy(self, copies: HostCopies) -> None:
        """Copy what a step asks for, before its forward pass: first out, then back."""
        for group_id, sides in self._groups.items():
            out = [copy for copy in copies.out if copy.group_id == group_id]
            for side in sides:
                for some in _at_a_time(side.cache, out):
                    self._copy_out(side, some, is_last=some[-1] is out[-1])
        for group_id, sides in self._groups.items():
            back = [copy for copy in copies.back if copy.group_id == group_id]
            for side in sides:
                for some in _at_a_time(side.cache, back):
                    self._copy_back(side, some)

    def on_device(self, host: CachedKV, slots: Sequence[int]) -> tuple[CachedKV, torch.Tensor]:
        """Blocks of host memory where the device reads them.

        Args:
            host: one of :meth:`caches`, or some of its layers.
            slots: blocks.

        Returns:
            A cache of these layers, and ``[num_blocks]`` int64, the blocks in it.
        """
        if self._stream is None:
            return host, torch.tensor(slots)
        staged = self._to_device(host, slots)
        return replace(host, kv_cache=staged), torch.arange(len(slots), device=staged.device)

    def read(self, slots: Sequence[torch.Tensor], into: Sequence[torch.Tensor]) -> None:
        """Copy parts of host memory to the device, in order with the kernels on both sides.

        Args:
            slots: views of :meth:`caches`.
            into: of the same shapes; the memory is the kernels' before and after.
        """
        if self._stream is None:
            torch._foreach_copy_(into, slots)
            return
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            torch._foreach_copy_(into, slots, non_blocking=True)
        current.wait_stream(self._stream)

    def _allocate(self, cache: CachedKV, num_slots: int) -> torch.Tensor:
        """Memory for one slot after the other, all layers of each together."""
        num_layers, _, *block = cache.kv_cache.shape
        shape = (num_slots * cache.kernel_blocks, num_layers, *block)
        memory = torch.empty(shape, dtype=cache.kv_cache.dtype)
        if self._stream is not None:
            # Not by torch, which rounds what it pins up to a power of two.
            pin_tensor(memory)
            unpin = torch.cuda.cudart().cudaHostUnregister
            weakref.finalize(self, unpin, memory.data_ptr())
        return memory.transpose(0, 1)

    def _copy_out(self, side: _Side, copies: Sequence[BlockCopy], is_last: bool) -> None:
        there = _blocks(side.host, [copy.slot for copy in copies])
        here = _blocks(side.cache, [copy.block_id for copy in copies])
        if self._stream is None:
            torch._foreach_copy_(there, here)
            return
        staged = torch.stack(here)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            torch._foreach_copy_(there, list(staged), non_blocking=True)
        if is_last:  # the forward pass does not wait for it
            staged.record_stream(self._stream)
        else:  # the next takes the same memory
            torch.cuda.current_stream().wait_stream(self._stream)

    def _copy_back(self, side: _Side, copies: Sequence[BlockCopy]) -> None:
        slots = [copy.slot for copy in copies]
        here = _blocks(side.cache, [copy.block_id for copy in copies])
        if self._stream is None:
            torch._foreach_copy_(here, _blocks(side.host, slots))
            return
        staged = replace(side.host, kv_cache=self._to_device(side.host, slots))
        torch._foreach_copy_(here, _blocks(staged, range(len(slots))))

    def _to_device(self, host: CachedKV, slots: Sequence[int]) -> torch.Tensor:
        """A copy on the GPU, ``[num_layers, num_kernel_blocks, ...]``, that kernels wait for."""
        assert self._stream is not None
        num_layers, _, *block = host.kv_cache.shape
        shape = (num_layers, len(slots) * host.kernel_blocks, *block)
        staged = torch.empty(shape, dtype=host.kv_cache.dtype, device=self._stream.device)
        places = _blocks(replace(host, kv_cache=staged), range(len(slots)))
        self.read(_blocks(host, slots), places)
        return staged


def _blocks(cache: CachedKV, block_ids: Sequence[int]) -> list[torch.Tensor]:
    """Views of the kernel blocks of some blocks, ``[num_layers, ...]`` each, in one piece in host
    memory."""
    size = cache.kernel_blocks
    return [cache.kv_cache[:, i * size + j] for i in block_ids for j in range(size)]


def _shape(cache: CachedKV) -> tuple[object, ...]:
    """What two groups have to have in common to share slots."""
    num_layers, _, *block = cache.kv_cache.shape
    return num_layers, *block, cache.kernel_blocks, cache.kv_cache.dtype


def _at_a_time(cache: CachedKV, copies: Sequence[BlockCopy]) -> Iterator[Sequence[BlockCopy]]:
    """As many as are staged at once."""
    num_layers = len(cache.kv_cache)
    block_bytes = 2 * num_layers * cache.block_numel * cache.kv_cache.itemsize
    step = max(1, MAX_STAGED // block_bytes)
    for first in range(0, len(copies), step):
        yield copies[first : first + step]
