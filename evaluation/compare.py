"""Step 3: computes win-rates and training curves from the scores. Writes no files."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluation.protocol import EvaluationConfig
from evaluation.statistics import bootstrap_interval, prompt_wins, sign_test, win_rate_interval
from evaluation.tables import image_key, read_index, read_protocol, read_scores
from ncp.common.errors import UserError


@dataclass
class Scores:
    """Scores by scorer: (models, prompts, samples) float64, NaN where missing. categories: those of each prompt."""

    models: list[str]
    prompts: list[str]
    categories: list[list[str]]
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
class CurvePoint:
    """A checkpoint of a training run by one judge: mean score, and gain over the first model with a 95% interval.

    The interval is that of the gain per prompt, so it does not contain the variation of scores between prompts.
    """

    judge: str
    run: str
    step: int
    seconds: float | None
    mean: float
    gain: float
    low: float
    high: float


@dataclass
class Comparison:
    """images: the rows of the index. results: one per pair of models and judge. points: the runs' checkpoints."""

    images: list[dict[str, Any]]
    scores: Scores
    results: list[Result]
    points: list[CurvePoint]


def compare(config: EvaluationConfig) -> Comparison:
    """Compares, by their scores, the configured models with each other and the runs' checkpoints with the first model.

    Raises UserError if images or scores are missing, or belong to another protocol.
    """
    images = read_index(config)
    scores = load_scores(config, images)
    results = compare_all(scores, config.model_names, config.bootstrap_samples)
    points = curves(scores, read_protocol(config)["models"], config.bootstrap_samples)
    return Comparison(images, scores, results, points)


def load_scores(config: EvaluationConfig, index: list[dict[str, Any]]) -> Scores:
    """The score table as arrays, the configured models first. Raises UserError for images without scores."""
    rows = read_scores(config)
    models = list(dict.fromkeys([*config.model_names, *(r["model"] for r in index)]))
    # Older versions stored one category only.
    prompts = {
        r["prompt"]: r.get("categories") or [r["category"]] for r in sorted(index, key=lambda r: r["prompt_number"])
    }
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
    """Results for each pair of the named models and each scorer: on all prompts, then by category if there are several.

    A prompt of several categories counts in each of them, and once in the result on all prompts.
    """
    categories = list(dict.fromkeys(name for of_prompt in scores.categories for name in of_prompt))
    groups = ["", *(categories if len(categories) > 1 else [])]
    results = []
    for (reference, model), (judge, table), group in itertools.product(
        itertools.combinations(names, 2), scores.by_scorer.items(), groups
    ):
        chosen = np.array([not group or group in of_prompt for of_prompt in scores.categories])
        a, b = (table[scores.models.index(m)][chosen] for m in (reference, model))
        results.append(compare_pair(judge, reference, model, group, a, b, resamples))
    return results


def compare_pair(
    judge: str, reference: str, model: str, category: str, a: np.ndarray, b: np.ndarray, resamples: int
) -> Result:
    """`model` with scores b against `reference` with scores a, each (prompts, samples)."""
    per_prompt = prompt_wins(a, b)
    wins = per_prompt[~np.isnan(per_prompt)]
    low, high = win_rate_interval(wins, resamples)
    won, lost = int((wins > 0.5).sum()), int((wins < 0.5).sum())
    both = ~(np.isnan(a) | np.isnan(b))
    a, b = a[both], b[both]
    return Result(
        judge, reference, model, category,
        prompts=len(wins), left_out=len(per_prompt) - len(wins),
        wins=won, ties=len(wins) - won - lost, losses=lost,
        win_rate=float(wins.mean()) if len(wins) else math.nan, low=low, high=high, p_value=sign_test(won, lost),
        reference_mean=_or_nan(np.mean, a), model_mean=_or_nan(np.mean, b),
        reference_median=_or_nan(np.median, a), model_median=_or_nan(np.median, b),
    )  # fmt: skip


def _or_nan(statistic: Callable, values: np.ndarray) -> float:
    return float(statistic(values)) if len(values) else math.nan


def curves(scores: Scores, noted: dict[str, dict], resamples: int) -> list[CurvePoint]:
    """Points for every checkpoint among the models: by scorer, run and step."""
    points = []
    for judge, table in scores.by_scorer.items():
        for place, name in enumerate(scores.models):
            if (run := noted.get(name, {}).get("run")) is None:
                continue
            gains = np.array([_or_nan(np.mean, d[~np.isnan(d)]) for d in table[place] - table[0]])  # per prompt
            gains = gains[~np.isnan(gains)]
            low, high = bootstrap_interval(gains, resamples)
            mean = _or_nan(np.mean, table[place][~np.isnan(table[place])])
            step, seconds = noted[name]["step"], noted[name]["seconds"]
            points.append(CurvePoint(judge, run, step, seconds, mean, _or_nan(np.mean, gains), low, high))
    return points
