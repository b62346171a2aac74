"""What each policy's score is worth, in numbers worked out by hand.

Where attention is asked for, heads have one channel and keys are logarithms: a query of 1 gives
each key the share of its number, a query of 0 all keys that it sees the same.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import pytest
import torch

from vllm_semantic.engine.request_blocks import RequestBlocks
from vllm_semantic.policies import POLICIES, BlockView, SemanticPolicy


def view(
    keys: list[Any], queries: list[Any], values: list[Any] | None = None, num_tokens: int = 0
) -> BlockView:
    """Of one layer, at scale 1, blocks one behind the other.

    Args:
        keys: ``[num_blocks][num_kv_heads][block_size][head_size]``.
        queries: ``[num_queries][num_heads][head_size]``.
        values: as ``keys``.
        num_tokens: left out: every block is full.
    """
    of_layer = torch.tensor([keys])
    return BlockView(
        torch.tensor([queries]),
        of_layer,
        lambda: torch.tensor([values]),
        torch.arange(len(keys)),
        num_tokens or of_layer.shape[1] * of_layer.shape[3],
        1.0,
    )


def score(policy: str, of: BlockView, **options: Any) -> list[float]:
    scores = POLICIES[policy](**options).score(of)
    assert scores.dtype == torch.float32
    (of_layer,) = scores.tolist()
    return list(of_layer)


def shares(*numbers: list[float], queries: list[list[float]], num_tokens: int = 0) -> BlockView:
    """Blocks of one KV head whose keys have these shares of attention."""
    keys = [[[[number] for number in block]] for block in torch.tensor(numbers).log().tolist()]
    return view(keys, [[[head] for head in query] for query in queries], num_tokens=num_tokens)


SIX_TOKENS = shares([1, 2], [3, 4], [5, 5], queries=[[9.0, 9.0], [1.0, 0.0], [1.0, 0.0]])
"""Queries of tokens 3, 4 and 5. With a query of 1 the last has 20ths and the one before, which
does not see the last key, 15ths; with one of 0 they have 6ths and 5ths."""

LAST = [(3 / 20 + 2 / 6) / 2, (7 / 20 + 2 / 6) / 2, (10 / 20 + 2 / 6) / 2]
BEFORE = [(3 / 15 + 2 / 5) / 2, (7 / 15 + 2 / 5) / 2, (5 / 15 + 1 / 5) / 2]


def test_tova_is_what_the_newest_query_attends_to() -> None:
    assert score("tova", SIX_TOKENS) == pytest.approx(LAST)


def test_attention_is_the_mean_over_its_queries() -> None:
    two = shares([1, 2], [3, 4], [5, 5], queries=[[1.0, 0.0], [1.0, 0.0]])
    expected = [(last + before) / 2 for last, before in zip(LAST, BEFORE, strict=True)]
    found = score("semantic", two, similarity="attention", heads="mean")
    assert found == pytest.approx(expected)


def test_attention_by_the_highest_head() -> None:
    """The head of the query of 1, where that of 0 sees all keys the same."""
    two = shares([1, 2], [3, 4], [5, 5], queries=[[1.0, 0.0], [1.0, 0.0]])
    first = [(3 / 20 + 3 / 15) / 2, (7 / 20 + 7 / 15) / 2, (10 / 20 + 5 / 15) / 2]
    second = [(2 / 6 + 2 / 5) / 2, (2 / 6 + 2 / 5) / 2, (2 / 6 + 1 / 5) / 2]
    expected = [max(pair) for pair in zip(first, second, strict=True)]
    assert score("semantic", two, similarity="attention") == pytest.approx(expected)


def test_contribution_is_attention_times_the_norm_of_the_value() -> None:
    """Two queries of two heads over two KV heads: shares of 10ths and of 4ths; a last key of
    the block being filled takes its share and gets no score."""
    keys = torch.tensor([[[1, 2], [1, 1]], [[3, 4], [1, 1]], [[10, 99], [4, 99]]]).log()
    values = [
        [[[3.0, 4.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 0.0]]],
        [[[0.0, 0.0], [6.0, 8.0]], [[1.0, 0.0], [0.0, -3.0]]],
        [[[7.0, 7.0], [7.0, 7.0]]] * 2,
    ]
    of = view(
        [[[[float(k), 0.0] for k in head] for head in block] for block in keys],
        [[[1.0, 0.0], [1.0, 0.0]]],
        values,
        num_tokens=5,
    )
    first = [(1 * 5 + 2 * 1) / 20, (3 * 0 + 4 * 10) / 20]
    second = [(1 * 2 + 1 * 0) / 8, (1 * 1 + 1 * 3) / 8]
    mean = [sum(pair) / 2 for pair in zip(first, second, strict=True)]
    highest = [max(pair) for pair in zip(first, second, strict=True)]
    assert score("semantic", of, heads="mean") == pytest.approx(mean)
    assert score("semantic", of) == pytest.approx(highest)


def test_contribution_is_of_the_kv_head_that_a_head_reads() -> None:
    """Heads 0 and 1 read the first values, 2 and 3 the second; every key is looked at alike."""
    of = view(
        [[[[0.0]], [[0.0]]]] * 2,
        [[[1.0]] * 4, [[1.0]] * 4],
        [[[[8.0]], [[0.0]]], [[[0.0]], [[2.0]]]],
    )
    # The first of two queries does not see the second key.
    assert of.contributions().tolist() == [[[[8, 0], [4, 0]]] * 2 + [[[0, 0], [0, 1]]] * 2]


def test_h2o_is_the_sum_over_the_tokens_of_a_block() -> None:
    expected = [last + before for last, before in zip(LAST, BEFORE, strict=True)]
    assert score("h2o", SIX_TOKENS) == pytest.approx(expected)


def test_what_is_being_filled_takes_attention_and_gets_no_score() -> None:
    """The second slot of the last block is empty, whatever lies there."""
    five = shares([1, 2], [3, 4], [5, 99], queries=[[1.0]], num_tokens=5)
    for policy, options in {"tova": {}, "semantic": {"similarity": "attention"}, "h2o": {}}.items():
        assert score(policy, five, **options) == pytest.approx([3 / 15, 7 / 15]), policy


def test_snapkv_is_the_mean_of_seven_neighbours() -> None:
    """At the ends there are fewer, and the mean is over those: of tokens 0 to 3 it is 2.5."""
    twelve = shares(*([n, n + 1] for n in range(1, 13, 2)), queries=[[1.0]])
    by_token = [[2.5, 3.0], [3.5, 4.0], [5.0, 6.0], [7.0, 8.0], [9.0, 9.5], [10.0, 10.5]]
    expected = [(first + second) / 2 / 78 for first, second in by_token]
    assert score("snapkv", twelve) == pytest.approx(expected)


def test_snapkv_is_the_mean_over_queries_and_heads() -> None:
    """Of six tokens, in 20ths, 15ths, 6ths and 5ths as above."""
    two = shares([1, 2], [3, 4], [5, 5], queries=[[1.0, 0.0], [1.0, 0.0]])
    rows = [
        [n / 20 for n in (1, 2, 3, 4, 5, 5)],
        [n / 15 for n in (1, 2, 3, 4, 5, 0)],
        [1 / 6] * 6,
        [1 / 5] * 5 + [0],
    ]
    votes = [sum(column) / 4 for column in zip(*rows, strict=True)]
    pooled = [votes[max(0, i - 3) : i + 4] for i in range(6)]
    means = [sum(neighbours) / len(neighbours) for neighbours in pooled]
    expected = [(means[i] + means[i + 1]) / 2 for i in (0, 2, 4)]
    assert score("snapkv", two) == pytest.approx(expected)


SQUARE = [
    # Two blocks of two KV heads, two tokens, two channels.
    [[[3.0, 4.0], [0.0, 1.0]], [[6.0, 8.0], [0.0, 2.0]]],
    [[[-1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, -5.0]]],
]


def test_knorm_keeps_the_small_keys() -> None:
    assert score("knorm", view(SQUARE, [[[0.0, 0.0]] * 2])) == pytest.approx(
        [-(5 + 1 + 10 + 2) / 4, -(1 + 1 + 1 + 5) / 4]
    )


def test_paged_eviction_is_values_over_keys() -> None:
    values = [
        [[[10.0, 0.0], [3.0, 0.0]], [[0.0, 5.0], [8.0, 0.0]]],
        [[[2.0, 0.0], [0.0, 0.0]], [[3.0, 4.0], [5.0, 0.0]]],
    ]
    assert score("paged_eviction", view(SQUARE, [[[0.0, 0.0]] * 2], values)) == pytest.approx(
        [(10 / 5 + 3 / 1 + 5 / 10 + 8 / 2) / 4, (2 / 1 + 0 / 1 + 5 / 1 + 5 / 5) / 4]
    )


def test_keydiff_keeps_what_is_unlike_the_others() -> None:
    """Of each head: three keys to the right and one upwards, so the mean is at (3, 1)."""
    head = [[[1.0, 0.0], [2.0, 0.0]], [[9.0, 0.0], [0.0, 5.0]]]
    keys = [[block, block] for block in head]
    right, up = 3 / sqrt(10), 1 / sqrt(10)
    expected = [-(right + right) / 2, -(right + up) / 2]
    assert score("keydiff", view(keys, [[[0.0, 0.0]] * 2])) == pytest.approx(expected)


def test_quest_is_what_a_block_can_be_asked_for() -> None:
    """Queries (1, -1) and (0, 2) read head 0, (2, 0) twice head 1; channel by channel."""
    queries = [[[7.0, 7.0]] * 4, [[1.0, -1.0], [0.0, 2.0], [2.0, 0.0], [2.0, 0.0]]]
    first = [3 + -1, 0 + 8, 12 + 0, 12 + 0]  # keys (0..3, 1..4) and (0..6, 2..8)
    second = [1 + 0, 0 + 0, 0 + 0, 0 + 0]  # keys (-1..1, 0) and (0, -5..1)
    assert score("quest", view(SQUARE, queries)) == pytest.approx([sum(first) / 4, sum(second) / 4])


def test_ucm_is_the_dot_product_with_the_mean_key() -> None:
    """The mean query of head 0 is (0.5, 0.5), that of head 1 (2, 0)."""
    queries = [[[7.0, 7.0]] * 4, [[1.0, -1.0], [0.0, 2.0], [2.0, 0.0], [2.0, 0.0]]]
    first = 0.5 * 1.5 + 0.5 * 2.5 + 2 * 3
    assert score("ucm", view(SQUARE, queries)) == pytest.approx([first / 2, 0.0])


def test_study_is_the_cosine_with_the_mean_key() -> None:
    queries = [[[7.0, 7.0]] * 4, [[1.0, -1.0], [0.0, 2.0], [2.0, 0.0], [2.0, 0.0]]]
    first = (1.5 + 2.5) / sqrt(2) / sqrt(1.5**2 + 2.5**2) + 3 / sqrt(3**2 + 5**2)
    scores = score("semantic", view(SQUARE, queries), similarity="study")
    assert scores == pytest.approx([first / 2, 0.0])


WINDOWS_AND_DECAYS = {
    "h2o": (32, 1.0),
    "tova": (1, 0.0),
    "snapkv": (32, 0.0),
    "paged_eviction": (1, 0.0),
    "knorm": (1, 0.0),
    "keydiff": (1, 0.0),
    "quest": (1, 0.0),
    "ucm": (1, 0.0),
    "semantic": (8, 0.9),
}


def test_windows_and_decays_are_the_documented_ones() -> None:
    scoring = {name: cls() for name, cls in POLICIES.items() if cls().scores_blocks}
    found = {name: (policy.num_queries, policy.decay) for name, policy in scoring.items()}
    assert found == WINDOWS_AND_DECAYS
    attention = SemanticPolicy(similarity="attention")
    assert (attention.num_queries, attention.decay) == (8, 0.8)
    study = SemanticPolicy(similarity="study")
    assert (study.num_queries, study.decay) == (1, 0.0)


@pytest.mark.parametrize(
    ("policy", "worth"),
    [
        ("semantic", [4.0, 1 + 0.9 * 4, 2 + 0.9 * (1 + 0.9 * 4)]),
        ("h2o", [4.0, 1 + 4, 2 + 1 + 4]),
        ("tova", [4.0, 1.0, 2.0]),
    ],
)
def test_scores_of_earlier_points_decay(policy: str, worth: list[float]) -> None:
    state, judged = RequestBlocks(), []
    for point, received in enumerate([4.0, 1.0, 2.0]):
        state.scores[point] = {7: received}
        judged += state.judge(POLICIES[policy](), [7], point, {})
    assert judged == pytest.approx(worth)
