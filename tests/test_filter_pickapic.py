"""filter_pickapic.py, launched for real: its output, going on after an interruption, shipped configs, bad input."""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filter_data import SCHEMA, files, filtered, games, many_games, read_output, row, slow, table, write_shards
from PIL import Image
from support import python

import filter_pickapic
import train_ncp_cpo
import train_ncp_dpo
import train_ncp_sft
from filtering.settings import RULES, FilterConfig, part_of
from ncp.common.config import parse
from ncp.common.errors import UserError
from ncp.common.errors import run_program as run
from ncp.common.files import sha256, temporary_for

ROOT = Path(__file__).parents[1]


@pytest.fixture
def many_rows() -> list[dict]:
    return many_games()


def launch(*arguments: object) -> subprocess.CompletedProcess:
    return python("filter_pickapic.py", *arguments, HF_HUB_OFFLINE="1")


def test_launched_for_real(tmp_path, many_rows):
    source = write_shards(tmp_path / "in", many_rows, shards=3)
    write_shards(tmp_path / "in", [row("q>r", 1000, caption="held out")], prefix="validation")
    done = launch("--dataset_name", source, "--output_dir", tmp_path / "out", "--rows_per_file", 20)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    rows, counts = read_output(tmp_path / "out"), manifest["rows"]
    assert counts["input"] == 300 == counts["kept"] + sum(counts["dropped"].values())
    assert manifest["pairs"]["total"] == len(rows) == len(slow(many_rows, "absolute_winners", 1, "latest"))
    assert manifest["pairs"]["unique_prompts"] == len({r["caption"] for r in rows})
    assert manifest["pairs"]["images"] == len({r[f"image_{i}_uid"] for r in rows for i in (0, 1)})
    assert [r["file"] for r in manifest["inputs"]] == [f"data/train-0000{i}-of-00003.parquet" for i in range(3)]
    assert len(manifest["outputs"]) == -(-len(rows) // 20) > 1
    for output in manifest["outputs"]:
        path = tmp_path / "out" / output["file"]
        assert (path.stat().st_size, sha256(path)) == (output["size"], output["sha256"])
        assert pq.read_schema(path).remove_metadata() == SCHEMA
    # The written rows are the input's, every column of them, in order of time.
    original = {r["ranking_id"]: r for r in table(many_rows).to_pylist()}
    assert rows == [original[r["ranking_id"]] for r in rows]
    assert [(r["created_at"], r["ranking_id"]) for r in rows] == sorted(
        (r["created_at"], r["ranking_id"]) for r in rows
    )
    assert not [name for name in files(tmp_path / "out") if Path(name).name.startswith(".")]

    older = manifest | {"version": "0.0.9"}  # another version of this project has made the same
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(older))
    again = launch("--dataset_name", source, "--output_dir", tmp_path / "out", "--rows_per_file", 20)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    other = launch(
        "--dataset_name", source, "--output_dir", tmp_path / "out", "--rows_per_file", 20, "--rule", "no_ties"
    )
    assert other.returncode == 2 and "another run" in other.stderr and "options" in other.stderr


def test_datasets_reads_the_output_folder(tmp_path, many_rows):
    datasets = pytest.importorskip("datasets")
    filtered(write_shards(tmp_path / "in", many_rows), tmp_path / "out", "--rows_per_file", 20)
    loaded = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["ranking_id"][:] == [r["ranking_id"] for r in read_output(tmp_path / "out")]
    Image.open(io.BytesIO(loaded[0]["jpg_0"])).load()


@pytest.mark.parametrize("rule", RULES)
def test_output_does_not_depend_on_order_or_number_of_shards(tmp_path, many_rows, rule):
    outputs = []
    for i, shards in enumerate((1, 2, 7)):
        random.Random(i).shuffle(many_rows)
        filtered(write_shards(tmp_path / f"in{i}", many_rows, shards), tmp_path / f"out{i}", "--rule", rule)
        hashes = files(tmp_path / f"out{i}")
        hashes.pop("manifest.json")  # it names the input files
        report = (tmp_path / f"out{i}/report.html").read_text()
        hashes["report.html"] = report.replace(str(tmp_path / f"in{i}"), "the dataset")
        outputs.append(hashes)
    assert outputs[0] == outputs[1] == outputs[2] and outputs[0]


