"""Synthetic judgements and images in Pick-a-Pic's schema, for benchmarks/filter.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

ROWS, PROMPTS, ROWS_PER_FILE, ROWS_PER_GROUP = 959_040, 58_960, 1487, 1000  # as in Pick-a-Pic v2
IMAGE_BYTES = 170_000


def strings(rng: np.random.Generator, count: int) -> pa.Array:
    """Random uuids, 36 characters each."""
    letters = np.full((count, 36), ord("-"), np.uint8)
    hexadecimal = np.frombuffer(b"0123456789abcdef", np.uint8)
    letters[:, np.setdiff1d(np.arange(36), [8, 13, 18, 23])] = hexadecimal[rng.integers(0, 16, (count, 32))]
    offsets = pa.py_buffer(np.arange(0, 36 * count + 1, 36, dtype=np.int32))
    return pa.Array.from_buffers(pa.string(), count, [None, offsets, pa.py_buffer(letters)])


def captions(rng: np.random.Generator, count: int) -> pa.Array:
    """Distinct texts of 1 to 150 words, half of them under 14."""
    words = [
        w.replace("-", "")[:n] for w, n in zip(strings(rng, 5000).to_pylist(), rng.integers(2, 11, 5000), strict=True)
    ]
    lengths = np.clip(rng.lognormal(2.6, 0.8, count), 1, 150).astype(int)
    return pa.array([f"{' '.join([words[i] for i in rng.integers(0, 5000, n)])} {k}" for k, n in enumerate(lengths)])


def judgements(rows: int, seed: int = 0) -> pa.Table:
    """Rows in order of time. A session is the games of one prompt: geometric, 9.6 on average. Popular prompts have
    many sessions."""
    rng, prompts, again = np.random.default_rng(seed), max(2, rows * PROMPTS // ROWS), rows // 50
    n = rows - again
    sessions = max(prompts, round(n / 9.6))
    first = np.append(0, np.sort(rng.choice(np.arange(1, n), sessions - 1, replace=False)))
    session = np.repeat(np.arange(sessions), np.diff(np.append(first, n)))
    popular = rng.lognormal(0, 1.2, prompts)
    of_session = np.append(np.arange(prompts), rng.choice(prompts, sessions - prompts, p=popular / popular.sum()))
    prompt = rng.permutation(of_session)[session]
    seconds = np.sort(rng.uniform(0, 3e7, sessions))[session] + 15 * (np.arange(n) - first[session])

    tie, newcomer_wins = rng.random(rows) < 0.112, rng.random(rows) < 0.45
    newcomer = np.arange(n) + session + 1  # images are numbered in order of appearance; a session begins with two
    beaten = newcomer_wins[:n] & ~tie[:n]
    after = np.maximum.accumulate(np.where(beaten, newcomer, first[session] + session))
    champion = np.where(np.arange(n) == first[session], first[session] + session, np.append(0, after[:-1]))

    game = np.append(np.arange(n), rng.integers(0, n, again))  # the last ones judge an earlier pair a second time
    seconds = np.append(seconds, seconds[game[n:]] + rng.uniform(60, 1e6, again))
    newcomer_first = rng.random(rows) < 0.5
    first_wins = newcomer_wins == newcomer_first
    uid = strings(rng, n + sessions)
    uid_0 = uid.take(np.where(newcomer_first, newcomer[game], champion[game]))
    uid_1 = uid.take(np.where(newcomer_first, champion[game], newcomer[game]))
    best = pc.if_else(pa.array(tie), "", pc.if_else(pa.array(first_wins), uid_0, uid_1))
    label = np.where(tie, 0.5, first_wins)
    order = np.argsort(seconds, kind="stable")
    table = pa.table(
        {
            "best_image_uid": best,
            "caption": captions(rng, prompts).take(prompt[game]),
            "created_at": np.datetime64("2023-01-01", "ns") + (seconds * 1e9).astype("timedelta64[ns]"),
            "has_label": np.ones(rows, bool),
            "image_0_uid": uid_0,
            "image_1_uid": uid_1,
            "label_0": label,
            "label_1": 1 - label,
            "user_id": rng.integers(0, 6000, rows),
        }
    )
    return table.take(order).append_column("ranking_id", pa.array(np.arange(rows)))


def with_images(rows: int, kept: float, shuffled: bool) -> pa.Table:
    """One game per prompt, the given share decisive and the others ties, with random bytes as images, all different."""
    rng = np.random.default_rng(1)
    table = judgements(rows)
    label = np.where(rng.random(rows) < kept, 1.0, 0.5)
    new = {"caption": captions(rng, rows), "label_0": label, "label_1": 1 - label, "best_image_uid": [""] * rows}
    new |= {f"image_{i}_uid": strings(rng, rows) for i in (0, 1)}
    noise = rng.bytes(1 << 26)
    for name in ("jpg_0", "jpg_1"):
        sizes = np.clip(rng.lognormal(np.log(0.9 * IMAGE_BYTES), 0.45, rows), 2e4, 1e6).astype(int)
        starts = rng.integers(0, len(noise) - 10**6, rows)
        new[name] = pa.array(
            [noise[a : a + n] for a, n in zip(starts.tolist(), sizes.tolist(), strict=True)], pa.binary()
        )
    names = [*table.column_names, "jpg_0", "jpg_1"]
    table = pa.table({name: new[name] if name in new else table[name] for name in names})
    return table.take(rng.permutation(rows)) if shuffled else table


def make_judgements(folder: Path, rows: int) -> None:
    table = judgements(rows)
    write(table, folder)
    games = np.unique(table["caption"].combine_chunks().dictionary_encode().indices, return_counts=True)[1]
    megabytes = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    print(f"{rows:,} judgements of {len(games):,} prompts (median {np.median(games):.0f} games, at most {games.max()})")
    print(f"in {len(list(folder.iterdir()))} files, {megabytes:.0f} MB of metadata", flush=True)


def make_images(folder: Path, rows: int, kept: float, shuffled: bool) -> None:
    write(with_images(rows, kept, shuffled), folder)


def write(table: pa.Table, folder: Path) -> None:
    folder.mkdir(parents=True)
    count = -(-len(table) // ROWS_PER_FILE)
    for k in range(count):
        piece = table.slice(k * ROWS_PER_FILE, ROWS_PER_FILE)
        pq.write_table(piece, folder / f"train-{k:05d}-of-{count:05d}.parquet", row_group_size=ROWS_PER_GROUP)
