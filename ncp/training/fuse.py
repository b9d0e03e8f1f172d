"""Fuses a LoRA into the weights of its base model, which gives a pipeline without a LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from ncp.common import hub
from ncp.common.errors import UserError
from ncp.training import single_file
from ncp.training.pipeline import FAMILIES, PIPELINES, parts_of, read_json, read_schedule

STATED = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}  # and what a config means that is silent


def check_base(base: Any, state: Mapping[str, torch.Tensor]) -> Any:
    """The class of the base pipeline, from its JSON files; no weights are loaded.

    base: the keys of a training config that describe the base model. state: the LoRA under peft's names. Raises
    UserError if the base is no Stable Diffusion, or if its denoiser lacks a layer of the LoRA or has it in
    another size.
    """
    name, given = base.pretrained_model_name_or_path, base.single_file_config
    kind = read_json(name, "model_index.json", base.revision, given).get("_class_name")
    if kind not in PIPELINES:
        raise UserError(f"{name}: a {kind}; expected {' or '.join(PIPELINES)}")
    family = FAMILIES[PIPELINES[kind]]
    with torch.device("meta"):
        config = read_json(name, f"{family.DENOISER}/config.json", base.revision, given)
        model = family.MODEL.from_config(config)
    weights = dict(model.named_parameters())
    for layer, (down, up) in layers(state).items():
        shape = (len(up), down.shape[1])
        if (weight := weights.get(f"{layer}.weight")) is None:
            raise UserError(
                f"{name}: its {family.DENOISER} has no {layer}, which the LoRA changes; another base model?"
            )
        if tuple(weight.shape) != shape:
            found = " x ".join(map(str, weight.shape))
            raise UserError(
                f"{name}: {layer} is {found}, and the LoRA is for {shape[0]} x {shape[1]}; another base model?"
            )
    return PIPELINES[kind]


def layers(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The two factors, down (rank, in) and up (out, rank), of each layer. state: peft's names."""
    names = [name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")]
    return {name: (state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]) for name in names}


@torch.no_grad()
def fuse(model: torch.nn.Module, state: Mapping[str, torch.Tensor], alpha: float) -> None:
    """Adds alpha / rank * up @ down to the weights of each layer, in place."""
    weights = dict(model.named_parameters())
    for layer, (down, up) in layers(state).items():
        weights[f"{layer}.weight"].add_(up.float() @ down.float(), alpha=alpha / len(down))


def fused_pipeline(base: Any, state: Mapping[str, torch.Tensor], alpha: float, dtype: torch.dtype) -> Any:
    """The base pipeline with the LoRA in its denoiser, on the CPU, in `dtype`. The sum is taken in float32.

    The scheduler is the base's own, or DDIM if training used another noise schedule or prediction type than the base's
    files state. Safety checker and feature extractor are left out. Raises UserError if the base cannot be loaded.
    """
    kind, name = check_base(base, state), base.pretrained_model_name_or_path
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    schedule, _ = read_schedule(base)
    family = FAMILIES[kind]
    index = read_json(name, "model_index.json", base.revision, base.single_file_config)
    part, extra = family.DENOISER, family.left_out(kind, parts_of(index))
    where = {"revision": base.revision, "variant": base.variant}
    with hub.loading(name):
        if single_file.is_single_file(name):
            path, given = Path(name), base.single_file_config
            model = single_file.load_part(path, given, family.MODEL, part, torch.float32)
            fuse(model, state, alpha)
            pipe = single_file.load_pipeline(path, given, kind, dtype, unet=model.to(dtype), **extra)
        else:
            model = family.MODEL.from_pretrained(name, subfolder=part, dtype=torch.float32, **where)
            fuse(model, state, alpha)
            pipe = kind.from_pretrained(name, **{part: model.to(dtype)}, dtype=dtype, **extra, **where)
    if any((pipe.scheduler.config.get(k) or silent) != (schedule.get(k) or silent) for k, silent in STATED.items()):
        pipe.register_modules(scheduler=family.sampler(schedule))
    return pipe


def save_pipeline(pipe: Any, folder: Path) -> None:
    """Writes a pipeline folder, with weights in safetensors files."""
    pipe.save_pretrained(folder)
