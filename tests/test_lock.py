"""An output folder has one writer at a time, and a lock goes with its process."""

import os
import signal
import sys
import types

import pytest
from runs import arguments, launch
from support import ROOT, started, wait_for

from ncp.common import lock
from ncp.common.errors import UserError

HOLD = "import sys, time; from pathlib import Path; from ncp.common import lock\n"
HOLD += "lock.hold(Path(sys.argv[1]), *sys.argv[2:]); print('held', flush=True); time.sleep(3600)"


def holder(folder, *part: str):
    """A process that holds the folder; with its first line read, it does."""
    return started([sys.executable, "-c", HOLD, folder, *part], PYTHONPATH=str(ROOT))


@pytest.fixture(autouse=True)
def free():
    yield
    lock.release()


def test_a_second_writer_is_refused_by_name_until_the_first_is_gone(tmp_path):
    folder = tmp_path / "deep" / "out"
    with holder(folder) as first:
        assert first.stdout.readline() == "held\n"
        line = rf"^{folder}: another run \(process {first.pid} on .+, since 20.*\) is writing to it; wait until"
        with pytest.raises(UserError, match=line):
            lock.hold(folder)
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert (folder / lock.NAME).exists() and lock.is_empty(folder)  # what a killed process leaves means nothing
    lock.hold(folder)
    lock.hold(folder)  # this process has it already
    lock.release()
    assert folder.is_dir() and not list(folder.iterdir())


