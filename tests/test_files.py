"""Files and folders are there whole or not at all: written aside, on the disk, then given their name."""

import os
import signal
import stat
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import ROOT, started

from ncp.common import files
from ncp.common.files import is_temporary, put_in_place, sampled_sha256, sha256, temporary_for, write_file, write_text


def make_file(content: str):
    return lambda path: path.write_text(content)


def make_folder(*contents: str):
    def make(folder: Path) -> None:
        folder.mkdir()
        for number, content in enumerate(contents):
            (folder / str(number)).write_text(content)

    return make


def read(path: Path) -> list[str]:
    """The contents of a file, or of a folder's files by name."""
    return [p.read_text() for p in (sorted(path.iterdir()) if path.is_dir() else [path])]


KINDS = {"file": (make_file("old"), make_file("new")), "folder": (make_folder("old", "x"), make_folder("new"))}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_takes_the_place_of_what_was_there(tmp_path, kind):
    old, new = KINDS[kind]
    write_file(tmp_path / "a", old)
    assert read(tmp_path / "a")[0] == "old"
    write_file(tmp_path / "a", new)
    assert read(tmp_path / "a") == ["new"] and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_writer_that_fails_leaves_what_was_there_and_nothing_else(tmp_path, kind):
    old, new = KINDS[kind]
    write_file(tmp_path / "a", old)
    before = read(tmp_path / "a")

    def fail(path: Path) -> None:
        new(path)
        raise KeyboardInterrupt

    for name in ("a", "b"):
        with pytest.raises(KeyboardInterrupt):
            write_file(tmp_path / name, fail)
    assert read(tmp_path / "a") == before and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_fails_to_keep_it_leaves_what_was_there(tmp_path, monkeypatch, kind):
    """A full disk, or one behind a network, may say so only when the content is to be on it."""
    old, new = KINDS[kind]
    write_file(tmp_path / "a", old)
    before, calls = read(tmp_path / "a"), []

    def fail_at(last: int):
        def fsync(_: int) -> None:
            calls.append(1)
            if len(calls) == last:
                raise OSError(28, "No space left on device")

        return fsync

    for last in (1, 2) if kind == "folder" else (1,):  # of a file in the folder, of the folder
        calls.clear()
        monkeypatch.setattr(files.os, "fsync", fail_at(last))
        with pytest.raises(OSError, match="No space left"):
            write_file(tmp_path / "a", new)
        assert read(tmp_path / "a") == before and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_disk_has_the_content_before_it_has_the_name(tmp_path, monkeypatch, kind):
    events, fsync, replace = [], os.fsync, os.replace

    def note_fsync(handle: int) -> None:
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{handle}")).relative_to(tmp_path).as_posix()))
        fsync(handle)

    def note_replace(source: Path, target: Path) -> None:
        events.append(("replace", target.name))
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", note_fsync)
    monkeypatch.setattr(files.os, "replace", note_replace)
    write_file(tmp_path / "a", KINDS[kind][0])
    inside = [("fsync", ".a.tmp/0"), ("fsync", ".a.tmp/1")] if kind == "folder" else []
    assert sorted(events[:-3]) == inside
    assert events[-3:] == [("fsync", ".a.tmp"), ("replace", "a"), ("fsync", ".")]


HALF = """
import os, sys
from pathlib import Path
from ncp.common.files import write_file
def half(path):
    path.write_text("ha")
    print("half", flush=True)
    sys.stdin.readline()
write_file(Path(sys.argv[1]), half)
"""


def test_what_a_killed_process_leaves_is_hidden_and_goes_with_the_next_write(tmp_path):
    write_text(tmp_path / "a", "old")
    reader, writer = os.pipe()
    with started([sys.executable, "-c", HALF, tmp_path / "a"], stdin=reader, PYTHONPATH=str(ROOT)) as process:
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    os.close(reader)
    os.close(writer)
    left = temporary_for(tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == [left.name, "a"] and is_temporary(left) and read(tmp_path / "a") == ["old"]
    with pytest.raises(ZeroDivisionError):
        write_file(tmp_path / "a", lambda path: 1 / path.exists())  # it is gone before anything is written
    assert os.listdir(tmp_path) == ["a"]
    make_folder("x")(left)  # whatever it is
    write_text(tmp_path / "a", "new")
    assert read(tmp_path / "a") == ["new"] and os.listdir(tmp_path) == ["a"]


def test_put_in_place_needs_a_finished_file(tmp_path):
    write_text(tmp_path / "a", "old")
    with pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / "none", tmp_path / "a")
    assert read(tmp_path / "a") == ["old"]


def test_text_is_utf8_with_the_line_ends_that_were_asked_for(tmp_path):
    write_text(tmp_path / "a", "é\n")
    write_text(tmp_path / "b", "é\n", newline="\r\n")
    assert (tmp_path / "a").read_bytes() == b"\xc3\xa9\n" and (tmp_path / "b").read_bytes() == b"\xc3\xa9\r\n"


def test_temporary_names_are_known():
    assert temporary_for(Path("folder/a.txt")) == Path("folder/.a.txt.tmp")
    names = {".a.txt.tmp": True, "a.txt": False, "a.tmp": False, ".tmp": False, ".hidden": False}
    assert {name: is_temporary(Path(name)) for name in names} == names


# ---------------------------------------------------------------- digests


def test_a_digest_is_of_all_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2


def test_a_sampled_digest_tells_names_sizes_and_both_ends_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SAMPLE_BYTES", 10)
    content, seen = bytes(range(256)) * 4, set()
    variants = {"a": content, "b": content}  # the name
    variants |= {"c/a": content[:-1], "d/a": b"x" + content[1:], "e/a": content[:-1] + b"x"}  # the size, each end
    for name, data in variants.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(data)
        seen.add(sampled_sha256([file]))
    assert len(seen) == 5
    both = [tmp_path / "a", tmp_path / "b"]
    assert sampled_sha256(both) == sampled_sha256(both[::-1]) not in seen


def test_files_may_be_read_by_whom_the_umask_lets(tmp_path):
    """safetensors writes 0600, whatever the umask is."""
    save_file({"x": torch.ones(2)}, tmp_path / "plain")
    write_file(tmp_path / "one", lambda path: save_file({"x": torch.ones(2)}, path))
    write_file(tmp_path / "many", lambda path: (path.mkdir(), save_file({"x": torch.ones(2)}, path / "x")))
    ordinary = tmp_path / "text"
    ordinary.write_text("")
    wanted = stat.S_IMODE(ordinary.stat().st_mode)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("one", "many/x")] == [wanted] * 2
