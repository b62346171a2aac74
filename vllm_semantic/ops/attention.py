"""Attention weights of a few queries over the blocks that a request keeps."""

import torch


def weights(
    queries: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    num_tokens: int,
    scale: float,
) -> torch.Tensor:
    """Softmax over all keys that a query may see.

    Args:
        queries: ``[num_layers, num_queries, num_heads, head_size]`` fp32 of the last tokens,
            the newest last.
        keys: ``[num_layers, num_blocks, num_kv_heads, block_size, head_size]`` fp32.
        positions: ``[num_blocks, block_size]`` int64, the place of each key in the sequence.
        num_tokens: tokens computed; the newest query is that of token ``num_tokens - 1``.
        scale: factor of a dot product.

    Returns:
        ``[num_layers, num_heads, num_queries, num_blocks, block_size]`` fp32; the weights of a
        query add up to 1.
    """
    num_layers, num_queries, num_heads, head_size = queries.shape
    num_blocks, num_kv_heads, block_size = keys.shape[1:4]
    grouped = queries.transpose(1, 2).reshape(num_layers, 1, num_kv_heads, -1, head_size)
    # Block by block: keys are not copied.
    logits = (
        ((grouped * scale) @ keys.transpose(3, 4))
        .permute(0, 2, 3, 1, 4)
        .reshape(num_layers, num_heads, num_queries, -1)
    )
    newest_last = torch.arange(num_tokens - num_queries, num_tokens, device=positions.device)
    hidden = positions.flatten() > newest_last.unsqueeze(1)  # [num_queries, num_keys]
    logits.masked_fill_(hidden, float("-inf"))
    return logits.softmax(-1).unflatten(3, (num_blocks, block_size))
