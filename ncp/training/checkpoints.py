"""LoRA weights on disk, and checkpoints: whole or not there, refused when damaged or when they belong to another run.

A checkpoint is a folder `checkpoint-STEP` of

    pytorch_lora_weights.safetensors   the training weights, in diffusers' format
    optimizer.pt                       state of the optimizer, the gradient scaler and the average; tensors and numbers
    config.yaml                        the run's configuration
    manifest.json                      step, time, figures since the last log entry, what the run's result depends on
                                       beside its config (`inputs`), and each file's size and sha256
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers.training_utils import EMAModel, _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

import ncp
from ncp.cache import columns_of, fingerprint
from ncp.common.config import read_yaml, save
from ncp.common.errors import DIVERGED, Stopped, UserError
from ncp.common.files import sha256
from ncp.common.lock import hold, is_empty, release
from ncp.data import Pairs
from ncp.models import Description, Models, identity
from ncp.training.settings import TrainingConfig

WEIGHTS = "pytorch_lora_weights.safetensors"

# Keys that a resumed run may change: where things are (what is there is compared by content), how the effective batch
# is split, how long and how watched the run is, and what costs memory or time but not accuracy. All others are the
# mathematics of the run.
MAY_CHANGE = frozenset(
    """
    pretrained_model_name_or_path pretrained_vae_model_name_or_path dataset_name cache_dir cached_latents output_dir
    corrupt_images dataloader_num_workers
    train_batch_size gradient_accumulation_steps effective_batch_size max_train_steps
    gradient_checkpointing checkpointed_blocks torch_compile channels_last deterministic
    checkpointing_steps checkpoints_total_limit resume_from_checkpoint
    max_train_hours max_skipped_steps heldout_steps warn_winner_drift max_winner_drift ddp_timeout
    logging_steps report_to tracker_project_name
    validation_prompts validation_steps validation_num_inference_steps validation_guidance_scale validation_seed
    push_to_hub hub_model_id hub_private_repo
    """.split()  # noqa: SIM905 (a list of forty quoted names is harder to read)
)


# ---------------------------------------------------------------- weights


def lora_state(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The LoRA weights as they train: peft's names, float32."""
    return {k: v.detach().cpu().contiguous() for k, v in get_peft_model_state_dict(unet).items()}


def save_lora(models: Models, folder: Path) -> None:
    """Writes `pytorch_lora_weights.safetensors`, with its alpha, for `pipe.load_lora_weights(folder)`."""
    models.description.pipeline.save_lora_weights(
        folder,
        unet_lora_layers=convert_state_dict_to_diffusers(lora_state(models.unet)),
        # Without the metadata a loader takes alpha = rank.
        **_collate_lora_metadata({"unet": models.unet}),
    )


def load_lora(models: Models, folder: Path) -> None:
    """Puts the weights of `save_lora` back into the training U-Net, to the bit. Raises UserError if they do not fit."""
    saved = load_file(folder / WEIGHTS)
    state = convert_unet_state_dict_to_peft({k.removeprefix("unet."): v for k, v in saved.items()})
    own = lora_state(models.unet)
    if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in own.items()}:
        raise UserError(f"{folder / WEIGHTS}: not a LoRA of this model and rank")
    set_peft_model_state_dict(models.unet, state, "default")


# ---------------------------------------------------------------- where to start


