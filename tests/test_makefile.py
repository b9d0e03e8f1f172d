"""make, with stand-ins for Python: what is done when, after an interruption at any step, and what the screen says."""

import os
import shutil
import stat
import subprocess
import time

import pytest
from runs import as_a_process
from support import ROOT

import train_ncp_dpo
from evaluation.protocol import EvaluationConfig
from ncp.common.config import parse
from tiny import forecast, install

# What each step leaves, as the scripts do; a step named in $FAIL is killed when it has half of it.
RUN = """#!/bin/sh
echo "$*" >> "$LOG"
half() { case "$*" in *"$FAIL"*) [ -n "$FAIL" ] && kill -9 $$;; esac; }
case "$*" in
    *tiny.forecast*) half "$@"; mkdir -p "$D"; printf '5 s\\n2 min 40 s\\n1 min\\n10 s\\n' > "$D/forecast.txt" ;;
    *filter_pickapic*) mkdir -p "$D/filtered"; half "$@"; echo > "$D/filtered/manifest.json" ;;
    *train_ncp_dpo*) mkdir -p "$D/lora"; echo > "$D/lora/pytorch_lora_weights.safetensors"; half "$@"
        echo > "$D/lora/README.md" ;;
    *generate*) mkdir -p "$D/images/base"; half "$@"; echo > "$D/index.parquet" ;;
    *score*) echo > "$D/scores.parquet"; half "$@" ;;
    *compare*) echo > "$D/report.html"; half "$@"; echo "Open this first: $D/report.html" > "$D/summary.txt" ;;
esac
exit 0
"""

STEPS = ["tiny.forecast", "filter_pickapic.py", "train_ncp_dpo.py", "generate", "score", "compare"]

# A Python that makes environments; with $FAIL the installation is killed when it has half of them.
PYTHON = """#!/bin/sh
[ "$1" = -c ] && exit 0
echo "venv, unfinished: $(ls "$3" | tr '\\n' ' ')" >> "$LOG"
mkdir -p "$3/bin" && cp "$INSTALL" "$3/bin/python"
"""
INSTALL = """#!/bin/sh
V=$(dirname "$(dirname "$0")")
echo "install $* for $PIP_USER$PYTHONPATH$VIRTUAL_ENV$PYTHONHOME, UTF-8 $PYTHONUTF8" >> "$LOG"
touch "$V/half"
[ -n "$FAIL" ] && kill -9 $$
exit 0
"""


@pytest.fixture
def make(tmp_path):
    """make(targets..., FAIL=..., more...) gives (status, screen, the commands of this call)."""
    for name, text in {"run": RUN, "python": PYTHON, "install": INSTALL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(stat.S_IRWXU)

    def call(*arguments: str, **environment: str):
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        everything = {**os.environ, "LOG": str(log), "D": str(tmp_path / "demo"), "INSTALL": str(tmp_path / "install")}
        everything = {**everything, "FAIL": "", "MAKEFLAGS": "", "MAKELEVEL": "", **environment}
        command = ["make", f"DEMO={tmp_path / 'demo'}", f"VENV={tmp_path / 'venv'}", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=everything, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr, log.read_text().splitlines() if log.exists() else []

    return call


@pytest.fixture
def demo(make, tmp_path):
    """The same for `make demo` with an environment that is ready."""
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "ready").touch()
    return lambda **environment: make(f"RUN={tmp_path / 'run'}", "demo", **environment)


def test_each_step_says_what_to_expect_and_what_it_took_and_the_second_call_is_quick(demo):
    status, said, commands = demo()
    assert status == 0 and [any(step in c for c in commands) for step in STEPS] == [True] * 6 and len(commands) == 6
    for number, expected in enumerate(("5 s", "2 min 40 s", "1 min", "10 s"), 1):
        assert f"step {number} of 4: " in said and f"about {expected}\n" in said
        assert f"step {number} of 4 took 0 s" in said or f"step {number} of 4 took 1 s" in said
    assert "report.html" in said.splitlines()[-1]
    began = time.monotonic()
    status, said, commands = demo()
    assert status == 0 and not commands and len(said.splitlines()) == 1 and "report.html" in said
    assert time.monotonic() - began < 10  # a hundredth of a second, on a quiet machine


@pytest.mark.parametrize("step", STEPS)
def test_a_demo_killed_in_any_step_goes_on_with_that_step(demo, step):
    status, said, commands = demo(FAIL=step)
    assert status and "Killed" in said and step in commands[-1]
    status, said, again = demo()
    first = STEPS.index("score" if step == "compare" else step)  # one step to make: what is scored stays
    assert status == 0, said
    assert [any(s in c for c in again) for s in STEPS] == [n >= first for n in range(6)]
    assert len(again) == 6 - first and "report.html" in said.splitlines()[-1]


def test_training_continues_if_it_can_and_what_older_weights_drew_goes(demo, tmp_path):
    demo()
    (tmp_path / "demo/images/tuned").mkdir(parents=True)
    (tmp_path / "demo/lora/README.md").unlink()
    _, _, commands = demo()
    assert "--resume_from_checkpoint auto" in commands[0] and not (tmp_path / "demo/images/tuned").exists()
    assert (tmp_path / "demo/images/base").is_dir() and len(commands) == 4


def test_an_interrupted_set_up_is_made_anew_and_a_finished_one_brought_up_to_date(make, tmp_path):
    python, ready = f"PYTHON={tmp_path / 'python'}", str(tmp_path / "venv/ready")
    elsewhere = {
        "VIRTUAL_ENV": "/x",
        "PYTHONPATH": "/x",
        "PYTHONHOME": "/x",
        "PIP_USER": "1",
        "LC_ALL": "tr_TR.ISO-8859-9",
    }
    status, said, commands = make(python, ready, FAIL="1", **elsewhere)
    assert status and "5.7 GB on the disk" in said and commands[0] == "venv, unfinished: began unfinished "
    assert "install tiny/install.py -r requirements-dev.txt for 0, UTF-8 1" in commands  # nothing of the caller's
    status, said, commands = make(python, ready, **elsewhere)
    assert status == 0 and commands[0] == "venv, unfinished: began unfinished "  # nothing half made is left
    assert sorted(p.name for p in (tmp_path / "venv").iterdir()) == ["bin", "half", "ready"]
    assert make(python, ready)[2] == []
    os.utime(ready, (0, 0))  # older than the pins
    status, said, commands = make(python, ready)
    assert status == 0 and "half" in commands[0] and len(commands) == 2  # in place
    # One that somebody made by hand is completed, not emptied.
    shutil.rmtree(tmp_path / "venv")
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "mine").touch()
    assert make(python, ready)[0] == 0 and (tmp_path / "venv" / "mine").exists()


