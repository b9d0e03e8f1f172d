"""Everything that only a GPU can tell, in one command: correctness, speed, memory, precision, a study.

    bash benchmarks/gpu.sh [--output_dir FOLDER] [--minutes 13] [--only sdxl,memory-sdxl]
    bash benchmarks/gpu.sh --dry-run    # every command at toy size, without a GPU

Parts run in the order of their importance until the minutes are over. Each has a time limit of its own, and a part that
fails does not stop the others. After each part the folder has what was found so far: report.md, which can go into
docs/performance.md; results.json, all figures; log.txt, what the parts said. Other arguments are keys of the training
scripts, for all arms. Models are full-size with random weights: nothing is loaded. For one idle GPU with 80 GB or more;
arms that do not fit into less are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import gpu_report
import yaml

from ncp.common.environment import environment
from ncp.common.errors import UserError, run_program
from ncp.common.files import write_text
from ncp.common.processes import tied

ON, OFF, N = "gradient_checkpointing=true", "gradient_checkpointing=false", "train_batch_size"
HALF_TESTS = ("tests/test_half_precision.py", "tests/test_precision.py")
OTHER_TESTS = tuple(
    f"tests/test_{name}.py"
    for name in (
        "encoder", "losses", "ddpm", "models", "scripts", "guard", "resume", "cache", "evaluation_generate",
        "evaluation_score", "evaluation_models",
    )
)  # fmt: skip


def options(size: int) -> str:
    """Arms that each change one thing about `plain`, the last."""
    changes = {
        "compiled": "torch_compile=true", "nhwc": "channels_last=true", "bf16": "mixed_precision=bf16",
        "adamw": "use_8bit_adam=false", "eq13": "secant=1", "latent": "space=latent", "pixels": "pixels",
    }  # fmt: skip
    arms = [f"{name}:{change},{OFF},{N}={size}" for name, change in changes.items()]
    return " ".join([*arms, f"plain:{OFF},{N}={size}"])


ARMS = {
    "sdxl": f"kept-4:{OFF},{N}=4 encoder-8:{ON},checkpointed_blocks=encoder,{N}=8 recomputed-4:{ON},{N}=4 "
    f"straightforward:{ON},{N}=4",
    "sd15": f"kept-16:{OFF},{N}=16 kept-32:{OFF},{N}=32 recomputed-16:{ON},{N}=16 straightforward:{ON},{N}=16",
    "options-sdxl": options(4),
    "options-sd15": options(16),
}
TOY_ARMS = f"recomputed-2:{ON},{N}=2 latent-2:space=latent,{ON},{N}=2 straightforward:{ON},{N}=2"
TOY_PLAN = {
    "about": "dry run",
    "max_prompts": 2,
    "seeds": [1],
    "steps": [1],
    "common": {"train_batch_size": 2, "heldout_pairs": 0, "lr_warmup_steps": 0},
    "arms": {"ncp_dpo": {"config": "configs/tiny_ncp_dpo.yaml"}},
}


@dataclass
class Part:
    """One of the measurements. arguments: of Python, where {json} is the file of its figures.

    limit: seconds. show: its figures, or its output where it leaves none, as Markdown.
    """

    name: str
    limit: float
    arguments: list[str]
    show: Callable[[Any], str]


def parts(dry: bool, extra: list[str], scratch: Path, results: Path) -> list[Part]:
    """In the order of their importance. scratch: for files that nobody wants; results: for the study's table."""

    def steps(name: str, model: str, limit: float) -> Part:
        arms, toy = ARMS[name], ["--steps", "3"] if dry else ["--steps", "4"]
        if dry:
            model, arms = "tiny", TOY_ARMS
        options = ["--model", model, "--one_by_one", "--json", "{json}", "--arms", arms, *toy, *precision, *extra]
        return Part(name, limit, ["benchmarks/step.py", *options], gpu_report.steps)

    def tests(name: str, files: tuple[str, ...], limit: float, *toy: str) -> Part:
        quick = ["-p", "no:cacheprovider", "-v", "-rfE", "--tb=short", "--durations=3", *(toy if dry else ())]
        return Part(name, limit, ["-m", "pytest", *quick, *files], gpu_report.tests)

    def kernels(name: str, model: str, size: int, limit: float) -> Part:
        options = ["--model", "tiny" if dry else model, "--json", "{json}", *precision, *extra]
        arm = f"plain:{OFF},{N}={2 if dry else size}"
        return Part(name, limit, ["benchmarks/profiling.py", "--arms", arm, *options], gpu_report.kernels)

    def memory(name: str, model: str, limit: float) -> Part:
        options = ["--measure", "tiny" if dry else model, "--json", "{json}", *precision[: 2 * dry], *extra]
        return Part(name, limit, ["benchmarks/memory.py", *options], gpu_report.output)

    precision = ["--mixed_precision", "no" if dry else "fp16"]
    models = ["tiny", "--objectives", "sft"] if dry else ["sd15", "sdxl"]
    plan = ROOT / "study/plans/dpo.yaml"
    if dry:
        plan = scratch / "plan.yaml"
        plan.write_text(yaml.safe_dump(TOY_PLAN))
    study = [str(plan), "--output_dir", str(scratch / "study"), "--results", str(results)]
    study += ["--jobs", "1" if dry else "4"]
    return [
        tests("correct", HALF_TESTS, 150, "-k", "halves_the_scale"),
        steps("sdxl", "sdxl", 210),
        steps("sd15", "sd15", 150),
        memory("memory-sdxl", "sdxl", 90),
        Part("precision", 120, ["benchmarks/full_precision.py", *models, "--json", "{json}"], gpu_report.output),
        kernels("profile-sdxl", "sdxl", 4, 60),
        memory("memory-sd15", "sd15", 75),
        kernels("profile-sd15", "sd15", 16, 60),
        steps("options-sdxl", "sdxl", 300),
        Part("study", 300, ["-m", "study.run", *study], gpu_report.output),
        steps("options-sd15", "sd15", 240),
        tests("more tests", OTHER_TESTS, 300, "--collect-only"),
    ]


