"""Statistics for comparing training methods over several seeds and prompts. Pure functions of arrays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

RESAMPLES = 10_000


def hierarchical_interval(
    values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray] | None = None, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """The percentile interval of a mean over training seeds and prompts. values: (seeds, prompts).

    Seeds are drawn with replacement, and so are prompts, the same for all seeds. So the interval covers the variation
    between sets of runs and between sets of prompts (two-way bootstrap; Owen 2007 calls it conservative).
    statistic: resampled values (resamples, seeds, prompts) -> (resamples,); default: the mean.
    """
    rng = np.random.default_rng(seed)
    count, prompts = values.shape
    drawn = []
    for start in range(0, RESAMPLES, 500):  # bounds the memory
        part = min(500, RESAMPLES - start)
        rows = rng.integers(count, size=(part, count, 1))
        columns = rng.integers(prompts, size=(part, 1, prompts))
        sample = values[rows, columns]
        drawn.append(sample.mean(axis=(1, 2)) if statistic is None else statistic(sample))
    low, high = np.quantile(np.concatenate(drawn), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def win_indicator(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """1 where `other` has the higher score, 0.5 where both are equal, else 0; same shape as the arrays."""
    return np.where(other > reference, 1.0, np.where(other == reference, 0.5, 0.0))


def at_time(seconds: np.ndarray, values: np.ndarray, time: float) -> np.ndarray:
    """Values (points, ...) of a run at a training time, interpolated between its checkpoints. The base is at 0 s.

    A time after the last checkpoint gives the last value.
    """
    after = int(np.searchsorted(seconds, time))
    if after == 0:
        return values[0]
    if after == len(seconds):
        return values[-1]
    share = (time - seconds[after - 1]) / (seconds[after] - seconds[after - 1])
    return (1 - share) * values[after - 1] + share * values[after]


def verdict(low: float, high: float, even: float) -> str:
    """The conclusion from an interval for the claim that the value is above `even`."""
    if low > even:
        return "holds"
    return "does not hold" if high < even else "cannot be told"