def test_metadata_only(tmp_path):
    rows = games("a>b c=d e=f a>c")
    manifest = filtered(write_shards(tmp_path / "in", rows, shards=2, group=1), tmp_path / "out", "--metadata_only")
    assert [i["row_groups_with_pairs"] for i in manifest["inputs"]] == [[], [1]]
    (kept,) = read_output(tmp_path / "out")
    assert kept == {k: v for k, v in table(rows).to_pylist()[3].items() if not k.startswith("jpg")}
    # A dataset without image columns is enough for it, and only for it.
    pq.write_table(table(rows).drop_columns(["jpg_0", "jpg_1"]), tmp_path / "bare.parquet")
    assert filtered(tmp_path / "bare.parquet", tmp_path / "out2", "--metadata_only")["pairs"] == manifest["pairs"]
    with pytest.raises(UserError, match="column jpg_0, jpg_1 is missing; --metadata_only needs no images"):
        filtered(tmp_path / "bare.parquet", tmp_path / "out3")


def test_best_image_uid_is_reported_and_not_needed_where_it_is_ignored(tmp_path, capsys):
    rows = [row("a>b", 1, best_image_uid="b"), row("c>d", 2, caption="dog")]
    source = write_shards(tmp_path / "in", rows)
    checked = filtered(source, tmp_path / "checked")
    assert checked["rows"]["dropped"]["contradictory_best_image_uid"] == 1 and checked["pairs"]["total"] == 1
    assert "- contradictory best image uid" in capsys.readouterr().out
    ignored = filtered(source, tmp_path / "ignored", "--best_image_uid", "ignore")
    assert "contradictory_best_image_uid" not in ignored["rows"]["dropped"] and ignored["pairs"]["total"] == 2
    assert re.search(r"! used despite best image uid +1\n", capsys.readouterr().out)
    for manifest in (checked, ignored):
        assert manifest["rows"]["contradictory_best_image_uid"] == 1
        assert manifest["rows"]["input"] == 2 == manifest["rows"]["kept"] + sum(manifest["rows"]["dropped"].values())
    report = {name: (tmp_path / name / "report.html").read_text() for name in ("checked", "ignored")}
    said = "Games whose best_image_uid is not that of the image that the labels prefer: 1; they were "
    assert said + "dropped before wins were counted" in report["checked"]
    assert said + "used as the labels say" in report["ignored"]

    bare = tmp_path / "bare.parquet"
    pq.write_table(table(rows).drop_columns(["best_image_uid"]), bare)
    assert filtered(bare, tmp_path / "bare", "--best_image_uid", "ignore")["pairs"] == ignored["pairs"]
    with pytest.raises(UserError, match="column best_image_uid is missing"):
        filtered(bare, tmp_path / "bare2")


def test_parts_of_several_machines_make_the_same_files(tmp_path, many_rows, capsys):
    source = write_shards(tmp_path / "in", many_rows, shards=2)
    filtered(source, tmp_path / "whole", "--rows_per_file", 5)
    for part in ("2/3", "1/3"):
        filter_pickapic.main(
            [
                "--dataset_name",
                str(source),
                "--output_dir",
                str(tmp_path / "parts"),
                "--rows_per_file=5",
                "--shard",
                part,
            ]
        )
    assert "still to come" in capsys.readouterr().out and not (tmp_path / "parts/manifest.json").exists()
    filtered(source, tmp_path / "parts", "--rows_per_file", 5)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert [list(part_of(f"{i}/3", 7)) for i in (1, 2, 3)] == [[0, 1], [2, 3], [4, 5, 6]]


def test_an_interrupted_run_leaves_whole_files_only_and_continues(tmp_path, many_rows, monkeypatch):
    source = write_shards(tmp_path / "in", many_rows, shards=2)
    filtered(source, tmp_path / "whole", "--rows_per_file", 5)
    original, calls = pq.ParquetWriter.write_table, []

    def fail_on_the_third(self, piece):
        calls.append(1)
        if len(calls) == 3:
            original(self, piece)
            raise KeyboardInterrupt
        original(self, piece)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", fail_on_the_third)
    with pytest.raises(KeyboardInterrupt):
        filtered(source, tmp_path / "out", "--rows_per_file", 5)
    names = files(tmp_path / "out")
    assert len([n for n in names if n.endswith(".parquet")]) == 2 and "manifest.json" not in names
    assert all(names[n] == files(tmp_path / "whole")[n] for n in names if n.endswith(".parquet"))
    with pytest.raises(UserError, match="another run"):
        filtered(source, tmp_path / "out", "--rule", "no_ties")
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "out/data").iterdir()}
    third = sorted(files(tmp_path / "whole"))[2]
    temporary_for(tmp_path / "out" / third).write_text("left by a killed run")
    filtered(source, tmp_path / "out", "--rows_per_file", 5)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert all(p.stat().st_mtime_ns == time for p, time in written.items())  # not written a second time


