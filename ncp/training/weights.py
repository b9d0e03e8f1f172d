"""LoRA weights on disk, in diffusers' format."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from ncp.common.errors import UserError
from ncp.common.files import write_file
from ncp.training.models import Models

WEIGHTS = "pytorch_lora_weights.safetensors"


def lora_state(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The LoRA weights as they train: peft's names, float32."""
    return {k: v.detach().cpu().contiguous() for k, v in get_peft_model_state_dict(unet).items()}


def save_lora(models: Models, folder: Path) -> None:
    """Writes `pytorch_lora_weights.safetensors`, with its alpha, for `pipe.load_lora_weights(folder)`."""
    write_file(folder / WEIGHTS, lambda path: _save(models, path))


def _save(models: Models, path: Path) -> None:
    models.description.pipeline.save_lora_weights(
        path.parent,
        weight_name=path.name,
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
