"""Step 3: win-rates, training curves, the report; and the human judges' page and votes."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.protocol import Config, read_index, read_protocol, write_atomically
from evaluation.score import image_key, read_scores
from evaluation.statistics import bootstrap_interval, prompt_wins, sign_test
from ncp.common.errors import UserError


@dataclass
class Scores:
    """Scores by scorer: (models, prompts, samples) float64, NaN where there is none."""

    models: list[str]
    prompts: list[str]
    categories: list[str]
    by_scorer: dict[str, np.ndarray]


@dataclass
class Result:
    """`model` against `reference` by one judge, on all prompts (category "") or on one category."""

    judge: str
    reference: str
    model: str
    category: str
    prompts: int
    left_out: int
    wins: int
    ties: int
    losses: int
    win_rate: float
    low: float
    high: float
    p_value: float
    reference_mean: float
    model_mean: float
    reference_median: float
    model_median: float


@dataclass
class Point:
    """A checkpoint of a training run by one judge: mean score, and its gain over the first model with a 95% interval.

    The interval is that of the gain, over prompts: how prompts differ from one another is not in it.
    """

    judge: str
    run: str
    step: int
    seconds: float | None
    mean: float
    gain: float
    low: float
    high: float


def compare(config: Config) -> None:
    """Writes the human judges' page, or counts their votes, and compares the scores if there are any."""
    if config.annotate:
        from evaluation.annotate import write_page

        write_page(config)
        return
    from evaluation.report import write_report, write_votes

    ballots = None
    if config.votes:
        from evaluation.votes import count_votes

        ballots = count_votes(config)
        if not (Path(config.output_dir) / "scores.parquet").exists():  # human judges alone
            write_votes(ballots, Path(config.output_dir))
            print(f"{text_table(ballots.HEAD, ballots.rows())}\n\n{ballots.note()}")
            return
    index = read_index(config)
    scores = load_scores(config, index)
    results = compare_all(scores, config.model_names, config.bootstrap_samples)
    points = curves(scores, read_protocol(config)["models"], config.bootstrap_samples)
    write_report(config, index, scores, results, points, ballots)


# ---------------------------------------------------------------- scores


def load_scores(config: Config, index: list[dict[str, Any]]) -> Scores:
    """The score table as arrays, the configured models first. Raises UserError for images without scores."""
    rows, _ = read_scores(config)
    models = list(dict.fromkeys([*config.model_names, *(r["model"] for r in index)]))
    prompts = {r["prompt"]: r["category"] for r in sorted(index, key=lambda r: r["prompt_number"])}
    place = {p: i for i, p in enumerate(prompts)}
    samples = 1 + max(r["sample"] for r in index)
    by_scorer = {name: np.full((len(models), len(prompts), samples), np.nan) for name in config.scorers}
    scored = {(r["scorer"], image_key(r)): r["score"] for r in rows}
    for name, table in by_scorer.items():
        if missing := [r["file"] for r in index if (name, image_key(r)) not in scored]:
            raise UserError(
                f"scores.parquet: {len(missing)} of {len(index)} images have no score by '{name}', such as "
                f"{missing[0]}; run evaluate.py score"
            )
        for r in index:
            table[models.index(r["model"]), place[r["prompt"]], r["sample"]] = scored[name, image_key(r)]
    return Scores(models, list(prompts), list(prompts.values()), by_scorer)


def compare_all(scores: Scores, names: list[str], resamples: int) -> list[Result]:
    """Each pair of the named models by each scorer: first on all prompts, then by category if there are several."""
    categories = list(dict.fromkeys(scores.categories))
    groups = ["", *(categories if len(categories) > 1 else [])]
    results = []
    for (reference, model), (judge, table), group in itertools.product(
        itertools.combinations(names, 2), scores.by_scorer.items(), groups
    ):
        chosen = np.array([not group or c == group for c in scores.categories])
        a, b = (table[scores.models.index(m)][chosen] for m in (reference, model))
        results.append(compare_pair(judge, reference, model, group, a, b, resamples))
    return results


