"""LoRA weights on disk, in diffusers' format."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers.training_utils import _collate_lora_metadata
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ncp.common.errors import UserError
from ncp.common.files import write_file
from ncp.training.models import Models
from ncp.training.pipeline import FAMILIES

WEIGHTS = "pytorch_lora_weights.safetensors"


def lora_state(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The LoRA weights of the policy: peft's names, float32."""
    return {k: v.detach().cpu().contiguous() for k, v in get_peft_model_state_dict(unet).items()}


def save_lora(models: Models, folder: Path) -> None:
    """Writes `pytorch_lora_weights.safetensors`, with its alpha, for `pipe.load_lora_weights(folder)`."""
    write_file(folder / WEIGHTS, lambda path: _save(models, path))


def _save(models: Models, path: Path) -> None:
    family = models.description.family
    models.description.pipeline.save_lora_weights(
        path.parent,
        weight_name=path.name,
        # Without the metadata a loader assumes alpha = rank.
        **_collate_lora_metadata({family.DENOISER: models.unet}),
        **{f"{family.DENOISER}_lora_layers": family.to_diffusers(lora_state(models.unet))},
    )


def load_lora(models: Models, folder: Path) -> None:
    """Loads exactly the weights of `save_lora` into the policy. Raises UserError if they do not fit."""
    saved, family = load_file(folder / WEIGHTS), models.description.family
    state = family.to_peft({k.removeprefix(f"{family.DENOISER}."): v for k, v in saved.items()})
    own = lora_state(models.unet)
    if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in own.items()}:
        raise UserError(f"{folder / WEIGHTS}: not a LoRA of this model and rank")
    set_peft_model_state_dict(models.unet, state, "default")


def read_lora(file: Path) -> tuple[dict[str, torch.Tensor], float]:
    """(LoRA of a U-Net or of SD3's transformer, read from a file in diffusers' format, under peft's names; its alpha).

    Raises UserError for a file that cannot be read, or that holds anything else than plain LoRA layers of one rank and
    one alpha on such a model.
    """
    try:
        saved = load_file(file)
        with safe_open(file, "pt") as content:
            told = json.loads((content.metadata() or {}).get("lora_adapter_metadata", "{}"))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{file}: not a readable safetensors file ({error})") from None
    families = {family.DENOISER: family for family in FAMILIES.values()}
    part = next((p for p in families if any(k.startswith(f"{p}.") for k in saved)), "unet")
    layers = {k: v for k, v in saved.items() if k.startswith(f"{part}.") and v.dim() == 2}
    if other := sorted(saved.keys() - layers.keys()):
        raise UserError(f"{file}: {other[0]} is no LoRA weight of a U-Net's linear layer in diffusers' format")
    state = families[part].to_peft({k.removeprefix(f"{part}."): v for k, v in layers.items()})
    down = {k: v for k, v in state.items() if k.endswith(".lora_A.weight")}
    pairs = {k for key in down for k in (key, key.replace(".lora_A.", ".lora_B."))}
    if not down or pairs != state.keys():
        odd = sorted(pairs ^ state.keys())
        raise UserError(f"{file}: not a LoRA in diffusers' format{f' (half of a layer: {odd[0]})' if odd else ''}")
    ranks = {len(v) for v in down.values()}
    special = [k for k in ("alpha_pattern", "rank_pattern", "use_rslora", "use_dora") if told.get(f"{part}.{k}")]
    if len(ranks) > 1 or special:
        raise UserError(
            f"{file}: expected one rank and one alpha for all layers{f', not {special[0]}' if special else ''}"
        )
    return state, float(told.get(f"{part}.lora_alpha", ranks.pop()))  # diffusers too uses the rank if alpha is missing
