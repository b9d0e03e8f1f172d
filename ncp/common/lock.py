"""One writer at a time for an output folder.

The operating system holds the lock, on a byte range of a file in the folder. It ends when the process that holds it
ends, for any reason, and worker processes do not inherit it. The process must not open the file a second time: under
POSIX, closing it would release the lock. The file names the holder, and is removed with the lock. A file that a killed
process has left has no effect.
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
# Number of bytes that represent the whole folder. They begin at offset SPAN, behind the text: on Windows a locked byte
# cannot be read.
SPAN = 1 << 30


@dataclass
class _Lock:
    file: int
    start: int
    length: int
    process: int
    made: list[Path]  # folders that this process created, outermost first


_held: dict[Path, _Lock] = {}


def hold(folder: Path, part: str = "1/1") -> None:
    """Makes this process the folder's writer until it ends, or until `release`. Creates the folder if necessary.

    part: "i/n" for the i-th of n writers that share the folder. Parts that do not overlap may be held at the same time.
    Raises UserError if another process (named in the message) holds the folder, or if the folder cannot be written.
    Prints a warning if the file system has no locks. A second call for the same folder does nothing.
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
    """Releases every lock of this process. Removes the lock files and the empty folders that it created."""
    for path, lock in list(_held.items()):
        del _held[path]
        if lock.process != os.getpid():  # a copy in a forked process
            continue
        with suppress(OSError):
            _unlock(lock.file, lock.start, lock.length)
        with suppress(OSError):
            if _lock(lock.file, SPAN, SPAN) is not False and _is(path, lock.file):  # no other part is held
                if fcntl is None:
                    os.close(lock.file)  # Windows cannot remove an open file
                path.unlink()
                for folder in reversed(lock.made):
                    folder.rmdir()
        with suppress(OSError):
            os.close(lock.file)


atexit.register(release)


@contextmanager
def one_writer(folder: Path, part: str = "1/1", processes: Any = None) -> Iterator[None]:
    """Holds the folder inside the block.

    processes: the Accelerator (or its state) of several processes that write to the folder together. The main process
    holds the lock for all, and all raise its error.
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
    """Whether a folder holds nothing, lock files and temporary files of killed processes aside."""
    return all(p.name == NAME or is_temporary(p) for p in folder.iterdir())


def _holder(path: Path, start: int, length: int) -> str:
    """The holder of a part that overlaps, in words; empty if the file does not name it."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        notes = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        # The last line counts: a process writes its line only after it holds the part.
        note = [x for x in notes if x["start"] < start + length and start < x["start"] + x["length"]][-1]
        return f" (process {note['process']} on {note['host']}, since {note['since']})"
    return ""


def _is(path: Path, file: int) -> bool:
    """Whether the path still refers to the open file."""
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
