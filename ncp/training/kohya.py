"""The LoRA in kohya's format: the key names and the metadata that ComfyUI, Forge and AUTOMATIC1111 expect.

For a layer `down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q` the file has three tensors:

    lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight   (rank, in)
    lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight     (out, rank)
    lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.alpha              ()

The layer's change is alpha / rank * up @ down. ComfyUI and Forge read alpha from that tensor only, and use the rank if
it is missing (`load_lora` in ComfyUI, comfy/lora.py, and in its copy in Forge). So it is always written, in float32.

Keys of the metadata are those of kohya's trainer (kohya-ss/sd-scripts, train_network.py) and of ModelSpec 1.0.1 (its
library/sai_model_spec.py). AUTOMATIC1111 shows some as a table, and tells SD 1, SD 2 and SDXL apart by
`ss_base_model_version` and `ss_v2` (AUTOMATIC1111/stable-diffusion-webui, extensions-builtin/Lora/network.py). There
is no date, so that every export of one LoRA is the same.

For SD3 the names begin with lora_transformer (lora_transformer_transformer_blocks_0_attn_to_q), which ComfyUI looks for
(`model_lora_keys_unet`). It also finds a LoRA of SD3 in diffusers' format, but not its alpha. Forge has no names for
SD3, and AUTOMATIC1111 only diffusers'.

Blocks have diffusers' names, for SDXL too. ComfyUI, Forge and AUTOMATIC1111 read these. kohya's own tools for SDXL,
such as its sdxl_merge_lora.py, know only the names of the original checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.compute as pc
import torch
from safetensors.torch import save_file

from ncp.common.errors import UserError
from ncp.common.files import write_file
from ncp.training import sd3, unets
from ncp.training.models import Models
from ncp.training.samples import PairDataset
from ncp.training.weights import WEIGHTS

SD3_BLOCKS = "transformer_blocks."  # how the names of SD3's layers begin; a U-Net's never do
PARTS = {"lora_A": "lora_down", "lora_B": "lora_up"}  # peft's names of the two factors, and kohya's
SDXL_TEXT_WIDTH, SD2_TEXT_WIDTH = 2048, 1024  # of the prompt's embedding, the input of the cross-attention


def file_name(folder: Path) -> str:
    """The name of a run's file: that of its output folder. Programs list the LoRA under this name.

    For a checkpoint the step is added, in the form of kohya's trainer.
    """
    name = folder.resolve().name
    if step := re.fullmatch(r"checkpoint-(\d+)", name):
        name = f"{folder.resolve().parent.name or 'lora'}-step{int(step[1]):08d}"
    name = name or "lora"  # the root of a disk has no name
    # diffusers looks for a file whose name ends like this, and must find its own format.
    return f"{name}-kohya.safetensors" if f"{name}.safetensors".endswith(WEIGHTS) else f"{name}.safetensors"


def kohya_state(state: Mapping[str, torch.Tensor], alpha: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """LoRA weights under kohya's names. state: peft's names within the U-Net. The alphas stay in float32.

    Raises UserError for a tensor that is not a factor of a LoRA layer, and for values beyond `dtype`'s range.
    """
    out = {}
    for name, tensor in state.items():
        layer, _, part = name.removesuffix(".weight").rpartition(".")
        if part not in PARTS:
            raise UserError(f"{name}: not a LoRA weight that kohya's form can hold")
        key = f"{family_of(layer).LORA_PREFIX}_" + layer.replace(".", "_")
        out[f"{key}.{PARTS[part]}.weight"] = tensor.to(dtype).contiguous()
        out[f"{key}.alpha"] = torch.tensor(float(alpha), dtype=torch.float32)
        if not out[f"{key}.{PARTS[part]}.weight"].isfinite().all():
            raise UserError(f"{name}: not finite in {dtype}")
    return out


def family_of(layer: str) -> ModuleType:
    """The family of models that has a layer of this name: its names in kohya's form, and which programs read them."""
    return sd3 if layer.startswith(SD3_BLOCKS) else unets


