"""Self-contained HTML pages: the report's page, and the parts that it shares with the judges' page."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from evaluation.compare import Comparison
from evaluation.protocol import EvaluationConfig
from evaluation.sections import Section

TEMPLATE = Path(__file__).with_name("report.html")
SIDE = 320  # maximum side of an image in the report, in pixels
MANY_ROWS = 12  # a foldable table with more rows is folded


# ---------------------------------------------------------------- shared parts


def fill_template(template: Path, values: dict[str, str]) -> str:
    """The template with each {{KEY}} replaced."""
    page = template.read_text(encoding="utf-8")
    for key, value in values.items():
        page = page.replace("{{" + key + "}}", value)
    return page


def script_json(data: Any) -> str:
    """JSON that is safe within <script> for any prompt."""
    return json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")


def data_url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def thumbnail(path: Path, side: int = SIDE) -> Image.Image:
    """The image in RGB, no larger than `side`."""
    image = Image.open(path).convert("RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def thumbnail_url(path: Path, side: int = SIDE, quality: int = 85) -> str:
    """An image as a data URL, no larger than `side`, without the original's metadata."""
    image = thumbnail(path, side)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, lossless=max(image.size) < 200)
    return data_url(buffer.getvalue(), "webp")


def html_table(head: Sequence[str], rows: list[list[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(x)}</{tag}>" for x in cells) + "</tr>"

    body = "".join(line([x.replace("->", "→") for x in r], "td") for r in rows)
    return f"<div class='scroll'><table><thead>{line(head, 'th')}</thead><tbody>{body}</tbody></table></div>"


# ---------------------------------------------------------------- the report's page


def report_page(
    config: EvaluationConfig,
    compared: Comparison,
    chosen: list[int],
    first_line: str,
    sections: list[Section],
    figures: dict[str, bytes],
) -> str:
    """The text of report.html, self-contained. chosen: numbers of the prompts to show. figures: PNG by name."""
    data = prompt_data(config, compared, chosen)
    parts = [section_html(section, figures) for section in sections]
    values = {"FIRST": html.escape(first_line), "SECTIONS": "\n".join(parts), "DATA": script_json(data)}
    return fill_template(TEMPLATE, values)


def prompt_data(config: EvaluationConfig, compared: Comparison, chosen: list[int]) -> dict[str, Any]:
    """The data that the page's script sorts and filters: the chosen prompts with their images and scores."""
    names, scores = config.model_names, compared.scores
    files = {(r["model"], r["prompt_number"]): r["file"] for r in compared.images if r["sample"] == 0}
    rows = [scores.models.index(m) for m in names]
    return {
        "models": names,
        "judges": list(scores.by_scorer),
        "total": len(scores.prompts),
        "samples": config.samples_per_prompt,
        "prompts": [
            {
                "number": n + 1,
                "prompt": scores.prompts[n],
                "categories": [name for name in scores.categories[n] if name],
                "images": [thumbnail_url(Path(config.output_dir) / files[m, n]) for m in names],
                # JSON has no NaN.
                "scores": [
                    [None if np.isnan(table[m, n, 0]) else round(float(table[m, n, 0]), 5) for m in rows]
                    for table in scores.by_scorer.values()
                ],
            }
            for n in chosen
        ],
    }


def section_html(section: Section, figures: dict[str, bytes]) -> str:
    """A section as HTML, with its figures that exist."""
    pictures = "".join(
        f'<img class="plot {name}" alt="{section.title}" src="{data_url(figures[name], "png")}">'
        for name in section.figures
        if name in figures
    )
    table = html_table(section.head, section.rows)
    note = f"<p class='note'>{html.escape(section.note)}</p>"
    content = f"{table}{note}{pictures}"
    if section.foldable and len(section.rows) > MANY_ROWS:
        content = f"{pictures}<details><summary>{len(section.rows)} rows</summary>{table}</details>{note}"
    return f"<section><h2>{section.title}</h2>{content}</section>"
