"""Stable Diffusion 3 and 3.5: what a run does for these models alone. ncp/training/unets.py has the same for U-Nets.

The denoiser is a transformer over image and text tokens (MMDiT), trained with flow matching. Prompts are embedded by
two CLIP encoders and, if the pipeline has it, by T5.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from ncp import flow
from ncp.common.errors import UserError
from ncp.encoder import TransformerEncoder

DENOISER = "transformer"
MODEL = SD3Transformer2DModel
PIPELINES = (StableDiffusion3Pipeline,)
ENCODER = TransformerEncoder
DIFFUSION = flow
# Those of diffusers' script: the joint attention of image and text, but not SD3.5-medium's second attention.
LORA_TARGETS = [
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
]
LORA_PREFIX = "lora_transformer"
READ_BY = {"ComfyUI": "models/loras"}
REPEATED = ("JointTransformerBlock",)


def to_diffusers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights in diffusers' form, which for transformers has peft's names."""
    return state


to_peft = to_diffusers


def pipeline_of(name: str, index: dict[str, Any], has: set[str]) -> type:
    """The pipeline's class. index: model_index.json. has: its parts. Raises UserError if one is missing."""
    if (found := index["transformer"][1]) != MODEL.__name__:
        raise UserError(
            f"{name}: the denoiser is a {found}; the method needs SD's or SDXL's U-Net, or SD3's transformer"
        )
    parts = {"vae", "scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"}
    if missing := sorted(parts - has):
        raise UserError(f"{name}: the pipeline has no {', '.join(missing)}; expected those of Stable Diffusion 3")
    return StableDiffusion3Pipeline


def check(name: str, config: Any, description: Any) -> None:
    """Raises UserError for a transformer, a schedule or settings that the method cannot use."""
    for key in ("prediction_type", "rescale_betas_zero_snr"):
        if getattr(config, key) is not None:
            raise UserError(f"{key} belongs to DDPM's models; {name} is trained with flow matching")
    check_schedule(name, description.scheduler)
    model, texts = description.denoiser, description.text_encoders
    clip, pooled = (sum(t[key] for t in texts[:2]) for key in ("hidden_size", "projection_dim"))
    joint = model["joint_attention_dim"]
    check_length(name, description.texts, config.max_sequence_length)
    if pooled != model["pooled_projection_dim"] or clip > joint or any(t["d_model"] != joint for t in texts[2:]):
        raise UserError(f"{name}: the transformer takes embeddings of other sizes than the text encoders give")
    side, most = description.latent_shape(config.resolution)[1] // model["patch_size"], model["pos_embed_max_size"]
    if side > most:
        most *= resolution_multiple(description)
        raise UserError(f"resolution is {config.resolution}; the transformer's position embeddings reach {most} pixels")


def check_length(name: str, has: Collection[str], max_sequence_length: int) -> None:
    """Raises UserError for a T5 that is to give no tokens; diffusers would not cut its text then. has: the parts."""
    if "text_encoder_3" in has and not max_sequence_length:
        raise UserError(f"max_sequence_length is 0; {name} has T5: at least 1, or save a pipeline without it")


def check_schedule(name: str, scheduler: dict[str, Any]) -> None:
    """Raises UserError for a noise schedule that is not SD3's."""
    found = scheduler.get("_class_name", "")
    if "FlowMatch" not in found:
        raise UserError(f"{name}: SD3's transformer with {found}; expected a flow-matching scheduler")
    if strange := [key for key in ("use_dynamic_shifting", "invert_sigmas") if scheduler.get(key)]:
        raise UserError(f"{name}: a scheduler with {strange[0]}; expected one with a fixed shift, as SD3's")


def prediction(scheduler: dict[str, Any]) -> str:
    """What the model predicts, in words."""
    return f"velocity of flow matching, shift {scheduler.get('shift', 1.0):g}"


def schedule(scheduler: dict[str, Any]) -> FlowMatchEulerDiscreteScheduler:
    """The schedule of training."""
    return FlowMatchEulerDiscreteScheduler.from_config(scheduler)


sampler = schedule  # of the validation images