def compare_pair(
    judge: str, reference: str, model: str, category: str, a: np.ndarray, b: np.ndarray, resamples: int
) -> Result:
    """`model` with scores b against `reference` with scores a, each (prompts, samples)."""
    per_prompt = prompt_wins(a, b)
    wins = per_prompt[~np.isnan(per_prompt)]
    low, high = bootstrap_interval(wins, resamples)
    won, lost = int((wins > 0.5).sum()), int((wins < 0.5).sum())
    both = ~(np.isnan(a) | np.isnan(b))
    a, b = a[both], b[both]
    return Result(
        judge, reference, model, category,
        prompts=len(wins), left_out=len(per_prompt) - len(wins),
        wins=won, ties=len(wins) - won - lost, losses=lost,
        win_rate=float(wins.mean()) if len(wins) else math.nan, low=low, high=high, p_value=sign_test(won, lost),
        reference_mean=_of(np.mean, a), model_mean=_of(np.mean, b),
        reference_median=_of(np.median, a), model_median=_of(np.median, b),
    )  # fmt: skip


def _of(statistic: Callable, values: np.ndarray) -> float:
    return float(statistic(values)) if len(values) else math.nan


def curves(scores: Scores, noted: dict[str, dict], resamples: int) -> list[Point]:
    """Every checkpoint among the models, by each scorer, run and step."""
    points = []
    for judge, table in scores.by_scorer.items():
        for place, name in enumerate(scores.models):
            if (run := noted.get(name, {}).get("run")) is None:
                continue
            gains = np.array([_of(np.mean, d[~np.isnan(d)]) for d in table[place] - table[0]])  # per prompt
            gains = gains[~np.isnan(gains)]
            low, high = bootstrap_interval(gains, resamples)
            mean = _of(np.mean, table[place][~np.isnan(table[place])])
            step, seconds = noted[name]["step"], noted[name]["seconds"]
            points.append(Point(judge, run, step, seconds, mean, _of(np.mean, gains), low, high))
    return points


# ---------------------------------------------------------------- tables


def rate(result: Any) -> str:
    """`result` has win_rate, low and high."""
    if math.isnan(result.win_rate):
        return "no scores"
    return f"{result.win_rate:.1%} [{result.low:.1%}, {result.high:.1%}]"


def p_text(p: float) -> str:
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"


HEAD = ["judge", "comparison", "prompts", "win-rate [95% interval]", "sign test p", "mean", "median"]


def table_rows(results: list[Result]) -> list[list[str]]:
    """The comparisons on all prompts, under HEAD; means and medians are reference -> model."""
    return [
        [
            r.judge,
            f"{r.model} over {r.reference}",
            str(r.prompts) + (f" ({r.left_out} without scores)" if r.left_out else ""),
            rate(r),
            p_text(r.p_value),
            f"{number(r.reference_mean)} -> {number(r.model_mean)}",
            f"{number(r.reference_median)} -> {number(r.model_median)}",
        ]
        for r in results
        if not r.category
    ]


CATEGORY_HEAD = ["judge", "comparison", "category", "prompts", "win-rate [95% interval]"]


def category_rows(results: list[Result]) -> list[list[str]]:
    return [
        [r.judge, f"{r.model} over {r.reference}", r.category, str(r.prompts), rate(r)] for r in results if r.category
    ]


def text_table(head: Sequence[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in [head, *rows])


def markdown_table(head: Sequence[str], rows: list[list[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])


def write_csv(items: list[Any], kind: type, path: Path) -> None:
    """A list of dataclass instances, one line each."""
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, [f.name for f in fields(kind)])
    writer.writeheader()
    writer.writerows(asdict(item) for item in items)
    write_atomically(path, lambda file: file.write_text(buffer.getvalue(), encoding="utf-8", newline=""))
