"""The benchmarks run, and what they compare computes the same."""

import json
import sys

import pytest
import torch
from runs import as_a_process
from support import ROOT, python

import train_ncp_dpo

sys.path.insert(0, str(ROOT / "benchmarks"))


def test_a_step_is_timed_by_phase_beside_the_straightforward_one(tmp_path):
    arms = "cached latent:space=latent straightforward"
    command = ["benchmarks/step.py", "--model", "tiny", "--steps", "1", "--train_batch_size", "2"]
    command += ["--arms", arms, "--json", str(tmp_path / "f.json")]
    done = python(*command)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "f.json").read_text())
    assert list(figures["arms"]) == ["cached", "latent:space=latent", "straightforward"]
    for arm in figures["arms"].values():
        assert arm["pairs_per_s"] == pytest.approx(2 / arm["step_s"]) and arm["peak_memory_gib"] > 0.1
    phases = {name: arm["phases_s"] for name, arm in figures["arms"].items()}
    assert phases["latent:space=latent"]["encoder"] == 0 < phases["cached"]["encoder"]
    assert phases["straightforward"]["conditions"] > phases["cached"]["conditions"]  # VAE and text encoder
    assert figures["arms"]["straightforward"]["tensors_gib"] > figures["arms"]["cached"]["tensors_gib"]
    assert figures["flops_per_pair"] > 1e9 and "TFLOP per pair" in done.stdout


def test_the_straightforward_arrangement_computes_the_same_loss():
    from arm import Arm

    arguments = ["--config", "configs/tiny_ncp_dpo.yaml", "--train_batch_size", "4", "--mixed_precision", "no"]
    with as_a_process():
        arm = Arm("straightforward", "tiny", [*arguments, "--secant", "1"])
    for name, p in arm.m.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.01, generator=torch.Generator().manual_seed(0))
    arm.by_phase = False
    batch = arm.batch()
    with torch.no_grad():
        straight, _ = arm.straightforward(arm.m, arm.unet, batch, arm.config)
        ours, _ = train_ncp_dpo.ncp_dpo(arm.m, arm.unet, batch, arm.config)
    assert (ours - 0.6931).abs().max() > 0.01
    torch.testing.assert_close(straight, ours, rtol=1e-3, atol=1e-3)


def test_the_architectures_are_the_published_ones():
    import architectures

    # Parameters of the published U-Nets and transformers.
    published = {"sd15": 859_520_964, "sdxl": 2_567_463_684, "sd35m": 2_243_171_520, "sd35l": 8_056_627_520}
    for name, count in published.items():
        described = architectures.description(name)
        with torch.device("meta"):
            model = described.family.MODEL.from_config(described.denoiser)
        assert sum(p.numel() for p in model.parameters()) == count
