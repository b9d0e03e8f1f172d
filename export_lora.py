"""Exports a trained LoRA: as one file for ComfyUI, Forge and AUTOMATIC1111, or fused into a pipeline without a LoRA.

    python export_lora.py --lora output/sdxl-ncp-dpo
    python export_lora.py --lora output/sdxl-ncp-dpo/checkpoint-24 --precision fp16 --output loras/ncp-24.safetensors
    python export_lora.py --lora output/sdxl-ncp-dpo --fuse --precision fp16 --output models/sdxl-ncp

`lora` is the output folder of a training script or one of its checkpoints, of this version or an older one. Any other
folder with a U-Net's LoRA in diffusers' format works too. The file has kohya's key names and metadata
(ncp/training/kohya.py); a finished run already contains it, in float32. With `fuse` the LoRA is added to the base
model's weights, and the whole pipeline is written as a diffusers folder. The sum is computed in float32 and rounded
once to `precision`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ncp.common.config import option, parse, read_yaml
from ncp.common.errors import UserError, run_program
from ncp.common.files import explain_write_errors, write_file
from ncp.common.lock import is_empty
from ncp.training.checkpoints import fault, read_manifest
from ncp.training.fuse import STATED, check_base, fused_pipeline, layers, save_pipeline
from ncp.training.kohya import family_of, file_name, kohya_metadata, kohya_state, save_kohya
from ncp.training.weights import WEIGHTS, read_lora

# Config keys that identify the base model and how training used it.
BASE_KEYS = ("pretrained_model_name_or_path", "revision", "variant", "single_file_config", *STATED)
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(kw_only=True)
class ExportConfig:
    """The keys of export_lora.py."""

    lora: str = option(group="what is written", doc="output folder or checkpoint folder of a training script")
    output: str | None = option(
        None,
        doc="file to write (.safetensors), or with fuse the folder; null: in the LoRA's folder, named as it or fused",
    )
    precision: str = option(
        "fp32",
        choices=tuple(PRECISIONS),
        doc="precision of the weights written; fp16 and bf16 take half the space of fp32",
    )
    fuse: bool = option(False, doc="write the base model's whole pipeline with the LoRA in its weights")
    pretrained_model_name_or_path: str | None = option(
        None,
        group="base model",
        doc="base pipeline: folder, hub id or .safetensors checkpoint; null: the one that the LoRA's config.yaml names",
    )
    revision: str | None = option(None, doc="hub revision of the base; null: the one in config.yaml")
    variant: str | None = option(None, doc="weight file variant of the base; null: the one in config.yaml")
    single_file_config: str | None = option(
        None,
        doc="for a base that is one .safetensors file: pipeline folder or hub id with its configs and tokenizers; "
        "null: the one in config.yaml",
    )


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(ExportConfig, argv, description=__doc__)
    folder = find_lora(config.lora)
    state, alpha = read_lora(folder / WEIGHTS)
    settings = settings_of(folder, config)
    output = output_path(folder, config)
    rank = next(iter(layers(state).values()))[0].shape[0]
    what = f"{len(layers(state))} layers, rank {rank}, alpha {alpha:g}, {config.precision}"
    dtype = PRECISIONS[config.precision]
    if config.fuse:
        write_fused(output, settings, state, alpha, dtype)
        print(f"wrote {output}: {settings['pretrained_model_name_or_path']} with the LoRA in its weights ({what})")
        return
    facts, version, step = told_by(folder, settings)
    metadata = kohya_metadata(output.stem, state, alpha, settings, version, step, facts)
    with explain_write_errors(f"output: cannot write {output}"):
        output.parent.mkdir(parents=True, exist_ok=True)
        save_kohya(output, kohya_state(state, alpha, dtype), metadata)
    places = ", ".join(f"{place} of {name}" for name, place in family_of(next(iter(layers(state)))).READ_BY.items())
    print(f"wrote {output} ({what}): for {places}")


def find_lora(name: str) -> Path:
    """The folder, if it contains a LoRA. Raises UserError if it does not, or if it is a damaged checkpoint."""
    folder = Path(name)
    if not folder.is_dir():
        raise UserError(f"lora: no such folder: {name}")
    if (folder / "manifest.json").is_file() and (reason := fault(folder)):
        raise UserError(f"lora: {name}: {reason}")
    if not (folder / WEIGHTS).is_file():
        found = checkpoints(folder)
        hint = f"; the run in it has not finished, but there is {found[-1]}" if found else ""
        raise UserError(f"lora: no {WEIGHTS} in {name}{hint}")
    return folder


def settings_of(folder: Path, config: ExportConfig) -> dict[str, Any]:
    """The settings in the LoRA's config.yaml, if there is one, with the base model's keys of the command line."""
    settings = read_yaml(folder / "config.yaml") if (folder / "config.yaml").is_file() else {}
    if config.pretrained_model_name_or_path:  # config.yaml describes another base
        settings |= dict.fromkeys(BASE_KEYS)
    given = {key: getattr(config, key, None) for key in BASE_KEYS}
    return settings | {key: value for key, value in given.items() if value is not None}


def output_path(folder: Path, config: ExportConfig) -> Path:
    """The path to write. Raises UserError for a file with another suffix, or for a folder that is not empty."""
    if config.fuse:
        output = Path(config.output) if config.output else folder / "fused"
        if output.exists() and not (output.is_dir() and is_empty(output)):
            raise UserError(f"output: {output} is not empty; choose another folder")
        return output
    output = Path(config.output) if config.output else folder / file_name(folder)
    if output.suffix != ".safetensors" or output.is_dir():
        raise UserError(f"output: {output} is no .safetensors file (a folder is written with fuse: true)")
    if output.resolve() == (folder / WEIGHTS).resolve():
        raise UserError(f"output: {output} is the LoRA itself; choose another name")
    return output


def write_fused(
    output: Path, settings: Mapping[str, Any], state: Mapping[str, torch.Tensor], alpha: float, dtype: torch.dtype
) -> None:
    """Writes the base pipeline with the LoRA fused into its weights, atomically."""
    if settings.get("pretrained_model_name_or_path") is None:
        raise UserError("fuse needs pretrained_model_name_or_path: the LoRA's folder has no config.yaml that names it")
    base = SimpleNamespace(**{key: settings.get(key) for key in BASE_KEYS})
    check_base(base, state)
    pipe = fused_pipeline(base, state, alpha, dtype)
    with explain_write_errors(f"output: cannot write {output}"):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_file(output, partial(save_pipeline, pipe))


def told_by(folder: Path, settings: Mapping[str, Any]) -> tuple[dict[str, Any], str | None, int | None]:
    """(`training_facts` of the run, version of this project that trained it, step), each as far as known.

    They come from a checkpoint's manifest; for an output folder from that of its last checkpoint, or the model card.
    """
    is_checkpoint = (folder / "manifest.json").is_file()
    run = folder.parent if is_checkpoint else folder
    newest = [folder] if is_checkpoint else checkpoints(folder)[-1:]
    manifest = read_manifest(newest[0]) if newest and not fault(newest[0]) else {}
    card = (run / "README.md").read_text(encoding="utf-8") if (run / "README.md").is_file() else ""
    made = re.search(r"^Made with (\S+) \(.*, version (\S+)\.$", card, re.M)
    pairs = re.search(r"^\| data \| .*: ([\d,]+) decisive pairs \|$", card, re.M)
    facts = {"method": made[1]} if made else {}
    facts |= {"pairs": int(pairs[1].replace(",", ""))} if pairs else {}
    version = manifest.get("version") or (made[2] if made else None)
    step = manifest.get("step") if is_checkpoint else settings.get("max_train_steps")
    return manifest.get("facts") or facts, version, step


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders of a run, in order of step."""
    found = [c for c in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", c.name)]
    return sorted(found, key=lambda c: int(c.name.rpartition("-")[2]))


if __name__ == "__main__":
    run_program(main)
