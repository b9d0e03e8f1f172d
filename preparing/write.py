"""Converts judgements to rows with Pick-a-Pic's columns, and writes rows to parquet files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ncp.common.errors import UserError
from preparing.formats import Judgement, Row, judgements
from preparing.settings import PrepareConfig

SCHEMA = pa.schema(
    [
        ("are_different", pa.bool_()),
        ("best_image_uid", pa.string()),
        ("caption", pa.string()),
        ("created_at", pa.timestamp("ns")),
        ("has_label", pa.bool_()),
        ("image_0_uid", pa.string()),
        ("image_1_uid", pa.string()),
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("label_1", pa.float64()),
        ("model_0", pa.string()),
        ("model_1", pa.string()),
        ("ranking_id", pa.int64()),
        ("share_0", pa.float64()),
    ]
)
IMAGES = ("jpg_0", "jpg_1")
ROWS_PER_GROUP = 10  # about 3.5 MB in Pick-a-Pic: training reads rows in place (ncp/training/rows.py)
DROPPED = ("unusable_prompt", "no_preference", "missing_image", "unreadable_image")  # in the order of the checks


class BadImage(Exception):
    """An image that cannot be used, with its reason in DROPPED and an explanation in words."""

    def __init__(self, reason: str, words: str):
        super().__init__(words)
        self.reason = reason


@dataclass
class Tally:
    """The progress in the input, and the counts. Each of `pairs` is dropped, a decisive row or a tie."""

    rows: int = 0  # read from the input
    pairs: int = 0
    decisive: int = 0
    ties: int = 0
    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(DROPPED, 0))

    @property
    def written(self) -> int:
        return self.decisive + self.ties


def output_rows(
    units: Iterator[tuple[str, list[Row]]], tally: Tally, images: Path, config: PrepareConfig
) -> Iterator[Row]:
    """The rows of one output file with SCHEMA's columns, made from `units` (source.read_units). Updates `tally`.

    images: the folder that paths are relative to. Raises UserError, naming the row, for a value that the format does
    not allow, and for a bad image unless the config says skip.
    """
    begin = tally.written
    for where, rows in units:
        try:
            found = judgements(rows, config)
        except KeyError as error:
            raise UserError(f"{where}: there is no {error.args[0]}; is it format {config.format}?") from None
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
        for judgement in found:
            row = output_row(judgement, tally, where, images, config)
            tally.pairs += 1
            if row is not None:
                yield row
        tally.rows += len(rows)
        if tally.written - begin >= config.rows_per_file:
            return


def output_row(judgement: Judgement, tally: Tally, where: str, images: Path, config: PrepareConfig) -> Row | None:
    """A row with SCHEMA's columns, or None if it is dropped. Its ranking_id is the number of the pair in the input."""
    if not is_text(judgement.prompt):
        tally.dropped["unusable_prompt"] += 1
        return None
    if judgement.preference is None:
        tally.dropped["no_preference"] += 1
        return None
    try:
        first, second = (image_bytes(image, images) for image in judgement.images)
    except BadImage as error:
        if config.bad_images == "error":
            raise UserError(f"{where}: {error}; bad_images: skip goes on without it") from None
        tally.dropped[error.reason] += 1
        return None
    label = first_label(judgement, config.min_share)
    tally.ties += label == 0.5
    tally.decisive += label != 0.5
    uids = [uid_of(image) for image in (first, second)]
    return {
        "are_different": uids[0] != uids[1],
        "best_image_uid": {1.0: uids[0], 0.0: uids[1], 0.5: ""}[label],
        "caption": judgement.prompt,
        "created_at": judgement.created_at,
        "has_label": True,
        "image_0_uid": uids[0],
        "image_1_uid": uids[1],
        "jpg_0": first,
        "jpg_1": second,
        "label_0": label,
        "label_1": 1 - label,
        "model_0": judgement.models[0],
        "model_1": judgement.models[1],
        "ranking_id": tally.pairs,
        "share_0": judgement.preference if judgement.is_share else None,
    }


def is_text(prompt: Any) -> bool:
    """Whether a prompt is text that is not blank and valid in UTF-8 (JSON can contain half of a surrogate pair)."""
    return isinstance(prompt, str) and bool(prompt.strip()) and not any("\ud800" <= c <= "\udfff" for c in prompt)


def first_label(judgement: Judgement, min_share: float) -> float:
    """Pick-a-Pic's label_0: 1 if the first image wins, 0 if the second does, 0.5 for a tie.

    The preference for the preferred image, p or 1 - p, must be above one half; a share of votes also at least
    min_share.
    """
    p = judgement.preference
    assert p is not None
    if p == 0.5 or (judgement.is_share and max(p, 1 - p) < min_share):
        return 0.5
    return float(p > 0.5)


def image_bytes(image: Any, folder: Path) -> bytes:
    """The unchanged encoded bytes of an image. image: bytes, a path, or a dict of bytes and path. Raises BadImage."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str) and image:
        path = folder / image
        try:
            image = path.read_bytes()
        except (OSError, ValueError) as error:
            raise BadImage("missing_image", f"cannot read the image {path} ({reason_of(error)})") from None
    if not image:
        raise BadImage("missing_image", "an image is empty")
    if not isinstance(image, bytes):
        raise BadImage("unreadable_image", f"an image is {type(image).__name__}; expected bytes or a path")
    if not is_image(image):
        raise BadImage("unreadable_image", "an image is no JPEG, PNG or WEBP")
    return image


def reason_of(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def is_image(data: bytes) -> bool:
    """Whether bytes begin like a JPEG, PNG or WEBP file, the formats that the training scripts decode."""
    return data.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")


def uid_of(data: bytes) -> str:
    """An image's uid: 32 hexadecimal digits of the sha256 of its bytes, so that equal files are the same image."""
    return hashlib.sha256(data).hexdigest()[:32]


def write_parquet(path: Path, rows: Iterator[Row]) -> None:
    """Writes rows with SCHEMA's columns, with one row group at a time in memory."""
    texts = [name for name in SCHEMA.names if name not in IMAGES]
    options = {  # images do not compress; pages of about 1 MB can be read individually
        "compression": {name: "none" if name in IMAGES else "zstd" for name in SCHEMA.names},
        "use_dictionary": texts,
        "write_statistics": texts,
        "write_batch_size": 8,
    }
    with pq.ParquetWriter(path, SCHEMA, **options) as writer:
        while group := list(islice(rows, ROWS_PER_GROUP)):
            writer.write_table(pa.Table.from_pylist(group, schema=SCHEMA))
