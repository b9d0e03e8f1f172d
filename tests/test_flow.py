"""Flow matching: the straight line and Euler's step on it, against diffusers and by hand."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ncp import ddpm, flow
from ncp.flow import add_noise, draw_timestep, previous, reverse_step, sigma_at, target, timesteps, to_target, to_x0

T = 1000
EVERY = torch.arange(1, T + 1)


def scheduler(shift: float = 3.0) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=shift)


def draws(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x0, eps, z: (n, 4, 8, 8) each."""
    x0, eps, z = torch.randn(3, n, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return x0, eps, z


def test_it_has_the_functions_of_ddpm_that_the_scripts_use():
    used = {"add_noise", "to_x0", "to_target", "target", "previous", "reverse_step", "timesteps", "draw_timestep"}
    assert used <= set(dir(flow)) & set(dir(ddpm))


def test_the_noised_sample_is_that_of_diffusers():
    # scale_noise knows the schedule's own sigmas only; without a shift they are t / T.
    s, t = scheduler(shift=1.0), torch.tensor([1, 250, 999, 1000])
    x0, eps, _ = draws(4)
    expected = s.scale_noise(x0, t.float(), eps)
    torch.testing.assert_close(add_noise(s, x0, eps, t), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(add_noise(s, x0, eps, torch.tensor([0] * 4)), x0)
    assert torch.equal(add_noise(s, x0, eps, torch.tensor([T] * 4)), eps)


@pytest.mark.parametrize("k", [1, 7, 500, None])
def test_a_step_is_eulers_with_the_velocity(k):
    # x' = x + (sigma' - sigma) v, here in float64.
    s, t = scheduler(), torch.tensor([500, 501, 800, 1000])
    x0, eps, z = draws(4)
    v = eps - x0 + 0.3 * z
    x_t = add_noise(s, x0, eps, t)
    before = torch.tensor([0] * 4) if k is None else t - k
    exact = x_t.double() + ((before - t) / T).double().view(-1, 1, 1, 1) * v.double()
    got = reverse_step(s, to_x0(s, v, t, x_t), t, previous(t, k), x_t, z)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=2e-6)


def test_a_step_is_diffusers_own():
    s = scheduler()
    s.set_timesteps(10)
    x, v = draws(2)[0][:1], draws(2)[1][:1]
    now, then = s.timesteps[0], s.timesteps[1]  # 1000, and a number that is no integer
    expected = s.step(v, now, x).prev_sample
    got = reverse_step(s, to_x0(s, v, now.view(1), x), now.view(1), then.view(1), x, x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_with_the_true_velocity_the_step_stays_on_the_line():
    s = scheduler()
    x0, eps, z = draws(T)
    x_t = add_noise(s, x0, eps, EVERY)
    for k in (1, None):
        on_line = add_noise(s, x0, eps, previous(EVERY, k))
        torch.testing.assert_close(reverse_step(s, x0, EVERY, previous(EVERY, k), x_t, z), on_line, rtol=0, atol=2e-6)


def test_an_error_of_the_velocity_moves_the_step_alike_at_every_noise_level():
    # delta = k / T, whatever sigma and whatever the schedule's shift. DDPM's k_t varies (tests/test_ddpm.py).
    s = scheduler()
    x0, eps, z = draws(T)
    x_t, error = add_noise(s, x0, eps, EVERY), 0.1 * z
    x_theta = reverse_step(s, to_x0(s, eps - x0 + error, EVERY, x_t), EVERY, EVERY - 1, x_t, z)
    moved = x_theta - reverse_step(s, x0, EVERY, EVERY - 1, x_t, z)
    off = (moved + error / T).square().mean((1, 2, 3)).sqrt() / (error / T).square().mean((1, 2, 3)).sqrt()
    assert off.max() < 2e-3  # rounding of float32, near 1, of a step of 1e-4


def test_the_latent_target_is_the_velocity():
    s = scheduler()
    x0, eps, _ = draws(3)
    assert torch.equal(target(x0, eps), eps - x0)
    assert torch.equal(to_target(s, eps.half(), EVERY[:3], x0), eps.half().float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_arithmetic_is_float32_whatever_comes_in(dtype):
    s, t = scheduler(), torch.tensor([1, 20, 500, 1000])
    x0, eps, z = (v.to(dtype) for v in draws(4))
    assert add_noise(s, x0, eps, t).dtype == torch.float32
    got = reverse_step(s, to_x0(s, eps, t, x0), t, t - 1, x0, z)
    assert torch.equal(got, reverse_step(s, to_x0(s, eps.float(), t, x0.float()), t, t - 1, x0.float(), z.float()))


# ---------------------------------------------------------------- timesteps


@pytest.mark.parametrize(("k", "first"), [(1, 1), (40, 40), (999, 999), (None, 1)])
def test_timesteps_end_with_pure_noise_and_begin_where_there_is_an_earlier_one(k, first):
    assert timesteps(scheduler(), k) == range(first, T + 1)
    s, rng = scheduler(), np.random.default_rng(0)
    drawn = [draw_timestep(s, timesteps(s, k), rng) for _ in range(2000)]
    assert first <= min(drawn) <= max(drawn) <= T and len(set(drawn)) > (1 if k == 999 else 300)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_timesteps_are_logit_normal_and_shifted_as_a_samplers(shift):
    # Of logistic(z), z standard normal, the quantiles are logistic(z_q); the shift maps them as a sampler's sigmas.
    s, rng = scheduler(shift), np.random.default_rng(1)
    drawn = np.array([draw_timestep(s, timesteps(s, 1), rng) for _ in range(20_000)]) / T
    for share, z in ((0.1, -1.2816), (0.5, 0.0), (0.9, 1.2816)):
        u = 1 / (1 + np.exp(-z))
        assert np.quantile(drawn, share) == pytest.approx(shift * u / (1 + (shift - 1) * u), abs=0.012)
    s.set_timesteps(sigmas=[0.5])
    assert np.median(drawn) == pytest.approx(s.sigmas[0].item(), abs=0.012)


def test_the_models_timestep_is_sigma_times_a_thousand_as_a_samplers():
    s = scheduler()
    s.set_timesteps(10)
    torch.testing.assert_close(sigma_at(s, s.timesteps).flatten().float(), s.sigmas[:-1], rtol=1e-6, atol=0)
