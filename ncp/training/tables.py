"""The table of a dataset in Pick-a-Pic's columns, wherever the dataset is.

Local parquet files with Pick-a-Pic's columns and small row groups are read in place (ncp/training/rows.py). For
everything else the library `datasets` makes a memory-mapped copy in `cache_dir`, once. A table of `prompt`, `chosen`,
`rejected` is converted to Pick-a-Pic's columns, chosen first.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from ncp.common import hub
from ncp.common.errors import UserError
from ncp.common.splits import local_files
from ncp.training.rows import ParquetRows, can_be_read_in_place, group_sizes, open_rows
from ncp.training.settings import TrainingConfig

COLUMNS = ("caption", "image_0_uid", "image_1_uid", "jpg_0", "jpg_1", "label_0", "label_1")
OPTIONAL = ("has_label", "best_image_uid")  # read if a dataset has them
SHARE = "share_0"  # share of the annotators who prefer image 0, or null: read for soft labels
CHOSEN_REJECTED = ("prompt", "chosen", "rejected")
COLUMN_TYPES = {  # by the first word of the column's name
    "caption": "text",
    "prompt": "text",
    "image": "text",
    "best": "text",
    "label": "number",
    "share": "number",
    "has": "true or false",
    "jpg": "binary",
    "chosen": "image",
    "rejected": "image",
}


def open_table(config: TrainingConfig) -> tuple[Any, list[Path], list[int]]:
    """(table with COLUMNS and the existing columns of `optional_columns`, its files if local, rows of each file).

    The table has a length, rows as dicts by number, and `select_columns`; `read_columns` reads whole columns. With
    `cached_latents` Pick-a-Pic's image columns are not read and may be missing. Raises UserError if the dataset is
    missing or unreadable, or lacks a column.
    """
    columns = tuple(c for c in COLUMNS if config.cached_latents is None or not c.startswith("jpg"))
    files = list((local_files(config.dataset_name, config.dataset_split) or {}).values())
    if not files:
        table = copied(config, [], None)
        has = table.column_names
        wanted = CHOSEN_REJECTED if is_chosen_rejected(has) else columns
        if missing := [c for c in wanted if c not in has]:
            raise UserError(f"{config.dataset_name}: {column_is_missing(missing, columns)}")
        optional = [c for c in optional_columns(config) if c in has and wanted is columns]
        table = table.select_columns([*wanted, *optional])
        check_types(table.features.arrow_schema, config.dataset_name)
    else:
        wanted = CHOSEN_REJECTED if is_chosen_rejected(column_names(files[0])) else columns
        optional = check_files(files, wanted, optional_columns(config))
        if wanted is columns and can_be_read_in_place(files, [*columns]):
            table = open_rows(files, [*columns, *optional])
        else:
            table = copied(config, files, [*wanted, *optional])
    if wanted is CHOSEN_REJECTED:
        table = as_pickapic(table, config.dataset_name)
    return table, files, [pq.read_metadata(file).num_rows for file in files]


def optional_columns(config: TrainingConfig) -> tuple[str, ...]:
    """Columns besides COLUMNS that are read if a dataset has them."""
    return (*OPTIONAL, SHARE) if getattr(config, "soft_labels", False) else OPTIONAL


def read_columns(table: Any, names: list[str]) -> pa.Table:
    """These columns of all rows."""
    chosen = table.select_columns(names)
    return chosen.read() if isinstance(chosen, ParquetRows) else chosen.with_format("arrow")[:]


# ---------------------------------------------------------------- columns of the files


def is_chosen_rejected(names: list[str]) -> bool:
    return set(CHOSEN_REJECTED) <= set(names) and not {"caption", "label_0"} <= set(names)


def column_names(file: Path) -> list[str]:
    """The columns of a parquet file. Raises UserError if it is not one."""
    try:
        return pq.read_schema(file).names
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a readable parquet file ({str(error).splitlines()[0]})") from None


def check_files(files: list[Path], columns: tuple[str, ...], welcome: tuple[str, ...]) -> list[str]:
    """Those of the `welcome` optional columns that all files have (of Pick-a-Pic's columns only).

    Raises UserError naming the first file that is unreadable, lacks a column or an optional column of the first file,
    or has a column of a wrong type.
    """
    optional: list[str] = []
    for number, file in enumerate(files):
        names = column_names(file)
        if missing := [c for c in columns if c not in names]:
            raise UserError(f"{file}: {column_is_missing(missing, columns)}")
        has = [c for c in welcome if c in names and columns is not CHOSEN_REJECTED]
        if number and has != optional:
            odd = ", ".join(sorted(set(has) ^ set(optional)))
            raise UserError(f"{file}: column {odd} is there in some files and missing in others, such as {files[0]}")
        optional = has
        check_types(pa.schema([f for f in pq.read_schema(file) if f.name in {*columns, *optional}]), str(file))
    return optional


def column_is_missing(missing: list[str], columns: tuple[str, ...]) -> str:
    if columns is CHOSEN_REJECTED:
        return f"column {', '.join(missing)} is missing; expected {', '.join(CHOSEN_REJECTED)} as in the other files"
    other = ", ".join(CHOSEN_REJECTED)
    return (
        f"column {', '.join(missing)} is missing; expected Pick-a-Pic's: {', '.join(columns)}; or {other}; "
        "prepare_preferences.py turns other tables into Pick-a-Pic's columns"
    )


def check_types(schema: pa.Schema, name: str) -> None:
    """Raises UserError naming the first column of a wrong type: not text, a number, bytes or an image as required."""
    tests = {
        "text": lambda t: pt.is_string(t) or pt.is_large_string(t),
        "number": lambda t: pt.is_floating(t) or pt.is_integer(t),
        "binary": is_binary,
        "true or false": pt.is_boolean,
        "image": is_image,
    }
    for field in schema:
        if not tests[kind := COLUMN_TYPES[field.name.split("_")[0]]](field.type):
            raise UserError(f"{name}: column {field.name} is {field.type}; expected {kind}")


def is_binary(kind: pa.DataType) -> bool:
    return pt.is_binary(kind) or pt.is_large_binary(kind)


def is_image(kind: pa.DataType) -> bool:
    """Whether a type is bytes, or the image struct of `datasets`: bytes (type null if no image has any) and path."""
    if not pt.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return is_binary(kind)
    return is_binary(kind.field("bytes").type) or pt.is_null(kind.field("bytes").type)


# ---------------------------------------------------------------- the copy of `datasets`


def copied(config: TrainingConfig, files: list[Path], columns: list[str] | None) -> Any:
    """The Dataset of these parquet files; without files, of the hub's `dataset_name`. Raises UserError if it fails."""
    import datasets

    datasets.disable_progress_bars()
    try:
        if files:
            source = {"train": [str(f) for f in files]}
            builder = datasets.load_dataset_builder(
                "parquet", data_files=source, cache_dir=config.cache_dir, columns=columns
            )
        else:
            builder = datasets.load_dataset_builder(config.dataset_name, cache_dir=config.cache_dir)
        check_room_for_copy(Path(config.cache_dir or datasets.config.HF_DATASETS_CACHE), builder, files, columns or [])
        builder.download_and_prepare()
        return builder.as_dataset(split="train" if files else config.dataset_split)
    except UserError:
        raise
    except Exception as error:  # datasets raises many kinds, also if the hub does not answer
        if files:
            raise UserError(f"{config.dataset_name}: cannot be copied to cache_dir: {hub.reason(error)}") from None
        raise UserError(
            f"dataset_name: '{config.dataset_name}' is no local folder, and loading it failed: {hub.reason(error)}"
        ) from None


def check_room_for_copy(folder: Path, builder: Any, files: list[Path], columns: list[str]) -> None:
    """Prints the size and place of the copy, unless it exists already. Raises UserError if the disk has no room."""
    if Path(builder.cache_dir).exists() or os.environ.get("RANK", "0") != "0":  # the first process makes it for all
        return
    if files:
        need = sum(size for file in files for _, size in group_sizes(pq.read_metadata(file), columns))
    else:
        need = (builder.info.dataset_size or 0) + (builder.info.download_size or 0)
    free = shutil.disk_usage(next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())).free
    size = f"about {need / 1e9:,.1f} GB" if need else "as much disk as the dataset twice"
    why = "row groups are too large to read one row from" if files else "it is on the hub"
    why = f"its columns are {', '.join(CHOSEN_REJECTED)}" if files and "chosen" in columns else why
    print(f"{'copy':>16}: {size} to {folder}, once, since {why}; {free / 1e9:,.0f} GB free", flush=True)
    if need > free:
        raise UserError(f"cache_dir: {folder} needs {need / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free there")


