"""Published checkpoints to compare with: small files in the layouts of their repositories, drawn and refused."""

from pathlib import Path

import evaluations
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from evaluations import PROMPTS, configured, images, refused, save_lora
from fake_hub import FakeHub
from pipelines import SIDE, unet
from safetensors.torch import load_file, save_file
from support import ROOT, python

from evaluation.generate import generate, seed_of
from evaluation.models import find_base, find_models

assets, own_judge = evaluations.assets, evaluations.own_judge


def tuned_unet() -> torch.nn.Module:
    model = unet()
    with torch.no_grad():
        model.conv_out.weight.mul_(-1)
    return model


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """Folders as the repositories have them.

    dpo, inpo: mhdang/dpo-sd1.5-text2image-v1 and JaydenLu666/InPO-SD1.5, a folder `unet`; spo-lora:
    SPO-Diffusion-Models/SPO-SDXL_4k-p_10ep_LoRA, a LoRA under a name of its own, in diffusers' form; webui: the same as
    kohya's programs have it; sdpo: AIDC-AI/Diffusion-SDPO, `sd1.5/diffusion-dpo/unet.pth`, a pickled state dict.
    """
    folder = tmp_path_factory.mktemp("published")
    for name in ("dpo", "inpo"):
        tuned_unet().save_pretrained(folder / name / "unet")
        (folder / name / "README.md").write_text("# model card")
    save_lora(folder / "made", seed=1)
    lora = load_file(folder / "made" / "pytorch_lora_weights.safetensors")
    for name, state in (("spo-lora/spo_10ep_4k-data_lora_diffusers", lora), ("webui/spo_webui", kohya(lora))):
        (folder / name).parent.mkdir()
        save_file(state, folder / f"{name}.safetensors")
        (folder / name).with_name("README.md").write_text("# model card")
    place = folder / "sdpo" / "sd1.5" / "diffusion-dpo" / "unet.pth"
    place.parent.mkdir(parents=True)
    torch.save(tuned_unet().state_dict(), place)
    return folder


def kohya(lora: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Dots of a layer's name as underscores, and an alpha per layer, here the rank: what diffusers' form stands for."""
    state = {}
    for key, value in lora.items():
        layer, _, side = key.removeprefix("unet.").removesuffix(".weight").rpartition(".lora")
        name = "lora_unet_" + layer.replace(".", "_")
        state[f"{name}.lora_{'down' if side in ('.down', '_A') else 'up'}.weight"] = value
        state[f"{name}.alpha"] = torch.tensor(4.0)
    return state


def drawn(assets: Path, output: Path, entries: dict[str, str]) -> dict[str, np.ndarray]:
    listed = f"[{', '.join(['base', *(f'{k}={v}' for k, v in entries.items())])}]"
    generate(configured(assets, output, "--models", listed, "--max_prompts", "1", "--batch_size", "1"))
    return {name.partition("/")[0]: pixels for name, pixels in images(output / "images").items()}


def by_hand(assets: Path, change) -> np.ndarray:
    """The picture of diffusers' own pipeline, with its U-Net changed."""
    pipe = StableDiffusionPipeline.from_pretrained(assets / "sd")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    change(pipe)
    generator = torch.Generator().manual_seed(seed_of(0, PROMPTS[0], 0))
    settings = {"height": SIDE, "width": SIDE, "num_inference_steps": 3, "guidance_scale": 3.0}
    return np.asarray(pipe(PROMPTS[0], generator=generator, **settings).images[0]).astype(int)


def test_each_published_layout_draws_what_it_should(assets, published, tmp_path):
    state = tuned_unet().state_dict()
    wrapped = {"ddp.pth": {f"module.{k}": v for k, v in state.items()}, "wrapped.pt": {"state_dict": state},
               "half.bin": {k: v.half() for k, v in state.items()}}  # fmt: skip
    for name, content in wrapped.items():
        torch.save(content, tmp_path / name)
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "unet.safetensors")
    loras = {"lora": published / "spo-lora", "webui": published / "webui",
             "file": published / "webui" / "spo_webui.safetensors"}  # fmt: skip
    unets = {"dpo": published / "dpo", "inpo": published / "inpo",
             "sdpo": published / "sdpo/sd1.5/diffusion-dpo/unet.pth", "folder": published / "sdpo/sd1.5/diffusion-dpo",
             **{n.replace(".", "-"): tmp_path / n for n in (*wrapped, "old.pth", "unet.safetensors")}}  # fmt: skip
    got = drawn(assets, tmp_path / "out", {**loras, **unets})
    base = by_hand(assets, lambda pipe: None)
    expected = {
        **dict.fromkeys(loras, by_hand(assets, lambda pipe: pipe.load_lora_weights(published / "made"))),
        **dict.fromkeys(unets, by_hand(assets, lambda pipe: pipe.unet.load_state_dict(state))),
    }
    assert all(abs(picture - base).max() > 8 for picture in expected.values())
    for name, picture in expected.items():
        assert abs(got[name] - picture).max() <= 1, name


