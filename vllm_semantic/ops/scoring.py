"""Block scores."""

import torch

from .platform import runs_triton


def mean_key_cosine(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Cosine of a query and a block's mean key, averaged over the KV heads.

    Grouped-query attention: the query of a KV head is the mean of its group's heads.
    A zero query or mean key has cosine 0.

    Args:
        queries: ``[num_layers, num_heads, head_size]`` fp32, one query.
        keys: ``[num_layers, num_blocks, num_kv_heads, block_size, head_size]``.

    Returns:
        ``[num_layers, num_blocks]`` fp32 in [-1, 1], higher = keep.
    """
    num_kv_heads = keys.shape[2]
    query = queries.unflatten(1, (num_kv_heads, -1)).mean(2).unsqueeze(1)
    mean_key = keys.mean(3, dtype=torch.float32)
    return torch.nn.functional.cosine_similarity(query, mean_key, dim=-1).mean(2)


def cached_mean_key_cosine(
    queries: torch.Tensor,
    rows: torch.Tensor,
    keys: torch.Tensor,
    block_ids: torch.Tensor,
    kernel_blocks: int,
) -> torch.Tensor | None:
    """:func:`mean_key_cosine` of blocks that stay where they are in the cache.

    All layers and blocks in one launch; each key is read once.

    Args:
        queries: ``[num_layers, num_rows, num_heads, head_size]``.
        rows: ``[num_blocks]`` int64, the row of each block's query.
        keys: ``[num_layers, num_kernel_blocks, num_kv_heads, kernel_block_size, head_size]``,
            any strides; bf16, fp16, fp32 or an fp8 dtype. Cosines do not depend on the scale
            that an fp8 cache divides by.
        block_ids: ``[num_blocks]`` int64; block ``b`` is ``kernel_blocks`` kernel blocks in a
            row from ``b * kernel_blocks``.
        kernel_blocks: kernel blocks in a block.

    Returns:
        ``[num_layers, num_blocks]`` fp32, or ``None`` where no Triton kernel runs.
    """
    if not runs_triton(keys):
        return None
    from .kernels import scoring

    return scoring.mean_key_cosine(queries, rows, keys, block_ids, kernel_blocks)
