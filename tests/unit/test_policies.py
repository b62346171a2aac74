"""Policies: defaults, rounding to whole blocks, which blocks may go."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_semantic.policies import (
    POLICIES,
    BlockBudget,
    FullPolicy,
    KVPolicy,
    SemanticPolicy,
    StreamingPolicy,
)

DOCUMENTED = {
    "full": {},
    "streaming": {"sink_tokens": 4, "recent_tokens": 256},
    "semantic": {"sink_tokens": 8, "recent_tokens": 64, "semantic_tokens": 192},
}

repeatable = settings(deadline=None, derandomize=True)


def test_defaults_are_the_documented_ones() -> None:
    assert {name: policy.options() for name, policy in POLICIES.items()} == DOCUMENTED


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_what_its_options_say(name: str) -> None:
    options = {option: 7 + i for i, option in enumerate(DOCUMENTED[name])}
    policy = POLICIES[name](**options)
    assert {option: getattr(policy, option) for option in options} == options
    assert policy.budget_tokens == sum(options.values())
    assert policy.name == name


def test_what_each_policy_does() -> None:
    properties = {name: (p().bounded, p().scores_blocks) for name, p in POLICIES.items()}
    assert properties == {
        "full": (False, False),
        "streaming": (True, False),
        "semantic": (True, True),
    }
    assert not SemanticPolicy(semantic_tokens=0).scores_blocks


@pytest.mark.parametrize(
    ("block_size", "semantic", "streaming"),
    [
        (1, BlockBudget(8, 64, 192), BlockBudget(4, 256, 0)),
        (16, BlockBudget(1, 4, 12), BlockBudget(1, 16, 0)),
        (32, BlockBudget(1, 2, 6), BlockBudget(1, 8, 0)),
        (48, BlockBudget(1, 2, 4), BlockBudget(1, 6, 0)),
        (64, BlockBudget(1, 1, 3), BlockBudget(1, 4, 0)),
        (128, BlockBudget(1, 1, 2), BlockBudget(1, 2, 0)),
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
    queries, keys = torch.ones(1, 2, 4), torch.ones(1, 1, 3, 4)
    for policy in (FullPolicy(), StreamingPolicy()):
        with pytest.raises(TypeError, match=f"policy '{policy.name}' keeps blocks by age"):
            policy.score(queries, keys)
    assert SemanticPolicy().score(queries, keys).tolist() == pytest.approx([1.0])


def test_a_policy_cannot_change_under_a_running_engine() -> None:
    with pytest.raises(FrozenInstanceError):
        SemanticPolicy().recent_tokens = 1  # type: ignore[misc]


def test_a_policy_of_ones_own_names_its_options() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Nearest(KVPolicy):
        name = "nearest"
        recent_tokens: int = 32
        nearest_tokens: int = 64

        @property
        def selected_tokens(self) -> int:
            return self.nearest_tokens

    assert Nearest.options() == {"sink_tokens": 0, "recent_tokens": 32, "nearest_tokens": 64}
    assert Nearest(sink_tokens=1).budget(32) == BlockBudget(1, 1, 2)
