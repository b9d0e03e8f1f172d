"""Win-rates, their uncertainty, and agreement between judges: pure functions of arrays."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy import stats

SAME = 1e-90  # values that differ by less are the same: BCa needs the cubes of differences


def prompt_wins(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The share of samples in which `other` beats `reference`, per prompt: (N,) in [0, 1]. Ties count one half.

    reference, other: scores (N, samples). A sample is compared with the same sample of the other model, which started
    from the same noise. A sample with a missing score (NaN) is left out; a prompt without samples is NaN.
    """
    missing = np.isnan(reference) | np.isnan(other)
    wins = np.where(other > reference, 1.0, np.where(other == reference, 0.5, 0.0))
    wins[missing] = 0.0
    counted = (~missing).sum(1)
    return np.divide(wins.sum(1), counted, out=np.full(len(wins), np.nan), where=counted > 0)


def bootstrap_interval(
    values: np.ndarray, resamples: int, statistic: Callable = np.mean, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """The BCa bootstrap interval of `statistic`, over resampled prompts. values: (N,), one per prompt.

    BCa (bias-corrected and accelerated, Efron 1987) has better coverage than the percentile interval for skewed values
    and near the ends of the scale, and elsewhere the same. If all values are equal, the interval has length 0.

    statistic: computed from (resamples, N) along axis 1, for example `np.mean(..., axis=1)`.
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
        batch=max(1, min(resamples, 3_000_000 // len(values))),  # bounds the memory: 24 MB at a time
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def win_rate_interval(wins: np.ndarray, resamples: int, level: float = 0.95) -> tuple[float, float]:
    """The interval of the mean of wins (N,) in [0, 1], one per prompt: by bootstrap, if the values differ.

    If every prompt was won, or every one lost, it is the exact binomial interval (Clopper and Pearson 1934): there a
    bootstrap interval would have length 0 even for few prompts.
    """
    if len(wins) and np.ptp(wins) == 0 and wins[0] in (0, 1):
        exact = stats.binomtest(int(wins.sum()), len(wins)).proportion_ci(level, method="exact")
        return float(exact.low), float(exact.high)
    return bootstrap_interval(wins, resamples, level=level)


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided p-value of `wins` and `losses`, if both were equally likely. The caller leaves out ties."""
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def majority(votes: list[str]) -> str:
    """The answer of more than half of the votes, else "tie". With three votes: two that agree, or a tie."""
    for answer in set(votes):
        if 2 * votes.count(answer) > len(votes):
            return answer
    return "tie"


def fleiss_kappa(counts: np.ndarray) -> float:
    """Agreement beyond chance (Fleiss 1971). counts: (items, answers), the number of judges per answer.

    NaN if undefined. Items may have different numbers of judges; those with fewer than two are left out.
    """
    counts = np.asarray(counts, dtype=float)
    judges = counts.sum(1)
    counts, judges = counts[judges >= 2], judges[judges >= 2]
    if not len(counts):
        return math.nan
    observed = ((counts * (counts - 1)).sum(1) / (judges * (judges - 1))).mean()
    expected = ((counts.sum(0) / counts.sum()) ** 2).sum()
    return float((observed - expected) / (1 - expected)) if expected < 1 else math.nan
