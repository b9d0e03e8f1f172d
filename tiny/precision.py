"""The accuracy of a training step in half precision: compares the scripts' own steps with the method in float64.

    python -m tiny.precision            # tables in Markdown; on the GPU if there is one
    python -m tiny.precision --quick    # the embedded pipeline alone, fewer noise levels

The float64 implementation shares no code with the scripts: the posterior mean in its x0 form, features by hooks on the
full U-Net, eq. 13 as printed, plain autograd. Both use the same weights, LoRA, images and noise. Compared are the loss
PL, the logit of DPO, and the input of the optimizer: the gradient of the mean loss with respect to the LoRA weights.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel

import train_ncp_cpo
import train_ncp_dpo
import train_ncp_sft
from ncp.training import unets
from ncp.training.images import decode_image
from ncp.training.inputs import vae_moments
from ncp.training.models import assemble, lora_config
from tiny.preferences import DATA, MODEL

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCALE = 2.0**16  # loss scale, as from a gradient scaler
BETA = 2500.0
OBJECTIVES = {"dpo": train_ncp_dpo, "cpo": train_ncp_cpo, "sft": train_ncp_sft}
KEYS = {
    "dpo": {"beta": BETA},
    "cpo": {"beta": BETA, "lam": BETA},
    "sft": {"loss_weight": BETA / 2},
}
NAMES = {torch.float32: "float32", torch.float16: "fp16", torch.bfloat16: "bf16"}


# ---------------------------------------------------------------- models and data


@dataclass
class Setting:
    """A float32 U-Net, its schedule, latents x0 (2B, C, h, w) of winners then losers, and conditions of 2B rows."""

    name: str
    unet: UNet2DConditionModel
    x0: torch.Tensor
    conditions: dict[str, Any]
    lora_std: float  # of the LoRA's second matrix: as in a policy after some steps

    @property
    def pairs(self) -> int:
        return len(self.x0) // 2


@cache
def setting(name: str, pairs: int = 4) -> Setting:
    """name: "embedded" (trained, real images), or "sd15" or "sdxl": their layout, narrower, with random weights.

    Random weights show little about the curvature of a trained model, but they show how its depth affects rounding.
    """
    return {"embedded": _embedded, "sd15": _random, "sdxl": _random}[name](name, pairs)


def _embedded(name: str, pairs: int) -> Setting:
    import pyarrow.parquet as pq
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer

    file = min(DATA.glob("train-*.parquet"))
    table = pq.read_table(file, columns=["caption", "jpg_0", "jpg_1"]).slice(0, pairs)
    images = np.stack([np.asarray(decode_image(jpeg.as_py())) for side in ("jpg_0", "jpg_1") for jpeg in table[side]])
    vae = AutoencoderKL.from_pretrained(MODEL / "vae")
    tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    ids = tokenizer(table["caption"].to_pylist(), padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        moments = vae_moments(vae, torch.from_numpy(images).permute(0, 3, 1, 2))
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


# ---------------------------------------------------------------- the scripts' steps, and the method in float64


@dataclass
class Outcome:
    """Results of one step in float64: the policy's PL (2B,) or (B,); logit (B,), none for SFT; flat gradient of the
    mean loss."""

    distance: torch.Tensor
    logit: torch.Tensor | None
    gradient: torch.Tensor


def measured(
    s: Setting, objective: str, dtype: torch.dtype, t: torch.Tensor, space: str = "perceptual", **keys: Any
) -> Outcome:
    """Runs a training script's step with weights and arithmetic in `dtype`, at timesteps t (B,). keys: its config's."""
    script = OBJECTIVES[objective]
    settings = {"pretrained_model_name_or_path": "-", "dataset_name": "-", "output_dir": "-", "space": space}
    config = script.Config(**settings | KEYS[objective] | {"cached_latents": "-"} | keys)
    description: Any = SimpleNamespace(vae={"scaling_factor": 1.0}, family=unets)
    rows = 2 * s.pairs if objective != "sft" else s.pairs

    class Engine:  # the part of accelerate that `assemble` uses; accelerate has no float16 on a CPU
        device = DEVICE

        @staticmethod
        def prepare_model(model: torch.nn.Module, evaluation_mode: bool) -> torch.nn.Module:
            forward = torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32)(model.forward)
            model.forward = lambda *args, **kwargs: SimpleNamespace(sample=forward(*args, **kwargs).sample.float())
            return model

    unet = copy.deepcopy(s.unet).to(DEVICE, dtype)
    m = assemble(config, description, unet, schedule(), None, Engine)
    weights = lora_weights(Engine.prepare_model(m.unet, False), s.lora_std)
    eps, z = noise(s)
    c = _map(lambda v: v[: s.pairs].to(DEVICE), s.conditions)
    added = c.get("added_cond_kwargs", {})
    batch = {
        "moments": torch.cat([s.x0, torch.full_like(s.x0, -30)], dim=1)[:rows].to(DEVICE),
        "posterior": torch.zeros_like(s.x0)[:rows].to(DEVICE),
        "text": c["encoder_hidden_states"],
        **({"pooled": added["text_embeds"]} if added else {}),
        "time_ids": added["time_ids"].repeat(2, 1)[:rows] if added else torch.zeros(rows, 6, device=DEVICE),
        "timestep": t.to(DEVICE),
        "eps": eps.to(DEVICE),
        "z": z[:rows].to(DEVICE),
    }
    losses, metrics = getattr(script, f"ncp_{objective}")(m, m.unet, batch, config)
    scale, flat = 2 * SCALE, [torch.full((1,), torch.inf)]
    while not all(part.isfinite().all() for part in flat):  # as a gradient scaler finds a scale without overflow
        scale /= 2
        gradients = torch.autograd.grad(losses.mean() * scale, weights, allow_unused=True, retain_graph=True)
        flat = [(torch.zeros_like(w) if g is None else g).flatten() for g, w in zip(gradients, weights, strict=True)]
    distance = torch.cat([metrics[k] for k in ("policy_w", "policy_l") if k in metrics])
    logit = metrics["margin"].cpu().double() if "margin" in metrics else None
    return Outcome(distance.cpu().double(), logit, torch.cat(flat).cpu().double() / scale)


@cache
def _truths(name: str, pairs: int, t: tuple[int, ...], space: str) -> dict[str, Outcome]:
    """The float64 results by objective."""
    s, timestep = setting(name, pairs), torch.tensor(t).repeat(2)
    policy = copy.deepcopy(s.unet).double()
    reference, f = copy.deepcopy(policy), copy.deepcopy(policy)
    config = train_ncp_dpo.Config(pretrained_model_name_or_path="-", dataset_name="-", output_dir="-")
    policy.add_adapter(lora_config(config, unets.LORA_TARGETS))
    weights = lora_weights(policy.double(), s.lora_std)
    c = _map(lambda v: v.double(), s.conditions)
    abar = schedule().alphas_cumprod.double()
    a_t, a_prev = (abar[x].view(-1, 1, 1, 1) for x in (timestep, timestep - 1))
    alpha = a_t / a_prev
    eps, z = noise(s)
    x0, eps, z = s.x0.double(), eps.repeat(2, 1, 1, 1).double(), z.double()
    x_t = a_t.sqrt() * x0 + (1 - a_t).sqrt() * eps

    def step(e: torch.Tensor) -> torch.Tensor:
        x0_hat = (x_t - (1 - a_t).sqrt() * e) / a_t.sqrt()
        mean = a_prev.sqrt() * (1 - alpha) / (1 - a_t) * x0_hat + alpha.sqrt() * (1 - a_prev) / (1 - a_t) * x_t
        return mean + ((1 - a_prev) / (1 - a_t) * (1 - alpha)).sqrt() * z

    def feature(x: torch.Tensor) -> torch.Tensor:
        seen = []
        with f.down_blocks[-1].register_forward_hook(lambda _, __, out: seen.append(out[0])):
            f(x, timestep - 1, **c)
        return seen[0]

    eps_theta = policy(x_t, timestep, **c).sample
    with torch.no_grad():
        eps_ref = reference(x_t, timestep, **c).sample
    if space == "latent":
        theta, ref = ((e - eps).square().mean((1, 2, 3)) for e in (eps_theta, eps_ref))
    else:
        target = feature(step(eps))
        theta, ref = ((feature(step(e)) - target).square().flatten(1).mean(1) for e in (eps_theta, eps_ref))
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


@dataclass
class Comparison:
    loss_ratio: float  # ratio of the mean PL
    cosine: float  # between the LoRA gradients
    norm_ratio: float
    logit_error: float  # root mean square of the error; below, of the logit
    logit: float
    zeros: float  # share of the gradient's elements that are wrongly 0


def compare(s: Setting, objective: str, dtype: torch.dtype, t: torch.Tensor, **keys: Any) -> Comparison:
    """keys: of the script's config, `space` among them."""
    ours, exact = measured(s, objective, dtype, t, **keys), truth(s, objective, t, keys.get("space", "perceptual"))
    error = rms = 0.0
    if ours.logit is not None and exact.logit is not None:
        error, rms = (float(v.square().mean().sqrt()) for v in (ours.logit - exact.logit, exact.logit))
    nonzero = exact.gradient != 0
    return Comparison(
        loss_ratio=float(ours.distance.mean() / exact.distance.mean()),
        cosine=float(F.cosine_similarity(ours.gradient, exact.gradient, dim=0)),
        norm_ratio=float(ours.gradient.norm() / exact.gradient.norm()),
        logit_error=error,
        logit=rms,
        zeros=float((ours.gradient[nonzero] == 0).double().mean()),
    )


