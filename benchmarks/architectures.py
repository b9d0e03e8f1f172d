"""Stable Diffusion 1.5 and SDXL with random weights, built on the device: nothing is downloaded.

    python benchmarks/architectures.py sdxl FOLDER    # a pipeline folder of full size in float16, to try a run on

The configs are those of the published models (ncp/training/architectures). The tokenizer has bytes as tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
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

sys.path.insert(0, str(Path(__file__).parents[1]))

from ncp.training.pipeline import Description
from ncp.training.schedules import scheduler_like
from ncp.training.single_file import ARCHITECTURES

NAMES = ("sd15", "sdxl")
BYTES = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}  # special tokens of `tokenizer`


def description(name: str) -> Description:
    """The Description that `ncp.training.pipeline.describe` would return for the published pipeline."""

    def read(file: str) -> dict[str, Any]:
        return json.loads((ARCHITECTURES / {"sd15": "sd1"}.get(name, name) / file).read_text())

    texts = [f"text_encoder{suffix}/config.json" for suffix in ("", "_2")[: 1 + (name == "sdxl")]]
    return Description(
        StableDiffusionXLPipeline if name == "sdxl" else StableDiffusionPipeline,
        read("unet/config.json"),
        read("vae/config.json"),
        read("scheduler/scheduler_config.json"),
        [read(text) | BYTES for text in texts],
    )


def unet(name: str, dtype: torch.dtype, device: torch.device) -> UNet2DConditionModel:
    return _build(UNet2DConditionModel, description(name).denoiser, dtype, device)


def scheduler(name: str) -> DDPMScheduler:
    return scheduler_like(DDPMScheduler, description(name).scheduler)


def pipe(name: str, dtype: torch.dtype, vae_dtype: torch.dtype, device: torch.device) -> Any:
    """A pipeline without a U-Net: VAE, text encoders and tokenizers (bytes as tokens)."""
    described = description(name)
    parts: dict[str, Any] = {
        "vae": _build(AutoencoderKL, described.vae, vae_dtype, device),
        "scheduler": scheduler(name),
    }
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


def _build(kind: Any, settings: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    with _dtype(dtype), device:
        return kind.from_config(settings).eval().requires_grad_(False)


class _dtype:
    """Creates new parameters in this dtype inside the block."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.before)


def main(name: str, folder: str) -> None:
    """Writes a pipeline folder. Weights have the initial values of PyTorch and diffusers, with seed 0."""
    torch.manual_seed(0)
    dtype, cpu = torch.float16, torch.device("cpu")
    made = pipe(name, dtype, dtype, cpu)
    made.register_modules(unet=unet(name, dtype, cpu))
    made.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in NAMES:
        raise SystemExit(f"usage: architectures.py {'|'.join(NAMES)} FOLDER")
    main(*sys.argv[1:])
