"""Attention over a request's blocks on the device and in host memory, for the last tokens of a
prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata

from .held_blocks import HeldRows, of_kernel
from .host_blocks import HostBlocks


class Staging:
    """Where the blocks of one layer and one request lie together while attention reads them.

    Layers and requests take turns: no more is needed however many there are.

    Args:
        host: the evicted blocks of all layers.
        kv_cache: of a layer, ``[num_blocks, ...]`` in kernel blocks; others are laid out alike.
        max_num_blocks: the most kernel blocks that a request has.
    """

    def __init__(self, host: HostBlocks, kv_cache: torch.Tensor, max_num_blocks: int) -> None:
        self.host = host
        block = kv_cache[0]
        shape, stride = (max_num_blocks, *block.shape), (block.numel(), *block.stride())
        self.kv_cache = torch.empty_strided(
            shape, stride, dtype=block.dtype, device=kv_cache.device
        )


@dataclass(frozen=True)
class HostRead:
    """One request's tokens of a step, which see its blocks in host memory too."""

    tokens: slice
    """Rows of the step's query tensor."""

    block_ids: torch.Tensor
    """``[num_held]`` int32, kernel blocks on the device."""

    places: torch.Tensor
    """``[num_held]`` int64: where each belongs among all of the request's kernel blocks."""

    slots: list[int]
    """Kernel blocks in host memory."""

    host_places: list[int]
    """Where each of :attr:`slots` belongs among all of the request's kernel blocks."""

    metadata: Any
    """The backend's metadata of this request alone: its block table names all of its kernel blocks
    from 0, in order."""

    def gather(
        self, kv_cache: torch.Tensor, host_kv: torch.Tensor, staging: Staging
    ) -> torch.Tensor:
        """One layer's blocks of the request, in order.

        Args:
            kv_cache: the layer's, ``[num_blocks, ...]``.
            host_kv: its evicted blocks, ``[num_slots, ...]``.
            staging: overwritten.

        Returns:
            ``[num_kernel_blocks, ...]``, a view of the staging; :attr:`metadata` is over it.
        """
        together = staging.kv_cache[: len(self.places) + len(self.slots)]
        together[self.places] = kv_cache[self.block_ids]
        staging.host.read(
            [host_kv[slot] for slot in self.slots], [together[place] for place in self.host_places]
        )
        return together


def plan_read(
    builder: Any,
    common: CommonAttentionMetadata,
    row: int,
    held: HeldRows,
    away: Mapping[int, int],
    kernel_blocks: int,
) -> HostRead:
    """Plan what one row of a batch reads.

    Args:
        builder: of the backend's metadata; one that no other batch of the step uses.
        common: the batch, without evicted blocks.
        row: of the batch.
        held: what its rows hold.
        away: slots of the row's evicted blocks by logical index, in blocks of the manager.
        kernel_blocks: kernel blocks in each of these.
    """
    table = common.block_table_tensor
    device, block_size = table.device, builder.kv_cache_spec.block_size
    num_held = -(-int(held.seq_lens[row]) // block_size)
    indices, slots = of_kernel([*away], kernel_blocks), of_kernel([*away.values()], kernel_blocks)
    columns = held.columns[row, :num_held]
    in_order = np.sort(np.append(columns, indices))
    seq_len = int(held.seq_lens[row]) + len(indices) * block_size
    first, end = common.query_start_loc_cpu[row : row + 2].tolist()
    num_tokens, tokens, rows = end - first, slice(first, end), slice(row, row + 1)
    starts, seq_lens = (torch.tensor(of, dtype=torch.int32) for of in ([0, num_tokens], [seq_len]))
    alone = common.replace(
        query_start_loc=async_tensor_h2d(starts, device),
        query_start_loc_cpu=starts,
        seq_lens=async_tensor_h2d(seq_lens, device),
        seq_lens_cpu_upper_bound=seq_lens,
        num_reqs=1,
        num_actual_tokens=num_tokens,
        max_query_len=num_tokens,
        max_seq_len=seq_len,
        block_table_tensor=torch.arange(len(in_order), dtype=torch.int32, device=device)[None],
        slot_mapping=common.slot_mapping[tokens],
        positions=None if common.positions is None else common.positions[tokens],
        is_prefilling=None if common.is_prefilling is None else common.is_prefilling[rows],
        req_idx=None if common.req_idx is None else common.req_idx[rows],
        _num_computed_tokens_cache=None,
    )
    return HostRead(
        tokens,
        table[row, :num_held],
        async_tensor_h2d(np.searchsorted(in_order, columns), device, torch.int64),
        slots.tolist(),
        np.searchsorted(in_order, indices).tolist(),
        builder.build(0, alone),
    )
