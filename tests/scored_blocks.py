"""Blocks of some requests, made up, and what kernels say of them beside the reference."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from vllm_semantic.ops.cached_blocks import CachedBlocks, CachedLayers
from vllm_semantic.ops.scoring import Reduction, cached_attention, cached_contribution, over_heads
from vllm_semantic.policies import BlockView


def random_scales(of: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A scale for each key or value of a head, four numbers apart, as they lie in a cache."""
    return torch.rand(*of.shape[:4], 4, generator=generator)[..., 0] + 0.1


def attention_both(
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_size: int = 64,
    block_size: int = 16,
    kernel_blocks: int = 1,
    num_queries: int = 8,
    dtype: torch.dtype = torch.float32,
    heads: Reduction = "mean",
    layout: Literal["beside", "values by channel", "cpu"] = "beside",
    fp8: torch.dtype | None = None,
    token_scales: bool = False,
    query_scales: bool = False,
    num_blocks: int = 4,
) -> None:
    """Hold the kernel to attention over gathered keys and values, request by request.

    Where no token is yet there are NaNs, as may lie in memory that nobody wrote.

    Args:
        num_heads: of queries.
        num_kv_heads: of keys and values.
        head_size: of all of them.
        block_size: of a kernel block.
        kernel_blocks: in a block.
        num_queries: of each request's window.
        dtype: of queries, keys and values.
        heads: how heads become one.
        layout: keys and values beside each other, as GPUs keep them; values alone, channel by
            channel; or keys alone, channel by channel, as CPUs keep them without AMX.
        fp8: the dtype of keys and values, with a scale for each head.
        token_scales: whether each of them has its own instead.
        query_scales: whether queries have one for each head.
        num_blocks: of the longest request.
    """
    generator = torch.Generator().manual_seed(head_size + block_size + num_queries)
    num_layers, size = 2, block_size * kernel_blocks
    # Logical blocks, the last of them being filled by 0, 3 and 1 tokens.
    longest = [0, 2, 5, *range(6, 3 + num_blocks)]
    held = [(longest, 0), ([0, 1, 9, 10], min(3, size - 1)), ([4, 7], min(1, size - 1))]
    num_rows = len(held) * num_queries
    num_ids = sum(len(blocks) for blocks, _ in held) + 1
    queries = torch.randn(num_layers, num_rows, num_heads, head_size, generator=generator)
    shape = (num_layers, num_ids * kernel_blocks, num_kv_heads, block_size, head_size)
    by_channel = (*shape[:3], head_size, block_size)
    if layout == "cpu":
        keys = torch.randn(by_channel, generator=generator).transpose(3, 4)
    else:
        keys = torch.randn(*shape[:4], 2 * head_size, generator=generator)[..., :head_size]
    if layout == "values by channel":
        values = torch.randn(by_channel, generator=generator).transpose(3, 4)
    else:
        values = torch.randn(shape, generator=generator)
    queries, keys, values = queries.to(dtype), keys.to(fp8 or dtype), values.to(fp8 or dtype)
    logit_scales = value_scales = None
    if fp8:
        logit_scales, value_scales = torch.rand(
            2, num_layers, num_kv_heads, generator=generator
        ).mul_(2)
    if query_scales:
        logit_scales = torch.rand(num_layers, num_kv_heads, generator=generator).mul_(2)
    of_tokens: tuple[torch.Tensor, ...] = ()
    if token_scales:
        logit_scales = value_scales = None
        of_tokens = random_scales(keys, generator), random_scales(values, generator)
    block_ids = torch.randperm(num_ids, generator=generator)[: num_ids - 1]
    requests = torch.tensor([i for i, (blocks, _) in enumerate(held) for _ in blocks])
    indices = torch.tensor([block for blocks, _ in held for block in blocks])
    num_tokens = [
        (blocks[-1] + 1) * size if not filled else blocks[-1] * size + filled
        for blocks, filled in held
    ]
    for last, num in zip(requests.bincount().cumsum(0) - 1, num_tokens, strict=True):
        for empty in range(num % size or size, size):
            of_part = int(block_ids[last]) * kernel_blocks + empty // block_size
            for tensor in (keys, values):
                tensor[:, of_part, :, empty % block_size] = float("nan")
    windows = torch.randperm(num_rows, generator=generator).view(len(held), num_queries)
    layers = CachedLayers(
        queries,
        keys,
        kernel_blocks,
        head_size**-0.5,
        values,
        logit_scales,
        value_scales,
        *of_tokens,
    )
    cached = CachedBlocks(
        layers, windows, torch.tensor(num_tokens), block_ids, requests, indices * size
    )
    attention = cached_attention(cached, heads)
    contribution = cached_contribution(cached, heads)
    assert attention is not None
    assert contribution is not None
    for i, num in enumerate(num_tokens):
        mine = requests == i
        kernel_ids = block_ids[mine].unsqueeze(1) * kernel_blocks + torch.arange(kernel_blocks)
        meant = [keys.float(), values.float()]
        for of, by in zip(meant, of_tokens):  # noqa: B905  (none: no scales)
            of *= by.unsqueeze(4)
        gathered, read = (
            of[:, kernel_ids].transpose(2, 3).flatten(3, 4).nan_to_num()
            * (1 if scales is None else scales[:, None, :, None, None])
            for of, scales in zip(meant, (logit_scales, value_scales), strict=True)
        )
        weights = BlockView(
            queries[:, windows[i]].float(),
            gathered,
            pytest.fail,
            indices[mine],
            num,
            head_size**-0.5,
        ).attention()
        norms = read.norm(dim=4).transpose(1, 2).repeat_interleave(num_heads // num_kv_heads, 1)
        # Both sum in float32: a logit's error is relative to what attention multiplies with.
        for scores, by_token in (
            (attention, weights),
            (contribution, weights * norms.unsqueeze(2)),
        ):
            expected = over_heads(by_token.sum(4).mean(2), 1, heads)
            torch.testing.assert_close(scores[:, mine], expected, rtol=2**-16, atol=2**-20)