def test_a_changed_or_missing_output_file_is_noticed(tmp_path, many_rows):
    source = write_shards(tmp_path / "in", many_rows)
    manifest = filtered(source, tmp_path / "out")
    (tmp_path / "out" / manifest["outputs"][0]["file"]).unlink()
    with pytest.raises(UserError, match="has changed"):
        filtered(source, tmp_path / "out")


# Runs the filter, and kills it where it would give a file its name.
KILL = """
import os, signal, sys
from pathlib import Path
replace = os.replace
def kill(temporary, path):
    if Path(path).name == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(temporary, path)
os.replace = kill
import filter_pickapic
filter_pickapic.main(sys.argv[2:])
"""


@pytest.mark.parametrize("name", [".unfinished.json", "train-00001-of-00003.parquet", "report.html", "manifest.json"])
def test_what_a_killed_run_leaves_is_removed_by_the_next(tmp_path, many_rows, name):
    source = write_shards(tmp_path / "in", many_rows)
    filtered(source, tmp_path / "whole", "--rows_per_file", 15)
    arguments = ["--dataset_name", source, "--output_dir", tmp_path / "out", "--rows_per_file", 15]
    assert python("-c", KILL, name, *arguments).returncode == -signal.SIGKILL
    (left,) = (tmp_path / "out").rglob(f".{name}.*tmp")  # beside it, perhaps, the next file, which was being written
    assert not (tmp_path / "out/manifest.json").exists()
    if name.endswith(".parquet"):  # a part that does not own the file leaves it alone: somebody else may be writing it
        filter_pickapic.main([*map(str, arguments), "--shard", "1/3"])
        assert left.exists()
    filtered(source, tmp_path / "out", "--rows_per_file", 15)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("at", [".unfinished.json", "train-00000-of-00003.parquet", "manifest.json"])
def test_a_full_disk_is_one_line(tmp_path, many_rows, monkeypatch, at):
    fsync = os.fsync

    def full(handle):
        if any(at in path.name for path in (tmp_path / "out").rglob("*.tmp")):
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write to .*No space left"):
        filtered(write_shards(tmp_path / "in", many_rows), tmp_path / "out", "--rows_per_file", 15)
    left = {Path(name).name for name in files(tmp_path / "out")} if (tmp_path / "out").exists() else set()
    assert at not in left and not [name for name in left if name.endswith(".tmp")]


def test_every_training_config_reads_what_a_filter_config_writes():
    filters = [
        parse(FilterConfig, ["--config", str(p)]) for p in (ROOT / "configs").glob("*.yaml") if "filter" in p.stem
    ]
    written = {f.output_dir for f in filters}
    scripts, read = {"dpo": train_ncp_dpo, "cpo": train_ncp_cpo, "sft": train_ncp_sft}, {}
    for path in (ROOT / "configs").glob("*.yaml"):
        if (kind := path.stem.rpartition("_")[2]) in scripts:
            read[path.stem] = parse(scripts[kind].Config, ["--config", str(path)]).dataset_name
    raw = {f.dataset_name for f in filters}  # which the large runs read
    assert len(read) > 10 and all(folder in (raw if "_full_" in n else written) for n, folder in read.items()), read
    # And what the README has it write.
    assert all(folder in written for folder in re.findall(r"--output_dir (data/\S+)", (ROOT / "README.md").read_text()))


