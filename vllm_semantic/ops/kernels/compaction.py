"""Block tables without their holes, in one pass over each row."""

import torch
import triton
import triton.language as tl

CHUNK = 1024
"""Table entries that a program looks at at once."""


@triton.jit(do_not_specialize=["table_stride", "out_stride", "num_columns", "num_null_ids"])  # type: ignore[untyped-decorator]
def compact_kernel(
    table,  # [num_reqs, ...] int32
    seq_lens,  # [num_reqs] int32
    out_table,  # [num_reqs, num_columns] int32
    out_seq_lens,  # [num_reqs] int32
    table_stride,
    out_stride,
    num_columns,
    num_null_ids,
    BLOCK_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    seq_len = tl.load(seq_lens + row)
    num_blocks = tl.cdiv(seq_len, BLOCK_SIZE)
    kept = 0
    for start in tl.range(0, num_blocks, CHUNK):
        column = start + tl.arange(0, CHUNK)
        ids = tl.load(table + row * table_stride + column, mask=column < num_blocks, other=0)
        present = (column < num_blocks) & (ids >= num_null_ids)
        place = kept + tl.cumsum(present.to(tl.int32), 0) - 1
        tl.store(out_table + row * out_stride + place, ids, mask=present & (place < num_columns))
        kept += tl.sum(present.to(tl.int32), 0)
    tl.store(out_seq_lens + row, seq_len - (num_blocks - kept) * BLOCK_SIZE)


def compact_block_table(
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    block_size: int,
    num_null_ids: int,
    out_table: torch.Tensor,
    out_seq_lens: torch.Tensor,
) -> None:
    """One launch, no allocation, nothing read back: see ``ops.compaction``."""
    compact_kernel[(len(seq_lens),)](
        block_table,
        seq_lens,
        out_table,
        out_seq_lens,
        block_table.stride(0),
        out_table.stride(0),
        out_table.shape[1],
        num_null_ids,
        BLOCK_SIZE=block_size,
        CHUNK=CHUNK,
    )
