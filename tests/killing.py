"""Kills a training run wherever it can be killed, resumes it, and compares with the run that was left alone.

    python tests/killing.py [--every N] [--random N] [--only dpo|cpo|sft]

The run is killed (SIGKILL) at numbered points: before every micro-batch, backward pass, optimizer step, update of the
average, log entry, and before every file operation in the output folder; with a checkpoint's files half written too.
--every N takes each Nth point of each of the three scripts; --random N kills N more from outside at random times.
The same command line then goes on (resume_from_checkpoint: auto), and must end with the same bits in every weight and
the same figures in the log. Forked children share one import of torch.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# ruff: noqa: E402 (set before torch starts)
os.environ["OMP_NUM_THREADS"] = "1"  # a pool of threads would not survive a fork
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import bitsandbytes
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from pipelines import SIDE, save_dataset, save_pipeline
from runs import SCRIPTS, weights

import cache_latents
import ncp.training.run
from ncp.common.errors import run_program
from ncp.training import checkpoints, result
from ncp.training.guard import Guard
from ncp.training.run import Run
from ncp.training.weights import WEIGHTS, save_lora

# 5 steps of 2 accumulated micro-batches; checkpoints and log entries fall on different steps; 8-bit state; an average.
RUN = {
    "resolution": SIDE,
    "mixed_precision": "no",
    "train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_train_steps": 5,
    "learning_rate": 1e-3,
    "scale_lr": "false",
    "use_ema": "true",
    "checkpointing_steps": 2,
    "checkpoints_total_limit": 1,
    "logging_steps": 3,
    "heldout_pairs": 2,
    "heldout_steps": 2,
    "dataloader_num_workers": 0,
    "report_to": "none",
    "resume_from_checkpoint": "auto",
}
CACHED = {"cpo"}  # the others decode pixels
CLOCKS = ("samples_per_second", "peak_memory_gib")


def fork(work: Callable[[], None]) -> int:
    """The process id of a child that does the work, its output thrown away."""
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1), os.dup2(nowhere, 2)
        work()
        os._exit(0)
    return pid


def in_child(work: Callable[[], None]) -> tuple[int, float]:
    """(wait status, seconds) of work done in a child."""
    began = time.perf_counter()
    return os.waitpid(fork(work), 0)[1], time.perf_counter() - began


def train(kind: str, assets: Path, out: Path, log: Path, points: KillPoints) -> None:
    """The script's own entry, with its log entries written down and the kill points in place."""
    settings = RUN | {"pretrained_model_name_or_path": assets / "sd", "dataset_name": assets / "data"}
    settings |= {"output_dir": out, "cache_dir": assets / "cache"}
    settings |= {"cached_latents": assets / "cached"} if kind in CACHED else {}

    def write_down(run: Run, figures: dict[str, float], step: int) -> None:
        with open(log, "a") as file:
            kept = {k: v for k, v in figures.items() if k not in CLOCKS}
            file.write(json.dumps({"step": step, **kept}) + "\n")

    Run._track = write_down
    ncp.training.run.print_estimate = lambda *_: None  # writes nothing, and takes as long as all the rest
    points.install(out)
    run_program(lambda: SCRIPTS[kind].main(flags(settings)))


def flags(settings: dict[str, object]) -> list[str]:
    return [str(a) for key, value in settings.items() for a in (f"--{key}", value)]


