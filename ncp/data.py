"""Preference pairs from Pick-a-Pic parquet, as a pure function of (seed, position).

A run is a sequence of positions n = 0, 1, 2, ...: step s of a run with effective batch E takes the
positions [sE, (s+1)E), whatever the number of processes. Position n decides everything random about
its sample: which pair, crop, flip, dropped prompt, timestep and all noise. So a run does not depend
on how it is split over processes or workers, and continues exactly from any step.
"""

from __future__ import annotations

import io
import json
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

from ncp import hub
from ncp.config import TrainingConfig, UserError
from ncp.files import local_files
from ncp.judgements import Judgements, read_judgements
from ncp.processes import end_with_parent

if TYPE_CHECKING:
    from ncp.cache import Cache

COLUMNS = ("caption", "image_0_uid", "image_1_uid", "jpg_0", "jpg_1", "label_0", "label_1")
OPTIONAL = ("has_label", "best_image_uid")  # looked at where a dataset has them
KINDS = {  # by the first word of the name
    "caption": "text",
    "image": "text",
    "best": "text",
    "label": "number",
    "has": "true or false",
    "jpg": "binary",
}
DROPPED = {  # the faults of `Judgements` in words
    "missing_caption": "without a caption",
    "missing_uid": "without an image's uid",
    "unlabeled": "without a label",
    "malformed_labels": "with labels other than 1 and 0, 0 and 1, 0.5 and 0.5",
    "same_image": "of an image against itself",
    "contradictory_best_image_uid": "whose best_image_uid is not the winner's",
    "tie": "ties",
}
FORMATS = ("JPEG", "PNG", "WEBP")  # Pillow's other readers can do more than read pixels
ORDER, SAMPLE, HELDOUT = 0, 1, 2  # streams of randomness


# ---------------------------------------------------------------- reading


