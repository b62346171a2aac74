"""Intervals that cover what they should, and refuse what does not pair."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.statistics import by_distance, paired_difference, perplexity


def test_perplexity_weighs_tokens_not_documents() -> None:
    assert perplexity([[0.0, 0.0, 0.0], [math.log(16)]]) == pytest.approx(2.0)


def test_equal_losses_differ_by_nothing() -> None:
    losses = [[1.0, 2.0], [3.0]]
    difference = paired_difference(losses, losses)
    assert (difference.mean, difference.ci_low, difference.ci_high) == (0.0, 0.0, 0.0)


def test_a_constant_difference_is_certain() -> None:
    first, second = [[1.0, 2.0], [3.0]], [[1.5, 2.5], [3.5]]
    difference = paired_difference(first, second)
    assert difference.mean == pytest.approx(-0.5)
    assert difference.ci_low == pytest.approx(difference.ci_high)


def test_documents_are_the_unit() -> None:
    """A thousand tokens of two documents that disagree are two samples, not a thousand."""
    first, second = [[1.0] * 500, [0.0] * 500], [[0.0] * 500, [1.0] * 500]
    difference = paired_difference(first, second)
    assert difference.mean == 0
    assert difference.ci_low == -1
    assert difference.ci_high == 1


def test_the_interval_covers_the_truth() -> None:
    """About 95 times of 100, with enough documents; fewer than 85 would be a bug."""
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(100):
        truth = 0.1
        effects = generator.normal(truth, 0.5, 40)
        second = [generator.normal(3, 1, 20) for _ in effects]
        first = [losses + effect for losses, effect in zip(second, effects, strict=True)]
        interval = paired_difference([list(d) for d in first], [list(d) for d in second], seed)
        covered += interval.ci_low <= truth <= interval.ci_high
    assert 85 <= covered <= 100


@pytest.mark.parametrize(
    ("first", "second"), [([], []), ([[1.0]], [[1.0], [2.0]]), ([[1.0]], [[1.0, 2.0]])]
)
def test_what_does_not_pair_is_refused(first: list[list[float]], second: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="do not pair"):
        paired_difference(first, second)


def test_by_distance() -> None:
    documents = [[1.0, 2.0, 3.0], [3.0]]
    assert by_distance(documents, start=9, width=10) == [(0, 2.0), (10, 2.5)]
