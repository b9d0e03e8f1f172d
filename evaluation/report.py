"""What `compare` leaves: tables in the terminal, Markdown and CSV, plots, and report.html, which needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from evaluation import compare as c
from evaluation import plots
from evaluation.protocol import Config, write_atomically

TEMPLATE = Path(__file__).with_name("report.html")
SIDE = 320  # pixels of an image in the report, at most


def write_report(
    config: Config,
    index: list[dict[str, Any]],
    scores: c.Scores,
    results: list[c.Result],
    points: list[c.Point],
    ballots: Any,
) -> None:
    """Writes all files of the comparison into the output folder, and prints the tables."""
    folder = Path(config.output_dir)
    figures: dict[str, bytes] = {}
    overall = [r for r in results if not r.category]
    if overall:
        figures["win_rates"] = plots.win_rates(overall)
    if points:
        means = {judge: float(np.nanmean(table[0])) for judge, table in scores.by_scorer.items()}
        figures["curves_step"] = plots.curves(points, means, scores.models[0], "step")
        if all(p.seconds is not None for p in points):
            figures["curves_seconds"] = plots.curves(points, means, scores.models[0], "seconds")
        else:
            print("no curves against seconds: a checkpoint's manifest.json does not say how long it took")
        c.write_csv(points, c.Point, folder / "curves.csv")
    if ballots:
        figures["votes"] = write_votes(ballots, folder)
    for name, data in figures.items():
        write_atomically(folder / f"{name}.png", lambda file, data=data: file.write_bytes(data))
    c.write_csv(results, c.Result, folder / "results.csv")
    write_picture(config, index, folder / "comparison.png")

    sections = tables(results, points, scores.models[0], ballots)
    first = describe(config, scores)
    markdown = f"{first}\n" + "".join(
        f"\n## {title}\n\n{c.markdown_table(head, rows)}\n\n{note}\n" for title, head, rows, note in sections
    )
    write_atomically(folder / "results.md", lambda file: file.write_text(markdown, encoding="utf-8"))
    page = fill(config, index, scores, first, sections, figures)
    write_atomically(folder / "report.html", lambda file: file.write_text(page, encoding="utf-8"))

    terminal = [s for s in sections if s[0] != "By category"]
    text = f"{first}\n" + "".join(f"\n{c.text_table(head, rows)}\n" for _, head, rows, _ in terminal)
    text += f"\nOpen this first: {folder / 'report.html'}\n"
    write_atomically(folder / "summary.txt", lambda file: file.write_text(text, encoding="utf-8"))
    print(text, end="")


def write_votes(ballots: Any, folder: Path) -> bytes:
    """Writes votes.csv, votes.md and votes.png; returns the plot."""
    from evaluation.votes import Tally, label

    c.write_csv(ballots.tallies, Tally, folder / "votes.csv")
    markdown = f"{c.markdown_table(ballots.HEAD, ballots.rows())}\n\n{ballots.note()}\n"
    write_atomically(folder / "votes.md", lambda file: file.write_text(markdown, encoding="utf-8"))
    plot = plots.votes(ballots.tallies, label)
    write_atomically(folder / "votes.png", lambda file: file.write_bytes(plot))
    return plot


def describe(config: Config, scores: c.Scores) -> str:
    samples = next(iter(scores.by_scorer.values())).shape[2]
    plural = "s" if samples > 1 else ""
    return f"{len(scores.prompts)} prompts x {samples} sample{plural}, same seeds for every model; {config.described()}"


Section = tuple[str, Sequence[str], list[list[str]], str]  # title, head, rows, note


def tables(results: list[c.Result], points: list[c.Point], reference: str, ballots: Any) -> list[Section]:
    found: list[Section] = []
    if rows := c.table_rows(results):
        note = (
            "Win-rate: share of prompts on which the first-named model's image scores higher, ties counting half. "
            "Intervals: 95%, by bootstrap over prompts; they say how much other prompts of this kind would change it, "
            "not how much another training run would. Sign test: exact, two-sided. Nothing is corrected for looking at "
            "several judges, pairs or categories."
        )
        found.append(("Win-rates", c.HEAD, rows, note))
    if rows := c.category_rows(results):
        found.append(("By category", c.CATEGORY_HEAD, rows, "Few prompts per category make wide intervals."))
    if points:
        head = ["judge", "run", "step", "seconds", "mean", f"gain over {reference} [95% interval]"]
        rows = [
            [
                *(p.judge, p.run, str(p.step), "" if p.seconds is None else f"{p.seconds:.0f}"),
                *(c.number(p.mean), f"{p.gain:+.4f} [{p.low:+.4f}, {p.high:+.4f}]"),
            ]
            for p in points
        ]
        found.append(
            (
                "Training curves",
                head,
                rows,
                "Of each checkpoint's images. The interval is of the paired gain, by bootstrap over prompts.",
            )
        )
    if ballots:
        found.append(("Human judges", ballots.HEAD, ballots.rows(), ballots.note()))
    return found


# ---------------------------------------------------------------- pictures


def write_picture(config: Config, index: list[dict[str, Any]], path: Path, columns: int = 12) -> None:
    """The first prompts, not chosen, one row per model."""
    from ncp.training.drawing import grid

    names = config.model_names
    shown = [r for r in index if r["prompt_number"] < columns and r["sample"] == 0]
    rows = {m: [shrunk(Path(config.output_dir) / r["file"]) for r in shown if r["model"] == m] for m in names}
    picture = grid(rows, [r["prompt"] for r in shown if r["model"] == names[0]], cell=96)
    write_atomically(path, lambda file: picture.save(file, "PNG"))


def data_url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def shrunk(path: Path, side: int = SIDE) -> Image.Image:
    """The picture, no larger than `side`."""
    image = Image.open(path).convert("RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def small(path: Path, side: int = SIDE, quality: int = 85) -> str:
    """A picture as a data URL, no larger than `side`, without the original's metadata."""
    image = shrunk(path, side)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, lossless=max(image.size) < 200)
    return data_url(buffer.getvalue(), "webp")


