"""How sure a difference is, when documents were drawn and the tokens of one hang together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Difference:
    """A paired difference of losses in nats per token; below zero, the first is better."""

    mean: float
    ci_low: float
    ci_high: float


def perplexity(documents: Sequence[Sequence[float]]) -> float:
    """Of all tokens of all documents, from their losses in nats."""
    return math.exp(float(np.concatenate([np.asarray(d) for d in documents]).mean()))


def paired_difference(
    first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], seed: int = 0
) -> Difference:
    """Mean difference per token and its 95 % percentile-bootstrap interval over documents.

    Documents are resampled whole (Efron and Tibshirani, 1993, chapter 13): tokens of one text
    are no independent samples.

    Args:
        first: losses in nats, one sequence a document.
        second: losses of the same tokens.
        seed: of the resampling.

    Raises:
        ValueError: the two do not pair, or there is no document.
    """
    if not first or [len(d) for d in first] != [len(d) for d in second]:
        raise ValueError("losses do not pair: other documents, or other tokens")
    sums = np.array([np.sum(a) - np.sum(b) for a, b in zip(first, second, strict=True)])
    lengths = np.array([len(document) for document in first])
    drawn = np.random.default_rng(seed).integers(0, len(sums), (RESAMPLES, len(sums)))
    means = sums[drawn].sum(1) / lengths[drawn].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Difference(float(sums.sum() / lengths.sum()), float(low), float(high))


def turned(difference: Mapping[str, float]) -> dict[str, float]:
    """The same difference with its sides swapped."""
    return {
        "mean": -difference["mean"],
        "ci_low": -difference["ci_high"],
        "ci_high": -difference["ci_low"],
    }


def difference(
    differences: Mapping[str, Mapping[str, Mapping[str, float]]], first: str, second: str, text: str
) -> Mapping[str, float]:
    """What ``first`` loses less what ``second`` loses, whichever way round a report has the pair.

    Args:
        differences: of a report, by ``"row - other row"`` and text.
        first: a row.
        second: another.
        text: one of the report's.
    """
    if (pair := f"{first} - {second}") in differences:
        return differences[pair][text]
    return turned(differences[f"{second} - {first}"][text])


def excess_ratio(ppl: float, full: float, age: float) -> float:
    """Excess of a perplexity over the full cache's, by that of dropping by age: 1 is age."""
    return (ppl / full - 1) / (age / full - 1)


def by_distance(
    documents: Sequence[Sequence[float]], start: int, width: int
) -> list[tuple[int, float]]:
    """Mean loss in buckets of ``width`` tokens from the documents' start.

    Args:
        documents: losses in nats of the tokens from position ``start`` on.
        start: position of the first loss.
        width: tokens a bucket.

    Returns:
        First position and mean loss of each bucket that has a token.
    """
    buckets: dict[int, list[float]] = {}
    for document in documents:
        for position, loss in enumerate(document, start):
            buckets.setdefault(position // width * width, []).append(loss)
    return [(first, float(np.mean(losses))) for first, losses in sorted(buckets.items())]


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % score interval of a success rate (Wilson, 1927), which also holds near 0 and 1.

    Raises:
        ValueError: there is no trial, or not from none to ``trials`` successes.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials; allowed: 0 to trials, of 1+")
    z = NormalDist().inv_cdf(0.975)
    rate = successes / trials
    centre = rate + z * z / (2 * trials)
    half = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    # Exact where rounding would leave a bound beside 0 or 1.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == trials else (centre + half) / scale
    return low, high
