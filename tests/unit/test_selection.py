"""Which blocks go, and when, against definitions by enumeration."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_semantic.policies import BlockBudget, StreamingPolicy
from vllm_semantic.policies.selection import (
    EarlierTurn,
    blocks_to_evict,
    blocks_to_swap,
    eviction_point_from,
    is_eviction_point,
    question_after,
    with_continuations,
)

repeatable = settings(deadline=None, derandomize=True)

budgets = st.builds(BlockBudget, st.integers(0, 4), st.integers(1, 4), st.integers(0, 4))
kept_blocks = st.sets(st.integers(0, 60), max_size=24).map(sorted)
# Few distinct values, so that ties are common.
any_score = st.sampled_from([0.0, -0.0, 0.5, -1.0, math.inf, -math.inf, math.nan])


# -- which -----------------------------------------------------------------------------


@repeatable
@given(kept_blocks, budgets, st.data())
def test_the_lowest_scores_go_and_of_equals_the_older(
    kept: list[int], budget: BlockBudget, data: st.DataObject
) -> None:
    candidates = list(budget.candidates(kept))
    scores = data.draw(st.lists(any_score, min_size=len(candidates), max_size=len(candidates)))
    evicted = blocks_to_evict(kept, budget, scores)
    assert len(evicted) == max(0, len(kept) - budget.total)
    assert evicted == sorted(set(evicted))
    assert set(evicted) <= set(candidates)
    rank = {
        block: (-math.inf if math.isnan(score) else score, block)
        for block, score in zip(candidates, scores, strict=True)
    }
    for gone in evicted:
        assert all(rank[gone] < rank[block] for block in candidates if block not in evicted)


@repeatable
@given(kept_blocks, budgets)
def test_of_equals_the_oldest_go(kept: list[int], budget: BlockBudget) -> None:
    candidates = list(budget.candidates(kept))
    evicted = blocks_to_evict(kept, budget, [1.0] * len(candidates))
    assert evicted == candidates[: max(0, len(kept) - budget.total)]
    assert evicted == blocks_to_evict(kept, budget, StreamingPolicy().rank(candidates, 0, {}))


def test_an_example() -> None:
    kept = [0, 2, 3, 5, 7, 8, 9]
    budget = BlockBudget(sink=1, recent=2, selected=2)
    assert blocks_to_evict(kept, budget, [0.3, 0.1, 0.2, 0.9]) == [3, 5]
    assert blocks_to_evict(kept, budget, [0.1, 0.1, 0.1, 0.1]) == [2, 3]
    assert blocks_to_evict(kept, budget, [0.5, math.nan, 0.2, -1.0]) == [3, 7]


@pytest.mark.parametrize("num_scores", [0, 3, 5])
def test_a_score_for_every_candidate_and_no_more(num_scores: int) -> None:
    with pytest.raises(ValueError, match=f"{num_scores} scores for 4 candidate blocks"):
        blocks_to_evict(range(7), BlockBudget(1, 2, 2), [0.0] * num_scores)


def test_within_the_budget_scores_are_not_even_looked_at() -> None:
    assert blocks_to_evict(range(5), BlockBudget(1, 2, 2), []) == []


# -- when ------------------------------------------------------------------------------

requests = {
    "num_prompt_tokens": st.integers(1, 120),
    "block_size": st.integers(1, 12),
    "prefill_interval": st.integers(1, 40),
}
HORIZON = 400


def points_of(num_prompt_tokens: int, block_size: int, prefill_interval: int) -> set[int]:
    """By definition: every interval of the prompt, its end, then every full block."""
    return (
        set(range(0, num_prompt_tokens, prefill_interval))
        | {num_prompt_tokens}
        | {n for n in range(num_prompt_tokens, HORIZON) if n % block_size == 0}
    )


@repeatable
@given(**requests)
def test_eviction_points(num_prompt_tokens: int, block_size: int, prefill_interval: int) -> None:
    request = (num_prompt_tokens, block_size, prefill_interval)
    points = points_of(*request)
    assert {n for n in range(HORIZON) if is_eviction_point(n, *request)} == points
    for n in range(HORIZON - block_size):
        assert eviction_point_from(n, *request) == min(p for p in points if p >= n)


def test_the_last_tokens_of_each_turn_ask() -> None:
    turns = [EarlierTurn(10, 17), EarlierTurn(18, 26)]
    found = [question_after(n, 50, turns, 8) for n in range(52)]
    # The last eight of a prompt; a turn of one token has no other to ask with.
    assert found == [(2, 10)] * 10 + [(17, 18)] * 8 + [(42, 50)] * 32 + [None] * 2
    assert question_after(0, 1, [], 8) == (0, 1)


def test_the_worst_makes_way_for_the_best_that_is_away() -> None:
    held, away = {1: 3.0, 2: 1.0, 3: 2.0}, {7: 5.0, 8: 2.5, 9: 0.5}
    assert blocks_to_swap(held, away, 9, 0.0) == [(2, 7), (3, 8)]
    assert blocks_to_swap(held, away, 1, 0.0) == [(2, 7)]
    assert blocks_to_swap(held, away, 9, 0.3) == [(2, 7)], "2.5 is not 2.0 and three tenths of it"
    assert blocks_to_swap(held, {}, 9, 0.0) == []
    # Equal is not better; nothing is less than nothing.
    assert blocks_to_swap({1: 2.0}, {5: 2.0}, 1, 0.0) == []
    assert blocks_to_swap({1: -1.0}, {5: -0.95}, 1, 0.1) == []
    assert blocks_to_swap({1: math.nan}, {5: math.nan}, 1, 0.0) == []
    assert blocks_to_swap({1: math.nan}, {5: -3.0}, 1, 0.1) == [(1, 5)]
    assert blocks_to_swap({1: -math.inf}, {5: -3.0}, 1, 0.1) == [(1, 5)]


def test_what_a_block_begins_to_say_goes_on_in_the_next() -> None:
    assert with_continuations([3, 4, 5, 9], [1.0, 0.2, 0.85, 0.1], 0.1) == [1.0, 0.9, 0.85, 0.1]
    assert with_continuations([4, 3], [0.2, 1.0], 0.1) == [0.9, 1.0], "in any order"
    assert with_continuations([1, 2], [-1.0, -3.0], 0.1) == [-1.0, -1.1], "below it all the same"
    unknown = with_continuations([1, 2, 3], [math.nan, 0.5, -math.inf], 0.1)
    assert math.isnan(unknown[0]), "unknown it stays"
    assert unknown[1:] == [0.5, 0.45], "and says nothing of the next"