def choose_prompts(scores: c.Scores, names: list[str], most: int) -> list[int]:
    """Numbers of the prompts to show: half extremes, in turn by every pair and judge; the rest drawn at random."""
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


# ---------------------------------------------------------------- the page


def fill(
    config: Config,
    index: list[dict[str, Any]],
    scores: c.Scores,
    first: str,
    sections: list[Section],
    figures: dict[str, bytes],
) -> str:
    """report.html with everything inside."""
    names = config.model_names
    chosen = choose_prompts(scores, names, config.report_prompts)
    files = {(r["model"], r["prompt_number"]): r["file"] for r in index if r["sample"] == 0}
    rows = [scores.models.index(m) for m in names]
    data = {
        "models": names,
        "judges": list(scores.by_scorer),
        "total": len(scores.prompts),
        "samples": config.samples_per_prompt,
        "prompts": [
            {
                "number": n + 1,
                "prompt": scores.prompts[n],
                "category": scores.categories[n],
                "images": [small(Path(config.output_dir) / files[m, n]) for m in names],
                # NaN is no JSON.
                "scores": [
                    [None if np.isnan(table[m, n, 0]) else round(float(table[m, n, 0]), 5) for m in rows]
                    for table in scores.by_scorer.values()
                ],
            }
            for n in chosen
        ],
    }
    shown = {
        "Win-rates": ("win_rates",),
        "Training curves": ("curves_step", "curves_seconds"),
        "Human judges": ("votes",),
    }
    parts = []
    for title, head, body, note in sections:
        pictures = "".join(
            f'<img class="plot {f}" alt="{title}" src="{data_url(figures[f], "png")}">'
            for f in shown.get(title, ())
            if f in figures
        )
        content = f"{html_table(head, body)}<p class='note'>{html.escape(note)}</p>{pictures}"
        if title in ("By category", "Training curves") and len(body) > 12:
            content = f"{pictures}<details><summary>{len(body)} rows</summary>{html_table(head, body)}</details>"
            content += f"<p class='note'>{html.escape(note)}</p>"
        parts.append(f"<section><h2>{title}</h2>{content}</section>")
    return put(TEMPLATE, {"FIRST": html.escape(first), "SECTIONS": "\n".join(parts), "DATA": embed(data)})


def put(template: Path, values: dict[str, str]) -> str:
    """The template with each {{KEY}} replaced."""
    page = template.read_text(encoding="utf-8")
    for key, value in values.items():
        page = page.replace("{{" + key + "}}", value)
    return page


def embed(data: Any) -> str:
    """JSON that is safe within <script>, whatever a prompt says."""
    return json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")


def html_table(head: Sequence[str], rows: list[list[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(x)}</{tag}>" for x in cells) + "</tr>"

    body = "".join(line([x.replace("->", "→") for x in r], "td") for r in rows)
    return f"<div class='scroll'><table><thead>{line(head, 'th')}</thead><tbody>{body}</tbody></table></div>"