def bad_inputs(tmp: Path) -> dict[str, tuple[list[object], str]]:
    """Arguments, and a part of the one line that they must give."""
    good = write_shards(tmp / "good", games("a>b a=c d>e"), shards=2)
    whole = (good / "data/train-00001-of-00002.parquet").read_bytes()

    def spoiled(name: str, content: bytes) -> Path:
        folder = write_shards(tmp / name, games("a>b a=c d>e"), shards=2)
        (folder / "data/train-00001-of-00002.parquet").write_bytes(content)
        return folder

    def reshaped(name: str, change) -> Path:
        folder = write_shards(tmp / name, games("a>b a=c d>e"), shards=2)
        path = folder / "data/train-00001-of-00002.parquet"
        pq.write_table(change(pq.read_table(path)), path)
        return folder

    def typed(name: str, column: str) -> Path:
        rows = table(games("a>b"))
        field = rows.schema.get_field_index(column)
        pq.write_table(rows.set_column(field, column, pa.array([["x"]])), tmp / f"{name}.parquet")
        return tmp / f"{name}.parquet"

    def invalid(path: Path) -> Path:
        made = table(games("a>b"))
        buffers = [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")]
        caption = pa.Array.from_buffers(pa.string(), 1, buffers)
        pq.write_table(made.set_column(made.schema.get_field_index("caption"), "caption", caption), path)
        return path

    mixed = write_shards(tmp / "mixed", games("a>b"))
    write_shards(mixed, games("a>b"), prefix="more")
    (tmp / "taken").mkdir()
    (tmp / "taken/notes.txt").write_text("mine")
    (tmp / "foreign").mkdir()
    (tmp / "foreign/manifest.json").write_text("[]")
    (tmp / "empty").mkdir()
    pq.write_table(table([]), tmp / "rowless.parquet")
    second = "train-00001-of-00002.parquet"
    return {
        "missing folder": ([tmp / "nowhere"], "no such file or folder"),
        "missing file": (["data/nothing.parquet"], "no such file or folder"),
        "missing folder in one that is there": (["tests/nothing"], "no such file or folder: tests/nothing"),
        "hub offline": (["someone/nothing"], "'someone/nothing' is no local path, and the hub gave no such dataset"),
        "empty folder": ([tmp / "empty"], "no parquet files in"),
        "missing split": ([good, "--dataset_split", "test"], "no parquet files for split 'test'"),
        "not parquet": ([spoiled("text", b"hello " * 100)], f"{second}: not a readable parquet file"),
        "empty file": ([spoiled("zero", b"")], f"{second}: not a readable parquet file"),
        "truncated": ([spoiled("cut", whole[:-100])], f"{second}: not a readable parquet file"),
        "damaged inside": (
            [spoiled("damaged", whole[:4] + b"\xff" * 3000 + whole[3004:])],
            f"{second}: not a readable",
        ),
        "missing column": (
            [reshaped("narrow", lambda t: t.drop_columns(["label_1"]))],
            f"{second}: column label_1 is missing",
        ),
        "other schema": (
            [reshaped("wide", lambda t: t.append_column("extra", t["user_id"]))],
            f"{second}: schema differs",
        ),
        "wrong type": ([typed("typed", "label_0")], "typed.parquet: column label_0 is list"),
        "no rows": ([tmp / "rowless.parquet"], "leaves no pair of 0 rows"),
        "nothing left": (
            [good, "--min_wins", 9],
            "leaves no pair of 3 rows (1 tie, 1 not_an_absolute_winner, 1 too_few_wins)",
        ),
        "no UTF-8": ([invalid(tmp / "invalid.parquet")], "invalid.parquet: a caption or uid is not valid UTF-8"),
        "unclear split": ([mixed], "unclear which are the parquet files for split 'train' in"),
        "unknown rule": ([good, "--rule", "y_x"], "expected one of: no_ties"),
        "bad date": ([good, "--created_from", "soon"], "created_from is 'soon'"),
        "bad part": ([good, "--shard", "3/2"], "shard is '3/2'"),
        "unknown key": ([good, "--min_win", 2], "did you mean --min_wins?"),
        "folder taken": ([good, "--output_dir", tmp / "taken"], "holds something else"),
        "foreign manifest": ([good, "--output_dir", tmp / "foreign"], "is not this script's"),
        "output is a file": ([good, "--output_dir", tmp / "rowless.parquet"], "is a file"),
        "output inside the input": ([good, "--output_dir", good / "out"], "lies inside the dataset"),
    }


def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys):
    for name, (arguments, expected) in bad_inputs(tmp_path).items():
        before = files(tmp_path)
        arguments = ["--output_dir", tmp_path / "out", "--dataset_name", *arguments]
        if name in ("truncated", "hub offline"):
            done = launch(*arguments)
            status, lines = done.returncode, done.stderr.strip().splitlines()
        else:  # what the script does, without waiting for a process
            with pytest.raises(SystemExit) as stopped:
                run(lambda arguments=arguments: filter_pickapic.main([str(a) for a in arguments]))
            status, lines = stopped.value.code, capsys.readouterr().err.strip().splitlines()
        assert status == 2, (name, lines)
        assert len(lines) == 1 and lines[0].startswith("error: ") and expected in lines[0], (name, lines)
        assert files(tmp_path) == before and not (tmp_path / "out").exists(), name
