"""Block tables without their holes."""

import torch

from .platform import runs_triton


def compact_block_table(
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    block_size: int,
    max_seq_len: int,
    num_null_ids: int,
    out_table: torch.Tensor,
    out_seq_lens: torch.Tensor,
) -> None:
    """Move each row's blocks to its front and shorten its sequence by the evicted tokens.

    Keys are cached after RoPE, so the order and positions of what is kept do not change,
    and a request's newest tokens, never evicted, stay last: bottom-right causal masks hold.

    Args:
        block_table: ``[num_reqs, max_num_blocks]`` int32 physical block ids; an evicted
            block is a null block; what lies behind a sequence's end is not read.
        seq_lens: ``[num_reqs]`` int32, tokens of each sequence, evicted ones included.
        block_size: tokens per entry of the table.
        max_seq_len: at least ``seq_lens.max()``, on the host.
        num_null_ids: ids below this are the null block (more than one when a manager block
            spans several kernel blocks).
        out_table: ``[num_reqs, num_columns]`` int32, written up to each sequence's end; rows
            keep at most ``num_columns`` blocks.
        out_seq_lens: ``[num_reqs]`` int32, the tokens left of each sequence.
    """
    if runs_triton(block_table):
        from .kernels import compaction

        compaction.compact_block_table(
            block_table, seq_lens, block_size, num_null_ids, out_table, out_seq_lens
        )
        return
    table, lengths = compacted(block_table, seq_lens, block_size, max_seq_len, num_null_ids)
    num_columns = min(table.shape[1], out_table.shape[1])
    out_table[:, :num_columns] = table[:, :num_columns]
    out_seq_lens.copy_(lengths)


def compacted(
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    block_size: int,
    max_seq_len: int,
    num_null_ids: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference in plain torch; arguments as :func:`compact_block_table`.

    Returns:
        The compacted table ``[num_reqs, num_columns]`` int32, undefined behind a sequence's
        end, and the tokens left of each sequence ``[num_reqs]``.
    """
    table = block_table[:, : -(-max_seq_len // block_size)]
    present = table >= num_null_ids
    rank = present.cumsum(1)  # 1-based place in the compacted row
    moved = table.new_zeros(table.shape[0], table.shape[1] + 1)
    moved.scatter_(1, rank * present, table)  # column 0 takes what is not present
    num_blocks = (seq_lens + block_size - 1) // block_size
    num_kept = rank.gather(1, (num_blocks - 1).clamp_(min=0).long().unsqueeze(1)).squeeze(1)
    num_kept = torch.where(num_blocks > 0, num_kept, 0).to(seq_lens.dtype)
    return moved[:, 1:], seq_lens - (num_blocks - num_kept) * block_size
