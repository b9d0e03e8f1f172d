"""The cost of filter_pickapic.py at Pick-a-Pic's full size, compared with straightforward code and with a plain copy.

    python benchmarks/filter.py [--json FILE]
    pip install duckdb polars && python benchmarks/filter.py --engines pyarrow duckdb polars --copy_rows 0

Decision: from the start of a new process until the pairs are known, on synthetic metadata of 959,040 judgements of
58,960 prompts in 645 files with row groups of 1,000 rows, as in Pick-a-Pic v2. In a session the winner is compared with
a new image each time; 11% of the games are ties, and 2% judge a pair again. Every engine must find the same pairs.

Copy: from there to the end of the process (with report and manifest), on rows with random bytes instead of JPEGs,
170 kB each, in files of 1,487 rows. Runs alternate with a plain copy (shutil.copyfile and fsync of the same files).
Before each run the files are dropped from the page cache, if the system supports it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from synthetic import IMAGE_BYTES, ROWS, make_images, make_judgements

from ncp.common.processes import end_with_parent, tied

COLUMNS = ["caption", "created_at", "has_label", "best_image_uid", "image_0_uid", "image_1_uid", "label_0", "label_1"]
COLUMNS += ["ranking_id"]


# ---------------------------------------------------------------- other engines: each returns ranking ids


def pandas_prompts(folder: Path) -> list[int]:
    """A loop over prompts, with pandas operations inside."""
    kept = []
    for _, games in pandas_frame(folder).groupby("caption"):
        ties, wins = games[games.label_0 == 0.5], games[games.label_0 != 0.5]
        not_absolute = {*wins.loser, *ties.image_0_uid, *ties.image_1_uid}
        for uid in wins.winner.unique():
            if uid not in not_absolute:
                won = wins[wins.winner == uid].sort_values(["created_at", "ranking_id"])
                kept.append(won.ranking_id.iloc[-1])
    return kept


def pandas_rows(folder: Path) -> list[int]:
    """A loop over prompts, and within it over rows, with sets and dictionaries."""
    kept = []
    for _, games in pandas_frame(folder).groupby("caption"):
        latest: dict[str, Any] = {}
        not_absolute: set[str] = set()
        for game in games.itertuples():
            if game.label_0 == 0.5:
                not_absolute |= {game.image_0_uid, game.image_1_uid}
            else:
                not_absolute.add(game.loser)
                when = (game.created_at, game.ranking_id)
                latest[game.winner] = max(latest.get(game.winner, when), when)
        kept += [ranking_id for uid, (_, ranking_id) in latest.items() if uid not in not_absolute]
    return kept


def pandas_frame(folder: Path) -> Any:
    import pandas as pd

    frame = pd.concat([pd.read_parquet(file, columns=COLUMNS) for file in sorted(folder.iterdir())], ignore_index=True)
    frame["winner"] = frame.image_0_uid.where(frame.label_0 == 1, frame.image_1_uid)
    frame["loser"] = frame.image_1_uid.where(frame.label_0 == 1, frame.image_0_uid)
    return frame


def duckdb(folder: Path) -> list[int]:
    import duckdb as engine

    query = f"""
        with games as (select *, label_0 = 1 as first_wins, label_0 = 0.5 as tie from '{folder}/*.parquet'),
        sides as (
            select caption, image_0_uid as uid, first_wins and not tie as won, created_at, ranking_id from games
            union all
            select caption, image_1_uid, not first_wins and not tie, created_at, ranking_id from games)
        select max_by(ranking_id, (created_at, ranking_id)) from sides group by caption, uid having bool_and(won)"""
    return [row[0] for row in engine.sql(query).fetchall()]


def polars(folder: Path) -> list[int]:
    import polars as pl

    games = pl.scan_parquet(f"{folder}/*.parquet")
    sides = [
        games.select("caption", "created_at", "ranking_id", uid=f"image_{i}_uid", won=pl.col(f"label_{i}") == 1)
        for i in (0, 1)
    ]
    images = pl.concat(sides).group_by("caption", "uid")
    latest = images.agg(pl.col("won").all(), pl.col("ranking_id").sort_by("created_at", "ranking_id").last())
    return latest.filter("won").select("ranking_id").collect()["ranking_id"].to_list()


ENGINES: dict[str, Callable[[Path], list[int]] | None] = {
    "pyarrow": None,  # filter_pickapic.py itself
    "pandas-prompts": pandas_prompts,
    "pandas-rows": pandas_rows,
    "duckdb": duckdb,
    "polars": polars,
}


# ---------------------------------------------------------------- timing


def launch(*arguments: object) -> tuple[float, float, float]:
    """Runs Python in a new process; (seconds until it prints the number of images, then to its end, peak MB)."""
    start = time.perf_counter()
    command = tied([sys.executable, *arguments])
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        decided = None
        assert process.stdout and process.stderr
        for line in process.stdout:
            if line.startswith("images"):
                decided = time.perf_counter() - start
        errors = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        total = time.perf_counter() - start
    if process.returncode or decided is None:
        sys.exit(f"error: {' '.join(command)} failed: {errors.strip()[-400:]}")
    return decided, total - decided, usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def decision(folder: Path, engines: list[str], rounds: int) -> dict[str, Any]:
    """Seconds and peak memory of each engine, which must agree; pandas runs once, the others `rounds` times."""
    figures: dict[str, Any] = {}
    expected = None
    for name in engines:
        times = []
        for _ in range(1 if name.startswith("pandas") else rounds):
            shutil.rmtree(folder / "out", ignore_errors=True)
            forget(folder / "data")
            if name == "pyarrow":
                inputs = ["--dataset_name", folder / "data", "--output_dir", folder / "out", "--metadata_only"]
                times.append(launch("filter_pickapic.py", *inputs))
                found = pq.read_table(folder / "out/data", columns=["ranking_id"])["ranking_id"].to_numpy()
            else:
                times.append(launch(__file__, "--engine", name, folder / "data", folder / "found.npy"))
                found = np.load(folder / "found.npy")
        expected = np.sort(found) if expected is None else expected
        assert np.array_equal(np.sort(found), expected), f"{name} finds other pairs than {engines[0]}"
        seconds = [t[0] for t in times]
        memory = max(t[2] for t in times)
        figures[name] = {"seconds": statistics.median(seconds), "all": seconds, "peak_mb": memory, "pairs": len(found)}
        ratio = figures[name]["seconds"] / figures[engines[0]]["seconds"]
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        print(f"{name:16}{statistics.median(seconds):>9.2f} s  {spread:>16}{memory:>9.0f} MB{ratio:>8.1f}x", flush=True)
    return figures


def plain_copy(source: Path, target: Path) -> float:
    """Seconds to copy the files one by one, each with fsync."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    forget(source)
    start = time.perf_counter()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, target / file.name)
        with open(target / file.name, "rb+") as copied:
            os.fsync(copied.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def copies(folder: Path, rows: int, rounds: int) -> dict[str, Any]:
    figures = {}
    cases = {"9% kept": (0.09, False), "9%, shuffled": (0.09, True), "all": (1.0, False), "all, shuffled": (1.0, True)}
    for name, (kept, shuffled) in cases.items():
        shutil.rmtree(folder, ignore_errors=True)
        in_a_process(make_images, folder / "data", rows, kept, shuffled)
        size = sum(file.stat().st_size for file in (folder / "data").iterdir()) / 1e9
        plain, ours, memory = [], [], 0.0
        for _ in range(rounds):
            plain.append(plain_copy(folder / "data", folder / "plain"))
            shutil.rmtree(folder / "out", ignore_errors=True)
            forget(folder / "data")
            _, seconds, peak = launch(
                "filter_pickapic.py", "--dataset_name", folder / "data", "--output_dir", folder / "out"
            )
            ours.append(seconds)
            memory = max(memory, peak)
        figures[name] = {"gigabytes": size, "seconds": ours, "plain_seconds": plain, "peak_mb": memory}
        ratio = [p / o for p, o in zip(plain, ours, strict=True)]
        print(
            f"{name:16}{statistics.median(ours):>9.2f} s{statistics.median(plain):>9.2f} s"
            f"{statistics.median(ratio):>9.0%}  {min(ratio):>7.0%} to {max(ratio):.0%}{memory:>9.0f} MB",
            flush=True,
        )
    return figures


def forget(folder: Path) -> None:
    """Asks the system to drop these files from the page cache, if it can."""
    os.sync()
    for file in folder.iterdir():
        if hasattr(os, "posix_fadvise"):
            with open(file, "rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _worker(function: Callable[..., Any], *arguments: Any) -> None:
    end_with_parent()
    function(*arguments)


def in_a_process(function: Callable[..., Any], *arguments: Any) -> None:
    """Calls `function` in another process, so that its memory is not counted for processes started from this one."""
    process = multiprocessing.get_context("spawn").Process(target=_worker, args=(function, *arguments))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"error: {function.__name__} failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS, help="judgements for the decision; 0: none")
    parser.add_argument(
        "--copy_rows", type=int, default=12000, help="rows with images for the copy, 340 kB each; 0: none"
    )
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["pyarrow", "pandas-prompts", "pandas-rows"])
    parser.add_argument("--rounds", type=int, default=5, help="repetitions, of which the median counts")
    parser.add_argument(
        "--folder", type=Path, help="where to put files, on the disk to measure; default: a temporary one"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--engine", nargs=3, help=argparse.SUPPRESS)  # name, folder, file: one engine, this process
    args = parser.parse_args()
    if args.engine:
        engine = ENGINES[args.engine[0]]
        assert engine is not None
        found = engine(Path(args.engine[1]))
        print("images", 2 * len(found), flush=True)
        np.save(args.engine[2], np.array(found))
        return
    figures: dict[str, Any] = {"cores": os.cpu_count()}
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        need = max(args.rows * 300, args.copy_rows * 2 * IMAGE_BYTES * 5)
        if (free := shutil.disk_usage(folder).free) < need:
            sys.exit(f"error: {folder} has {free / 1e9:.1f} GB free, {need / 1e9:.1f} are needed; lower --copy_rows")
        if args.rows:
            in_a_process(make_judgements, folder / "decision/data", args.rows)
            print(f"\n{'decision':16}{'median':>9}    {'range':>16}{'peak':>9}   {'to ' + args.engines[0]:>8}")
            figures["decision"] = decision(folder / "decision", args.engines, args.rounds)
        if args.copy_rows:
            print(f"\n{'copy':16}{'median':>9}  {'plain':>9}  {'rate':>7}  {'range':>7}  {'peak':>18}")
            figures["copy"] = copies(folder / "copy", args.copy_rows, args.rounds)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