def test_other_weights_under_the_same_name_are_noticed(assets, published, tmp_path):
    file = tmp_path / "unet.pth"
    torch.save(tuned_unet().state_dict(), file)
    drawn(assets, tmp_path / "out", {"sdpo": str(file)})
    torch.save(unet().state_dict(), file)
    extra = ["--models", f"[base, sdpo={file}]", "--max_prompts", "1"]
    assert "were drawn with other weights" in refused(generate, assets, tmp_path / "out", *extra)


class Evil:
    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.place),)


def test_a_whole_checkpoint_on_the_hub_is_to_be_downloaded_first(assets, tmp_path, monkeypatch):
    file = tmp_path / "sdxl.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(1)}, file)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repository, name: file)
    said = refused(generate, assets, tmp_path / "out", "--models", "[x=me/models/sdxl.safetensors]")
    assert said == (
        "model 'x': me/models/sdxl.safetensors is a whole checkpoint in one file; download it and give its path here"
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("unet.pth", "evil", "is not readable as a torch file of weights alone"),
        ("unet.pth", "module", "is not readable as a torch file of weights alone"),
        ("unet.pth", b"PK\x03\x04 cut", "is not readable as a torch file of weights alone"),
        ("unet.pth", b"", "is not readable as a torch file of weights alone"),
        ("unet.pth", [1, 2], "holds no state dict, tensors by name, but a list"),
        ("unet.pth", {"step": 3, "w": torch.ones(1)}, "holds no state dict, tensors by name, but a dict"),
        ("unet.pth", {"text_model.x": torch.ones(1)},
         "holds the weights neither of a LoRA nor of a diffusers U-Net, but text_model.x"),
        ("lora.bin", {"unet.x.lora_A.weight": torch.ones(1)}, "is a LoRA in a pickle; expected one as .safetensors"),
        ("sdxl.ckpt.pt", {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(1)},
         "is a whole checkpoint in a pickle; expected one as .safetensors"),
        ("x.safetensors", b"\x08\0\0\0\0\0\0\0{}      ", "nor of a diffusers U-Net, but no tensors"),
        ("x.safetensors", b"cut", "is not readable as safetensors"),
        ("notes.txt", b"", "is no file of weights; expected one of .safetensors, .pth, .pt, .bin"),
    ],
)  # fmt: skip
def test_a_file_of_other_content_is_refused_before_anything_is_drawn(assets, tmp_path, name, content, message):
    file = tmp_path / name
    if content == "evil":
        torch.save({"conv_in.weight": Evil(tmp_path / "pwned")}, file)
    elif content == "module":
        torch.save(unet(), file)
    elif isinstance(content, bytes):
        file.write_bytes(content)
    elif file.suffix == ".safetensors":
        save_file(content, file)
    else:
        torch.save(content, file)
    said = refused(generate, assets, tmp_path / "out", "--models", f"[base, other={file}]")
    assert said.startswith(f"model 'other': {file}") and message in said
    assert not (tmp_path / "pwned").exists() and not (tmp_path / "out").exists()


def test_the_weights_of_another_unet_are_named(assets, tmp_path):
    other = unet(channels=(32, 32, 32))
    torch.save(other.state_dict(), tmp_path / "unet.pth")
    said = refused(generate, assets, tmp_path / "out", "--models", f"[other={tmp_path / 'unet.pth'}]")
    assert "the file's weights are not those of the base's U-Net: " in said and "of another shape (such as" in said
    torch.save(unet(xl=True).state_dict(), tmp_path / "xl.pth")
    said = refused(generate, assets, tmp_path / "out", "--models", f"[other={tmp_path / 'xl.pth'}]")
    assert "unknown (such as add_embedding" in said
    assert not list((tmp_path / "out").rglob("*.png"))


