"""The scripts' own steps in half precision against the method in float64, and what is said of a precision.

The tensors are few and small: half precision is emulated on most CPUs. `python -m tiny.precision` has the full tables.
"""

import pytest
import torch

import train_ncp_dpo
import train_ncp_sft
from ncp.common.config import parse
from ncp.training import precision
from tiny.precision import OBJECTIVES, compare, measured, setting, truth

MIXED = torch.tensor([30, 500])  # timesteps of two pairs
PATHS = ["--pretrained_model_name_or_path", "-", "--dataset_name", "-", "--output_dir", "-"]


@pytest.mark.parametrize("name", ["embedded", "sd35"])
@pytest.mark.parametrize("space", ["perceptual", "latent"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_in_float32_every_objective_is_the_independent_reading(objective, space, name):
    r = compare(setting(name, 2), objective, torch.float32, MIXED, space=space)
    # The difference of two features is a thousandth of either, so float32's seven digits leave four.
    assert r.loss_ratio == pytest.approx(1, abs=5e-3)
    assert r.cosine > 0.9999 and r.norm_ratio == pytest.approx(1, abs=5e-3)
    assert r.logit_error <= 1e-2 * max(r.logit, 0.1)


@pytest.mark.parametrize("name", ["embedded", "sdxl"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_in_float16_the_lora_gradient_is_right(objective, name):
    r = compare(setting(name, 2), objective, torch.float16, MIXED)
    # A loss is the mean of fewer numbers than a gradient has: the narrow random model's last block has 2,048 per image.
    assert r.loss_ratio == pytest.approx(1, abs=0.02 if name == "embedded" else 0.04)
    assert r.cosine > 0.99 and r.norm_ratio == pytest.approx(1, abs=0.03)
    # DPO's margin is what policy and reference differ by, at most a few percent of either loss.
    assert objective != "dpo" or r.logit_error < 0.5 * r.logit


@pytest.mark.parametrize("t", [1, 100, 999])
def test_in_float16_the_loss_is_right_at_every_noise_level(t):
    r = compare(setting("embedded", 2), "sft", torch.float16, torch.tensor([t, t]))
    assert r.loss_ratio == pytest.approx(1, abs=0.02) and r.cosine > 0.99


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("t", [1, 300, 1000])
def test_in_half_precision_a_transformer_is_right_at_every_noise_level(t, dtype):
    # With the length of configs/sd35_ncp_dpo.yaml.
    r = compare(setting("sd35", 2), "sft", dtype, torch.tensor([t, t]), secant_length=0.024)
    assert r.loss_ratio == pytest.approx(1, abs=0.02) and r.cosine > 0.99


def test_the_plain_formula_in_float16_is_not():
    # What the derivative is for: were this to pass one day, the default could be the paper's formula again.
    r = compare(setting("embedded", 2), "sft", torch.float16, MIXED, secant="1")
    assert abs(r.loss_ratio - 1) > 0.02 and r.cosine < 0.99


def test_bfloat16_keeps_the_perceptual_gradient_and_loses_the_latent_margin():
    s = setting("embedded", 2)
    perceptual = compare(s, "dpo", torch.bfloat16, MIXED)
    assert perceptual.loss_ratio == pytest.approx(1, abs=0.02) and perceptual.cosine > 0.97
    errors = {d: compare(s, "dpo", d, MIXED, space="latent").logit_error for d in (torch.bfloat16, torch.float16)}
    assert errors[torch.bfloat16] > 3 * errors[torch.float16]  # eight times, on the average


def test_the_weight_keeps_supervised_gradients_above_adams_epsilon():
    s = setting("embedded", 2)
    shares = {}
    for weight in (1.0, None):
        ours = measured(s, "sft", torch.float32, MIXED, loss_weight=weight).gradient
        shares[weight] = float((ours[ours != 0].abs() < 1e-8).double().mean())
    assert shares[None] < 0.05 < 0.3 < shares[1.0]
    config = parse(train_ncp_sft.Config, [*PATHS, "--space", "latent"])
    assert config.weight == 1


def test_supervised_gradients_survive_float16():
    ours = measured(setting("embedded", 2), "sft", torch.float16, MIXED).gradient
    exact = truth(setting("embedded", 2), "sft", MIXED).gradient
    assert float((ours[exact != 0] == 0).double().mean()) < 0.01


@pytest.mark.parametrize(("chosen", "tf32"), [("no", False), ("fp16", True)])
def test_a_run_in_float32_has_no_tf32(chosen, tf32):
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        for wanted in ("true", "false"):
            config = parse(train_ncp_dpo.Config, [*PATHS, "--mixed_precision", chosen, "--allow_tf32", wanted])
            precision.set_tf32(config)
            expected = tf32 and wanted == "true"
            assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is expected
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_bfloat16_is_spoken_of_where_it_is_slow_or_coarse(monkeypatch):
    def said(device, *argv):
        return " ".join(precision.notes(parse(train_ncp_dpo.Config, [*PATHS, *argv]), torch.device(device)))

    monkeypatch.setattr(precision, "bf16_slowdown", lambda: 18.2)
    slow = said("cpu", "--mixed_precision", "bf16")
    assert "18 times as long as in float32" in slow and 'mixed_precision: "no"' in slow and "fp16" in slow
    monkeypatch.setattr(precision, "bf16_slowdown", lambda: 0.6)
    assert "emulated" not in said("cpu", "--mixed_precision", "bf16")
    assert said("cuda", "--mixed_precision", "bf16") and not said("cuda") and not said("cpu", "--mixed_precision", "no")


def test_the_slowdown_of_bfloat16_is_a_measurement():
    assert 0.05 < precision.bf16_slowdown() < 5000
