"""The arithmetic of flow matching (rectified flow; Esser et al. 2024, SD3), in float32: ncp/ddpm.py's functions.

A noised latent lies on the straight line from the clean sample to the noise,

    x_t = (1 - sigma) x0 + sigma eps,   sigma = t / T

and the model predicts the line's direction v = eps - x0. Timesteps t are (B,) int64 in [0, T], T the scheduler's
`num_train_timesteps`. They count equal steps of sigma, from 0, the clean sample, to T, the noise itself. The model
takes sigma T as its `timestep`, so t is also that number. A step from sigma to sigma' = sigma - k / T with a predicted
direction differs from the true one by k / T times the error of v, at every sigma alike. (DDPM's k_t varies.)

The scheduler's `shift`, by which models of higher resolution spend more steps at high noise, acts where timesteps are
drawn (`draw_timestep`), as it acts on the sigmas of a sampler. The step itself does not depend on it.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

# Of the logit-normal distribution of timesteps (SD3's rf/lognorm(0.00, 1.00), the default of published scripts).
LOGIT_MEAN, LOGIT_STD = 0.0, 1.0


def add_noise(
    scheduler: FlowMatchEulerDiscreteScheduler, x0: torch.Tensor, eps: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """x_t = (1 - sigma) x0 + sigma eps, (B, C, H, W) float32."""
    sigma = sigma_at(scheduler, timestep).float()
    return (1 - sigma) * x0.float() + sigma * eps.float()


def timesteps(scheduler: FlowMatchEulerDiscreteScheduler, k: int | None) -> range:
    """The timesteps to train at, {k, ..., T}: t' = t - k is at least 0. With k None from 1, as with k = 1."""
    return range(k or 1, scheduler.config.num_train_timesteps + 1)


def draw_timestep(scheduler: FlowMatchEulerDiscreteScheduler, among: range, rng: np.random.Generator) -> int:
    """One of `timesteps`: a logit-normal share of the way, shifted as the scheduler shifts a sampler's sigmas."""
    share = 1 / (1 + math.exp(-(LOGIT_MEAN + LOGIT_STD * rng.standard_normal())))
    shift = scheduler.config.shift
    sigma = shift * share / (1 + (shift - 1) * share)
    return among[min(int(sigma * len(among)), len(among) - 1)]


def previous(timestep: torch.Tensor, k: int | None) -> torch.Tensor:
    """t' = t - k, (B,). If k is None: 0, the clean sample."""
    return torch.zeros_like(timestep) if k is None else timestep - k


def to_x0(
    scheduler: FlowMatchEulerDiscreteScheduler, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor
) -> torch.Tensor:
    """The clean sample x_t - sigma v, (B, C, H, W) float32, for a model output v at `sample` = x_t."""
    return sample.float() - sigma_at(scheduler, timestep).float() * model_output.float()


def to_target(
    scheduler: FlowMatchEulerDiscreteScheduler, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor
) -> torch.Tensor:
    """The model output v itself, float32: the latent baselines compare v (flow-DPO), not the noise of eq. 3."""
    return model_output.float()


def target(x0: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """What the latent baselines compare `to_target` with: v = eps - x0, (B, C, H, W) float32."""
    return eps.float() - x0.float()


def reverse_step(
    scheduler: FlowMatchEulerDiscreteScheduler,
    x0: torch.Tensor,
    timestep: torch.Tensor,
    prev_timestep: torch.Tensor,
    sample: torch.Tensor,
    variance_noise: torch.Tensor,
) -> torch.Tensor:
    """x_t' = x_t + (sigma' - sigma) v, one Euler step from `sample` = x_t towards `x0`, (B, C, H, W) float32.

    v = (x_t - x0) / sigma. With the true x0 the step ends on the line itself, so there is no noise to add:
    `variance_noise` is ignored. timestep: at least 1.
    """
    # The coefficient in float64, the images in float32.
    share = 1 - sigma_at(scheduler, prev_timestep) / sigma_at(scheduler, timestep)
    return sample.float() + share.float() * (x0.float() - sample.float())


def sigma_at(scheduler: FlowMatchEulerDiscreteScheduler, timestep: torch.Tensor) -> torch.Tensor:
    """sigma = t / T at (B,) timesteps, as (B, 1, 1, 1) float64."""
    return timestep.double().view(-1, 1, 1, 1) / scheduler.config.num_train_timesteps
