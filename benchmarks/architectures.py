"""Stable Diffusion 1.5, SDXL, and 3.5 medium and large with random weights, built on the device: nothing is downloaded.

    python benchmarks/architectures.py sdxl FOLDER    # a pipeline folder of full size in float16, to try a run on

The configs are those of the published models (ncp/training/architectures, and below; 3.5 without T5). The tokenizer has
bytes as tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from ncp.training.pipeline import Description
from ncp.training.single_file import ARCHITECTURES

NAMES = ("sd15", "sdxl", "sd35m", "sd35l")
PIPELINES = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
SD35: dict[str, dict[str, Any]] = {  # of transformer/config.json, vae/config.json and scheduler/scheduler_config.json
    "transformer": {
        "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "attention_head_dim": 64,
        "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "qk_norm": "rms_norm",
    },
    "sd35m": {
        "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
    },
    "sd35l": {
        "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192,
        "dual_attention_layers": (),
    },
    "vae": {
        "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, "force_upcast": True,
        "use_quant_conv": False, "use_post_quant_conv": False,
    },
    "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
}  # fmt: skip
BYTES = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}  # special tokens of `tokenizer`


def description(name: str) -> Description:
    """The Description that `ncp.training.pipeline.describe` would return for the published pipeline."""

    def read(file: str) -> dict[str, Any]:
        return json.loads((ARCHITECTURES / {"sd15": "sd1"}.get(name, name) / file).read_text())

    if name.startswith("sd35"):  # its text encoders are SDXL's, the first with a projection; so is its VAE's layout
        of_xl = description("sdxl")
        first, second = of_xl.text_encoders
        return Description(
            StableDiffusion3Pipeline,
            SD35["transformer"] | SD35[name],
            of_xl.vae | SD35["vae"],
            SD35["scheduler"],
            [first | {"projection_dim": 768}, second],
        )
    texts = [f"text_encoder{suffix}/config.json" for suffix in ("", "_2")[: 1 + (name == "sdxl")]]
    return Description(
        PIPELINES[name],
        read("unet/config.json"),
        read("vae/config.json"),
        read("scheduler/scheduler_config.json"),
        [read(text) | BYTES for text in texts],
    )


def unet(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """The U-Net or transformer."""
    described = description(name)
    return _build(described.family.MODEL, described.denoiser, dtype, device)


def scheduler(name: str) -> Any:
    return description(name).schedule


def pipe(name: str, dtype: torch.dtype, vae_dtype: torch.dtype, device: torch.device) -> Any:
    """A pipeline without its denoiser: VAE, text encoders and tokenizers (bytes as tokens)."""
    described = description(name)
    parts: dict[str, Any] = {
        "vae": _build(AutoencoderKL, described.vae, vae_dtype, device),
        "scheduler": scheduler(name),
    }
    first = CLIPTextModelWithProjection if name.startswith("sd35") else CLIPTextModel
    kinds = (first, CLIPTextModelWithProjection)
    for suffix, kind, settings in zip(("", "_2"), kinds, described.text_encoders, strict=False):
        parts[f"tokenizer{suffix}"] = tokenizer()
        with _dtype(dtype), device:
            parts[f"text_encoder{suffix}"] = kind(CLIPTextConfig(**settings)).eval().requires_grad_(False)
    family, names = described.family, [*parts]
    extra = {k: v for k, v in family.left_out(described.pipeline, names).items() if k != "image_encoder"}
    return described.pipeline(**parts, **{family.DENOISER: None}, **extra)


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
    made.register_modules(**{description(name).family.DENOISER: unet(name, dtype, cpu)})
    made.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in NAMES:
        raise SystemExit(f"usage: architectures.py {'|'.join(NAMES)} FOLDER")
    main(*sys.argv[1:])
