"""Tables and plots of a plan's results, from study/results/PLAN.csv alone.

    python -m study.report dpo

For each arm: score, gain and win-rate over the base, winner drift, seconds. For each pair of arms: the win-rate of one
over the other (same prompt, same noise, same position in the list of seeds) at the last step, and the difference of
their gains at equal training time. Intervals cover seeds and prompts (study/statistics.py). Plots are written beside
the table.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

from ncp.common.errors import UserError, run_program
from study.statistics import at_time, hierarchical_interval, verdict, win_indicator

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parent / "results"


@dataclass
class ArmResults:
    """Scores (seeds, points, prompts) of an arm by one judge, at steps (points,) and seconds (seeds, points).

    drift: held-out winner drift at the last step, (seeds,).
    """

    scores: np.ndarray
    steps: np.ndarray
    seconds: np.ndarray
    drift: np.ndarray


def read_results(path: Path, judge: str) -> tuple[np.ndarray, dict[str, ArmResults]]:
    """(scores of the base (prompts,), results by arm). Raises UserError if the file does not exist."""
    try:
        rows = [r for r in csv.DictReader(path.read_text(encoding="utf-8").splitlines()) if r["judge"] == judge]
    except OSError:
        raise UserError(f"{path} is missing; run python -m study.run with the plan first") from None
    columns = [name for name in rows[0] if name.isdecimal()]
    values = {(r["arm"], r["seed"], int(r["step"])): np.array([float(r[c]) for c in columns]) for r in rows}
    base = values.pop(("base", "", 0))
    found = {}
    for arm in dict.fromkeys(name for name, _, _ in values):
        of_arm = [r for r in rows if r["arm"] == arm]
        seeds = list(dict.fromkeys(r["seed"] for r in of_arm))
        by_seed = [sorted((r for r in of_arm if r["seed"] == seed), key=lambda r: int(r["step"])) for seed in seeds]
        found[arm] = ArmResults(
            np.array([[values[arm, r["seed"], int(r["step"])] for r in run] for run in by_seed]),
            np.array([int(r["step"]) for r in by_seed[0]]),
            np.array([[float(r["seconds"]) for r in run] for run in by_seed]),
            np.array([float(run[-1]["heldout_winner_drift"] or "nan") for run in by_seed]),
        )
    return base, found


def with_interval(values: np.ndarray, form: str) -> str:
    low, high = hierarchical_interval(values)
    return f"{values.mean():{form}} [{low:{form}}, {high:{form}}]"


def arms_table(base: np.ndarray, arms: dict[str, ArmResults]) -> list[list[str]]:
    """One row per arm, at its last step."""
    rows = [["arm", "seeds", "steps", "seconds", "score", "gain", "win-rate over the base", "winner drift"]]
    for name, arm in arms.items():
        last = arm.scores[:, -1]
        drift = f"{np.median(arm.drift):+.1%} ({arm.drift.min():+.1%} to {arm.drift.max():+.1%})"
        rows.append(
            [
                name,
                str(len(last)),
                str(arm.steps[-1]),
                f"{arm.seconds[:, -1].mean():.0f}",
                f"{last.mean():.3f}",
                with_interval(last - base, "+.3f"),
                with_interval(win_indicator(base, last), ".0%"),
                "–" if np.isnan(arm.drift).all() else drift,
            ]
        )
    return rows


def gain_at(base: np.ndarray, arm: ArmResults, seconds: float) -> np.ndarray:
    """Gains over the base (seeds, prompts) at a training time."""
    gains = []
    for scores, times in zip(arm.scores, arm.seconds, strict=True):
        curve = np.concatenate([np.zeros((1, len(base))), scores - base])
        gains.append(at_time(np.concatenate([[0.0], times]), curve, seconds))
    return np.array(gains)


def pairs_table(base: np.ndarray, arms: dict[str, ArmResults], pairs: Iterable[tuple[str, str]]) -> list[list[str]]:
    """One row per pair of arms: (the arm that is claimed to be better, the other)."""
    rows = [
        ["better?", "than", "win-rate at the last step", "equal steps", "gain at equal time, difference", "equal time"]
    ]
    for name, other in pairs:
        a, b = arms[name], arms[other]
        count = min(len(a.scores), len(b.scores))
        wins = win_indicator(b.scores[:count, -1], a.scores[:count, -1])
        time = min(a.seconds[:, -1].mean(), b.seconds[:, -1].mean())
        difference = gain_at(base, a, time)[:count] - gain_at(base, b, time)[:count]
        steps = verdict(*hierarchical_interval(wins), 0.5) if a.steps[-1] == b.steps[-1] else "other steps"
        rows.append(
            [
                name,
                other,
                with_interval(wins, ".0%"),
                steps,
                f"{with_interval(difference, '+.3f')} at {time:.0f} s",
                verdict(*hierarchical_interval(difference), 0.0),
            ]
        )
    return rows


def as_markdown(rows: list[list[str]]) -> str:
    head, *body = rows
    return "\n".join(["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)])


def plot_curves(base: np.ndarray, arms: dict[str, ArmResults], title: str, path: Path) -> None:
    """Mean gain over the base against steps and against seconds, with the 95% interval as a band."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    for name, arm in arms.items():
        gains = arm.scores - base
        bands = np.array([[0.0, 0.0], *(hierarchical_interval(gains[:, k]) for k in range(len(arm.steps)))])
        means = np.array([0.0, *gains.mean(axis=(0, 2))])
        for axis, x in zip(axes, (arm.steps, arm.seconds.mean(axis=0)), strict=True):
            (line,) = axis.plot([0, *x], means, marker="o", markersize=3, label=name)
            axis.fill_between([0, *x], bands[:, 0], bands[:, 1], alpha=0.15, color=line.get_color())
    for axis, label in zip(axes, ("optimizer steps", "seconds of training"), strict=True):
        axis.set_xlabel(label)
        axis.axhline(0, color="grey", linewidth=0.5)
    axes[0].set_ylabel(f"gain in {title}")
    axes[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", help="name of the plan, whose results are study/results/PLAN.csv")
    parser.add_argument("--pairs", nargs="*", help="A:B for each claim that arm A is better than arm B; default: all")
    args = parser.parse_args()
    path = RESULTS / f"{args.plan}.csv"
    parts = []
    for judge in ("overall", "appeal", "alignment"):
        base, arms = read_results(path, judge)
        named = [tuple(pair.split(":")) for pair in args.pairs or []] or list(itertools.combinations(arms, 2))
        parts.append(
            f"## {judge}: base {base.mean():.3f}, {len(base)} prompts\n\n{as_markdown(arms_table(base, arms))}"
        )
        parts.append(as_markdown(pairs_table(base, arms, named)))
        plot_curves(base, arms, judge, path.with_name(f"{args.plan}-{judge}.png"))
    print("\n\n".join(parts))


if __name__ == "__main__":
    run_program(main)
