"""Reading keys back from a layer's KV cache, whatever the kernels' layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm import _custom_ops as custom_ops


@dataclass(frozen=True)
class KeyCache:
    """The keys of one attention layer.

    ``kv_cache`` is vLLM's logical ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``
    (vllm/v1/kv_cache_interface.py, ``create_kv_cache_views``), in kernel blocks.
    """

    kv_cache: torch.Tensor
    head_size: int
    kernel_blocks: int
    """Kernel blocks in one block of the block manager."""

    permutation: torch.Tensor | None
    """Where the kernels keep each (token, channel) of a head's keys, if not in order."""

    def gather(self, block_ids: torch.Tensor) -> torch.Tensor:
        """Keys of some blocks.

        Args:
            block_ids: ``[num_blocks]`` ids of the block manager.

        Returns:
            ``[num_blocks, num_kv_heads, block_size, head_size]`` fp32.
        """
        num_kv_heads, kernel_block_size = self.kv_cache.shape[1:3]
        offsets = torch.arange(self.kernel_blocks, device=block_ids.device)
        kernel_ids = (block_ids.unsqueeze(1) * self.kernel_blocks + offsets).flatten()
        if self.permutation is None:
            keys = self.kv_cache[kernel_ids, :, :, : self.head_size]
        else:
            half = self.kv_cache.flatten(2)[:, :, : kernel_block_size * self.head_size]
            keys = half[kernel_ids][:, :, self.permutation]
            keys = keys.unflatten(2, (kernel_block_size, self.head_size))
        keys = keys.float().unflatten(0, (-1, self.kernel_blocks)).transpose(1, 2)
        return keys.reshape(len(block_ids), num_kv_heads, -1, self.head_size)


def cpu_key_permutation(
    block_size: int, head_size: int, dtype: torch.dtype, isa: str
) -> torch.Tensor:
    """Find where vLLM's CPU kernels put each key channel, by writing known keys.

    Each instruction set packs keys in an order of its own (csrc/cpu/cpu_attn_*.hpp), so the
    kernel that will run is asked rather than its layout repeated here.

    Returns:
        ``[block_size * head_size]`` int64: the place of channel ``c`` of token ``t`` in a
        head's flattened keys is at index ``t * head_size + c``.

    Raises:
        RuntimeError: the keys read back are not a permutation of those written.
    """
    size = block_size * head_size
    identity = torch.arange(size)
    # Two bytes of the index, each exact in bfloat16, one probe for each.
    high, low = (
        _write_probe(part.view(block_size, 1, head_size).to(dtype), isa)
        for part in (identity // 256, identity % 256)
    )
    written = (high * 256 + low).long()
    if not torch.equal(written.sort().values, identity):
        raise RuntimeError(
            f"the CPU attention kernels ({isa}, {dtype}) store keys in a layout "
            "that --kv-policy cannot read"
        )
    return written.argsort()


def _write_probe(keys: torch.Tensor, isa: str) -> torch.Tensor:
    block_size, _, head_size = keys.shape
    key_cache, value_cache = keys.new_zeros(1, 1, block_size * 2, head_size).chunk(2, dim=2)
    slots = torch.arange(block_size)
    custom_ops.cpu_attn_reshape_and_cache(keys, keys, key_cache, value_cache, slots, isa)
    return key_cache.flatten().float()
