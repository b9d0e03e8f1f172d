"""Where a run starts: from the beginning in an empty folder, or from a checkpoint of the same run."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ncp.common.config import read_yaml, save_yaml
from ncp.common.environment import environment
from ncp.common.errors import UserError
from ncp.common.lock import hold, is_empty, release
from ncp.training import cache
from ncp.training.checkpoints import fault, newest, read_manifest, writing
from ncp.training.pairs import Pairs
from ncp.training.pipeline import Description, identity
from ncp.training.schedules import SCHEDULE
from ncp.training.settings import TrainingConfig
from ncp.training.single_file import is_single_file

# Keys that a resumed run may change: locations (their content is compared instead), how the effective batch is split,
# how long the run is, how it is logged and checked, and trade-offs between memory and time. All other keys change the
# mathematics of the run.
MAY_CHANGE = frozenset(
    """
    pretrained_model_name_or_path single_file_config pretrained_vae_model_name_or_path
    dataset_name cache_dir cached_latents output_dir
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


# Keys that a script got after its first checkpoints. Other keys of its own tell it from the other scripts.
LATER = frozenset({"winner_preserving_mu", "utility", "eta", "soft_labels", "reference_decay"})


def choose_checkpoint(config: TrainingConfig, accelerator: Accelerator, inputs: dict[str, Any]) -> Path | None:
    """The checkpoint to resume from, or None for a new run. The main process chooses; the others must find the same.

    The main process becomes the folder's only writer, and writes config.yaml and environment.yaml. inputs: this run's
    `fingerprint`. Raises UserError if there is nothing to resume from, if the checkpoint belongs to another run, if
    the folder is not empty although resuming is off, if another run writes to it, or if it cannot be written.
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
        if not accelerator.is_main_process and (reason := fault(checkpoint)):
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
            save_yaml(config, folder / "config.yaml")
            save_yaml(environment(), folder / "environment.yaml")
    return checkpoint


def _choose(config: TrainingConfig) -> Path | None:
    folder, wanted = Path(config.output_dir), config.resume_from_checkpoint
    if wanted not in (None, "latest", "auto"):
        if reason := fault(Path(wanted)):
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


def fingerprint(config: TrainingConfig, description: Description, pairs: Pairs, effective: int) -> dict[str, Any]:
    """What decides a run's result besides its config: weights and training pairs (by content), effective batch."""
    digest = hashlib.sha256()
    for column in pairs.columns(["caption", "image_0_uid", "image_1_uid"]).columns:
        digest.update(repr(column.to_pylist()).encode("utf-8", "surrogatepass"))
    digest.update(pairs.winner.tobytes())
    if pairs.share is not None:
        digest.update(pairs.share.tobytes())
    own = {k: v for k, v in cache.fingerprint(config, description).items() if not hasattr(config, k)}
    name = config.pretrained_model_name_or_path
    part = description.family.DENOISER
    unet = {part: identity(name, config.revision, part, config.single_file_config)}
    if is_single_file(name):  # its name may state the prediction type
        unet |= {"prediction": description.prediction.partition(",")[0]}
    if Path(name).is_dir():  # on the hub the commit stands for it
        schedule = {key: description.scheduler.get(key) for key in SCHEDULE}
        unet |= {"noise schedule": ", ".join(f"{key} {value}" for key, value in schedule.items() if value is not None)}
    # A falling learning rate depends on the number of steps, which may change otherwise.
    steps = {} if config.lr_scheduler == "constant_with_warmup" else {"steps of lr_scheduler": config.max_train_steps}
    return {**unet, **own, **steps, "training pairs": digest.hexdigest()[:16], "effective batch": effective}


def differences(config: TrainingConfig, inputs: dict[str, Any], checkpoint: Path) -> str:
    """How the mathematics of a checkpoint's run and this one differ, in words; empty if it is the same run.

    A key that the checkpoint lacks counts as its default if it is newer: one that all scripts share, or one of `LATER`.
    """
    newer = [*fields(TrainingConfig), *(f for f in fields(config) if f.name in LATER)]
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in newer}
    made = {**defaults, **read_yaml(checkpoint / "config.yaml"), **read_manifest(checkpoint).get("inputs", {})}
    wanted = {**asdict(config), **inputs}
    made.setdefault("noise schedule", wanted.get("noise schedule"))  # manifests of earlier versions have none
    keys = [k for k in {**made, **wanted} if k not in MAY_CHANGE and made.get(k) != wanted.get(k)]
    # A digest alone does not say what differs.
    note = {"training pairs": "; other data, or a version that chose otherwise which pairs train and are held out"}
    return ", ".join(f"{k} {made.get(k)} (this run: {wanted.get(k)}{note.get(k, '')})" for k in keys)
