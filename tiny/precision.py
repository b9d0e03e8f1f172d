"""How right the perceptual loss is in half precision: against eq. 13 in float64, on the embedded pipeline.

    python -m tiny.precision        # on the GPU if there is one

One DDPM step moves x_t by k_t (eps_theta - eps), k_t = 0.004 to 0.02: near 1, bfloat16 is spaced 0.008 and
float16 0.001. The plain formula is lost in that rounding; a derivative over a longer step is not
(`ncp.encoder.displacement`).
"""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from ncp.data import decode
from ncp.ddpm import abar_at, add_noise, reverse_step
from ncp.encoder import DownBlockEncoder, displacement, step_length
from ncp.losses import mean_square
from ncp.models import vae_moments
from tiny.build import DATA, MODEL

PAIRS = 16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of the encoder
SCALE = 2.0**16  # of the loss, as a gradient scaler has it: in float16 the gradient would underflow


@cache
def setting():
    """A batch of the embedded dataset: (scheduler, float32 U-Net, x0, text, eps, z)."""
    table = pq.read_table(sorted(DATA.glob("train-*.parquet"))[0], columns=["caption", "jpg_0"]).slice(0, PAIRS)
    images = np.stack([np.asarray(decode(j.as_py())) for j in table["jpg_0"]])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    vae = AutoencoderKL.from_pretrained(MODEL / "vae")
    tokenizer, text = (
        CLIPTokenizer.from_pretrained(MODEL / "tokenizer"),
        CLIPTextModel.from_pretrained(MODEL / "text_encoder"),
    )
    ids = tokenizer(table["caption"].to_pylist(), padding="max_length", return_tensors="pt").input_ids
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        x0 = vae_moments(vae, pixels).chunk(2, dim=1)[0] * vae.config.scaling_factor
        c = text(ids)[0]
    eps, z = torch.randn(2, *x0.shape, generator=generator)
    return (
        DDPMScheduler.from_pretrained(MODEL / "scheduler"),
        UNet2DConditionModel.from_pretrained(MODEL / "unet"),
        x0,
        c,
        eps,
        z,
    )


def loss_and_gradient(dtype: torch.dtype, secant: str, t: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(PL (B,), d sum(PL) / d eps_theta (B, ...)), float64, with the encoder in `dtype`; in float64, all of eq. 13."""
    scheduler, unet, x0, c, eps, z = setting()
    step = torch.full((PAIRS,), t)

    def f(*inputs: torch.Tensor) -> torch.Tensor:
        return encoder(dtype)(*(x.to(DEVICE) for x in inputs)).cpu()

    x_t = add_noise(scheduler, x0, eps, step)
    with torch.no_grad():
        eps_theta = unet(x_t, step, c).sample
    eps_theta.requires_grad_()
    target = reverse_step(scheduler, eps, step, step - 1, x_t, z)
    if dtype == torch.float64:
        # The two steps differ by -k_t (eps_theta - eps); their common part may be rounded.
        abar = scheduler.alphas_cumprod.double()
        alpha = abar[t] / abar[t - 1]
        x = target.double() - (1 - alpha) / (alpha * (1 - abar[t])).sqrt() * (eps_theta.double() - eps.double())
        losses = (f(x, step - 1, c) - f(target.double(), step - 1, c)).square().flatten(1).mean(1)
    else:
        x = reverse_step(scheduler, eps_theta, step, step - 1, x_t, z)
        length = step_length(dtype, abar_at(scheduler, step - 1))
        losses = mean_square(displacement(lambda y: f(y, step - 1, c), [x], target, secant, length)[0])
    (gradient,) = torch.autograd.grad(losses.sum() * SCALE, eps_theta)
    return losses.detach().double(), gradient.double() / SCALE


@cache
def encoder(dtype: torch.dtype) -> DownBlockEncoder:
    return DownBlockEncoder.from_unet(copy.deepcopy(setting()[1]).to(DEVICE, dtype))


@cache
def truth(t: int):
    return loss_and_gradient(torch.float64, "1", t)


def compare(dtype: torch.dtype, secant: str, t: int) -> tuple[float, float]:
    """(ratio of mean losses, cosine of the gradients of the batch)."""
    loss, gradient = loss_and_gradient(dtype, secant, t)
    expected_loss, expected = truth(t)
    cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0)
    return float(loss.mean() / expected_loss.mean()), float(cosine)


def main() -> None:
    timesteps = [1, 5, 20, 100, 300, 500, 700, 900, 999]
    print("| encoder | " + " | ".join(f"t={t}" for t in timesteps) + " |")
    print("|---" * (len(timesteps) + 1) + "|")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for secant in ("1", "auto"):
            cells = ["{:.3f} / {:.3f}".format(*compare(dtype, secant, t)) for t in timesteps]
            print(f"| {str(dtype).removeprefix('torch.')}, secant {secant} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
