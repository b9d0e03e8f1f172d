"""Processes of tests: they end with the test, however that ends, and so does what they have started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ncp.common.processes import tied

ROOT = Path(__file__).parents[1]


@contextmanager
def started(
    command: Sequence[object], *, stdin: int = subprocess.DEVNULL, **environment: str
) -> Iterator[subprocess.Popen]:
    """A command that runs in the root of the repository, its output in pipes, during the block and no longer.

    It leads a group of its own, which is killed at the end, and is killed itself if this process is.
    """
    process = subprocess.Popen(
        tied(command),
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def run(command: Sequence[object], timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
    """What a command said, and its status."""
    with started(command, **environment) as process:
        said = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, *said)


def python(*arguments: object, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
    return run([sys.executable, *arguments], timeout, **environment)


def free_port() -> str:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def torchrun(count: int) -> list[str]:
    """Arguments of Python that start a script in so many processes on this machine, on a port that is free."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]


@contextmanager
def ranks_of(code: str, argv: Sequence[str], count: int = 2) -> Iterator[list[subprocess.Popen]]:
    """The processes of a run on this machine, as srun would start them: no launcher in between."""
    common = {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "WORLD_SIZE": str(count)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [sys.executable, "-c", code, *argv]
    with ExitStack() as stack:
        own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        yield [stack.enter_context(started(command, **common, **o)) for o in own]


def descendants(pid: int) -> set[int]:
    """Process ids of the children of a process, of their children, and so on (Linux)."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(OSError):
            for child in map(int, (task / "children").read_text().split()):
                found |= {child} | descendants(child)
    return found


def alive(pids: set[int]) -> set[int]:
    """Those of them that are there and no zombies (Linux)."""
    there = set()
    for pid in pids:
        with suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                there.add(pid)
    return there


def wait_for(condition: Callable[[], object], seconds: float = 240) -> bool:
    """Whether the condition comes true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return bool(condition())
