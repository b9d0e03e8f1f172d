"""The sections of a report: results as text tables, each with a note on how to read it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from evaluation.compare import CurvePoint, Result
from evaluation.votes import Tally, VoteCount


@dataclass
class Section:
    """A table with a title and a note on how to read it. figures: names of its plots."""

    title: str
    head: Sequence[str]
    rows: list[list[str]]
    note: str
    figures: tuple[str, ...] = ()
    foldable: bool = False  # whether the page folds it if it has many rows
    in_terminal: bool = True


def win_rate_section(results: list[Result]) -> Section | None:
    """The comparisons on all prompts; means and medians are written reference -> model. None without results."""
    rows = [
        [
            r.judge,
            pair_text(r),
            str(r.prompts) + (f" ({r.left_out} without scores)" if r.left_out else ""),
            win_rate_text(r),
            p_value_text(r.p_value),
            f"{score_text(r.reference_mean)} -> {score_text(r.model_mean)}",
            f"{score_text(r.reference_median)} -> {score_text(r.model_median)}",
        ]
        for r in results
        if not r.category
    ]
    head = ["judge", "comparison", "prompts", "win-rate [95% interval]", "sign test p", "mean", "median"]
    note = (
        "Win-rate: share of prompts on which the first-named model's image scores higher, ties counting half. "
        "Intervals: 95%, by bootstrap over prompts (BCa); they say how much other prompts of this kind would change "
        "it, not how much another training run would. Sign test: exact, two-sided. Nothing is corrected for looking at "
        "several judges, pairs or categories."
    )
    return Section("Win-rates", head, rows, note, ("win_rates",)) if rows else None


def category_section(results: list[Result]) -> Section | None:
    """The comparisons by category. None if there is only one category."""
    rows = [[r.judge, pair_text(r), r.category, str(r.prompts), win_rate_text(r)] for r in results if r.category]
    head = ["judge", "comparison", "category", "prompts", "win-rate [95% interval]"]
    note = "Few prompts per category make wide intervals."
    return Section("By category", head, rows, note, foldable=True, in_terminal=False) if rows else None


def curve_section(points: list[CurvePoint], reference: str) -> Section | None:
    """The runs' checkpoints; None without checkpoints. reference: the model that gains are relative to."""
    rows = [
        [
            *(p.judge, p.run, str(p.step), "" if p.seconds is None else f"{p.seconds:.0f}"),
            *(score_text(p.mean), f"{p.gain:+.4f} [{p.low:+.4f}, {p.high:+.4f}]"),
        ]
        for p in points
    ]
    head = ["judge", "run", "step", "seconds", "mean", f"gain over {reference} [95% interval]"]
    note = "Of each checkpoint's images. The interval is of the paired gain, by bootstrap over prompts."
    figures = ("curves_step", "curves_seconds")
    return Section("Training curves", head, rows, note, figures, foldable=True) if rows else None


def vote_section(count: VoteCount) -> Section:
    """The count of the human judges' votes."""
    rows = [
        [
            t.question,
            pair_text(t),
            str(t.pairs),
            f"{t.wins} / {t.ties} / {t.losses}",
            win_rate_text(t),
            p_value_text(t.p_value),
            "undefined" if math.isnan(t.kappa) else f"{t.kappa:.3f}",
            f"{t.votes} / {t.abstentions} / {t.missing}",
        ]
        for t in count.tallies
    ]
    head = ("question", "comparison", "pairs", "wins / ties / losses", "win-rate [95% interval]", "sign test p",
            "Fleiss' kappa", "votes / cannot say / missing")  # fmt: skip
    note = (
        f"Judges: {', '.join(count.judges)}. A pair is won if more than half of the votes cast say so, else it is a "
        'tie; "cannot say" and missing votes are not votes, and a pair without votes is left out. Win-rate: ties '
        "count half, interval by bootstrap over pairs. Kappa: agreement beyond chance on win, tie or loss, 0 none, "
        "1 perfect, over pairs with two votes or more."
    )
    return Section("Human judges", head, rows, note, ("votes",))


# ---------------------------------------------------------------- cells


def pair_text(result: Result | Tally) -> str:
    return f"{result.model} over {result.reference}"


def win_rate_text(result: Result | Tally) -> str:
    if math.isnan(result.win_rate):
        return "no scores"
    return f"{result.win_rate:.1%} [{result.low:.1%}, {result.high:.1%}]"


def p_value_text(p: float) -> str:
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def score_text(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"


# ---------------------------------------------------------------- tables


def text_table(section: Section) -> str:
    """Columns aligned by spaces."""
    widths = [max(map(len, column)) for column in zip(section.head, *section.rows, strict=True)]
    lines = [section.head, *section.rows]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in lines)


def markdown_table(section: Section) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"

    return "\n".join([line(section.head), "|" + "---|" * len(section.head), *map(line, section.rows)])
