"""Which entries of its block table a request still holds: block tables without holes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..messages import BlockIndices


class HeldRows(NamedTuple):
    """The block table entries that each row of a batch still has."""

    columns: np.ndarray
    """``[num_reqs, num_columns]`` int32, ascending: which entries of its own table make up each
    row. Behind a sequence's end they name entries that are not in use."""

    evicted_tokens: np.ndarray
    """``[num_reqs]`` int32, tokens that each row has lost."""

    seq_lens: np.ndarray
    """``[num_reqs]`` int32, tokens that are left of each."""

    block_ids: np.ndarray | None
    """``[num_reqs, num_columns]`` int32: kernel blocks that came back to another place than the
    tables name, and 0 for all others; ``None`` where there are none."""


class HeldBlocks:
    """The blocks that the requests of a KV cache group hold, by their place in their tables.

    vLLM's own tables only ever grow, and keep naming what was evicted. What is held changes
    when a request loses blocks, and is looked up in between: a step costs what is held, however
    much was computed. Written by the worker, in kernel blocks.

    Args:
        max_num_reqs: requests at a time.
        max_num_blocks: the most kernel blocks that one request holds.
        block_size: tokens of a block of the manager.
        kernel_blocks: kernel blocks in a block of the manager.
    """

    def __init__(
        self, max_num_reqs: int, max_num_blocks: int, block_size: int, kernel_blocks: int
    ) -> None:
        self.block_size = block_size
        self.kernel_blocks = kernel_blocks
        self._kernel_block_size = block_size // kernel_blocks
        # Row 0 is that of requests that have lost nothing. Behind what was the last full block
        # at a request's last eviction its columns are consecutive.
        self._columns = np.empty((max_num_reqs + 1, max_num_blocks), dtype=np.int32)
        self._columns[0] = np.arange(max_num_blocks)
        self._block_ids = np.zeros_like(self._columns)
        """Of what came back, kernel blocks; 0 elsewhere."""
        self._recalling: set[int] = set()
        """Rows with blocks that came back."""
        self._evicted_tokens = np.zeros(max_num_reqs + 1, dtype=np.int32)
        self._rows: dict[str, int] = {}
        self._free = list(range(max_num_reqs, 0, -1))

    def __bool__(self) -> bool:
        """Whether any request has lost a block."""
        return bool(self._rows)

    def evict(self, request_id: str, block_indices: BlockIndices) -> None:
        """Note that a request has lost blocks.

        Args:
            request_id: a running request.
            block_indices: logical blocks of the manager that it holds.
        """
        row = self._rows.get(request_id)
        if row is None:
            row = self._rows[request_id] = self._free.pop()
            self._columns[row] = self._columns[0]
        columns = self._columns[row]
        gone = of_kernel(block_indices, self.kernel_blocks)
        places = columns.searchsorted(gone)
        assert (columns[places] == gone).all(), "evicted, but not held"
        held = np.ones(columns.size, np.bool_)
        held[places] = False
        num_held, end = columns.size - gone.size, columns[-1] + 1
        columns[:num_held] = columns[held]
        columns[num_held:] = np.arange(end, end + gone.size)
        if row in self._recalling:
            block_ids = self._block_ids[row]
            block_ids[:num_held] = block_ids[held]
            block_ids[num_held:] = 0
        self._evicted_tokens[row] += len(block_indices) * self.block_size

    def recall(self, request_id: str, blocks: Mapping[int, int]) -> None:
        """Note that blocks have come back.

        Args:
            request_id: a running request that has lost them, and :meth:`evict` was told so.
            blocks: by logical index, ascending, the block of the manager where each is now.
        """
        row = self._rows[request_id]
        columns, size = self._columns[row], self._columns.shape[1]
        back = of_kernel(list(blocks), self.kernel_blocks)
        places = np.searchsorted(columns, back)
        self._columns[row] = np.insert(columns, places, back)[:size]
        block_ids = of_kernel(list(blocks.values()), self.kernel_blocks)
        self._block_ids[row] = np.insert(self._block_ids[row], places, block_ids)[:size]
        self._recalling.add(row)
        self._evicted_tokens[row] -= len(blocks) * self.block_size

    def forget(self, request_ids: Iterable[str]) -> None:
        """Give up what is known of requests that are gone or were preempted."""
        for request_id in request_ids:
            if request_id in self._rows:
                row = self._rows.pop(request_id)
                self._evicted_tokens[row] = 0
                if row in self._recalling:
                    self._recalling.discard(row)
                    self._block_ids[row] = 0
                self._free.append(row)

    def rows(self, request_ids: Sequence[str], seq_lens: np.ndarray) -> HeldRows | None:
        """The block table entries that the requests of a batch still have.

        Args:
            request_ids: the batch's requests, row by row.
            seq_lens: ``[num_reqs]`` int32, tokens of each once the step has run, evicted ones too;
                rows that pad the batch come last.

        Returns:
            As many columns as the longest row needs; ``None`` if no row has lost a block.
        """
        rows = np.zeros(len(seq_lens), dtype=np.int64)
        rows[: len(request_ids)] = [self._rows.get(request_id, 0) for request_id in request_ids]
        if not rows.any():
            return None
        evicted = self._evicted_tokens[rows]
        left = seq_lens - evicted
        num_columns = -(-int(left.max()) // self._kernel_block_size)
        block_ids = None
        if not self._recalling.isdisjoint(rows.tolist()):
            block_ids = self._block_ids[:, :num_columns][rows]
        return HeldRows(self._columns[:, :num_columns][rows], evicted, left, block_ids)


def of_kernel(blocks: Sequence[int], kernel_blocks: int) -> np.ndarray:
    """The kernel blocks in blocks of the manager, by index, id or slot.

    Args:
        blocks: of the manager.
        kernel_blocks: kernel blocks in each.
    """
    if kernel_blocks == 1:
        return np.array(blocks, np.int64)
    return np.add.outer(np.multiply(blocks, kernel_blocks), np.arange(kernel_blocks)).flatten()