def test_a_forecast_is_the_work_of_the_configs_times_what_was_measured():
    train = parse(train_ncp_dpo.Config, ["--config", forecast.TRAIN, "--max_train_steps", "50"])
    evaluate = parse(EvaluationConfig, ["--config", forecast.EVALUATE, "--max_prompts", "10"])
    batch, looks = train.train_batch_size * train.gradient_accumulation_steps, 50 // train.heldout_steps
    shown, judges = 2 * len(train.validation_prompts), len(evaluate.scorers)
    steps = evaluate.num_inference_steps
    assert train.validation_num_inference_steps == steps and len(evaluate.model_names) == 2
    for unit, expected in {
        "start": (0.25, 2, 2, 2),
        "pair": (0, 50 * batch, 0, 0),
        "looked": (0, looks * train.heldout_pairs, 0, 0),
        "row": (0, shown * steps * 2, 20 * steps * 2, 0),  # guidance: two rows for a picture
        "decoded": (0, shown, 20, 0),
        "judged": (0, 0, 0, 20 * judges),
    }.items():
        seconds = dict.fromkeys(("start", "pair", "looked", "row", "decoded", "judged"), 0.0) | {unit: 1.0}
        assert tuple(forecast.forecast(seconds, train, evaluate).values()) == expected, unit


def test_the_forecast_is_measured_on_the_embedded_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(forecast, "PAIRS", 1)
    monkeypatch.setattr(forecast, "PICTURES", 2)
    units, measure = {}, forecast.measure
    monkeypatch.setattr(forecast, "measure", lambda config: units.update(measure(config)) or units)
    monkeypatch.setattr("sys.argv", ["forecast", str(tmp_path / "new" / "forecast.txt")])
    with as_a_process():
        forecast.main()
    lines = (tmp_path / "new" / "forecast.txt").read_text().splitlines()
    assert len(lines) == 4 and all(" s" in line or " min" in line for line in lines)
    (total,) = capsys.readouterr().out.splitlines()
    assert total.startswith("about ") and f"filter {lines[0]}" in total and f"judge {lines[3]}" in total
    assert len(units) == 6 and min(units.values()) > 0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.3, "5 s"), (12.4, "10 s"), (12.6, "15 s"), (54.9, "55 s"), (57, "1 min"), (64, "1 min"), (161, "2 min 40 s")],
)
def test_durations_are_round(seconds, words):
    assert forecast.in_words(seconds) == words


def test_an_installation_says_what_takes_long_and_what_fails():
    for line, said in {
        "Collecting torch==2.13.0": "",
        "  Downloading torch-2.13.0-cp310-cp310-x86_64.whl (526.6 MB)": "  downloading torch-2.13.0 (526.6 MB)",
        "Downloading some_thing-1.0-py3-none-any.whl (1.2 GB)": "  downloading some_thing-1.0 (1.2 GB)",
        "  Downloading greenlet-3.5.6-cp310.whl (622 kB)": "",
        "  Downloading pydantic-2.0-py3-none-any.whl (2.1 MB)": "",
        "Installing collected packages: pytz, mpmath, zipp": "  unpacking 3 packages",
    }.items():
        assert install.progress(line) == said
    assert (
        install.errors("WARNING: a location is ignored") == ""
        and install.errors("ERROR: no space") == "ERROR: no space"
    )
