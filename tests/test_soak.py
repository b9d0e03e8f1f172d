"""A long run keeps its memory and its open files: `SOAK_STEPS=3000 python -m pytest -s tests/test_soak.py` for more."""

import gc
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from pipelines import save_dataset, save_pipeline, unet
from runs import altered, arguments, run_here

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory and open files are read from /proc")

CYCLE = 25  # steps between checkpoints, and between looks at the held-out pairs and at the process
EXTRA = {
    "train_batch_size": 1, "resolution": 16, "rank": 4, "report_to": "tensorboard", "use_ema": "true",
    "heldout_pairs": 2, "heldout_steps": CYCLE, "checkpointing_steps": CYCLE, "checkpoints_total_limit": 2,
}  # fmt: skip


@dataclass
class Held:
    """What the process holds at one step."""

    step: int
    tensors: int
    objects: int  # all that Python's garbage collector knows
    files: int
    resident: float  # MiB


def held(step: int) -> Held:
    gc.collect()
    objects = gc.get_objects()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    resident = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    tensors = sum(issubclass(type(o), torch.Tensor) for o in objects)
    return Held(step, tensors, len(objects), len(os.listdir("/proc/self/fd")), resident)


def soak(folder: Path, steps: int, leak: Callable[[torch.Tensor], object] = lambda losses: None) -> list[Held]:
    """A DPO run with everything on that recurs, looked at once a cycle. leak: what is done with each step's losses."""
    save_pipeline(folder / "sd")
    unet(channels=(8, 8, 8)).save_pretrained(folder / "sd" / "unet")
    save_dataset(folder / "data" / "train.parquet")
    calls, seen = [0], []

    def look(_: int, losses: torch.Tensor) -> torch.Tensor:
        if losses.requires_grad:  # a step, not a look at the held-out pairs
            calls[0] += 1
            leak(losses)
            if calls[0] % CYCLE == CYCLE // 2:
                seen.append(held(calls[0]))
        return losses

    extra = [str(a) for key, value in EXTRA.items() for a in (f"--{key}", value)]
    argv = arguments(folder, folder / "out", *extra, "--max_train_steps", str(steps))
    run_here("dpo", argv, **altered("dpo", look))
    return seen


def growth(seen: list[Held]) -> dict[str, float]:
    """From a third of the run, when all is warm, to its end."""
    early, late = seen[len(seen) // 3], seen[-1]
    return {name: vars(late)[name] - vars(early)[name] for name in vars(late)}


def test_memory_and_open_files_stay_level(tmp_path):
    seen = soak(tmp_path, int(os.environ.get("SOAK_STEPS", "120")))
    for each in seen:
        print(f"step {each.step:6d}  {each.resident:8.1f} MiB resident  {each.files:3d} open files  "
              f"{each.tensors:6d} tensors  {each.objects:8d} objects")  # fmt: skip
    grown = growth(seen)
    assert grown["tensors"] == 0 and grown["files"] == 0, seen
    # Python's own caches come and go; a thing kept at each step would be one for each.
    assert grown["objects"] < grown["step"] / 2, seen
    assert grown["resident"] < 8, seen


def test_what_a_run_would_lose_is_seen(tmp_path):
    """At each step a number and a file are kept, and two more things that Python knows: a list and its tuple."""
    kept: list = []

    def keep(losses: torch.Tensor) -> None:
        kept.append([(kept, open(os.devnull))])  # noqa: SIM115
        kept.append(losses.detach().mean())

    grown = growth(soak(tmp_path, 2 * CYCLE, keep))
    for _, file in (one for entry in kept[::2] for one in entry):
        file.close()
    assert grown["step"] == CYCLE and grown["tensors"] == grown["files"] == CYCLE
    assert grown["objects"] > grown["step"]
