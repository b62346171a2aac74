"""Block scores of all layers and requests in one launch."""

import torch
import triton
import triton.language as tl

EPSILON = 1e-8
"""The norm below which a vector counts as zero, as in ``torch.cosine_similarity``."""


@triton.jit(do_not_specialize_on_alignment=["rows", "block_ids"])  # type: ignore[untyped-decorator]
def mean_key_cosine_kernel(
    out,  # [num_layers, num_blocks] fp32
    queries,  # [num_layers, num_rows, num_heads, head_size]
    rows,  # [num_blocks] int64
    keys,  # [num_layers, num_kernel_blocks, num_kv_heads, kernel_block_size, head_size]
    block_ids,  # [num_blocks] int64
    query_stride_layer,
    query_stride_row,
    query_stride_head,
    key_stride_layer,
    key_stride_block,
    key_stride_head,
    key_stride_token,
    key_stride_channel,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED_HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PADDED_BLOCK_SIZE: tl.constexpr,
    KERNEL_BLOCKS: tl.constexpr,
    EPSILON: tl.constexpr,
):
    block = tl.program_id(0)
    layer = tl.program_id(1).to(tl.int64)
    row = tl.load(rows + block)
    kernel_block = tl.load(block_ids + block) * KERNEL_BLOCKS
    channel = tl.arange(0, PADDED_HEAD_SIZE)
    token = tl.arange(0, PADDED_BLOCK_SIZE)
    in_head = channel < HEAD_SIZE
    in_block = (token < BLOCK_SIZE)[:, None] & in_head[None, :]
    query_row = queries + layer * query_stride_layer + row * query_stride_row + channel
    key_tile = (
        keys
        + layer * key_stride_layer
        + kernel_block * key_stride_block
        + token[:, None] * key_stride_token
        + channel[None, :] * key_stride_channel
    )
    total = 0.0
    for head in range(NUM_KV_HEADS):
        query = tl.zeros([PADDED_HEAD_SIZE], tl.float32)
        for member in range(GROUP):
            place = query_row + (head * GROUP + member) * query_stride_head
            query += tl.load(place, mask=in_head, other=0.0).to(tl.float32)
        key = tl.zeros([PADDED_HEAD_SIZE], tl.float32)
        for part in range(KERNEL_BLOCKS):
            place = key_tile + part * key_stride_block + head * key_stride_head
            key += tl.sum(tl.load(place, mask=in_block, other=0.0).to(tl.float32), 0)
        query /= GROUP
        key /= BLOCK_SIZE * KERNEL_BLOCKS
        query_norm = tl.maximum(tl.sqrt(tl.sum(query * query, 0)), EPSILON)
        key_norm = tl.maximum(tl.sqrt(tl.sum(key * key, 0)), EPSILON)
        total += tl.sum(query * key, 0) / (query_norm * key_norm)
    tl.store(out + layer * tl.num_programs(0) + block, total / NUM_KV_HEADS)


def mean_key_cosine(
    queries: torch.Tensor,
    rows: torch.Tensor,
    keys: torch.Tensor,
    block_ids: torch.Tensor,
    kernel_blocks: int,
) -> torch.Tensor:
    """Score blocks in the cache itself: see ``ops.scoring.score_cached_blocks``."""
    num_layers, _, num_heads, head_size = queries.shape
    num_kv_heads, block_size = keys.shape[2:4]
    out = torch.empty(num_layers, len(block_ids), dtype=torch.float32, device=queries.device)
    if len(block_ids) == 0:
        return out
    mean_key_cosine_kernel[(len(block_ids), num_layers)](
        out,
        queries,
        rows,
        keys,
        block_ids,
        *queries.stride()[:3],
        *keys.stride(),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=num_heads // num_kv_heads,
        HEAD_SIZE=head_size,
        PADDED_HEAD_SIZE=triton.next_power_of_2(head_size),
        BLOCK_SIZE=block_size,
        PADDED_BLOCK_SIZE=triton.next_power_of_2(block_size),
        KERNEL_BLOCKS=kernel_blocks,
        EPSILON=EPSILON,
    )
    return out