def test_a_folder_with_several_files_is_no_model(assets, published, tmp_path):
    for name in ("a", "b"):
        torch.save(unet().state_dict(), tmp_path / f"{name}.pth")
    said = refused(generate, assets, tmp_path / "out", "--models", f"[base, other={tmp_path}]")
    assert f"{tmp_path} holds neither a pipeline, nor pytorch_lora_weights.safetensors, nor a U-Net" in said


HUB = """
import sys
from evaluation.models import find_base, find_models, open_pipeline
from evaluation.protocol import EvaluationConfig
from ncp.common.config import parse
from ncp.common.errors import UserError
import torch
for argv in {calls!r}:
    try:
        config = parse(EvaluationConfig, argv)
        for model in find_models(config, find_base(config)):
            pipe = open_pipeline(model, config, torch.device("cpu"))
            lora = bool(getattr(pipe.unet, "peft_config", None))
            print(model.name, model.kind, lora, round(float(pipe.unet.conv_out.weight.flatten()[0]), 5))
    except UserError as error:
        print("error:", error)
"""


def test_published_repositories_are_read_from_the_hub(assets, published, tmp_path):
    """By id, and a single file by OWNER/NAME/FILE, over HTTP."""
    places = {"mhdang/dpo-sd1.5-text2image-v1": published / "dpo", "JaydenLu666/InPO-SD1.5": published / "inpo",
              "SPO-Diffusion-Models/SPO-SD-v1-5_4k-p_10ep_LoRA": published / "spo-lora",
              "AIDC-AI/Diffusion-SDPO": published / "sdpo"}  # fmt: skip
    models = ["dpo=mhdang/dpo-sd1.5-text2image-v1", "inpo=JaydenLu666/InPO-SD1.5",
              "spo=SPO-Diffusion-Models/SPO-SD-v1-5_4k-p_10ep_LoRA",
              "sdpo=AIDC-AI/Diffusion-SDPO/sd1.5/diffusion-dpo/unet.pth"]  # fmt: skip
    common = ["--pretrained_model_name_or_path", str(assets / "sd"), "--prompts", "p", "--output_dir", "o",
              "--scorers", "clip", "--mixed_precision", "no"]  # fmt: skip
    wrong = ["x=AIDC-AI/Diffusion-SDPO", "x=AIDC-AI/Diffusion-SDPO/sd1.5/missing/unet.pth", "x=no/where/at/all.pth"]
    calls = [[*common, "--models", f"[base, {', '.join(models)}]"], *([*common, "--models", f"[{w}]"] for w in wrong)]
    with FakeHub() as hub:
        for name, folder in places.items():
            hub.add("models", name, folder)
        said = python("-c", HUB.format(calls=calls), **hub.environment(tmp_path / "home"), PYTHONPATH=str(ROOT))
    assert said.returncode == 0, said.stderr
    lines = said.stdout.splitlines()
    first = round(unet().conv_out.weight.flatten()[0].item(), 5)
    assert lines[:5] == [
        f"base pipeline False {first}", f"dpo unet False {-first}", f"inpo unet False {-first}",
        f"spo lora True {first}", f"sdpo unet state False {-first}",
    ]  # fmt: skip
    assert lines[5] == (
        "error: model 'x': the hub's AIDC-AI/Diffusion-SDPO holds neither a pipeline, nor "
        "pytorch_lora_weights.safetensors, nor a U-Net"
    )
    assert lines[6].startswith("error: model 'x': no such file: AIDC-AI/Diffusion-SDPO/sd1.5/missing/unet.pth; nor did")
    assert lines[7].startswith("error: model 'x': no such file: no/where/at/all.pth; nor did the hub's no/where give")


def test_the_commit_tells_a_file_on_the_hub_from_others(assets, published, tmp_path, monkeypatch):
    place = tmp_path / "snapshots" / "c0ffee" / "unet.pth"
    place.parent.mkdir(parents=True)
    torch.save(tuned_unet().state_dict(), place)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repository, file: place)
    config = configured(assets, tmp_path / "out", "--models", "[sdpo=AIDC-AI/Diffusion-SDPO/sdxl/dmpo/unet.pth]")
    (model,) = find_models(config, find_base(config))
    assert (model.kind, model.weights) == ("unet state", "c0ffee")
    assert model.parts == {"commit": "c0ffee", "file": "sdxl/dmpo/unet.pth"}
