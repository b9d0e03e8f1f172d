"""Atomic writes (a file exists complete or not at all), and digests of files."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ncp.common.errors import UserError

SAMPLE_BYTES = 1 << 16
UMASK = os.umask(0o022)  # the umask can only be read by setting it
os.umask(UMASK)


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write(temporary path)`, which makes a file or a folder, and then renames it to `path`.

    `path` is therefore never incomplete. If anything fails, an earlier `path` stays and the temporary file is removed.
    A killed process leaves the temporary file; the next write of `path` removes it. Only one process may write `path`
    at a time.
    """
    temporary = temporary_for(path)
    remove(temporary)
    try:
        write(temporary)
        put_in_place(temporary, path)
    finally:
        remove(temporary)


@contextmanager
def explain_write_errors(what: str, everywhere: bool = True) -> Iterator[None]:
    """Turns a failed write inside the block into a UserError: `what`, such as "cannot write to X", and the reason.

    everywhere: whether every process meets it (see UserError).
    """
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors wraps the system's error
        raise UserError(f"{what} ({getattr(error, 'strerror', None) or error})", everywhere) from None


def write_text(path: Path, text: str, newline: str | None = None) -> None:
    """`write_file` for UTF-8 text."""
    write_file(path, lambda file: file.write_text(text, encoding="utf-8", newline=newline))


def temporary_for(path: Path) -> Path:
    """The hidden name beside `path` under which it is written."""
    return path.with_name(f".{path.name}.tmp")


def put_in_place(temporary: Path, path: Path) -> None:
    """Renames a finished file or folder to `path`, after its content has been synced to the disk."""
    is_folder = temporary.is_dir()
    for file in [*temporary.rglob("*"), temporary] if is_folder else [temporary]:
        if file.is_file():
            os.chmod(file, 0o666 & ~UMASK)  # safetensors makes files that only their owner can read
        _wait_for_disk(file)
    if is_folder:
        remove(path)  # renaming a folder over another one fails
    os.replace(temporary, path)
    _wait_for_disk(path.parent)


def is_temporary(path: Path) -> bool:
    """Whether a file has the name of a temporary file, `.NAME.tmp`."""
    return path.name.startswith(".") and path.suffix == ".tmp"


def remove(path: Path) -> None:
    """Deletes a file, or a folder with its content. Does nothing if `path` does not exist."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _wait_for_disk(path: Path) -> None:
    """fsync of a file or, where folders can be opened (not on Windows), of a folder."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(file: Path) -> str:
    """Hexadecimal sha256 of a file's content, read in pieces."""
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sampled_sha256(files: Iterable[Path]) -> str:
    """A short hash of names, sizes and up to 16 blocks of each file. It identifies weights without reading them all.

    The blocks are spread evenly and include the first and the last.
    """
    digest = hashlib.sha256()
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            for k in range(16):
                file.seek(max(0, size - SAMPLE_BYTES) * k // 15)
                digest.update(file.read(SAMPLE_BYTES))
                if size <= SAMPLE_BYTES:
                    break
    return digest.hexdigest()[:16]
