"""Checkpoints in one file: what they are taken for, what is loaded, and training, caching and resuming from them."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from layouts import build, ldm_unet, ldm_vae, save_as_on_hub, single_file
from pipelines import SIDE, save_dataset, tokenizer
from runs import call
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import cache_latents
import export_lora
import train_ncp_dpo
from ncp.common import hub
from ncp.common.config import parse, read_yaml
from ncp.common.errors import UserError
from ncp.training import memory, resume
from ncp.training import single_file as files
from ncp.training.pipeline import describe, identity, read_json, read_schedule
from ncp.training.weights import WEIGHTS

VPRED = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}  # as NoobAI-XL V-Pred has them


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> Path:
    """Pipelines as folders and as files, the latter also as v-prediction models are marked; a dataset."""
    folder = tmp_path_factory.mktemp("assets")
    for name, xl in (("sd", False), ("xl", True)):
        pipe = build(xl)
        save_as_on_hub(pipe, folder / name)
        save_file(single_file(pipe), folder / f"{name}.safetensors")
    save_file({**load_file(folder / "xl.safetensors"), **VPRED}, folder / "marked.safetensors")
    save_file(load_file(folder / "xl.safetensors"), folder / "some_vPred_ztSNR.safetensors")
    save_dataset(folder / "data" / "train.parquet")
    return folder


def arguments(assets: Path, output: Path, file: str, *extra: str) -> list[str]:
    settings = {
        "pretrained_model_name_or_path": assets / file,
        "single_file_config": assets / ("sd" if file.startswith("sd") else "xl"),
        "dataset_name": assets / "data", "cache_dir": assets / "cache", "output_dir": output, "resolution": SIDE,
        "mixed_precision": "no", "max_train_steps": 2, "learning_rate": 1e-3, "scale_lr": "false", "rank": 4,
        "dataloader_num_workers": 0, "report_to": "none",
    }  # fmt: skip
    return [str(a) for key, value in settings.items() for a in (f"--{key}", value)] + [str(e) for e in extra]


def run(argv: list[str], script=train_ncp_dpo) -> None:
    call(script.main, argv)


@pytest.fixture(autouse=True)
def without_estimate(monkeypatch):
    monkeypatch.setattr(memory, "print_estimate", lambda *_: None)
    monkeypatch.setattr("ncp.training.run.print_estimate", lambda *_: None)


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_every_tensor_of_a_file_arrives(assets, kind):
    path, given = assets / f"{kind}.safetensors", str(assets / kind)
    pipe = build(kind == "xl")
    loaded = files.load_pipeline(path, given, type(pipe), torch.float32)
    for part in ("unet", "vae", "text_encoder", *(["text_encoder_2"] if kind == "xl" else [])):
        before, after = (getattr(p, part).state_dict() for p in (pipe, loaded))
        assert before.keys() == after.keys() and len(before) > 30
        assert all(torch.equal(before[k], after[k]) for k in before), part
    assert loaded("a cat", num_inference_steps=1, height=SIDE, width=SIDE, output_type="np").images.shape[1] == SIDE


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_files_of_the_published_depth_arrive(tmp_path, kind):
    """U-Net and VAE of the published configs but for their widths: the numbers of blocks decide the tensors' names."""
    narrow = {
        "unet": {"cross_attention_dim": 64, "attention_head_dim": 2, "projection_class_embeddings_input_dim": 72},
        "vae": {"block_out_channels": [32, 32, 64, 64]},
    }
    narrow["unet"] |= {"block_out_channels": [32, 64, 96, 96][: 3 if kind == "sdxl" else 4]}
    narrow["unet"] |= {"addition_time_embed_dim": 8} if kind == "sdxl" else {}
    shutil.copytree(files.ARCHITECTURES / kind, tmp_path / "configs")
    tensors, made = {prefix + "x": torch.zeros(1) for prefix in files.PREFIXES[kind].values()}, {}
    for part, changes in narrow.items():
        file = tmp_path / "configs" / part / "config.json"
        config = {k: changes.get(k, v) for k, v in json.loads(file.read_text()).items()}
        file.write_text(json.dumps(config))
        made[part] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part].from_config(config)
        rename = {"unet": ldm_unet, "vae": ldm_vae}[part]
        tensors |= {files.PREFIXES[kind][part] + k: v.contiguous() for k, v in rename(made[part]).items()}
    save_file(tensors, path := tmp_path / "m.safetensors")
    assert files.architecture(path) == kind
    for part, module in made.items():
        loaded = files.load_part(path, str(tmp_path / "configs"), type(module), part, torch.float32).state_dict()
        expected = module.state_dict()
        assert loaded.keys() == expected.keys() and all(torch.equal(loaded[k], expected[k]) for k in expected), part


