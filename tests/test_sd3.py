"""SD3's family through the whole chain: what a U-Net's runs do, done with a transformer and flow matching."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from pipelines import SIDE, unet
from runs import SCRIPTS, arguments, assert_same_weights, call, launch, loaded, refusal, run_here, weights
from safetensors import safe_open
from safetensors.torch import load_file
from support import torchrun
from transformers import T5EncoderModel

import cache_latents
import export_lora
import train_ncp_dpo
from evaluation.generate import generate, seed_of
from evaluation.protocol import EvaluationConfig
from ncp.common.config import parse
from ncp.common.errors import UserError
from ncp.training import memory
from ncp.training.drawing import draw
from ncp.training.inputs import conditions, embed_prompts, vae_moments
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


@pytest.mark.parametrize(
    ("model", "length"), [("sd3", 0), ("sd3", 5), ("sd3", 256), ("sd3-t5", 1), ("sd3-t5", 5), ("sd3-t5", 256)]
)
def test_prompts_are_embedded_as_by_the_pipeline_itself(assets, tmp_path, model, length):
    config = parse(train_ncp_dpo.Config, arguments(assets, tmp_path, "--max_sequence_length", str(length), model=model))
    m, batch = loaded(config, images=2)
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


def test_two_processes_train_as_one(assets, tmp_path):
    # AdamW moves a weight by lr whatever its gradient's size: with a small epsilon, summation noise would show.
    argv = [*LENGTH, "--use_8bit_adam", "false", "--adam_epsilon", "1e-3", "--learning_rate", "1e-2", "--beta", "1e7"]
    two = arguments(assets, tmp_path / "two", *argv, "--train_batch_size", "1", model="sd3")
    done = launch("train_ncp_dpo.py", two, *torchrun(2), ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    run_here("dpo", arguments(assets, tmp_path / "one", *argv, model="sd3"))
    one, other = weights(tmp_path / "one"), weights(tmp_path / "two")
    moved = {name: value.abs().max() for name, value in one.items() if "lora_B" in name}
    assert max(moved.values()) > 1e-4
    for name in moved:
        assert (one[name] - other[name]).abs().max() < 1e-2 * max(moved.values()), name


def test_pictures_are_those_of_the_pipeline_with_the_saved_lora(assets, tmp_path):
    drawing = ["--validation_prompts", "[a red circle]", "--validation_num_inference_steps", "3"]
    drawing += ["--validation_guidance_scale", "2", "--validation_seed", "5", *LENGTH]
    run = run_here("sft", arguments(assets, tmp_path / "out", *drawing, "--learning_rate", "0.05", model="sd3"))
    assert (tmp_path / "out" / "validation" / "step-000002.png").is_file()
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


# ---------------------------------------------------------------- the LoRA's files


@pytest.fixture(scope="module")
def trained(assets, tmp_path_factory):
    """The output folder of a run with alpha = rank / 2."""
    out = tmp_path_factory.mktemp("trained") / "out"
    extra = ["--learning_rate", "0.05", "--rank", "4", "--lora_alpha", "2", *LENGTH]
    run_here("sft", arguments(assets, out, *extra, model="sd3"))
    return out


def test_comfyui_finds_every_layer_under_both_names(trained):
    """ComfyUI (comfy/lora.py) looks for a layer of its MMDiT under diffusers' name after "transformer.", and under it
    with `_` for `.` after "lora_transformer_". Of the factors it knows lora_A and lora_B, and kohya's suffixes."""
    last = {"attn.to_add_out"}  # what the last block has not
    layers = [f"transformer_blocks.{i}.{t}" for i in range(8) for t in LORA_TARGETS if i < 7 or t not in last]
    ours = weights(trained)
    assert ours.keys() == {f"transformer.{name}.{part}.weight" for name in layers for part in ("lora_A", "lora_B")}
    with safe_open(trained / "out.safetensors", "pt") as file:
        kohya, told = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118 (no mapping)
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert kohya.keys() == {f"lora_transformer_{n.replace('.', '_')}.{p}" for n in layers for p in parts}
    assert {v.item() for k, v in kohya.items() if k.endswith("alpha")} == {2.0}
    for name in layers:
        key = f"lora_transformer_{name.replace('.', '_')}"
        assert torch.equal(kohya[f"{key}.lora_down.weight"], ours[f"transformer.{name}.lora_A.weight"])
        assert torch.equal(kohya[f"{key}.lora_up.weight"], ours[f"transformer.{name}.lora_B.weight"])
    assert (told["modelspec.architecture"], told["ss_base_model_version"]) == ("stable-diffusion-3/lora", "sd3")
    assert "modelspec.prediction_type" not in told


def test_an_exported_file_is_the_runs_own_and_a_fused_pipeline_draws_as_base_and_lora(assets, trained, tmp_path):
    call(export_lora.main, ["--lora", str(trained), "--output", str(tmp_path / "again.safetensors")])
    first, again = load_file(trained / "out.safetensors"), load_file(tmp_path / "again.safetensors")
    assert first.keys() == again.keys() and all(torch.equal(first[k], again[k]) for k in first)
    call(export_lora.main, ["--lora", str(trained), "--fuse", "--output", str(tmp_path / "fused")])
    pipe = own_pipeline(assets, "sd3")
    pipe.load_lora_weights(trained)
    fused = own_pipeline(tmp_path, "fused")
    latents = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    keys = {"latents": latents, "num_inference_steps": 3, "output_type": "latent", "max_sequence_length": 5}
    pictures = [p("a cat", **keys).images for p in (pipe, fused)]
    torch.testing.assert_close(*pictures, atol=1e-4, rtol=1e-4)
    pipe.unload_lora_weights()
    assert (pipe("a cat", **keys).images - pictures[0]).abs().max() > 1e-2


