"""How a program ends: a line or, for whoever debugs, a traceback; and with which status."""

import os
import sys

import pytest
from runs import arguments, launch
from support import ROOT, python, started

# A main that fails with the error of its argument, with a local variable to be found.
PROGRAM = """
import sys
from ncp.common.errors import *
def main():
    secret = 6 * 7
    raise eval(sys.argv[1])
run_program(main)
"""
# error: (status, what is said in one line); None for a programming mistake, which is a traceback in any case.
ERRORS = {
    "UserError('no such thing')": (2, "error: no such thing"),
    "FileNotFoundError(2, 'No such file', 'x.txt')": (
        2,
        "error: No such file: x.txt (NCP_DEBUG=1 shows where in the program)",
    ),
    "Stopped('stopped at step 3', INTERRUPTED)": (75, "stopped at step 3"),
    "Stopped('it diverged', DIVERGED)": (3, "it diverged"),
    "KeyboardInterrupt()": (130, "interrupted"),
    "ZeroDivisionError('a mistake of ours')": (1, None),
    "RuntimeError('connection closed by peer')": (1, None),  # of one process: no other is lost
}


def program(error: str, **environment: str):
    return python("-c", PROGRAM, error, PYTHONPATH=str(ROOT), **environment)


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_is_a_line_and_a_status(error):
    status, line = ERRORS[error]
    done = program(error)
    assert done.returncode == status, done.stderr
    if line is None:
        assert "Traceback" in done.stderr
    else:
        assert done.stderr == f"{line}\n"


@pytest.mark.parametrize("error", [e for e in ERRORS if not e.startswith("Keyboard")])
def test_with_ncp_debug_every_error_is_a_traceback(error):
    done = program(error, NCP_DEBUG="1")
    kind, _, rest = error.partition("(")
    assert done.returncode == 1 and done.stderr.startswith("Traceback (most recent call last)"), done.stderr
    assert "in main" in done.stderr and kind in done.stderr.splitlines()[-1], (done.stderr, rest)


def test_ncp_debug_0_is_off():
    assert program("UserError('no')", NCP_DEBUG="0").stderr == "error: no\n"


def test_in_a_terminal_the_debugger_opens_where_it_was_raised():
    pty = pytest.importorskip("pty")  # Unix
    keyboard, terminal = pty.openpty()
    command = [sys.executable, "-c", PROGRAM, "UserError('no')"]
    with started(command, stdin=terminal, PYTHONPATH=str(ROOT), NCP_DEBUG="1") as process:
        os.write(keyboard, b"p secret\nq\n")
        out, err = process.communicate(timeout=60)
    os.close(terminal)
    os.close(keyboard)
    assert process.returncode == 1 and "UserError: no" in err and "(Pdb) 42\n" in out


def test_of_several_processes_the_first_speaks_for_all_unless_it_cannot_know():
    common = {"RANK": "1", "WORLD_SIZE": "2"}
    for error, said in {
        "UserError('no')": "",
        "UserError('no', everywhere=False)": "error: no\n",
        "Stopped('stopped', 75)": "",
    }.items():
        assert program(error, **common).stderr == said
    done = program("RuntimeError('Connection closed by peer [127.0.0.1]:4')", **common)
    assert done.returncode == 2 and done.stderr.startswith("error: another process of this run has ended"), done.stderr


def test_a_script_with_ncp_debug_shows_where_it_refused(assets, tmp_path):
    argv = arguments(assets, tmp_path / "out", "--lerning_rate", "1")
    done = launch("train_ncp_sft.py", argv, NCP_DEBUG="1")
    assert done.returncode == 1 and done.stderr.startswith("Traceback"), done.stderr
    assert "in parse" in done.stderr and "UserError: command line: unknown argument --lerning_rate" in done.stderr
    assert not (tmp_path / "out").exists()
