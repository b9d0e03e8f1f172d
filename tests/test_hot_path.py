"""What a step costs, as far as it shows without a GPU: waits of the host, operations, memory kept for backward."""

import json
import sys
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from runs import SCRIPTS, arguments, as_a_process, loaded
from support import ROOT, python

from ncp.common.config import parse
from ncp.ddpm import add_noise, previous
from ncp.training.inputs import conditions, latents

sys.path.insert(0, str(ROOT / "benchmarks"))

from arm import Arm, PeakSaved, operations

# ---------------------------------------------------------------- waits of the host


@pytest.fixture(scope="module")
def waits():
    """By case: where the host waits for a GPU in a step of two micro-batches, for `dpo` in two steps (fake_gpu.py)."""
    done = python("tests/fake_gpu.py", PYTHONPATH=str(ROOT), timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# In each step the guard asks whether to take it, torch's gradient scaler asks too, and the log takes its figures.
STEP = [
    "read in ncp/training/guard.py, _agree",
    "read in grad_scaler.py, <genexpr>",
    "read in ncp/training/meter.py, flush",
]


@pytest.mark.parametrize(("case", "steps"), [("dpo", 2), ("cpo", 1), ("sft", 1), ("dpo of SDXL", 1)])
def test_with_a_cache_no_micro_batch_waits_for_the_gpu(waits, case, steps):
    assert waits[case]["micro"] == []
    assert waits[case]["step"] == steps * STEP
    assert waits[case]["operations"] > 1000


def test_from_pixels_only_the_prompts_words_are_waited_for(waits):
    """diffusers copies the token ids of both text encoders from memory that is not pinned."""
    words = "copy to the GPU in pipeline_stable_diffusion_xl.py, encode_prompt"
    assert waits["dpo of SDXL from pixels"]["micro"] == 2 * 2 * [words]
    assert waits["dpo of SDXL from pixels"]["step"] == STEP


@pytest.mark.parametrize(("case", "kind"), [("item", "read"), ("copy", "copy to the GPU"), ("cpu", "read")])
def test_a_wait_in_the_objective_would_be_found(waits, case, kind):
    assert waits[f"spoiled by {case}"]["micro"] == 2 * [f"{kind} in train_ncp_sft.py, main"]


# ---------------------------------------------------------------- operations of a step


def cached(kind: str, assets, tmp_path, *extra: str):
    """(models, batch as from a cache, config), in float32, B of the LoRA not 0."""
    config = parse(SCRIPTS[kind].Config, arguments(assets, tmp_path, *extra))
    m, batch = loaded(config, images=1 if kind == "sft" else 2)
    m.pipe = None
    del batch["pixels"], batch["prompt"]
    generator = torch.Generator().manual_seed(0)
    rows, side = len(batch["z"]), batch["z"].shape[-1]
    batch["moments"] = torch.randn(rows, 8, side, side, generator=generator)
    batch["text"] = torch.randn(len(batch["eps"]), *m.description.text_shape, generator=generator)
    for name, p in m.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.01, generator=generator)
    return m, batch, config


def train(kind, m, batch, config):
    losses, _ = getattr(SCRIPTS[kind], f"ncp_{kind}")(m, m.unet, batch, config)
    losses.mean().backward()


