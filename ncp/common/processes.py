"""Processes that end with the one that started them, and whether accelerate sees the launcher's processes.

`end_with_parent` is for workers, `follow_launcher` for the ranks of a run, `tied` for any command that is started from
Python. Nothing else of this project is imported here: this file is also what a tied command is started through.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence

KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has only the second, which kills there
LOOK = 1.0  # seconds between looks whether the parent is there
GRACE = 30.0  # seconds from SIGTERM to the end in any case, as torchrun has it
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(parent: int | None = None) -> None:
    """Has this process killed when its parent ends, however that ends. For workers, whose work nobody waits for then.

    parent: the process id that the parent is known to have; default: whose child this is now.
    """
    if parent is None:
        parent = os.getppid()
    if sys.platform == "linux":
        # Arrives even while a library computes and holds the interpreter.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(KILL), 0, 0, 0)
    else:
        _watch(parent, grace=0)
    if os.getppid() != parent:  # it ended before this could be arranged
        os._exit(1)


def follow_launcher() -> None:
    """Under torchrun or accelerate launch: if the launcher ends before this process, SIGTERM, and after GRACE the end.

    Without a launcher nothing: a script that was started from a shell (`&`, nohup, setsid) outlives it.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ:
        _watch(os.getppid(), grace=GRACE)


def _watch(parent: int, grace: float) -> None:
    """Checks from a thread. (The kernel's signal would also be sent if only the launcher's starting thread ended.)"""

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK)
        if grace:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(grace)
        os.kill(os.getpid(), KILL)

    threading.Thread(target=look, name="parent", daemon=True).start()


def tied(command: Sequence[object]) -> list[str]:
    """The command for subprocess, so that it ends (SIGKILL) when this process does. On Linux only; else as it is."""
    words = [str(word) for word in command]
    return [sys.executable, "-I", __file__, str(os.getpid()), *words] if sys.platform == "linux" else words


def launcher_mismatch(num_processes: int) -> str | None:
    """Why accelerate sees another number of processes than the launcher started, in one line; None if it does not."""
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
