"""A long run keeps its memory and its open files: `SOAK_STEPS=3000 python -m pytest -s tests/test_soak.py` for more."""

import os
from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel
from pipelines import save_dataset, save_pipeline, unet
from test_guard import altered
from test_scripts import arguments, run_here


def soak(folder: Path, steps: int, patch: pytest.MonkeyPatch) -> list[tuple[int, float, int]]:
    """(step, resident MiB, open files) through a DPO run with everything on that recurs: log, checkpoints, looks."""
    save_pipeline(folder / "sd")
    small: UNet2DConditionModel = unet(channels=(8, 8, 8))
    small.save_pretrained(folder / "sd" / "unet")
    save_dataset(folder / "data" / "train.parquet")
    seen = []

    def look(call: int, losses):
        if call % max(1, steps // 20) == 0:
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
            seen.append((call, resident, len(os.listdir("/proc/self/fd"))))
        return losses

    extra = ["--max_train_steps", str(steps), "--train_batch_size", "1", "--resolution", "16", "--rank", "4"]
    extra += [
        "--report_to",
        "tensorboard",
        "--checkpointing_steps",
        "25",
        "--checkpoints_total_limit",
        "2",
        "--use_ema",
    ]
    run_here("dpo", arguments(folder, folder / "out", *extra), patch, **altered("dpo", look))
    return seen


def test_memory_and_open_files_stay_level(tmp_path, monkeypatch):
    seen = soak(tmp_path, int(os.environ.get("SOAK_STEPS", "120")), monkeypatch)
    for step, resident, files in seen:
        print(f"step {step:6d}  {resident:8.1f} MiB resident  {files:3d} open files")
    (_, early, files), (_, late, files_late) = seen[len(seen) // 3], seen[-1]
    assert late - early < 8 and files_late == files, seen
