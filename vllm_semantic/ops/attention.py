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
    # Channel by channel, as CPU kernels keep the keys of a block: the one copy of them is cheap.
    by_channel = keys.permute(0, 2, 4, 1, 3).reshape(num_layers, num_kv_heads, head_size, -1)
    grouped = queries.transpose(1, 2).reshape(num_layers, num_kv_heads, -1, head_size) * scale
    logits = (grouped @ by_channel).view(num_layers, num_heads, num_queries, -1)
    newest_last = torch.arange(num_tokens - num_queries, num_tokens, device=positions.device)
    # Only the last blocks can hold what is newer than a query.
    newest = min(num_blocks, 1 + -(-num_queries // block_size)) * block_size
    hidden = positions.flatten()[-newest:] > newest_last.unsqueeze(1)  # [num_queries, newest]
    logits[..., -newest:].masked_fill_(hidden, float("-inf"))
    return logits.softmax(-1).unflatten(3, (num_blocks, block_size))
