"""One writer at a time for an output folder.

The lock is the system's, on a byte range of a file in the folder: it goes with the process that holds it, however that
ends, and its workers do not inherit it. (Nor may the process open the file for anything else: closing it would end the
lock, as POSIX has it.) The file names the holder, and is removed with the lock; one that a killed process has left
means nothing.
"""

from __future__ import annotations

import atexit
import errno
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ncp.common.errors import UserError
from ncp.common.files import is_temporary

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
    import msvcrt

NAME = ".writer.lock"
# Bytes that stand for the whole folder. They begin at SPAN: nobody can read a locked byte on Windows.
SPAN = 1 << 30


@dataclass
class _Lock:
    file: int
    start: int
    length: int
    process: int
    made: list[Path]  # folders that were not there before, outermost first


_held: dict[Path, _Lock] = {}


def hold(folder: Path, part: str = "1/1") -> None:
    """Makes this process the folder's writer until it ends, or until `release`. Makes the folder if it is not there.

    part: "i/n" for the i-th of n writers that share the folder. Parts that do not overlap may be held at once.
    Raises UserError, naming the process, if another holds it; and if the folder cannot be written. Where the file
    system has no locks, a line says so. A folder that this process holds already stays held.
    """
    path = folder.absolute() / NAME
    if path in _held and _is(path, _held[path].file):
        return
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; expected a folder to write to")
    i, n = map(int, part.split("/"))
    start = SPAN + (i - 1) * SPAN // n
    length = SPAN + i * SPAN // n - start
    try:
        made = [p for p in (*reversed(path.parent.parents), path.parent) if not p.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(100):
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            free = _lock(file, start, length)
            if free is False:
                holder = _holder(path, start, length)
                os.close(file)
                raise UserError(
                    f"{folder}: another run{holder} is writing to it; wait until it has ended, or choose another folder"
                )
            if _is(path, file):
                break
            os.close(file)  # its last holder has just removed it
        if free is None:
            print(f"warning: {folder} has no file locks; nothing keeps a second run out of it", file=sys.stderr)
        _held[path] = _Lock(file, start, length, os.getpid(), made)
        note = {"start": start, "length": length, "process": os.getpid(), "host": socket.gethostname()}
        if n == 1:
            os.ftruncate(file, 0)
        os.lseek(file, 0, os.SEEK_END)
        os.write(file, (json.dumps(note | {"since": time.strftime("%Y-%m-%d %H:%M")}) + "\n").encode())
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror or error})", everywhere=False) from None


def release() -> None:
    """Gives up every lock of this process, and removes what it alone has made: the lock's file, empty folders."""
    for path, lock in list(_held.items()):
        del _held[path]
        if lock.process != os.getpid():  # a fork's copy
            continue
        with suppress(OSError):
            _unlock(lock.file, lock.start, lock.length)
        with suppress(OSError):
            if _lock(lock.file, SPAN, SPAN) is not False and _is(path, lock.file):  # no other part is held
                if fcntl is None:
                    os.close(lock.file)  # an open file cannot be removed there
                path.unlink()
                for folder in reversed(lock.made):
                    folder.rmdir()
        with suppress(OSError):
            os.close(lock.file)


atexit.register(release)


@contextmanager
def one_writer(folder: Path, part: str = "1/1", processes: Any = None) -> Iterator[None]:
    """Holds the folder inside the block.

    processes: the Accelerator (or its state) of several processes that write to it together: the main one holds it for
    all, and all raise what it meets.
    """
    refusal = None
    if processes is None or processes.is_main_process:
        try:
            hold(folder, part)
        except UserError as error:
            refusal = str(error)
    if processes is not None:
        from accelerate.utils import broadcast_object_list

        (refusal,) = broadcast_object_list([refusal])
    if refusal:
        raise UserError(refusal)
    try:
        yield
    finally:
        release()


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but, perhaps, a lock and what killed processes left under temporary names."""
    return all(p.name == NAME or is_temporary(p) for p in folder.iterdir())


def _holder(path: Path, start: int, length: int) -> str:
    """Who holds a part that overlaps, in words; empty if the file does not say."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        notes = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        # The last of them: no one notes a part before it holds it.
        note = [x for x in notes if x["start"] < start + length and start < x["start"] + x["length"]][-1]
        return f" (process {note['process']} on {note['host']}, since {note['since']})"
    return ""


def _is(path: Path, file: int) -> bool:
    """Whether the path still leads to the open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except OSError:
        return False


def _lock(file: int, start: int, length: int) -> bool | None:
    """Locks a byte range; False if another process has it, None if the file system has no locks."""
    try:
        if fcntl is None:
            os.lseek(file, start, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_NBLCK, length)
        else:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)  # not flock: workers would inherit it
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK) else None
    return True


def _unlock(file: int, start: int, length: int) -> None:
    if fcntl is None:
        os.lseek(file, start, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_UNLCK, length)
    else:
        fcntl.lockf(file, fcntl.LOCK_UN, length, start)
