"""SD3's family through the whole chain: what a U-Net's runs do, done with a transformer and flow matching."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from pipelines import SIDE
from runs import SCRIPTS, arguments, assert_same_weights, call, loaded, refusal, run_here, weights

import cache_latents
import train_ncp_dpo
from ncp.common.config import parse
from ncp.training import memory
from ncp.training.inputs import conditions, embed_prompts
from ncp.training.pipeline import SCHEDULER, describe
from ncp.training.sd3 import LORA_TARGETS

LENGTH = ["--max_sequence_length", "5"]


def own_pipeline(assets, model: str) -> StableDiffusion3Pipeline:
    """diffusers' own loading."""
    absent = {} if model == "sd3-t5" else {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(assets / model, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("space", ["perceptual", "latent"])
@pytest.mark.parametrize("kind", SCRIPTS)
def test_each_objective_trains_it_in_both_spaces(assets, tmp_path, kind, space):
    model = {"dpo": "sd3", "cpo": "sd3-t5", "sft": "sd3"}[kind]
    run = run_here(kind, arguments(assets, tmp_path / "out", *LENGTH, "--space", space, model=model))
    state = weights(tmp_path / "out")
    assert all(v.isfinite().all() for v in state.values())
    learned = {k for k, v in state.items() if "lora_B" in k and v.abs().max() > 0}
    # The last block's text side has no output. In it, and after it, nothing is left for the text's queries to change.
    assert len(learned) == len(state) // 2 - 1
    assert {k.split(".", 3)[3].removesuffix(".lora_B.weight") for k in learned} == set(LORA_TARGETS)
    assert run.models.diffusion.__name__ == "ncp.flow"


# ---------------------------------------------------------------- conditions


@pytest.mark.parametrize("length", [0, 5, 256])
@pytest.mark.parametrize("model", ["sd3", "sd3-t5"])
def test_prompts_are_embedded_as_by_the_pipeline_itself(assets, tmp_path, model, length):
    config = parse(train_ncp_dpo.Config, arguments(assets, tmp_path, "--max_sequence_length", str(length), model=model))
    m, batch = loaded(config, images=2)
    if model == "sd3-t5" and not length:
        length = 1  # a prompt of T5's has at least its end
        m.description.max_sequence_length = 1
    batch["prompt"] = ["a red circle", ""]
    c = conditions(m, batch)
    with torch.no_grad():
        text, _, pooled, _ = own_pipeline(assets, model).encode_prompt(
            *3 * [batch["prompt"]], device="cpu", do_classifier_free_guidance=False, max_sequence_length=length
        )
    assert c.keys() == {"encoder_hidden_states", "pooled_projections"}
    assert text.shape == (2, 77 + length, 80)
    # Winners' rows, then losers'.
    assert torch.equal(c["encoder_hidden_states"], text.repeat(2, 1, 1))
    assert torch.equal(c["pooled_projections"], pooled.repeat(2, 1))
    assert (text[:, 77:].abs().max() > 0) if model == "sd3-t5" else not text[:, 77:].any()


def test_without_t5_only_the_embeddings_of_clip_are_kept(assets, tmp_path):
    config = parse(train_ncp_dpo.Config, arguments(assets, tmp_path, *LENGTH, model="sd3"))
    m, _ = loaded(config, images=2)
    text, pooled = embed_prompts(m.pipe, ["a", "b"], 5)
    assert text.shape == (2, *m.description.text_shape) == (2, 77, 64) and pooled.shape == (2, m.description.pooled_dim)
    config = parse(train_ncp_dpo.Config, arguments(assets, tmp_path, *LENGTH, model="sd3-t5"))
    assert describe(config).text_shape == (82, 80)


# ---------------------------------------------------------------- caches, resuming, processes, pictures


@pytest.mark.parametrize("model", ["sd3", "sd3-t5"])
def test_a_run_from_the_cache_is_the_run_from_pixels(assets, tmp_path, model):
    argv = ["--cached_latents", str(tmp_path / "cache"), *LENGTH]
    call(cache_latents.main, arguments(assets, tmp_path / "x", *argv, model=model))
    run_here("dpo", arguments(assets, tmp_path / "cached", *argv, model=model))
    run_here("dpo", arguments(assets, tmp_path / "pixels", *LENGTH, model=model))
    cached, pixels = weights(tmp_path / "cached"), weights(tmp_path / "pixels")
    for name, value in pixels.items():  # the cache is in float16
        torch.testing.assert_close(cached[name], value, rtol=0.2, atol=2e-3)
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())["fingerprint"]
    assert ("text_encoder_3" in manifest, "max_sequence_length" in manifest) == (model == "sd3-t5",) * 2


def test_a_cache_with_other_tokens_of_t5_is_refused(assets, tmp_path, capsys):
    argv = ["--cached_latents", str(tmp_path / "cache")]
    call(cache_latents.main, arguments(assets, tmp_path / "x", *argv, *LENGTH, model="sd3-t5"))
    other = arguments(assets, tmp_path / "y", *argv, "--max_sequence_length", "6", model="sd3-t5")
    assert "made with max_sequence_length 5 (this run: 6)" in refusal(train_ncp_dpo.main, other, capsys)


def test_a_resumed_run_ends_with_the_same_bits(assets, tmp_path):
    extra = [*LENGTH, "--checkpointing_steps", "1", "--max_train_steps"]
    run_here("dpo", arguments(assets, tmp_path / "whole", *extra, "2", model="sd3"))
    run_here("dpo", arguments(assets, tmp_path / "parts", *extra, "1", model="sd3"))
    resumed = arguments(assets, tmp_path / "parts", *extra, "2", "--resume_from_checkpoint", "latest", model="sd3")
    run_here("dpo", resumed)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


def test_pictures_are_those_of_the_pipeline_with_the_saved_lora(assets, tmp_path):
    drawing = ["--validation_prompts", "[a red circle]", "--validation_num_inference_steps", "3"]
    drawing += ["--validation_guidance_scale", "2", "--validation_seed", "5", *LENGTH]
    run = run_here("sft", arguments(assets, tmp_path / "out", *drawing, "--learning_rate", "0.05", model="sd3"))
    assert (tmp_path / "out" / "validation" / "step-000002.png").is_file()
    from ncp.training.drawing import draw

    settings = {"resolution": SIDE, "num_inference_steps": 3, "guidance_scale": 2.0, "accelerator": run.accelerator}
    ours = {
        part: np.asarray(draw(run.models, run.models.pipe, module, ["a red circle"], [5], **settings)[0]).astype(int)
        for part, module in {"reference": run.models.reference, "tuned": run.models.unet}.items()
    }
    pipe = own_pipeline(assets, "sd3")
    keys = {"num_inference_steps": 3, "guidance_scale": 2.0, "height": SIDE, "width": SIDE, "max_sequence_length": 5}
    for part in ours:
        if part == "tuned":
            pipe.load_lora_weights(tmp_path / "out")
        expected = pipe("a red circle", generator=torch.Generator().manual_seed(5), **keys).images[0]
        assert abs(ours[part] - np.asarray(expected).astype(int)).max() <= 1
    assert abs(ours["tuned"] - ours["reference"]).max() > 8


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("extra", [[], ["--gradient_checkpointing", "true"], ["--space", "latent"]])
def test_what_a_step_holds_is_what_was_foreseen(assets, tmp_path, extra):
    from ncp.training.inputs import vae_moments

    argv = arguments(assets, tmp_path, "--train_batch_size", "8", *LENGTH, *extra, model="sd3")
    config = parse(train_ncp_dpo.Config, argv)
    foreseen = memory.estimate(config, describe(config), 2, cuda=False)
    m, batch = loaded(config, images=2)
    batch = {**batch, "moments": vae_moments(m.pipe.vae, batch["pixels"])}
    batch["text"], batch["pooled"] = embed_prompts(m.pipe, batch["prompt"], 5)
    m.pipe = None  # as with a cache: the step alone is measured
    for _ in range(2):  # the first time also makes the gradients, which count as the LoRA's
        with memory.Peak() as peak:
            losses, _ = train_ncp_dpo.ncp_dpo(m, m.unet, batch, config)
            losses.mean().backward()
    held = foreseen.activations + foreseen.working
    assert 0.8 < held / peak.bytes < 1.25, (held, peak.bytes)
    assert foreseen.weights == memory.size_of(m.reference.parameters())


def test_inputs_count_all_text_encoders(assets, tmp_path):
    found = {}
    for model in ("sd3", "sd3-t5"):
        config = parse(train_ncp_dpo.Config, arguments(assets, tmp_path, model=model))
        found[model] = memory.encoders(config, describe(config))
    t5 = sum(p.numel() for p in own_pipeline(assets, "sd3-t5").text_encoder_3.parameters())
    assert found["sd3-t5"] - found["sd3"] == 4 * t5


# ---------------------------------------------------------------- what is refused


def changed(assets, folder, file: str, **changes):
    """A copy of the SD3 pipeline with one of its JSON files changed."""
    shutil.copytree(assets / "sd3", folder)
    content = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("file", "changes", "argv", "message"),
    [
        (SCHEDULER, {"_class_name": "DDPMScheduler"}, [], "expected a flow-matching scheduler"),
        (SCHEDULER, {"use_dynamic_shifting": True}, [], "a scheduler with use_dynamic_shifting"),
        ("model_index.json", {"transformer": ["diffusers", "FluxTransformer2DModel"]}, [],
         "the denoiser is a FluxTransformer2DModel; the method needs SD's or SDXL's U-Net, or SD3's transformer"),
        ("model_index.json", {"text_encoder_2": [None, None]}, [], "the pipeline has no text_encoder_2"),
        ("transformer/config.json", {"joint_attention_dim": 60}, [], "takes embeddings of other sizes"),
        ("transformer/config.json", {"in_channels": 4}, [], "takes 4 channels and the VAE gives 8"),
        ("model_index.json", {}, ["--prediction_type", "epsilon"], "prediction_type belongs to DDPM's models"),
        ("model_index.json", {}, ["--encoder_blocks", "mid"], "encoder block 'mid': expected 'last', 'n/4', 'n/2'"),
        ("model_index.json", {}, ["--checkpointed_blocks", "up1"], "'up1' is none of all, block0,"),
        ("model_index.json", {}, ["--resolution", "34"], "resolution is 34; this model needs a multiple of 4"),
        ("model_index.json", {}, ["--resolution", "100"], "the transformer's position embeddings reach 96 pixels"),
    ],
)  # fmt: skip
def test_what_it_cannot_use_is_refused_in_one_line(assets, tmp_path, capsys, file, changes, argv, message):
    model = changed(assets, tmp_path / "model", file, **changes)
    argv = [*arguments(assets, tmp_path / "out", model="sd3"), *argv, "--pretrained_model_name_or_path", str(model)]
    assert message in refusal(train_ncp_dpo.main, argv, capsys)
