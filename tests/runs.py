"""Training scripts on small random assets: their arguments, and their `main` in this process or in one of its own."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from pipelines import SIDE, save_dataset, scheduler
from safetensors.torch import load_file
from support import ROOT, python

import ncp.training.run
import train_ncp_cpo
import train_ncp_dpo
import train_ncp_sft
from ncp import ddpm
from ncp.common import lock
from ncp.common.config import parse
from ncp.common.errors import run_program
from ncp.training.engine import make_accelerator
from ncp.training.models import Models, load_models
from ncp.training.pairs import open_pairs
from ncp.training.pipeline import Timesteps, describe
from ncp.training.run import Run
from ncp.training.samples import PairDataset, loader, to_device
from ncp.training.settings import TrainingConfig
from ncp.training.weights import WEIGHTS

SCRIPTS: dict[str, Any] = {"dpo": train_ncp_dpo, "cpo": train_ncp_cpo, "sft": train_ncp_sft}


def arguments(assets: Path, output: Path, *extra: str, model: str = "sd") -> list[str]:
    """Two steps of two pairs on the fixture `assets`: float32, from scratch, nothing tracked."""
    settings = {
        "pretrained_model_name_or_path": assets / model,
        "dataset_name": assets / "data",
        "output_dir": output,
        "cache_dir": assets / "cache",
        "resolution": SIDE,
        "mixed_precision": "no",
        "train_batch_size": 2,
        "max_train_steps": 2,
        "learning_rate": 1e-3,
        "scale_lr": "false",
        "dataloader_num_workers": 0,
        "report_to": "none",
    }
    return [str(a) for key, value in settings.items() for a in (f"--{key}", value)] + list(extra)


def launch(script: str, argv: Sequence[str], *prefix: str, **environment: str) -> subprocess.CompletedProcess:
    """The script in a process of its own, as a user would start it. prefix: arguments of Python before it."""
    return python(*prefix, ROOT / script, *argv, **environment)


# ---------------------------------------------------------------- in this process


@contextmanager
def as_a_process() -> Iterator[None]:
    """What a process has at its start, and leaves at its end: no state of accelerate's, no folder held."""
    for state in (AcceleratorState, PartialState):
        state._reset_state()
    try:
        yield
    finally:
        lock.release()


def call(main: Callable[[Sequence[str]], Any], argv: Sequence[str]) -> None:
    """A program's `main` in this process, which saves its imports."""
    with as_a_process():
        main(argv)


def run_here(kind: str, argv: Sequence[str], estimate: bool = False, **replacements: Any) -> Run:
    """A training script's `main` in this process, names in the script replaced; returns its finished run.

    Without `estimate` it leaves out the estimate of memory, which takes as long as all the rest of such a run.
    """
    made: list[Run] = []
    script = SCRIPTS[kind]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in replacements.items():
            patch.setattr(script, name, value)
        start = script.start
        patch.setattr(script, "start", lambda *args, **options: made.append(start(*args, **options)) or made[-1])
        if not estimate:
            patch.setattr(ncp.training.run, "print_estimate", lambda *_: None)
        call(script.main, argv)
    return made[0]


def refusal(main: Callable[[Sequence[str]], Any], argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a program says on standard error when it refuses: status 2, one line of an error, no traceback."""
    with pytest.raises(SystemExit) as stop:
        run_program(lambda: call(main, argv))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in said, said
    assert sum(line.startswith("error: ") for line in said.splitlines()) == 1, said
    return said


def altered(kind: str, change: Callable[[int, torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """For `run_here`: the script's objective with `change(call number, losses)` between it and the loop."""
    original, calls = getattr(SCRIPTS[kind], f"ncp_{kind}"), []

    def objective(models: Models, unet: torch.nn.Module, batch: dict[str, Any], config: Any) -> Any:
        losses, metrics = original(models, unet, batch, config)
        calls.append(1)
        return change(len(calls), losses), metrics

    return {f"ncp_{kind}": objective}


def loaded(config: TrainingConfig, images: int) -> tuple[Models, dict[str, Any]]:
    """(models, first batch) on the device, as a script has them. images: 2 for winner and loser, 1 for winners."""
    with as_a_process():
        accelerator = make_accelerator(config)
    description = describe(config)
    shape = description.latent_shape(config.resolution)
    dataset = PairDataset(config, open_pairs(config), shape, description.timesteps(config.k), images)
    batch = to_device(next(iter(loader(dataset, config, 0, 0, 1))), accelerator)
    return load_models(config, description, accelerator), batch


def timesteps(config: TrainingConfig) -> Timesteps:
    """Those of Stable Diffusion's schedule."""
    return Timesteps.of(ddpm, scheduler(), config.k)


def small_dataset(folder: Path, *extra: str, **columns: Any) -> tuple[train_ncp_dpo.Config, PairDataset]:
    """(config, samples) of a DPO run on 12 rows, columns replaced as in `save_dataset`. There is no model."""
    data = save_dataset(folder / "data" / "train.parquet", **columns).parent
    argv = ["--pretrained_model_name_or_path", "m", "--output_dir", "o", "--dataset_name", str(data)]
    argv += ["--resolution", "32", "--cache_dir", str(folder / "cache"), "--dataloader_num_workers", "0", *extra]
    config = parse(train_ncp_dpo.Config, argv)
    return config, PairDataset(config, open_pairs(config), (4, 16, 16), timesteps(config), images=2)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The LoRA that a run or a checkpoint left in a folder."""
    return load_file(folder / WEIGHTS)


def assert_same_weights(one: Path, other: Path) -> None:
    """Bit by bit."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert [k for k in first if not torch.equal(first[k], second[k])] == []
