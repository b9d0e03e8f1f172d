"""The diffusion arithmetic of the method (Ho et al. 2020; paper eq. 1, 2 and 12), in float32 for any weight dtype.

Tensors are named as in the paper: `x_t` (B, C, H, W) is a noised latent, `eps` its noise, `abar` the
scheduler's `alphas_cumprod`. Timesteps are (B,) int64 in [0, T-1]. A previous timestep of -1 means
the clean sample, where abar = 1. With zero terminal SNR, abar is 0 at t = T-1, and x_t there is the noise itself.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import DDPMScheduler

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large")


def add_noise(scheduler: DDPMScheduler, x0: torch.Tensor, eps: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """x_t of eq. 1, (B, C, H, W) float32.

    The inputs are cast to float32 because the scheduler casts abar to their dtype: bfloat16 would add no noise at all
    at t = 0 and 1.
    """
    return scheduler.add_noise(x0.float(), eps.float(), timestep)


def timesteps(scheduler: DDPMScheduler, k: int | None) -> range:
    """The timesteps to train at, {k, ..., T-1}: t' = t - k is in the schedule. With k None from 1, as with k = 1."""
    return range(k or 1, scheduler.config.num_train_timesteps)


def draw_timestep(scheduler: DDPMScheduler, among: range, rng: np.random.Generator) -> int:
    """One of `timesteps`, drawn uniformly."""
    return int(rng.integers(among.start, among.stop))


def previous(timestep: torch.Tensor, k: int | None) -> torch.Tensor:
    """t' = t - k, (B,). If k is None: -1, the clean sample."""
    return torch.full_like(timestep, -1) if k is None else timestep - k


def to_x0(
    scheduler: DDPMScheduler, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor
) -> torch.Tensor:
    """The clean sample (B, C, H, W) float32 that corresponds to a model output at `sample` = x_t.

        epsilon        (x_t - sqrt(1 - abar) eps) / sqrt(abar)
        v_prediction   sqrt(abar) x_t - sqrt(1 - abar) v,   v = sqrt(abar) eps - sqrt(1 - abar) x0 (Salimans & Ho 2022)
        sample         the output itself

    The last two are finite at abar = 0. Raises ValueError for other prediction types.
    """
    kind, a, b = _kind_and_roots(scheduler, timestep)
    if kind == "epsilon":
        return (sample.float() - b * model_output.float()) / a
    if kind == "v_prediction":
        return a * sample.float() - b * model_output.float()
    return model_output.float()


def to_epsilon(
    scheduler: DDPMScheduler, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor
) -> torch.Tensor:
    """The noise prediction (B, C, H, W) float32 of eq. 3 that corresponds to a model output at `sample` = x_t.

        epsilon        the output itself
        v_prediction   sqrt(abar) v + sqrt(1 - abar) x_t
        sample         (x_t - sqrt(abar) x0) / sqrt(1 - abar),   which needs t > 0 where abar is 1 at t = 0

    For v_prediction, the error of the noise is sqrt(abar) times the error of v. At abar = 0 the noise prediction is
    x_t for any model output: x_t is the noise, nothing is left to predict, and eq. 3 is 0 without a gradient. Raises
    ValueError for other prediction types.
    """
    kind, a, b = _kind_and_roots(scheduler, timestep)
    if kind == "epsilon":
        return model_output.float()
    if kind == "v_prediction":
        return a * model_output.float() + b * sample.float()
    return (sample.float() - a * model_output.float()) / b


to_target = to_epsilon  # ncp/flow.py has another target


def target(x0: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """What eq. 3 compares `to_target` with: the noise, (B, C, H, W)."""
    return eps


def _kind_and_roots(scheduler: DDPMScheduler, timestep: torch.Tensor) -> tuple[str, torch.Tensor, torch.Tensor]:
    """The prediction type, sqrt(abar) and sqrt(1 - abar), (B, 1, 1, 1) float32. Raises ValueError for others."""
    kind = scheduler.config.prediction_type
    if kind not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type {kind!r} is not supported; expected one of {', '.join(PREDICTION_TYPES)}")
    abar = abar_at(scheduler, timestep)
    return kind, abar.sqrt().float(), (1 - abar).sqrt().float()


def reverse_step(
    scheduler: DDPMScheduler,
    x0: torch.Tensor,
    timestep: torch.Tensor,
    prev_timestep: torch.Tensor,
    sample: torch.Tensor,
    variance_noise: torch.Tensor,
) -> torch.Tensor:
    """x_{t'} of eq. 2 and 12: one DDPM step from `sample` = x_t towards `x0`, (B, C, H, W) float32.

    With the noise eps that corresponds to `x0` in x_t (`to_x0`), this is the paper's step,

        x_t' = (x_t - (1 - alpha) / sqrt(1 - abar_t) * eps) / sqrt(alpha) + sigma z,   alpha = abar_t / abar_t'

    written as the mean of q(x_t' | x_t, x0) (Ho et al., eq. 7), which is finite at abar_t = 0 too:

        x_t' = sqrt(abar_t') (1 - alpha) / (1 - abar_t) x0 + sqrt(alpha) (1 - abar_t') / (1 - abar_t) x_t + sigma z

    The paper prints 1 - alpha_t under the root in eq. 12. DDPM and the paper's eq. 2 have 1 - abar_t, used here.
    For t' = t - k the posterior is the one between t and t - k. t' = -1 gives the clean sample, without noise.
    sigma follows the scheduler's `variance_type`. Nothing is clipped: the equation does not clip, although
    `DDPMScheduler.step` does with `clip_sample` on. Raises ValueError for a learned variance.
    """
    # The coefficients in float64 (1 - alpha cancels), the images in float32.
    on_x0, on_x_t, sigma = (c.float() for c in posterior(scheduler, timestep, prev_timestep))
    return on_x0 * x0.float() + on_x_t * sample.float() + sigma * variance_noise.float()


def posterior(
    scheduler: DDPMScheduler, timestep: torch.Tensor, prev_timestep: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The coefficients of x0 and x_t in the mean of q(x_t' | x_t, x0), and sigma, (B, 1, 1, 1) float64 each."""
    abar_t, abar_prev = abar_at(scheduler, timestep), abar_at(scheduler, prev_timestep)
    alpha = abar_t / abar_prev
    kind = scheduler.config.variance_type
    if kind in ("fixed_small", "fixed_small_log"):  # the same variance; only computed through its log
        variance = (1 - abar_prev) / (1 - abar_t) * (1 - alpha)
    elif kind == "fixed_large":
        variance = torch.where(prev_timestep.view(-1, 1, 1, 1) < 0, 0.0, 1 - alpha)
    else:
        raise ValueError(f"variance_type {kind!r} is not supported; expected one of {', '.join(VARIANCE_TYPES)}")
    on_x0 = abar_prev.sqrt() * (1 - alpha) / (1 - abar_t)
    on_x_t = alpha.sqrt() * (1 - abar_prev) / (1 - abar_t)
    return on_x0, on_x_t, variance.sqrt()


def abar_at(scheduler: DDPMScheduler, timestep: torch.Tensor) -> torch.Tensor:
    """abar at (B,) timesteps as (B, 1, 1, 1) float64; 1 at timestep -1."""
    table = scheduler.alphas_cumprod.to(timestep.device, torch.float64)
    abar = torch.where(timestep < 0, 1.0, table[timestep.clamp_min(0)])
    return abar.view(-1, 1, 1, 1)
