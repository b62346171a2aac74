"""Blocks of many requests, left where they are in the cache."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class CachedLayers:
    """Attention layers of one shape, and their whole cache."""

    queries: torch.Tensor
    """``[num_layers, num_rows, num_heads, head_size]`` of the model's dtype, after RoPE."""

    keys: torch.Tensor | None
    """``[num_layers, num_kernel_blocks, num_kv_heads, kernel_block_size, head_size]``, a view of
    the cache with any strides; bf16, fp16, fp32, int8 or an fp8 dtype. ``None`` where no view shows
    them, as with AMX: see :attr:`pairs`."""

    kernel_blocks: int
    """Block ``b`` is this many kernel blocks in a row, from ``b * kernel_blocks``."""

    scale: float
    """What attention multiplies a dot product with."""

    values: torch.Tensor | None = None
    """As :attr:`keys`; ``None`` where no view shows them."""

    logit_scales: torch.Tensor | None = None
    """``[num_layers, num_kv_heads]`` fp32, contiguous: what :attr:`scale` is multiplied with in
    each head, where the cache or the queries are quantised; ``None``: 1."""

    value_scales: torch.Tensor | None = None
    """``[num_layers, num_kv_heads]`` fp32, what :attr:`values` are multiplied with; ``None``: 1."""

    key_token_scales: torch.Tensor | None = None
    """``[num_layers, num_kernel_blocks, num_kv_heads, kernel_block_size]`` fp32, a view with any
    strides: what each of :attr:`keys` is multiplied with; ``None``: 1."""

    value_token_scales: torch.Tensor | None = None
    """The same of :attr:`values`, with the same strides."""

    pairs: tuple[torch.Tensor, torch.Tensor] | None = None
    """Keys, and values, as words of two bf16 each, where they are kept as AMX takes them:
    ``[num_layers, num_kernel_blocks, num_kv_heads, kernel_block_size * head_size / 2]`` int32,
    see ``ops.kernels.cpu_scoring``."""


@dataclass(frozen=True)
class CachedBlocks:
    """What a kernel needs to score blocks in place, of requests in their order."""

    layers: CachedLayers
    """What the blocks lie in."""

    windows: torch.Tensor
    """``[num_reqs, num_queries]`` int64, rows of each request's newest queries, the newest last."""

    num_tokens: torch.Tensor
    """``[num_reqs]`` int64, tokens computed of each request."""

    block_ids: torch.Tensor
    """``[num_blocks]`` int64, those of a request one behind the other."""

    requests: torch.Tensor
    """``[num_blocks]`` int64, the row of each block's request in :attr:`windows`."""

    first_positions: torch.Tensor
    """``[num_blocks]`` int64, the place of a block's first token in its sequence."""
