"""Stable Diffusion 1.5 and SDXL with random weights, built where they are to run: nothing is downloaded or read.

The configurations are those of the published models (unet, vae, text_encoder and scheduler config.json).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ncp.training.pipeline import Description

SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
}
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
}
CLIP_L: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "max_position_embeddings": 77,
    "bos_token_id": 512,
    "eos_token_id": 513,
    "pad_token_id": 513,
}
CLIP_BIG_G: dict[str, Any] = CLIP_L | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
SD15 = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
NAMES = ("sd15", "sdxl")


def description(name: str) -> Description:
    """What `ncp.training.pipeline.describe` would say of the published pipeline."""
    vae = VAE | ({"scaling_factor": 0.13025, "force_upcast": True} if name == "sdxl" else {"scaling_factor": 0.18215})
    texts = [CLIP_L, CLIP_BIG_G] if name == "sdxl" else [CLIP_L]
    kind = StableDiffusionXLPipeline if name == "sdxl" else StableDiffusionPipeline
    return Description(kind, SDXL if name == "sdxl" else SD15, vae, SCHEDULER, texts)


def unet(name: str, dtype: torch.dtype, device: torch.device) -> UNet2DConditionModel:
    return _build(UNet2DConditionModel, SDXL if name == "sdxl" else SD15, dtype, device)


def scheduler() -> DDPMScheduler:
    return DDPMScheduler(**SCHEDULER)


def pipe(name: str, dtype: torch.dtype, vae_dtype: torch.dtype, device: torch.device) -> Any:
    """VAE, text encoders and tokenizers (bytes as tokens) in a pipeline without a U-Net."""
    described = description(name)
    parts: dict[str, Any] = {"vae": _build(AutoencoderKL, described.vae, vae_dtype, device), "scheduler": scheduler()}
    kinds = (CLIPTextModel, CLIPTextModelWithProjection)
    for suffix, kind, settings in zip(("", "_2"), kinds, described.text_encoders, strict=False):
        parts[f"tokenizer{suffix}"] = tokenizer()
        with _dtype(dtype), device:
            parts[f"text_encoder{suffix}"] = kind(CLIPTextConfig(**settings)).eval().requires_grad_(False)
    extra = {} if name == "sdxl" else {"safety_checker": None, "feature_extractor": None}
    flags = {} if name == "sdxl" else {"requires_safety_checker": False}
    return described.pipeline(**parts, unet=None, **extra, **flags)


def tokenizer() -> CLIPTokenizer:
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=77)


def _build(kind: type, settings: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    with _dtype(dtype), device:
        return kind(**settings).eval().requires_grad_(False)


class _dtype:
    """New parameters in this dtype inside the block."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.before)
