"""The method in float64 on small models, which tiny/precision.py compares the scripts' steps with.

It shares no code with the scripts: the posterior mean in its x0 form, or the point on flow matching's line; features by
hooks on the whole model; eq. 13 as printed; plain autograd.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, UNet2DConditionModel

import train_ncp_dpo
from ncp.training import sd3, unets
from ncp.training.images import decode_image
from ncp.training.inputs import embed_prompts, vae_moments
from ncp.training.models import lora_config
from tiny.preferences import DATA, MODEL

MODEL_SD3 = MODEL.parent / "model-sd3"
BETA = 2500.0


# ---------------------------------------------------------------- models and data


@dataclass
class Setting:
    """A float32 model, latents x0 (2B, C, h, w) of winners then losers, and conditions of 2B rows."""

    name: str
    unet: Any  # or SD3's transformer
    x0: torch.Tensor
    conditions: dict[str, Any]
    lora_std: float  # of the LoRA's second matrix: as in a policy after some steps
    family: ModuleType = unets

    @property
    def schedule(self) -> Any:
        return FlowMatchEulerDiscreteScheduler(shift=3.0) if self.family is sd3 else schedule()

    @property
    def pairs(self) -> int:
        return len(self.x0) // 2


@cache
def setting(name: str, pairs: int = 4) -> Setting:
    """name: "embedded" and "embedded-sd3" (trained, real images), or "sd15", "sdxl", "sd35": their layout with random
    weights and fewer channels.

    Random weights show little about the curvature of a trained model, but they show how its depth affects rounding.
    """
    made = {
        "embedded": _embedded,
        "sd15": _random,
        "sdxl": _random,
        "sd35": _transformer,
        "embedded-sd3": _embedded_sd3,
    }
    return made[name](name, pairs)


def _embedded(name: str, pairs: int) -> Setting:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer

    pixels, prompts = _images(pairs)
    vae = AutoencoderKL.from_pretrained(MODEL / "vae")
    tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    ids = tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        moments = vae_moments(vae, pixels)
        text = CLIPTextModel.from_pretrained(MODEL / "text_encoder")(ids)[0]
    x0 = moments.chunk(2, dim=1)[0] * vae.config.scaling_factor
    unet = UNet2DConditionModel.from_pretrained(MODEL / "unet")
    return Setting(name, unet, x0, {"encoder_hidden_states": text.repeat(2, 1, 1)}, lora_std=0.02)


def _random(name: str, pairs: int) -> Setting:
    generator = torch.Generator().manual_seed(3)
    x0 = F.interpolate(torch.randn(2 * pairs, 4, 4, 4, generator=generator), size=16, mode="bicubic")
    conditions: dict[str, Any] = {"encoder_hidden_states": torch.randn(pairs, 20, 64, generator=generator)}
    shape: dict[str, Any] = {"block_out_channels": (32, 64, 128, 128), "attention_head_dim": 4}
    if name == "sdxl":
        shape = {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (32, 64, 128),
            "attention_head_dim": (1, 2, 4),
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 32,
            "projection_class_embeddings_input_dim": 32 * 6 + 64,
        }
        conditions["added_cond_kwargs"] = {
            "text_embeds": torch.randn(pairs, 64, generator=generator),
            "time_ids": torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]]).repeat(pairs, 1),
        }
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16, layers_per_block=2, cross_attention_dim=64, norm_num_groups=16, **shape
    ).eval()
    return Setting(name, unet, x0, _map(lambda v: v.repeat(2, *[1] * (v.ndim - 1)), conditions), lora_std=0.05)


def _transformer(name: str, pairs: int) -> Setting:
    """SD3.5-medium's 24 blocks, with a second attention in the first 13."""
    generator = torch.Generator().manual_seed(3)
    x0 = F.interpolate(torch.randn(2 * pairs, 16, 4, 4, generator=generator), size=16, mode="bicubic")
    conditions = {
        "encoder_hidden_states": torch.randn(pairs, 20, 64, generator=generator),
        "pooled_projections": torch.randn(pairs, 64, generator=generator),
    }
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=16, num_layers=24, attention_head_dim=16, num_attention_heads=4, joint_attention_dim=64,
        caption_projection_dim=64, pooled_projection_dim=64, pos_embed_max_size=16, qk_norm="rms_norm",
        dual_attention_layers=tuple(range(13)),
    ).eval()  # fmt: skip
    twice = _map(lambda v: v.repeat(2, *[1] * (v.ndim - 1)), conditions)
    return Setting(name, model, x0, twice, lora_std=0.05, family=sd3)


