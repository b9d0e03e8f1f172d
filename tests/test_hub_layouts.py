"""SD 1.5's and SDXL's repositories as they lie on the hub: what is trained, and what is refused with what to do."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from fake_hub import FakeHub, run_scripts
from layouts import build, save_as_on_hub
from pipelines import SIDE, save_dataset
from runs import SCRIPTS, call
from safetensors.torch import load_file

import train_ncp_dpo
from ncp.common.config import parse
from ncp.common.errors import UserError
from ncp.training.models import load_pipe
from ncp.training.pipeline import describe
from ncp.training.weight_files import check_files
from ncp.training.weights import WEIGHTS


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    for name, xl in (("sd", False), ("xl", True)):
        save_as_on_hub(build(xl), folder / name)
        save_as_on_hub(build(xl), folder / f"{name}-full", kinds=("",))
        save_as_on_hub(build(xl), folder / f"{name}-half", kinds=("fp16",))
        save_as_on_hub(build(xl), folder / f"{name}-bin", kinds=("bin",))
    save_dataset(folder / "data" / "train.parquet")
    return folder


def arguments(assets: Path, output: Path, model: str, *extra: str) -> list[str]:
    settings = {
        "pretrained_model_name_or_path": assets / model, "dataset_name": assets / "data",
        "cache_dir": assets / "cache", "output_dir": output, "resolution": SIDE, "mixed_precision": "no",
        "max_train_steps": 2, "learning_rate": 1e-3, "scale_lr": "false", "rank": 4, "dataloader_num_workers": 0,
        "report_to": "none",
    }  # fmt: skip
    return [str(a) for key, value in settings.items() for a in (f"--{key}", value)] + [str(e) for e in extra]


def run(kind: str, argv: list[str]) -> None:
    call(SCRIPTS[kind].main, argv)


@pytest.mark.parametrize(("model", "kind"), [("sd", "dpo"), ("sd", "cpo"), ("xl", "dpo"), ("xl", "sft")])
def test_a_repository_as_it_lies_on_the_hub_is_trained(assets, tmp_path, model, kind, capsys):
    drawn = ["--validation_prompts", "[one]", "--validation_num_inference_steps", "2"]
    run(kind, arguments(assets, tmp_path / "out", model, *drawn))
    weights = load_file(tmp_path / "out" / WEIGHTS)
    assert all(v.isfinite().all() for v in weights.values()) and any(v.abs().max() > 0 for v in weights.values())
    assert (tmp_path / "out" / "validation" / "step-000002.png").is_file()
    assert "as its scheduler's config says)" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["sd", "xl"])
def test_old_names_of_tensors_are_read(assets, tmp_path, model):
    """query, key, value and proj_attn of the VAE, position_ids of the text encoders: against what was written."""
    from accelerate import Accelerator

    config = parse(train_ncp_dpo.Config, arguments(assets, tmp_path, model))
    pipe, made = load_pipe(config, describe(config), Accelerator()), build(model == "xl")
    for part in ("vae", "text_encoder", *(["text_encoder_2"] if model == "xl" else [])):
        loaded, expected = getattr(pipe, part).state_dict(), getattr(made, part).state_dict()
        assert loaded.keys() == expected.keys() and all(torch.equal(loaded[k], expected[k]) for k in loaded), part
    assert sum(".to_q." in k for k in pipe.vae.state_dict()) == 4  # weight and bias, encoder and decoder
    assert pipe.components.get("safety_checker") is None and pipe.components.get("feature_extractor") is None


@pytest.mark.parametrize(("model", "variant"), [("sd", "fp16"), ("xl", "fp16"), ("sd-half", "fp16"), ("xl-full", None)])
def test_the_variant_that_is_there_is_trained(assets, tmp_path, model, variant):
    run("sft", arguments(assets, tmp_path / "out", model, "--variant", variant or "null", "--max_train_steps", "1"))
    assert (tmp_path / "out" / WEIGHTS).is_file()


def altered(assets: Path, tmp_path: Path, model: str, file: str, **changes) -> list[str]:
    shutil.copytree(assets / model, tmp_path / "m")
    path = tmp_path / "m" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return ["--pretrained_model_name_or_path", tmp_path / "m"]


UNET, INDEX, SCHEDULER = "unet/config.json", "model_index.json", "scheduler/scheduler_config.json"
REFUSED = {
    "pickles": ("xl-bin", lambda a, t: [], r"unet has only diffusion_pytorch_model.bin, a pickle.*save_pretrained"),
    "full precision": (
        "sd-full",
        lambda a, t: ["--variant", "fp16"],
        "unet has no weights of variant fp16; set variant: null",
    ),
    "half precision": ("xl-half", lambda a, t: [], "unet has no weights of variant null; set variant: fp16"),
    "no weights": ("sd", lambda a, t: [*emptied(a, t, "vae")], "vae has no weights"),
    "inpainting": ("sd", lambda a, t: altered(a, t, "sd", UNET, in_channels=9), "inpainting and other models"),
    "the refiner": (
        "xl",
        lambda a, t: altered(a, t, "xl", INDEX, text_encoder=[None, None], tokenizer=[None, None]),
        "is SDXL's refiner, which finishes another model's images; fine-tune the base",
    ),
    "the refiner's conditions": (
        "xl",
        lambda a, t: altered(a, t, "xl", INDEX, requires_aesthetics_score=True),
        "is SDXL's refiner",
    ),
    "LCM": (
        "xl",
        lambda a, t: altered(a, t, "xl", UNET, time_cond_proj_dim=256),
        "takes the guidance scale as an input .LCM.",
    ),
    "an upscaler": (
        "sd",
        lambda a, t: altered(a, t, "sd", UNET, num_class_embeds=1000),
        "more than noise, time and text",
    ),
    "EDM": (
        "xl",
        lambda a, t: altered(a, t, "xl", SCHEDULER, _class_name="EDMDPMSolverMultistepScheduler"),
        "has EDM's noise levels",
    ),
    "another prediction": (
        "xl",
        lambda a, t: altered(a, t, "xl", SCHEDULER, prediction_type="flow_prediction"),
        "prediction_type 'flow_prediction'; expected one of: epsilon, v_prediction, sample",
    ),
}


def emptied(assets: Path, tmp_path: Path, part: str) -> list[str]:
    argv = altered(assets, tmp_path, "sd", "model_index.json")
    for file in (tmp_path / "m" / part).glob("*.safetensors"):
        file.unlink()
    return argv


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused_before_anything_loads(assets, tmp_path, monkeypatch, case):
    model, changed, message = REFUSED[case]
    monkeypatch.setattr("ncp.training.run.load_models", lambda *_: pytest.fail("a model was loaded first"))
    with pytest.raises(UserError, match=message) as error:
        run("dpo", arguments(assets, tmp_path / "out", model, *changed(assets, tmp_path)))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "changes", "note"),
    [
        ("sdxl-turbo", {}, r"distilled to a few steps \('turbo'\)"),
        ("JuggernautXL-Lightning", {}, r"distilled to a few steps \('Lightning'\)"),
        ("plain", {"_class_name": "LCMScheduler"}, r"distilled to a few steps \('LCM'\)"),
        ("my-vpred-model", {}, "its name says v-prediction; if it is right, set prediction_type: v_prediction"),
        ("plain", {}, None),
        ("my-vpred-model", {"prediction_type": "v_prediction"}, None),
    ],
)
def test_what_may_be_wrong_is_said_at_the_start(assets, tmp_path, capsys, name, changes, note):
    altered(assets, tmp_path, "xl", SCHEDULER, **changes)
    (tmp_path / "m").rename(tmp_path / name)
    argv = arguments(assets, tmp_path / "out", "xl", "--max_train_steps", "1")
    argv[1] = str(tmp_path / name)
    run("sft", argv)
    (line,) = [text for text in capsys.readouterr().out.splitlines() if text.startswith("           model:")]
    assert ";" not in line if note is None else re.search(f"; .*{note}", line)


def test_shards_and_other_files_beside_the_weights_do_not_confuse():
    sharded = [f"diffusion_pytorch_model{v}-0000{n}-of-00002.safetensors" for v in ("", ".fp16") for n in (1, 2)]
    for variant in (None, "fp16"):
        check_files("unet", [*sharded, "config.json", "diffusion_pytorch_model.safetensors.index.json"], variant)
    check_files("text_encoder", ["model.safetensors", "pytorch_model.bin"], "fp16", plain_will_do=True)
    with pytest.raises(UserError, match="no weights of variant bf16; set variant: fp16 or null"):
        check_files("unet", [*sharded, "diffusion_pytorch_model.non_ema.safetensors"], "bf16")


def test_the_hub_is_asked_for_its_files_before_gigabytes_are_loaded(assets, tmp_path):
    with FakeHub() as hub:
        hub.add("models", "me/bin", assets / "sd-bin")
        hub.add("models", "me/full", assets / "sd-full")
        jobs = {}
        for name, variant in (("me/bin", "null"), ("me/full", "fp16"), ("me/full", "null")):
            argv = arguments(assets, tmp_path / "out", "-", "--variant", variant, "--max_train_steps", "1")
            jobs[f"{name} {variant}"] = ("train_ncp_sft.py", ["--pretrained_model_name_or_path", name, *argv[2:]])
        done = run_scripts(jobs, hub.environment(tmp_path / "home"))
        assert [status for status, _, _ in done.values()] == [2, 2, 0], done
        pickle, variant, _ = (said for _, _, said in done.values())
        assert "me/bin: unet has only diffusion_pytorch_model.bin, a pickle" in pickle
        assert "me/full: unet has no weights of variant fp16; set variant: null" in variant
        asked = [path for _, path in hub.requests]
        assert not [path for path in asked if "resolve" in path and path.endswith(".bin")] and not hub.unanswered
