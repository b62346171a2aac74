"""Block scores."""

from collections.abc import Iterator

import torch

from .cached_blocks import CachedBlocks
from .platform import runs_triton

MAX_GATHERED = 1 << 25
"""Elements of keys that are copied at once, 128 MiB in fp32."""


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


def cached_mean_key_cosine(cached: CachedBlocks) -> torch.Tensor:
    """:func:`mean_key_cosine` of blocks of many requests at once.

    By a kernel that reads each key once, where it lies, or else on copies. Cosines do not depend
    on the scale that an fp8 cache divides by.

    Returns:
        ``[num_layers, num_blocks]`` fp32.
    """
    if _runs_kernel(cached):
        from .kernels import scoring

        return scoring.mean_key_cosine(cached)
    cosines = []
    for part, keys in _gathered(cached):
        mean_key = keys.mean(3)
        newest = cached.queries[:, cached.windows[cached.requests[part], -1]].float()
        query = newest.unflatten(2, (keys.shape[2], -1)).mean(3)
        cosines.append(torch.nn.functional.cosine_similarity(query, mean_key, dim=-1).mean(2))
    return torch.cat(cosines, 1)


def cached_attention(cached: CachedBlocks) -> torch.Tensor:
    """The share of attention that each block receives from its request's newest queries.

    First the log of the sum of a block's exponentials, by a kernel in one launch or else on
    copies; a softmax of these over the blocks of a request is what attention gives to each.

    Args:
        cached: with every block that a request holds.

    Returns:
        ``[num_layers, num_blocks]`` fp32, the mean over heads and queries; those of a request
        add up to 1.
    """
    if _runs_kernel(cached):
        from .kernels import scoring

        logsumexp = scoring.block_logsumexp(cached)
    else:
        logsumexp = block_logsumexp(cached)
    return shares(logsumexp, cached.requests, len(cached.windows))


def block_logsumexp(cached: CachedBlocks) -> torch.Tensor:
    """Log of the sum of exponentials of what each query gives to a block's keys.

    Returns:
        ``[num_layers, num_blocks, num_heads, num_queries]`` fp32, minus infinity where a query
        comes before the block.
    """
    num_queries = cached.windows.shape[1]
    before_newest = torch.arange(num_queries - 1, -1, -1, device=cached.windows.device)
    sums = []
    for part, keys in _gathered(cached):
        num_kv_heads, block_size = keys.shape[2:4]
        of = cached.requests[part]
        queries = cached.queries[:, cached.windows[of]].float().transpose(2, 3)
        grouped = queries.unflatten(2, (num_kv_heads, -1)).flatten(3, 4)
        logits = grouped @ keys.transpose(3, 4) * cached.scale
        logits = logits.unflatten(3, (-1, num_queries)).flatten(2, 3)
        offsets = torch.arange(block_size, device=of.device)
        key_positions = cached.first_positions[part].view(-1, 1, 1, 1) + offsets
        newest = cached.num_tokens[of].view(-1, 1, 1, 1) - 1
        hidden = key_positions > newest - before_newest.unsqueeze(1)
        sums.append(logits.masked_fill_(hidden, float("-inf")).logsumexp(4))
    return torch.cat(sums, 1)


def _runs_kernel(cached: CachedBlocks) -> bool:
    return cached.keys is not None and runs_triton(cached.keys)


def _gathered(cached: CachedBlocks) -> Iterator[tuple[slice, torch.Tensor]]:
    """Some blocks at once, as many as :data:`MAX_GATHERED` allows, with their keys in fp32."""
    num_blocks = len(cached.block_ids)
    size = cached.gather_keys(cached.block_ids[:1]).numel()
    step = max(1, MAX_GATHERED // max(1, size))
    for first in range(0, num_blocks, step):
        part = slice(first, first + step)
        yield part, cached.gather_keys(cached.block_ids[part]).float()


def shares(logsumexp: torch.Tensor, requests: torch.Tensor, num_reqs: int) -> torch.Tensor:
    """Softmax over the blocks of each request.

    Args:
        logsumexp: ``[num_layers, num_blocks, num_heads, num_queries]`` fp32.
        requests: ``[num_blocks]`` int64, below ``num_reqs``.
        num_reqs: requests.

    Returns:
        ``[num_layers, num_blocks]`` fp32, the mean over heads and queries.
    """
    num_layers, _, *rest = logsumexp.shape
    index = requests.view(1, -1, 1, 1).expand_as(logsumexp)
    greatest = logsumexp.new_full((num_layers, num_reqs, *rest), float("-inf"))
    greatest.scatter_reduce_(1, index, logsumexp, "amax")
    exponentials = (logsumexp - greatest[:, requests]).exp()
    total = torch.zeros_like(greatest).index_add_(1, requests, exponentials)
    return (exponentials / total[:, requests]).mean((2, 3))
