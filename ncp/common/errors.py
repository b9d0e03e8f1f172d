"""How a program ends: the errors that become one line, the exit statuses, and the call of `main`."""

from __future__ import annotations

import os
import pdb
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from ncp.common.processes import follow_launcher

TOKEN = re.compile(r"hf_[A-Za-z0-9]{30,}")  # the hub's access tokens


class UserError(Exception):
    """A mistake in the input. Its message is one line for the user.

    everywhere: every process raises it, and the first one prints it; otherwise each process that raises it prints it.
    """

    def __init__(self, message: str, everywhere: bool = True):
        super().__init__(message)
        self.everywhere = everywhere


INTERRUPTED, DIVERGED = 75, 3  # exit statuses; the first is EX_TEMPFAIL of sysexits.h: try again


class Stopped(Exception):
    """A run that ends early on purpose: one line for the user, and the exit status."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def run_program(main: Callable[[], Any]) -> None:
    """Calls `main`. A UserError, or what the system refuses, becomes one line on standard error and exit status 2.

    A Stopped becomes a line and its own status. With NCP_DEBUG=1 in the environment every error is an ordinary
    traceback instead, and in a terminal the debugger opens where it was raised.
    """
    first = os.environ.get("RANK", "0") == "0"
    follow_launcher()
    try:
        if os.environ.get("NCP_DEBUG", "0") != "0":
            _debug(main)
            return
        try:
            main()
        except BaseException as error:
            # A data loader ends its worker processes, which ignore signals, when nothing refers to it any more.
            traceback.clear_frames(error.__traceback__)
            raise
    except UserError as error:
        if first or not error.everywhere:  # one line, not one per process
            _say(f"error: {error}")
        sys.exit(2)
    except OSError as error:  # of a disk or a network: a traceback would not explain it better
        where = f": {error.filename}" if error.filename else ""
        _say(f"error: {error.strerror or error}{where} (NCP_DEBUG=1 shows where in the program)")
        sys.exit(2)
    except Stopped as stop:
        if first:
            _say(str(stop))
        sys.exit(stop.status)
    except KeyboardInterrupt:  # before a run's guard handles signals, and in programs without a guard
        if first:
            _say("interrupted")
        sys.exit(130)  # as a shell reports it
    except RuntimeError as error:
        if not _is_lost_peer(error):
            raise
        # At once: the usual clean-up at exit would wait for the process that is gone.
        _say(f"error: another process of this run has ended or does not answer ({str(error).splitlines()[0]})")
        os._exit(2)
    finally:
        _leave_processes()


def _debug(main: Callable[[], Any]) -> None:
    """Calls `main`; an error keeps its frames. Ends the process with status 1 after it."""
    try:
        main()
    except Exception as error:
        traceback.print_exc()
        if sys.stdin.isatty() and "RANK" not in os.environ:
            pdb.post_mortem(error.__traceback__)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # at once: the frames still hold the data loader's workers, and perhaps a process group


def _leave_processes() -> None:
    """Leaves the process group, if there is one: now that DDP is gone with `main`'s frame, and Python is still whole.

    Earlier, it would end with DDP's C++ half, which holds the interpreter lock while it waits for gloo's threads, and
    they may wait for that lock to drop a tensor: a deadlock, one time in a few. Later, they find no interpreter and
    abort the process.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _say(line: str) -> None:
    """Prints a line on standard error, also while a progress bar is shown. Hub tokens in it are masked."""
    tqdm.write(TOKEN.sub("hf_***", " ".join(line.splitlines())), file=sys.stderr)


def _is_lost_peer(error: RuntimeError) -> bool:
    """Whether gloo or NCCL lost the connection to another process, or gave up waiting for it."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return False
    signs = ("closed by peer", "reset by peer", "timed out", "timeout", "connection refused", "remote process exited")
    return any(sign in str(error).lower() for sign in signs)
