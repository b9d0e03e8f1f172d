"""Stable Diffusion 1.x, 2.x and SDXL: what a run does for these models alone. ncp/training/sd3.py has the same for SD3.

`description` is that of ncp/training/pipeline.py. Every function here has one of the same name there.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft

from ncp import ddpm
from ncp.common.errors import UserError
from ncp.encoder import DownBlockEncoder
from ncp.training.schedules import check_schedule, scheduler_like

DENOISER = "unet"  # the pipeline's part that is trained
MODEL = UNet2DConditionModel
PIPELINES = (StableDiffusionPipeline, StableDiffusionXLPipeline)
ENCODER = DownBlockEncoder
DIFFUSION = ddpm
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
LORA_PREFIX = "lora_unet"  # in kohya's form
READ_BY = {
    "ComfyUI": "models/loras",
    "Forge": "models/Lora",
    "AUTOMATIC1111": "models/Lora",
}  # that form, and from where
REPEATED = ("BasicTransformerBlock", "ResnetBlock2D")  # blocks that torch_compile compiles
# Weights in diffusers' form under peft's names, and back.
to_diffusers, to_peft = convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft


def pipeline_of(name: str, index: dict[str, Any], has: set[str]) -> type:
    """The pipeline's class. index: model_index.json. has: its parts. Raises UserError if one is missing."""
    if ("text_encoder_2" in has and "text_encoder" not in has) or index.get("requires_aesthetics_score"):
        raise UserError(f"{name} is SDXL's refiner, which finishes another model's images; fine-tune the base")
    parts = {"unet", "vae", "scheduler", "text_encoder", "tokenizer"}
    if missing := sorted(parts - has):
        raise UserError(
            f"{name}: the pipeline has no {', '.join(missing)}; expected Stable Diffusion 1.x/2.x, SDXL or SD3"
        )
    if index["unet"][1] != MODEL.__name__:
        raise UserError(f"{name}: the denoiser is a {index['unet'][1]}; the method needs a {MODEL.__name__}")
    return StableDiffusionXLPipeline if "text_encoder_2" in has else StableDiffusionPipeline


def check(name: str, config: Any, description: Any) -> None:
    """Raises UserError for a U-Net or a noise schedule that the method cannot use."""
    unet = description.denoiser
    if unet.get("time_cond_proj_dim") is not None:
        raise UserError(f"{name}: the U-Net takes the guidance scale as an input (LCM); fine-tune the model it is of")
    inputs = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type")
    if extra := [key for key in inputs if unet.get(key) is not None]:
        raise UserError(f"{name}: the U-Net takes more than noise, time and text ({extra[0]}); expected SD or SDXL")
    check_schedule(name, description.scheduler)


def prediction(scheduler: dict[str, Any]) -> str:
    """What the model predicts, in words."""
    zero = " with zero terminal SNR" if scheduler.get("rescale_betas_zero_snr") else ""
    return f"{scheduler.get('prediction_type', 'epsilon')}{zero}"


def schedule(scheduler: dict[str, Any]) -> DDPMScheduler:
    """The noise schedule of training."""
    return scheduler_like(DDPMScheduler, scheduler)


def sampler(scheduler: dict[str, Any]) -> DDIMScheduler:
    """The sampler of the validation images."""
    return scheduler_like(DDIMScheduler, scheduler)


def check_length(name: str, has: Collection[str], max_sequence_length: int) -> None:
    """Nothing to check: only SD3's T5 has a length that may be chosen."""


def left_out(pipeline: type, has: Collection[str]) -> dict[str, Any]:
    """Arguments with which a pipeline is loaded without the parts that are not used here. has: the parts it has."""
    # SD 1.5's files also name a class for the first that transformers no longer has.
    extra: dict[str, Any] = {"feature_extractor": None}
    if pipeline is StableDiffusionPipeline:
        extra |= {"safety_checker": None, "requires_safety_checker": False}
    return extra


def rebuilt(pipe: Any, **parts: Any) -> Any:
    """A pipeline of the same parts, but for these."""
    flag = {"requires_safety_checker": False} if type(pipe) is StableDiffusionPipeline else {}
    return type(pipe)(**{**pipe.components, **parts, **flag})


def draw_arguments(max_sequence_length: int) -> dict[str, Any]:
    """Arguments of a pipeline's call that draws."""
    return {}


def resolution_multiple(description: Any) -> int:
    """What the side of an image in pixels must be a multiple of."""
    return 2 ** (len(description.vae["block_out_channels"]) - 1)


def text_shape(description: Any) -> tuple[int, int]:
    """(tokens, dimensions) of a prompt's embedding as `embed` returns it."""
    texts = description.text_encoders
    return texts[0]["max_position_embeddings"], sum(t["hidden_size"] for t in texts)


def pooled_dim(description: Any) -> int | None:
    """Dimensions of a prompt's pooled embedding; None if there is none."""
    is_xl = description.pipeline is StableDiffusionXLPipeline
    return description.text_encoders[-1]["projection_dim"] if is_xl else None


def embed(pipe: Any, prompts: list[str], max_sequence_length: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(text (B, S, D), pooled (B, P) for SDXL or None), in the text encoders' dtype."""
    found = pipe.encode_prompt(
        prompt=prompts, device=pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return found[0], found[2] if isinstance(pipe, StableDiffusionXLPipeline) else None


def conditions(
    description: Any, text: torch.Tensor, pooled: torch.Tensor | None, time_ids: torch.Tensor
) -> dict[str, Any]:
    """The U-Net's keyword arguments besides the timestep, for N rows.

    encoder_hidden_states (N, S, D); for SDXL also added_cond_kwargs, with the pooled text_embeds (N, P) and
    time_ids (N, 6): original size, crop and target size in pixels, height before width. They stay in
    float32, because bfloat16 rounds 1023 to 1024. The U-Net casts their sinusoidal embedding.
    """
    kwargs: dict[str, Any] = {"encoder_hidden_states": text}
    if pooled is not None:
        time_ids = time_ids.to(pooled.device, torch.float32)
        kwargs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": time_ids}
    return kwargs


def checkpointable(config: dict[str, Any]) -> list[str]:
    """Names of the blocks of a U-Net with this config, for `checkpoint_blocks`."""
    count = range(len(config["down_block_types"]))
    return ["mid", *(f"{side}{i}" for side in ("down", "up") for i in count)]


def checkpoint_blocks(unet: UNet2DConditionModel, names: list[str]) -> None:
    """Makes these blocks ("down0", "mid", "up3", ..., or "all") recompute their activations in the backward pass."""
    blocks = {f"down{i}": block for i, block in enumerate(unet.down_blocks)}
    blocks |= {f"up{i}": block for i, block in enumerate(unet.up_blocks)} | {"mid": unet.mid_block}
    unet.enable_gradient_checkpointing()  # sets the checkpointing function, and every block's flag
    for name, block in blocks.items():
        for module in block.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = "all" in names or name in names