# ---------------------------------------------------------------- prompt, chosen, rejected


def as_pickapic(table: Any, name: str) -> Any:
    """A Dataset of prompt, chosen, rejected with COLUMNS: the chosen image is image 0, the winner. No image is copied.

    A uid is 32 digits of the sha256 of the image's bytes, as in prepare_preferences.py. It does not depend on the row's
    position, so a checkpoint or a cache of latents recognises the same image. All images are read to compute it.
    """
    import datasets

    for column in ("chosen", "rejected"):
        if isinstance(table.features[column], datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
    table = table.flatten()
    for side, column in enumerate(("chosen", "rejected")):
        if column in table.column_names:  # plain bytes
            table = table.rename_column(column, f"jpg_{side}")
        else:
            check_bytes(table, column, name)
            table = table.rename_column(f"{column}.bytes", f"jpg_{side}")
    table = table.rename_column("prompt", "caption")
    for side in (0, 1):
        table = table.add_column(f"image_{side}_uid", content_uids(table, f"jpg_{side}"))
        table = table.add_column(f"label_{side}", [1.0 - side] * len(table))
    return table.select_columns([*COLUMNS])


def check_bytes(table: Any, column: str, name: str) -> None:
    """Raises UserError for images that are paths only."""
    if f"{column}.path" in table.column_names:
        bare = read_columns(table, [f"{column}.bytes"]).column(0).is_null().to_numpy()
        path = read_columns(table, [f"{column}.path"]).column(0).is_valid().to_numpy()
        if (bare & path).any():
            row = int((bare & path).argmax())
            raise UserError(
                f"{name}: row {row} has a path in {column} and no bytes; prepare_preferences.py --format "
                "chosen_rejected reads the files"
            )


def content_uids(table: Any, column: str) -> list[str | None]:
    """An image's uid for each row; None where there is no image."""
    uids: list[str | None] = []
    for batch in table.select_columns([column]).with_format("arrow").iter(batch_size=64):
        uids += [hashlib.sha256(v.as_buffer()).hexdigest()[:32] if v.is_valid else None for v in batch.column(0)]
    return uids
