"""The scoring kernel, interpreted, computes what the reference computes."""

from __future__ import annotations

import pytest
import torch

from vllm_semantic.ops.cached_blocks import CachedBlocks
from vllm_semantic.ops.kernels import scoring
from vllm_semantic.ops.scoring import (
    Reduction,
    cached_attention,
    cached_contribution,
    mean_key_cosine,
    over_heads,
)
from vllm_semantic.policies import BlockView


def reference(
    queries: torch.Tensor,
    rows: torch.Tensor,
    keys: torch.Tensor,
    block_ids: torch.Tensor,
    kernel_blocks: int,
) -> torch.Tensor:
    """Layer by layer, on keys that were gathered."""
    offsets = torch.arange(kernel_blocks)
    kernel_ids = block_ids.unsqueeze(1) * kernel_blocks + offsets
    scores = []
    for layer_queries, layer_keys in zip(queries, keys, strict=True):
        gathered = layer_keys[kernel_ids].transpose(1, 2).flatten(2, 3)
        pairs = mean_key_cosine(layer_queries[rows].float(), gathered.float().unsqueeze(1))
        scores.append(pairs.squeeze(1))
    return torch.stack(scores)


def random_scales(of: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A scale for each key or value of a head, four numbers apart, as they lie in a cache."""
    return torch.rand(*of.shape[:4], 4, generator=generator)[..., 0] + 0.1


def score_both(
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_size: int = 64,
    block_size: int = 16,
    kernel_blocks: int = 1,
    dtype: torch.dtype = torch.float32,
    key_dtype: torch.dtype | None = None,
    transposed: bool = False,
    ids: tuple[int, ...] = (3, 0, 2, 3),
    token_scales: bool = False,
) -> None:
    """Hold the kernel to the reference on random inputs of one shape."""
    generator = torch.Generator().manual_seed(head_size + block_size)
    num_layers, num_blocks, num_rows = 2, 4, 5
    queries = torch.randn(num_layers, num_rows, num_heads, head_size, generator=generator)
    shape = (num_layers, num_blocks * kernel_blocks, num_kv_heads, block_size, head_size)
    if transposed:  # as vLLM's CPU kernels keep them
        keys = torch.randn(*shape[:3], head_size, block_size, generator=generator).transpose(3, 4)
    else:  # next to its values
        keys = torch.randn(*shape[:4], 2 * head_size, generator=generator)[..., :head_size]
    queries, keys = (
        queries.to(dtype),
        (keys * (20 if key_dtype is torch.int8 else 1)).to(key_dtype or dtype),
    )
    scales = random_scales(keys, generator) if token_scales else None
    block_ids = torch.tensor(ids, dtype=torch.int64)
    rows = torch.arange(len(ids)) % num_rows
    cached = CachedBlocks(
        queries,
        windows=rows.unsqueeze(1),
        num_tokens=torch.zeros(len(ids), dtype=torch.int64),
        keys=keys,
        kernel_blocks=kernel_blocks,
        block_ids=block_ids,
        requests=torch.arange(len(ids)),
        first_positions=torch.zeros(len(ids), dtype=torch.int64),
        scale=1.0,
        key_token_scales=scales,
    )
    scores = scoring.mean_key_cosine(cached)
    meant = keys if scales is None else keys.float() * scales.unsqueeze(4)
    expected = reference(queries, rows, meant, block_ids, kernel_blocks)
    assert scores.shape == (num_layers, len(ids))
    # Both sum in float32, in another order; the blocks' means do not cancel out.
    tokens = block_size * kernel_blocks
    torch.testing.assert_close(scores, expected, rtol=0, atol=2**-24 * (tokens + head_size))


@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
def test_head_sizes(head_size: int) -> None:
    score_both(head_size=head_size)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (4, 4), (8, 2), (7, 1), (12, 3)])
def test_grouped_queries(num_heads: int, num_kv_heads: int) -> None:
    score_both(num_heads, num_kv_heads)


@pytest.mark.parametrize("block_size", [1, 16, 24, 32, 64])
@pytest.mark.parametrize("kernel_blocks", [1, 3])
def test_blocks(block_size: int, kernel_blocks: int) -> None:
    score_both(block_size=block_size, kernel_blocks=kernel_blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_dtypes_and_layouts(dtype: torch.dtype, transposed: bool) -> None:
    score_both(dtype=dtype, transposed=transposed)


@pytest.mark.parametrize("key_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_caches(key_dtype: torch.dtype) -> None:
    score_both(dtype=torch.bfloat16, key_dtype=key_dtype)


@pytest.mark.parametrize("key_dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("kernel_blocks", [1, 2])
def test_caches_with_scales_of_tokens(key_dtype: torch.dtype, kernel_blocks: int) -> None:
    score_both(
        dtype=torch.bfloat16, key_dtype=key_dtype, kernel_blocks=kernel_blocks, token_scales=True
    )


@pytest.mark.parametrize("ids", [(), (2,), (1, 1, 1, 1, 1, 1, 1)], ids=["none", "one", "many"])
def test_numbers_of_blocks(ids: tuple[int, ...]) -> None:
    score_both(ids=ids)


def test_zero_vectors_have_no_direction() -> None:
    queries = torch.zeros(1, 1, 2, 64)
    keys = torch.zeros(1, 2, 2, 16, 64)
    zero = torch.zeros(1, dtype=torch.int64)
    cached = CachedBlocks(queries, zero.view(1, 1), zero, keys, 1, zero, zero, zero, 1.0)
    assert scoring.mean_key_cosine(cached).tolist() == [[0.0]]


def attention_both(
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_size: int = 64,
    block_size: int = 16,
    kernel_blocks: int = 1,
    num_queries: int = 8,
    dtype: torch.dtype = torch.float32,
    heads: Reduction = "mean",
    transposed: bool = False,
    fp8: torch.dtype | None = None,
    token_scales: bool = False,
) -> None:
    """Hold the kernel to attention over gathered keys and values, request by request.

    Where no token is yet there are NaNs, as may lie in memory that nobody wrote.
    """
    generator = torch.Generator().manual_seed(head_size + block_size + num_queries)
    num_layers, size = 2, block_size * kernel_blocks
    # Logical blocks, the last of them being filled by 0, 3 and 1 tokens.
    held = [([0, 2, 5, 6], 0), ([0, 1, 9, 10], min(3, size - 1)), ([4, 7], min(1, size - 1))]
    num_rows = len(held) * num_queries
    num_ids = sum(len(blocks) for blocks, _ in held) + 1
    queries = torch.randn(num_layers, num_rows, num_heads, head_size, generator=generator)
    shape = (num_layers, num_ids * kernel_blocks, num_kv_heads, block_size, head_size)
    keys = torch.randn(*shape[:4], 2 * head_size, generator=generator)[..., :head_size]
    if transposed:  # the values alone: the CPU kernels have an order for each
        values = torch.randn(*shape[:3], head_size, block_size, generator=generator)
        values = values.transpose(3, 4)
    else:
        values = torch.randn(shape, generator=generator)
    queries, keys, values = queries.to(dtype), keys.to(fp8 or dtype), values.to(fp8 or dtype)
    logit_scales = value_scales = None
    if fp8:
        logit_scales, value_scales = torch.rand(
            2, num_layers, num_kv_heads, generator=generator
        ).mul_(2)
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
    cached = CachedBlocks(
        queries,
        windows,
        torch.tensor(num_tokens),
        keys,
        kernel_blocks,
        block_ids,
        requests,
        indices * size,
        head_size**-0.5,
        values,
        logit_scales,
        value_scales,
        *of_tokens,
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


@pytest.mark.parametrize("head_size", [32, 64, 80, 128])
def test_attention_by_head_size(head_size: int) -> None:
    attention_both(head_size=head_size)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (4, 4), (8, 2), (7, 1)])
def test_attention_of_grouped_queries(num_heads: int, num_kv_heads: int) -> None:
    attention_both(num_heads, num_kv_heads)


@pytest.mark.parametrize(("block_size", "kernel_blocks"), [(16, 1), (16, 2), (24, 1), (32, 3)])
@pytest.mark.parametrize("num_queries", [1, 8])
def test_attention_by_block_and_window(
    block_size: int, kernel_blocks: int, num_queries: int
) -> None:
    attention_both(block_size=block_size, kernel_blocks=kernel_blocks, num_queries=num_queries)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_by_dtype(dtype: torch.dtype) -> None:
    attention_both(dtype=dtype)


@pytest.mark.parametrize("fp8", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_attention_in_an_fp8_cache(fp8: torch.dtype) -> None:
    """Each head has its scales."""
    attention_both(dtype=torch.bfloat16, fp8=fp8)


@pytest.mark.parametrize("kernel_blocks", [1, 2])
def test_attention_in_a_cache_with_scales_of_tokens(kernel_blocks: int) -> None:
    fp8 = torch.float8_e4m3fn
    attention_both(dtype=torch.bfloat16, fp8=fp8, kernel_blocks=kernel_blocks, token_scales=True)


def test_attention_of_the_highest_head() -> None:
    attention_both(8, 2, heads="max")


def test_values_in_an_order_of_their_own() -> None:
    attention_both(kernel_blocks=2, transposed=True)
