"""Rows of parquet files by number, read where they lie: nothing is copied, and only an index is in memory.

Parquet stores a column of a row group in pages that are read from its beginning, so that a single row costs about half
of its row group. With the ten rows to a group of filter_pickapic.py and prepare_preferences.py that is little beside
decoding two JPEGs; with groups of a hundred or a thousand it is more. `can_be_read_in_place` tells them apart;
docs/data.md has figures.
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

GROUP_ROWS, GROUP_BYTES = 16, 256 << 10  # a row group with no more than this many rows, or bytes, counts as small
OPEN_FILES = 64  # per process; the footer of one is up to 2 MB
PIECE = 8  # rows decoded at a time, on the way to one


@dataclass(frozen=True)
class ParquetRows:
    """The rows of several files, one file after the other.

    changed: when each file last did, in ns. first (groups + 1,) int64: the number of each row group's first row, and
    how many rows there are. group (groups, 2) int64: which file it is in, and its number there.
    """

    files: list[Path]
    changed: list[int]
    column_names: list[str]
    first: np.ndarray
    group: np.ndarray

    def __len__(self) -> int:
        return int(self.first[-1])

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Row `row` as a dict of its columns. Raises Unreadable if the file is damaged there, or has changed."""
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
    """The opened file, as it was when it last changed."""
    # Not memory-mapped: that is no faster here, and a file that is cut short would kill the process.
    return pq.ParquetFile(file)


def can_be_read_in_place(files: list[Path], columns: list[str]) -> bool:
    """Whether every row group is small enough in these columns to be decoded for a single row."""
    sizes = (found for file in files for found in group_sizes(pq.read_metadata(file), columns))
    return all(rows <= GROUP_ROWS or size <= GROUP_BYTES for rows, size in sizes)


def group_sizes(metadata: pq.FileMetaData, columns: list[str]) -> list[tuple[int, int]]:
    """(rows, bytes of these columns when decoded) of each row group."""
    wanted = [i for i in range(metadata.num_columns) if metadata.schema.column(i).path.split(".")[0] in columns]
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    return [(g.num_rows, sum(g.column(i).total_uncompressed_size for i in wanted)) for g in groups]
