"""Block scores."""

from typing import Literal

import torch

from .cached_blocks import CachedBlocks
from .platform import runs_triton

Reduction = Literal["mean", "max"]
"""How several scores of a block become one."""


def over_heads(scores: torch.Tensor, dim: int, heads: Reduction) -> torch.Tensor:
    """Reduce the scores of heads, in dimension ``dim``, to one score of each block."""
    return scores.amax(dim) if heads == "max" else scores.mean(dim)


def mean_key_cosine(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Cosine of a query and a block's mean key, the mean over the KV heads.

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
    cosines = torch.nn.functional.cosine_similarity(query, mean_key, dim=-1)
    return cosines.mean(2)


def cached_mean_key_cosine(cached: CachedBlocks) -> torch.Tensor | None:
    """:func:`mean_key_cosine` of blocks that stay where they are in the cache.

    All layers and blocks in one launch; each key is read once. Cosines do not depend on the
    scale that an fp8 cache divides by.

    Returns:
        ``[num_layers, num_blocks]`` fp32, or ``None`` where no Triton kernel runs.
    """
    if not _has_triton(cached):
        return None
    from .kernels import scoring

    return scoring.mean_key_cosine(cached)


def cached_attention(cached: CachedBlocks, heads: Reduction = "mean") -> torch.Tensor | None:
    """The share of attention that each block receives from its request's newest queries.

    One launch finds the log of the sum of a block's exponentials; a softmax of these over the
    blocks of a request is what attention gives to each.

    Args:
        cached: with every block that a request holds.
        heads: the mean over the heads, or the highest.

    Returns:
        ``[num_layers, num_blocks]`` fp32, the mean over queries; the means over heads of a
        request add up to 1. ``None`` where no kernel reads the cache.
    """
    if not _has_triton(cached):
        return _by_cpu(cached, heads, weighs_values=False)
    from .kernels import scoring

    logsumexp, _ = scoring.block_logsumexp(cached)
    received = shares(logsumexp, cached.requests, len(cached.windows))
    return over_heads(received.mean(3), 2, heads)


def cached_contribution(cached: CachedBlocks, heads: Reduction = "mean") -> torch.Tensor | None:
    """What each block adds to what its request's newest queries read.

    The attention that a token receives times the norm of its value, summed over the tokens of
    a block. The launch that finds a block's share of attention also weighs its values: the sum
    is the share times the mean norm under attention.

    Args:
        cached: with every block that a request holds.
        heads: the mean over the heads, or the highest.

    Returns:
        ``[num_layers, num_blocks]`` fp32, the mean over queries; ``None`` where no kernel reads
        the cache.
    """
    if not _has_triton(cached):
        return _by_cpu(cached, heads, weighs_values=True)
    if cached.layers.values is None:
        return None
    from .kernels import scoring

    logsumexp, norms = scoring.block_logsumexp(cached, cached.layers.values)
    received = shares(logsumexp, cached.requests, len(cached.windows))
    return over_heads(received.mul_(norms).mean(3), 2, heads)


def _has_triton(cached: CachedBlocks) -> bool:
    """Whether a Triton kernel reads the cache."""
    return cached.layers.keys is not None and runs_triton(cached.layers.queries.device)


def _by_cpu(cached: CachedBlocks, heads: Reduction, weighs_values: bool) -> torch.Tensor | None:
    """What the kernel for CPUs says, if there is one."""
    try:
        from .kernels.cpu_scoring import block_scores
    except ImportError:  # vLLM brings numba to x86 and Arm, not everywhere
        return None
    return block_scores(cached, heads == "max", weighs_values)


def shares(logsumexp: torch.Tensor, requests: torch.Tensor, num_reqs: int) -> torch.Tensor:
    """Softmax over the blocks of each request.

    Args:
        logsumexp: ``[num_layers, num_blocks, num_heads, num_queries]`` fp32; overwritten.
        requests: ``[num_blocks]`` int64, below ``num_reqs``.
        num_reqs: requests.

    Returns:
        As ``logsumexp``; those of a query add up to 1.
    """
    num_layers, _, *rest = logsumexp.shape
    index = requests.view(1, -1, 1, 1).expand_as(logsumexp)
    greatest = logsumexp.new_full((num_layers, num_reqs, *rest), float("-inf"))
    greatest.scatter_reduce_(1, index, logsumexp, "amax")
    # In place: the numbers of a full step are many.
    exponentials = logsumexp.sub_(greatest[:, requests]).exp_()
    total = torch.zeros_like(greatest).index_add_(1, requests, exponentials)
    return exponentials.div_(total[:, requests])
