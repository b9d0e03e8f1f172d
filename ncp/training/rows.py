"""Rows of parquet files by number, read in place: nothing is copied, and only an index is in memory.

Parquet stores a column of a row group in pages, which are read from the beginning of the group. So reading a single row
costs on average half of its row group. With the groups of ten rows that filter_pickapic.py and prepare_preferences.py
write, that is little compared with decoding two JPEGs. With groups of a hundred or a thousand rows it is more.
`can_be_read_in_place` tells the two cases apart; docs/data.md has measurements.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ncp.common.errors import UserError
from ncp.training.images import Unreadable

GROUP_ROWS, GROUP_BYTES = 16, 256 << 10  # a row group with at most this many rows, or bytes, counts as small
OPEN_FILES = 64  # per process; a file's footer has up to 2 MB
PIECE = 8  # rows decoded at a time, until the wanted row is reached


@dataclass(frozen=True)
class ParquetRows:
    """The rows of several files, one file after the other.

    changed: each file's modification time in ns. first (groups + 1,) int64: the number of each row group's first row,
    then the number of rows. group (groups, 2) int64: each row group's file, and its number in that file.
    """

    files: list[Path]
    changed: list[int]
    column_names: list[str]
    first: np.ndarray
    group: np.ndarray

    def __len__(self) -> int:
        return int(self.first[-1])

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Row `row` as a dict of its columns. Raises Unreadable if the file is damaged there or has been modified."""
        at = int(np.searchsorted(self.first, row, side="right")) - 1
        file, number, left = int(self.group[at, 0]), int(self.group[at, 1]), row - int(self.first[at])
        try:
            batches = opened(self.files[file], self.changed[file]).iter_batches(
                PIECE, row_groups=[number], columns=self.column_names, use_threads=False
            )
            for batch in batches:
                if left < len(batch):
                    return {name: batch[name][left].as_py() for name in self.column_names}
                left -= len(batch)
        except (pa.ArrowException, OSError) as error:
            raise Unreadable(str(error).splitlines()[0]) from None
        raise Unreadable(f"row group {number} has become shorter")

    def select_columns(self, names: list[str]) -> ParquetRows:
        """The same rows with these columns only."""
        return replace(self, column_names=names)

    def read(self) -> pa.Table:
        """All rows, in memory. Raises UserError if a file is damaged."""
        tables = []
        for file, changed in zip(self.files, self.changed, strict=True):
            try:
                tables.append(opened(file, changed).read(self.column_names).select(self.column_names))
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{file}: not a readable parquet file ({str(error).splitlines()[0]})") from None
        return pa.concat_tables(tables, promote_options="permissive").replace_schema_metadata(None)


def open_rows(files: list[Path], columns: list[str]) -> ParquetRows:
    """The rows of parquet files; only their footers are read."""
    lengths, group = [], []
    for number, file in enumerate(files):
        metadata = pq.read_metadata(file)
        lengths += [metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)]
        group += [(number, k) for k in range(metadata.num_row_groups)]
    first = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    changed = [file.stat().st_mtime_ns for file in files]
    return ParquetRows(files, changed, columns, first, np.array(group, np.int64).reshape(-1, 2))


@lru_cache(OPEN_FILES)
def opened(file: Path, changed: int) -> pq.ParquetFile:
    """The open file. changed: its modification time, part of the cache key."""
    # Not memory-mapped: that is no faster here, and if the file were truncated, the process would be killed.
    return pq.ParquetFile(file)


def can_be_read_in_place(files: list[Path], columns: list[str]) -> bool:
    """Whether every row group is small enough, in these columns, to read single rows."""
    sizes = (found for file in files for found in group_sizes(pq.read_metadata(file), columns))
    return all(rows <= GROUP_ROWS or size <= GROUP_BYTES for rows, size in sizes)


def group_sizes(metadata: pq.FileMetaData, columns: list[str]) -> list[tuple[int, int]]:
    """(rows, decoded bytes of these columns) of each row group."""
    wanted = [i for i in range(metadata.num_columns) if metadata.schema.column(i).path.split(".")[0] in columns]
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    return [(g.num_rows, sum(g.column(i).total_uncompressed_size for i in wanted)) for g in groups]