def test_sd2_files_are_known_by_their_text_encoder(tmp_path):
    pipe = build(False)
    pipe.save_pretrained(tmp_path / "pipe")
    for name in ("v2-1_768-ema-pruned", "512-base-ema", "other"):
        save_file(single_file(pipe, open_clip=True), tmp_path / f"{name}.safetensors")
    assert files.architecture(tmp_path / "other.safetensors") == "sd2"
    found = files.load_pipeline(tmp_path / "other.safetensors", str(tmp_path / "pipe"), type(pipe), torch.float32)
    for before, after in zip(pipe.text_encoder.parameters(), found.text_encoder.parameters(), strict=True):
        assert torch.equal(before, after)

    def schedule(name: str, *extra: str):
        argv = ["--pretrained_model_name_or_path", str(tmp_path / f"{name}.safetensors"), "--dataset_name", "d"]
        return read_schedule(parse(train_ncp_dpo.Config, [*argv, "--output_dir", "o", *extra]))

    kinds = {name: schedule(name)[0]["prediction_type"] for name in ("v2-1_768-ema-pruned", "512-base-ema")}
    assert kinds == {"v2-1_768-ema-pruned": "v_prediction", "512-base-ema": "epsilon"}
    with pytest.raises(UserError, match=r"SD 2.x comes in two kinds.*set prediction_type: v_prediction"):
        schedule("other")
    assert schedule("other", "--prediction_type", "epsilon")[1] == "as prediction_type says"


@pytest.mark.parametrize(
    ("name", "marks", "kind", "zero"),
    [
        ("model", ["v_pred", "ztsnr"], "v_prediction", True),
        ("model", ["v_pred"], "v_prediction", False),
        ("NoobAI-XL-Vpred-v1.0", [], "v_prediction", True),
        ("noobaiXLNAIXL_vPred10Version", [], "v_prediction", True),
        ("my_v-pred", [], "v_prediction", False),
        ("my_vpred_zsnr", [], "v_prediction", True),
        ("my-v_pred-zero-terminal-snr", [], "v_prediction", True),
        ("noobaiXLNAIXL_epsilonPred11", [], None, None),
        ("sd_xl_base_1.0", [], None, None),
    ],
)
def test_what_a_file_and_its_name_say_of_the_prediction(assets, tmp_path, name, marks, kind, zero):
    tensors = {**load_file(assets / "xl.safetensors"), **{k: torch.zeros(0) for k in marks}}
    save_file(tensors, path := tmp_path / f"{name}.safetensors")
    stated, said = files.stated(path)
    assert stated == ({} if kind is None else {"prediction_type": kind, "rescale_betas_zero_snr": zero})
    assert ("tensor" in said) == bool(marks) and ("name" in said) == (bool(kind) and not marks)


def test_the_configs_of_the_tree_are_those_of_the_published_models():
    """By the numbers of weights that they give; and each folder is a pipeline but for weights and vocabularies."""
    counts = {  # of unet, vae, text_encoder, text_encoder_2
        "sd1": (859_520_964, 83_653_863, 123_060_480),
        "sd2": (865_910_724, 83_653_863, 340_387_840),
        "sdxl": (2_567_463_684, 83_653_863, 123_060_480, 694_659_840),
    }
    parts = ("unet", "vae", "text_encoder", "text_encoder_2")
    for name, numbers in counts.items():
        folder = files.ARCHITECTURES / name
        for part, number in zip(parts, numbers, strict=False):
            content = json.loads((folder / part / "config.json").read_text())
            with torch.device("meta"):
                if part.startswith("text"):
                    kind = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}[part]
                    module = kind(CLIPTextConfig(**content))
                else:
                    module = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part].from_config(content)
            assert sum(p.numel() for p in module.parameters()) == number, (name, part)
        index = json.loads((folder / "model_index.json").read_text())
        named = {p for p, value in index.items() if isinstance(value, list) and value[0] is not None}
        assert named == {f.name for f in folder.iterdir() if f.is_dir()}


