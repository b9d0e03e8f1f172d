"""The accuracy of a training step in half precision: compares the scripts' own steps with the method in float64.

    python -m tiny.precision            # tables in Markdown; on the GPU if there is one
    python -m tiny.precision --quick    # the embedded pipelines alone, fewer noise levels
    python -m tiny.precision sd35       # one model

The float64 implementation (tiny/truth.py) shares no code with the scripts. Both use the same weights, LoRA, images and
noise. Compared are the loss PL, the logit of DPO, and the input of the optimizer: the gradient of the mean loss with
respect to the LoRA weights.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

import train_ncp_cpo
import train_ncp_dpo
import train_ncp_sft
from ncp.training.models import assemble
from tiny.truth import BETA, MODEL_SD3, Outcome, Setting, _map, lora_weights, noise, setting, truth

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCALE = 2.0**16  # loss scale, as from a gradient scaler
OBJECTIVES = {"dpo": train_ncp_dpo, "cpo": train_ncp_cpo, "sft": train_ncp_sft}
KEYS = {
    "dpo": {"beta": BETA},
    "cpo": {"beta": BETA, "lam": BETA},
    "sft": {"loss_weight": BETA / 2},
}
NAMES = {torch.float32: "float32", torch.float16: "fp16", torch.bfloat16: "bf16"}


# ---------------------------------------------------------------- the scripts' steps


def measured(
    s: Setting, objective: str, dtype: torch.dtype, t: torch.Tensor, space: str = "perceptual", **keys: Any
) -> Outcome:
    """Runs a training script's step with weights and arithmetic in `dtype`, at timesteps t (B,). keys: its config's."""
    script = OBJECTIVES[objective]
    settings = {"pretrained_model_name_or_path": "-", "dataset_name": "-", "output_dir": "-", "space": space}
    config = script.Config(**settings | KEYS[objective] | {"cached_latents": "-"} | keys)
    text = s.conditions["encoder_hidden_states"]
    description: Any = SimpleNamespace(
        vae={"scaling_factor": 1.0}, family=s.family, denoiser={"joint_attention_dim": text.shape[2]},
        text_encoders=[{"max_position_embeddings": text.shape[1]}], max_sequence_length=0,
    )  # fmt: skip
    rows = 2 * s.pairs if objective != "sft" else s.pairs

    class Engine:  # the part of accelerate that `assemble` uses; accelerate has no float16 on a CPU
        device = DEVICE

        @staticmethod
        def prepare_model(model: torch.nn.Module, evaluation_mode: bool) -> torch.nn.Module:
            forward = torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32)(model.forward)
            model.forward = lambda *args, **kwargs: SimpleNamespace(sample=forward(*args, **kwargs).sample.float())
            return model

    unet = copy.deepcopy(s.unet).to(DEVICE, dtype)
    m = assemble(config, description, unet, s.schedule, None, Engine)
    weights = lora_weights(Engine.prepare_model(m.unet, False), s.lora_std)
    eps, z = noise(s)
    c = _map(lambda v: v[: s.pairs].to(DEVICE), s.conditions)
    added = c.get("added_cond_kwargs", {})
    pooled = c.get("pooled_projections", added.get("text_embeds"))
    batch = {
        "moments": torch.cat([s.x0, torch.full_like(s.x0, -30)], dim=1)[:rows].to(DEVICE),
        "posterior": torch.zeros_like(s.x0)[:rows].to(DEVICE),
        "text": c["encoder_hidden_states"],
        **({"pooled": pooled} if pooled is not None else {}),
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
    parser.add_argument("models", nargs="*", help="some of embedded, embedded-sd3, sd15, sdxl, sd35; none: all")
    quick = parser.parse_args().quick
    trained = ["embedded", *(["embedded-sd3"] if MODEL_SD3.is_dir() else [])]
    names = parser.parse_args().models or (trained if quick else [*trained, "sd15", "sdxl", "sd35"])
    grid = [20, 500, 900] if quick else [1, 5, 20, 100, 300, 500, 700, 900, 999]

    print("Loss ratio / gradient cosine of NCP-SFT, all pairs at one timestep:\n")
    print("| model | arithmetic | secant | " + " | ".join(f"t={t}" for t in grid) + " |")
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
        "| model | space | objective | arithmetic | loss ratio | gradient cosine | norm ratio | logit rms | its error |"
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
