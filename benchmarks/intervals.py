"""Simulates how often the evaluation's 95% intervals cover the true value, compared with the percentile bootstrap.

python benchmarks/intervals.py --experiments 2000
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from evaluation.statistics import bootstrap_interval, win_rate_interval

RESAMPLES = 1000
Draw = Callable[[np.random.Generator, int], np.ndarray]


def won(chance: float) -> Draw:
    return lambda rng, n: (rng.random(n) < chance).astype(float)


def with_ties(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.choice([1, 0.5, 0], n, p=[0.6, 0.2, 0.2])


def gains(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.lognormal(0, 1, n)


# Name, prompts, values of one comparison, their true mean, our interval.
CASES: list[tuple[str, int, Draw, float, Callable]] = [
    *((f"win-rate {p:.0%}", n, won(p), p, win_rate_interval)
      for n, p in ((10, 0.9), (20, 0.9), (50, 0.97), (150, 0.97), (20, 0.7), (150, 0.7))),
    ("win-rate 70%, 20% ties", 20, with_ties, 0.7, win_rate_interval),
    ("log-normal gains", 20, gains, float(np.exp(0.5)), bootstrap_interval),
    ("log-normal gains", 50, gains, float(np.exp(0.5)), bootstrap_interval),
]  # fmt: skip


def percentile_interval(values: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    means = values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return low, high


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=2000, help="simulated comparisons of each kind")
    experiments = parser.parse_args(argv).experiments
    print(f"{'':26}{'prompts':>8}{'percentile':>12}{'ours':>8}   of {experiments} comparisons covered, in %")
    for name, prompts, draw, truth, interval in CASES:
        rng = np.random.default_rng(1)
        covered = [0, 0]
        for _ in range(experiments):
            values = draw(rng, prompts)
            for place, (low, high) in enumerate((percentile_interval(values, rng), interval(values, RESAMPLES))):
                covered[place] += low - 1e-12 <= truth <= high + 1e-12
        shares = [100 * count / experiments for count in covered]
        print(f"{name:26}{prompts:8}{shares[0]:12.1f}{shares[1]:8.1f}")


if __name__ == "__main__":
    main()
