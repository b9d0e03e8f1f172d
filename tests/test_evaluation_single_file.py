"""Whole checkpoints in one file, as the base and beside it; and what is told of the base's prediction."""

import json

import evaluations
import pytest
import torch
from evaluations import configured, images, refused, save_lora
from layouts import build, save_as_on_hub, single_file
from pipelines import SIDE
from safetensors.torch import load_file, save_file

from evaluation.generate import generate
from evaluation.models import find_base, find_models, sampler
from ncp.training.schedules import scheduler_like

assets, own_judge = evaluations.assets, evaluations.own_judge


@pytest.fixture(scope="module")
def files(assets):
    """sdxl/ as on the hub, sdxl.safetensors with the same weights, tuned.safetensors with others, a LoRA for it."""
    pipe = build(True)
    save_as_on_hub(pipe, assets / "sdxl")
    save_file(single_file(pipe), assets / "sdxl.safetensors")
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(-1)
    save_file(single_file(pipe), assets / "tuned.safetensors")
    tensors = {**load_file(assets / "sdxl.safetensors"), "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file(tensors, assets / "marked.safetensors")
    save_lora(assets / "xl-lora", seed=3, xl=True)
    return assets


def base(files, name: str, *extra: str) -> list[str]:
    given = [] if "." not in name else ["--single_file_config", str(files / "sdxl")]
    return ["--pretrained_model_name_or_path", str(files / name), *given, *extra]


def test_a_file_draws_what_its_pipeline_draws_as_the_base_and_beside_it(files, tmp_path):
    lora = files / "xl-lora" / "pytorch_lora_weights.safetensors"  # a LoRA is known from a checkpoint
    models = f"[base, tuned={files / 'tuned.safetensors'}, lora={lora}]"
    common = ["--models", models, "--max_prompts", "2", "--single_file_config", str(files / "sdxl")]
    drawn = {}
    for name in ("sdxl.safetensors", "sdxl"):
        out = tmp_path / name
        generate(configured(files, out, "--pretrained_model_name_or_path", str(files / name), *common))
        drawn[name] = images(out / "images")
    one, other = drawn.values()
    assert one.keys() == other.keys() and len(one) == 6
    for name in one:
        assert one[name].shape == (SIDE, SIDE, 3) and abs(one[name] - other[name]).max() <= 1, name
        if not name.startswith("base"):
            assert abs(one[name] - one["base/" + name.partition("/")[2]]).max() > 8, name


def test_what_a_file_draws_with_is_known(files, tmp_path):
    argv = base(files, "sdxl.safetensors", "--models", f"[base, other={files / 'tuned.safetensors'}]")
    config = configured(files, tmp_path / "out", *argv)
    first, other = find_models(config, find_base(config))
    assert (first.kind, other.kind) == ("pipeline", "pipeline") and first.weights != other.weights
    assert first.parts.keys() == {"checkpoint", "tokenizer", "tokenizer_2", "configs"}
    generate(configured(files, tmp_path / "out", *argv, "--max_prompts", "1"))
    unet = files / "sdxl" / "unet" / "config.json"
    was = unet.read_text()
    unet.write_text(json.dumps({**json.loads(was), "norm_eps": 1e-4}))
    try:
        said = refused(generate, files, tmp_path / "out", *argv, "--max_prompts", "1")
    finally:
        unet.write_text(was)
    assert "has changed since the images" in said and "(configs)" in said


def test_a_marked_file_is_drawn_as_v_prediction_with_zero_snr(files, tmp_path):
    """By every sampler that knows such a schedule, from t = T - 1 on."""
    for name, first in (("ddim", 999), ("euler", 999), ("dpmsolver++", 999), ("pipeline", 999)):
        config = configured(files, tmp_path, *base(files, "marked.safetensors", "--scheduler", name))
        found = sampler(find_base(config), config)
        assert (found.config.prediction_type, found.config.rescale_betas_zero_snr) == ("v_prediction", True)
        found.set_timesteps(10)
        assert found.timesteps[0] == first and found.alphas_cumprod[-1] < 1e-6, name
    generate(configured(files, tmp_path / "out", *base(files, "marked.safetensors", "--models", "base")))
    assert all(pixels.std() > 1 for pixels in images(tmp_path / "out" / "images").values())
    argv = base(files, "marked.safetensors", "--scheduler", "pndm", "--models", "base")
    said = refused(generate, files, tmp_path / "pndm", *argv)
    assert "zero terminal SNR, which PNDMScheduler cannot sample; DDIM can" in said
    assert not (tmp_path / "pndm").exists()


def test_the_config_wins_over_what_the_base_says(files, tmp_path):
    argv = base(files, "marked.safetensors", "--prediction_type", "epsilon", "--rescale_betas_zero_snr", "false")
    config = configured(files, tmp_path, *argv)
    found = sampler(find_base(config), config).config
    assert (found.prediction_type, found.rescale_betas_zero_snr) == ("epsilon", False)
    said = refused(generate, files, tmp_path / "out", *base(files, "sdxl", "--rescale_betas_zero_snr", "true"))
    assert "zero terminal SNR with epsilon" in said and not (tmp_path / "out").exists()


def test_images_drawn_before_these_keys_were_there_are_not_drawn_again(files, tmp_path):
    argv = base(files, "sdxl", "--models", "base", "--max_prompts", "1")
    generate(configured(files, tmp_path / "out", *argv))
    path = tmp_path / "out" / "protocol.json"
    noted = json.loads(path.read_text())
    for key in ("prediction_type", "rescale_betas_zero_snr"):
        assert noted["protocol"].pop(key) is None
    path.write_text(json.dumps(noted))
    (file,) = images(tmp_path / "out" / "images")
    stamp = (tmp_path / "out" / "images" / file).stat().st_mtime_ns
    generate(configured(files, tmp_path / "out", *argv))
    assert (tmp_path / "out" / "images" / file).stat().st_mtime_ns == stamp


def test_ddim_at_zero_snr_is_the_closed_form():
    """Of a model that always says the same clean image: every step is on the line from x_T to it."""
    from diffusers import DDIMScheduler

    source = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "leading"}
    source |= {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    s = scheduler_like(DDIMScheduler, source)
    assert s.config.timestep_spacing == "trailing"  # whatever the file says: sampling begins in pure noise
    s.set_timesteps(20)  # a divisor of 1000: DDIM steps by 1000 // n, whatever its timesteps are
    x0, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    x, abar = noise, s.alphas_cumprod.double()
    for t, after in zip(s.timesteps.tolist(), [*s.timesteps.tolist()[1:], None], strict=True):
        v = abar[t].sqrt() * noise - (1 - abar[t]).sqrt() * x0
        x = s.step(v, t, x).prev_sample
        a = abar[0] if after is None else abar[after]
        torch.testing.assert_close(x, a.sqrt() * x0 + (1 - a).sqrt() * noise, atol=1e-5, rtol=1e-5)
