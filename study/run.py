"""Runs a plan: filters, trains, draws and scores with the project's own programs, and writes one table.

    python -m study.run study/plans/dpo.yaml

Runs are trained side by side (--jobs), with the cores divided among them: on small models this takes two thirds of the
time. After an interruption the same command continues: runs resume from their newest checkpoint, and existing images
and scores are kept. The table is study/results/PLAN.csv: one row per arm, seed, checkpoint and judge, with the score of
every prompt.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml
from tqdm import tqdm

from ncp.common.environment import environment
from ncp.common.errors import UserError, run_program
from ncp.common.files import write_text
from ncp.common.processes import tied
from study.plan import Arm, Plan, read_plan
from tiny import world

RESULTS = Path(__file__).parent / "results"
JUDGES = ("overall", "appeal", "alignment")  # of tiny/oracle.py
BASE = "base"


def program(*arguments: object, log: Path, variables: Mapping[str, str] | None = None) -> None:
    """Runs one of the project's programs with its output in a log file. If it fails: UserError with its last line.

    variables: of the environment, beside this program's own.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        done = subprocess.run(
            tied([sys.executable, *arguments]),
            stdout=file,
            stderr=subprocess.STDOUT,
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **(variables or {})},
        )
    if done.returncode:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise UserError(f"{arguments[0]} failed, see {log}: {' '.join(last)}")


def as_arguments(keys: dict[str, Any]) -> list[str]:
    """Keys and values as a command line: lists in YAML's form, null as null."""
    written = {
        k: yaml.safe_dump(v, default_flow_style=True, width=10**6).removesuffix("\n...\n") for k, v in keys.items()
    }
    return [text for key, value in written.items() for text in (f"--{key}", value.strip())]


def prepare_data(plan: Plan, arm: Arm) -> Path:
    """The arm's filtered dataset, which is made if it does not exist."""
    folder = plan.data_folder(arm)
    if not (folder / "manifest.json").is_file():
        keys = {**arm.data, "dataset_name": "tiny/data", "output_dir": str(folder), "rows_per_file": 100_000}
        program("filter_pickapic.py", *as_arguments(keys), log=plan.folder / "filter.log")
    return folder


def threads(jobs: int) -> dict[str, str]:
    """Environment variables that divide the cores among processes that run side by side."""
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}


def train(plan: Plan, arm: Arm, seed: int, variables: dict[str, str]) -> None:
    """Trains an arm with a seed, unless this run is finished."""
    folder = plan.run_folder(arm, seed)
    if (folder / "README.md").is_file():
        if all((folder / f"checkpoint-{step}").is_dir() for step in arm.steps):
            return
        shutil.rmtree(folder)  # another plan's run, with fewer checkpoints
    spacing = int(np.gcd.reduce(arm.steps))
    keys = {
        **arm.changes,
        "seed": seed,
        "dataset_name": str(prepare_data(plan, arm)),
        "output_dir": str(folder),
        "max_train_steps": arm.steps[-1],
        "checkpointing_steps": spacing,
        "checkpoints_total_limit": None,
        "resume_from_checkpoint": "auto",
        "validation_prompts": [],
        "report_to": "tensorboard",
    }
    log = plan.folder / "logs" / f"{arm.name}-{seed}.log"
    program(arm.script, "--config", arm.config, *as_arguments(keys), log=log, variables=variables)


def train_all(plan: Plan, jobs: int) -> None:
    """Trains every arm with every seed, `jobs` runs at a time. After a failure no further run is begun."""
    for arm in plan.arms:
        prepare_data(plan, arm)
    # Every arm once before any arm again; arms that train the same are trained once.
    runs = {plan.run_folder(arm, seed): (arm, seed) for seed in plan.seeds for arm in plan.arms}
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(runs), desc="trained") as progress:
        waiting = [pool.submit(train, plan, arm, seed, threads(jobs)) for arm, seed in runs.values()]
        try:
            for done in as_completed(waiting):
                done.result()
                progress.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def model_names(plan: Plan) -> dict[str, tuple[Arm, int, int]]:
    """Arm, seed and step of each model that is drawn, by its name."""
    return {
        f"{arm.name}-{seed}-{step}": (arm, seed, step) for arm in plan.arms for seed in plan.seeds for step in arm.steps
    }


