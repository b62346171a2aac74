"""Intervals that cover what they should, and refuse what does not pair."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.statistics import by_distance, paired_difference, perplexity, wilson_interval


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


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_of_newcombe(successes: int, trials: int, low: float, high: float) -> None:
    """Newcombe (1998), table I, method 3."""
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_at_the_ends() -> None:
    for trials in (1, 3, 7, 1000):
        low, high = wilson_interval(0, trials)
        assert low == 0 < high < 1
        assert wilson_interval(trials, trials) == pytest.approx((1 - high, 1 - low))
        assert wilson_interval(trials, trials)[1] == 1


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 5), (6, 5)])
def test_no_share_no_interval(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match=f"{successes} successes of {trials} trials; allowed"):
        wilson_interval(successes, trials)
