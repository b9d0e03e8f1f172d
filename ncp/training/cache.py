"""The cache of training inputs: VAE moments of images and embeddings of prompts, each stored once, memory-mapped.

`cache_latents.py` writes it, `ncp.training.samples` reads it. It is a folder of

    images.parquet, prompts.parquet   the entries (columns `uid`, `prompt`), in order: entry k is row k % n of shard
                                      k // n of its kind; the first prompt is the empty one
    images-00000.safetensors          moments float16 (n, F, 2C, h, w), mean and log-variance; F = 2 with the mirrored
                                      image second; time_ids int32 (n, 6), all 0 for an image that is unreadable
    prompts-00000.safetensors         text float16 (n, S, D) and, for SDXL and SD3, pooled float16 (n, P)
    manifest.json                     what the content depends on; in a finished cache also each file's size

Images are identified by uid. One cache serves any selection of its dataset: another filter rule, or other pairs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open

from ncp.common.errors import UserError
from ncp.common.files import write_text
from ncp.training.images import CorruptImage
from ncp.training.pairs import Pairs
from ncp.training.pipeline import Description, identity
from ncp.training.settings import TrainingConfig

SHARD_BYTES = 512 << 20
INDEX_COLUMNS = {"images": "uid", "prompts": "prompt"}


def fingerprint(config: TrainingConfig, description: Description) -> dict[str, Any]:
    """What the content of a cache depends on, besides the dataset. Weight files are sampled, not read whole."""
    name, vae = config.pretrained_model_name_or_path, config.pretrained_vae_model_name_or_path
    given = config.single_file_config
    texts = [part for text in description.texts for part in (text, text.replace("text_encoder", "tokenizer"))]
    return {
        "vae": identity(vae, None, "") if vae else identity(name, config.revision, "vae", given),
        **{part: identity(name, config.revision, part, given) for part in texts},
        **({"max_sequence_length": description.max_sequence_length} if len(texts) > 4 else {}),  # T5's tokens
        "variant": config.variant,
        "mixed_precision": config.mixed_precision,
        "resolution": config.resolution,
        "center_crop": config.center_crop,
        "random_flip": config.random_flip,
    }


def sizes(config: TrainingConfig, description: Description) -> dict[str, int]:
    """Bytes of one entry of each kind: {"images": ..., "prompts": ...}."""
    channels, height, width = description.latent_shape(config.resolution)
    (length, dim), pooled = description.text_shape, description.pooled_dim
    return {
        "images": 2 * (1 + config.random_flip) * 2 * channels * height * width + 4 * 6,
        "prompts": 2 * (length * dim + (pooled or 0)),
    }


def contents(pairs: Pairs) -> tuple[dict[str, pa.Array], np.ndarray]:
    """({"images": distinct uids, "prompts": distinct prompts}, (images, 2): row and side of each image's first use).

    Both in the order of the rows, with the empty prompt first.
    """
    table = pairs.columns(["caption", "image_0_uid", "image_1_uid"])
    uids = np.empty((len(table), 2), dtype=object)
    for side in (0, 1):
        uids[:, side] = table[f"image_{side}_uid"].to_numpy()
    uid = pa.array(uids.ravel(), pa.string())
    encoded = pc.dictionary_encode(uid)
    _, first = np.unique(encoded.indices.to_numpy(), return_index=True)
    places = np.stack([pairs.rows[first // 2], first % 2], axis=1)
    prompts = pc.unique(pa.concat_arrays([pa.array([""]), table["caption"].cast(pa.string()).combine_chunks()]))
    return {"images": encoded.dictionary, "prompts": prompts}, places


@dataclass
class Cache:
    """An open cache, and the entries of this run's pairs: image_at (P, 2) winner first, prompt_at (P,)."""

    folder: Path
    per_shard: dict[str, int]
    image_at: np.ndarray
    prompt_at: np.ndarray
    _shards: dict[Path, Any] = field(default_factory=dict, repr=False)

    def pair(self, index: int, flip: bool, empty_prompt: bool, images: int) -> dict[str, torch.Tensor]:
        """moments float16 (images, 2C, h, w), time_ids int64 (images, 6), text float16 (S, D); SDXL: pooled (P,).

        Raises CorruptImage for an image that was unreadable when the cache was made.
        """
        moments, time_ids = [], []
        for position in self.image_at[index, :images].tolist():
            shard, row = self._at("images", position)
            time_ids.append(shard.get_slice("time_ids")[row].long())
            if not time_ids[-1].any():
                raise CorruptImage(f"{self.folder}: image {position} was unreadable when the cache was made")
            moments.append(shard.get_slice("moments")[row, int(flip)])
        shard, row = self._at("prompts", 0 if empty_prompt else int(self.prompt_at[index]))
        text = {key: shard.get_slice(key)[row] for key in shard.keys()}  # noqa: SIM118 (no mapping)
        return {"moments": torch.stack(moments), "time_ids": torch.stack(time_ids), **text}

    def _at(self, kind: str, position: int) -> tuple[Any, int]:
        number, row = divmod(position, self.per_shard[kind])
        path = shard_path(self.folder, kind, number)
        if path not in self._shards:
            self._shards[path] = safe_open(path, framework="pt")
        return self._shards[path], row

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}  # each data loader worker opens its own


