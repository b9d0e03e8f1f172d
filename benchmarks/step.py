"""Times one training step, and the straightforward implementation for comparison, in one run.

    python benchmarks/step.py --model tiny --config configs/tiny_ncp_dpo.yaml
    python benchmarks/step.py --model sdxl --config configs/sdxl_ncp_dpo.yaml --arms cached,compiled:torch_compile=true
        --train_batch_size 4 --json step.json

--model sd15 and sdxl are the full architectures with random weights, built on the device; tiny is the embedded
pipeline. Data are random too, because only the step is measured. An arm is one of

    cached            this project, from cached latents and embeddings
    pixels            this project, images and prompts encoded in the step
    straightforward   a common implementation, written here for comparison: a full deep copy of the U-Net as the
                      encoder, the reference by switching the policy's adapters off, a float32 VAE and the text encoders
                      inside the step, target, policy and reference embedded one after another, eq. 13 as printed
    NAME:key=value,…  `cached` with these config keys changed (NAME:pixels,key=value,… for `pixels`)

Each arm runs in its own process, so that its peak memory can be measured. Steps alternate between the arms; with
`--one_by_one` each arm takes all its steps before the next. An arm that runs out of memory is left out.

Results are medians. Ratios compare the time per pair with that of the last arm. GiB is the GPU allocator's peak, or on
a CPU that of the process, including libraries; "tensors" counts tensors only. TFLOP/s are PyTorch's operation count for
a pair in the first arm, divided by each arm's time for a pair.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from ncp.common.processes import tied

PHASES = ("conditions", "policy", "reference", "encoder", "backward", "optimizer")


def work(name: str, model: str, argv: list[str]) -> None:
    """Answers each command on standard input with one line of JSON."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # output of libraries goes to standard error
    logging.disable(logging.WARNING)
    start = time.perf_counter()
    from arm import Arm  # here, so that the measured time includes the imports

    arm = Arm(name, model, argv)
    answers = {
        "step": lambda: arm.step(),
        "phases": lambda: arm.step(by_phase=True),
        "memory": lambda: arm.peak_memory_gib(),
        "tensors": lambda: arm.tensors_gib(),
        "flops": lambda: arm.flops(),
        "ceiling": lambda: arm.matmul_ceiling(),
        "device": lambda: str(arm.device),
        "batch": lambda: arm.config.train_batch_size,
    }
    print(json.dumps(time.perf_counter() - start), file=replies)
    for line in sys.stdin:
        print(json.dumps(answers[line.strip()]()), file=replies)


# ---------------------------------------------------------------- all arms


