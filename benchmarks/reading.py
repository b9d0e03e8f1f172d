"""Compares two sources of training images: the Arrow copy of `datasets`, and the parquet files read in place.

    python benchmarks/reading.py [--gigabytes 12] [--folder FOLDER] [--json FILE]

The data are synthetic: rows with Pick-a-Pic's columns and different JPEGs of 512 x 512 and 170 kB, as written by
filter_pickapic.py, in row groups of 10, 100 and 1000 rows. The loader of the training scripts (batches of 8 pairs in
shuffled order, decoded at 512) runs on them with 0, 1 and 2 workers, each time in a new process and with an empty page
cache. `only read` leaves out the decoding; its processor time does not depend on the machine's other load.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from synthetic import IMAGE_BYTES

from ncp.common.config import parse
from ncp.common.processes import tied

SIDE, PAIRS = 512, 8
IMAGES = ["jpg_0", "jpg_1"]
COLUMNS = ["caption", "image_0_uid", "image_1_uid", *IMAGES, "label_0", "label_1"]


# ---------------------------------------------------------------- one arm, in its own process


def measure(folder: Path, arm: str, workers: int, decode: bool, seconds: float) -> dict[str, float]:
    from diffusers import DDPMScheduler

    from ncp import ddpm
    from ncp.training.pairs import Pairs
    from ncp.training.pipeline import Timesteps
    from ncp.training.rows import open_rows
    from ncp.training.samples import PairDataset, loader
    from ncp.training.tables import copied
    from train_ncp_dpo import Config

    argv = ["--pretrained_model_name_or_path", "none", "--output_dir", "none", "--dataset_name", str(folder / "data")]
    argv += ["--cache_dir", str(folder / "arrow"), "--resolution", str(SIDE), "--train_batch_size", str(PAIRS)]
    config = parse(Config, [*argv, "--dataloader_num_workers", str(workers), "--max_train_steps", "100000"])
    start, files = time.perf_counter(), sorted((folder / "data").glob("*.parquet"))
    table = copied(config, files, COLUMNS) if arm == "arrow" else open_rows(files, COLUMNS)
    pairs = Pairs(table, np.arange(len(table)), np.zeros(len(table), np.int64), files, [], {})
    opened = time.perf_counter() - start
    if not decode:
        order = np.random.default_rng(0).permutation(len(pairs)).tolist()
        cpu, start, read = time.process_time(), time.perf_counter(), 0
        while time.perf_counter() - start < seconds and read < len(order):
            row = pairs.table[order[read]]
            assert len(row["jpg_0"]) + len(row["jpg_1"]) > IMAGE_BYTES
            read += 1
        wall, cpu, images = time.perf_counter() - start, time.process_time() - cpu, 2 * read
        return {
            "open_s": opened, "images_per_s": images / wall, "cpu_ms_per_image": 1000 * cpu / images,
            "disk_mb_per_image": disk_mb() / images,
        }  # fmt: skip
    dataset = PairDataset(
        config, pairs, (4, SIDE // 8, SIDE // 8), Timesteps.of(ddpm, DDPMScheduler(), config.k), images=2
    )
    start = time.perf_counter()
    batches = iter(loader(dataset, config, 0, 0, 1))
    next(batches)
    first = time.perf_counter() - start
    start, images = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        images += len(next(batches)["pixels"])
    return {"open_s": opened, "first_batch_s": first, "images_per_s": images / (time.perf_counter() - start)}


def disk_mb() -> float:
    """The amount that this process has read from the disk, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_inblock * 512 / 1e6


# ---------------------------------------------------------------- all arms