@contextmanager
def counted_by_hand():
    """Yields {"forward", "backward"}: multiplications and additions, from the shapes of what each layer is given.

    A product of matrices has as many again for the gradient of each factor that needs one. Fused attention has two
    products, and five in its backward pass, which makes the scores anew.
    """
    count = {"forward": 0, "backward": 0}
    originals = F.linear, F.conv2d, F.scaled_dot_product_attention

    def note(operations: int, *factors: torch.Tensor) -> None:
        count["forward"] += operations
        count["backward"] += operations * sum(f.requires_grad for f in factors) if torch.is_grad_enabled() else 0

    def linear(x, weight, bias=None):
        note(2 * x.numel() * len(weight), x, weight)
        return originals[0](x, weight, bias)

    def conv2d(x, weight, *args):
        out = originals[1](x, weight, *args)
        note(2 * out.numel() * weight[0].numel(), x, weight)
        return out

    def attention(q, k, v, *args, **kwargs):
        products = 4 * q.numel() * k.shape[-2]
        count["forward"] += products
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            count["backward"] += products * 5 // 2
        return originals[2](q, k, v, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for name, function in {"linear": linear, "conv2d": conv2d, "scaled_dot_product_attention": attention}.items():
            patch.setattr(F, name, function)
        yield count


# Embeddings of a step: the target, the reference and the policy; with the central difference both ends of each, and
# the policy's gradient (docs/precision.md).
EMBEDDINGS = {("dpo", "1"): 3, ("dpo", "auto"): 5, ("cpo", "1"): 2, ("cpo", "auto"): 3}
EMBEDDINGS |= {("sft", secant): EMBEDDINGS["cpo", secant] for secant in ("1", "auto")}


@pytest.mark.parametrize("space", ["perceptual", "latent"])
@pytest.mark.parametrize(("kind", "secant"), EMBEDDINGS)
def test_nothing_is_computed_twice(assets, tmp_path, kind, secant, space):
    """A step is U + U' (policy) + U (reference, DPO alone) + n E + E' (perceptual space alone).

    U and E are one forward pass of U-Net and encoder, U' and E' one backward pass: of the policy to the LoRA, of the
    encoder to its input.
    """
    if space == "latent" and secant == "auto":
        pytest.skip("the same as with secant 1: latent space has no embeddings")
    m, batch, config = cached(kind, assets, tmp_path, "--space", space)
    m.secant = secant
    x0, c = latents(m, batch), conditions(m, batch)
    rounds = len(x0) // len(batch["eps"])
    t, eps = batch["timestep"].repeat(rounds), batch["eps"].repeat(rounds, 1, 1, 1)
    x_t = add_noise(m.scheduler, x0, eps, t)
    f = partial(m.encoder, timestep=previous(t, 1), **c)

    with counted_by_hand() as policy, torch.enable_grad():
        both = operations(lambda: m.unet(x_t, t, **c).sample.sum().backward())
    assert both == policy["forward"] + policy["backward"]
    with counted_by_hand() as reference, torch.no_grad():
        forward = operations(lambda: m.reference(x_t, t, **c))
    assert forward == reference["forward"] < policy["forward"]  # which has a LoRA too
    with counted_by_hand() as encoder:
        x = x_t.clone().requires_grad_()
        embedding = operations(lambda: f(x).sum().backward())
    assert embedding == encoder["forward"] + encoder["backward"]
    # Gradients of frozen weights would double it.
    assert encoder["backward"] < 1.5 * encoder["forward"] and encoder["forward"] < reference["forward"]

    expected = both + (forward if kind == "dpo" else 0)
    if space == "perceptual":
        expected += EMBEDDINGS[kind, secant] * encoder["forward"] + encoder["backward"]
    assert operations(lambda: train(kind, m, batch, config)) == expected


def test_a_second_reference_pass_would_be_found(assets, tmp_path):
    m, batch, config = cached("dpo", assets, tmp_path)
    once = operations(lambda: train("dpo", m, batch, config))
    reference = m.reference.forward
    m.reference.forward = lambda *args, **kwargs: reference(*args, **kwargs) and reference(*args, **kwargs)
    assert operations(lambda: train("dpo", m, batch, config)) > 1.1 * once


def test_recomputing_costs_one_forward_pass_of_what_has_a_gradient(assets, tmp_path):
    m, batch, config = cached("dpo", assets, tmp_path)
    plain = operations(lambda: train("dpo", m, batch, config))
    x0, c, t = latents(m, batch), conditions(m, batch), batch["timestep"].repeat(2)
    with torch.no_grad():
        again = operations(lambda: (m.unet(x0, t, **c), m.encoder(x0, t, **c)))
    m, batch, config = cached("dpo", assets, tmp_path, "--gradient_checkpointing", "true")
    extra = operations(lambda: train("dpo", m, batch, config)) - plain
    assert 0.7 * again < extra < again  # convolutions between the blocks are not recomputed


# ---------------------------------------------------------------- memory that is kept for the backward pass


@pytest.mark.parametrize("secant", ["1", "auto"])
@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_step_keeps_what_policy_and_one_embedding_need(assets, tmp_path, kind, secant):
    m, batch, config = cached(kind, assets, tmp_path)
    m.secant = secant
    x0, c = latents(m, batch), conditions(m, batch)
    t = batch["timestep"].repeat(len(x0) // len(batch["eps"]))
    with PeakSaved() as step:
        train(kind, m, batch, config)
    with PeakSaved() as parts:
        m.unet(x0, t, **c).sample.sum(), m.encoder(x0.requires_grad_(), t, **c).sum()
    assert parts.now == 0  # nothing outlives its graph
    # The rest, per-sample numbers and latents aside, would be another pass that is kept without need.
    assert parts.bytes <= step.bytes < 1.05 * parts.bytes


def test_recomputing_keeps_far_less_and_straightforward_is_no_smaller():
    """On the embedded default. Both keep the same activations: what is saved is weights, VAE and text encoder."""
    argv = ["--config", "configs/tiny_ncp_dpo.yaml", "--train_batch_size", "2"]
    kept, sizes, flops = {}, {}, {}
    for name in ("cached", "recomputed:gradient_checkpointing=true", "straightforward"):
        with as_a_process():
            arm = Arm(name, "tiny", argv)
        arm.step()
        with PeakSaved() as peak:
            arm.step()
        kept[arm.name], sizes[arm.name], flops[arm.name] = peak.bytes, arm.weights_bytes(), arm.flops()
    assert kept["recomputed"] < 0.4 * kept["cached"]
    assert kept["straightforward"] == pytest.approx(kept["cached"], rel=0.02)
    assert sizes["straightforward"] > 1.7 * sizes["cached"]
    assert flops["straightforward"] > flops["cached"]
