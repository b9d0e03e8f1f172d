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

    everywhere: all processes raise it, and only the first one prints it. Otherwise each process that raises it
    prints it.
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
    """Calls `main`. A UserError or OSError becomes one line on standard error and exit status 2.

    A Stopped becomes one line and its own exit status. With NCP_DEBUG=1 in the environment every error gives an
    ordinary traceback instead, and in a terminal the debugger opens where the error was raised.
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
            # The data loader's worker processes ignore signals. They end when nothing refers to the loader any more.
            traceback.clear_frames(error.__traceback__)
            raise
    except UserError as error:
        if first or not error.everywhere:  # one line, not one per process
            _say(f"error: {error}")
        sys.exit(2)
    except OSError as error:  # from a disk or the network: a traceback would not explain more
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
        sys.exit(130)  # 128 + SIGINT, as shells report it
    except RuntimeError as error:
        if not _is_lost_peer(error):
            raise
        # Exit immediately: the usual clean-up at exit would wait for the lost process.
        _say(f"error: another process of this run has ended or does not answer ({str(error).splitlines()[0]})")
        os._exit(2)
    finally:
        _leave_processes()


def _debug(main: Callable[[], Any]) -> None:
    """Calls `main`. After an error, which keeps its stack frames, the process ends with status 1."""
    try:
        main()
    except Exception as error:
        traceback.print_exc()
        if sys.stdin.isatty() and "RANK" not in os.environ:
            pdb.post_mortem(error.__traceback__)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # immediately: the frames still hold the data loader's workers, and perhaps a process group


def _leave_processes() -> None:
    """Leaves the process group, if there is one: after `main` has released DDP, before the interpreter shuts down.

    Earlier, DDP's C++ part would destroy the group. It holds the interpreter lock while it waits for gloo's threads,
    and these may need that lock to release a tensor: an occasional deadlock. Later, gloo's threads find no interpreter
    and abort the process.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _say(line: str) -> None:
    """Prints a line on standard error without breaking a progress bar. Masks hub tokens in it."""
    tqdm.write(TOKEN.sub("hf_***", " ".join(line.splitlines())), file=sys.stderr)


def _is_lost_peer(error: RuntimeError) -> bool:
    """Whether gloo or NCCL lost the connection to another process, or timed out waiting for it."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return False
    signs = ("closed by peer", "reset by peer", "timed out", "timeout", "connection refused", "remote process exited")
    return any(sign in str(error).lower() for sign in signs)
