"""The scoring kernel, interpreted, computes what the reference computes."""

from __future__ import annotations

import pytest
import torch

from vllm_semantic.ops.cached_blocks import CachedBlocks, CachedLayers
from vllm_semantic.ops.kernels import scoring
from vllm_semantic.ops.scoring import mean_key_cosine

from ..scored_blocks import attention_both, random_scales


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
        CachedLayers(queries, keys, kernel_blocks, scale=1.0, key_token_scales=scales),
        windows=rows.unsqueeze(1),
        num_tokens=torch.zeros(len(ids), dtype=torch.int64),
        block_ids=block_ids,
        requests=torch.arange(len(ids)),
        first_positions=torch.zeros(len(ids), dtype=torch.int64),
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
    layers = CachedLayers(queries, keys, 1, 1.0)
    cached = CachedBlocks(layers, zero.view(1, 1), zero, zero, zero, zero)
    assert scoring.mean_key_cosine(cached).tolist() == [[0.0]]


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
    attention_both(kernel_blocks=2, layout="values by channel")
