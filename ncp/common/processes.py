"""Processes that end with their parent, and a check that accelerate sees the launcher's processes.

`end_with_parent` is for workers, `follow_launcher` for the ranks of a run, `tied` for any command that is started from
Python. This file imports nothing else of this project, because it also runs as a script, to start a tied command.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence

KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has only SIGTERM, which kills the process
LOOK = 1.0  # seconds between checks that the parent is alive
GRACE = 30.0  # seconds from SIGTERM to SIGKILL, as in torchrun
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(parent: int | None = None) -> None:
    """Arranges that this process is killed when its parent ends, for any reason. For worker processes.

    parent: the expected process id of the parent; default: the current parent.
    """
    if parent is None:
        parent = os.getppid()
    if sys.platform == "linux":
        # The kernel's signal also works while a library computes and holds the interpreter lock.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(KILL), 0, 0, 0)
    else:
        _watch(parent, grace=0)
    if os.getppid() != parent:  # the parent ended before this was arranged
        os._exit(1)


def follow_launcher() -> None:
    """Under torchrun or accelerate launch: sends SIGTERM, and SIGKILL after GRACE, if the launcher ends first.

    Does nothing without a launcher: a script started from a shell (`&`, nohup, setsid) outlives that shell.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ:
        _watch(os.getppid(), grace=GRACE)


def _watch(parent: int, grace: float) -> None:
    """Checks in a thread. The kernel's signal would not do: it also comes if only the parent's starting thread ends."""

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK)
        if grace:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(grace)
        os.kill(os.getpid(), KILL)

    threading.Thread(target=look, name="parent", daemon=True).start()


def tied(command: Sequence[object]) -> list[str]:
    """The command for subprocess, changed so that it is killed when this process ends. Unchanged except on Linux."""
    words = [str(word) for word in command]
    return [sys.executable, "-I", __file__, str(os.getpid()), *words] if sys.platform == "linux" else words


def launcher_mismatch(num_processes: int) -> str | None:
    """One line on why accelerate sees another number of processes than the launcher started; None if they agree."""
    launched = os.environ.get("WORLD_SIZE", "")
    if launched.isdecimal() and int(launched) != num_processes:
        what = "set ACCELERATE_USE_CPU=true, which joins processes that have no GPU"
        if "LOCAL_RANK" not in os.environ:
            what = "set LOCAL_RANK too, each process's number on its machine"
        return f"the launcher says WORLD_SIZE {launched}, but accelerate sees {num_processes} process: {what}"
    if num_processes == 1 and not launched and {"MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"} <= os.environ.keys():
        return (
            "accelerate launch was told of several processes (MASTER_ADDR is set) and has started one, as it does "
            "without a GPU; use ACCELERATE_USE_CPU=true torchrun --nproc_per_node N, or for one process "
            "--num_processes 1 and no MASTER_ADDR"
        )
    return None


if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