def open_cache(config: TrainingConfig, description: Description, pairs: Pairs) -> Cache | None:
    """The cache in the folder `cached_latents`; None if that is not set.

    Raises UserError if it is unfinished, damaged, made with other settings than this config's, or lacks a pair.
    """
    if config.cached_latents is None:
        return None
    folder = Path(config.cached_latents)
    advice = "run cache_latents.py with this config"
    if not (folder / "manifest.json").is_file():
        raise UserError(f"cached_latents: {folder} holds no cache; {advice}")
    manifest = read_cache_manifest(folder)
    if "files" not in manifest:
        raise UserError(f"cached_latents: {folder} is not finished; {advice}")
    if different := differences(manifest["fingerprint"], fingerprint(config, description)):
        raise UserError(f"cached_latents: {folder} was made with {different}; {advice} and another folder")
    for name, size in manifest["files"].items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise UserError(f"cached_latents: {folder / name} is missing or damaged; delete it and {advice} to redo it")
        if name.endswith(".safetensors"):
            try:
                safe_open(folder / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"cached_latents: {folder / name} is damaged ({error})") from None

    table = pairs.columns(["caption", "image_0_uid", "image_1_uid"])
    found = {
        column: pc.index_in(table[column].cast(pa.string()), value_set=read_index(folder, kind))
        for column, kind in {"caption": "prompts", "image_0_uid": "images", "image_1_uid": "images"}.items()
    }
    for column, positions in found.items():
        if positions.null_count:
            row = int(np.flatnonzero(positions.is_null().to_numpy())[0])
            where = pairs.source(int(pairs.rows[row]))
            raise UserError(f"cached_latents: {folder} lacks the {column} of {where}; {advice} and another folder")
    prompt, first, second = (found[c].to_numpy() for c in ("caption", "image_0_uid", "image_1_uid"))
    image_at = np.where(pairs.winner[:, None] == 0, np.stack([first, second], 1), np.stack([second, first], 1))
    return Cache(folder, manifest["per_shard"], image_at, prompt)


def differences(made: dict[str, Any], wanted: dict[str, Any]) -> str:
    """How the fingerprint `made` differs from `wanted`, in words; empty if the cache fits this run.

    A cache with mirrored images also fits a run without random_flip.
    """
    differ = [k for k in wanted if made.get(k) != wanted[k] and (k, made.get(k)) != ("random_flip", True)]
    return ", ".join(f"{k} {made.get(k)} (this run: {wanted[k]})" for k in differ)


def read_cache_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json of a cache. Raises UserError if it is not a cache's manifest."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if {"fingerprint", "entries", "per_shard"} <= manifest.keys():
            return manifest
    except (ValueError, OSError, AttributeError):
        pass
    raise UserError(f"cached_latents: {folder / 'manifest.json'} is not a cache's manifest") from None


def write_cache_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    write_text(folder / "manifest.json", text)


def read_index(folder: Path, kind: str) -> pa.Array:
    """The uids or prompts of a cache, in order. Raises UserError if the file is damaged."""
    file = folder / f"{kind}.parquet"
    try:
        return pq.read_table(file)[INDEX_COLUMNS[kind]].combine_chunks()
    except (OSError, pa.ArrowException, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"cached_latents: {file} is damaged ({reason}); make the cache anew in another folder"
        ) from None


def shard_path(folder: Path, kind: str, number: int) -> Path:
    return folder / f"{kind}-{number:05d}.safetensors"
