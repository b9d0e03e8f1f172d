"""Writes the files of a comparison and of a vote count: tables as text, Markdown and CSV, plots, and report.html."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import plots
from evaluation.compare import Comparison, CurvePoint, Result, Scores
from evaluation.pages import report_page, thumbnail
from evaluation.protocol import EvaluationConfig
from evaluation.sections import (
    Section,
    category_section,
    curve_section,
    markdown_table,
    text_table,
    vote_section,
    win_rate_section,
)
from evaluation.tables import scores_path, write_csv
from evaluation.votes import Tally, VoteCount
from ncp.common.files import write_file, write_text


def write_report(config: EvaluationConfig, compared: Comparison, count: VoteCount | None) -> None:
    """Writes all files of the comparison into the output folder, with the vote count if there is one.

    Prints the tables.
    """
    folder, scores = Path(config.output_dir), compared.scores
    figures: dict[str, bytes] = {}
    if overall := [r for r in compared.results if not r.category]:
        figures["win_rates"] = plots.win_rates(overall)
    if points := compared.points:
        means = {judge: float(np.nanmean(table[0])) for judge, table in scores.by_scorer.items()}
        figures["curves_step"] = plots.curves(points, means, scores.models[0], "step")
        if all(p.seconds is not None for p in points):
            figures["curves_seconds"] = plots.curves(points, means, scores.models[0], "seconds")
        else:
            print("no curves against seconds: a checkpoint's manifest.json does not say how long it took")
        write_csv(points, CurvePoint, folder / "curves.csv")
    for name, png in figures.items():
        write_bytes(folder / f"{name}.png", png)
    if count:
        figures["votes"] = write_votes(count, folder)
    write_csv(compared.results, Result, folder / "results.csv")
    write_picture(config, compared.images, folder / "comparison.png")

    sections = all_sections(compared, count)
    first_line = described(config, scores)
    markdown = "".join(f"\n## {s.title}\n\n{markdown_table(s)}\n\n{s.note}\n" for s in sections)
    write_text(folder / "results.md", f"{first_line}\n{markdown}")
    chosen = choose_prompts(scores, config.model_names, config.report_prompts)
    write_text(folder / "report.html", report_page(config, compared, chosen, first_line, sections, figures))

    text = f"{first_line}\n" + "".join(f"\n{text_table(s)}\n" for s in sections if s.in_terminal)
    text += f"\nOpen this first: {folder / 'report.html'}\n"
    write_text(folder / "summary.txt", text)
    print(text, end="")


def report_votes(config: EvaluationConfig, count: VoteCount) -> None:
    """Writes the files of the vote count into the output folder, and prints its table."""
    write_votes(count, Path(config.output_dir))
    section = vote_section(count)
    print(f"{text_table(section)}\n\n{section.note}")
    if scores_path(config).exists():
        print("\nTo have this in report.html too: evaluate.py compare --config ... with the same --votes")


def write_votes(count: VoteCount, folder: Path) -> bytes:
    """Writes votes.csv, votes.md and votes.png; returns the plot."""
    section = vote_section(count)
    write_csv(count.tallies, Tally, folder / "votes.csv")
    write_text(folder / "votes.md", f"{markdown_table(section)}\n\n{section.note}\n")
    plot = plots.votes(count.tallies)
    write_bytes(folder / "votes.png", plot)
    return plot


def write_bytes(path: Path, content: bytes) -> None:
    write_file(path, lambda file: file.write_bytes(content))


def described(config: EvaluationConfig, scores: Scores) -> str:
    """A description of the comparison in one line."""
    samples = next(iter(scores.by_scorer.values())).shape[2]
    plural = "s" if samples > 1 else ""
    return f"{len(scores.prompts)} prompts x {samples} sample{plural}, same seeds for every model; {config.described()}"


def all_sections(compared: Comparison, count: VoteCount | None) -> list[Section]:
    """The sections that are not empty."""
    sections = [
        win_rate_section(compared.results),
        category_section(compared.results),
        curve_section(compared.points, compared.scores.models[0]),
        vote_section(count) if count else None,
    ]
    return [section for section in sections if section]


def write_picture(config: EvaluationConfig, images: list[dict[str, Any]], path: Path, columns: int = 12) -> None:
    """Writes a grid of the first prompts' images (the prompts are not selected), one row per model."""
    from ncp.training.drawing import grid  # here: it loads diffusers, which a vote count does not need

    names = config.model_names
    shown = [r for r in images if r["prompt_number"] < columns and r["sample"] == 0]
    rows = {m: [thumbnail(Path(config.output_dir) / r["file"]) for r in shown if r["model"] == m] for m in names}
    picture = grid(rows, [r["prompt"] for r in shown if r["model"] == names[0]], cell=96)
    write_file(path, lambda file: picture.save(file, "PNG"))


def choose_prompts(scores: Scores, names: list[str], most: int) -> list[int]:
    """Numbers of the prompts to show: one half extremes, alternating over pairs and judges, the rest at random."""
    count = len(scores.prompts)
    if most >= count:
        return list(range(count))
    orders = []
    for (a, b), table in itertools.product(itertools.combinations(names, 2), scores.by_scorer.values()):
        gain = table[scores.models.index(b), :, 0] - table[scores.models.index(a), :, 0]
        order = [int(i) for i in np.argsort(gain) if not np.isnan(gain[i])]
        orders += [order, order[::-1]]
    extremes = dict.fromkeys(i for rank in itertools.zip_longest(*orders) for i in rank if i is not None)
    chosen = list(extremes)[: most // 2]
    rest = [int(i) for i in np.random.default_rng(0).permutation(count) if i not in chosen]
    return sorted([*chosen, *rest[: most - len(chosen)]])