def left_out(pipeline: type, has: Collection[str]) -> dict[str, Any]:
    """Arguments with which a pipeline is loaded without the parts that are not used here. has: the parts it has."""
    # diffusers wants to be told of a T5 that is not there, even if the folder says so.
    absent = {} if "text_encoder_3" in has else {"text_encoder_3": None, "tokenizer_3": None}
    return {"feature_extractor": None, "image_encoder": None, **absent}


def rebuilt(pipe: Any, **parts: Any) -> Any:
    """A pipeline of the same parts, but for these."""
    return type(pipe)(**{**pipe.components, **parts})


def draw_arguments(max_sequence_length: int) -> dict[str, Any]:
    """Arguments of a pipeline's call that draws."""
    return {"max_sequence_length": max_sequence_length}


def resolution_multiple(description: Any) -> int:
    """What the side of an image in pixels must be a multiple of."""
    return 2 ** (len(description.vae["block_out_channels"]) - 1) * description.denoiser["patch_size"]


def text_shape(description: Any) -> tuple[int, int]:
    """(tokens, dimensions) of a prompt's embedding as `embed` returns it."""
    texts = description.text_encoders
    length, width = texts[0]["max_position_embeddings"], sum(t["hidden_size"] for t in texts[:2])
    if len(texts) < 3:
        return length, width
    return length + description.max_sequence_length, description.denoiser["joint_attention_dim"]


def pooled_dim(description: Any) -> int:
    """Dimensions of a prompt's pooled embedding."""
    return description.denoiser["pooled_projection_dim"]


def embed(pipe: Any, prompts: list[str], max_sequence_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(text (B, S, D), pooled (B, P)), in the text encoders' dtype, as the pipeline's own `encode_prompt`.

    Without T5, text is CLIP's alone: `conditions` adds the zeros that stand for T5's. `encode_prompt` itself would need
    the transformer, to know their number.
    """
    parts = [pipe._get_clip_prompt_embeds(prompts, device=pipe.device, clip_model_index=i) for i in (0, 1)]
    text, pooled = (torch.cat(both, dim=-1) for both in zip(*parts, strict=True))
    if pipe.text_encoder_3 is not None:
        length = {"max_sequence_length": max_sequence_length}
        t5 = pipe._get_t5_prompt_embeds(prompts, device=pipe.device, **length)
        text = torch.cat([F.pad(text, (0, t5.shape[-1] - text.shape[-1])), t5.to(text.dtype)], dim=1)
    return text, pooled


def conditions(
    description: Any, text: torch.Tensor, pooled: torch.Tensor | None, time_ids: torch.Tensor
) -> dict[str, Any]:
    """The transformer's keyword arguments besides the timestep, for N rows.

    encoder_hidden_states (N, S, D): the tokens of CLIP, padded with zeros to the transformer's width, and those of T5,
    which are zeros if there is no T5; pooled_projections (N, P). SD3 has no time_ids.
    """
    tokens = description.text_encoders[0]["max_position_embeddings"] + description.max_sequence_length
    width = description.denoiser["joint_attention_dim"]
    text = F.pad(text, (0, width - text.shape[2], 0, tokens - text.shape[1]))
    return {"encoder_hidden_states": text, "pooled_projections": pooled}


def checkpointable(config: dict[str, Any]) -> list[str]:
    """Names of the blocks of a transformer with this config, for `checkpoint_blocks`."""
    return [f"block{i}" for i in range(config["num_layers"])]


def checkpoint_blocks(transformer: SD3Transformer2DModel, names: list[str]) -> None:
    """Makes these blocks ("block0", "block1", ..., or "all") recompute their activations in the backward pass."""
    blocks = transformer.transformer_blocks
    chosen = {id(block) for i, block in enumerate(blocks) if "all" in names or f"block{i}" in names}
    transformer.enable_gradient_checkpointing()
    recompute = transformer._gradient_checkpointing_func

    def some(block: torch.nn.Module, *inputs: Any) -> Any:  # the transformer itself has one flag for all blocks
        return recompute(block, *inputs) if id(block) in chosen else block(*inputs)

    transformer._gradient_checkpointing_func = some