# ---------------------------------------------------------------- evaluation


def test_the_evaluation_draws_base_and_lora_as_the_pipeline(assets, trained, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a cat")
    unet().save_pretrained(tmp_path / "unet" / "unet")
    settings = {
        "pretrained_model_name_or_path": assets / "sd3", "models": f"[base, tuned={trained}]", "scorers": "clip",
        "prompts": tmp_path / "prompts.txt", "resolution": SIDE, "num_inference_steps": 3, "guidance_scale": 2,
        "max_sequence_length": 5, "mixed_precision": "no", "output_dir": tmp_path / "out",
    }  # fmt: skip

    def config(**changes) -> EvaluationConfig:
        return parse(EvaluationConfig, [str(a) for k, v in {**settings, **changes}.items() for a in (f"--{k}", v)])

    def picture(folder: str, name: str) -> np.ndarray:
        (file,) = (tmp_path / folder / "images" / name).glob("*.png")
        return np.asarray(Image.open(file)).astype(int)

    generate(config())
    generate(config(output_dir=tmp_path / "longer", max_sequence_length=6, models="base", scheduler="euler"))
    pipe = own_pipeline(assets, "sd3")
    keys = {"num_inference_steps": 3, "guidance_scale": 2.0, "height": SIDE, "width": SIDE, "max_sequence_length": 5}
    for name in ("base", "tuned"):
        if name == "tuned":
            pipe.load_lora_weights(trained)
        expected = pipe("a cat", generator=torch.Generator().manual_seed(seed_of(0, "a cat", 0)), **keys).images[0]
        assert abs(picture("out", name) - np.asarray(expected).astype(int)).max() <= 1
    assert (picture("longer", "base") != picture("out", "base")).any()
    base, with_t5 = "pretrained_model_name_or_path", {"models": "base", "max_sequence_length": 0}
    for number, (changes, message) in enumerate((
        ({"scheduler": "ddim"}, "is a flow-matching model: euler or pipeline"),
        ({"models": f"[x={tmp_path / 'unet'}]"}, "it is a U-Net, and the base has a transformer"),
        ({"models": f"[base, x={assets / 'sd'}]"}, "'x': .*sd is one with DDPM's noise, and the base is a flow-match"),
        ({base: assets / "sd", "models": f"[base, x={assets / 'sd3'}]"}, "sd3 is a flow-matching model, and the base"),
        ({base: assets / "sd3-t5", **with_t5}, "max_sequence_length is 0; .*sd3-t5 has T5: at least 1"),
    )):  # fmt: skip
        with pytest.raises(UserError, match=message):
            generate(config(output_dir=tmp_path / "refused" / str(number), **changes))
    assert not list((tmp_path / "refused").rglob("*.png"))


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("extra", [[], ["--gradient_checkpointing", "true"], ["--space", "latent"]])
def test_what_a_step_holds_is_what_was_foreseen(assets, tmp_path, extra):
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
    assert foreseen.weights == memory.size_of([*m.reference.parameters(), *m.reference.buffers()])


def test_inputs_count_all_text_encoders(assets, tmp_path):
    """With a cache they count for the pictures. In fp16 T5 is partly in float32, as transformers loads it."""
    found = {}
    for model in ("sd3", "sd3-t5"):
        config = parse(train_ncp_dpo.Config, arguments(assets, tmp_path, model=model))
        found[model] = memory.encoders(config, describe(config))
    t5 = sum(p.numel() for p in own_pipeline(assets, "sd3-t5").text_encoder_3.parameters())
    assert found["sd3-t5"] - found["sd3"] == 4 * t5
    argv = ["--cached_latents", "-", "--validation_prompts", "[a cat]"]
    config = parse(train_ncp_dpo.Config, arguments(assets, tmp_path, *argv, model="sd3-t5"))
    need = memory.estimate(config, describe(config), 2, cuda=False)
    assert need.inputs == 0 and need.activations + need.working >= memory.encoders(config, describe(config))
    config.mixed_precision = "fp16"
    half = T5EncoderModel.from_pretrained(assets / "sd3-t5" / "text_encoder_3", dtype=torch.float16)
    config_clip = parse(train_ncp_dpo.Config, arguments(assets, tmp_path, "--mixed_precision", "fp16", model="sd3"))
    more = memory.encoders(config, describe(config)) - memory.encoders(config_clip, describe(config_clip))
    assert more == memory.size_of(half.parameters()) > 2 * t5


# ---------------------------------------------------------------- what is refused


def test_t5_must_have_tokens(assets, tmp_path, capsys):
    argv = arguments(assets, tmp_path / "out", "--max_sequence_length", "0", model="sd3-t5")
    assert "max_sequence_length is 0; " in refusal(train_ncp_dpo.main, argv, capsys)


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