def search_prompts(plan: Plan) -> Path:
    """A prompts file of evenly spaced training scenes, to choose settings on without using the held-out scenes."""
    scenes = world.split_scenes()[0]
    chosen = [scenes[i * len(scenes) // plan.max_prompts] for i in range(plan.max_prompts)]
    file = plan.folder / "search.txt"
    write_text(file, "".join(f"{scene.prompt()}\n" for scene in chosen))
    return file


def evaluate(plan: Plan, jobs: int) -> Path:
    """Draws and scores the base and every checkpoint of the plan, in `jobs` processes; returns the score table."""
    folder = plan.folder / "evaluation"
    models = [f"{n}={plan.run_folder(a, s) / f'checkpoint-{k}'}" for n, (a, s, k) in model_names(plan).items()]
    keys = {
        **plan.evaluation,
        "models": [BASE, *models],
        "prompts": str(search_prompts(plan)) if plan.prompts == "search" else "tiny",
        "max_prompts": plan.max_prompts,
        "seed": 1 if plan.prompts == "search" else 0,
        "batch_size": min(64, -(-plan.max_prompts // jobs)),  # as many for each process
        "output_dir": str(folder),
    }
    arguments = ["--config", "configs/eval_tiny.yaml", *as_arguments(keys)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", jobs] if jobs > 1 else []
    log = plan.folder / "evaluate.log"
    for step in ("generate", "score"):
        program(*launcher, "evaluate.py", step, *arguments, log=log, variables=threads(jobs))
    return folder / "scores.parquet"


def training_seconds(checkpoint: Path) -> float:
    return float(json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["seconds"])


def heldout_drift(folder: Path, step: int) -> float | None:
    """The last held-out winner drift of a run up to a step, from its TensorBoard log; None without held-out pairs."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[int, float] = {}
    for events in sorted(folder.glob("logs/**/events.*")):
        log = EventAccumulator(str(events)).Reload()
        if "heldout_winner_drift" in log.Tags()["scalars"]:
            found |= {e.step: e.value for e in log.Scalars("heldout_winner_drift")}
    until = [found[k] for k in sorted(found) if k <= step]
    return until[-1] if until else None


def write_results(plan: Plan, scores: Path, folder: Path) -> Path:
    """Writes FOLDER/PLAN.csv: arm, seed, step, seconds, drift, judge, then one column per prompt."""
    rows = [r for r in pq.read_table(scores).to_pylist() if r["scorer"].removeprefix("oracle_") in JUDGES]
    prompts = sorted({r["prompt_number"] for r in rows})
    table = {(r["model"], r["scorer"], r["prompt_number"]): r["score"] for r in rows}
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["arm", "seed", "step", "seconds", "heldout_winner_drift", "judge", *prompts])
    for name, entry in {BASE: None, **model_names(plan)}.items():
        head: list[Any] = [BASE, "", 0, 0, ""]
        if entry is not None:
            arm, seed, step = entry
            run = plan.run_folder(arm, seed)
            drift = heldout_drift(run, step)
            seconds = f"{training_seconds(run / f'checkpoint-{step}'):.1f}"
            head = [arm.name, seed, step, seconds, "" if drift is None else f"{drift:.4f}"]
        for judge in JUDGES:
            writer.writerow([*head, judge, *(f"{table[name, f'oracle_{judge}', p]:.4f}" for p in prompts)])
    path = folder / f"{plan.name}.csv"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, buffer.getvalue())
    write_text(path.with_suffix(".yaml"), yaml.safe_dump(environment(), sort_keys=False))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--output_dir", type=Path, default=Path("output/study"), help="for datasets, runs and pictures")
    few = 1 if torch.cuda.is_available() else min(4, os.cpu_count() or 1)
    parser.add_argument("--jobs", type=int, default=few, help="processes at a time; default: on a GPU 1, else up to 4")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the table")
    args = parser.parse_args()
    plan = read_plan(args.plan, args.output_dir)
    print(
        f"{plan.about}: {len(plan.arms)} arms x {len(plan.seeds)} seeds, on {plan.max_prompts} {plan.prompts} prompts"
    )
    train_all(plan, args.jobs)
    table = write_results(plan, evaluate(plan, args.jobs), args.results)
    print(f"wrote {table}; python -m study.report {plan.name} shows it")


if __name__ == "__main__":
    run_program(main)