class Worker:
    """An arm in its own process. `ask` returns None after that process has ended, for example out of memory."""

    def __init__(self, name: str, model: str, argv: list[str]):
        # Tied to this process: a step in progress would not notice that standard input was closed.
        command = tied([sys.executable, __file__, "--worker", name, "--model", model, *argv])
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.built_s = self.read()

    def read(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def ask(self, question: str) -> Any:
        try:
            print(question, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            return None
        return self.read()

    def end(self) -> None:
        assert self.process.stdin
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def measure(names: list[str], args: argparse.Namespace, argv: list[str]) -> dict[str, dict[str, Any]]:
    """Raw measurements by arm. All arms are loaded at once and alternate steps; arms that ended early are left out."""
    workers = [Worker(name, args.model, argv) for name in names]
    times: dict[str, list[float]] = {name: [] for name in names}
    for k in range(2 + args.steps):  # two warm-up steps
        for worker in workers:
            step = worker.ask("step")
            times[worker.name] += [step["step"]] if step and k >= 2 else []
    memory = {worker.name: worker.ask("memory") for worker in workers}  # before anything except training steps has run
    figures = {}
    for worker in workers:
        phases = [worker.ask("phases") for _ in range(min(3, args.steps))]
        raw = {question: worker.ask(question) for question in ("batch", "device", "flops", "ceiling", "tensors")}
        if all(phases) and all(raw.values()):
            raw["phases"] = {p: statistics.median(run.get(p, 0) for run in phases) for p in PHASES}
            raw |= {"built_s": worker.built_s, "memory": memory[worker.name], "times": times[worker.name]}
            figures[worker.name] = raw
        else:
            print(f"arm {worker.name} ended; what it said stands above", flush=True)
        worker.end()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny", "sd15", "sdxl"), default="tiny")
    parser.add_argument("--arms", default="cached,pixels,straightforward", help="separated by spaces or ;")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each arm, after two to warm up")
    parser.add_argument("--one_by_one", action="store_true", help="arm after arm, where memory does not hold them all")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args, argv = parser.parse_known_args()
    if not any(a.startswith("--config") for a in argv):
        argv = ["--config", str(ROOT / f"configs/{args.model}_ncp_dpo.yaml"), *argv]
    if args.worker:
        work(args.worker, args.model, argv)
        return

    names = args.arms.replace(";", " ").split() if ":" in args.arms else args.arms.replace(",", " ").split()
    raw: dict[str, dict[str, Any]] = {}
    for group in [[name] for name in names] if args.one_by_one else [names]:
        raw |= measure(group, args, argv)
        if raw and args.json:  # all that there is so far: whoever ends this program keeps it
            args.json.write_text(json.dumps(summary(args.model, argv, raw), indent=1))
    if not raw:
        sys.exit("error: no arm ran")
    show(summary(args.model, argv, raw))


def summary(model: str, argv: list[str], raw: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures of all arms, from their raw measurements."""
    first, last = next(iter(raw.values())), list(raw.values())[-1]
    flops, ceiling = first["flops"] / first["batch"], first["ceiling"]
    figures: dict[str, Any] = {"model": model, "arguments": argv, "device": first["device"], "arms": {}}
    figures |= {"flops_per_pair": flops, "matmul_flops_per_s": ceiling}
    for name, arm in raw.items():
        batch, seconds = arm["batch"], statistics.median(arm["times"])
        pairs = zip(arm["times"], last["times"], strict=True)
        ratio = statistics.median(a / b for a, b in pairs) * last["batch"] / batch  # ratio of the time per pair
        rate = flops * batch / seconds
        figures["arms"][name] = {
            "pairs": batch, "build_s": arm["built_s"], "step_s": seconds, "steps_s": arm["times"],
            "pairs_per_s": batch / seconds, "flops_per_s": rate, "share_of_matmul": rate / ceiling,
            "peak_memory_gib": arm["memory"], "tensors_gib": arm["tensors"], "ratio_to_last": ratio,
            "phases_s": arm["phases"],
        }  # fmt: skip
    return figures


def show(figures: dict[str, Any]) -> None:
    """Prints a table of the figures."""
    flops, ceiling = figures["flops_per_pair"] / 1e12, figures["matmul_flops_per_s"] / 1e12
    print(f"{figures['model']}, {figures['device']}: {flops:.4f} TFLOP per pair, matmul {ceiling:.2f} TFLOP/s")
    columns = {"pairs": 6, "step s": 8, "pairs/s": 9, "TFLOP/s": 9, "share": 7, "GiB": 7, "tensors": 8, "ratio": 7}
    print(
        f"{'arm':<24}" + "".join(f"{c:>{w}}" for c, w in columns.items()) + "  " + " ".join(f"{p:>10}" for p in PHASES)
    )
    for name, arm in figures["arms"].items():
        print(
            f"{name.partition(':')[0][:23]:<24}{arm['pairs']:>6}{arm['step_s']:>8.3f}{arm['pairs_per_s']:>9.2f}"
            f"{arm['flops_per_s'] / 1e12:>9.2f}{arm['share_of_matmul']:>7.0%}{arm['peak_memory_gib']:>7.2f}"
            f"{arm['tensors_gib']:>8.2f}{arm['ratio_to_last']:>7.2f}  "
            + " ".join(f"{arm['phases_s'][p]:>10.4f}" for p in PHASES)
        )


if __name__ == "__main__":
    from ncp.common.errors import run_program

    run_program(main)
