"""report.html: counts, wins and losses per image, and sample pairs. One file that opens offline."""

from __future__ import annotations

import base64
import html
import io
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from filtering.findings import BINS, CAP, Findings, Shown
from filtering.settings import FilterConfig
from filtering.source import Shard, by_row_group, open_shards, read_images
from ncp.common.errors import UserError
from ncp.common.files import write_text

SIDE = 160  # maximum side of a thumbnail in pixels
Jpegs = dict[tuple[int, int], "bytes | None"]  # by row and side; without unreadable images


def write_report(shards: list[Shard], manifest: dict[str, Any], findings: Findings, config: FilterConfig) -> None:
    """Writes report.html. Images of removed pairs are read from the input, those of kept pairs from the output."""
    print("writing the report ...", flush=True)
    folder, removed, kept = Path(config.output_dir), None, None
    if not config.metadata_only:
        written = replace(config, dataset_name=str(folder))
        removed = images_of(shards, [pair.row for pair in findings.removed])
        kept = images_of(open_shards(written)[0], [pair.row for pair in findings.kept])
    write_text(folder / "report.html", page(manifest, findings, removed, kept))


def images_of(shards: list[Shard], rows: list[int]) -> Jpegs:
    """Both JPEGs of these rows, read from their row groups; without unreadable images."""
    found: Jpegs = {}
    for shard, number, keys, inside in by_row_group(shards, np.repeat(rows, 2).astype(np.int64)):
        with suppress(UserError):
            for part in read_images(shard, number, keys, inside, keys % 2):
                found |= {(rows[k // 2], k % 2): image[0].as_py() for k, image in part}
    return found


# ---------------------------------------------------------------- drawing


def page(manifest: dict[str, Any], findings: Findings, removed: Jpegs | None, kept: Jpegs | None) -> str:
    """The report's HTML. removed, kept: images of the sample pairs; None if the dataset is written without images."""
    rows, pairs = manifest["rows"], manifest["pairs"]
    said = ("rule", "dataset_split", "metadata_only", "rows_per_file")  # or without influence on the pairs
    options = ", ".join(f"{k} {v}" for k, v in manifest["options"].items() if k not in said and v is not None)
    lead = (
        f"Rule <b>{text(manifest['options']['rule'])}</b> on split {text(manifest['options']['dataset_split'])} of "
        f"{text(manifest['dataset_name'])}: {rows['input']:,} judgements became <b>{pairs['total']:,} pairs</b> of "
        f"{pairs['unique_prompts']:,} prompts and {pairs['images']:,} images."
    )
    body = [
        f"<h1>What the filter kept</h1><p>{lead}</p><p class=note>{text(options)}; filter_pickapic "
        f"{text(manifest['version'])}; pairs {manifest['pairs']['sha256'][:12]}</p>",
        "<h2>Rows</h2>" + funnel(rows, pairs),
        "<h2>Wins and losses of each image</h2>" + heat_map(findings),
        "<h2>Games of each prompt</h2>" + prompts(findings.games),
        "<h2>Removed: games with a contradictory image</h2>" + removed_note(findings),
        sheet(findings.removed, removed),
        f"<h2>Kept</h2><p class=note>{len(findings.kept)} of {pairs['total']:,} pairs, drawn at random.</p>",
        sheet(findings.kept, kept),
    ]
    return TEMPLATE.replace("BODY", "\n".join(body))


def text(value: object) -> str:
    return html.escape(str(value))


def funnel(rows: dict[str, Any], pairs: dict[str, Any]) -> str:
    """For each reason a bar: the rows left after it, and the rows that it dropped."""
    left, lines = rows["input"], []
    scale = 100 / max(rows["input"], 1)

    def line(name: str, count: int, gone: int) -> str:
        cells = f"<td class=bar>{bar(left * scale, gone * scale)}</td><td>{count:,}</td><td>{count * scale:.2f}%</td>"
        return f"<tr><th>{text(name)}</th>{cells}</tr>"

    lines.append(line("input rows", left, 0))
    for reason, count in rows["dropped"].items():
        if count:
            left -= count
            lines.append(line("− " + reason.replace("_", " "), count, count))
    lines.append(line("= rows kept", rows["kept"], 0))
    none = [reason.replace("_", " ") for reason, count in rows["dropped"].items() if not count]
    note = f"Looked for and not found: {text(', '.join(none))}. " if none else ""
    if pairs["made_up"]:
        note += f"{pairs['made_up']:,} further pairs were made up from rows that hold their images. "
    note += best_note(rows["contradictory_best_image_uid"], rows["dropped"])
    note += "Blue is what is left, orange what a reason took; each row is counted once, under the first that applies."
    return f"<div class=scroll><table class=funnel>{''.join(lines)}</table></div><p class=note>{note}</p>"


def best_note(count: int, dropped: dict[str, int]) -> str:
    """A note on the games whose best_image_uid is not the winner's: used or dropped."""
    if not count:
        return ""
    fate = (
        "were dropped before wins were counted (best_image_uid: ignore uses them, as the authors of the method do)"
        if "contradictory_best_image_uid" in dropped
        else "were used as the labels say (best_image_uid: check drops them)"
    )
    return f"Games whose best_image_uid is not that of the image that the labels prefer: {count:,}; they {fate}. "


def heat_map(findings: Findings) -> str:
    records = findings.records
    total, highest = int(records.sum()), max(int(records.max()), 1)
    names = [*map(str, range(CAP)), f"{CAP}+"]
    head = "".join(f"<th>{n}</th>" for n in names)
    lines = [f"<tr><td></td><th colspan={CAP + 1}>losses</th></tr><tr><th>wins</th>{head}</tr>"]
    for wins, counts in enumerate(records.tolist()):
        cells = "".join(
            f'<td class="{"both" if wins and losses else "one"}" style="--depth:{depth(count, highest)}">'
            f"{f'{count:,}' if count else '·'}</td>"
            for losses, count in enumerate(counts)
        )
        lines.append(f"<tr><th>{names[wins]}</th>{cells}</tr>")
    both = findings.contradictory_images
    note = (
        f"{both:,} of {total:,} images ({100 * both / max(total, 1):.1f}%) both won and lost: the orange cells. The "
        "rules call them contradictory, but that alone is no mistake: the winner of a game stays and meets the next "
        "image, so an image can beat a worse one and lose to a better. Pairs of images that were judged both ways (x "
        f"beat y, and y beat x): {findings.both_ways:,}. There the judgements do contradict each other. Ties are in no "
        "cell: an image that only tied stands at 0, 0."
    )
    return f"<div class=scroll><table class=heat>{''.join(lines)}</table></div><p class=note>{note}</p>"


def depth(count: int, highest: int) -> str:
    """The opacity of a cell's colour, 0 to 1, by the logarithm of its count."""
    return f"{np.log1p(count) / np.log1p(highest):.2f}"


def prompts(games: list[tuple[int, int]]) -> str:
    ends = [*(str(b - 1) for b in BINS[1:]), ""]
    names = [str(b) if str(b) == e else f"{b} to {e}" if e else f"{b} or more" for b, e in zip(BINS, ends, strict=True)]
    scale = 100 / max(max(n for n, _ in games), 1)
    lines = ["<tr><th>games</th><td></td><td>prompts</td><td>with a kept pair</td></tr>"]
    for name, (count, survive) in zip(names, games, strict=True):
        share = f"{survive:,} ({100 * survive / count:.0f}%)" if count else "–"
        cells = (
            f"<td class=bar>{bar(survive * scale, (count - survive) * scale)}</td><td>{count:,}</td><td>{share}</td>"
        )
        lines.append(f"<tr><th>{name}</th>{cells}</tr>")
    note = "Valid games, ties included. Blue: the prompts of which a pair is left."
    return f"<div class=scroll><table class=funnel>{''.join(lines)}</table></div><p class=note>{note}</p>"


def bar(left: float, gone: float) -> str:
    """Two lengths in percent, side by side."""
    return f'<i style="width:{left:.3f}%"></i><s style="width:{gone:.3f}%"></s>'


def removed_note(findings: Findings) -> str:
    removed, kept = findings.contradictory_games
    note = f"{len(findings.removed)} of {removed:,} games, drawn at random. " if removed else "This rule removed none. "
    note += f"{kept:,} games with such an image were kept. " if kept else ""
    if removed:
        note += (
            "Would you have judged as this person did? If mostly yes, what was removed is taste, and another rule "
            "keeps more of it (contradiction_free, no_ties); if it looks like a coin toss, it is noise."
        )
    return f"<p class=note>{note}</p>"


def sheet(shown: list[Shown], jpegs: Jpegs | None) -> str:
    return f"<div class=sheet>{''.join(card(pair, jpegs) for pair in shown)}</div>"


def card(pair: Shown, jpegs: Jpegs | None) -> str:
    figures = []
    for i, side in enumerate(pair.sides):
        box = f"<div class=box>{text(side.uid)}</div>"
        picture = box if jpegs is None else thumbnail(jpegs.get((pair.row, i)), side.uid)
        word = "won" if side.won else "lost"
        figures.append(
            f'<figure class="{word}">{picture}<figcaption><b>{word}</b> label {int(side.won)}'
            f"<br>in all: {side.record}</figcaption></figure>"
        )
    return (
        f"<article><p class=prompt>{text(pair.caption)}</p><div class=pair>{''.join(figures)}</div>"
        f"<p class=tag>{text(pair.note)}</p></article>"
    )


def thumbnail(jpeg: bytes | None, uid: str) -> str:
    """An <img> element, or a grey box that says why there is no image."""
    try:
        stored = Image.open(io.BytesIO(jpeg or b""))
        stored.draft("RGB", (SIDE, SIDE))  # decodes at a reduced size, if the format supports it
        image = stored.convert("RGB")
        image.thumbnail((SIDE, SIDE))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=80)
    except Exception:  # Pillow raises many kinds for a damaged image
        return f"<div class=box>{'cannot be decoded' if jpeg else 'not there'}:<br>{text(uid)}</div>"
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="image {text(uid)}" title="{text(uid)}" src="data:image/jpeg;base64,{data}">'


TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>What the filter kept</title>
<style>
  :root { color-scheme: light dark; --soft: color-mix(in srgb, CanvasText 65%, Canvas);
          --line: color-mix(in srgb, CanvasText 18%, Canvas); --tint: color-mix(in srgb, CanvasText 7%, Canvas);
          --keep: #2f7fc1; --gone: #e08a3c }
  * { box-sizing: border-box }
  body { margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 76rem;
         font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif }
  h1 { font-size: 1.8rem; margin: 0 } h2 { font-size: 1.25rem; margin: 2.4rem 0 .7rem } p { max-width: 60rem }
  .note { color: var(--soft); font-size: .9rem; overflow-wrap: anywhere }
  .scroll { overflow-x: auto }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93rem }
  th { font-weight: 400 }
  .funnel td, .funnel th { padding: .18rem .8rem .18rem 0; text-align: right; white-space: nowrap }
  .funnel th { text-align: left } .funnel td.bar { text-align: left; width: 34rem; min-width: 12rem; font-size: 0 }
  .bar i, .bar s { display: inline-block; height: 1rem; background: var(--keep) } .bar s { background: var(--gone) }
  .heat td, .heat th { border: 1px solid var(--line); padding: .3rem .5rem; min-width: 4.2rem; text-align: right }
  .heat th { color: var(--soft); text-align: center; border: 0 }
  .heat td:not([class]) { border: 0 }
  .heat td { background: color-mix(in srgb, var(--shade) calc(var(--depth, 0) * 70%), Canvas) }
  .one { --shade: var(--keep) } .both { --shade: var(--gone) }
  .sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(21.5rem, 1fr)); gap: 1rem }
  article { border: 1px solid var(--line); border-radius: 8px; padding: .8rem; display: flex; flex-direction: column }
  article p { margin: 0 }
  .prompt { flex: 1; overflow-wrap: anywhere; max-height: 6rem; overflow-y: auto; font-size: .93rem }
  .pair { display: grid; grid-template-columns: 1fr 1fr; gap: .7rem; margin: .6rem 0 }
  figure { margin: 0 } figure img, .box { width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 4px;
           background: var(--tint); display: block; border: 4px solid transparent }
  .box { display: flex; align-items: center; justify-content: center; text-align: center; padding: .5rem;
         font-size: .75rem; color: var(--soft); overflow-wrap: anywhere; overflow: hidden }
  .won img, .won .box { border-color: #2c9a4b }
  figcaption { font-size: .83rem; color: var(--soft); margin-top: .25rem } .won b { color: #2c9a4b }
  .tag { color: var(--soft); font-size: .8rem }
</style>
</head>
<body>
BODY
</body>
</html>
"""
