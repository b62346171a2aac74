"""The kernel that keeps queries, interpreted, copies what the reference copies."""

from __future__ import annotations

import pytest
import torch

from vllm_semantic.ops.kernels import queries as kernels


@pytest.mark.parametrize("num_kept", [0, 1, 5, 40])
@pytest.mark.parametrize(("num_heads", "head_size"), [(1, 16), (9, 64), (3, 80), (32, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_placed_is_copied(
    num_kept: int,
    num_heads: int,
    head_size: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "MAX_PROGRAMS", 16)  # fewer than are kept at most
    generator = torch.Generator().manual_seed(num_kept)
    num_tokens, num_rows = 48, 64
    # As a layer cuts them out of what it projects: beside keys and values.
    projected = torch.randn(num_tokens, num_heads + 2, head_size, generator=generator).to(dtype)
    queries = projected[:, :num_heads]
    rings = torch.full((num_rows, num_heads, head_size), 7.0, dtype=dtype)
    sources = torch.randperm(num_tokens, generator=generator)
    rows = torch.randperm(num_rows, generator=generator)
    places = torch.zeros(1 + num_rows, 2, dtype=torch.int64)
    places[0, 0] = num_kept
    # Behind those of the step lie those of an earlier one.
    places[1 : 1 + num_tokens] = torch.stack([sources, rows[:num_tokens]], 1)
    expected = rings.clone()
    expected[rows[:num_kept]] = queries[sources[:num_kept]]
    kernels.keep_queries(rings, queries, places)
    assert torch.equal(rings, expected)
