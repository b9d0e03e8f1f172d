"""Encodes a dataset's images and prompts once, so that training does not have to do it in every step.

    accelerate launch cache_latents.py --config configs/sdxl_ncp_dpo.yaml --cached_latents data/cache-sdxl
    accelerate launch train_ncp_dpo.py --config configs/sdxl_ncp_dpo.yaml --cached_latents data/cache-sdxl

It takes the config of any training script, so that the two cannot disagree. It writes into the folder `cached_latents`

- VAE moments of every distinct image, and of the mirrored image if `random_flip` is on: mean and log-variance in
  float16, so that training still samples the posterior;
- embeddings of every distinct prompt and of the empty one.

All processes share the work. Each shard of the cache is written atomically; a second run writes the missing ones.
The format is described in ncp/training/cache.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import ncp
import train_ncp_cpo
import train_ncp_dpo
import train_ncp_sft
from ncp.common.config import parse
from ncp.common.errors import UserError, run_program
from ncp.common.files import explain_write_errors, write_file
from ncp.common.lock import is_empty, one_writer
from ncp.common.processes import end_with_parent
from ncp.training import cache
from ncp.training.engine import make_accelerator
from ncp.training.images import Unreadable, decode_image, resize_crop_flip, unreadable
from ncp.training.inputs import PROMPTS_PER_PASS, embed_prompts, vae_moments
from ncp.training.models import load_pipe
from ncp.training.pairs import Pairs, open_pairs
from ncp.training.pipeline import Description, describe

PIXELS_PER_BATCH = 1024 * 1024  # one image for SDXL, four for SD 1.5, twice that with mirrored ones


@dataclass(kw_only=True)
class Config(train_ncp_dpo.Config, train_ncp_cpo.Config, train_ncp_sft.Config):
    """The keys of every training script."""


class Images(Dataset):
    """Distinct images by position: pixels uint8 (F, 3, R, R), mirrored image second, and time_ids (6,); or an error."""

    def __init__(self, config: Config, pairs: Pairs, places: np.ndarray):
        self.config, self.pairs, self.places = config, pairs, places
        self.side = [pairs.table.select_columns([f"jpg_{side}"]) for side in (0, 1)]

    def __getitem__(self, position: int) -> dict[str, Any]:
        row, side = self.places[position].tolist()
        resolution, flips = self.config.resolution, (False, True)[: 1 + self.config.random_flip]
        try:
            image = decode_image(self.side[side][row][f"jpg_{side}"])
        except Unreadable as error:
            if self.config.corrupt_images == "error":
                return {"error": unreadable(f"{self.pairs.source(row)}, jpg_{side}", error)}
            empty = np.zeros((len(flips), 3, resolution, resolution), np.uint8)
            return {"pixels": torch.from_numpy(empty), "time_ids": torch.zeros(6, dtype=torch.int32)}
        crops = [resize_crop_flip(image, resolution, np.array([0.5, 0.5]), flip) for flip in flips]
        pixels = torch.from_numpy(np.stack([c.pixels for c in crops])).permute(0, 3, 1, 2)
        return {"pixels": pixels, "time_ids": torch.tensor(crops[0].time_ids, dtype=torch.int32)}


def batches(images: Images, positions: list[int], config: Config) -> Iterator[dict[str, torch.Tensor]]:
    """Yields the images at these positions in small batches. Raises UserError for an unreadable image."""
    size = max(1, PIXELS_PER_BATCH // config.resolution**2)
    chunks = [positions[i : i + size] for i in range(0, len(positions), size)]
    loader = DataLoader(
        images,
        batch_sampler=chunks,
        collate_fn=collate,
        num_workers=config.dataloader_num_workers,
        worker_init_fn=end_with_run,
    )
    for batch in loader:
        if "error" in batch:
            raise UserError(batch["error"], everywhere=False)
        yield batch


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    errors = [s for s in samples if "error" in s]
    return errors[0] if errors else {k: torch.stack([s[k] for s in samples]) for k in samples[0]}


def end_with_run(worker: int) -> None:
    end_with_parent()


@torch.no_grad()
def encode_shard(pipe: Any, images: Images, positions: list[int], config: Config, bar: tqdm) -> dict[str, torch.Tensor]:
    """moments float16 (n, F, 2C, h, w) and time_ids int32 (n, 6) of the images at these positions."""
    moments, time_ids = [], []
    for batch in batches(images, positions, config):
        found = vae_moments(pipe.vae, batch["pixels"].flatten(0, 1)).half().cpu()
        if not found.isfinite().all():
            raise UserError(
                f"mixed_precision is {config.mixed_precision}, in which this VAE overflows; use bf16, or a VAE that is "
                "safe in fp16 (pretrained_vae_model_name_or_path)",
                everywhere=False,
            )
        moments.append(found.unflatten(0, batch["pixels"].shape[:2]))
        time_ids.append(batch["time_ids"])
        bar.update(len(batch["time_ids"]))
    return {"moments": torch.cat(moments), "time_ids": torch.cat(time_ids)}


def prompt_shard(pipe: Any, prompts: list[str], max_sequence_length: int, bar: tqdm) -> dict[str, torch.Tensor]:
    """text float16 (n, S, D) and, for SDXL and SD3, pooled float16 (n, P)."""
    parts = []
    for i in range(0, len(prompts), PROMPTS_PER_PASS):
        parts.append(embed_prompts(pipe, prompts[i : i + PROMPTS_PER_PASS], max_sequence_length))
        bar.update(len(parts[-1][0]))
    text, pooled = zip(*parts, strict=True)
    shard = {"text": torch.cat(text).half().cpu()}
    return shard if pooled[0] is None else {**shard, "pooled": torch.cat(pooled).half().cpu()}


def plan(config: Config, description: Description, kinds: dict[str, pa.Array]) -> dict[str, Any]:
    """The manifest without the files: fingerprint, number of entries, and entries per shard."""
    sizes = cache.sizes(config, description)
    return {
        "tool": "cache_latents",
        "version": ncp.__version__,
        "fingerprint": cache.fingerprint(config, description),
        "entries": {kind: len(values) for kind, values in kinds.items()},
        "per_shard": {kind: max(1, cache.SHARD_BYTES // sizes[kind]) for kind in kinds},
    }


def missing_shards(folder: Path, wanted: dict[str, Any], kinds: dict[str, pa.Array]) -> list[tuple[str, int]]:
    """(kind, number) of the shards that are missing. Raises UserError if the folder holds anything but this cache."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"cached_latents: {folder} is a file")
    if (folder / "manifest.json").exists():
        found = cache.read_cache_manifest(folder)
        if different := cache.differences(found["fingerprint"], wanted["fingerprint"]):
            raise UserError(f"cached_latents: {folder} was made with {different}; choose another folder")
        same = all(found.get(key) == wanted[key] for key in ("entries", "per_shard"))
        if not same or any(not cache.read_index(folder, kind).equals(kinds[kind]) for kind in kinds):
            raise UserError(f"cached_latents: {folder} was made for another dataset; choose another folder")
    elif folder.exists() and not is_empty(folder):
        raise UserError(f"cached_latents: {folder} holds something else; choose a new or empty folder")
    shards = [(kind, n) for kind in kinds for n in range(-(-wanted["entries"][kind] // wanted["per_shard"][kind]))]
    return [(kind, number) for kind, number in shards if not cache.shard_path(folder, kind, number).exists()]


def print_plan(
    config: Config, wanted: dict[str, Any], todo: int, sizes: dict[str, int], accelerator: Accelerator
) -> None:
    """Prints what will be written. Raises UserError if the disk has no room for it."""
    folder = Path(config.cached_latents or "").absolute()
    entries = wanted["entries"]
    done = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    need = sum(sizes[kind] * entries[kind] for kind in entries)
    left = max(0, need - done)
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.is_dir())).free
    flips = "both ways round" if config.random_flip else "one way round"
    for name, text in {
        "images": f"{entries['images']:,}, {flips}, {sizes['images'] / 2**10:,.0f} KiB each",
        "prompts": f"{entries['prompts']:,}, {sizes['prompts'] / 2**10:,.0f} KiB each",
        "disk": f"{need / 1e9:,.2f} GB, {left / 1e9:,.2f} GB of it still to write; {free / 1e9:,.0f} GB free",
        "work": f"{todo} files, {accelerator.num_processes} x {accelerator.device.type}, {accelerator.mixed_precision}",
        "output": str(folder),
    }.items():
        accelerator.print(f"{name:>16}: {text}")
    if left > free:
        raise UserError(f"cached_latents: {folder} needs {left / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free there")


def write_shards(
    todo: list[tuple[str, int]],
    wanted: dict[str, Any],
    kinds: dict[str, pa.Array],
    images: Images,
    pipe: Any,
    accelerator: Accelerator,
) -> None:
    """Encodes and writes this process's share of the missing shards."""
    config, folder = images.config, Path(images.config.cached_latents or "")
    spans = {}
    for kind, number in todo[accelerator.process_index :: accelerator.num_processes]:
        size = wanted["per_shard"][kind]
        spans[kind, number] = range(number * size, min((number + 1) * size, len(kinds[kind])))
    quiet = not accelerator.is_main_process
    with tqdm(total=sum(map(len, spans.values())), desc="images and prompts", disable=quiet) as bar:
        for (kind, number), span in spans.items():
            if kind == "images":
                tensors = encode_shard(pipe, images, list(span), config, bar)
            else:
                prompts = kinds[kind][span.start : span.stop].to_pylist()
                tensors = prompt_shard(pipe, prompts, config.max_sequence_length, bar)
            write_file(cache.shard_path(folder, kind, number), partial(save_file, tensors))


def main(argv: Sequence[str] | None = None) -> None:
    config = replace(parse(Config, argv, description=__doc__), report_to="none")
    if config.cached_latents is None:
        raise UserError("'cached_latents' is missing (the folder to write)")
    folder = Path(config.cached_latents)
    description = describe(config)
    pairs = open_pairs(replace(config, cached_latents=None))  # with its images
    kinds, places = cache.contents(pairs)
    wanted = plan(config, description, kinds)
    accelerator = make_accelerator(config)
    todo = missing_shards(folder, wanted, kinds)
    if not todo and "files" in cache.read_cache_manifest(folder):
        accelerator.print(f"{folder} already holds this cache; nothing to do")
        return
    print_plan(config, wanted, len(todo), cache.sizes(config, description), accelerator)
    refused = explain_write_errors(f"cached_latents: cannot write to {folder}", everywhere=False)
    with refused, one_writer(folder, processes=accelerator):
        if missing_shards(folder, wanted, kinds) != todo:
            raise UserError(f"cached_latents: another run has just written to {folder}; start again")
        accelerator.wait_for_everyone()  # all processes have checked the folder before one writes
        if accelerator.is_main_process and not (folder / "manifest.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            for kind, column in cache.INDEX_COLUMNS.items():
                write_file(folder / f"{kind}.parquet", partial(pq.write_table, pa.table({column: kinds[kind]})))
            cache.write_cache_manifest(folder, wanted)
        pipe = load_pipe(config, description, accelerator)
        accelerator.wait_for_everyone()
        write_shards(todo, wanted, kinds, Images(config, pairs, places), pipe, accelerator)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.parquet")])
            cache.write_cache_manifest(folder, {**wanted, "files": {f.name: f.stat().st_size for f in files}})
    accelerator.print(f"wrote {folder}")


if __name__ == "__main__":
    run_program(main)
