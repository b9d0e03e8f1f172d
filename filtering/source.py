"""The input: the parquet files of a split, local or on the hub.

The schema is checked first. Metadata is read by column over all files, images by row group.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from filtering.settings import DECISION, IMAGES, MODELS, FilterConfig
from ncp.common import hub
from ncp.common.errors import UserError
from ncp.common.splits import files_of_split, local_files

READ_ROWS = 8  # rows of images decoded at a time
TYPES = {  # kind of a column, and Arrow's types of that kind
    "text": (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
    "a timestamp": (pa.types.is_timestamp,),
    "true or false": (pa.types.is_boolean,),
    "a number": (pa.types.is_floating, pa.types.is_integer),
    "an integer": (pa.types.is_integer,),
    "binary": (pa.types.is_binary, pa.types.is_large_binary),
}


@dataclass(frozen=True)
class Shard:
    """One parquet file of the input.

    name: relative to the dataset, for the manifest. path: for messages. open: returns the object that pyarrow reads
    from. first_row: the number of the file's first row in the dataset.
    """

    name: str
    path: str
    size: int
    open: Callable[[], Any]
    metadata: pq.FileMetaData
    schema: pa.Schema
    first_row: int = 0

    def parquet(self, dictionaries: Sequence[str] = ()) -> pq.ParquetFile:
        """The open file. dictionaries: text columns to read as dictionaries, each distinct value once."""
        file = self.open()
        # Few large requests to a hub; small reads from a disk, because a row group has 340 MB of images.
        how = {"buffer_size": 1 << 20} if isinstance(file, str) else {"pre_buffer": True}
        return pq.ParquetFile(file, metadata=self.metadata, read_dictionary=list(dictionaries), **how)


def list_files(config: FilterConfig) -> tuple[list[tuple[str, int, Callable[[], Any]]], str | None]:
    """((name, size, opener) of the split's parquet files in order of name, commit of a hub dataset or None).

    Raises UserError if there is nothing to read.
    """
    local = local_files(config.dataset_name, config.dataset_split)
    if local is not None:
        return [(name, path.stat().st_size, partial(str, path)) for name, path in local.items()], None

    from huggingface_hub import HfApi, HfFileSystem  # slow, and not needed for local files

    try:
        info = HfApi().dataset_info(config.dataset_name, revision=config.revision, files_metadata=True)
    except Exception as error:  # the hub's client raises many kinds, and more when offline
        reason = hub.reason(error)
        raise UserError(
            f"dataset_name: '{config.dataset_name}' is no local path, and the hub gave no such dataset ({reason})"
        ) from None
    remote, root = HfFileSystem(), f"datasets/{config.dataset_name}@{info.sha}"
    sizes = {f.rfilename: f.size or 0 for f in info.siblings or [] if f.rfilename.endswith(".parquet")}
    names = files_of_split(sizes, config.dataset_split, config.dataset_name)
    # No read-ahead: pyarrow requests the byte ranges that it needs, with image columns between them.
    open_name = partial(remote.open, mode="rb", cache_type="none")
    return [(n, sizes[n], partial(open_name, f"{root}/{n}")) for n in names], info.sha


def open_shards(config: FilterConfig) -> tuple[list[Shard], str | None]:
    """(the input files with their footers read, commit of a hub dataset or None).

    Raises UserError naming a file that is not parquet, lacks a column or differs in schema from the first.
    """
    files, commit = list_files(config)
    is_file, folder = Path(config.dataset_name).is_file(), config.dataset_name.rstrip("/")

    def read_footer(file: tuple[str, int, Callable[[], Any]]) -> Shard:
        name, size, opener = file
        path = config.dataset_name if is_file else f"{folder}/{name}"
        with explain_read_errors(path):
            parquet = pq.ParquetFile(opener())
        return Shard(name, path, size, opener, parquet.metadata, parquet.schema_arrow.remove_metadata())

    with ThreadPoolExecutor(threads_for(config.dataset_name)) as pool:
        shards = list(pool.map(read_footer, files))
    first_row = 0
    for index, shard in enumerate(shards):
        check_schema(shard, config)
        if not shard.schema.equals(shards[0].schema):
            odd = set(map(str, shard.schema)) ^ set(map(str, shards[0].schema))
            detail = "; ".join(sorted(odd)) or "columns in another order"
            raise UserError(f"{shard.path}: schema differs from {shards[0].name}'s ({detail})")
        shards[index] = replace(shard, first_row=first_row)
        first_row += shard.metadata.num_rows
    return shards, commit


def check_schema(shard: Shard, config: FilterConfig) -> None:
    """Raises UserError if a needed column is missing or of a wrong type."""
    needed = DECISION | (MODELS if config.models is not None else {})
    if config.best_image_uid == "ignore" and "best_image_uid" not in shard.schema.names:
        del needed["best_image_uid"]
    if not config.metadata_only:
        needed |= dict.fromkeys(IMAGES, "binary")
    missing = [c for c in needed if c not in shard.schema.names]
    if missing:
        hint = "; --metadata_only needs no images" if set(missing) <= set(IMAGES) else ""
        raise UserError(f"{shard.path}: column {', '.join(missing)} is missing{hint}")
    for column, kind in needed.items():
        found = shard.schema.field(column).type
        if not any(is_type(found) for is_type in TYPES[kind]):
            raise UserError(f"{shard.path}: column {column} is {found}; expected {kind}")


def read_metadata(shards: list[Shard], config: FilterConfig) -> pa.Table:
    """The columns that the decision needs, for the whole input, with text as dictionaries."""
    columns = [c for c in DECISION if c in shards[0].schema.names]
    columns += MODELS if config.models is not None else []
    return read_columns(shards, columns, dictionaries=[c for c in columns if DECISION.get(c) == "text"])


def read_columns(
    shards: list[Shard], columns: list[str], rows: np.ndarray | None = None, dictionaries: Sequence[str] = ()
) -> pa.Table:
    """These columns of the whole input, or only of `rows` (sorted, distinct). No other column is read.

    dictionaries: text columns to keep as the files store them, each distinct value of a row group once.
    """

    def read(shard: Shard) -> pa.Table:
        begin, end = shard.first_row, shard.first_row + shard.metadata.num_rows
        mine = None if rows is None else rows[slice(*np.searchsorted(rows, [begin, end]))] - begin
        if mine is not None and not len(mine):
            return shard.schema.empty_table().select(columns)
        with explain_read_errors(shard.path):
            table = shard.parquet(dictionaries).read(columns=columns, use_threads=False).replace_schema_metadata(None)
        return (table if mine is None else table.take(mine)).select(columns)

    with ThreadPoolExecutor(threads_for(shards[0].path)) as pool:
        return pa.concat_tables(pool.map(read, shards))


def by_row_group(shards: list[Shard], rows: np.ndarray) -> Iterator[tuple[Shard, int, np.ndarray, np.ndarray]]:
    """Yields (shard, row group, positions in `rows` in order of row, these rows within the group), if it has any."""
    places, first = [], 0
    for shard in shards:
        for number in range(shard.metadata.num_row_groups):
            places.append((shard, number, first))
            first += shard.metadata.row_group(number).num_rows
    group = np.searchsorted([first for _, _, first in places], rows, side="right") - 1
    order = np.lexsort((rows, group))
    for part in np.split(order, np.flatnonzero(np.diff(group[order])) + 1) if len(rows) else []:
        shard, number, first = places[group[part[0]]]
        yield shard, number, part, rows[part] - first


def read_images(
    shard: Shard, group: int, keys: np.ndarray, rows: np.ndarray, sides: np.ndarray
) -> Iterator[list[tuple[int, pa.Array]]]:
    """Yields lists of (keys[i], image sides[i] of row rows[i] of the row group), rows ascending, a few rows a list.

    Raises UserError if the file cannot be read.
    """
    first = 0
    with explain_read_errors(shard.path):
        parquet, columns = shard.parquet(), list(IMAGES)
        for batch in parquet.iter_batches(READ_ROWS, row_groups=[group], columns=columns, use_threads=False):
            here = slice(*np.searchsorted(rows, [first, first + len(batch)]))
            found, at = np.unique(rows[here] - first, return_inverse=True)
            batch = batch if len(found) == len(batch) else batch.take(found)
            yield [
                (key, batch[IMAGES[side]].slice(row, 1))
                for key, row, side in zip(keys[here].tolist(), at.tolist(), sides[here].tolist(), strict=True)
            ]
            first += READ_ROWS
            if here.stop == len(rows):
                return


def threads_for(path: str) -> int:
    """The number of threads that read files: one per core locally; more for a hub, which is slow but parallel."""
    return min(os.cpu_count() or 1, 8) if os.path.exists(path) else 16


@contextmanager
def explain_read_errors(path: str) -> Iterator[None]:
    """Turns a failure to read a file inside the block into a UserError."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, (pa.ArrowException, OSError)) and not hub.is_lost_connection(error):
            raise
        raise UserError(f"{path}: not a readable parquet file ({hub.reason(error)})") from None
