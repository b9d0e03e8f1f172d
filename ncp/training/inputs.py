"""Inputs of the model: latents of images and embeddings of prompts, computed or read from a cache."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL

from ncp.training.models import Models
from ncp.training.pipeline import FAMILIES

# Elements of the largest feature map of one VAE pass. Many kernels index with 32 bits, so 2^31 is the limit. An eighth
# of it is four images of 512 x 512 in SD's VAE, or one of 1024 x 1024. That takes 2.5 GiB in float32 (memory.encoders);
# all 128 images of a batch of 64 pairs in one pass would take 80.
VAE_ELEMENTS = 1 << 28
PROMPTS_PER_PASS = 64  # of a text encoder: the largest map in SDXL's second one has 64 x 77 x 5120 = 2.5e7 elements


@torch.no_grad()
def latents(models: Models, batch: dict[str, Any]) -> torch.Tensor:
    """x0 (N, C, h, w) float32: scaled latents of the batch's `pixels` or `moments`, sampled with noise `posterior`."""
    moments = batch["moments"] if models.pipe is None else vae_moments(models.pipe.vae, batch["pixels"])
    mean, log_variance = moments.float().chunk(2, dim=1)
    x0 = mean + (log_variance.clamp(-30, 20) / 2).exp() * batch["posterior"]  # AutoencoderKL's bounds
    vae = models.description.vae
    return (x0 - (vae.get("shift_factor") or 0)) * vae.get("scaling_factor", 0.18215)  # AutoencoderKL's default


@torch.no_grad()
def conditions(models: Models, batch: dict[str, Any]) -> dict[str, Any]:
    """The model's keyword arguments besides the timestep, for N images of B prompts, repeated in whole rounds.

    encoder_hidden_states (N, S, D) and what else the model takes: `conditions` in ncp/training/unets.py and sd3.py.
    """
    description = models.description
    text, pooled = (
        (batch["text"], batch.get("pooled"))
        if models.pipe is None
        else embed_prompts(models.pipe, batch["prompt"], description.max_sequence_length)
    )
    rounds = len(batch["time_ids"]) // len(text)
    text = text.to(models.dtype).repeat(rounds, 1, 1)
    pooled = None if pooled is None else pooled.to(models.dtype).repeat(rounds, 1)
    return description.family.conditions(description, text, pooled, batch["time_ids"])


@torch.no_grad()
def vae_moments(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Mean and log-variance (N, 2C, h, w), in the VAE's dtype, of pixels uint8 (N, 3, H, W), in bounded passes."""
    parts = pixels.split(images_per_pass(vae.config, max(pixels.shape[-2:])))
    return torch.cat([vae.encode(_normalized(p, vae)).latent_dist.parameters for p in parts])


def _normalized(pixels: torch.Tensor, vae: AutoencoderKL) -> torch.Tensor:
    return (pixels.to(vae.device).float() / 127.5 - 1).to(vae.dtype)


def images_per_pass(vae: dict[str, Any], side: int) -> int:
    """How many images of `side` pixels a VAE of this config encodes or decodes in one pass; at least 1.

    The feature maps: level i has block_out_channels[i] channels at size side / 2^i, and the decoder upsamples the
    channels of level i + 1 to the size of level i. The mid block's attention may make a matrix of tokens x tokens.
    """
    channels = vae["block_out_channels"]
    sides = [side / 2**i for i in range(len(channels))]
    maps = [c * s**2 for c, s in zip(channels, sides, strict=True)]
    maps += [c * s**2 for c, s in zip(channels[1:], sides[:-1], strict=True)]
    return max(1, int(VAE_ELEMENTS // max(*maps, sides[-1] ** 4)))


@torch.no_grad()
def embed_prompts(
    pipe: Any, prompts: list[str], max_sequence_length: int = 256
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(text (B, S, D), pooled (B, P) or None), in the text encoders' dtype, in passes of bounded size."""
    embed = FAMILIES[type(pipe)].embed
    passes = range(0, len(prompts), PROMPTS_PER_PASS)
    parts = [embed(pipe, prompts[i : i + PROMPTS_PER_PASS], max_sequence_length) for i in passes]
    text, pooled = zip(*parts, strict=True)
    return torch.cat(text), None if pooled[0] is None else torch.cat(pooled)
