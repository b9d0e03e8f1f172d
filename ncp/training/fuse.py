"""Fuses a LoRA into the weights of its base model, which gives a pipeline without a LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DDIMScheduler, UNet2DConditionModel

from ncp.common import hub
from ncp.common.errors import UserError
from ncp.training import single_file
from ncp.training.pipeline import PIPELINES, read_json, read_schedule, scheduler_like

STATED = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}  # and what a config means that is silent


def check_base(base: Any, state: Mapping[str, torch.Tensor]) -> Any:
    """The class of the base pipeline, from its JSON files; no weights are loaded.

    base: the keys of a training config that describe the base model. state: the LoRA under peft's names. Raises
    UserError if the base is neither Stable Diffusion nor SDXL, or if its U-Net lacks a layer of the LoRA or has it in
    another size.
    """
    name, given = base.pretrained_model_name_or_path, base.single_file_config
    kind = read_json(name, "model_index.json", base.revision, given).get("_class_name")
    if kind not in PIPELINES:
        raise UserError(f"{name}: a {kind}; expected {' or '.join(PIPELINES)}")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(read_json(name, "unet/config.json", base.revision, given))
    weights = dict(unet.named_parameters())
    for layer, (down, up) in layers(state).items():
        shape = (len(up), down.shape[1])
        if (weight := weights.get(f"{layer}.weight")) is None:
            raise UserError(f"{name}: its U-Net has no {layer}, which the LoRA changes; another base model?")
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
def fuse(unet: torch.nn.Module, state: Mapping[str, torch.Tensor], alpha: float) -> None:
    """Adds alpha / rank * up @ down to the weights of each layer, in place."""
    weights = dict(unet.named_parameters())
    for layer, (down, up) in layers(state).items():
        weights[f"{layer}.weight"].add_(up.float() @ down.float(), alpha=alpha / len(down))


def fused_pipeline(base: Any, state: Mapping[str, torch.Tensor], alpha: float, dtype: torch.dtype) -> Any:
    """The base pipeline with the LoRA in its U-Net, on the CPU, in `dtype`. The sum is taken in float32.

    The scheduler is the base's own, or DDIM if training used another noise schedule or prediction type than the base's
    files state. Safety checker and feature extractor are left out. Raises UserError if the base cannot be loaded.
    """
    kind, name = check_base(base, state), base.pretrained_model_name_or_path
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    schedule, _ = read_schedule(base)
    extra: dict[str, Any] = {"feature_extractor": None}
    if kind is PIPELINES["StableDiffusionPipeline"]:
        extra |= {"safety_checker": None, "requires_safety_checker": False}
    where = {"revision": base.revision, "variant": base.variant}
    with hub.loading(name):
        if single_file.is_single_file(name):
            path, given = Path(name), base.single_file_config
            unet = single_file.load_part(path, given, UNet2DConditionModel, "unet", torch.float32)
            fuse(unet, state, alpha)
            pipe = single_file.load_pipeline(path, given, kind, dtype, unet=unet.to(dtype), **extra)
        else:
            unet = UNet2DConditionModel.from_pretrained(name, subfolder="unet", dtype=torch.float32, **where)
            fuse(unet, state, alpha)
            pipe = kind.from_pretrained(name, unet=unet.to(dtype), dtype=dtype, **extra, **where)
    if any((pipe.scheduler.config.get(k) or silent) != (schedule.get(k) or silent) for k, silent in STATED.items()):
        pipe.register_modules(scheduler=scheduler_like(DDIMScheduler, schedule))
    return pipe


def save_pipeline(pipe: Any, folder: Path) -> None:
    """Writes a pipeline folder, with weights in safetensors files."""
    pipe.save_pretrained(folder)
