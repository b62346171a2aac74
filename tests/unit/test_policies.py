"""Policies: defaults, rounding to whole blocks, which blocks may go."""

from __future__ import annotations

import itertools
import math
from dataclasses import FrozenInstanceError, dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_semantic.policies import (
    POLICIES,
    BlockBudget,
    BlockView,
    FullPolicy,
    KVPolicy,
    SemanticPolicy,
    StreamingPolicy,
)
from vllm_semantic.policies.oracle import FUTURE_ATTENTION, OraclePolicy
from vllm_semantic.policies.random import RandomPolicy

DOCUMENTED = {
    "full": {},
    "streaming": {"sink_tokens": 4, "recent_tokens": 256},
    "semantic": {
        "sink_tokens": 8,
        "recent_tokens": 128,
        "semantic_tokens": 128,
        "similarity": "contribution",
        "heads": "max",
        "recall": True,
    },
    "h2o": {"sink_tokens": 8, "recent_tokens": 128, "selected_tokens": 128, "recall": True},
    "random": {
        "sink_tokens": 8,
        "recent_tokens": 64,
        "selected_tokens": 192,
        "recall": True,
        "seed": 0,
    },
} | {
    name: {"sink_tokens": 8, "recent_tokens": 64, "selected_tokens": 192, "recall": True}
    for name in (
        *("tova", "snapkv", "paged_eviction", "knorm", "keydiff", "quest", "ucm"),
        "oracle",
    )
}

repeatable = settings(deadline=None, derandomize=True)


def test_defaults_are_the_documented_ones() -> None:
    assert {name: policy.options() for name, policy in POLICIES.items()} == DOCUMENTED


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_what_its_options_say(name: str) -> None:
    choices = POLICIES[name].choices
    options: dict[str, Any] = {
        option: choices[option][-1] if option in choices else 7 + i
        for i, option in enumerate(DOCUMENTED[name])
    }
    policy = POLICIES[name](**options)
    assert {option: getattr(policy, option) for option in options} == options
    parts = [tokens for option, tokens in options.items() if option.endswith("_tokens")]
    assert policy.budget_tokens == sum(parts)
    assert policy.name == name


def test_what_each_policy_does() -> None:
    unbounded = {name for name, policy in POLICIES.items() if not policy.bounded}
    assert unbounded == {"full"}
    on_the_host = {name for name, policy in POLICIES.items() if not policy().scores_blocks}
    assert on_the_host == {"full", "streaming", "random", "oracle"}
    assert not SemanticPolicy(semantic_tokens=0).scores_blocks


@pytest.mark.parametrize(
    ("block_size", "semantic", "streaming"),
    [
        (1, BlockBudget(8, 128, 128), BlockBudget(4, 256, 0)),
        (16, BlockBudget(1, 8, 8), BlockBudget(1, 16, 0)),
        (32, BlockBudget(1, 4, 4), BlockBudget(1, 8, 0)),
        (48, BlockBudget(1, 3, 3), BlockBudget(1, 6, 0)),
        (64, BlockBudget(1, 2, 2), BlockBudget(1, 4, 0)),
        (128, BlockBudget(1, 1, 1), BlockBudget(1, 2, 0)),
    ],
)
def test_default_budgets_in_blocks(
    block_size: int, semantic: BlockBudget, streaming: BlockBudget
) -> None:
    assert SemanticPolicy().budget(block_size) == semantic
    assert StreamingPolicy().budget(block_size) == streaming
    assert semantic.total == semantic.sink + semantic.recent + semantic.selected


@repeatable
@given(
    st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 5000), st.sampled_from([1, 16, 33])
)
def test_a_part_rounds_up_to_the_fewest_blocks_that_hold_it(
    sink: int, recent: int, selected: int, block_size: int
) -> None:
    policy = SemanticPolicy(sink_tokens=sink, recent_tokens=recent, semantic_tokens=selected)
    budget = policy.budget(block_size)
    parts = [(budget.sink, sink), (budget.recent, recent), (budget.selected, selected)]
    for blocks, tokens in parts:
        assert blocks * block_size >= tokens
        assert blocks == 0 or (blocks - 1) * block_size < tokens


