"""Block tables without holes, against a loop over rows.

In a process with Triton's interpreter the same tests run the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_semantic.ops.compaction import compact_block_table

repeatable = settings(deadline=None, derandomize=True, max_examples=200)


@dataclass
class Batch:
    """A ragged batch as the runner lays it out."""

    block_table: list[list[int]]
    seq_lens: list[int]
    block_size: int
    max_seq_len: int
    num_null_ids: int

    def compact(self) -> tuple[torch.Tensor, torch.Tensor]:
        block_table = torch.tensor(self.block_table, dtype=torch.int32)
        seq_lens = torch.tensor(self.seq_lens, dtype=torch.int32)
        # As a step finds its buffers: full of an earlier one, and as wide as a row may need.
        most = max(len(row) for row in self.by_definition()[0])
        out_table = torch.full((len(block_table), max(1, most)), -1, dtype=torch.int32)
        out_seq_lens = torch.full_like(seq_lens, -1)
        before = block_table.clone(), seq_lens.clone()
        compact_block_table(
            block_table,
            seq_lens,
            self.block_size,
            self.max_seq_len,
            self.num_null_ids,
            out_table,
            out_seq_lens,
        )
        assert torch.equal(block_table, before[0])
        assert torch.equal(seq_lens, before[1])
        return out_table, out_seq_lens

    def by_definition(self) -> tuple[list[list[int]], list[int]]:
        rows, lengths = [], []
        for row, seq_len in zip(self.block_table, self.seq_lens, strict=True):
            kept, length = [], seq_len
            for start in range(0, seq_len, self.block_size):
                block = row[start // self.block_size]
                if block >= self.num_null_ids:
                    kept.append(block)
                else:
                    length -= self.block_size
            rows.append(kept)
            lengths.append(length)
        return rows, lengths


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    block_size = draw(st.sampled_from([1, 2, 16, 32]))
    num_null_ids = draw(st.integers(1, 4))
    width = draw(st.integers(1, 12))
    null_ids = st.integers(0, num_null_ids - 1)
    block_ids = st.integers(num_null_ids, 1000)
    table, seq_lens = [], []
    for _ in range(draw(st.integers(1, 6))):
        seq_len = draw(st.integers(0, width * block_size))
        num_blocks = -(-seq_len // block_size)
        row = [draw(null_ids | block_ids) for _ in range(num_blocks)]
        if seq_len % block_size:
            row[-1] = draw(block_ids)  # a block that is not full is never evicted
        # What an earlier, longer request left behind.
        row += [draw(null_ids | block_ids) for _ in range(width - num_blocks)]
        table.append(row)
        seq_lens.append(seq_len)
    max_seq_len = draw(st.integers(max(1, *seq_lens), (width + 3) * block_size))
    return Batch(table, seq_lens, block_size, max_seq_len, num_null_ids)


@repeatable
@given(batch=batches())
def test_against_a_loop(batch: Batch) -> None:
    table, seq_lens = batch.compact()
    rows, lengths = batch.by_definition()
    assert seq_lens.tolist() == lengths
    # Behind a sequence's end the table is undefined.
    assert [row[: len(kept)] for row, kept in zip(table.tolist(), rows, strict=True)] == rows


@repeatable
@given(batch=batches())
def test_newest_tokens_stay_last(batch: Batch) -> None:
    """Bottom-right causal masks rely on it: the last tokens are in the last block."""
    table, seq_lens = batch.compact()
    for row, length, original, seq_len in zip(
        table.tolist(), seq_lens.tolist(), batch.block_table, batch.seq_lens, strict=True
    ):
        if seq_len % batch.block_size:
            assert length % batch.block_size == seq_len % batch.block_size
            assert row[(length - 1) // batch.block_size] == original[seq_len // batch.block_size]


def test_without_holes_nothing_changes() -> None:
    batch = Batch([[3, 7, 5], [9, 4, 2]], [40, 48], 16, 48, 1)
    table, seq_lens = batch.compact()
    assert table.tolist() == batch.block_table
    assert seq_lens.tolist() == batch.seq_lens


def test_one_block() -> None:
    table, seq_lens = Batch([[6]], [5], 16, 16, 1).compact()
    assert (table.tolist(), seq_lens.tolist()) == ([[6]], [5])


def test_padding_rows_stay_empty() -> None:
    """Rows that pad a batch for a graph have no tokens, whatever their table says."""
    table, seq_lens = Batch([[5, 0, 6], [8, 9, 1]], [41, 0], 16, 41, 1).compact()
    assert table[0, :2].tolist() == [5, 6]
    assert seq_lens.tolist() == [25, 0]


def test_a_null_block_spans_several_kernel_blocks() -> None:
    """A manager block of two kernel blocks: its null block is the kernel blocks 0 and 1."""
    row = [4, 5, 0, 1, 2, 3]
    table, seq_lens = Batch([row], [90], 16, 96, 2).compact()
    assert table[0, :4].tolist() == [4, 5, 2, 3]
    assert seq_lens.tolist() == [90 - 32]