def training_facts(method: str, models: Models, dataset: PairDataset) -> dict[str, Any]:
    """The file's metadata about a run besides its settings: what was trained, how, and on how many pairs."""
    captions = dataset.pairs.columns(["caption"])["caption"].slice(0, len(dataset.pairs))
    return {
        "method": method,
        "is_xl": models.description.is_xl,
        "prediction_type": models.scheduler.config.get("prediction_type"),
        "pairs": len(dataset.pairs),
        "prompts": len(pc.unique(captions)),
        "images": len(dataset.pairs) * dataset.images,
    }


def kohya_metadata(
    name: str,
    state: Mapping[str, torch.Tensor],
    alpha: float,
    settings: Mapping[str, Any],
    version: str | None,
    step: int | None,
    facts: Mapping[str, Any],
) -> dict[str, str]:
    """The metadata of a file called `name`. Unknown values, for example of an older run, are left out.

    state: peft's names. settings: from config.yaml. version: of this project. facts: see `training_facts`.
    """
    rank = next(len(tensor) for key, tensor in state.items() if "lora_A" in key)
    base_version, is_sd2, architecture = base_model(state, facts.get("is_xl"), facts.get("prediction_type"))
    base, dataset = (_without_folders(settings.get(k)) for k in ("pretrained_model_name_or_path", "dataset_name"))
    counts = " of ".join(f"{facts[k]:,} {k}" for k in ("pairs", "prompts") if k in facts)
    made = f"{facts.get('method', 'preference optimization')} (arXiv 2406.17636)"
    description = ", ".join(filter(None, [made, f"version {version}" if version else None, counts]))
    resolution = settings.get("resolution")
    side = f"{resolution}x{resolution}" if resolution else None
    images = facts.get("images")
    found = {
        "ss_output_name": name,
        "ss_sd_model_name": base,
        "ss_base_model_version": base_version,
        "ss_v2": is_sd2,
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": f"{alpha:g}",
        "ss_resolution": f"({resolution}, {resolution})" if resolution else None,
        "ss_num_train_images": images,
        # AUTOMATIC1111 reads the size of the dataset from this key.
        "ss_dataset_dirs": json.dumps({dataset: {"n_repeats": 1, "img_count": images}}) if images and dataset else None,
        "ss_steps": step,
        "ss_max_train_steps": settings.get("max_train_steps"),
        "ss_mixed_precision": settings.get("mixed_precision"),
        "ss_seed": settings.get("seed"),
        "ss_training_comment": description,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.implementation_version": f"ncp {version}" if version else None,
        "modelspec.title": name,
        "modelspec.description": description,
        "modelspec.resolution": side,
        "modelspec.prediction_type": {"epsilon": "epsilon", "v_prediction": "v"}.get(facts.get("prediction_type", "")),
        "format": "pt",
    }
    return {key: str(value) for key, value in found.items() if value is not None}


def base_model(
    state: Mapping[str, torch.Tensor], is_xl: bool | None, prediction_type: str | None
) -> tuple[str, bool, str]:
    """(kohya's name of the base model's version, whether it is SD 2, ModelSpec's name of the architecture).

    The width of the text embedding tells SD 1 from SD 2, and, if is_xl is None, also SDXL.
    """
    if any(k.startswith(SD3_BLOCKS) for k in state):
        return "sd3", False, "stable-diffusion-3"
    width = next((t.shape[1] for k, t in state.items() if k.endswith("attn2.to_k.lora_A.weight")), None)
    if is_xl if is_xl is not None else width == SDXL_TEXT_WIDTH:
        return "sdxl_base_v1-0", False, "stable-diffusion-xl-v1-base"
    v = prediction_type == "v_prediction"
    if width == SD2_TEXT_WIDTH:
        return "sd_v2_v" if v else "sd_v2", True, "stable-diffusion-v2-768-v" if v else "stable-diffusion-v2-512"
    return "sd_v1_v" if v else "sd_v1", False, "stable-diffusion-v1"


def save_kohya(file: Path, state: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes the file atomically. state: see `kohya_state`."""
    write_file(file, lambda path: save_file(state, path, metadata))


def _without_folders(name: Any) -> str | None:
    """A hub id or relative path unchanged; the last part of an absolute path, whose folders are private."""
    return Path(name).name if name and Path(name).is_absolute() else name