def check_columns(files: list[Path], columns: tuple[str, ...]) -> tuple[list[int], list[str]]:
    """(rows per parquet file, the OPTIONAL columns that they have).

    Raises UserError naming the first file that is unreadable, or lacks a column or an optional one of the first's.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[int] = []
    optional: list[str] = []
    for file in files:
        try:
            metadata = pq.read_metadata(file)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file}: not a readable parquet file ({str(error).splitlines()[0]})") from None
        missing = [c for c in columns if c not in metadata.schema.names]
        if missing:
            raise UserError(
                f"{file}: column {', '.join(missing)} is missing; expected Pick-a-Pic's: {', '.join(columns)}"
            )
        has = [c for c in OPTIONAL if c in metadata.schema.names]
        if rows and has != optional:
            odd = ", ".join(sorted(set(has) ^ set(optional)))
            raise UserError(f"{file}: column {odd} is there in some files and missing in others, such as {files[0]}")
        rows.append(metadata.num_rows)
        optional = has
    return rows, optional


def check_kinds(table: Any, name: str) -> None:
    """Raises UserError naming the first column that is not text, a number or bytes as it should be."""
    import pyarrow.types as pt

    tests = {
        "text": lambda t: pt.is_string(t) or pt.is_large_string(t),
        "number": lambda t: pt.is_floating(t) or pt.is_integer(t),
        "binary": lambda t: pt.is_binary(t) or pt.is_large_binary(t),
        "true or false": pt.is_boolean,
    }
    for field in table.features.arrow_schema:
        if not tests[kind := KINDS[field.name.split("_")[0]]](field.type):
            raise UserError(f"{name}: column {field.name} is {field.type}; expected {kind}")


@dataclass
class Pairs:
    """Decisive judgements of a dataset: `rows` of `table`, whose winner is image `winner` (0 or 1).

    The last `heldout` of them never train and are not in its length. `source(row)` names where a row came from.
    `dropped` counts the other rows of `table`, by reason. `manifest` is filter_pickapic.py's, if it made the dataset.
    """

    table: Any
    rows: np.ndarray
    winner: np.ndarray
    files: list[Path]
    file_rows: list[int]
    dropped: dict[str, int]
    manifest: dict[str, Any] | None = None
    heldout: int = 0

    def __len__(self) -> int:
        return len(self.rows) - self.heldout

    def source(self, row: int) -> str:
        if not self.files:
            return f"row {row}"
        ends = np.cumsum(self.file_rows)
        file = int(np.searchsorted(ends, row, side="right"))
        return f"{self.files[file]} row {row - (ends[file] - self.file_rows[file])}"

    def name(self, index: int) -> dict[str, str]:
        """Where pair `index` is, and the uids of its winner and loser."""
        number, winner = int(self.rows[index]), int(self.winner[index])
        row = self.table[number]
        uids = [str(row[f"image_{side}_uid"]) for side in (winner, 1 - winner)]
        return {"source": self.source(number), "winner": uids[0], "loser": uids[1]}


def open_pairs(config: TrainingConfig) -> Pairs:
    """The decisive pairs of the configured dataset; rows that filter_pickapic.py would call faulty never train.

    With `cached_latents` the image columns are not read and need not be there. Raises UserError if the dataset is
    missing or unreadable, lacks a column, differs from its manifest, or has too few decisive pairs.
    """
    import datasets
    import pyarrow as pa

    columns = tuple(c for c in COLUMNS if config.cached_latents is None or not c.startswith("jpg"))
    local = local_files(config.dataset_name, config.dataset_split)
    files = list(local.values()) if local else None
    file_rows, optional = check_columns(files, columns) if files else ([], [])
    manifest = read_manifest(Path(config.dataset_name)) if files else None
    datasets.disable_progress_bars()
    try:
        if files:
            table = datasets.load_dataset(
                "parquet",
                data_files={"train": [str(f) for f in files]},
                split="train",
                cache_dir=config.cache_dir,
                columns=[*columns, *optional],
            )
        else:
            table = datasets.load_dataset(config.dataset_name, split=config.dataset_split, cache_dir=config.cache_dir)
    except Exception as error:  # datasets raises many kinds for a hub that does not answer
        raise UserError(
            f"dataset_name: '{config.dataset_name}' is no local folder, and loading it failed: {hub.reason(error)}"
        ) from None
    missing = [c for c in columns if c not in table.column_names]
    if missing:
        raise UserError(f"{config.dataset_name}: column {', '.join(missing)} is missing; expected {', '.join(columns)}")
    table = table.select_columns([*columns, *(c for c in OPTIONAL if c in table.column_names)])
    check_kinds(table, config.dataset_name)
    texts = table.select_columns([c for c in table.column_names if not c.startswith("jpg")]).with_format("arrow")[:]
    if manifest and manifest["options"].get("best_image_uid") == "ignore" and "best_image_uid" in texts.column_names:
        texts = texts.drop_columns(["best_image_uid"])
    try:
        said = read_judgements(texts)
    except pa.ArrowInvalid:
        raise UserError(f"{config.dataset_name}: a caption or uid is not valid UTF-8") from None
    rows, winner, dropped = decisive(said)
    if not len(rows):
        reasons = ", ".join(f"{v} {k}" for k, v in dropped.items())
        raise UserError(f"{config.dataset_name}: not a single decisive pair among {len(table)} rows ({reasons})")
    caption, images = said.caption[rows], np.stack([said.uid_0, said.uid_1], axis=1)[rows]
    train, held = hold_out(caption, images, config.heldout_pairs)
    if not len(train):
        raise UserError(
            f"heldout_pairs is {config.heldout_pairs}; {config.dataset_name} has {len(rows)} decisive pairs of "
            f"{len(np.unique(caption))} prompts; beside so many held-out prompts and their images none is left to train"
        )
    order = np.concatenate([train[: config.max_train_samples], held])
    left_out = {
        "set aside with a prompt or image that is held out": len(rows) - len(train) - len(held),
        "beyond max_train_samples": len(train) + len(held) - len(order),
    }
    dropped |= {reason: count for reason, count in left_out.items() if count}
    table = table.select_columns(list(columns))
    return Pairs(table, rows[order], winner[order], files or [], file_rows, dropped, manifest, heldout=len(held))


def hold_out(caption: np.ndarray, images: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(training pairs, held-out pairs), indices of pairs that share neither a caption nor an image.

    caption (P,) and images (P, 2) are integer codes. Held out is the middle pair of each of `count` captions, evenly
    spaced in order of first appearance. The other pairs of these captions or images are in neither set. With as many
    captions as that or fewer, no pair is left to train, and none is held out.
    """
    captions, first = np.unique(caption, return_index=True)
    if count >= len(captions):
        return np.arange(0), np.arange(0)
    spaced = (2 * np.arange(count) + 1) * len(captions) // (2 * max(count, 1))
    chosen = captions[np.argsort(first)][spaced]
    by_caption = np.argsort(caption, kind="stable")
    begin, end = (np.searchsorted(caption[by_caption], chosen, side) for side in ("left", "right"))
    held = by_caption[(begin + end) // 2]
    shared = np.isin(caption, chosen) | np.isin(images, images[held]).any(axis=1)
    return np.flatnonzero(~shared), held


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest.json that filter_pickapic.py left in a dataset's folder, or None if there is none.

    Raises UserError if it cannot be read, or if a file of the dataset is not as it was written.
    """
    file = folder / "manifest.json"
    if not file.is_file():
        return None
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if manifest.get("tool") != "filter_pickapic":
            return None
        sizes = {output["file"]: output["size"] for output in manifest["outputs"]}
        describe_manifest(manifest)
    except (ValueError, OSError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file}: not a readable manifest of filter_pickapic.py") from None
    for name, size in sizes.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise UserError(f"{folder / name}: missing or changed since filter_pickapic.py wrote it; filter again")
    return manifest


def describe_manifest(manifest: dict[str, Any]) -> str:
    """How a dataset was filtered, in a line."""
    rows, pairs = manifest["rows"], manifest["pairs"]
    return (
        f"rule {manifest['options']['rule']}: {pairs['total']:,} pairs of {rows['input']:,} rows of "
        f"{manifest['dataset_name']}, {pairs['unique_prompts']:,} prompts, {pairs['images']:,} images "
        f"(filter_pickapic {manifest['version']}, pairs {pairs['sha256'][:12]})"
    )


def decisive(said: Judgements) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """(row numbers, winner 0 or 1, counts of the other rows by their first fault) of rows that name a better image."""
    left = np.ones(len(said.tie), bool)
    dropped = {}
    for reason, hit in {**said.faults, "tie": said.tie}.items():
        if count := int((hit & left).sum()):
            dropped[DROPPED[reason]] = count
        left &= ~hit
    rows = np.flatnonzero(left)
    return rows, (~said.first_wins[rows]).astype(np.int64), dropped


# ---------------------------------------------------------------- samples


class PairDataset(Dataset):
    """Training samples by position n.

    Sample: `pixels` uint8 (2, 3, R, R) winner first, or (1, 3, R, R) without losers; `time_ids` (2, 6) original
    size, crop, target size in pixels (height before width), each image's or fixed; `prompt`; `timestep` int64; and
    standard normal noise float32 (C, h, w): `eps`, one per pair; `z` and `posterior`, (2, C, h, w), one per image.
    With a cache, instead of pixels and prompt, what `Cache.pair` gives. Or `error`, a line.
    """

    def __init__(
        self,
        config: TrainingConfig,
        pairs: Pairs,
        latent_shape: tuple[int, int, int],
        num_timesteps: int,
        losers: bool,
        cache: Cache | None = None,
    ):
        self.config, self.pairs, self.latent_shape, self.num_timesteps = config, pairs, latent_shape, num_timesteps
        self.images, self.cache = 2 if losers else 1, cache
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def pair_index(self, position: int) -> int:
        """Which pair stands at a position: each epoch is a permutation drawn from (seed, epoch)."""
        epoch, offset = divmod(position, len(self.pairs))
        if self._order[0] != epoch:
            seed = np.random.SeedSequence([self.config.seed, ORDER, epoch])
            self._order = (epoch, np.random.default_rng(seed).permutation(len(self.pairs)))
        return int(self._order[1][offset])

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self._sample([SAMPLE, position], self.pair_index(position), range(len(self.pairs)))

    def heldout(self, k: int) -> dict[str, Any]:
        """Held-out sample k, the same at every call; the timesteps of all are spread evenly."""
        first, count = self.config.first_timestep, self.pairs.heldout
        held = range(len(self.pairs), len(self.pairs) + count)
        timestep = first + (2 * k + 1) * (self.num_timesteps - first) // (2 * count)
        return self._sample([HELDOUT, k], held[k], held) | {"timestep": torch.tensor(timestep)}

    def _sample(self, stream: list[int], index: int, among: range) -> dict[str, Any]:
        """Pair `index`, or the next readable one of `among`, with the randomness of a stream."""
        config = self.config
        rng = np.random.default_rng(np.random.SeedSequence([config.seed, *stream]))
        flip = config.random_flip and rng.random() < 0.5
        place = rng.random(2)  # drawn in any case: what follows shall not depend on how images are cropped
        drop_prompt = rng.random() < config.proportion_empty_prompts
        timestep = int(rng.integers(config.first_timestep, self.num_timesteps))
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))

        skipped = 0
        while True:
            try:
                if self.cache is not None:
                    content = self.cache.pair(index, flip, drop_prompt, self.images)
                else:
                    content = self._pixels(index, flip, place, drop_prompt)
                break
            except CorruptImage as error:
                skipped += 1
                if config.corrupt_images == "error" or skipped == len(among):
                    return {"error": str(error)}
                index = among[(index + 1 - among.start) % len(among)]
        if config.time_ids == "fixed":
            fixed = [config.resolution, config.resolution, 0, 0, config.resolution, config.resolution]
            content["time_ids"] = torch.tensor([fixed] * self.images)
        return {
            **content,
            "pair": index,
            "skipped": skipped,
            "timestep": torch.tensor(timestep),
            "eps": torch.randn(self.latent_shape, generator=generator),
            "z": torch.randn((2, *self.latent_shape), generator=generator)[: self.images],
            "posterior": torch.randn((2, *self.latent_shape), generator=generator)[: self.images],
        }

    def _pixels(self, index: int, flip: bool, place: np.ndarray, drop_prompt: bool) -> dict[str, Any]:
        number = int(self.pairs.rows[index])
        row = self.pairs.table[number]
        winner = int(self.pairs.winner[index])
        place = np.array([0.5, 0.5]) if self.config.center_crop else place
        crops = []
        for side in (winner, 1 - winner)[: self.images]:
            try:
                crops.append(resize_crop_flip(decode(row[f"jpg_{side}"]), self.config.resolution, place, flip))
            except Unreadable as error:
                where = f"{self.pairs.source(number)}, jpg_{side}, uid {row[f'image_{side}_uid']}"
                raise CorruptImage(unreadable(where, error)) from None
        return {
            "prompt": "" if drop_prompt else row["caption"],
            "pixels": torch.stack([torch.from_numpy(c.pixels) for c in crops]).permute(0, 3, 1, 2),
            "time_ids": torch.tensor([c.time_ids for c in crops]),
        }


class Unreadable(Exception):
    """Bytes that are no image; the message says why."""


class CorruptImage(Exception):
    """An image that cannot be decoded; the message names file, row and uid."""


def unreadable(where: str, error: Exception) -> str:
    return f"{where}: unreadable image ({error}); corrupt_images: skip goes on without it"


@dataclass
class Crop:
    pixels: np.ndarray  # (R, R, 3) uint8
    time_ids: tuple[int, int, int, int, int, int]  # SDXL's micro-conditioning


def decode(data: bytes) -> Image.Image:
    """An RGB image from encoded bytes, upright, 8 bits deep; transparency becomes white. Raises Unreadable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # above 89 million pixels
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(data), formats=FORMATS))
            if image.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except UnidentifiedImageError:
        raise Unreadable(f"no {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's decoders raise many kinds on bad bytes
        raise Unreadable(" ".join(str(error).split()) or type(error).__name__) from None


def resize_crop_flip(image: Image.Image, resolution: int, place: np.ndarray, flip: bool) -> Crop:
    """Short side to `resolution`, mirrored if `flip`, then the square at the relative `place` (y, x) in [0, 1]."""
    width, height = image.size
    scale = resolution / min(width, height)
    size = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
    # Crop in source coordinates, so that a very long image is never blown up whole.
    top, left = (round(float(p) * (s - resolution)) for p, s in zip(place, (size[1], size[0]), strict=True))
    if flip:
        image = ImageOps.mirror(image)
    sx, sy = width / size[0], height / size[1]
    box = (left * sx, top * sy, (left + resolution) * sx, (top + resolution) * sy)
    image = image.resize((resolution, resolution), Image.Resampling.BILINEAR, box=box)
    return Crop(np.asarray(image).copy(), (height, width, top, left, resolution, resolution))


# ---------------------------------------------------------------- batches


def loader(
    dataset: PairDataset, config: TrainingConfig, first_step: int, process_index: int, num_processes: int
) -> DataLoader:
    """Batches of this process from `first_step` to the end of the run, in order."""
    return DataLoader(
        dataset,
        batch_sampler=_Positions(config, first_step, process_index, num_processes),
        collate_fn=collate,
        num_workers=config.dataloader_num_workers,
        worker_init_fn=_leave_signals_to_the_run,
        pin_memory=torch.cuda.is_available(),
    )


def _leave_signals_to_the_run(worker: int) -> None:
    # A scheduler or a terminal signals every process at once; the last step still needs its batches.
    for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    end_with_parent()


@dataclass
class _Positions:
    """Positions of each micro-batch: step by step, accumulation by accumulation, this process's share."""

    config: TrainingConfig
    first_step: int
    process_index: int
    num_processes: int

    def __len__(self) -> int:
        return (self.config.max_train_steps - self.first_step) * self.config.gradient_accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        batch, accumulation = self.config.train_batch_size, self.config.gradient_accumulation_steps
        for micro in range(self.first_step * accumulation, self.config.max_train_steps * accumulation):
            start = (micro * self.num_processes + self.process_index) * batch
            yield list(range(start, start + batch))


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """One batch, winners' images first, then losers': pixels, time_ids, z, posterior (2B, ...); eps, timestep (B, ...).

    With a cache moments (2B, ...), text and pooled (B, ...) for pixels and prompt. An error in any sample becomes
    {"error": line}: an exception would arrive from a worker as a traceback.
    """
    for sample in samples:
        if "error" in sample:
            return {"error": sample["error"]}
    batch: dict[str, Any] = {}
    for key in samples[0].keys() & {"eps", "timestep", "text", "pooled"}:
        batch[key] = torch.stack([s[key] for s in samples])
    for key in samples[0].keys() & {"pixels", "moments", "time_ids", "z", "posterior"}:
        batch[key] = torch.stack([s[key] for s in samples], dim=1).flatten(0, 1)
    if "prompt" in samples[0]:
        batch["prompt"] = [s["prompt"] for s in samples]
    batch["pair"] = [s["pair"] for s in samples]
    batch["skipped"] = sum(s["skipped"] for s in samples)
    return batch
