"""The copy: images in output order, row groups, files.

Three threads work at the same time: one reads ahead, one builds files, one hashes them and syncs them to the disk.
"""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from filtering.rules import Decision
from filtering.settings import IMAGES, FilterConfig, part_of
from filtering.source import Shard, by_row_group, read_images
from ncp.common.files import put_in_place, remove, sha256, temporary_for

T = TypeVar("T")

ROWS_PER_GROUP = 10  # in output files with images: training reads single rows (ncp/training/rows.py)
ROWS_PER_GROUP_OF_METADATA = 10**6  # in output files without images
LOOK_AHEAD = 64  # reads of READ_ROWS rows, so that the writer has work while the next pages are decoded
HOLD_BYTES = 256 << 20  # images held in memory until they are due; more are held on disk


def output_names(pairs: int, config: FilterConfig) -> list[str]:
    """The names of all output files (not only this machine's part), relative to the output folder."""
    count = 1 if config.metadata_only else -(-pairs // config.rows_per_file)
    return [f"data/{config.dataset_split}-{k:05d}-of-{count:05d}.parquet" for k in range(count)]


def copy_pairs(
    shards: list[Shard], decision: Decision, metadata: pa.Table, names: list[str], config: FilterConfig
) -> dict[str, str]:
    """Writes this machine's part of the output files `names`, except files that an earlier run has finished.

    metadata: the pairs' columns without the images. Returns the sha256 of each file written. The caller must hold the
    lock of the folder or of this part.
    """
    folder = Path(config.output_dir)
    schema = pa.schema([f for f in shards[0].schema if not (config.metadata_only and f.name in IMAGES)])
    per_file = len(metadata) if config.metadata_only else config.rows_per_file
    per_group = ROWS_PER_GROUP_OF_METADATA if config.metadata_only else ROWS_PER_GROUP
    images_repeat = 4 * len(metadata) >= 3 * decision.images
    todo = [k for k in part_of(config.shard, len(names)) if not (folder / names[k]).exists()]
    images = None
    if not config.metadata_only:
        rows, sides = decision.image_sources()
        due = np.flatnonzero(np.isin(np.arange(len(rows)) // (2 * per_file), todo))
        images = images_in_order(shards, rows[due], sides[due], folder)
    hashes: dict[str, Future[str]] = {}
    (folder / "data").mkdir(exist_ok=True)
    with ThreadPoolExecutor(1) as thread:
        for k in todo:
            path = folder / names[k]
            temporary = temporary_for(path)
            try:
                groups = row_groups(metadata.slice(k * per_file, per_file), per_group, images, schema)
                write_parquet(temporary, schema, groups, images_repeat)
                for before in hashes.values():
                    before.result()  # at most one file is being synced; a full disk raises here
            except BaseException:
                remove(temporary)
                raise
            hashes[names[k]] = thread.submit(hash_and_put_in_place, temporary, path)
    for _ in images or ():  # every image has been written; this closes the progress bar
        pass
    return {name: future.result() for name, future in hashes.items()}


def hash_and_put_in_place(temporary: Path, path: Path) -> str:
    """`put_in_place`; returns the file's sha256. Removes the file if this fails."""
    try:
        digest = sha256(temporary)
        put_in_place(temporary, path)
        return digest
    finally:
        remove(temporary)


def images_in_order(
    shards: list[Shard], rows: np.ndarray, sides: np.ndarray, spill_dir: Path, hold_bytes: int = HOLD_BYTES
) -> Iterator[pa.Array]:
    """Yields image sides[k] of input row rows[k], for k = 0, 1, ..., as an array of one; each row group is read once.

    Groups are read in the order in which their first image is due. Images that are read before they are due are held
    in memory up to `hold_bytes`, and beyond that in an anonymous temporary file in `spill_dir`.
    """
    parts = sorted(by_row_group(shards, rows), key=lambda part: part[2].min())

    def read() -> Iterator[list[tuple[int, pa.Array]]]:
        for shard, number, keys, inside in parts:
            yield from read_images(shard, number, keys, inside, sides[keys])

    waiting: dict[int, bytes | tuple[int, int] | None] = {}
    held = due = 0
    with tempfile.TemporaryFile(dir=spill_dir) as spill, tqdm(total=len(rows), desc="copy", unit="image") as bar:
        for k, image in chain.from_iterable(ahead(read())):
            if k != due:
                content = image[0].as_py()  # the array would keep the whole read in memory
                size = len(content or b"")
                if held + size > hold_bytes and size:
                    waiting[k] = (spill.seek(0, os.SEEK_END), size)
                    spill.write(content)
                else:
                    waiting[k] = content
                    held += size
                continue
            yield image
            due += 1
            while due in waiting:
                content = waiting.pop(due)
                if isinstance(content, tuple):
                    spill.seek(content[0])
                    content = spill.read(content[1])
                else:
                    held -= len(content or b"")
                yield pa.array([content], image.type)
                due += 1
            bar.update(due - bar.n)


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items (none may be None), produced by a thread that is up to LOOK_AHEAD items ahead."""
    with ThreadPoolExecutor(1) as thread:
        coming = deque(thread.submit(next, items, None) for _ in range(LOOK_AHEAD))
        while (item := coming.popleft().result()) is not None:
            coming.append(thread.submit(next, items, None))
            yield item


def row_groups(table: pa.Table, size: int, images: Iterator[pa.Array] | None, schema: pa.Schema) -> Iterator[pa.Table]:
    """`table` in pieces of `size` rows. Image columns, if any, are filled from `images` in order (0, 1, 0, 1, ...)."""
    for start in range(0, table.num_rows, size):
        piece = table.slice(start, size)
        columns = {name: piece[name] for name in piece.column_names}
        if images is not None:
            jpgs = list(islice(images, 2 * len(piece)))
            columns |= {name: pa.chunked_array(jpgs[i::2]) for i, name in enumerate(IMAGES)}
        yield pa.table([columns[name] for name in schema.names], schema=schema)


def write_parquet(path: Path, schema: pa.Schema, tables: Iterator[pa.Table], images_repeat: bool) -> None:
    """Writes each table as a row group. images_repeat: whether enough images repeat to use dictionaries."""
    columns = [name for name in schema.names if name not in IMAGES]
    # JPEGs do not compress, and their minimum and maximum are useless. A dictionary stores an image of several games
    # once per row group; if few images repeat, it only costs time.
    options = {
        "compression": {name: "none" if name in IMAGES else "zstd" for name in schema.names},
        "use_dictionary": schema.names if images_repeat else columns,
        "dictionary_pagesize_limit": 1 << 30,
        "write_statistics": columns,
        "write_batch_size": 8,  # check the page size after so many values: 1 MB pages, not one page for all images
    }
    with pq.ParquetWriter(path, schema, **options) as writer:
        for table in tables:
            writer.write_table(table)
