"""Block scores. Plain torch: the reference that a fused kernel has to match."""

import torch


def mean_key_cosine(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Cosine of a query and a block's mean key, averaged over the KV heads.

    Grouped-query attention: the query of a KV head is the mean of its group's heads.
    A zero query or mean key has cosine 0.

    Args:
        queries: ``[num_blocks, num_heads, head_size]`` fp32, one query per block.
        keys: ``[num_blocks, num_kv_heads, block_size, head_size]`` in the cache's dtype.

    Returns:
        ``[num_blocks]`` fp32 in [-1, 1], higher = keep.
    """
    num_blocks, num_heads, head_size = queries.shape
    num_kv_heads = keys.shape[1]
    query = queries.view(num_blocks, num_kv_heads, num_heads // num_kv_heads, head_size).mean(2)
    return torch.nn.functional.cosine_similarity(
        query, keys.mean(2, dtype=torch.float32), dim=-1
    ).mean(1)
