"""What is drawn with: every kind of model, from folders and from the hub, in which precision, by which sampler."""

import shutil

import evaluations
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from evaluations import PROMPTS, SD15, change, configured, images, refused, save_lora, save_scheduler
from pipelines import SIDE
from safetensors.torch import save_file

from evaluation.generate import generate, seed_of
from evaluation.models import find_base, find_models, open_pipeline, sampler
from ncp.common.errors import UserError

assets, own_judge, drawn, out = evaluations.assets, evaluations.own_judge, evaluations.drawn, evaluations.out


def test_every_kind_of_model_draws_what_it_should(assets, tmp_path):
    """LoRA, U-Net and pipeline folders, against the same pipeline put together by hand with diffusers."""
    entries = {
        "lora": assets / "lora",
        "unet": assets / "tuned-unet",
        "bare": assets / "bare-unet",
        "pipe": assets / "sd",
    }
    entries["file"] = assets / "lora" / "pytorch_lora_weights.safetensors"
    listed = f"[{', '.join(['base', *(f'{k}={v}' for k, v in entries.items())])}]"
    config = configured(assets, tmp_path / "out", "--models", listed, "--max_prompts", "1", "--batch_size", "1")
    generate(config)
    got = {name.partition("/")[0]: pixels for name, pixels in images(tmp_path / "out" / "images").items()}

    def by_hand(change) -> np.ndarray:
        pipe = StableDiffusionPipeline.from_pretrained(assets / "sd")
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        change(pipe)
        generator = torch.Generator().manual_seed(seed_of(0, PROMPTS[0], 0))
        settings = {"height": SIDE, "width": SIDE, "num_inference_steps": 3, "guidance_scale": 3.0}
        return np.asarray(pipe(PROMPTS[0], generator=generator, **settings).images[0]).astype(int)

    base = by_hand(lambda pipe: None)
    lora = by_hand(lambda pipe: pipe.load_lora_weights(assets / "lora"))
    other = by_hand(lambda pipe: pipe.register_modules(unet=UNet2DConditionModel.from_pretrained(assets / "bare-unet")))
    assert abs(lora - base).max() > 8 and abs(other - base).max() > 8
    for name, expected in {
        "base": base,
        "pipe": base,
        "lora": lora,
        "file": lora,
        "unet": other,
        "bare": other,
    }.items():
        assert abs(got[name] - expected).max() <= 1, name


def test_a_variant_of_the_weights_is_read(assets, tmp_path):
    StableDiffusionPipeline.from_pretrained(assets / "sd").save_pretrained(tmp_path / "sd", variant="fp16")
    pixels = []
    for folder, extra in ((assets / "sd", []), (tmp_path / "sd", ["--variant", "fp16"])):
        extra = [*extra, "--pretrained_model_name_or_path", str(folder), "--models", "base", "--max_prompts", "1"]
        generate(configured(assets, tmp_path / f"out-{len(extra)}", *extra))
        pixels += images(tmp_path / f"out-{len(extra)}" / "images").values()
    assert abs(pixels[0] - pixels[1]).max() <= 1


def test_a_vae_that_needs_float32_gets_it(assets, tmp_path):
    config = configured(assets, tmp_path, "--pretrained_model_name_or_path", str(assets / "xl"), "--models", "base",
                        "--mixed_precision", "bf16")  # fmt: skip
    pipe = open_pipeline(find_base(config), config, torch.device("cpu"))
    assert pipe.vae.dtype == torch.float32 and pipe.unet.dtype == torch.bfloat16  # force_upcast in its config


def test_a_replacement_vae_is_in_the_precision_that_its_config_asks_for(assets, tmp_path):
    for asks, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        shutil.copytree(assets / "sd" / "vae", tmp_path / str(asks))
        change(tmp_path / str(asks) / "config.json", force_upcast=asks)
        extra = ["--pretrained_vae_model_name_or_path", str(tmp_path / str(asks)), "--mixed_precision", "bf16"]
        config = configured(assets, tmp_path / "out", *extra)
        pipe = open_pipeline(find_base(config), config, torch.device("cpu"))
        assert pipe.vae.dtype == dtype and pipe.unet.dtype == torch.bfloat16


