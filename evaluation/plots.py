"""Figures of the comparison, as PNG bytes."""

from __future__ import annotations

import io
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display
import matplotlib.pyplot as plt

from evaluation.compare import CurvePoint, Result
from evaluation.sections import pair_text
from evaluation.votes import Tally

COLOURS = ("#2563a8", "#c2571a", "#3a8a4d", "#8a4fa3", "#a33b3b", "#5a6472")


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def _bare(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def win_rates(results: list[Result]) -> bytes:
    """One line per comparison and judge: the win-rate with its 95% interval, and a mark at 50%."""
    figure, axes = plt.subplots(figsize=(7, 0.8 + 0.42 * len(results)))
    labels, judges = [], list(dict.fromkeys(r.judge for r in results))
    several = len({(r.reference, r.model) for r in results}) > 1
    for place, r in enumerate(results):
        colour = COLOURS[judges.index(r.judge) % len(COLOURS)]
        axes.plot([100 * r.low, 100 * r.high], [place, place], color=colour, linewidth=2.5, solid_capstyle="butt")
        axes.plot(100 * r.win_rate, place, "o", color=colour, markersize=7)
        labels.append(f"{r.judge}: {pair_text(r)}" if several else r.judge)
    axes.axvline(50, color="#888888", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(results)), labels)
    axes.set_ylim(len(results) - 0.5, -0.5)
    low, high = (f([100 * v for r in results for v in (r.low, r.high) if v == v] + [50]) for f in (min, max))
    axes.set_xlim(max(-2, min(30, low - 5)), min(102, max(70, high + 5)))
    title = "win-rate in %, with 95% interval over prompts"
    axes.set_xlabel(title if several else f"{pair_text(results[0])}: {title}")
    _bare(axes)
    return _png(figure)


def curves(points: list[CurvePoint], reference: dict[str, float], name: str, by: str) -> bytes:
    """Scores against `by` ("step" or "seconds"), one panel per judge, one line per run.

    Left axis: the gain over the model called `name`, with its 95% interval. Right axis: the mean score.
    reference: that model's mean score by judge.
    """
    judges = list(dict.fromkeys(p.judge for p in points))
    figure, panels = plt.subplots(1, len(judges), figsize=(4.6 * len(judges), 3.4), squeeze=False)
    for axes, judge in zip(panels[0], judges, strict=True):
        for colour, run in zip(COLOURS * 9, dict.fromkeys(p.run for p in points), strict=False):
            own = sorted((p for p in points if (p.judge, p.run) == (judge, run)), key=lambda p: p.step)
            x = [getattr(p, by) for p in own]
            axes.plot(x, [p.gain for p in own], "o-", color=colour, label=run, markersize=4)
            axes.fill_between(x, [p.low for p in own], [p.high for p in own], color=colour, alpha=0.15, linewidth=0)
        axes.axhline(0, color="#888888", linewidth=1, linestyle="--")
        shift = reference[judge]
        right = axes.secondary_yaxis("right", functions=(lambda y, s=shift: y + s, lambda y, s=shift: y - s))
        right.tick_params(colors="#888888", labelsize=8)
        right.spines["right"].set_visible(False)
        axes.set_title(judge, fontsize=10)
        axes.set_xlabel({"step": "optimizer steps", "seconds": "seconds of training"}[by])
        _bare(axes)
    panels[0][0].set_ylabel(f"gain over {name} (right: mean score)")
    panels[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return _png(figure)


def votes(tallies: list[Tally]) -> bytes:
    """Wins, ties and losses, by the judges' majority, as one bar of 100% for each comparison and question."""
    figure, axes = plt.subplots(figsize=(7, 0.8 + 0.5 * len(tallies)))
    for place, t in enumerate(tallies):
        left = 0.0
        for share, colour in ((t.wins, COLOURS[0]), (t.ties, "#d5d5d5"), (t.losses, COLOURS[1])):
            width = 100 * share / max(1, t.pairs)
            axes.barh(place, width, left=left, color=colour, height=0.62)
            if width >= 6:
                dark = colour == "#d5d5d5"
                axes.text(left + width / 2, place, f"{width:.0f}%", ha="center", va="center", fontsize=9,
                          color="black" if dark else "white")  # fmt: skip
            left += width
    axes.axvline(50, color="#444444", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(tallies)), [f"{t.question}: {pair_text(t)}" for t in tallies])
    axes.set_ylim(len(tallies) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of pairs in %: wins (blue), ties (grey), losses (orange)")
    _bare(axes)
    return _png(figure)
