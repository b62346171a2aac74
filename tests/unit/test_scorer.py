"""Scores of a step: captured queries against gathered keys, averaged over layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_semantic.engine import scorer
from vllm_semantic.engine.backend import CapturingImpl
from vllm_semantic.engine.cached_kv import CachedKV
from vllm_semantic.engine.host_blocks import HostBlocks
from vllm_semantic.engine.query_windows import QueryWindows
from vllm_semantic.engine.scorer import BlockScorer, ScoredLayers
from vllm_semantic.messages import BlockCopy, HostCopies, ScoreRequest
from vllm_semantic.ops.cached_blocks import CachedBlocks
from vllm_semantic.ops.queries import keeper
from vllm_semantic.policies import BlockView, SemanticPolicy
from vllm_semantic.policies.tova import TOVAPolicy

HEAD_SIZE, BLOCK_SIZE = 16, 4
WINDOW, MAX_REQS = 6, 5
STUDY = SemanticPolicy(similarity="study")


def random_layers(num_layers: int, kernel_blocks: int = 1) -> ScoredLayers:
    kv_cache = torch.randn(num_layers, 20, 2, BLOCK_SIZE, 2 * HEAD_SIZE)
    queries = torch.randn(num_layers, WINDOW * MAX_REQS + 1, 4, HEAD_SIZE)
    return ScoredLayers(CachedKV(kv_cache, HEAD_SIZE, kernel_blocks), queries, HEAD_SIZE**-0.5)


def windows() -> QueryWindows:
    """As if these requests had run before: rings in this order."""
    rings = QueryWindows(WINDOW, MAX_REQS)
    for request_id in ("a", "idle", "b", "c"):
        rings.window(request_id, 1, 1)
    return rings


def by_definition(layers: list[ScoredLayers], row: int, block_id: int) -> float:
    """Layer by layer, head by head, in float64."""
    cosines = []
    for stack in layers:
        keys = stack.cache.gather_keys(torch.tensor([block_id])).double()[:, 0]
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
    size = BLOCK_SIZE * kernel_blocks
    asked = {
        0: {
            "b": ScoreRequest(STUDY, 5 * size, [1, 4], [3, 8]),
            "a": ScoreRequest(STUDY, 4 * size, [2], [3]),
        },
        2: {
            "c": ScoreRequest(STUDY, 10 * size + 1, [7, 8, 9], [1, 9, 0, 2]),  # one is being filled
            "b": ScoreRequest(STUDY, 5 * size, [1], [5]),
        },
    }
    rings = windows()
    scores = BlockScorer(groups, rings)(asked).collect()
    assert {group: list(answers) for group, answers in scores.items()} == {
        group: list(requests) for group, requests in asked.items()
    }
    for group_id, requests in asked.items():
        for request_id, request in requests.items():
            row = {"a": 0, "b": 2, "c": 3}[request_id] * WINDOW + (request.num_tokens - 1) % WINDOW
            expected = [
                by_definition(groups[group_id], row, block)
                for block in request.block_ids[: len(request.block_indices)]
            ]
            # Sums of at most 64 terms in float32; none of these means cancels out.
            assert scores[group_id][request_id] == pytest.approx(expected, abs=64 * 2**-24)


def test_a_view_shows_the_window_in_order_and_what_is_being_filled() -> None:
    torch.manual_seed(1)
    stack = [random_layers(2), random_layers(1)]
    seen: list[BlockView] = []

    class Looking(SemanticPolicy):
        num_queries = WINDOW

        def score(self, view: BlockView) -> torch.Tensor:
            seen.append(view)
            return view.full.values.mean((2, 3, 4))

    asked = {0: {"b": ScoreRequest(Looking(), 18, [0, 3], [7, 4, 11])}}
    scores = BlockScorer({0: stack}, windows())(asked).collect()
    assert [view.num_full_blocks for view in seen] == [2, 2]
    means = []
    for view, layers in zip(seen, stack, strict=True):
        rows = [2 * WINDOW + token % WINDOW for token in range(18 - WINDOW, 18)]
        assert torch.equal(view.queries, layers.queries[:, rows])
        kv_cache = layers.cache.kv_cache[:, [7, 4, 11]]
        assert torch.equal(view.keys, kv_cache[..., :HEAD_SIZE])
        assert torch.equal(view.values, kv_cache[..., HEAD_SIZE:])
        assert view.positions.tolist() == [[4 * i + j for j in range(4)] for i in (0, 3, 4)]
        assert (view.num_tokens, view.scale) == (18, HEAD_SIZE**-0.5)
        means.append(kv_cache[:, :2, ..., HEAD_SIZE:].mean((2, 3, 4)))
    assert scores[0]["b"] == pytest.approx(torch.cat(means).mean(0).tolist(), abs=2**-20)


@pytest.mark.parametrize("kernel_blocks", [1, 2])
@pytest.mark.parametrize("filling", [False, True])
def test_what_is_in_host_memory_is_scored_as_what_is_not(kernel_blocks: int, filling: bool) -> None:
    torch.manual_seed(3)
    size = BLOCK_SIZE * kernel_blocks
    stack = [random_layers(2, kernel_blocks), random_layers(1, kernel_blocks)]
    caches = [layers.cache for layers in stack]
    host = HostBlocks({0: caches}, 4, torch.device("cpu"))
    policy = SemanticPolicy(similarity="contribution", heads="max")
    held, num_tokens = [1, 2, 3, 4, 5, 6], 6 * size + 2 * filling
    if filling:
        held.append(7)
    everything = ScoreRequest(policy, num_tokens, [*range(6)], held)
    expected = BlockScorer({0: stack}, windows())({0: {"b": everything}}).collect()
    host.copy(HostCopies([BlockCopy(0, 2, 3), BlockCopy(0, 5, 1)], []))
    for of in caches:  # blocks 1 and 4 of the sequence are gone from the device
        for block_id in (2, 5):
            of.kv_cache[:, block_id * kernel_blocks : (block_id + 1) * kernel_blocks] = math.nan
    stack = [replace(layers, host=of) for layers, of in zip(stack, host.caches(0), strict=True)]
    left = [i for n, i in enumerate(held) if n not in (1, 4)]
    asked = ScoreRequest(policy, num_tokens, [0, 2, 3, 5], left, {1: 3, 4: 1})
    other = ScoreRequest(policy, num_tokens, [0, 2, 3, 5], left)
    scorer_ = BlockScorer({0: stack}, windows(), host=host)
    found = scorer_({0: {"a": other, "b": asked, "c": other}}).collect()
    assert found[0]["b"] == pytest.approx(expected[0]["b"], rel=1e-5)
    assert [len(found[0][request_id]) for request_id in ("a", "b", "c")] == [4, 6, 4]


def test_many_blocks_are_gathered_a_few_layers_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    stack = [random_layers(5)]
    asked = {0: {"a": ScoreRequest(TOVAPolicy(), 20, [0, 1, 4], [2, 3, 4])}}
    expected = BlockScorer({0: stack}, windows())(asked).collect()
    seen: list[int] = []

    class Looking(TOVAPolicy):
        def score(self, view: BlockView) -> torch.Tensor:
            seen.append(len(view.keys))
            return super().score(view)

    monkeypatch.setattr(scorer, "MAX_GATHERED", 2 * 3 * BLOCK_SIZE * 2 * HEAD_SIZE)
    looking = {0: {"a": ScoreRequest(Looking(), 20, [0, 1, 4], [2, 3, 4])}}
    assert BlockScorer({0: stack}, windows())(looking).collect() == expected
    assert seen == [2, 2, 1]
    assert BlockScorer({0: stack}, windows())(asked).collect() == expected


def test_ranks_are_averaged_before_the_scores_travel() -> None:
    """As if a second rank held the same heads with the opposite direction."""
    group = {0: [random_layers(1)]}
    opposite = BlockScorer(group, windows(), lambda scores, highest: scores * 0)
    assert opposite({0: {"a": ScoreRequest(STUDY, 8, [1], [1])}}).collect() == {0: {"a": [0.0]}}


def test_the_highest_layer_decides_for_one_request_alone() -> None:
    group = {0: [random_layers(2), random_layers(1)]}
    layers: list[torch.Tensor] = []

    def over_ranks(scores: torch.Tensor, highest: Sequence[bool]) -> torch.Tensor:
        layers.append(scores)
        return scores

    asked = ScoreRequest(TOVAPolicy(), 13, [0, 2], [4, 6, 7])
    of_all = {"a": asked, "b": replace(asked, over_layers="max")}
    scores = BlockScorer(group, windows(), over_ranks)({0: of_all}).collect()[0]
    (of_layers,) = layers
    assert scores["a"] == of_layers[:, :2].mean(0).tolist()
    assert scores["b"] == of_layers[:, 2:].amax(0).tolist()
    assert scores["a"] != scores["b"]


class FusedPolicy(TOVAPolicy):
    """With a kernel, of torch, that runs anywhere."""

    def score_cached(self, cached: CachedBlocks) -> torch.Tensor | None:
        return torch.full((len(cached.layers.keys), len(cached.block_ids)), 7.0)


class Constant:
    def score(self, view: BlockView) -> torch.Tensor:
        return torch.full(view.full.keys.shape[:2], 2.5)


def test_a_policy_with_a_score_of_its_own_is_asked_for_it() -> None:
    """A kernel inherited from another policy computes another score."""

    class OwnScore(FusedPolicy):
        score = Constant.score

    class MixedIn(Constant, FusedPolicy):  # type: ignore[misc]
        pass

    class OwnKernel(OwnScore):
        score_cached = FusedPolicy.score_cached

    class OwnBoth(TOVAPolicy):
        score = Constant.score
        score_cached = FusedPolicy.score_cached

    scorer = BlockScorer({0: [random_layers(3)]}, windows())
    answers = {FusedPolicy: 7.0, OwnScore: 2.5, MixedIn: 2.5, OwnKernel: 7.0, OwnBoth: 7.0}
    for policy, answer in answers.items():
        asked = {0: {"a": ScoreRequest(policy(), 12, [1, 2], [1, 5])}}
        assert scorer(asked).collect() == {0: {"a": [answer] * 2}}, policy


class WideFused(FusedPolicy):
    num_queries = WINDOW


def test_a_request_of_few_tokens_is_not_scored_with_the_windows_of_another() -> None:
    scorer = BlockScorer({0: [random_layers(3)]}, windows())
    asked = {
        "a": ScoreRequest(WideFused(), BLOCK_SIZE, [0], [1]),
        "b": ScoreRequest(WideFused(), 2 * BLOCK_SIZE, [0, 1], [2, 3]),
    }
    assert scorer({0: {"b": asked["b"]}}).collect() == {0: {"b": [7.0] * 2}}
    alone = {
        name: scorer({0: {name: request}}).collect()[0][name] for name, request in asked.items()
    }
    together = scorer({0: asked}).collect()[0]
    assert together.keys() == alone.keys()
    assert 7.0 not in together["a"] + together["b"]
    assert not scorer.failed


class KernelPolicy(TOVAPolicy):
    """With a kernel that fails."""

    name = "kernel"

    def score_cached(self, cached: CachedBlocks) -> torch.Tensor | None:
        raise RuntimeError("no such instruction")


class FlatPolicy(TOVAPolicy):
    """With a kernel that forgets the layers."""

    name = "flat"

    def score_cached(self, cached: CachedBlocks) -> torch.Tensor | None:
        return torch.zeros(len(cached.block_ids))


@pytest.mark.parametrize("policy", [KernelPolicy(), FlatPolicy()], ids=lambda policy: policy.name)
def test_a_kernel_that_fails_still_takes_part_in_the_mean(policy: TOVAPolicy) -> None:
    """What other policies say in the same step stands, and every rank has as much to add up."""
    torch.manual_seed(4)
    group = {0: [random_layers(2), random_layers(1)]}
    good = {"b": ScoreRequest(TOVAPolicy(), 8, [0, 1], [2, 3])}
    expected = BlockScorer(group, windows())({0: good}).collect()[0]["b"]
    added: list[tuple[int, ...]] = []

    def over_ranks(scores: torch.Tensor, highest: Sequence[bool]) -> torch.Tensor:
        added.append(tuple(scores.shape))
        assert list(highest) == [False] * 6
        return scores

    scorer = BlockScorer(group, windows(), over_ranks)
    bad = {name: ScoreRequest(policy, 12, [0, 2], [4, 6, 7]) for name in ("a", "c")}
    scores = scorer({0: {"a": bad["a"], **good, "c": bad["c"]}}).collect()[0]
    assert scores["b"] == expected
    assert all(math.isnan(score) for name in bad for score in scores[name])
    assert added == [(3, 6)]
    assert scorer.failed == {"a", "c"}
    scorer.forget({"a", "gone"})
    assert scorer.failed == {"c"}


class Attention:
    """What a base implementation does does not matter here."""

    def forward(self, *args: Any, **kwargs: Any) -> str:
        return "attended"


class CapturingAttention(CapturingImpl, Attention):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_newest_queries_of_each_request_are_kept(dtype: torch.dtype) -> None:
    layers = random_layers(3)
    layers.queries.fill_(7.0)
    impl = CapturingAttention()
    buffer = layers.queries[1].to(dtype)
    impl.keep_queries = keeper(buffer)
    query = torch.randn(9, 4, HEAD_SIZE).to(dtype)
    # What lies behind the first four was kept in an earlier step.
    kept = torch.tensor([[4, 0], [0, 3], [4, 1], [5, 2], [8, 12], [1, 5]])
    nothing = torch.tensor([[0, 0], [0, 3]])
    for places in (None, nothing, kept):
        assert (buffer == 7.0).all(), "nothing is copied that was not asked for"
        metadata = SimpleNamespace(query_places=places)
        assert impl.forward(None, query, None, None, None, metadata, None) == "attended"
    assert torch.equal(buffer[[3, 1, 2, 12]], query[[0, 4, 5, 8]])
    buffer[[3, 1, 2, 12]] = 7.0
    assert (buffer == 7.0).all()