def test_the_sampler_of_a_protocol_is_the_bases_for_every_model(assets, tmp_path):
    """Class and settings of sampling are the base's; the noise schedule and the kind of prediction the pipeline's."""
    for name in ("base", "same", "v"):
        shutil.copytree(assets / "sd", tmp_path / name)
    save_scheduler(tmp_path / "base", PNDMScheduler(**SD15, skip_prk_steps=True, timestep_spacing="trailing"))
    save_scheduler(tmp_path / "same", EulerDiscreteScheduler(**SD15))
    own = {**SD15, "beta_end": 0.02, "prediction_type": "v_prediction"}
    save_scheduler(tmp_path / "v", DPMSolverMultistepScheduler(**own, use_karras_sigmas=True))
    models = f"[base, same={tmp_path / 'same'}, v={tmp_path / 'v'}, tuned={assets / 'lora'}]"
    extra = ["--pretrained_model_name_or_path", str(tmp_path / "base"), "--models", models, "--max_prompts", "1"]
    config = configured(assets, tmp_path / "out", *extra, "--scheduler", "pipeline", "--batch_size", "1")
    generate(config)
    drawn = {name.partition("/")[0]: pixels for name, pixels in images(tmp_path / "out" / "images").items()}
    assert abs(drawn["base"] - drawn["same"]).max() <= 1  # one and the same weights
    assert abs(drawn["base"] - drawn["v"]).max() > 8

    found = {m.name: m for m in find_models(config, find_base(config))}
    for scheduler, cls in (("pipeline", PNDMScheduler), ("ddim", DDIMScheduler), ("euler", EulerDiscreteScheduler)):
        config.scheduler = scheduler
        samplers = {name: sampler(model, config) for name, model in found.items()}
        assert all(type(s) is cls and s.config.timestep_spacing == "trailing" for s in samplers.values())
        assert {n: (s.config.prediction_type, s.config.beta_end) for n, s in samplers.items()} == {
            **dict.fromkeys(("base", "same", "tuned"), ("epsilon", 0.012)), "v": ("v_prediction", 0.02)
        }  # fmt: skip
        assert not any(s.config.get("clip_sample") or s.config.get("use_karras_sigmas") for s in samplers.values())
    change(tmp_path / "base" / "scheduler" / "scheduler_config.json", _class_name="OwnScheduler")
    config.scheduler = "pipeline"
    with pytest.raises(UserError, match="names no sampler of diffusers: OwnScheduler"):
        sampler(found["base"], config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file: file.write_bytes(b"not safetensors at all"), "failed: "),
        (lambda file: save_lora(file.parent, seed=0, xl=True), "size mismatch"),
        (
            lambda file: save_file({"transformer.to_q.lora_A.weight": torch.zeros(2, 2)}, file),
            "none of its weights belong to this model",
        ),
    ],
)
def test_weights_that_do_not_fit_are_one_line(assets, tmp_path, make, message):
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    file.parent.mkdir()
    make(file)
    said = refused(generate, assets, tmp_path / "out", "--models", f"x={file.parent}")
    assert said.startswith(f"model 'x': loading {file.parent} over") and message in said


def test_models_on_the_hub_are_told_apart(assets, tmp_path, monkeypatch):
    """Against a stand-in for the hub's download, in the cache's layout."""
    from huggingface_hub.errors import EntryNotFoundError

    class Missing(EntryNotFoundError):
        def __init__(self):
            Exception.__init__(self, "404")

    def download(repository: str, file: str, revision: str | None) -> str:
        path = tmp_path / "hub" / repository / "snapshots" / f"commit-{revision}" / file
        if not path.is_file():
            raise Missing
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda repository, revision: ["README.md"])
    snapshot = tmp_path / "hub" / "me"
    for name, source in {"sd": "sd", "lora": "lora", "tuned": "tuned-unet"}.items():
        shutil.copytree(assets / source, snapshot / name / "snapshots" / "commit-None")
    shutil.copytree(assets / "sd", snapshot / "sd" / "snapshots" / "commit-v2")
    extra = [
        "--pretrained_model_name_or_path",
        "me/sd",
        "--revision",
        "v2",
        "--models",
        "[base, a=me/lora, b=me/tuned, c=x/y]",
    ]
    config = configured(assets, tmp_path / "out", *extra)
    with pytest.raises(UserError, match="model 'c': the hub's x/y holds neither a pipeline"):
        find_models(config, find_base(config))
    config.models.pop()
    found = [(m.name, m.kind, m.path, m.weights) for m in find_models(config, find_base(config))]
    assert found == [
        ("base", "pipeline", "me/sd", "commit-v2"),
        ("a", "lora", "me/lora", "commit-None"),
        ("b", "unet", "me/tuned", "commit-None"),
    ]