def test_what_the_lock_alone_has_made_goes_with_it(tmp_path):
    (tmp_path / "there").mkdir()
    lock.hold(tmp_path / "there" / "new" / "out")
    lock.release()
    assert not list((tmp_path / "there").iterdir())
    with lock.one_writer(tmp_path / "out"):
        (tmp_path / "out" / "result").write_text("x")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["result"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        lock.hold(tmp_path / "file")
    with pytest.raises(UserError, match=r"cannot write to .* \(Not a directory\)"):
        lock.hold(tmp_path / "file" / "out")


def test_a_forked_worker_neither_keeps_the_lock_nor_gives_it_up(tmp_path):
    fork = "import os; from pathlib import Path; from ncp.common import lock; lock.hold(Path('{}')); pid = os.fork()\n"
    fork += "if not pid: {}\n"
    fork += "os.waitpid(pid, 0); {}"
    # The child ends as any Python process does: its parent holds the folder still.
    ends = fork.format(tmp_path, "raise SystemExit", "print('held', flush=True); __import__('time').sleep(3600)")
    with started([sys.executable, "-c", ends], PYTHONPATH=str(ROOT)) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another run"):
            lock.hold(tmp_path)
    # The child lives on after its parent, which was killed: nobody holds the folder.
    stays = fork.replace("os.waitpid(pid, 0)", "print(pid, flush=True)")
    stays = stays.format(tmp_path, "__import__('time').sleep(3600)", "os.kill(os.getpid(), 9)")
    with started([sys.executable, "-c", stays], PYTHONPATH=str(ROOT)) as process:
        child = int(process.stdout.readline())
        assert wait_for(lambda: process.poll() is not None)
        os.kill(child, 0)  # is there
        lock.hold(tmp_path)


def test_parts_that_do_not_overlap_are_held_at_once(tmp_path):
    with holder(tmp_path, "1/2") as first, holder(tmp_path, "3/4") as second:
        assert [p.stdout.readline() for p in (first, second)] == ["held\n"] * 2
        for part, pid in (("1/2", first.pid), ("2/4", first.pid), ("2/2", second.pid), ("1/1", "(?:.*)")):
            with pytest.raises(UserError, match=rf"another run \(process {pid} on"):
                lock.hold(tmp_path, part)
        lock.hold(tmp_path, "4/4")
        lock.release()
        assert (tmp_path / lock.NAME).exists()  # for the others
        with pytest.raises(UserError, match="another run"):
            lock.hold(tmp_path)


def test_a_lock_that_its_holder_just_removed_is_not_taken_for_one(tmp_path, monkeypatch):
    """Opened before, locked after the removal: a third process would make, and lock, a file of its own."""
    take, calls = lock._lock, []

    def removed_meanwhile(*span):
        calls.append(1)
        if len(calls) == 1:
            (tmp_path / lock.NAME).unlink()
        return take(*span)

    monkeypatch.setattr(lock, "_lock", removed_meanwhile)
    lock.hold(tmp_path)
    assert len(calls) == 2
    held = lock._held[tmp_path / lock.NAME].file
    assert os.path.samestat(os.fstat(held), os.stat(tmp_path / lock.NAME))


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", none)
    lock.hold(tmp_path)
    assert "has no file locks; nothing keeps a second run out" in capsys.readouterr().err
    lock.release()
    assert not list(tmp_path.iterdir())


def test_windows_locks_are_asked_for_the_same_bytes(tmp_path, monkeypatch):
    """msvcrt.locking works from the file's position on, and closes before it removes."""
    calls = []

    def locking(file, mode, length):
        calls.append((mode, os.lseek(file, 0, os.SEEK_CUR), length))
        if mode == 2 and blocked:
            raise PermissionError(13, "Permission denied")

    blocked = False
    monkeypatch.setattr(lock, "fcntl", None)
    windows = types.SimpleNamespace(LK_NBLCK=2, LK_UNLCK=0, locking=locking)
    monkeypatch.setattr(lock, "msvcrt", windows, raising=False)
    lock.hold(tmp_path, "2/2")
    half = lock.SPAN // 2
    assert calls == [(2, lock.SPAN + half, half)]
    assert f'"process": {os.getpid()}' in (tmp_path / lock.NAME).read_text()
    lock.release()
    assert calls[1:] == [(0, lock.SPAN + half, half), (2, lock.SPAN, lock.SPAN)] and not list(tmp_path.iterdir())
    blocked = True
    with pytest.raises(UserError, match="another run"):
        lock.hold(tmp_path)


# ---------------------------------------------------------------- the programs


def command(program: str, assets, out) -> list[str]:
    if program == "cache_latents.py":
        return arguments(assets, assets / "unused", "--cached_latents", str(out))
    if program == "filter_pickapic.py":
        return ["--dataset_name", str(ROOT / "tiny/data"), "--output_dir", str(out)]
    return ["generate", "--config", str(ROOT / "configs/eval_tiny.yaml"), "--models", "base", "--output_dir", str(out)]


@pytest.mark.parametrize("program", ["cache_latents.py", "filter_pickapic.py", "evaluate.py"])  # and the trainers below
def test_each_program_is_refused_a_folder_that_another_process_writes_to(assets, tmp_path, program):
    out = tmp_path / "out"
    with holder(out) as other:
        assert other.stdout.readline() == "held\n"
        before = (out / lock.NAME).read_text()
        done = launch(program, command(program, assets, out))
        assert other.poll() is None and [p.name for p in out.iterdir()] == [lock.NAME]
        assert (out / lock.NAME).read_text() == before
    errors = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert done.returncode == 2 and "Traceback" not in done.stderr and len(errors) == 1, done.stderr
    assert errors[0].startswith(f"error: {out}: another run (process {other.pid} on "), errors


def test_of_two_runs_started_together_one_trains_and_one_is_refused(assets, tmp_path):
    out = tmp_path / "out"
    argv = [
        "train_ncp_dpo.py",
        *arguments(assets, out, "--resume_from_checkpoint", "auto", "--max_train_steps", "9999"),
    ]
    with started([sys.executable, *argv]) as one, started([sys.executable, *argv]) as two:
        assert wait_for(lambda: one.poll() is not None or two.poll() is not None)
        refused, other = (one, two) if one.poll() is not None else (two, one)
        _, said = refused.communicate()
        assert refused.returncode == 2 and f"another run (process {other.pid} on" in said, said
        assert wait_for(lambda: (out / "config.yaml").is_file()) and other.poll() is None
        other.send_signal(signal.SIGKILL)
        other.wait()
    lock.hold(out)  # the killed run's lock is gone with it


def test_parts_of_a_filter_run_at_once_but_not_the_same_twice(tmp_path):
    shared = [
        "--dataset_name",
        str(ROOT / "tiny/data"),
        "--output_dir",
        str(tmp_path / "out"),
        "--rows_per_file",
        "100",
    ]
    with holder(tmp_path / "out", "1/2") as other:
        assert other.stdout.readline() == "held\n"
        refused = [launch("filter_pickapic.py", [*shared, *part]) for part in (["--shard", "1/2"], [])]
        assert all(d.returncode == 2 and f"process {other.pid} on" in d.stderr for d in refused), refused
        second = launch("filter_pickapic.py", [*shared, "--shard", "2/2"])
        assert second.returncode == 0 and "still to come" in second.stdout, second.stderr
    for part in (["--shard", "1/2"], []):
        assert launch("filter_pickapic.py", [*shared, *part]).returncode == 0
    assert (tmp_path / "out" / "manifest.json").is_file() and not (tmp_path / "out" / lock.NAME).exists()