@torch.no_grad()
def _embedded_sd3(name: str, pairs: int) -> Setting:
    """The trained tiny SD3, on the images of "embedded"."""
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(
        MODEL_SD3, text_encoder_3=None, tokenizer_3=None, dtype=torch.float32
    )
    pixels, prompts = _images(pairs)
    text, pooled = embed_prompts(pipe, prompts, 0)
    assert pooled is not None
    x0 = vae_moments(pipe.vae, pixels).chunk(2, dim=1)[0]
    x0 = (x0 - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    text = F.pad(text, (0, pipe.transformer.config.joint_attention_dim - text.shape[-1]))
    conditions = {"encoder_hidden_states": text.repeat(2, 1, 1), "pooled_projections": pooled.repeat(2, 1)}
    return Setting(name, pipe.transformer, x0, conditions, lora_std=0.02, family=sd3)


def _images(pairs: int) -> tuple[torch.Tensor, list[str]]:
    """Pixels uint8 (2B, 3, H, W), first images then second ones, and prompts of the first pairs of the dataset."""
    import pyarrow.parquet as pq

    file = min(DATA.glob("train-*.parquet"))
    table = pq.read_table(file, columns=["caption", "jpg_0", "jpg_1"]).slice(0, pairs)
    images = np.stack([np.asarray(decode_image(jpeg.as_py())) for side in ("jpg_0", "jpg_1") for jpeg in table[side]])
    return torch.from_numpy(images).permute(0, 3, 1, 2), table["caption"].to_pylist()


def schedule() -> DDPMScheduler:
    return DDPMScheduler.from_pretrained(MODEL / "scheduler")


def noise(s: Setting, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """eps (B, C, h, w), one per pair, and z (2B, C, h, w), one per image."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(s.x0[: s.pairs].shape, generator=generator), torch.randn(s.x0.shape, generator=generator)


def lora_weights(unet: torch.nn.Module, std: float) -> list[torch.nn.Parameter]:
    """The trainable weights in order, set to the same random numbers each time, also where LoRA starts from zeros."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora" in name:
                scale = std if "lora_B" in name else 1 / len(parameter)  # for A: peft's gaussian init, 1 / rank
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return [p for p in unet.parameters() if p.requires_grad]


def _map(function: Callable[[torch.Tensor], torch.Tensor], tree: dict[str, Any]) -> dict[str, Any]:
    return {k: _map(function, v) if isinstance(v, dict) else function(v) for k, v in tree.items()}


# ---------------------------------------------------------------- the method in float64


@dataclass
class Outcome:
    """Results of one step in float64: the policy's PL (2B,) or (B,); logit (B,), none for SFT; flat gradient of the
    mean loss."""

    distance: torch.Tensor
    logit: torch.Tensor | None
    gradient: torch.Tensor


def _ddpm(x0: torch.Tensor, eps: torch.Tensor, z: torch.Tensor, t: torch.Tensor) -> tuple[Any, Any, Any]:
    """(x_t, the true output eps, the step to t - 1 with an output), float64."""
    abar = schedule().alphas_cumprod.double()
    a_t, a_prev = (abar[x].view(-1, 1, 1, 1) for x in (t, t - 1))
    alpha = a_t / a_prev
    x_t = a_t.sqrt() * x0 + (1 - a_t).sqrt() * eps

    def step(e: torch.Tensor) -> torch.Tensor:
        x0_hat = (x_t - (1 - a_t).sqrt() * e) / a_t.sqrt()
        mean = a_prev.sqrt() * (1 - alpha) / (1 - a_t) * x0_hat + alpha.sqrt() * (1 - a_prev) / (1 - a_t) * x_t
        return mean + ((1 - a_prev) / (1 - a_t) * (1 - alpha)).sqrt() * z

    return x_t, eps, step


def _flow(x0: torch.Tensor, eps: torch.Tensor, z: torch.Tensor, t: torch.Tensor) -> tuple[Any, Any, Any]:
    """(x_t, the true output eps - x0, the step to t - 1 with an output), float64."""
    sigma = (t.double() / 1000).view(-1, 1, 1, 1)
    x_t = (1 - sigma) * x0 + sigma * eps
    return x_t, eps - x0, lambda v: x_t - v / 1000


@cache
def _truths(name: str, pairs: int, t: tuple[int, ...], space: str) -> dict[str, Outcome]:
    """The float64 results by objective."""
    s, timestep = setting(name, pairs), torch.tensor(t).repeat(2)
    policy = copy.deepcopy(s.unet).double()
    reference, f = copy.deepcopy(policy), copy.deepcopy(policy)
    config = train_ncp_dpo.Config(pretrained_model_name_or_path="-", dataset_name="-", output_dir="-")
    policy.add_adapter(lora_config(config, s.family.LORA_TARGETS))
    weights = lora_weights(policy.double(), s.lora_std)
    c = _map(lambda v: v.double(), s.conditions)
    eps, _ = noise(s)
    process = {unets: _ddpm, sd3: _flow}[s.family]
    x_t, target, step = process(s.x0.double(), eps.repeat(2, 1, 1, 1).double(), noise(s)[1].double(), timestep)

    def feature(x: torch.Tensor) -> torch.Tensor:
        seen = []
        block = f.down_blocks[-1] if s.family is unets else f.transformer_blocks[len(f.transformer_blocks) // 2 - 1]
        index = 0 if s.family is unets else 1  # of the image among a block's outputs
        with block.register_forward_hook(lambda _, __, out: seen.append(out[index])):
            f(x, timestep=timestep - 1, **c)
        return seen[0]

    out_theta = policy(x_t, timestep=timestep, **c).sample
    with torch.no_grad():
        out_ref = reference(x_t, timestep=timestep, **c).sample
    if space == "latent":
        theta, ref = ((out - target).square().mean((1, 2, 3)) for out in (out_theta, out_ref))
    else:
        true = feature(step(target))
        theta, ref = ((feature(step(out)) - true).square().flatten(1).mean(1) for out in (out_theta, out_ref))
    w, loser = theta.chunk(2)
    ref_w, ref_l = ref.chunk(2)
    weight = BETA / 2
    logits = {"dpo": -BETA * ((w - ref_w) - (loser - ref_l)), "cpo": -BETA * (w - loser), "sft": None}
    losses = {"dpo": -F.logsigmoid(logits["dpo"]), "cpo": -F.logsigmoid(logits["cpo"]) + BETA * w, "sft": weight * w}
    outcomes = {}
    for name_, loss in losses.items():
        gradients = torch.autograd.grad(loss.mean(), weights, retain_graph=True, allow_unused=True)
        flat = [
            (g if g is not None else torch.zeros_like(v)).flatten() for g, v in zip(gradients, weights, strict=True)
        ]
        logit = None if logits[name_] is None else logits[name_].detach()
        distance = (w if name_ == "sft" else theta).detach()
        outcomes[name_] = Outcome(distance, logit, torch.cat(flat))
    return outcomes


def truth(s: Setting, objective: str, t: torch.Tensor, space: str = "perceptual") -> Outcome:
    """The same step in float64, by an independent implementation of the method."""
    return _truths(s.name, s.pairs, tuple(t.tolist()), space)[objective]
