"""Reads rows of parquet, JSON, JSON Lines and CSV files in order, with only a few rows in memory at a time."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ncp.common.errors import UserError
from ncp.common.splits import local_files
from preparing.formats import Row, columns
from preparing.settings import PrepareConfig

TEXT = (".json", ".jsonl", ".csv")
ROWS_AT_ONCE = 8  # of a parquet file, with their images
BLOCK, LONGEST = 1 << 20, 1 << 26  # characters of JSON read at once, and of one row


def find_files(config: PrepareConfig) -> dict[str, Path]:
    """Name to path of the input files. Raises UserError if there are none, or if one has an unsupported suffix."""
    path = Path(config.dataset_name)
    if path.is_file():
        if path.suffix not in (".parquet", *TEXT):
            raise UserError(f"dataset_name: {path} is no .parquet, .json, .jsonl or .csv file")
        return {path.name: path}
    if path.is_dir() and not any(path.rglob("*.parquet")):
        found = sorted(p.name for p in path.iterdir() if p.suffix in TEXT)
        raise UserError(
            f"dataset_name: no parquet files in {path}" + (f"; name one of {', '.join(found)}" * bool(found))
        )
    files = local_files(config.dataset_name, config.dataset_split)
    if files is None:
        raise UserError(
            f"dataset_name: no such file or folder: {path}; a dataset of the hub is downloaded first: "
            f"hf download --repo-type dataset {path} --local-dir FOLDER"
        )
    return files


def check_files(files: Iterable[Path], config: PrepareConfig) -> None:
    """Raises UserError naming the first file that cannot be read, is empty, or lacks a column."""
    needed, _ = columns(config)
    for file in files:
        first = next(rows_of_file(file, 0, config), None)
        if first is None:
            raise UserError(f"{file}: there is not a single row")
        if missing := [c for c in needed if c not in first]:
            found = pq.read_schema(file).names if file.suffix == ".parquet" else list(first)
            raise UserError(
                f"{file}: column {', '.join(missing)} is missing; format {config.format} reads {', '.join(needed)}; "
                f"the file has {', '.join(map(str, found[:30]))}"
            )


def read_units(files: Iterable[Path], start: int, config: PrepareConfig) -> Iterator[tuple[str, list[Row]]]:
    """Yields (location, [row]), or for imagereward (location of the first, adjacent rows of one prompt_id), in order.

    start: number of rows to skip, counted over all files.
    """
    rows = read_rows(files, start, config)
    if config.format != "imagereward":
        for where, row in rows:
            yield where, [row]
        return
    for _, same in groupby(rows, key=lambda item: item[1].get("prompt_id")):
        found = list(same)
        yield found[0][0], [row for _, row in found]


def read_rows(files: Iterable[Path], start: int, config: PrepareConfig) -> Iterator[tuple[str, Row]]:
    """Yields (location, row) for the rows of all files in order, beginning with row number `start`."""
    for file in files:
        length = pq.read_metadata(file).num_rows if file.suffix == ".parquet" else None
        if length is not None and start >= length:
            start -= length
            continue
        for number, row in enumerate(rows_of_file(file, start, config), start):
            yield f"{file} row {number}", row
        start = 0


def rows_of_file(file: Path, start: int, config: PrepareConfig) -> Iterator[Row]:
    """The rows of a file from number `start` on. Raises UserError if it cannot be read or an item is not a row."""
    with explain_read_errors(file):
        if file.suffix == ".parquet":
            yield from parquet_rows(file, start, config)
        elif file.suffix == ".csv":
            with open(file, encoding="utf-8-sig", newline="") as handle:
                yield from islice(csv.DictReader(handle, strict=True), start, None)
        else:
            for row in islice(json_rows(file), start, None):
                if not isinstance(row, dict):
                    raise UserError(f"{file}: expected rows of names and values, found {type(row).__name__}")
                yield row


def parquet_rows(file: Path, start: int, config: PrepareConfig) -> Iterator[Row]:
    """The rows from number `start` on. Reads only the columns of the format, and only the row groups needed."""
    parquet = pq.ParquetFile(file, memory_map=True)
    needed, optional = columns(config)
    names = parquet.schema_arrow.names
    first, remaining = start, list[int]()
    for group in range(parquet.num_row_groups):
        length = parquet.metadata.row_group(group).num_rows
        if first >= length and not remaining:
            first -= length
        else:
            remaining.append(group)
    wanted = [c for c in dict.fromkeys([*needed, *optional]) if c in names]
    for batch in parquet.iter_batches(ROWS_AT_ONCE, row_groups=remaining, columns=wanted, use_threads=False):
        if first >= len(batch):
            first -= len(batch)
        else:
            yield from batch.slice(first).to_pylist()
            first = 0


def json_rows(file: Path) -> Iterator[Any]:
    """The items of a JSON array, or of JSON Lines, one at a time."""
    decoder = json.JSONDecoder()
    with open(file, encoding="utf-8-sig") as handle:
        text, at, ended, array = handle.read(BLOCK), 0, False, False
        if text.lstrip()[:1] == "[":
            at, array = text.index("[") + 1, True
        while True:
            while at < len(text) and text[at] in " \t\r\n,":
                at += 1
            if array and text[at : at + 1] == "]":
                return
            if at < len(text):
                try:
                    row, end = decoder.raw_decode(text, at)
                    if end < len(text) or ended:  # otherwise a number may continue in the next block
                        yield row
                        at = end
                        continue
                except json.JSONDecodeError as error:
                    if ended or len(text) - at > LONGEST:
                        line = text[at:].splitlines()[0][:60]
                        raise UserError(f"{file}: not valid JSON ({error.msg}) in or behind: {line}") from None
            elif ended:
                if array:
                    raise UserError(f"{file}: the JSON array has no end; is the download complete?")
                return
            more = handle.read(max(BLOCK, len(text) - at))
            text, at, ended = text[at:] + more, 0, not more


@contextmanager
def explain_read_errors(file: Path) -> Iterator[None]:
    """Turns a failure to read a file inside the block into a UserError."""
    try:
        yield
    except UnicodeDecodeError:
        raise UserError(f"{file}: not a text file in UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{file}: not readable as CSV ({error})") from None
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{file}: cannot be read ({reason})") from None
