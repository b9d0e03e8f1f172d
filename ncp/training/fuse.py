"""A LoRA put into the weights of its base model: a pipeline that needs no LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import UNet2DConditionModel

from ncp.common import hub
from ncp.common.errors import UserError
from ncp.training.pipeline import PIPELINES, read_json


def check_base(name: str, revision: str | None, state: Mapping[str, torch.Tensor]) -> Any:
    """The class of the base pipeline, from its JSON; no weight is loaded. state: the LoRA under peft's names.

    Raises UserError if it is neither Stable Diffusion nor SDXL, or if its U-Net lacks a layer of the LoRA, or has it in
    another size.
    """
    kind = read_json(name, "model_index.json", revision).get("_class_name")
    if kind not in PIPELINES:
        raise UserError(f"{name}: a {kind}; expected {' or '.join(PIPELINES)}")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(read_json(name, "unet/config.json", revision))
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


def fused_pipeline(
    name: str,
    revision: str | None,
    variant: str | None,
    state: Mapping[str, torch.Tensor],
    alpha: float,
    dtype: torch.dtype,
) -> Any:
    """The base pipeline with the LoRA in its U-Net, on the CPU, in `dtype`. The sum is taken in float32.

    Raises UserError if the base cannot be loaded.
    """
    kind = check_base(name, revision, state)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    where = {"revision": revision, "variant": variant}
    with hub.loading(name):
        unet = UNet2DConditionModel.from_pretrained(name, subfolder="unet", dtype=torch.float32, **where)
        fuse(unet, state, alpha)
        return kind.from_pretrained(name, unet=unet.to(dtype), dtype=dtype, **where)


def save_pipeline(pipe: Any, folder: Path) -> None:
    """Writes a pipeline's folder; its weights are safetensors."""
    pipe.save_pretrained(folder)
