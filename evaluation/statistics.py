"""Win-rates, their uncertainty, and agreement between judges: pure functions of arrays."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy import stats

SAME = 1e-90  # values that differ by less are the same: BCa needs the cubes of differences


def prompt_wins(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How often `other` beats `reference`, per prompt: (N,) in [0, 1] of scores (N, samples), ties counting half.

    A sample is compared with the same sample of the other model, which started from the same noise. Scores that are
    missing (NaN) in either leave their sample out; a prompt without any is NaN.
    """
    missing = np.isnan(reference) | np.isnan(other)
    wins = np.where(other > reference, 1.0, np.where(other == reference, 0.5, 0.0))
    wins[missing] = 0.0
    counted = (~missing).sum(1)
    return np.divide(wins.sum(1), counted, out=np.full(len(wins), np.nan), where=counted > 0)


def bootstrap_interval(
    values: np.ndarray, resamples: int, statistic: Callable = np.mean, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """The BCa interval of `statistic` over resampled prompts, of one value (N,) per prompt.

    Bias-corrected and accelerated (Efron 1987): on skewed values and near the ends of the scale it covers better than
    the percentile interval, elsewhere as well. Values that are all the same have an interval without length.

    statistic: from (resamples, N) along axis 1, as `np.mean(..., axis=1)`.
    """
    if not len(values):
        return math.nan, math.nan
    if np.ptp(values) < SAME:
        return float(values[0]), float(values[0])
    found = stats.bootstrap(
        (np.asarray(values, dtype=float),),
        statistic,
        n_resamples=resamples,
        confidence_level=level,
        method="BCa",
        batch=max(1, min(resamples, 3_000_000 // len(values))),  # bounded memory: 24 MB of numbers at once
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def win_rate_interval(wins: np.ndarray, resamples: int, level: float = 0.95) -> tuple[float, float]:
    """The interval of the mean of wins (N,) in [0, 1], one per prompt: by bootstrap, if they differ.

    If every prompt was won, or every one lost, it is the exact binomial one (Clopper and Pearson 1934): a bootstrap
    would give an interval without length, however few prompts there are.
    """
    if len(wins) and np.ptp(wins) == 0 and wins[0] in (0, 1):
        exact = stats.binomtest(int(wins.sum()), len(wins)).proportion_ci(level, method="exact")
        return float(exact.low), float(exact.high)
    return bootstrap_interval(wins, resamples, level=level)


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided p-value of `wins` against `losses` if both were equally likely; ties are left out before."""
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def majority(votes: list[str]) -> str:
    """What more than half of the votes say; else "tie". Of three: two that agree, or a tie when all differ."""
    for answer in set(votes):
        if 2 * votes.count(answer) > len(votes):
            return answer
    return "tie"


def fleiss_kappa(counts: np.ndarray) -> float:
    """Agreement beyond chance of votes (items, answers): how many judges gave each answer. NaN if undefined.

    Fleiss 1971. Items may have different numbers of judges; those with fewer than two say nothing and are left out.
    """
    counts = np.asarray(counts, dtype=float)
    judges = counts.sum(1)
    counts, judges = counts[judges >= 2], judges[judges >= 2]
    if not len(counts):
        return math.nan
    observed = ((counts * (counts - 1)).sum(1) / (judges * (judges - 1))).mean()
    expected = ((counts.sum(0) / counts.sum()) ** 2).sum()
    return float((observed - expected) / (1 - expected)) if expected < 1 else math.nan
