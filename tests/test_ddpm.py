"""The reverse step and its relatives against DDPMScheduler, closed forms and hand-made cases."""

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from pipelines import scheduler

from ncp.ddpm import add_noise, previous, reverse_step, to_epsilon, to_x0

T = 1000


def draws(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x0, eps, z: (n, 4, 8, 8) each."""
    generator = torch.Generator().manual_seed(seed)
    x0, eps, z = torch.randn(3, n, 4, 8, 8, generator=generator)
    return x0, eps, z


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_reverse_step_agrees_with_a_loop_over_the_scheduler(variance_type, k):
    s = scheduler(variance_type=variance_type)
    t = torch.tensor([k + 1, 20, 100, 500, 900, 999])
    x_t, eps, _ = draws(len(t))
    expected, z = [], []
    for i, step in enumerate(t.tolist()):
        s.set_timesteps(timesteps=[step, step - k])  # two steps of a schedule: the first goes from t to t - k
        # The scheduler draws its noise itself; the same generator gives us the same noise.
        z.append(randn_tensor((1, 4, 8, 8), generator=torch.Generator().manual_seed(i)))
        out = s.step(eps[i : i + 1], step, x_t[i : i + 1], generator=torch.Generator().manual_seed(i))
        expected.append(out.prev_sample)
    got = reverse_step(s, to_x0(s, eps, t, x_t), t, previous(t, k), x_t, torch.cat(z))
    torch.testing.assert_close(got, torch.cat(expected), atol=2e-5, rtol=1e-5)


def test_true_noise_lands_on_the_forward_process():
    # Put eq. 1 into eq. 2 with eps itself. The coefficient of x0 is sqrt(abar_t / alpha) = sqrt(abar_{t-1}); of eps,
    #   sqrt(1 - abar_t) / sqrt(alpha) - (1 - alpha) / sqrt(alpha (1 - abar_t))
    #   = sqrt(alpha) (1 - abar_{t-1}) / sqrt(1 - abar_t)
    # since 1 - abar_t - (1 - alpha) = alpha (1 - abar_{t-1}). With fixed_small the variances add up to 1 - abar_{t-1}.
    s = scheduler()
    t = torch.arange(1, T)
    x0, eps, z = draws(len(t))
    abar = s.alphas_cumprod.double()
    a, b = (v.view(-1, 1, 1, 1) for v in (abar[t], abar[t - 1]))
    alpha = a / b
    on_eps = alpha.sqrt() * (1 - b) / (1 - a).sqrt()
    sigma = ((1 - b) / (1 - a) * (1 - alpha)).sqrt()
    expected = b.sqrt() * x0 + on_eps * eps + sigma * z
    x_t = add_noise(s, x0, eps, t)
    for clean in (x0, to_x0(s, eps, t, x_t)):
        got = reverse_step(s, clean, t, t - 1, x_t, z)
        torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(on_eps**2 + sigma**2, 1 - b)


def test_difference_of_two_steps_is_k_t_times_the_difference_of_noises():
    # k_t = (1 - alpha) / (sqrt(alpha) sqrt(1 - abar_t)): 0.0041 (t = 162) to 0.0207 (t = 1) over SD's schedule.
    s = scheduler()
    t = torch.arange(1, T)
    x0, eps, z = draws(len(t))
    x_t, other = add_noise(s, x0, eps, t), eps + 1
    difference = reverse_step(s, to_x0(s, other, t, x_t), t, t - 1, x_t, z) - reverse_step(s, x0, t, t - 1, x_t, z)
    k_t = -difference.mean((1, 2, 3))
    assert k_t.min() == pytest.approx(0.0041, abs=5e-5)
    assert k_t.max() == pytest.approx(0.0207, abs=5e-5)


def test_minus_one_is_the_clean_sample_without_noise():
    s = scheduler()
    t = torch.tensor([1, 500, 999])
    x0, eps, z = draws(3)
    x_t = add_noise(s, x0, eps, t)
    got = reverse_step(s, to_x0(s, eps, t, x_t), t, previous(t, None), x_t, z)
    torch.testing.assert_close(got, x0, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_arithmetic_is_float32_whatever_comes_in(dtype):
    s = scheduler()
    t = torch.tensor([1, 20, 500, 999])
    x_t, eps, z = (v.to(dtype) for v in draws(4))
    got = reverse_step(s, to_x0(s, eps, t, x_t), t, t - 1, x_t, z)
    assert got.dtype == torch.float32
    clean = to_x0(s, eps.float(), t, x_t.float())
    assert torch.equal(got, reverse_step(s, clean, t, t - 1, x_t.float(), z.float()))
    # A step of at most 0.0207 eps survives; in the input's own dtype most of it would round away.
    assert add_noise(s, x_t, eps, t).dtype == torch.float32


def test_noise_is_added_at_the_first_timesteps_even_to_bfloat16():
    s = scheduler()
    t = torch.tensor([0, 1])
    x0, eps, _ = draws(2)
    noised = add_noise(s, x0.bfloat16(), eps.bfloat16(), t)
    added = (noised - s.alphas_cumprod[t].sqrt().view(-1, 1, 1, 1) * x0.bfloat16().float()).std(dim=(1, 2, 3))
    torch.testing.assert_close(added, (1 - s.alphas_cumprod[t]).sqrt() * eps.std(dim=(1, 2, 3)), rtol=0.01, atol=0)


def test_what_the_method_cannot_use_is_refused():
    x, eps, z = draws(1)
    t = torch.tensor([5])
    for convert in (to_epsilon, to_x0):
        with pytest.raises(ValueError, match="prediction_type 'flow_prediction'"):
            convert(scheduler(prediction_type="flow_prediction"), eps, t, x)
    with pytest.raises(ValueError, match="variance_type 'learned'"):
        reverse_step(scheduler(variance_type="learned"), x, t, t - 1, x, z)
