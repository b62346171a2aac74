"""Scores of a step: captured queries against gathered keys, averaged over layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm_semantic.engine.key_cache import KeyCache

from vllm_semantic.engine.backend import CapturingImpl
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
        0: {"b": ScoreRequest(64, [1, 4], [3, 8]), "a": ScoreRequest(64, [2], [3])},
        2: {"c": ScoreRequest(64, [7, 8, 9], [1, 9, 0]), "b": ScoreRequest(64, [1], [5])},
    }
    rows = {"a": 0, "idle": 1, "b": 2, "c": 4}
    scores = BlockScorer(SemanticPolicy(), groups)(asked, rows).collect()
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
    asked = {0: {"a": ScoreRequest(64, [], []), "b": ScoreRequest(64, [1], [1])}}
    scorer = BlockScorer(SemanticPolicy(), {0: [random_layers(1)]})
    scores = scorer(asked, {"a": 0, "b": 1}).collect()
    assert scores[0]["a"] == []
    assert len(scores[0]["b"]) == 1


def test_ranks_are_averaged_before_the_scores_travel() -> None:
    """As if a second rank held the same heads with the opposite direction."""
    scorer = BlockScorer(SemanticPolicy(), {0: [random_layers(1)]}, lambda scores: scores * 0)
    asked = {0: {"a": ScoreRequest(64, [1], [1])}}
    assert scorer(asked, {"a": 0}).collect() == {0: {"a": [0.0]}}


def test_a_policy_with_a_score_of_its_own_is_asked_for_it() -> None:
    """A kernel inherited from another policy computes another score."""

    class Constant(SemanticPolicy):
        def score(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
            return torch.full((len(keys),), 2.5)

    scorer = BlockScorer(Constant(), {0: [random_layers(3)]})
    asked = {0: {"a": ScoreRequest(64, [1, 2], [1, 5])}}
    assert scorer(asked, {"a": 0}).collect() == {0: {"a": [2.5, 2.5]}}


class Attention:
    """What a base implementation does does not matter here."""

    def forward(self, *args: Any, **kwargs: Any) -> str:
        return "attended"


class CapturingAttention(CapturingImpl, Attention):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_newest_query_of_each_request_is_kept(dtype: torch.dtype) -> None:
    layers = random_layers(3)
    layers.queries.fill_(7.0)
    impl = CapturingAttention()
    buffer = impl.newest_queries = layers.queries[1].to(dtype)
    query = torch.randn(9, 4, HEAD_SIZE).to(dtype)
    query_start_loc = torch.tensor([0, 1, 6, 9], dtype=torch.int32)
    for rows in (None, query_start_loc[1:] - 1):
        assert (buffer == 7.0).all(), "nothing is copied that was not asked for"
        metadata = SimpleNamespace(last_query_rows=rows)
        assert impl.forward(None, query, None, None, None, metadata, None) == "attended"
    assert torch.equal(buffer[:3], query[[0, 5, 8]])
    assert (buffer[3:] == 7.0).all()
