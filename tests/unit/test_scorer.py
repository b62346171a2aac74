"""Scores of a step: captured queries against gathered keys, averaged over layers."""

from __future__ import annotations

import pytest
import torch

from vllm_semantic.engine.capture import QueryCapture
from vllm_semantic.engine.key_cache import KeyCache
from vllm_semantic.engine.scorer import BlockScorer, ScoredLayers
from vllm_semantic.messages import ScoreRequest
from vllm_semantic.policies import SemanticPolicy

HEAD_SIZE, BLOCK_SIZE = 16, 4


def random_layers(num_layers: int, kernel_blocks: int = 1) -> ScoredLayers:
    kv_cache = torch.randn(num_layers, 20, 2, BLOCK_SIZE, 2 * HEAD_SIZE)
    queries = torch.randn(num_layers, 5, 4, HEAD_SIZE)
    return ScoredLayers(KeyCache(kv_cache, HEAD_SIZE, kernel_blocks), queries)


def by_definition(layers: list[ScoredLayers], row: int, block_id: int) -> float:
    """Layer by layer, head by head, in float64."""
    cosines = []
    for stack in layers:
        keys = stack.key_cache.gather(torch.tensor([block_id])).double()[:, 0]
        for layer_keys, queries in zip(keys, stack.queries[:, row].double(), strict=True):
            for head, head_keys in enumerate(layer_keys):
                group = queries[2 * head : 2 * head + 2].mean(0)
                cosines.append(torch.cosine_similarity(group, head_keys.mean(0), dim=0))
    return float(torch.stack(cosines).mean())


@pytest.mark.parametrize("kernel_blocks", [1, 2])
def test_each_block_meets_its_own_requests_query(kernel_blocks: int) -> None:
    torch.manual_seed(0)
    groups = {
        0: [random_layers(3, kernel_blocks)],
        2: [random_layers(1, kernel_blocks), random_layers(2, kernel_blocks)],
    }
    asked = {
        0: {"b": ScoreRequest([1, 4], [3, 8]), "a": ScoreRequest([2], [3])},
        2: {"c": ScoreRequest([7, 8, 9], [1, 9, 0]), "b": ScoreRequest([1], [5])},
    }
    rows = {"a": 0, "idle": 1, "b": 2, "c": 4}
    scores = BlockScorer(SemanticPolicy(), groups)(asked, rows)
    assert {group: list(answers) for group, answers in scores.items()} == {
        group: list(requests) for group, requests in asked.items()
    }
    for group_id, requests in asked.items():
        for request_id, request in requests.items():
            expected = [
                by_definition(groups[group_id], rows[request_id], block)
                for block in request.block_ids
            ]
            # Sums of at most 64 terms in float32; none of these means cancels out.
            assert scores[group_id][request_id] == pytest.approx(expected, abs=64 * 2**-24)


def test_a_request_without_candidates_gets_no_score() -> None:
    asked = {0: {"a": ScoreRequest([], []), "b": ScoreRequest([1], [1])}}
    scores = BlockScorer(SemanticPolicy(), {0: [random_layers(1)]})(asked, {"a": 0, "b": 1})
    assert scores[0]["a"] == []
    assert len(scores[0]["b"]) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_capture_keeps_the_newest_query_of_each_request(dtype: torch.dtype) -> None:
    buffer = torch.full((4, 2, HEAD_SIZE), 7.0, dtype=dtype)
    capture = QueryCapture(buffer)
    query = torch.randn(9, 2, HEAD_SIZE).to(dtype)
    query_start_loc = torch.tensor([0, 1, 6, 9], dtype=torch.int32)
    capture.record(query, query_start_loc[1:] - 1)
    assert (buffer == 7.0).all(), "nothing is copied that was not asked for"
    capture.active = True
    capture.record(query, query_start_loc[1:] - 1)
    assert torch.equal(buffer[:3], query[[0, 5, 8]])
    assert (buffer[3] == 7.0).all()


def test_captures_fill_what_the_scorer_reads() -> None:
    layers = random_layers(3)
    captures = layers.captures
    assert len(captures) == 3
    for value, capture in enumerate(captures):
        capture.active = True
        capture.record(torch.full((1, 4, HEAD_SIZE), float(value)), torch.tensor([0]))
    assert layers.queries[:, 0].mean((1, 2)).tolist() == [0.0, 1.0, 2.0]
