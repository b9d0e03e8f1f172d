"""What a U-Net predicts, and schedules that end in pure noise: the posterior in x0 form at every timestep."""

import pytest
import torch
from pipelines import SIDE, save_dataset, save_pipeline, scheduler
from runs import call
from safetensors.torch import load_file

import train_ncp_cpo
import train_ncp_dpo
import train_ncp_sft
from ncp.ddpm import PREDICTION_TYPES, abar_at, add_noise, posterior, previous, reverse_step, to_epsilon, to_x0
from ncp.training.weights import WEIGHTS

T = 1000
ZERO_SNR = {"rescale_betas_zero_snr": True}


def draws(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x0, eps, z: (n, 4, 8, 8) each."""
    x0, eps, z = torch.randn(3, n, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return x0, eps, z


def true_output(s, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """What a perfect model of this scheduler's kind says."""
    kind = s.config.prediction_type
    return {"epsilon": lambda: eps, "v_prediction": lambda: s.get_velocity(x0, eps, t), "sample": lambda: x0}[kind]()


@pytest.mark.parametrize("k", [1, 2, 40])
@pytest.mark.parametrize("changes", [{}, ZERO_SNR])
def test_the_posterior_is_equation_2_at_every_timestep_in_float64(changes, k):
    # Eq. 2 with eps = (x_t - sqrt(abar) x0) / sqrt(1 - abar) put in:
    #   x_t / sqrt(alpha) - u x_t + u sqrt(abar) x0,   u = (1 - alpha) / (sqrt(alpha) (1 - abar))
    # It divides by sqrt(alpha), which is 0 at abar = 0; elsewhere the coefficients are the posterior's.
    s = scheduler(**changes)
    t = torch.arange(k, T)
    t = t[s.alphas_cumprod[t] > 0]
    assert len(t) == T - k - bool(changes)
    a, b = abar_at(s, t), abar_at(s, t - k)
    alpha = a / b
    on_eps = (1 - alpha) / (alpha * (1 - a)).sqrt()
    on_x_t = 1 / alpha.sqrt() - on_eps / (1 - a).sqrt()
    on_x0 = on_eps * a.sqrt() / (1 - a).sqrt()
    got_x0, got_x_t, sigma = posterior(s, t, t - k)
    assert got_x0.dtype == torch.float64
    torch.testing.assert_close(got_x0, on_x0, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(got_x_t, on_x_t, rtol=1e-8, atol=1e-12)  # here eq. 2 cancels
    torch.testing.assert_close(sigma**2, (1 - b) / (1 - a) * (1 - alpha), rtol=1e-14, atol=0)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_in_float32_the_step_is_as_exact_as_equation_2_at_every_timestep(kind):
    """The difference of two steps, k_t (eps_theta - eps), against float64: a few roundings of x_t' remain."""
    s = scheduler(prediction_type=kind)
    t = torch.arange(1, T)
    x0, eps, z = draws(len(t))
    x_t, eps_theta = add_noise(s, x0, eps, t), eps + 0.1 * z.flip(0)
    a, b = abar_at(s, t), abar_at(s, t - 1)
    k_t = (1 - a / b) / (a / b * (1 - a)).sqrt()
    exact = -k_t * (eps_theta.double() - eps)
    x0_theta = (x_t - (1 - a).sqrt() * eps_theta) / a.sqrt()
    output = {
        "epsilon": eps_theta,
        "v_prediction": a.sqrt() * eps_theta - (1 - a).sqrt() * x0_theta,
        "sample": x0_theta,
    }
    x_theta = reverse_step(s, to_x0(s, output[kind].float(), t, x_t), t, t - 1, x_t, z)
    got = x_theta - reverse_step(s, x0, t, t - 1, x_t, z)
    error = (got - exact).square().mean((1, 2, 3)).sqrt() / exact.square().mean((1, 2, 3)).sqrt()
    assert error.max() < 2e-4  # measured: 1.0e-4, as eq. 2 in its own form


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_outputs_stand_for_noise_and_clean_sample(kind):
    s = scheduler(prediction_type=kind)
    t = torch.arange(1, T)
    x0, eps, _ = draws(len(t))
    x_t, output = add_noise(s, x0, eps, t), true_output(s, x0, eps, t)
    torch.testing.assert_close(to_x0(s, output, t, x_t), x0, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(to_epsilon(s, output, t, x_t), eps, atol=1e-5, rtol=1e-4)
    same = {"epsilon": to_epsilon, "sample": to_x0}
    assert kind not in same or torch.equal(same[kind](s, output, t, x_t), output)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_at_zero_snr_everything_is_finite_and_the_step_is_towards_x0(kind):
    # abar = 0: x_t is the noise, alpha = 0, and the mean is sqrt(abar_prev) x0_hat, with x0_hat = -v or the output.
    s = scheduler(prediction_type=kind, **ZERO_SNR)
    assert s.alphas_cumprod[-1] == 0
    t = torch.full((2,), T - 1)
    x0, eps, z = draws(2)
    x_t, output = add_noise(s, x0, eps, t), (x0 + 1).neg() if kind == "v_prediction" else x0 + 1
    output.requires_grad_()
    assert torch.equal(x_t, eps)
    x0_hat = to_x0(s, output, t, x_t)
    assert torch.equal(x0_hat, x0 + 1)
    for prev in (previous(t, 1), previous(t, 5), previous(t, None)):
        got = reverse_step(s, x0_hat, t, prev, x_t, z)
        b = abar_at(s, prev)
        torch.testing.assert_close(got.double(), b.sqrt() * x0_hat + (1 - b).sqrt() * z, atol=1e-6, rtol=1e-6)
        (gradient,) = torch.autograd.grad(got.sum(), output, retain_graph=True)
        torch.testing.assert_close(gradient.abs().double(), b.sqrt().expand_as(gradient), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_at_zero_snr_the_latent_baseline_is_zero_without_a_gradient(kind):
    # x_t is the noise: whatever the model says, it knows it. The error of the noise is sqrt(abar) times that of v.
    s = scheduler(prediction_type=kind, **ZERO_SNR)
    x0, eps, _ = draws(3)
    t = torch.tensor([500, 998, 999])
    x_t, output = add_noise(s, x0, eps, t), true_output(s, x0, eps, t).add(0.1).requires_grad_()
    loss = (to_epsilon(s, output, t, x_t) - eps).square().mean((1, 2, 3))
    (gradient,) = torch.autograd.grad(loss.sum(), output)
    assert loss[2] == 0 and gradient[2].abs().max() == 0 and loss[:2].min() > 0 and gradient[:2].isfinite().all()
    a = s.alphas_cumprod[t].double()
    expected = 0.01 * (a if kind == "v_prediction" else a / (1 - a))
    torch.testing.assert_close(loss.double(), expected, rtol=2e-2, atol=1e-9)


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assets")
    save_pipeline(folder / "sd")
    save_dataset(folder / "data" / "train.parquet")
    return folder


@pytest.mark.parametrize(
    ("script", "space", "kind"),
    [
        (train_ncp_dpo, "perceptual", "v_prediction"),
        (train_ncp_cpo, "perceptual", "v_prediction"),
        (train_ncp_sft, "perceptual", "sample"),
        (train_ncp_dpo, "perceptual", "sample"),
        (train_ncp_dpo, "latent", "v_prediction"),
        (train_ncp_cpo, "latent", "sample"),
        (train_ncp_sft, "latent", "v_prediction"),
    ],
)
def test_scripts_train_at_zero_snr_on_perceptual_losses_and_learn_nothing_there_on_latent_ones(
    assets, tmp_path, monkeypatch, script, space, kind
):
    monkeypatch.setattr("ncp.training.run.print_estimate", lambda *_: None)
    settings = {
        "pretrained_model_name_or_path": assets / "sd", "prediction_type": kind, "rescale_betas_zero_snr": "true",
        "timestep_offset": T - 1,  # t is T - 1 in every sample
        "space": space, "dataset_name": assets / "data", "cache_dir": assets / "cache", "output_dir": tmp_path / "out",
        "resolution": SIDE, "mixed_precision": "no", "max_train_steps": 2, "learning_rate": 1e-3, "rank": 4,
        "use_8bit_adam": "false", "dataloader_num_workers": 0, "report_to": "none",
    }  # fmt: skip
    call(script.main, [str(a) for key, value in settings.items() for a in (f"--{key}", value)])
    weights = load_file(tmp_path / "out" / WEIGHTS)
    assert all(v.isfinite().all() for v in weights.values())
    learned = max(v.abs().max() for name, v in weights.items() if "lora.up" in name)
    assert learned > 1e-4 if space == "perceptual" else learned == 0