class KillPoints:
    """Counts the moments of a run, and kills it at number `at`; with `at` None the total goes to a file."""

    def __init__(self, at: int | None, names: Path | None = None):
        self.at, self.count, self.names = at, 0, names

    def reach(self, name: str) -> None:
        self.count += 1
        if self.names is not None:
            with open(self.names, "a") as file:
                file.write(name + "\n")
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self, out: Path) -> None:
        def before(owner, attribute):
            original = getattr(owner, attribute)

            def wrapped(*args, **kwargs):
                self.reach(f"before {attribute}")
                return original(*args, **kwargs)

            setattr(owner, attribute, wrapped)

        for owner, attribute in (
            (ncp.training.run, "to_device"),
            (Accelerator, "backward"),
            (Guard, "check_step"),
            (bitsandbytes.optim.AdamW8bit, "step"),
            (EMAModel, "step"),
            (Run, "log"),
            (Run, "check_heldout"),
            (checkpoints.State, "load"),
            (os, "fsync"),
        ):
            before(owner, attribute)

        write_bytes = Path.write_bytes

        def in_two_halves(path, data):
            write_bytes(path, bytes(data)[: len(data) // 2])
            self.reach(f"half of {path.name}")
            return write_bytes(path, data)

        Path.write_bytes = in_two_halves

        def half_of_lora(models, folder):
            save_lora(models, folder)
            file = folder / WEIGHTS
            if self.count + 1 == self.at:
                os.truncate(file, file.stat().st_size // 2)
            self.reach(f"half of {file.name}")

        checkpoints.save_lora = result.save_lora = half_of_lora

        def audit(event, args):
            if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree") and args:
                writes = event != "open" or args[1] is None or any(c in str(args[1]) for c in "wax+")
                if writes and str(args[0]).startswith(str(out)):
                    self.reach(f"{event} {Path(str(args[0])).name}")

        sys.addaudithook(audit)


def prepare(assets: Path) -> None:
    save_pipeline(assets / "sd")
    save_dataset(assets / "data" / "train.parquet")
    keys = ("resolution", "mixed_precision", "dataloader_num_workers")
    settings = {k: RUN[k] for k in keys} | {"pretrained_model_name_or_path": assets / "sd", "output_dir": assets / "o"}
    settings |= {"dataset_name": assets / "data", "cache_dir": assets / "cache", "cached_latents": assets / "cached"}
    cache_latents.main(flags(settings))


def outcome(out: Path, log: Path) -> tuple[dict, dict]:
    """(bytes of each LoRA weight, figures by step and name, the last written of each)."""
    figures: dict = {}
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        figures.setdefault(entry["step"], {}).update(entry)
    return {k: v.numpy().tobytes() for k, v in weights(out).items()}, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--random", type=int, default=0)
    parser.add_argument("--only", choices=SCRIPTS)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="killing-"))
    assets = folder / "assets"
    assert in_child(lambda: prepare(assets))[0] == 0
    chance, tried, wrong = random.Random(0), 0, []

    for kind in [options.only] if options.only else SCRIPTS:
        whole, log, names = folder / f"{kind}-whole", folder / f"{kind}-whole.jsonl", folder / f"{kind}.points"
        status, seconds = in_child(lambda k=kind: train(k, assets, whole, log, KillPoints(None, names)))  # noqa: B023
        assert status == 0, f"{kind}: the run that is left alone failed"
        expected, points = outcome(whole, log), names.read_text().splitlines()
        kills: list = [*range(1, len(points) + 1, options.every)]
        kills += [chance.uniform(0, seconds) for _ in range(options.random)]
        for at in kills:
            out, log = folder / "out", folder / "out.jsonl"
            if isinstance(at, int):
                status, _ = in_child(lambda k=kind, n=at: train(k, assets, out, log, KillPoints(n)))  # noqa: B023
            else:
                status = kill_from_outside(lambda k=kind: train(k, assets, out, log, KillPoints(None)), at)  # noqa: B023
            killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            status, _ = in_child(lambda k=kind: train(k, assets, out, log, KillPoints(None)))  # noqa: B023
            where = points[at - 1] if isinstance(at, int) else f"{at:.2f} s"
            if status or (isinstance(at, int) and not killed) or outcome(out, log) != expected:
                wrong.append(f"{kind}, killed at {where} (point {at}): resumed with status {status}")
            tried += killed
            os.system(f"rm -rf '{out}' '{log}'")
        print(f"{kind}: {len(points)} points, {len(kills)} kills, {len(wrong)} wrong so far", flush=True)
    os.system(f"rm -rf '{folder}'")
    print("\n".join([*wrong, f"{tried} runs killed and resumed, {len(wrong)} ended otherwise than the whole run"]))
    sys.exit(bool(wrong))


def kill_from_outside(work: Callable[[], None], after: float) -> int:
    """The wait status of a child that is killed after so many seconds."""
    pid = fork(work)
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


if __name__ == "__main__":
    main()
