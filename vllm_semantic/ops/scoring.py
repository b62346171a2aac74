"""Block scores."""

import torch

from .cached_blocks import CachedBlocks
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


def cached_mean_key_cosine(cached: CachedBlocks) -> torch.Tensor | None:
    """:func:`mean_key_cosine` of blocks that stay where they are in the cache.

    All layers and blocks in one launch; each key is read once. Cosines do not depend on the
    scale that an fp8 cache divides by.

    Returns:
        ``[num_layers, num_blocks]`` fp32, or ``None`` where no Triton kernel runs.
    """
    if not runs_triton(cached.keys.device):
        return None
    from .kernels import scoring

    return scoring.mean_key_cosine(cached)


def cached_attention(cached: CachedBlocks) -> torch.Tensor | None:
    """The share of attention that each block receives from its request's newest queries.

    One launch finds the log of the sum of a block's exponentials; a softmax of these over the
    blocks of a request is what attention gives to each.

    Args:
        cached: with every block that a request holds.

    Returns:
        ``[num_layers, num_blocks]`` fp32, the mean over heads and queries; those of a request
        add up to 1. ``None`` where no Triton kernel runs.
    """
    if not runs_triton(cached.keys.device):
        return None
    from .kernels import scoring

    return shares(scoring.block_logsumexp(cached), cached.requests, len(cached.windows))


def shares(logsumexp: torch.Tensor, requests: torch.Tensor, num_reqs: int) -> torch.Tensor:
    """Softmax over the blocks of each request.

    Args:
        logsumexp: ``[num_layers, num_blocks, num_heads, num_queries]`` fp32; overwritten.
        requests: ``[num_blocks]`` int64, below ``num_reqs``.
        num_reqs: requests.

    Returns:
        ``[num_layers, num_blocks]`` fp32, the mean over heads and queries.
    """
    num_layers, _, *rest = logsumexp.shape
    index = requests.view(1, -1, 1, 1).expand_as(logsumexp)
    greatest = logsumexp.new_full((num_layers, num_reqs, *rest), float("-inf"))
    greatest.scatter_reduce_(1, index, logsumexp, "amax")
    # In place: the numbers of a full step are many.
    exponentials = logsumexp.sub_(greatest[:, requests]).exp_()
    total = torch.zeros_like(greatest).index_add_(1, requests, exponentials)
    return exponentials.div_(total[:, requests]).mean((2, 3))
