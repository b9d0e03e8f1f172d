"""Data for the filter's tests: games by hand and at random, files of them, and what the filter writes of them."""

from __future__ import annotations

import hashlib
import io
import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

import filter_pickapic
from filtering.settings import DECISION, FilterConfig
from ncp.common.files import sha256

SCHEMA = pa.schema(
    [
        ("are_different", pa.bool_()),
        ("best_image_uid", pa.string()),
        ("caption", pa.string()),
        ("created_at", pa.timestamp("ns")),
        ("has_label", pa.bool_()),
        ("image_0_uid", pa.string()),
        ("image_0_url", pa.string()),
        ("image_1_uid", pa.string()),
        ("image_1_url", pa.string()),
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("label_1", pa.float64()),
        ("model_0", pa.string()),
        ("model_1", pa.string()),
        ("ranking_id", pa.int64()),
        ("user_id", pa.int64()),
        ("num_example_per_prompt", pa.int64()),
        ("__index_level_0__", pa.int64()),
    ]
)


def jpeg(caption: str, uid: str) -> bytes:
    """A small real JPEG whose bytes depend on the image's identity alone."""
    colour = tuple(hashlib.sha256(f"{caption}|{uid}".encode()).digest()[:3])
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(buffer, "JPEG")
    return buffer.getvalue()


def row(game: str, ranking_id: int, caption: str = "cat", time: int | None = None, **changes: object) -> dict:
    """A row from 'a>b' (a is image 0 and wins), 'a<b' (image 1 wins) or 'a=b' (a tie), judged at `time` seconds."""
    sign = next(s for s in "<>=" if s in game)
    a, b = game.split(sign)
    label = {">": 1.0, "<": 0.0, "=": 0.5}[sign]
    made = {
        "are_different": a != b,
        "best_image_uid": {">": a, "<": b, "=": ""}[sign],
        "caption": caption,
        "created_at": np.datetime64("2023-01-01", "ns") + np.timedelta64(ranking_id if time is None else time, "s"),
        "has_label": True,
        "image_0_uid": a,
        "image_0_url": f"https://example.invalid/{a}",
        "image_1_uid": b,
        "image_1_url": f"https://example.invalid/{b}",
        "jpg_0": jpeg(caption, a),
        "jpg_1": jpeg(caption, b),
        "label_0": label,
        "label_1": 1 - label,
        "model_0": f"model of {a}",
        "model_1": f"model of {b}",
        "ranking_id": ranking_id,
        "user_id": 7,
        "num_example_per_prompt": 1,
        "__index_level_0__": ranking_id,
    }
    return made | changes


