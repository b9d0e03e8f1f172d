"""What the cache saves: times a training step from pixels and one from the cache, and the loading of images.

    python benchmarks/cache.py [--steps 8] [--json FILE]

Step: NCP-DPO on the embedded pipeline (configs/tiny_ncp_dpo.yaml on tiny/data), alternating between steps from pixels
and from the cache; medians. Loading: JPEGs of Pick-a-Pic's sizes, decoded, cropped and collated by 0, 1 and 2 workers.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import DDPMScheduler
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import train_ncp_dpo
from ncp import ddpm
from ncp.common.config import parse
from ncp.common.processes import tied
from ncp.training import cache
from ncp.training.engine import make_accelerator, make_optimizer
from ncp.training.models import load_models
from ncp.training.pairs import Pairs, open_pairs
from ncp.training.pipeline import Timesteps, describe
from ncp.training.samples import PairDataset, loader, to_device


def arm(folder: Path, cached: bool, batch: int) -> tuple[train_ncp_dpo.Config, Pairs, cache.Cache | None]:
    argv = ["--config", str(ROOT / "configs/tiny_ncp_dpo.yaml"), "--dataset_name", str(ROOT / "tiny/data")]
    argv += ["--pretrained_model_name_or_path", str(ROOT / "tiny/model"), "--cache_dir", str(folder / "arrow")]
    argv += ["--output_dir", str(folder / "out"), "--report_to", "none", "--train_batch_size", str(batch)]
    argv += ["--cached_latents", str(folder / "cached") if cached else "null"]
    config = parse(train_ncp_dpo.Config, argv)
    pairs = open_pairs(config)
    return config, pairs, cache.open_cache(config, describe(config), pairs)


def step_times(folder: Path, steps: int, batch: int) -> dict[str, list[float]]:
    """Seconds of each step by arm, after a warm-up step: fetch a batch, loss, backward, AdamW."""
    runs: dict[str, Any] = {}
    for name in ("pixels", "cache"):
        config, pairs, opened = arm(folder, name == "cache", batch)
        description = describe(config)
        accelerator = make_accelerator(config)
        m = load_models(config, description, accelerator)
        optimizer = make_optimizer(config, m.lora_parameters)
        unet, optimizer = accelerator.prepare(m.unet, optimizer)
        shape = description.latent_shape(config.resolution)
        dataset = PairDataset(config, pairs, shape, description.timesteps(config.k), images=2, cache=opened)
        batches = iter(loader(dataset, config, 0, 0, 1))
        runs[name] = (config, m, unet, optimizer, accelerator, batches)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(steps + 1):
        for name, (config, m, unet, optimizer, accelerator, batches) in runs.items():
            start = time.perf_counter()
            losses, _ = train_ncp_dpo.ncp_dpo(m, unet, to_device(next(batches), accelerator), config)
            accelerator.backward(losses.mean())
            optimizer.step()
            optimizer.zero_grad()
            times[name].append(time.perf_counter() - start)
    return {name: seconds[1:] for name, seconds in times.items()}


def photographs(folder: Path, side: int, rows: int) -> Path:
    """Writes rows like Pick-a-Pic's with smooth random JPEGs of side x side, with realistic bytes per pixel."""
    rng, jpegs = np.random.default_rng(0), []
    for _ in range(8):
        coarse = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        jpegs.append(buffer.getvalue())
    table = {
        "caption": ["a prompt"] * rows,
        **{f"image_{i}_uid": [f"{k}-{i}" for k in range(rows)] for i in (0, 1)},
        **{f"jpg_{i}": [jpegs[(2 * k + i) % 8] for k in range(rows)] for i in (0, 1)},
        "label_0": [1.0] * rows,
        "label_1": [0.0] * rows,
    }
    file = folder / f"images-{side}.parquet"
    pq.write_table(pa.table(table), file)
    return file


def loading(folder: Path, side: int, workers: int, rows: int) -> tuple[float, float]:
    """(images per second of the pixel loader at this side, kB of a JPEG)."""
    config, *_ = arm(folder, False, batch=8)
    config.dataset_name, config.resolution = str(photographs(folder, side, rows)), side
    config.dataloader_num_workers, config.max_train_steps = workers, rows // 8
    pairs = open_pairs(config)
    dataset = PairDataset(
        config, pairs, (4, side // 8, side // 8), Timesteps.of(ddpm, DDPMScheduler(), config.k), images=2
    )
    batches = iter(loader(dataset, config, 0, 0, 1))
    next(batches)  # the workers have started
    start, images = time.perf_counter(), 0
    for batch in batches:
        images += len(batch["pixels"])
    return images / (time.perf_counter() - start), len(pairs.table[0]["jpg_0"]) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each arm")
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--rows", type=int, default=128, help="rows for the loader, two images each")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, size = Path(temporary), args.train_batch_size
        config = ["--config", "configs/tiny_ncp_dpo.yaml", "--dataset_name", "tiny/data"]
        config += ["--cached_latents", str(folder / "cached"), "--cache_dir", str(folder / "arrow")]
        start = time.perf_counter()
        command = tied([sys.executable, "cache_latents.py", *config])
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        figures: dict[str, Any] = {"make_cache_s": time.perf_counter() - start, "threads": torch.get_num_threads()}
        times = step_times(folder, args.steps, size)
        for name, seconds in times.items():
            figures[f"{name}_step_s"] = statistics.median(seconds)
            print(f"step from {name:<8} {figures[f'{name}_step_s']:.3f} s   ({size} pairs)")
        ratios = [c / p for c, p in zip(times["cache"], times["pixels"], strict=True)]
        figures["ratio"] = statistics.median(ratios)
        print(f"cache / pixels     {figures['ratio']:.2f}   ({min(ratios):.2f} to {max(ratios):.2f})")
        print("\nimages/s of the pixel loader\nside    kB  " + "".join(f"{w:>3} workers" for w in (0, 1, 2)))
        for side in (64, 512, 1024):
            rates = []
            for workers in (0, 1, 2):
                rate, kilobytes = loading(folder, side, workers, args.rows)
                rates.append(rate)
            figures[f"images_per_s_{side}"] = rates
            print(f"{side:<5}{kilobytes:>5.0f}  " + "".join(f"{r:>11.0f}" for r in rates))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