def test_without_single_file_config_the_trees_configs_and_the_hubs_tokenizer_are_taken(assets, tmp_path, monkeypatch):
    tokenizer().save_pretrained(tmp_path / "clip")
    content = json.loads((tmp_path / "clip" / "tokenizer.json").read_text())
    (tmp_path / "clip" / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    (tmp_path / "clip" / "merges.txt").write_text("#version: 0.2\n")
    asked = []
    monkeypatch.setattr(hub, "file_of", lambda name, file, _: asked.append(name) or tmp_path / "clip" / file)
    path = assets / "xl.safetensors"
    first, second = (files.load_tokenizer(path, None, part) for part in ("tokenizer", "tokenizer_2"))
    assert set(asked) == {"openai/clip-vit-large-patch14"}
    assert (first.pad_token, second.pad_token) == ("<|endoftext|>", "!")  # as in SDXL's repository
    assert first.model_max_length == second.model_max_length == 77
    of_repository = type(second).from_pretrained(assets / "xl", subfolder="tokenizer_2")
    for prompt in ("a cat", "a cat!", ""):
        ids = [t(prompt, padding="max_length").input_ids for t in (second, of_repository)]
        assert ids[0] == ids[1] and len(ids[0]) == 77
    assert read_json(str(path), "vae/config.json", None)["scaling_factor"] == 0.13025
    assert read_json(str(path), "scheduler/scheduler_config.json", None)["_class_name"] == "EulerDiscreteScheduler"


def test_without_a_tokenizer_a_run_says_what_it_needs(assets, tmp_path, monkeypatch):
    def offline(name, file, revision):
        raise UserError("the hub gave no vocab.json: no connection")

    monkeypatch.setattr(hub, "file_of", offline)
    argv = arguments(assets, tmp_path / "out", "xl.safetensors", "--single_file_config", "null")
    with pytest.raises(UserError, match=r"has no tokenizer, and CLIP's could not be had.*set single_file_config to a"):
        run(argv)
    assert not (tmp_path / "out").exists()


def test_the_content_decides_which_weights_these_are(assets, tmp_path):
    given = str(assets / "xl")
    tensors = load_file(assets / "xl.safetensors")
    save_file(tensors, tmp_path / "renamed.safetensors")
    key = "first_stage_model.decoder.conv_out.bias"
    save_file({**tensors, key: tensors[key] + 1}, tmp_path / "other-vae.safetensors")
    of = {
        file: [identity(str(file), None, part, given) for part in ("unet", "vae", "text_encoder_2", "tokenizer_2")]
        for file in (assets / "xl.safetensors", tmp_path / "renamed.safetensors", tmp_path / "other-vae.safetensors")
    }
    first, renamed, other = of.values()
    assert first == renamed and len(set(first)) == 4
    assert [a == b for a, b in zip(first, other, strict=True)] == [True, False, True, True]


@pytest.mark.parametrize("file", ["sd.safetensors", "xl.safetensors"])
def test_a_run_on_a_file_is_the_run_on_its_pipeline(assets, tmp_path, file, capsys):
    run(arguments(assets, tmp_path / "file", file))
    said = capsys.readouterr()
    assert re.search(r"model: \S+safetensors \(Stable\w+, epsilon, as nothing says otherwise\)", said.out)
    run(arguments(assets, tmp_path / "folder", file.partition(".")[0]))
    one, other = (load_file(tmp_path / name / WEIGHTS) for name in ("file", "folder"))
    assert one.keys() == other.keys()
    # Where a tensor lies in memory decides between kernels, which round otherwise.
    first, second = (torch.cat([w[k].flatten() for k in one if "up" in k]) for w in (one, other))
    assert first.abs().max() > 0 and torch.cosine_similarity(first, second, dim=0) > 0.9999
    card = (tmp_path / "file" / "README.md").read_text()
    assert ".from_single_file(" in card and "prediction_type='epsilon'" in card


def test_a_marked_file_is_trained_cached_and_resumed_as_v_prediction(assets, tmp_path, capsys):
    file, cached = "marked.safetensors", ["--cached_latents", tmp_path / "cache"]
    drawn = ["--validation_prompts", "[one]", "--validation_num_inference_steps", "3", "--timestep_offset", "999"]
    run(arguments(assets, tmp_path / "-", file, *cached, *drawn), cache_latents)
    argv = arguments(assets, tmp_path / "out", file, *cached, *drawn, "--checkpointing_steps", "1")
    run(argv)  # t is T-1 = 999 in every sample: pure noise
    said = capsys.readouterr().out
    assert "v_prediction with zero terminal SNR, as the file's tensors v_pred and ztsnr say" in said
    weights = load_file(tmp_path / "out" / WEIGHTS)
    assert all(v.isfinite().all() for v in weights.values())
    assert any(v.abs().max() > 0 for k, v in weights.items() if "lora.up" in k or "lora_B" in k)
    assert (tmp_path / "out" / "validation" / "step-000002.png").is_file()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "prediction_type='v_prediction', rescale_betas_zero_snr=True, timestep_spacing='trailing'" in card
    # The same weights, taken for something else: another run.
    resumed = [*argv, "--resume_from_checkpoint", "latest", "--max_train_steps", "3"]
    resumed[resumed.index(str(assets / file))] = str(assets / "xl.safetensors")
    with pytest.raises(UserError, match=r"prediction v_prediction with zero terminal SNR .this run: epsilon"):
        run(resumed)
    resumed[resumed.index(str(assets / "xl.safetensors"))] = str(assets / "some_vPred_ztSNR.safetensors")
    run(resumed)
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["max_train_steps"] == 3


REFUSED = {
    "a pickle": ("model.ckpt", None, "expected a .safetensors file; others are pickles"),
    "no such file": ("nowhere/model.safetensors", None, "no such model file or folder|hub gave no"),
    "cut": ("m.safetensors", "cut", "is damaged: "),
    "not one": ("m.safetensors", "junk", "not a .safetensors file, or damaged"),
    "a LoRA": ("m.safetensors", lambda t: {"lora_unet_x.lora_down.weight": torch.zeros(1)}, "is a LoRA"),
    "a VAE": ("m.safetensors", lambda t: pick(t, "first_stage_model."), "holds no U-Net of Stable Diffusion"),
    "inpainting": ("m.safetensors", lambda t: inputs(t, 9), "takes 9 channels, so it is an inpainting model"),
    "instruct-pix2pix": ("m.safetensors", lambda t: inputs(t, 8), "takes 8 channels, so it is a model that edits"),
    "EDM": ("m.safetensors", lambda t: {**t, "edm_mean": torch.zeros(4)}, "trained with EDM's noise levels"),
    "the refiner": (
        "m.safetensors",
        lambda t: {
            **{k: v for k, v in t.items() if not k.startswith("conditioner")},
            "conditioner.embedders.0.model.ln_final.bias": torch.zeros(1),
        },
        "is SDXL's refiner",
    ),
    "no text encoder": (
        "m.safetensors",
        lambda t: {k: v for k, v in t.items() if "embedders.1" not in k},
        "the file has no text_encoder_2",
    ),
    "no VAE": (
        "m.safetensors",
        lambda t: {k: v for k, v in t.items() if not k.startswith("first_stage")},
        "the file has no VAE; set pretrained_vae_model_name_or_path",
    ),
    "a part of the U-Net": (
        "m.safetensors",
        lambda t: {k: v for k, v in t.items() if "middle_block.0" not in k},
        "the unet of the file is not whole, or of another architecture than its configs",
    ),
    "a part of a text encoder": (
        "m.safetensors",
        lambda t: {k: v for k, v in t.items() if "embedders.1.model.ln_final" not in k},
        "the text encoder of the file is not whole.*such as text_model.final_layer_norm",
    ),
    "a U-Net of another width": (
        "m.safetensors",
        lambda t: {**t, "model.diffusion_model.out.0.bias": torch.zeros(3)},
        "the unet of the file is not whole, or of another architecture",
    ),
    "other configs": ("xl.safetensors", None, "no model_index.json; expected a diffusers pipeline"),
    "epsilon with zero SNR": ("zero.safetensors", lambda t: t, "zero terminal SNR with epsilon"),
}


def pick(tensors: dict, prefix: str) -> dict:
    return {k: v for k, v in tensors.items() if k.startswith(prefix)}


def inputs(tensors: dict, channels: int) -> dict:
    key = "model.diffusion_model.input_blocks.0.0.weight"
    return {**tensors, key: tensors[key].new_zeros(len(tensors[key]), channels, 3, 3)}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_whole_checkpoint_is_refused_in_a_line(assets, tmp_path, case):
    name, build_file, message = REFUSED[case]
    file = tmp_path / name
    tensors = load_file(assets / "xl.safetensors")
    if callable(build_file):
        save_file(build_file(tensors), file)
    elif build_file == "cut":
        file.write_bytes((assets / "xl.safetensors").read_bytes()[:-100])
    elif build_file == "junk" or name.endswith(".ckpt"):
        file.write_bytes(b"junk" * 100)
    argv = arguments(assets, tmp_path / "out", "xl.safetensors")
    argv[1] = str(assets / name if case == "other configs" else file)
    if case == "other configs":
        argv += ["--single_file_config", str(assets / "data")]
    if case == "epsilon with zero SNR":
        argv += ["--rescale_betas_zero_snr", "true"]
    with pytest.raises(UserError, match=message) as error:
        run(argv)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_file_without_a_vae_trains_with_another(assets, tmp_path):
    tensors = {k: v for k, v in load_file(assets / "sd.safetensors").items() if not k.startswith("first_stage")}
    save_file(tensors, tmp_path / "sd.safetensors")
    argv = arguments(assets, tmp_path / "out", "sd.safetensors", "--max_train_steps", "1")
    argv[1] = str(tmp_path / "sd.safetensors")
    run([*argv, "--pretrained_vae_model_name_or_path", str(assets / "sd" / "vae")])
    assert (tmp_path / "out" / WEIGHTS).is_file()


def test_settings_override_what_a_file_says_and_are_announced(assets, tmp_path):
    def described(*extra: str):
        return describe(parse(train_ncp_dpo.Config, arguments(assets, tmp_path, "marked.safetensors", *extra)))

    assert described().prediction.startswith("v_prediction with zero terminal SNR, as the file's tensors")
    said = "v_prediction, as the file's tensors v_pred and ztsnr say, but for rescale_betas_zero_snr"
    assert described("--rescale_betas_zero_snr", "false").prediction == said
    both = ["--rescale_betas_zero_snr", "false", "--prediction_type", "epsilon"]
    assert described(*both).prediction == "epsilon, as prediction_type and rescale_betas_zero_snr say"
    assert described("--prediction_type", "sample").prediction.startswith("sample with zero terminal SNR")
    notes = described("--variant", "fp16").notes
    assert notes == ["revision and variant mean nothing to a single file"]


def test_a_checkpoint_from_before_these_keys_is_resumed(assets, tmp_path, monkeypatch):
    new = ("single_file_config", "prediction_type", "rescale_betas_zero_snr")
    argv = arguments(assets, tmp_path / "out", "xl", "--checkpointing_steps", "1")
    run([*argv, "--max_train_steps", "1"])
    monkeypatch.setattr(resume, "read_yaml", lambda path: {k: v for k, v in read_yaml(path).items() if k not in new})
    argv += ["--resume_from_checkpoint", "latest"]
    with pytest.raises(UserError, match=r"prediction_type None .this run: v_prediction"):
        run([*argv, "--prediction_type", "v_prediction"])
    run(argv)
    assert (tmp_path / "out" / "checkpoint-2").is_dir()


def test_a_lora_is_fused_into_a_file_as_training_saw_it(assets, tmp_path):
    """Trained on a file marked as v-prediction with zero terminal SNR, which diffusers does not read from it."""
    out = tmp_path / "out"
    run(arguments(assets, out, "marked.safetensors", "--lora_alpha", 2))
    export_lora.main(["--lora", str(out), "--fuse", "--output", str(tmp_path / "fused")])
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "fused")
    assert pipe.scheduler.config.prediction_type == "v_prediction" and pipe.scheduler.config.rescale_betas_zero_snr
    lora, base = load_file(out / WEIGHTS), build(xl=True).unet.state_dict()
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    up, down = (lora[f"unet.{layer}.lora.{part}.weight"] for part in ("up", "down"))
    expected = base[f"{layer}.weight"] + 2 / 4 * up @ down
    torch.testing.assert_close(pipe.unet.state_dict()[f"{layer}.weight"], expected)
    assert not torch.equal(expected, base[f"{layer}.weight"])