def jpegs() -> list[bytes]:
    """JPEGs of 512 x 512, about 170 kB each."""
    rng, found = np.random.default_rng(0), []
    for _ in range(16):
        coarse = rng.integers(0, 256, (SIDE // 4, SIDE // 4, 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(image + rng.integers(-9, 10, image.shape), 0, 255).astype(np.uint8)
        for quality in range(98, 40, -2):
            buffer = io.BytesIO()
            Image.fromarray(noisy).save(buffer, "JPEG", quality=quality)
            if buffer.tell() <= IMAGE_BYTES:
                break
        found.append(buffer.getvalue())
    return found


def make(folder: Path, gigabytes: float, rows_per_group: int) -> None:
    """Writes files of about 500 MB. Bytes after a JPEG's end, which decoders ignore, make each image different."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pictures = jpegs()
    per_file = max(rows_per_group, 1000)
    number = 0
    for k in range(max(1, round(gigabytes * 1e9 / (2 * IMAGE_BYTES * per_file)))):
        with pq.ParquetWriter(folder / f"train-{k:05d}.parquet", schema(), **options()) as writer:
            for _ in range(per_file // rows_per_group):
                rows = range(number, number + rows_per_group)
                number += rows_per_group
                writer.write_table(
                    pa.table(
                        {
                            "caption": [f"prompt {n}" for n in rows],
                            **{f"image_{i}_uid": [f"{n}-{i}" for n in rows] for i in (0, 1)},
                            **{
                                f"jpg_{i}": [pictures[(2 * n + i) % 16] + f"{n:012d}{i}".encode() for n in rows]
                                for i in (0, 1)
                            },
                            "label_0": [1.0] * len(rows),
                            "label_1": [0.0] * len(rows),
                        },
                        schema=schema(),
                    )
                )


def schema() -> pa.Schema:
    kinds = {"caption": pa.string(), "image": pa.string(), "jpg": pa.binary(), "label": pa.float64()}
    return pa.schema([(name, kinds[name.split("_")[0]]) for name in COLUMNS])


def options() -> dict[str, Any]:
    """The options with which filter_pickapic.py writes images that do not repeat: pages of about 1 MB."""
    texts = [name for name in COLUMNS if name not in IMAGES]
    compression = {name: "none" if name in IMAGES else "zstd" for name in COLUMNS}
    return {"compression": compression, "use_dictionary": texts, "write_statistics": texts, "write_batch_size": 8}


def launch(folder: Path, arm: str, workers: int, decode: bool, seconds: float) -> dict[str, float]:
    """Runs `measure` in a new process, with none of the files in the page cache."""
    for file in folder.rglob("*"):
        if file.is_file() and hasattr(os, "posix_fadvise"):
            with open(file, "rb+") as handle:
                os.fsync(handle.fileno())
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    case = ["--arm", arm, workers, int(decode), "--seconds", seconds, "--folder", folder]
    said = subprocess.run(tied([sys.executable, __file__, *case]), cwd=ROOT, capture_output=True, text=True)
    if said.returncode:
        sys.exit(f"error: {arm}: {said.stderr[-800:]}")
    return json.loads(said.stdout.splitlines()[-1])


def size(folder: Path) -> float:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=12, help="of parquet; the disk needs twice that")
    parser.add_argument("--seconds", type=float, default=15, help="to measure each case")
    parser.add_argument("--folder", type=Path, help="where to put files, on the disk to measure")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--arm", nargs=3, help=argparse.SUPPRESS)  # one case, this process
    args = parser.parse_args()
    if args.arm:
        arm, workers, decode = args.arm
        print(json.dumps(measure(args.folder, arm, int(workers), decode == "1", args.seconds)))
        return
    figures: dict[str, Any] = {"cores": os.cpu_count()}
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        free = shutil.disk_usage(folder).free
        if free < 2.2e9 * args.gigabytes:
            sys.exit(f"error: {folder} has {free / 1e9:.0f} GB free, {2.2 * args.gigabytes:.0f} are needed")
        print("images per second: only read; then decoded, with 0, 1 and 2 workers (seconds to the first batch)")
        arms = {"arrow": 100, "groups of 10": 10, "groups of 100": 100, "groups of 1000": 1000}
        for arm, rows_per_group in arms.items():
            make(folder / "data", args.gigabytes, rows_per_group)
            shutil.rmtree(folder / "arrow", ignore_errors=True)
            found: dict[str, Any] = {"parquet_gb": size(folder / "data")}
            if arm == "arrow":
                found["copy_s"] = launch(folder, arm, 0, False, 0.1)["open_s"]
            found["copy_gb"] = size(folder / "arrow")
            found["read"] = launch(folder, arm, 0, False, args.seconds)
            found["decoded"] = [launch(folder, arm, workers, True, args.seconds) for workers in (0, 1, 2)]
            figures[arm] = found
            cases = "".join(f"{c['images_per_s']:>7.0f} ({c['first_batch_s']:.1f} s)" for c in found["decoded"])
            read = found["read"]
            print(
                f"{arm:<16}{read['images_per_s']:>7.0f}{cases}   open {read['open_s']:.1f} s, "
                f"{found['parquet_gb']:.1f} GB and {found['copy_gb']:.1f} GB beside it; reading an image takes "
                f"{read['cpu_ms_per_image']:.1f} ms of a processor, {read['disk_mb_per_image']:.2f} MB from the disk",
                flush=True,
            )
        print(f"making the Arrow copy took {figures['arrow']['copy_s']:.0f} s")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