def run(part: Part, seconds: float, log: Path, scratch: Path) -> dict[str, Any]:
    """Status, seconds, output and figures of a part; its figures so far if it fails or its time is up."""
    file = scratch / f"{part.name}.json"
    command = tied([sys.executable, *(a.replace("{json}", str(file)) for a in part.arguments)])
    start = time.monotonic()
    with open(scratch / "output", "w+") as output:
        # In a group of its own, because parts start processes too.
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = {0: "done"}.get(code := process.wait(seconds), f"failed with status {code}")
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        text = output.read()
    with open(log, "a") as handle:
        handle.write(f"\n======== {part.name}: {status}\n{' '.join(command)}\n{text}")
    figures = json.loads(file.read_text()) if file.is_file() else None
    return {"status": status, "seconds": time.monotonic() - start, "figures": figures, "output": text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "output/gpu")
    parser.add_argument("--minutes", type=float, default=13, help="time for all parts together")
    parser.add_argument("--only", help="these parts, separated by commas")
    parser.add_argument("--dry-run", action="store_true", help="every command at toy size, on the CPU too")
    args, extra = parser.parse_known_args()
    end, folder = time.monotonic() + 60 * args.minutes, args.output_dir.resolve()
    import torch

    if not torch.cuda.is_available() and not args.dry_run:
        raise UserError("there is no GPU here; --dry-run tries every command at toy size")
    if importlib.util.find_spec("bitsandbytes") is None:
        extra += ["--use_8bit_adam", "false"]
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    found: dict[str, Any] = {"environment": environment(), "extra": extra, "parts": {}}
    log.write_text("")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        todo = parts(args.dry_run, extra, scratch, folder)
        wanted = args.only.split(",") if args.only else [part.name for part in todo]
        if unknown := [name for name in wanted if name not in {part.name for part in todo}]:
            raise UserError(f"--only {unknown[0]}: expected some of: {', '.join(part.name for part in todo)}")
        begun: dict[str, str] = {}
        for part in todo:
            left = end - time.monotonic()
            if part.name not in wanted:
                continue
            twin = begun.setdefault(" ".join(part.arguments), part.name)
            if twin != part.name:  # at toy size
                result = {"status": f"done as {twin}", "seconds": 0, "figures": None, "output": ""}
            elif left < 10:
                result = {"status": "not begun: the minutes are over", "seconds": 0, "figures": None, "output": ""}
            else:
                result = run(part, left if args.dry_run else min(part.limit, left), log, scratch)
            shown = section(part, result) if result["output"] or result["figures"] else ""
            found["parts"][part.name] = {k: v for k, v in result.items() if k != "output"} | {"shown": shown}
            print(f"== {part.name}: {result['status']}, {result['seconds']:.0f} s\n{shown}", flush=True)
            write_text(folder / "results.json", json.dumps(found, indent=1))
            write_text(folder / "report.md", gpu_report.report(found))
    if not all(result["status"].startswith("done") for result in found["parts"].values()):
        sys.exit(1)


def section(part: Part, result: dict[str, Any]) -> str:
    """The part as Markdown. What a broken part left may be in any state."""
    try:
        return part.show(result)
    except Exception as error:
        return f"(no table: {type(error).__name__}: {error})\n"


if __name__ == "__main__":
    run_program(main)
