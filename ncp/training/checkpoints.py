"""Checkpoints: written atomically, and refused when damaged.

A checkpoint is a folder `checkpoint-STEP` of

    pytorch_lora_weights.safetensors   the training weights, in diffusers' format
    optimizer.pt                       state of the optimizer, the gradient scaler, the average and the LoRA of a
                                       reference that follows the policy; tensors and numbers
    config.yaml                        the run's configuration
    manifest.json                      step, time, metrics since the last log entry, metadata of an exported LoRA
                                       (`facts`), what the result depends on besides the config (`inputs`), and
                                       each file's size and sha256
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError

import ncp
from ncp.common.config import save_yaml
from ncp.common.errors import DIVERGED, Stopped, UserError
from ncp.common.files import sha256, write_file
from ncp.training.models import Models
from ncp.training.settings import TrainingConfig
from ncp.training.weights import load_lora, save_lora


@dataclass
class State:
    """What training changes, and a checkpoint therefore stores."""

    models: Models
    optimizer: Any
    accelerator: Accelerator  # for its gradient scaler
    average: EMAModel | None

    def save(self, config: TrainingConfig, step: int, content: dict[str, Any], prune: bool = True) -> None:
        """Writes `checkpoint-STEP` into the output folder, atomically. All processes must call it.

        content: the manifest's entries besides step and files. prune: whether to remove the oldest checkpoints beyond
        `checkpoints_total_limit` afterwards. Raises, on all processes, UserError if it cannot be written and Stopped
        if the weights are not finite.
        """
        folder = Path(config.output_dir)
        if not all(p.isfinite().all() for p in self.models.lora_parameters):  # the same on all processes
            left = last_good(folder)
            raise Stopped(f"stopped at step {step}: the LoRA weights are not finite; {left}", DIVERGED)
        self.accelerator.wait_for_everyone()
        failure = None
        if self.accelerator.is_main_process:
            try:
                with writing(folder):
                    checkpoint = folder / f"checkpoint-{step}"
                    if fault(checkpoint):
                        write_file(checkpoint, lambda path: self._write(path, config, step, content))
                    if prune and config.checkpoints_total_limit is not None:
                        for old in sorted(folder.glob("checkpoint-*"), key=_step_of)[: -config.checkpoints_total_limit]:
                            shutil.rmtree(old)
            except UserError as error:
                failure = error
        failed = torch.tensor(float(failure is not None), device=self.accelerator.device)
        if self.accelerator.reduce(failed, "sum") > 0:
            raise failure or UserError("the main process could not write a checkpoint")

    def _write(self, folder: Path, config: TrainingConfig, step: int, content: dict[str, Any]) -> None:
        folder.mkdir()  # without parents: an output folder that was removed during the run is not created again
        save_lora(self.models, folder)
        save_yaml(config, folder / "config.yaml")
        scaler = self.accelerator.scaler
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "ema": self.average.state_dict() if self.average is not None else None,
            "reference": [p.detach().cpu() for p in self.models.reference_lora],
        }
        torch.save(state, buffer := io.BytesIO())  # torch.save to a file does not report the system's error
        (folder / "optimizer.pt").write_bytes(buffer.getbuffer())
        files = {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in sorted(folder.iterdir())}
        manifest = {"step": step, "version": ncp.__version__, **content, "files": files}
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")

    def load(self, checkpoint: Path) -> None:
        """Restores exactly what `save` wrote. Runs no pickled code. Raises UserError if it does not fit this run."""
        load_lora(self.models, checkpoint)
        try:
            state = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{checkpoint / 'optimizer.pt'}: not tensors and numbers alone ({reason})") from None
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.average is not None and state["ema"] is not None:
            self.average.load_state_dict(state["ema"])
            self.average.to(self.accelerator.device)
        for own, saved in zip(self.models.reference_lora, state.get("reference", []), strict=True):
            own.data.copy_(saved)


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None if its files are unchanged since they were written."""
    if not checkpoint.is_dir():
        return "no such checkpoint folder"
    try:
        manifest = read_manifest(checkpoint)
        for name, expected in manifest["files"].items():
            file = checkpoint / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"] or sha256(file) != expected["sha256"]:
                return f"{name} is damaged"
        return None if isinstance(manifest["step"], int) else "manifest.json is damaged"
    except FileNotFoundError:
        return "manifest.json is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is damaged"


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """(the newest valid checkpoint in a folder, what is wrong with each newer one)."""
    skipped: list[str] = []
    for candidate in sorted(folder.glob("checkpoint-*"), key=_step_of, reverse=True):
        if not (reason := fault(candidate)):
            return candidate, skipped
        skipped.append(f"{candidate.name}: {reason}")
    return None, skipped


def last_good(folder: Path) -> str:
    """The newest valid checkpoint of a run that fails, in words."""
    checkpoint, _ = newest(folder)
    return f"last good checkpoint: {checkpoint}" if checkpoint else "there is no checkpoint yet"


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns a failed write inside the block into a UserError that names the newest valid checkpoint of the folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors wraps the system's error
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write to {folder} ({reason}); {last_good(folder)}", everywhere=False) from None


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """manifest.json of a checkpoint."""
    return json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))


def _step_of(checkpoint: Path) -> int:
    digits = checkpoint.name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else -1
