"""Block scores of all layers and requests in one launch."""

import torch
import triton
import triton.language as tl

from ..cached_blocks import CachedBlocks

EPSILON = 1e-8
"""The norm below which a vector counts as zero, as in ``torch.cosine_similarity``."""


@triton.jit(do_not_specialize_on_alignment=["rows", "block_ids"])  # type: ignore[untyped-decorator]
def mean_key_cosine_kernel(
    out,  # [num_layers, num_blocks] fp32
    queries,  # [num_layers, num_rows, num_heads, head_size]
    rows,  # [num_blocks] int64
    keys,  # [num_layers, num_kernel_blocks, num_kv_heads, kernel_block_size, head_size]
    key_scales,  # [num_layers, ..., kernel_block_size] fp32; not read without TOKEN_SCALES
    block_ids,  # [num_blocks] int64
    query_stride_layer,
    query_stride_row,
    query_stride_head,
    key_stride_layer,
    key_stride_block,
    key_stride_head,
    key_stride_token,
    key_stride_channel,
    scale_stride_layer,
    scale_stride_block,
    scale_stride_head,
    scale_stride_token,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED_HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PADDED_BLOCK_SIZE: tl.constexpr,
    KERNEL_BLOCKS: tl.constexpr,
    TOKEN_SCALES: tl.constexpr,
    EPSILON: tl.constexpr,
):
    block = tl.program_id(0)
    layer = tl.program_id(1).to(tl.int64)
    row = tl.load(rows + block)
    kernel_block = tl.load(block_ids + block) * KERNEL_BLOCKS
    channel = tl.arange(0, PADDED_HEAD_SIZE)
    token = tl.arange(0, PADDED_BLOCK_SIZE)
    in_head = channel < HEAD_SIZE
    written = token < BLOCK_SIZE
    in_block = written[:, None] & in_head[None, :]
    query_row = queries + layer * query_stride_layer + row * query_stride_row + channel
    key_tile = (
        keys
        + layer * key_stride_layer
        + kernel_block * key_stride_block
        + token[:, None] * key_stride_token
        + channel[None, :] * key_stride_channel
    )
    scale_row = (
        key_scales
        + layer * scale_stride_layer
        + kernel_block * scale_stride_block
        + token * scale_stride_token
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
            tile = tl.load(place, mask=in_block, other=0.0).to(tl.float32)
            if TOKEN_SCALES:
                of_part = scale_row + part * scale_stride_block + head * scale_stride_head
                tile *= tl.load(of_part, mask=written, other=0.0)[:, None]
            key += tl.sum(tile, 0)
        query /= GROUP
        key /= BLOCK_SIZE * KERNEL_BLOCKS
        query_norm = tl.maximum(tl.sqrt(tl.sum(query * query, 0)), EPSILON)
        key_norm = tl.maximum(tl.sqrt(tl.sum(key * key, 0)), EPSILON)
        cosine = tl.sum(query * key, 0) / (query_norm * key_norm)
        total += cosine / NUM_KV_HEADS
    tl.store(out + layer * tl.num_programs(0) + block, total)


def mean_key_cosine(cached: CachedBlocks) -> torch.Tensor:
    """Score blocks in the cache itself: see ``ops.scoring.cached_mean_key_cosine``."""
    layers, keys = cached.layers, cached.layers.keys
    assert keys is not None
    num_layers, _, num_heads, head_size = layers.queries.shape
    num_kv_heads, block_size = keys.shape[2:4]
    num_blocks = len(cached.block_ids)
    out = torch.empty(num_layers, num_blocks, dtype=torch.float32, device=layers.queries.device)
    if num_blocks == 0:
        return out
    scales = layers.key_token_scales
    mean_key_cosine_kernel[(num_blocks, num_layers)](
        out,
        layers.queries,
        cached.windows[cached.requests, -1],
        keys,
        cached.windows if scales is None else scales,
        cached.block_ids,
        *layers.queries.stride()[:3],
        *keys.stride(),
        *_strides(scales),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=num_heads // num_kv_heads,
        HEAD_SIZE=head_size,
        PADDED_HEAD_SIZE=triton.next_power_of_2(head_size),
        BLOCK_SIZE=block_size,
        PADDED_BLOCK_SIZE=triton.next_power_of_2(block_size),
        KERNEL_BLOCKS=layers.kernel_blocks,
        TOKEN_SCALES=scales is not None,
        EPSILON=EPSILON,
    )
    return out


def _strides(scales: torch.Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if scales is None else scales.stride()


# Parts of one tensor, which begin anywhere in it: no launch is compiled once more for that.
PARTS = ["windows", "num_tokens", "block_ids", "requests", "first_positions"]


@triton.jit(do_not_specialize_on_alignment=PARTS)  # type: ignore[untyped-decorator]
def block_logsumexp_kernel(
    out,  # [num_layers, num_blocks, num_heads, num_queries] fp32
    norms,  # as out; not written without VALUES
    queries,  # [num_layers, num_rows, num_heads, head_size]
    windows,  # [num_reqs, num_queries] int64
    num_tokens,  # [num_reqs] int64
    keys,  # [num_layers, num_kernel_blocks, num_kv_heads, kernel_block_size, head_size]
    values,  # as keys; not read without VALUES
    key_scales,  # [num_layers, ..., kernel_block_size] fp32; not read without TOKEN_SCALES
    value_scales,  # as key_scales
    block_ids,  # [num_blocks] int64
    requests,  # [num_blocks] int64
    first_positions,  # [num_blocks] int64
    logit_scales,  # [num_layers, num_kv_heads] fp32; not read without SCALED
    scale,
    query_stride_layer,
    query_stride_row,
    query_stride_head,
    key_stride_layer,
    key_stride_block,
    key_stride_head,
    key_stride_token,
    key_stride_channel,
    value_stride_layer,
    value_stride_block,
    value_stride_head,
    value_stride_token,
    value_stride_channel,
    scale_stride_layer,
    scale_stride_block,
    scale_stride_head,
    scale_stride_token,
    NUM_QUERIES: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_ROWS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED_HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PADDED_BLOCK_SIZE: tl.constexpr,
    KERNEL_BLOCKS: tl.constexpr,
    VALUES: tl.constexpr,
    SCALED: tl.constexpr,
    TOKEN_SCALES: tl.constexpr,
):
    block = tl.program_id(0)
    layer = tl.program_id(1).to(tl.int64)
    request = tl.load(requests + block)
    kernel_block = tl.load(block_ids + block) * KERNEL_BLOCKS
    channel = tl.arange(0, PADDED_HEAD_SIZE)
    token = tl.arange(0, PADDED_BLOCK_SIZE)
    row = tl.arange(0, PADDED_ROWS)  # a query of a member of the group
    query, member = row // GROUP, row % GROUP
    in_head = channel < HEAD_SIZE
    in_window = query < NUM_QUERIES
    place = tl.load(windows + request * NUM_QUERIES + query, mask=in_window, other=0)
    position = tl.load(num_tokens + request) - NUM_QUERIES + query
    first = tl.load(first_positions + block)
    query_tile = (
        queries
        + layer * query_stride_layer
        + place[:, None] * query_stride_row
        + member[:, None] * query_stride_head
        + channel[None, :]
    )
    key_tile = (
        keys
        + layer * key_stride_layer
        + kernel_block * key_stride_block
        + token[None, :] * key_stride_token
        + channel[:, None] * key_stride_channel
    )
    value_tile = (
        values
        + layer * value_stride_layer
        + kernel_block * value_stride_block
        + token[None, :] * value_stride_token
        + channel[:, None] * value_stride_channel
    )
    scale_row = (
        layer * scale_stride_layer + kernel_block * scale_stride_block + token * scale_stride_token
    )
    written = token < BLOCK_SIZE
    in_tile = in_head[:, None] & written[None, :]
    out_row = (layer * tl.num_programs(0) + block) * NUM_KV_HEADS * GROUP * NUM_QUERIES
    for head in range(NUM_KV_HEADS):
        q = tl.load(
            query_tile + head * GROUP * query_stride_head,
            mask=in_window[:, None] & in_head[None, :],
            other=0.0,
        ).to(tl.float32)
        of_head = scale
        if SCALED:
            of_head *= tl.load(logit_scales + layer * NUM_KV_HEADS + head)
        greatest = tl.full([PADDED_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([PADDED_ROWS], tl.float32)
        weighed = tl.zeros([PADDED_ROWS], tl.float32)
        for part in range(KERNEL_BLOCKS):
            k = tl.load(
                key_tile + part * key_stride_block + head * key_stride_head,
                mask=in_tile,
                other=0.0,
            ).to(tl.float32)
            logits = tl.dot(q, k, input_precision="ieee") * of_head
            of_part = scale_row + part * scale_stride_block + head * scale_stride_head
            if TOKEN_SCALES:
                logits *= tl.load(key_scales + of_part, mask=written, other=0.0)[None, :]
            key_position = first + part * BLOCK_SIZE + token
            seen = (key_position[None, :] <= position[:, None]) & written[None, :]
            logits = tl.where(seen, logits, float("-inf"))
            larger = tl.maximum(greatest, tl.max(logits, 1))
            base = tl.where(larger == float("-inf"), 0.0, larger)
            earlier, weights = tl.exp(greatest - base), tl.exp(logits - base[:, None])
            total = total * earlier + tl.sum(weights, 1)
            greatest = larger
            if VALUES:
                v = tl.load(
                    value_tile + part * value_stride_block + head * value_stride_head,
                    mask=in_tile,
                    other=0.0,
                ).to(tl.float32)
                norm = tl.sqrt(tl.sum(v * v, 0))
                if TOKEN_SCALES:
                    norm *= tl.load(value_scales + of_part, mask=written, other=0.0)
                # What lies where no token is yet may be anything, also NaN.
                weighed = weighed * earlier + tl.sum(
                    tl.where(seen, weights * norm[None, :], 0.0), 1
                )
        place = out_row + (head * GROUP + member) * NUM_QUERIES + query
        lse = tl.where(total > 0, greatest + tl.log(total), float("-inf"))
        tl.store(out + place, lse, mask=in_window)
        if VALUES:
            tl.store(norms + place, weighed / tl.where(total > 0, total, 1.0), mask=in_window)


def block_logsumexp(
    cached: CachedBlocks, values: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log of the sum of exponentials of each block's logits, and what they weigh its values to.

    Args:
        cached: blocks.
        values: as the keys of the layers; ``None`` leaves the second answer unwritten.

    Returns:
        Twice ``[num_layers, num_blocks, num_heads, num_queries]`` fp32: see ``ops.scoring``, and
        the mean norm of a block's values under the exponentials of its logits.
    """
    layers, keys = cached.layers, cached.layers.keys
    assert keys is not None
    num_layers, _, num_heads, head_size = layers.queries.shape
    num_kv_heads, block_size = keys.shape[2:4]
    num_queries = cached.windows.shape[1]
    num_blocks = len(cached.block_ids)
    shape = (num_layers, num_blocks, num_heads, num_queries)
    out = torch.empty(shape, dtype=torch.float32, device=layers.queries.device)
    norms = out if values is None else torch.empty_like(out)
    if num_blocks == 0:
        return out, norms
    group = num_heads // num_kv_heads
    read = keys if values is None else values
    key_scales, value_scales = layers.key_token_scales, layers.value_token_scales
    block_logsumexp_kernel[(num_blocks, num_layers)](
        out,
        norms,
        layers.queries,
        cached.windows,
        cached.num_tokens,
        keys,
        read,
        cached.windows if key_scales is None else key_scales,
        cached.windows if value_scales is None else value_scales,
        cached.block_ids,
        cached.requests,
        cached.first_positions,
        cached.num_tokens if layers.logit_scales is None else layers.logit_scales,
        layers.scale,
        *layers.queries.stride()[:3],
        *keys.stride(),
        *read.stride(),
        *_strides(key_scales),
        NUM_QUERIES=num_queries,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        PADDED_ROWS=max(16, triton.next_power_of_2(num_queries * group)),  # what tl.dot takes
        HEAD_SIZE=head_size,
        PADDED_HEAD_SIZE=max(16, triton.next_power_of_2(head_size)),
        BLOCK_SIZE=block_size,
        PADDED_BLOCK_SIZE=max(16, triton.next_power_of_2(block_size)),
        KERNEL_BLOCKS=layers.kernel_blocks,
        VALUES=values is not None,
        SCALED=layers.logit_scales is not None,
        TOKEN_SCALES=key_scales is not None,
    )
    if values is not None and layers.value_scales is not None:
        norms *= layers.value_scales.repeat_interleave(group, 1)[:, None, :, None]
    return out, norms
