"""The decisive pairs of a dataset: which rows are trained on, and which are held out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ncp.common.errors import UserError
from ncp.common.judgements import Judgements, read_judgements
from ncp.training.settings import TrainingConfig
from ncp.training.tables import COLUMNS, SHARE, open_table, read_columns

DROPPED = {  # the faults of `Judgements` in words
    "missing_caption": "without a caption",
    "missing_uid": "without an image's uid",
    "unlabeled": "without a label",
    "malformed_labels": "with labels other than 1 and 0, 0 and 1, 0.5 and 0.5",
    "same_image": "of an image against itself",
    "contradictory_best_image_uid": "whose best_image_uid is not the winner's",
    "tie": "ties",
}


@dataclass
class Pairs:
    """Decisive judgements of a dataset: `rows` of `table` (`open_table`), whose winner is image `winner` (0 or 1).

    The last `heldout` of them are never trained on and do not count in `len`. `source(row)` names a row's file and
    number. `dropped` counts the other rows of `table`, by reason. `manifest` is that of filter_pickapic.py, if it made
    the dataset. share: with soft labels, the share of the annotators who prefer the winner, in [0.5, 1].
    """

    table: Any
    rows: np.ndarray
    winner: np.ndarray
    files: list[Path]
    file_rows: list[int]
    dropped: dict[str, int]
    manifest: dict[str, Any] | None = None
    heldout: int = 0
    share: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows) - self.heldout

    def columns(self, names: list[str]) -> pa.Table:
        """These columns of the pairs' rows, in order, the held-out ones last."""
        return read_columns(self.table, names).take(pa.array(self.rows))

    def source(self, row: int) -> str:
        if not self.files:
            return f"row {row}"
        ends = np.cumsum(self.file_rows)
        file = int(np.searchsorted(ends, row, side="right"))
        return f"{self.files[file]} row {row - (ends[file] - self.file_rows[file])}"

    def name(self, index: int) -> dict[str, str]:
        """The source of pair `index`, and the uids of its winner and loser."""
        number, winner = int(self.rows[index]), int(self.winner[index])
        row = self.table.select_columns(["image_0_uid", "image_1_uid"])[number]
        uids = [str(row[f"image_{side}_uid"]) for side in (winner, 1 - winner)]
        return {"source": self.source(number), "winner": uids[0], "loser": uids[1]}


def open_pairs(config: TrainingConfig) -> Pairs:
    """The decisive pairs of the configured dataset, without rows that filter_pickapic.py would drop as malformed.

    With `cached_latents` the image columns are not read and may be missing. Raises UserError if the dataset is
    missing or unreadable (see `open_table`), differs from its manifest, or has too few decisive pairs, and with soft
    labels if it has no shares.
    """
    table, files, file_rows = open_table(config)
    manifest = read_filter_manifest(Path(config.dataset_name)) if files else None
    texts = read_columns(table, [c for c in table.column_names if not c.startswith("jpg")])
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
    table = table.select_columns([c for c in table.column_names if c in COLUMNS])
    pairs = Pairs(table, rows[order], winner[order], files, file_rows, dropped, manifest, heldout=len(held))
    if getattr(config, "soft_labels", False):
        pairs.share = winners_shares(config, texts, pairs)
    return pairs


def winners_shares(config: TrainingConfig, texts: pa.Table, pairs: Pairs) -> np.ndarray:
    """The share of the annotators who prefer each pair's winner, (P,) float32; 1 where it is not known.

    Raises UserError if no row has one, or if one is no share or contradicts the row's labels.
    """
    if SHARE not in texts.column_names or texts[SHARE].null_count == len(texts):
        raise UserError(
            f"soft_labels: {config.dataset_name} has no shares of votes (column {SHARE}, which prepare_preferences.py "
            "fills in where they are known)"
        )
    first = pc.cast(texts[SHARE], pa.float64()).to_numpy()[pairs.rows]
    share = np.where(pairs.winner == 0, first, 1 - first)
    share = np.where(np.isnan(share), 1.0, share)
    if len(wrong := np.flatnonzero(~((share >= 0.5) & (share <= 1)))):
        where, image = pairs.source(int(pairs.rows[wrong[0]])), int(pairs.winner[wrong[0]])
        raise UserError(
            f"soft_labels: {where}: {SHARE} is {first[wrong[0]]:g}, and image {image} is the winner; expected a share "
            "from 0 to 1 that is at least one half for the winner"
        )
    return share.astype(np.float32)


def hold_out(caption: np.ndarray, images: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(training pairs, held-out pairs), indices of pairs that share neither a caption nor an image.

    caption (P,) and images (P, 2) are integer codes. `count` captions are chosen, evenly spaced in order of first
    appearance, and the middle pair of each is held out. The other pairs of these captions or images are in neither set.
    With `count` captions or fewer, both sets are empty.
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


def read_filter_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest.json of filter_pickapic.py in a dataset's folder, or None if there is none.

    Raises UserError if it cannot be read, or if a file of the dataset has changed since it was written.
    """
    file = folder / "manifest.json"
    if not file.is_file():
        return None
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if manifest.get("tool") != "filter_pickapic":
            return None
        sizes = {output["file"]: output["size"] for output in manifest["outputs"]}
        describe_filtering(manifest)
    except (ValueError, OSError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file}: not a readable manifest of filter_pickapic.py") from None
    for name, size in sizes.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise UserError(f"{folder / name}: missing or changed since filter_pickapic.py wrote it; filter again")
    return manifest


def describe_filtering(manifest: dict[str, Any]) -> str:
    """How a dataset was filtered, in one line."""
    rows, pairs = manifest["rows"], manifest["pairs"]
    return (
        f"rule {manifest['options']['rule']}: {pairs['total']:,} pairs of {rows['input']:,} rows of "
        f"{manifest['dataset_name']}, {pairs['unique_prompts']:,} prompts, {pairs['images']:,} images "
        f"(filter_pickapic {manifest['version']}, pairs {pairs['sha256'][:12]})"
    )


def decisive(said: Judgements) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """The rows that name a better image: (row numbers, winner 0 or 1, counts of the other rows by first fault)."""
    left = np.ones(len(said.tie), bool)
    dropped = {}
    for reason, hit in {**said.faults, "tie": said.tie}.items():
        if count := int((hit & left).sum()):
            dropped[DROPPED[reason]] = count
        left &= ~hit
    rows = np.flatnonzero(left)
    return rows, (~said.first_wins[rows]).astype(np.int64), dropped