def claim_output_dir(config: TrainingConfig, accelerator: Accelerator, inputs: dict[str, Any]) -> Path | None:
    """The checkpoint to resume from, or None for a fresh run. The main process chooses, the others must find the same.

    The main process becomes the folder's only writer. inputs: `what_it_depends_on`. Raises UserError if there is
    nothing to resume from, if the checkpoint belongs to another run, if the folder holds anything while resuming is
    off, if another run writes to it, or if it cannot be written.
    """
    chosen: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            hold(Path(config.output_dir))
            chosen[0] = _choose(config)
        except UserError as error:
            release()
            chosen[1] = str(error)
    checkpoint, refusal = broadcast_object_list(chosen)
    if refusal:
        raise UserError(refusal)
    if checkpoint is not None:
        if not accelerator.is_main_process and (reason := checkpoint_fault(checkpoint)):
            advice = "output_dir must be on a disk that all machines share"
            raise UserError(f"resume_from_checkpoint: {checkpoint}: {reason}; {advice}", everywhere=False)
        if read_manifest(checkpoint)["step"] > config.max_train_steps:
            step = read_manifest(checkpoint)["step"]
            raise UserError(
                f"resume_from_checkpoint: {checkpoint} is at step {step}, past max_train_steps {config.max_train_steps}"
            )
        if different := differences(config, inputs, checkpoint):
            raise UserError(f"resume_from_checkpoint: {checkpoint} belongs to another run: it has {different}")
    folder = Path(config.output_dir)
    if accelerator.is_main_process:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            save(config, folder / "config.yaml")
    return checkpoint


def _choose(config: TrainingConfig) -> Path | None:
    folder, wanted = Path(config.output_dir), config.resume_from_checkpoint
    if wanted not in (None, "latest", "auto"):
        if reason := checkpoint_fault(Path(wanted)):
            raise UserError(f"resume_from_checkpoint: {wanted}: {reason}")
        return Path(wanted)
    empty = is_empty(folder)
    if wanted is not None:
        checkpoint, skipped = newest(folder)
        for reason in skipped:
            print(f"skipping {folder}/{reason}", file=sys.stderr)
        if checkpoint is not None:
            return checkpoint
        if wanted == "latest" or skipped:
            found = f" ({'; '.join(skipped)})" if skipped else ""
            raise UserError(f"resume_from_checkpoint: no valid checkpoint in {folder}{found}")
        empty = empty or (folder / "config.yaml").is_file()  # a run that ended before its first checkpoint
    if not empty:
        raise UserError(
            f"output_dir: {folder} is not empty; set resume_from_checkpoint: latest to continue the run in it, "
            "or choose another folder"
        )
    return None


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """(the newest valid checkpoint in a folder, what is wrong with each newer one)."""
    skipped = []
    for candidate in sorted(folder.glob("checkpoint-*"), key=_step_of, reverse=True):
        if not (reason := checkpoint_fault(candidate)):
            return candidate, skipped
        skipped.append(f"{candidate.name}: {reason}")
    return None, skipped


def what_it_depends_on(
    config: TrainingConfig, description: Description, pairs: Pairs, effective: int
) -> dict[str, Any]:
    """What decides a run's result beside its config, wherever it lies: weights, training pairs, effective batch."""
    digest = hashlib.sha256()
    for column in columns_of(pairs, ["caption", "image_0_uid", "image_1_uid"]).columns:
        digest.update(repr(column.to_pylist()).encode("utf-8", "surrogatepass"))
    digest.update(pairs.winner.tobytes())
    own = {k: v for k, v in fingerprint(config, description).items() if not hasattr(config, k)}
    unet = identity(config.pretrained_model_name_or_path, config.revision, "unet")
    return {"unet": unet, **own, "training pairs": digest.hexdigest()[:16], "effective batch": effective}


def differences(config: TrainingConfig, inputs: dict[str, Any], checkpoint: Path) -> str:
    """The mathematics that a checkpoint's run and this one do not share, in words; empty if it is the same run."""
    made = {**read_yaml(checkpoint / "config.yaml"), **read_manifest(checkpoint).get("inputs", {})}
    wanted = {**asdict(config), **inputs}
    keys = [k for k in {**made, **wanted} if k not in MAY_CHANGE and made.get(k) != wanted.get(k)]
    # A digest alone does not say what differs.
    note = {"training pairs": "; other data, or a version that chose otherwise which pairs train and are held out"}
    return ", ".join(f"{k} {made.get(k)} (this run: {wanted.get(k)}{note.get(k, '')})" for k in keys)


