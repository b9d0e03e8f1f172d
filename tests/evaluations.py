"""What the tests of the evaluation share: tiny models, prompts and judges on the disk, and a folder of drawn images.

A test file takes the fixtures over by name: `assets, own_judge = evaluations.assets, evaluations.own_judge`.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from pipelines import SIDE, save_pipeline, unet
from safetensors.torch import load_file, save_file

from evaluation import protocol
from evaluation.generate import generate
from evaluation.protocol import EvaluationConfig
from evaluation.score import score
from ncp.common.config import parse
from ncp.common.errors import UserError

PROMPTS = ["a cat", "a dog", "two dogs, one of them a cat", "a very small house", "Ein Bär", "a <b>bold</b> cat"]
BRIGHT = "judges_of_the_test:brightness"
SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> Path:
    """Random SD and SDXL pipelines, a LoRA, a U-Net, a training run's checkpoints, prompts, and a judge."""
    folder = tmp_path_factory.mktemp("assets")
    save_pipeline(folder / "sd")
    save_pipeline(folder / "xl", xl=True)
    save_lora(folder / "lora", seed=1)
    other = unet()
    with torch.no_grad():
        other.conv_out.weight.mul_(-1)
    other.save_pretrained(folder / "tuned-unet" / "unet")
    other.save_pretrained(folder / "bare-unet")
    for step in (5, 10, 20):
        save_lora(folder / "run" / f"checkpoint-{step}", seed=step)
        manifest = {"step": step, "seconds": 1.5 * step}
        (folder / "run" / f"checkpoint-{step}" / "manifest.json").write_text(json.dumps(manifest))
    (folder / "prompts.txt").write_text("\n".join([*PROMPTS, "", PROMPTS[0]]), encoding="utf-8")
    (folder / "judges_of_the_test.py").write_text(
        "import numpy\ndef brightness(images, prompts):\n    return [numpy.asarray(i).mean() for i in images]\n"
        "def wrong(images, prompts):\n    return [1.0]\n"
        "def shy(images, prompts):\n"
        "    return [numpy.nan if 'dog' in p else i.getpixel((0, 0))[0] for i, p in zip(images, prompts)]\n"
    )
    return folder


@pytest.fixture(autouse=True)
def own_judge(assets, monkeypatch):
    monkeypatch.syspath_prepend(str(assets))


@pytest.fixture(scope="module")
def drawn(assets, tmp_path_factory) -> Path:
    """An output folder after generate and score; tests copy it."""
    folder = tmp_path_factory.mktemp("drawn")
    sys.path.insert(0, str(assets))
    config = configured(assets, folder / "out")
    generate(config)
    score(config)
    return folder / "out"


@pytest.fixture
def out(drawn, tmp_path) -> Path:
    return Path(shutil.copytree(drawn, tmp_path / "out"))


def save_lora(folder: Path, seed: int, xl: bool = False) -> None:
    model = unet(xl)
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.3, generator=generator)
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=state)


def arguments(assets: Path, output: Path, *extra: str) -> list[str]:
    settings = {
        "pretrained_model_name_or_path": assets / "sd",
        "models": f"[base, tuned={assets / 'lora'}]",
        "prompts": assets / "prompts.txt",
        "output_dir": output,
        "scheduler": "ddim",
        "num_inference_steps": 3,
        "guidance_scale": 3,
        "resolution": SIDE,
        "mixed_precision": "no",
        "batch_size": 4,
        "scorers": BRIGHT,
        "bootstrap_samples": 200,
    }
    given = dict(zip(extra[::2], extra[1::2], strict=True))
    return [str(a) for k, v in settings.items() if f"--{k}" not in given for a in (f"--{k}", v)] + list(extra)


def configured(assets: Path, output: Path, *extra: str) -> EvaluationConfig:
    return parse(EvaluationConfig, arguments(assets, output, *extra))


def recording(read: set[str]) -> type[EvaluationConfig]:
    """The settings, noting in `read` each key that is read outside protocol.py, which also reads keys to check them."""

    class Recorded(EvaluationConfig):
        def __getattribute__(self, name: str):
            if sys._getframe(1).f_code.co_filename != protocol.__file__:
                read.add(name)
            return super().__getattribute__(name)

    return Recorded


def images(folder: Path) -> dict[str, np.ndarray]:
    return {p.relative_to(folder).as_posix(): np.asarray(Image.open(p)).astype(int) for p in folder.rglob("*.png")}


def change(file: Path, **values) -> None:
    """Changes keys of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def other_weights(file: Path) -> None:
    """Another value in a weight file of the same size."""
    state = load_file(file)
    key = sorted(state)[0]
    save_file({**state, key: state[key] + 1}, file)


def save_scheduler(folder: Path, scheduler) -> None:
    """Replaces a pipeline's scheduler, in the index too, as diffusers would save it."""
    scheduler.save_pretrained(folder / "scheduler")
    change(folder / "model_index.json", scheduler=["diffusers", type(scheduler).__name__])


def refused(step, assets: Path, output: Path, *extra: str) -> str:
    with pytest.raises(UserError) as error:
        step(configured(assets, output, *extra))
    assert "\n" not in str(error.value)
    return str(error.value)
