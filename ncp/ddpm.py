"""The diffusion arithmetic of the method (Ho et al. 2020; paper eq. 1, 2 and 12), in float32 whatever the weights are.

Tensors are named as in the paper: `x_t` (B, C, H, W) is a noised latent, `eps` its noise, `abar` the
scheduler's `alphas_cumprod`. Timesteps are (B,) int64 in [0, T-1]; a previous timestep of -1 stands
for the clean sample, where abar = 1.
"""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler

PREDICTION_TYPES = ("epsilon", "v_prediction")
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large")


def add_noise(scheduler: DDPMScheduler, x0: torch.Tensor, eps: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """x_t of eq. 1, (B, C, H, W) float32.

    The scheduler casts abar to its input's dtype; in bfloat16 it would add no noise at all at t = 0 and 1.
    """
    return scheduler.add_noise(x0.float(), eps.float(), timestep)


def previous(timestep: torch.Tensor, k: int | None) -> torch.Tensor:
    """t' = t - k, (B,); -1, the clean sample, if k is None."""
    return torch.full_like(timestep, -1) if k is None else timestep - k


def to_epsilon(
    scheduler: DDPMScheduler, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor
) -> torch.Tensor:
    """The noise prediction (B, C, H, W) float32 that a model output stands for.

    epsilon: the output itself. v_prediction: v = sqrt(abar) eps - sqrt(1 - abar) x0 (Salimans & Ho 2022),
    hence eps = sqrt(abar) v + sqrt(1 - abar) x_t. `sample` is x_t. Raises ValueError for other types.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return model_output.float()
    if kind == "v_prediction":
        abar = abar_at(scheduler, timestep)
        return (abar.sqrt() * model_output + (1 - abar).sqrt() * sample).float()
    raise ValueError(f"prediction_type {kind!r} is not supported; expected one of {', '.join(PREDICTION_TYPES)}")


def reverse_step(
    scheduler: DDPMScheduler,
    noise_pred: torch.Tensor,
    timestep: torch.Tensor,
    prev_timestep: torch.Tensor,
    sample: torch.Tensor,
    variance_noise: torch.Tensor,
) -> torch.Tensor:
    """x_{t'} of eq. 2 and 12: one DDPM step from `sample` = x_t with the noise `noise_pred`, (B, C, H, W) float32.

        x_t' = (x_t - (1 - alpha) / sqrt(1 - abar_t) * eps) / sqrt(alpha) + sigma z,   alpha = abar_t / abar_t'

    The paper prints 1 - alpha_t under the root in eq. 12; DDPM and its eq. 2 have 1 - abar_t, used here.
    For t' = t - k the posterior is the one between t and t - k; t' = -1 gives the clean sample, without noise.
    sigma follows the scheduler's `variance_type`. Like the equation, and unlike `DDPMScheduler.step` with
    `clip_sample` on, it clips nothing. Raises ValueError for a learned variance.
    """
    abar_t, abar_prev = abar_at(scheduler, timestep), abar_at(scheduler, prev_timestep)
    alpha = abar_t / abar_prev
    kind = scheduler.config.variance_type
    if kind in ("fixed_small", "fixed_small_log"):  # one variance; the log form only computes it otherwise
        variance = (1 - abar_prev) / (1 - abar_t) * (1 - alpha)
    elif kind == "fixed_large":
        variance = torch.where(prev_timestep.view(-1, 1, 1, 1) < 0, 0.0, 1 - alpha)
    else:
        raise ValueError(f"variance_type {kind!r} is not supported; expected one of {', '.join(VARIANCE_TYPES)}")
    # The three coefficients in float64 (1 - alpha cancels), the images in float32.
    on_eps = ((1 - alpha) / (alpha * (1 - abar_t)).sqrt()).float()
    mean = sample.float() * alpha.rsqrt().float() - on_eps * noise_pred.float()
    return mean + variance.sqrt().float() * variance_noise.float()


def abar_at(scheduler: DDPMScheduler, timestep: torch.Tensor) -> torch.Tensor:
    """abar at (B,) timesteps as (B, 1, 1, 1) float64; 1 at timestep -1."""
    table = scheduler.alphas_cumprod.to(timestep.device, torch.float64)
    abar = torch.where(timestep < 0, 1.0, table[timestep.clamp_min(0)])
    return abar.view(-1, 1, 1, 1)
