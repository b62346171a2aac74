"""Block tables without their holes. Plain torch: the reference for a fused kernel."""

import torch


def compact_block_table(
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    block_size: int,
    max_seq_len: int,
    num_null_ids: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move each row's blocks to its front and shorten its sequence by the evicted tokens.

    Keys are cached after RoPE, so the order and positions of what is kept do not change,
    and a request's newest tokens, never evicted, stay last: bottom-right causal masks hold.

    Args:
        block_table: ``[num_reqs, max_num_blocks]`` int32 physical block ids; an evicted
            block is a null block. Not modified.
        seq_lens: ``[num_reqs]`` int32, tokens of each sequence, evicted ones included.
        block_size: tokens per entry of the table.
        max_seq_len: at least ``seq_lens.max()``; bounds the columns read.
        num_null_ids: ids below this are the null block (more than one when a manager block
            spans several kernel blocks).

    Returns:
        The compacted table ``[num_reqs, used_blocks]`` int32, unused entries 0, and the
        tokens left of each sequence ``[num_reqs]``, both new tensors.
    """
    table = block_table[:, : -(-max_seq_len // block_size)]
    num_blocks = (seq_lens + block_size - 1) // block_size
    columns = torch.arange(table.shape[1], device=table.device)
    used = columns < num_blocks.unsqueeze(1)
    present = (table >= num_null_ids) & used
    rank = present.cumsum(1)  # 1-based place in the compacted row, 0 only before the first
    compacted = table.new_zeros(table.shape[0], table.shape[1] + 1)
    compacted.scatter_(1, torch.where(present, rank, 0), table)
    num_evicted = num_blocks - present.sum(1, dtype=num_blocks.dtype)
    return compacted[:, 1:].contiguous(), seq_lens - num_evicted * block_size
