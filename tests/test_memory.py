"""The estimate of memory, made from config files alone, against what a step really holds."""

import pytest
import torch
from runs import loaded

import train_ncp_dpo
import train_ncp_sft
from ncp.common.config import parse
from ncp.training import memory
from ncp.training.inputs import embed_prompts, vae_moments
from ncp.training.pipeline import describe

ARGUMENTS = ["--config", "configs/tiny_ncp_dpo.yaml", "--dataset_name", "tiny/data", "--report_to", "none"]
SFT = ["--config", "configs/tiny_ncp_sft.yaml", *ARGUMENTS[2:]]


@pytest.mark.parametrize(
    ("script", "extra"),
    [
        ("dpo", []),
        ("dpo", ["--gradient_checkpointing", "true"]),
        ("dpo", ["--gradient_checkpointing", "true", "--checkpointed_blocks", "[up2, encoder]"]),
        ("dpo", ["--space", "latent"]),
        ("dpo", ["--encoder_blocks", "[0, mid]", "--mixed_precision", "no"]),
        ("dpo", ["--reference_decay", "0.99"]),
        ("sft", []),
    ],
)
def test_what_a_step_holds_is_what_was_foreseen(script, extra):
    module, arguments = {"dpo": (train_ncp_dpo, ARGUMENTS), "sft": (train_ncp_sft, SFT)}[script]
    config = parse(module.Config, [*arguments, "--train_batch_size", "8", *extra])
    description = describe(config)
    foreseen = memory.estimate(config, description, 2 if script == "dpo" else 1, cuda=False)
    m, batch = loaded(config, images=2 if script == "dpo" else 1)
    batch = {**batch, "moments": vae_moments(m.pipe.vae, batch["pixels"])}
    text, _ = embed_prompts(m.pipe, batch["prompt"])
    m.pipe, batch["text"] = None, text  # as with a cache: the step alone is measured
    step = getattr(module, f"ncp_{script}")
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=config.mixed_precision == "bf16")
    for _ in range(2):  # the first time also makes the gradients, which count as the LoRA's
        with memory.Peak() as peak, autocast:
            losses, _ = step(m, m.unet, batch, config)
            losses.mean().backward()
    held = foreseen.activations + foreseen.working
    assert 0.8 < held / peak.bytes < 1.25, (held, peak.bytes)
    assert foreseen.weights == memory.size_of(m.base.parameters())
    trained = sum(p.numel() for p in m.lora_parameters)
    assert foreseen.lora == trained * (4 + 4 + 2) + memory.size_of(m.reference_lora)


def test_inputs_are_the_encoders_weights_and_more_without_a_cache():
    config = parse(train_ncp_dpo.Config, ARGUMENTS)
    description = describe(config)
    m, _ = loaded(config, images=2)
    weights = memory.size_of([*m.pipe.vae.parameters(), *m.pipe.text_encoder.parameters()])
    assert weights < memory.estimate(config, description, 2).inputs < weights + (1 << 30)
    config.cached_latents = "somewhere"
    assert memory.estimate(config, description, 2).inputs == 0


def test_a_gpu_that_is_too_small_is_said_with_advice(monkeypatch, capsys):
    config = parse(train_ncp_dpo.Config, ARGUMENTS)
    description = describe(config)

    class Accelerator:
        device, is_main_process, print = torch.device("cuda"), True, staticmethod(print)

    class Properties:
        total_memory = 1 << 30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    memory.print_estimate(config, description, Accelerator, 2)
    said = capsys.readouterr().out
    assert "it has 1.0 GiB" in said
    assert "likely to run out of memory; try gradient_checkpointing: true, or cached_latents, or a smaller" in said
    Properties.total_memory = 64 << 30
    memory.print_estimate(config, description, Accelerator, 2)
    assert "likely" not in capsys.readouterr().out


def test_fused_attention_is_put_back():
    real = torch.nn.functional.scaled_dot_product_attention
    with pytest.raises(RuntimeError), memory.fused_attention():
        raise RuntimeError
    assert torch.nn.functional.scaled_dot_product_attention is real


def test_peak_follows_what_is_freed():
    with memory.Peak() as peak:
        a = torch.ones(1000)
        b = a + 1
        del a
        c = b + 1
        del b, c
    assert peak.bytes == 8000


@pytest.mark.parametrize("extra", [[], ["--space", "latent"], ["--gradient_checkpointing", "true"]])
def test_a_models_parameters_are_not_counted_as_activations(extra):
    """All that a step keeps has a row for each image: twice the pairs are twice the bytes, with nothing left over."""
    kept = []
    for pairs in ("2", "4"):
        config = parse(train_ncp_dpo.Config, [*ARGUMENTS, "--train_batch_size", pairs, *extra])
        kept.append(memory.estimate(config, describe(config), 2).activations)
    assert kept[1] == 2 * kept[0] > 0


def test_a_view_of_a_parameter_is_not_counted_where_its_storage_is_set_apart():
    """y = x W^T keeps W^T, a view, to find the gradient of x; y^2 keeps y, 2 x 3 numbers of 4 bytes."""
    layer = torch.nn.Linear(5, 3, bias=False)
    x = torch.randn(2, 5, requires_grad=True)
    layer.requires_grad_(False)
    counted = []
    for kept in ({id(layer.weight.untyped_storage())}, set()):
        with memory.Saved(kept) as saved:
            layer(x).square()
        counted.append(saved.bytes)
    assert counted == [2 * 3 * 4, 2 * 3 * 4 + 3 * 5 * 4]
