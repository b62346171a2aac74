"""Mean-key cosine against explicit loops in float64."""

from __future__ import annotations

import math

import pytest
import torch

from vllm_semantic.ops.scoring import mean_key_cosine as score_layers

SHAPES = [
    # num_blocks, num_heads, num_kv_heads, block_size, head_size
    (1, 1, 1, 1, 1),
    (3, 4, 4, 16, 64),
    (5, 4, 2, 32, 80),
    (7, 8, 1, 32, 128),
    (2, 12, 3, 5, 33),
]


def mean_key_cosine(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Each block with a query of its own, as if each were a layer with one block."""
    return score_layers(queries, keys.unsqueeze(1)).squeeze(1)


def random_inputs(shape: tuple[int, ...], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    num_blocks, num_heads, num_kv_heads, block_size, head_size = shape
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(num_blocks, num_heads, head_size, generator=generator)
    keys = torch.randn(num_blocks, num_kv_heads, block_size, head_size, generator=generator)
    return queries, keys


def mean(rows: list[list[float]]) -> list[float]:
    return [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]


def norm(vector: list[float]) -> float:
    return math.sqrt(math.fsum(x * x for x in vector))


def cosine(a: list[float], b: list[float]) -> float:
    norms = norm(a) * norm(b)
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 0.0


def cancellation(rows: list[list[float]]) -> float:
    """By how much the relative error of a mean exceeds that of its terms."""
    return norm(mean([[abs(x) for x in row] for row in rows])) / norm(mean(rows))


def by_definition(queries: torch.Tensor, keys: torch.Tensor) -> tuple[list[float], list[float]]:
    """Scores in float64, and how far float32 may be off: sums of n terms err by n / 2 eps."""
    num_kv_heads, head_size = keys.shape[1], keys.shape[3]
    group = queries.shape[1] // num_kv_heads
    eps = torch.finfo(torch.float32).eps
    scores, tolerances = [], []
    for query_heads, key_heads in zip(queries.tolist(), keys.tolist(), strict=True):
        cosines, errors = [], []
        for head in range(num_kv_heads):
            of_group = query_heads[head * group : (head + 1) * group]
            of_block = key_heads[head]
            cosines.append(cosine(mean(of_group), mean(of_block)))
            of_means = len(of_group) * cancellation(of_group)
            of_means += len(of_block) * cancellation(of_block)
            errors.append(eps / 2 * (2 * of_means + 3 * head_size + 4))
        scores.append(math.fsum(cosines) / num_kv_heads)
        tolerances.append(math.fsum(errors) / num_kv_heads + num_kv_heads * eps / 2)
    return scores, tolerances


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_against_loops_in_float64(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> None:
    """Keys come in the cache's dtype; what is computed from them is as good as float32."""
    queries, keys = random_inputs(shape, seed)
    keys = keys.to(dtype)
    scores = mean_key_cosine(queries, keys)
    assert scores.shape == (shape[0],)
    assert scores.dtype == torch.float32
    expected, tolerances = by_definition(queries, keys)
    for score, value, tolerance in zip(scores.tolist(), expected, tolerances, strict=True):
        assert abs(score - value) <= tolerance < 1e-3


def test_queries_are_grouped_by_the_kv_head_they_read() -> None:
    """Heads 0 and 1 read KV head 0: only their mean counts there."""
    queries = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [-1.0, 0.0]]])
    keys = torch.tensor([[[[1.0, 1.0]], [[-3.0, 0.0]]]])
    assert mean_key_cosine(queries, keys).item() == pytest.approx(1.0)
    assert mean_key_cosine(queries, keys.flip(1)).item() == pytest.approx(-(0.5**0.5))


def test_it_is_the_mean_key_not_the_mean_cosine() -> None:
    """Keys that cancel out say nothing, however similar each of them is."""
    queries = torch.tensor([[[1.0, 0.0]]])
    keys = torch.tensor([[[[5.0, 1.0], [-5.0, 1.0]]]])
    assert mean_key_cosine(queries, keys).tolist() == [0.0]


def test_zero_vectors_score_zero() -> None:
    queries, keys = random_inputs((2, 4, 2, 8, 16), seed=0)
    assert mean_key_cosine(torch.zeros_like(queries), keys).tolist() == [0.0, 0.0]
    assert mean_key_cosine(queries, torch.zeros_like(keys)).tolist() == [0.0, 0.0]
    keys[:, 0] = 0  # one KV head alone
    half = mean_key_cosine(queries[:, 2:], keys[:, 1:]) / 2
    assert torch.equal(mean_key_cosine(queries, keys), half)


@pytest.mark.parametrize("exponent", [-8, -1, 1, 12])
def test_scale_does_not_matter(exponent: int) -> None:
    """Powers of two are exact: not a bit of the scores may change."""
    queries, keys = random_inputs((6, 4, 2, 16, 64), seed=1)
    expected = mean_key_cosine(queries, keys)
    scale = 2.0**exponent
    assert torch.equal(mean_key_cosine(queries * scale, keys), expected)
    assert torch.equal(mean_key_cosine(queries, keys * scale), expected)


def test_scores_are_cosines() -> None:
    queries, _ = random_inputs((6, 4, 4, 1, 64), seed=2)
    keys = queries.unsqueeze(2)
    assert mean_key_cosine(queries, keys).tolist() == pytest.approx([1.0] * 6)
    assert mean_key_cosine(queries, -keys).tolist() == pytest.approx([-1.0] * 6)


def test_all_blocks_of_a_layer_meet_its_query() -> None:
    queries, keys = random_inputs((6, 4, 2, 16, 64), seed=3)
    layers = keys.view(2, 3, *keys.shape[1:])
    scores = score_layers(queries[:2], layers)
    for layer in range(2):
        expected = mean_key_cosine(queries[layer].expand(3, -1, -1), layers[layer])
        torch.testing.assert_close(scores[layer], expected, rtol=0, atol=2**-20)