# ---------------------------------------------------------------- tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    names = ["embedded"] if quick else ["embedded", "sd15", "sdxl"]
    grid = [20, 500, 900] if quick else [1, 5, 20, 100, 300, 500, 700, 900, 999]

    print("Loss ratio / gradient cosine of NCP-SFT, all pairs at one timestep:\n")
    print("| U-Net | arithmetic | secant | " + " | ".join(f"t={t}" for t in grid) + " |")
    print("|---" * (len(grid) + 3) + "|")
    for name in names:
        for dtype, secant in (
            (torch.float32, "auto"),
            (torch.float16, "1"),
            (torch.float16, "auto"),
            (torch.bfloat16, "auto"),
        ):
            s, cells = setting(name), []
            for t in grid:
                r = compare(s, "sft", dtype, torch.full((s.pairs,), t), secant=secant)
                cells.append(f"{r.loss_ratio:.3f} / {r.cosine:.3f}")
            print(f"| {name} | {NAMES[dtype]} | {secant} | " + " | ".join(cells) + " |", flush=True)

    print("\nWhat the optimizer gets, timesteps mixed:\n")
    print(
        "| U-Net | space | objective | arithmetic | loss ratio | gradient cosine | norm ratio | logit rms | its error |"
    )
    print("|---" * 9 + "|")
    for name in names:
        for space in ("perceptual", "latent"):
            for objective in OBJECTIVES:
                for dtype in (torch.float32, torch.float16, torch.bfloat16):
                    r = compare(setting(name), objective, dtype, torch.tensor([20, 250, 550, 900]), space=space)
                    logit = f"{r.logit:.3g} | {r.logit_error:.2g}" if r.logit else "– | –"
                    print(
                        f"| {name} | {space} | {objective} | {NAMES[dtype]} | {r.loss_ratio:.3f} | {r.cosine:.4f} "
                        f"| {r.norm_ratio:.3f} | {logit} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