def table(rows: list[dict]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def games(text: str, **changes: object) -> list[dict]:
    """Rows of 'a>b b>c …', judged in this order: ranking ids and seconds 1, 2, …"""
    return [row(game, i, **changes) for i, game in enumerate(text.split(), 1)]


def config(**changes: object) -> FilterConfig:
    return FilterConfig(**({"dataset_name": "none", "output_dir": "none"} | changes))


# a beats b and c; b loses to a but beats c and d; d ties e; f beats g, h beats f.
STORY = "a>b b>c a>c d=e b<a c<d f>g h>f b>d"


def random_rows(rng: random.Random) -> list[dict]:
    """Up to 60 games among 6 images of 3 captions, with a few of every kind of malformed row."""
    rows = []
    for i in range(rng.randint(5, 60)):
        a, b = rng.sample("abcdef", 2)
        made = row(a + rng.choice("<<>>=") + b, i + 1, rng.choice(["cat", "dog", "eel"]), time=rng.randint(0, 9))
        if rng.random() < 0.1:
            made |= rng.choice(
                [
                    {"best_image_uid": b},
                    {"best_image_uid": None},
                    {"caption": None},
                    {"image_0_uid": b},
                    {"has_label": False},
                    {"label_0": 0.25},
                    {"ranking_id": max(1, i)},
                ]
            )
        rows.append(made)
        if rng.random() < 0.05:
            rows.append(dict(made))
    return rows


def many_games() -> list[dict]:
    """300 games of 31 prompts."""
    rng = random.Random(1)
    return [
        row(
            rng.choice(["a>b", "a>c", "b<c", "d>b", "d=e", "e>f", "f<d", "c>e"]),
            i,
            caption=f"prompt {rng.randint(0, 30)}",
            time=rng.randint(0, 1000),
        )
        for i in range(300)
    ]


def slow(rows: list[dict], rule: str, min_wins: int, keep: str, best: str = "check") -> list[tuple]:
    """(caption, winner, loser, ranking_id or None if made up), sorted: the rules word for word, in loops over games."""
    valid = []
    for r in rows:
        twins = [q for q in rows if q["ranking_id"] == r["ranking_id"]]
        decision = [[q[c] for c in DECISION if c != "best_image_uid" or best == "check"] for q in twins]
        if any(d != decision[0] for d in decision) or twins[0] is not r:
            continue
        if not r["caption"] or not r["image_0_uid"] or not r["image_1_uid"] or not r["has_label"]:
            continue
        labels = (r["label_0"], r["label_1"])
        if labels not in [(1, 0), (0, 1), (0.5, 0.5)] or r["image_0_uid"] == r["image_1_uid"]:
            continue
        winner = {1: r["image_0_uid"], 0: r["image_1_uid"]}.get(labels[0])
        if best == "check" and winner and r["best_image_uid"] not in (winner, "", None):
            continue
        valid.append(r)

    ties = [r for r in valid if r["label_0"] == 0.5]
    wins = sorted((r for r in valid if r["label_0"] != 0.5), key=lambda r: (r["created_at"], r["ranking_id"]))

    def winner(r):
        return (r["caption"], r["image_0_uid"] if r["label_0"] == 1 else r["image_1_uid"])

    def loser(r):
        return (r["caption"], r["image_1_uid"] if r["label_0"] == 1 else r["image_0_uid"])

    def won_by(image):
        return [r for r in wins if winner(r) == image]

    def absolute(image, least):
        tied = any(image in ((r["caption"], r["image_0_uid"]), (r["caption"], r["image_1_uid"])) for r in ties)
        return len(won_by(image)) >= least and not any(loser(r) == image for r in wins) and not tied

    def real(r):
        return (r["caption"], winner(r)[1], loser(r)[1], r["ranking_id"])

    if rule == "no_ties":
        return sorted(map(real, wins))
    if rule == "contradiction_free":
        both = {winner(r) for r in wins} & {loser(r) for r in wins}
        return sorted(real(r) for r in wins if winner(r) not in both and loser(r) not in both)
    if rule == "absolute_winners":
        chosen = [r for r in wins if absolute(winner(r), min_wins)]
        return sorted(real(r) for r in chosen if keep == "all" or won_by(winner(r))[-1] is r)
    found = set()
    for x in {winner(r) for r in wins}:
        if not absolute(x, max(2, min_wins)):
            continue
        latest = won_by(x)[-1]
        found.add(real(latest))
        if rule == "x_y" or not won_by(loser(latest)):
            continue
        y_latest = won_by(loser(latest))[-1]
        if rule == "x_y_yz":
            found.add(real(y_latest))
        else:
            z = loser(y_latest)
            judged = [r for r in won_by(x) if loser(r) == z]
            found.add(real(judged[-1]) if judged else (x[0], x[1], z[1], None))
    return sorted(found, key=str)


def write_shards(folder: Path, rows: list[dict], shards: int = 1, group: int = 3, prefix: str = "train") -> Path:
    (folder / "data").mkdir(parents=True, exist_ok=True)
    cut = [i * len(rows) // shards for i in range(shards + 1)]
    for i in range(shards):
        path = folder / "data" / f"{prefix}-{i:05d}-of-{shards:05d}.parquet"
        pq.write_table(table(rows[cut[i] : cut[i + 1]]), path, row_group_size=group)
    return folder


def filtered(source: Path, output: Path, *arguments: object) -> dict:
    """Runs the filter in this process; the manifest."""
    filter_pickapic.main(["--dataset_name", str(source), "--output_dir", str(output), *map(str, arguments)])
    return json.loads((output / "manifest.json").read_text())


def read_output(folder: Path) -> list[dict]:
    return [r for path in sorted((folder / "data").glob("*.parquet")) for r in pq.read_table(path).to_pylist()]


def files(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