# ---------------------------------------------------------------- writing and reading


def save_checkpoint(
    config: TrainingConfig,
    models: Models,
    optimizer: Any,
    accelerator: Accelerator,
    ema: EMAModel | None,
    step: int,
    figures: dict[str, Any],
    inputs: dict[str, Any],
    prune: bool = True,
) -> None:
    """Writes `checkpoint-STEP` whole or not at all: to a temporary name, a manifest with hashes, then a rename.

    figures: `Meter.state`. Older checkpoints are pruned only after that. Raises, on all processes, UserError if it
    cannot be written and Stopped if the weights are not finite.
    """
    if not all(p.isfinite().all() for p in models.lora_parameters):  # the same on all processes
        left = last_good(Path(config.output_dir))
        raise Stopped(f"stopped at step {step}: the LoRA weights are not finite; {left}", DIVERGED)
    accelerator.wait_for_everyone()
    failure = None
    if accelerator.is_main_process:
        try:
            with writing(Path(config.output_dir)):
                _write(config, models, optimizer, accelerator, ema, step, {**figures, "inputs": inputs}, prune)
        except UserError as error:
            failure = error
    failed = torch.tensor(float(failure is not None), device=accelerator.device)
    if accelerator.reduce(failed, "sum") > 0:
        raise failure or UserError("the main process could not write a checkpoint")


def _write(
    config: TrainingConfig,
    models: Models,
    optimizer: Any,
    accelerator: Accelerator,
    ema: EMAModel | None,
    step: int,
    content: dict[str, Any],
    prune: bool,
) -> None:
    final = Path(config.output_dir) / f"checkpoint-{step}"
    if not checkpoint_fault(final):
        return
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()  # but not its parent: a folder that somebody removed is not to come back
    try:
        save_lora(models, temporary)
        save(config, temporary / "config.yaml")
        state = {
            "optimizer": optimizer.state_dict(),
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
            "ema": ema.state_dict() if ema is not None else None,
        }
        torch.save(state, buffer := io.BytesIO())  # torch's own writer does not say what the disk's trouble is
        (temporary / "optimizer.pt").write_bytes(buffer.getbuffer())
        files = {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in sorted(temporary.iterdir())}
        manifest = {"step": step, "version": ncp.__version__, **content, "files": files}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _sync(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # of a full disk
        raise
    if prune and config.checkpoints_total_limit is not None:
        for old in sorted(final.parent.glob("checkpoint-*"), key=_step_of)[: -config.checkpoints_total_limit]:
            shutil.rmtree(old)


def _sync(path: Path) -> None:
    """Waits until the disk has a file or, where folders can be opened (not on Windows), the names in a folder."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns a write that fails inside the block into a UserError that names the last good checkpoint of the folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # the second wraps what the system said
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write to {folder} ({reason}); {last_good(folder)}", everywhere=False) from None


def last_good(folder: Path) -> str:
    """Which checkpoint a run that fails leaves, in words."""
    checkpoint, _ = newest(folder)
    return f"last good checkpoint: {checkpoint}" if checkpoint else "there is no checkpoint yet"


def load_checkpoint(
    checkpoint: Path, models: Models, optimizer: Any, accelerator: Accelerator, ema: EMAModel | None
) -> int:
    """Restores what `save_checkpoint` wrote; returns the number of finished steps. No pickle is run."""
    load_lora(models, checkpoint)
    try:
        state = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{checkpoint / 'optimizer.pt'}: not tensors and numbers alone ({reason})") from None
    optimizer.load_state_dict(state["optimizer"])
    if accelerator.scaler is not None and state["scaler"] is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    if ema is not None and state["ema"] is not None:
        ema.load_state_dict(state["ema"])
        ema.to(accelerator.device)
    return read_manifest(checkpoint)["step"]


def checkpoint_fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None if its files are as they were written."""
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


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "manifest.json").read_text())


def _step_of(checkpoint: Path) -> int:
    digits = checkpoint.name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else -1
