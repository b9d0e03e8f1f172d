"""The copy: images in output order, of made-up pairs too; what is read, stored, and kept in memory."""

from __future__ import annotations

import io
import random

import numpy as np
import pyarrow.parquet as pq
import pytest
from filter_data import config, filtered, games, jpeg, many_games, read_output, row, table, write_shards

from filtering import copy
from filtering.copy import images_in_order
from filtering.settings import DECISION
from filtering.source import open_shards


@pytest.fixture
def many_rows() -> list[dict]:
    return many_games()


def test_a_made_up_row_takes_its_images_from_the_rows_that_hold_them(tmp_path):
    # y>z as image 1 and 0, x>y likewise, each in a row group of its own: z's picture is in the first.
    rows = games("z<y x>b y<x", caption="prompt")
    source = write_shards(tmp_path / "in", rows, shards=3, group=1)
    manifest = filtered(source, tmp_path / "out", "--rule", "x_y_xz")
    assert manifest["pairs"] | {"sha256": ""} == {
        "total": 2,
        "made_up": 1,
        "unique_prompts": 1,
        "images": 3,
        "sha256": "",
    }
    assert manifest["rows"]["kept"] == 1
    real, made_up = read_output(tmp_path / "out")
    assert real == table(rows).to_pylist()[2]
    assert made_up == real | {
        "best_image_uid": "x",
        "image_0_uid": "x",
        "image_0_url": "https://example.invalid/x",
        "image_1_uid": "z",
        "image_1_url": "https://example.invalid/z",
        "jpg_0": jpeg("prompt", "x"),
        "jpg_1": jpeg("prompt", "z"),
        "label_0": 1.0,
        "label_1": 0.0,
        "model_0": "model of x",
        "model_1": "model of z",
        "ranking_id": -4,  # ~3
        "user_id": None,
    }
    # Votes on x and y are none on x and z.
    for file, share in zip(sorted(source.rglob("*.parquet")), (0.9, 0.2, 0.3), strict=True):
        pq.write_table(pq.read_table(file).append_column("share_0", [[share]]), file)
    filtered(source, tmp_path / "votes", "--rule", "x_y_xz")
    assert [r["share_0"] for r in read_output(tmp_path / "votes")] == [0.3, None]
    # Filtering the output again finds nothing malformed in it.
    assert filtered(tmp_path / "out", tmp_path / "again", "--rule", "no_ties")["rows"]["kept"] == 2


def test_images_that_wait_on_disk_come_back_the_same(tmp_path, many_rows):
    random.Random(5).shuffle(many_rows)
    shards, _ = open_shards(config(dataset_name=str(write_shards(tmp_path / "in", many_rows, shards=2))))
    rows = np.random.default_rng(0).permutation(300).repeat(2)
    sides = np.tile([0, 1], 300)
    expected = [many_rows[r][f"jpg_{s}"] for r, s in zip(rows, sides, strict=True)]
    for hold in (0, 5000, 10**9):
        images = images_in_order(shards, rows, sides, tmp_path, hold)
        assert [image[0].as_py() for image in images] == expected


@pytest.mark.parametrize(
    ("order", "spilled"),
    [
        # Every image is due when it is read.
        ("sorted", 0),
        # 1 0 3 2 ...: the two images of one row wait, in memory, for those of the next.
        ("swapped", 0),
        # In a row group of 4 rows the first three rows' 6 images come early, and 2 find room in memory. Each file of
        # 150 rows has 37 such groups and one of 2 rows, whose 2 early images find room: 2 * 37 * 4.
        ("reversed", 296),
    ],
)
def test_images_wait_on_disk_only_if_memory_is_short(tmp_path, monkeypatch, order, spilled):
    written = []

    class Spill(io.BytesIO):
        def write(self, content):
            written.append(content)
            return super().write(content)

    monkeypatch.setattr(copy.tempfile, "TemporaryFile", lambda dir: Spill())
    rows = [row("a>b", i, jpg_0=b"%04d" % (2 * i), jpg_1=b"%04d" % (2 * i + 1)) for i in range(300)]
    # The second half lies in the first file: row groups must be read in the order in which they are due.
    source = write_shards(tmp_path / "in", rows[150:] + rows[:150], shards=2, group=4)
    shards, _ = open_shards(config(dataset_name=str(source)))
    due = {"sorted": np.arange(300), "swapped": np.arange(300) ^ 1, "reversed": np.arange(300)[::-1]}[order]
    positions = (due + 150) % 300
    room_for_two = 2 * 4
    images = images_in_order(shards, positions.repeat(2), np.tile([0, 1], 300), tmp_path, room_for_two)
    found = [image[0].as_py() for image in images]
    assert found == [b"%04d" % (2 * i + side) for i in due for side in (0, 1)]
    assert len(written) == spilled


def test_repeated_images_are_stored_once_per_row_group(tmp_path):
    noise = random.Random(0)
    blob = {uid: noise.randbytes(10_000) for uid in "abc"}
    rows = [row(game, i, jpg_0=blob[game[0]], jpg_1=blob[game[2]]) for i, game in enumerate(["a>b", "a>c"] * 40)]
    manifest = filtered(write_shards(tmp_path / "in", rows), tmp_path / "out", "--rule", "no_ties")
    # 80 rows hold 1.6 MB of images, of which a (as image 0), b and c are different: 30 kB in each of 8 row groups.
    assert 8 * 30_000 < manifest["outputs"][0]["size"] < 8 * 38_000
    assert [(r["jpg_0"], r["jpg_1"]) for r in read_output(tmp_path / "out")] == [(r["jpg_0"], r["jpg_1"]) for r in rows]


def test_decision_reads_no_image_and_copy_skips_unused_row_groups(tmp_path, monkeypatch):
    rows = games("a>b c=d e=f a>c")
    source = write_shards(tmp_path / "in", rows, group=1)
    seen = []
    for name in ("read", "iter_batches"):
        original = getattr(pq.ParquetFile, name)

        def spy(self, *args, _original=original, **kwargs):
            seen.append((kwargs["columns"], kwargs.get("row_groups")))
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(pq.ParquetFile, name, spy)
    filtered(source, tmp_path / "out")
    with_images = [groups for columns, groups in seen if set(columns) & {"jpg_0", "jpg_1"}]
    assert with_images == [[3], [0]]  # the input's for the copy, then the output's for the report
    assert seen[0] == (list(DECISION), None)