@repeatable
@given(
    st.sets(st.integers(0, 99)).map(sorted),
    st.integers(0, 6),
    st.integers(0, 6),
    st.integers(0, 6),
)
def test_candidates_are_neither_sink_nor_recent(
    kept: list[int], sink: int, recent: int, selected: int
) -> None:
    candidates = BlockBudget(sink, recent, selected).candidates(kept)
    protected = kept[:sink] + (kept[-recent:] if recent else [])
    assert list(candidates) == [block for block in kept if block not in protected]


def test_policies_without_a_score_refuse_to_score() -> None:
    keys = torch.ones(1, 1, 1, 3, 4)
    view = BlockView(torch.ones(1, 1, 2, 4), keys, keys.clone, torch.tensor([0]), 3, 0.5)
    for policy in (FullPolicy(), StreamingPolicy()):
        with pytest.raises(TypeError, match=f"policy '{policy.name}' keeps blocks by age"):
            policy.score(view)
    worth = {"attention": 1.0, "contribution": 2.0, "study": 1.0}  # the norm of a value is 2
    assert worth.keys() == set(SemanticPolicy.choices["similarity"])
    for similarity, expected in worth.items():
        scores = SemanticPolicy(similarity=similarity).score(view)
        assert scores.tolist() == [pytest.approx([expected])]


def test_attention_is_causal_and_adds_up_to_one() -> None:
    """Three queries of the last tokens over two full blocks and one being filled."""
    torch.manual_seed(0)
    size, num_tokens = 4, 22
    view = BlockView(
        queries=torch.randn(2, 3, 4, 8),
        keys=torch.randn(2, 3, 2, size, 8),
        read_values=pytest.fail,
        block_indices=torch.tensor([0, 3, 5]),
        num_tokens=num_tokens,
        scale=0.5,
    )
    weights = view.attention()
    assert weights.shape == (2, 4, 3, 3, size)
    torch.testing.assert_close(weights.sum((3, 4)), torch.ones(2, 4, 3))
    positions = [[4 * i + j for j in range(size)] for i in (0, 3, 5)]
    for layer, head, i, block, j in itertools.product(*map(range, weights.shape)):
        query, seen = num_tokens - 3 + i, []
        for b, row in enumerate(positions):
            for k, position in enumerate(row):
                dot = view.queries[layer, i, head] @ view.keys[layer, b, head // 2, k] * 0.5
                seen.append(math.exp(dot) if position <= query else 0.0)
        expected = seen[block * size + j] / sum(seen)
        assert float(weights[layer, head, i, block, j]) == pytest.approx(expected, abs=2**-20)
    torch.testing.assert_close(view.attention(1), weights[:, :, -1:])
    assert (view.num_full_blocks, view.full.keys.shape[1]) == (2, 2)


def test_random_is_the_same_for_the_same_seed() -> None:
    def ranked(seed: int, num_tokens: int) -> list[float]:
        return list(RandomPolicy(seed=seed).rank(range(9), num_tokens, {}))

    assert ranked(0, 64) == ranked(0, 64)
    assert len({tuple(ranked(s, n)) for s in range(4) for n in (64, 96)}) == 8
    first = [min(range(9), key=ranked(s, 64).__getitem__) for s in range(900)]
    counts = [first.count(block) for block in range(9)]
    assert max(abs(count - 100) for count in counts) < 40  # four standard deviations


def test_the_oracle_keeps_what_its_request_says() -> None:
    extra_args = {FUTURE_ATTENTION: {"64": [0.0, 3.0, 1.0, 2.0]}}
    assert OraclePolicy().rank([1, 3], 64, extra_args) == [3.0, 2.0]
    assert OraclePolicy().rank([1, 3], 96, extra_args) == [1, 3], "by age"


def test_a_policy_cannot_change_under_a_running_engine() -> None:
    with pytest.raises(FrozenInstanceError):
        SemanticPolicy().recent_tokens = 1  # type: ignore[misc]


def test_a_policy_of_ones_own_names_its_options() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Nearest(KVPolicy):
        name = "nearest"
        recent_tokens: int = 32
        nearest_tokens: int = 64
        far_tokens: int = 33

    assert Nearest.options() == {
        "sink_tokens": 0,
        "recent_tokens": 32,
        "nearest_tokens": 64,
        "far_tokens": 33,
    }
    policy = Nearest(sink_tokens=1)
    assert policy.budget(32) == BlockBudget(1, 1, 2 + 2)
    assert (policy.budget_tokens, policy.selected_tokens) == (130, 97)
