"""evaluate.py on real files: what decides an image, what the steps leave for one another, and what they refuse."""

import csv
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
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
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from pipelines import SIDE, save_pipeline, unet
from safetensors.torch import load_file, save_file
from support import python

import evaluate
from evaluation.compare import compare
from evaluation.generate import generate, seed_of
from evaluation.models import find_base, find_models, open_pipeline, sampler
from evaluation.prompts import read_prompts
from evaluation.protocol import SCHEDULERS, Config
from evaluation.score import score
from ncp.common.config import parse
from ncp.common.errors import UserError

ROOT = Path(__file__).parents[1]
PROMPTS = ["a cat", "a dog", "two dogs, one of them a cat", "a very small house", "Ein Bär", "a <b>bold</b> cat"]
BRIGHT = "judges_of_the_test:brightness"


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


def configured(assets: Path, output: Path, *extra: str) -> Config:
    return parse(Config, arguments(assets, output, *extra))


def launch(argv: list[str], *prefix: str, **environment: str) -> subprocess.CompletedProcess:
    """The script in a process of its own, as a user would start it."""
    return python(*prefix, ROOT / "evaluate.py", *argv, **environment)


def images(folder: Path) -> dict[str, np.ndarray]:
    return {p.relative_to(folder).as_posix(): np.asarray(Image.open(p)).astype(int) for p in folder.rglob("*.png")}


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


# ---------------------------------------------------------------- what decides an image


def test_seeds_depend_on_seed_prompt_and_sample_alone():
    assert seed_of(0, "a cat", 0) == seed_of(0, "a cat", 0)
    assert len({seed_of(s, p, n) for s in range(3) for p in PROMPTS for n in range(3)}) == 9 * len(PROMPTS)
    assert all(0 <= seed_of(s, "a", 0) < 2**63 for s in range(100))
    torch.Generator().manual_seed(seed_of(0, "a cat", 0))


def test_an_image_does_not_depend_on_what_is_drawn_beside_it(assets, drawn, tmp_path):
    """Other batch sizes, other prompts, two processes: the same to rounding (at most 1 of 255 levels)."""
    (tmp_path / "few.txt").write_text("\n".join([PROMPTS[3], PROMPTS[1]]), encoding="utf-8")
    generate(configured(assets, tmp_path / "single", "--batch_size", "1"))
    generate(configured(assets, tmp_path / "few", "--prompts", str(tmp_path / "few.txt"), "--samples_per_prompt", "2"))
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    argv = arguments(assets, tmp_path / "two", "--batch_size", "5")
    done = launch(["generate", *argv], *two, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout and "12 images, 0 of them drawn before" in done.stdout

    whole = images(drawn / "images")
    assert len(whole) == 2 * len(PROMPTS)
    assert {k.partition("/")[0] for k in whole} == {"base", "tuned"}
    for name, common in (("single", 12), ("few", 4), ("two", 12)):
        other = images(tmp_path / name / "images")
        shared = whole.keys() & other.keys()
        assert len(shared) == common, name
        assert max(abs(whole[k] - other[k]).max() for k in shared) <= 1, name
    second = images(tmp_path / "few" / "images")
    for name in (k for k in second if k.endswith("-1.png")):
        assert abs(second[name] - second[name.replace("-1.png", "-0.png")]).max() > 8  # another sample, another image

    scored = launch(["score", *argv], *two, ACCELERATE_USE_CPU="true", PYTHONPATH=str(assets))
    assert scored.returncode == 0, scored.stderr
    both = [pq.read_table(f / "scores.parquet").to_pylist() for f in (drawn, tmp_path / "two")]
    assert [r["file"] for r in both[0]] == [r["file"] for r in both[1]]
    assert np.allclose(*[[r["score"] for r in rows] for rows in both], atol=1)


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


@pytest.mark.parametrize(
    "extra",
    [
        *(["--scheduler", s] for s in SCHEDULERS if s != "ddim"),
        ["--mixed_precision", "bf16"],
        ["--guidance_scale", "1"],
        ["--revision", "main", "--pretrained_vae_model_name_or_path", "sd/vae"],
        ["--pretrained_model_name_or_path", "xl", "--models", "base"],
        ["--pretrained_model_name_or_path", "xl", "--models", "base", "--mixed_precision", "bf16"],
    ],
    ids=lambda e: "-".join(e).replace("--", "").replace("/", "-"),
)
def test_every_value_of_the_protocol_runs(assets, tmp_path, extra):
    places = ("--pretrained_model_name_or_path", "--pretrained_vae_model_name_or_path")
    extra = [str(assets / e) if before in places else e for before, e in zip(["", *extra], extra, strict=False)]
    config = configured(assets, tmp_path / "out", "--max_prompts", "1", *extra)
    generate(config)
    for pixels in images(tmp_path / "out" / "images").values():
        assert pixels.shape == (SIDE, SIDE, 3) and pixels.std() > 1


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


def change(file: Path, **values) -> None:
    """Changes keys of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def save_scheduler(folder: Path, scheduler) -> None:
    """Replaces a pipeline's scheduler, in the index too, as diffusers would save it."""
    scheduler.save_pretrained(folder / "scheduler")
    change(folder / "model_index.json", scheduler=["diffusers", type(scheduler).__name__])


SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


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


# ---------------------------------------------------------------- what the steps leave


def test_an_image_says_what_it_is_and_the_index_lists_it(assets, drawn):
    rows = pq.read_table(drawn / "index.parquet").to_pylist()
    assert [r["prompt"] for r in rows] == PROMPTS * 2  # the empty line and the repeated prompt are not drawn
    for row in rows:
        text = Image.open(drawn / row["file"]).text
        assert (text["prompt"], text["model"], text["seed"]) == (row["prompt"], row["model"], str(row["seed"]))
        protocol = json.loads(text["protocol"])
        assert protocol["num_inference_steps"] == 3 and protocol["scheduler"] == "ddim" and "diffusers" in protocol
        assert row["seed"] == seed_of(0, row["prompt"], row["sample"])
    assert not [p for p in drawn.rglob(".*")]  # no temporary file is left


def test_an_interrupted_run_continues_and_comes_to_the_same(assets, drawn, out, capsys):
    before = {name: (out / "images" / name).stat().st_mtime_ns for name in images(out / "images")}
    gone = sorted(before)[3:7]
    for name in gone:
        (out / "images" / name).unlink()
    generate(configured(assets, out))
    assert "12 images, 8 of them drawn before" in capsys.readouterr().out
    for name, stamp in before.items():
        assert ((out / "images" / name).stat().st_mtime_ns == stamp) == (name not in gone)
    for name, pixels in images(drawn / "images").items():
        assert abs(pixels - images(out / "images")[name]).max() <= 1
    rows = pq.read_table(out / "scores.parquet").to_pylist()
    pq.write_table(pq.read_table(out / "scores.parquet").slice(0, 5), out / "scores.parquet")  # scoring was cut off too
    score(configured(assets, out))
    again = pq.read_table(out / "scores.parquet").to_pylist()
    assert [r["file"] for r in again] == [r["file"] for r in rows]
    assert [r["score"] for r in again] == pytest.approx([r["score"] for r in rows], abs=0.5)


def test_redrawn_images_are_scored_afresh(assets, out, tmp_path):
    shutil.copytree(assets / "lora", tmp_path / "lora")
    old = {r["file"]: r["score"] for r in pq.read_table(out / "scores.parquet").to_pylist()}
    save_lora(tmp_path / "lora", seed=99)
    config = configured(assets, out, "--models", f"[base, tuned={tmp_path / 'lora'}]")
    with pytest.raises(UserError, match=r"model 'tuned': .* other weights .* remove that folder"):
        generate(config)
    shutil.rmtree(out / "images" / "tuned")
    generate(config)
    with pytest.raises(UserError, match=r"6 of 12 images have no score .* run evaluate.py score"):
        compare(config)
    score(config)
    new = {r["file"]: r["score"] for r in pq.read_table(out / "scores.parquet").to_pylist()}
    assert new.keys() == old.keys()
    assert all((new[f] == old[f]) == ("/base/" in f) for f in new)


def other_weights(file: Path) -> None:
    """Another value in a weight file of the same size."""
    state = load_file(file)
    key = sorted(state)[0]
    save_file({**state, key: state[key] + 1}, file)


PARTS = {
    "unet": lambda f: other_weights(f / "unet" / "diffusion_pytorch_model.safetensors"),
    "vae": lambda f: other_weights(f / "vae" / "diffusion_pytorch_model.safetensors"),
    "text_encoder": lambda f: other_weights(f / "text_encoder" / "model.safetensors"),
    "tokenizer": lambda f: change(f / "tokenizer" / "tokenizer_config.json", model_max_length=70),
    "scheduler": lambda f: change(f / "scheduler" / "scheduler_config.json", timestep_spacing="trailing"),
    "unet config": lambda f: change(f / "unet" / "config.json", center_input_sample=True),
}


def test_whatever_a_pipeline_draws_with_is_known(assets, tmp_path):
    """Base, another pipeline and a replacement VAE: each part that changes is refused by name."""
    for name in ("base", "other"):
        shutil.copytree(assets / "sd", tmp_path / name)
    shutil.copytree(assets / "sd" / "vae", tmp_path / "vae")
    extra = ["--pretrained_model_name_or_path", str(tmp_path / "base"), "--max_prompts", "1", "--models"]
    extra += [f"[tuned={assets / 'lora'}, other={tmp_path / 'other'}]"]
    config, out = configured(assets, tmp_path / "out", *extra), tmp_path / "out"
    generate(config)
    generate(config)  # the same: continues
    for name, said in {
        "base": f"{tmp_path / 'base'} has changed since the images in {out} were drawn (PART); restore it, or choose",
        "other": f"model 'other': the images in {out / 'images' / 'other'} were drawn with other weights "
        f"({tmp_path / 'other'}; changed: PART); remove that folder, or use another name",
    }.items():
        for part, change_it in PARTS.items():
            shutil.copytree(tmp_path / name, tmp_path / "before")
            change_it(tmp_path / name)
            assert said.replace("PART", part) in refused(generate, assets, out, *extra)
            shutil.rmtree(tmp_path / name)
            (tmp_path / "before").rename(tmp_path / name)
    generate(config)

    extra += ["--pretrained_vae_model_name_or_path", str(tmp_path / "vae")]
    generate(configured(assets, tmp_path / "out-2", *extra))
    PARTS["vae"](tmp_path / "base")  # which draws nothing here
    generate(configured(assets, tmp_path / "out-2", *extra))
    other_weights(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    assert "were drawn (replacement VAE); restore it" in refused(generate, assets, tmp_path / "out-2", *extra)


def as_older_versions_left_it(assets: Path, out: Path) -> None:
    """No parts, no base; the weights of a pipeline are known by the hash of its U-Net's files."""
    noted, old = json.loads((out / "protocol.json").read_text()), {}
    noted.pop("base")
    for entry in noted["models"].values():
        parts = entry.pop("parts")
        old[entry["weights"]] = entry["weights"] = parts.get("unet", entry["weights"])
    assert (
        noted["models"]["base"]["weights"]
        == hashlib.sha256(
            hashlib.sha256((assets / "sd/unet/diffusion_pytorch_model.safetensors").read_bytes()).hexdigest().encode()
        ).hexdigest()
    )
    (out / "protocol.json").write_text(json.dumps(noted))
    for name in ("index.parquet", "scores.parquet"):
        table = pq.read_table(out / name)
        rows = [{**r, "weights": old[r["weights"]]} for r in table.to_pylist()]
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), out / name)


def test_an_older_versions_folder_is_continued(assets, out, tmp_path, capsys, monkeypatch):
    as_older_versions_left_it(assets, out)
    scores = pq.read_table(out / "scores.parquet").to_pylist()
    config = configured(assets, out)
    generate(config)
    assert "12 images, 12 of them drawn before" in capsys.readouterr().out
    monkeypatch.setattr("evaluation.score.load_scorer", lambda *_: pytest.fail("scored again"))
    score(config)
    assert pq.read_table(out / "scores.parquet").to_pylist() == scores
    compare(config)
    # From now on the parts are noted: what older versions did not see is seen.
    noted = json.loads((out / "protocol.json").read_text())
    noted["base"]["vae"] = noted["models"]["base"]["parts"]["vae"] = "another"
    (out / "protocol.json").write_text(json.dumps(noted))
    assert "has changed since the images in" in (said := refused(generate, assets, out)) and "(vae)" in said


def test_an_older_versions_images_by_another_sampler_are_not_mixed(assets, tmp_path):
    shutil.copytree(assets / "sd", tmp_path / "other")
    extra = ["--models", f"[base, other={tmp_path / 'other'}]", "--scheduler", "pipeline", "--max_prompts", "1"]
    generate(configured(assets, tmp_path / "out", *extra))
    file, older = tmp_path / "out" / "protocol.json", {}
    noted = json.loads(file.read_text())
    for name, entry in noted["models"].items():
        older[name] = {**entry, "parts": {}}
    file.write_text(json.dumps({"protocol": noted["protocol"], "models": older}))
    generate(configured(assets, tmp_path / "out", *extra))  # the same sampler: nothing is wrong with its images
    save_scheduler(tmp_path / "other", EulerDiscreteScheduler(**SD15))
    for name in ("base", "other"):
        older[name]["weights"] = noted["models"][name]["parts"]["unet"]
    file.write_text(json.dumps({"protocol": noted["protocol"], "models": older}))
    said = refused(generate, assets, tmp_path / "out", *extra)
    assert "model 'other'" in said and "were drawn with its own sampler, by an older version" in said


def test_scores_of_a_judge_that_was_added_join_the_others(assets, out):
    (assets / "judges_of_the_test_2.py").write_text(
        "def width(images, prompts):\n    return [i.width for i in images]\n"
    )
    config = configured(assets, out, "--scorers", f"[{BRIGHT}, judges_of_the_test_2:width]")
    before = pq.read_table(out / "scores.parquet").to_pylist()
    score(config)
    table = pq.read_table(out / "scores.parquet")
    rows = table.to_pylist()
    assert len(rows) == 24 and [r for r in rows if r["scorer"] == BRIGHT] == before
    assert {r["score"] for r in rows if r["scorer"] != BRIGHT} == {SIDE}
    assert table.schema.names[-2:] == ["scorer", "score"]
    compare(config)
    with open(out / "results.csv", newline="") as file:
        results = {r["judge"]: r for r in csv.DictReader(file)}
    assert results["judges_of_the_test_2:width"]["win_rate"] == "0.5"  # nothing but ties


def test_a_judge_may_leave_images_without_a_score(assets, out, capsys):
    config = configured(assets, out, "--scorers", "judges_of_the_test:shy")
    score(config)
    compare(config)
    with open(out / "results.csv", newline="") as file:
        (result,) = csv.DictReader(file)
    assert (result["prompts"], result["left_out"]) == ("4", "2")
    assert "4 (2 without scores)" in capsys.readouterr().out
    assert '"scores": [[null, null]]' in (out / "report.html").read_text(encoding="utf-8")


def test_compare_writes_what_the_scores_say(assets, out, capsys):
    compare(configured(assets, out))
    printed = capsys.readouterr().out
    scores = {(r["model"], r["prompt"]): r["score"] for r in pq.read_table(out / "scores.parquet").to_pylist()}
    wins = np.mean([scores["tuned", p] > scores["base", p] for p in PROMPTS])
    with open(out / "results.csv", newline="") as file:
        (result,) = csv.DictReader(file)
    assert float(result["win_rate"]) == wins and result["prompts"] == "6"
    assert float(result["model_mean"]) == pytest.approx(np.mean([scores["tuned", p] for p in PROMPTS]))
    assert float(result["reference_median"]) == pytest.approx(np.median([scores["base", p] for p in PROMPTS]))
    assert f"{wins:.1%}" in printed and f"{wins:.1%}" in (out / "results.md").read_text()
    assert printed == (out / "summary.txt").read_text() and str(out / "report.html") in printed
    assert Image.open(out / "win_rates.png").width > 300
    assert Image.open(out / "comparison.png").width > 300


def test_the_report_is_one_file_that_escapes_what_prompts_say(assets, out):
    compare(configured(assets, out, "--report_prompts", "4"))
    page = (out / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)  # nothing is fetched
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL).group(1))
    assert len(data["prompts"]) == 4 and data["total"] == 6
    scores = {(r["model"], r["prompt"]): r["score"] for r in pq.read_table(out / "scores.parquet").to_pylist()}
    gains = {p: scores["tuned", p] - scores["base", p] for p in PROMPTS}
    shown = {p["prompt"]: p for p in data["prompts"]}
    assert {max(gains, key=gains.get), min(gains, key=gains.get)} <= shown.keys()  # the extremes are among them
    for prompt, row in shown.items():
        assert row["scores"][0] == pytest.approx([scores["base", prompt], scores["tuned", prompt]], abs=1e-4)
        assert all(i.startswith("data:image/webp;base64,") for i in row["images"])
    compare(configured(assets, out))
    assert "a \\u003cb>bold" in (out / "report.html").read_text(encoding="utf-8")


def test_the_report_sorts_and_filters_in_a_browser(assets, out, browser):
    compare(configured(assets, out))
    scores = {(r["model"], r["prompt"]): r["score"] for r in pq.read_table(out / "scores.parquet").to_pylist()}
    gains = {p: scores["tuned", p] - scores["base", p] for p in PROMPTS}
    page, errors = browser.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: request.url.startswith(("file:", "data:")) or errors.append(request.url))
    page.goto((out / "report.html").as_uri())

    def shown() -> list[str]:
        return page.locator(".prompt").all_inner_texts()

    assert shown() == sorted(PROMPTS, key=gains.get, reverse=True)
    page.select_option("#order", "loss")
    assert shown() == sorted(PROMPTS, key=gains.get)
    assert (
        page.locator(".gain").first.inner_text()
        == f"{min(gains.values()):.{3 if abs(min(gains.values())) < 10 else 2}f}"
    )
    page.select_option("#order", "number")
    assert shown() == PROMPTS
    page.fill("#find", "DOG")
    assert shown() == [p for p in PROMPTS if "dog" in p] and page.inner_text("#count") == "2 shown"
    page.fill("#find", "")
    page.select_option("#order", "win")
    page.select_option("#model", label="base")
    page.select_option("#reference", label="tuned")
    assert shown() == sorted(PROMPTS, key=gains.get)  # the other way round, wins are losses
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert not errors


def test_checkpoints_of_a_run_make_curves(assets, tmp_path, capsys):
    shutil.copytree(assets / "run", tmp_path / "run")
    extra = [
        "--models",
        "base",
        "--runs",
        f"mine={tmp_path / 'run'}",
        "--max_prompts",
        "3",
        "--samples_per_prompt",
        "2",
    ]
    config = configured(assets, tmp_path / "out", *extra)
    for step in (generate, score, compare):
        step(config)
    with open(tmp_path / "out" / "curves.csv", newline="") as file:
        points = list(csv.DictReader(file))
    assert [(p["run"], p["step"], p["seconds"]) for p in points] == [
        ("mine", "5", "7.5"), ("mine", "10", "15.0"), ("mine", "20", "30.0")
    ]  # fmt: skip
    rows = pq.read_table(tmp_path / "out" / "scores.parquet").to_pylist()
    mean = {m: np.mean([r["score"] for r in rows if r["model"] == m]) for m in ("base", "mine@10")}
    assert float(points[1]["mean"]) == pytest.approx(mean["mine@10"])
    assert float(points[1]["gain"]) == pytest.approx(mean["mine@10"] - mean["base"])
    assert (tmp_path / "out" / "curves_seconds.png").is_file() and (tmp_path / "out" / "curves_step.png").is_file()

    for manifest in tmp_path.glob("run/*/manifest.json"):  # as an older training script left them
        manifest.write_text('{"step": 1}')
    config = configured(assets, tmp_path / "out-2", *extra)
    for step in (generate, score, compare):
        step(config)
    assert "no curves against seconds" in capsys.readouterr().out
    assert not (tmp_path / "out-2" / "curves_seconds.png").exists()
    assert (tmp_path / "out-2" / "curves_step.png").is_file()


# ---------------------------------------------------------------- prompts


def prompts_of(assets: Path, file: Path, *extra: str) -> list[tuple[str, str]]:
    rows, _ = read_prompts(configured(assets, Path("o"), "--prompts", str(file), *extra))
    return [(r["prompt"], r["category"]) for r in rows]


def test_prompt_files_of_every_kind(assets, tmp_path):
    expected = [("a cat, sitting", "Animals"), ("a house", "Outdoor")]
    (tmp_path / "p.csv").write_text('Prompt,Category\n"a cat, sitting",Animals\na house,Outdoor\n,Empty\n')
    (tmp_path / "p.tsv").write_text("Prompt\tCategory\tNote\na cat, sitting\tAnimals\t\na house\tOutdoor\tx\n")
    pq.write_table(pa.table({"caption": ["a cat, sitting", "a house", None], "Category": ["Animals", "Outdoor", ""]}),
                   tmp_path / "p.parquet")  # fmt: skip
    (tmp_path / "p.json").write_text('[{"text": "a cat, sitting", "Category": "Animals"}, '
                                     '{"text": "a house", "Category": "Outdoor"}]')  # fmt: skip
    for kind in ("csv", "tsv", "parquet", "json"):
        assert prompts_of(assets, tmp_path / f"p.{kind}", "--category_column", "Category") == expected, kind
        assert prompts_of(assets, tmp_path / f"p.{kind}") == [(p, "") for p, _ in expected], kind
    assert prompts_of(assets, tmp_path / "p.tsv", "--prompt_column", "Note") == [("x", "")]


def test_a_folder_gives_a_category_per_file(assets, tmp_path):
    for name, prompts in {"anime": ["a", "b"], "photo": ["c", "a"], "drawbench": ["d"]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(prompts))
    every = prompts_of(assets, tmp_path)
    assert every == [("a", "anime"), ("b", "anime"), ("d", "drawbench"), ("c", "photo")]  # each prompt once
    chosen = prompts_of(assets, tmp_path, "--prompts_files", "[photo.json, an*.json]", "--max_prompts", "3")
    assert chosen == [("c", "photo"), ("a", "photo"), ("b", "anime")]


@pytest.mark.parametrize(
    ("preset", "files", "expected"),
    [
        ("pickapic_validation", {"data/validation_unique-00000-of-00001-x.parquet": {"caption": ["a", "b"]},
                                 "data/train-00000.parquet": {"caption": ["t"]}}, [("a", ""), ("b", "")]),
        ("partiprompts", {"PartiPrompts.tsv": "Prompt\tCategory\tChallenge\tNote\na\tAnimals\tBasic\t\n"},
         [("a", "Animals")]),
        ("hpdv2", {f"benchmark/{n}.json": [n[0]] for n in ("anime", "concept-art", "drawbench", "paintings", "photo")},
         [("a", "anime"), ("c", "concept-art"), ("p", "paintings")]),
    ],
)  # fmt: skip
def test_presets_read_the_published_layouts(tmp_path, monkeypatch, preset, files, expected):
    for name, content in files.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        if file.suffix == ".parquet":
            pq.write_table(pa.table(content), file)
        else:
            file.write_text(content if isinstance(content, str) else json.dumps(content))
    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **kw: asked.update(kw, name=name) or tmp_path)
    config = parse(Config, ["--config", str(ROOT / f"configs/eval_{preset}.yaml")])
    rows, _ = read_prompts(config)
    assert [(r["prompt"], r["category"]) for r in rows] == expected
    assert asked == {"name": config.prompts, "repo_type": "dataset", "allow_patterns": config.prompts_files}


def test_the_embedded_prompts_are_held_out(assets):
    from tiny import world

    prompts = prompts_of(assets, "tiny")
    trained = set(world.split_scenes()[0])
    assert len(prompts) == 88 * 3 and not any(world.parse(p) in trained for p, _ in prompts)


# ---------------------------------------------------------------- what they refuse


def refused(step, assets: Path, output: Path, *extra: str) -> str:
    with pytest.raises(UserError) as error:
        step(configured(assets, output, *extra))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--models", "[base, x=/no/such]"], "model 'x': no such file or folder: /no/such"),
        (["--models", "[base, x={}/run]"], "model 'x': {}/run holds neither a pipeline"),
        (["--models", "x={}"], "neither a pipeline, nor pytorch_lora_weights.safetensors, nor a U-Net"),
        (["--models", "x={}/sd/vae"], "is of a AutoencoderKL; expected UNet2DConditionModel"),
        (["--pretrained_model_name_or_path", "{}/lora"], "is a lora; expected a diffusers pipeline"),
        (["--runs", "r={}/sd"], "runs: 'r': no checkpoint-STEP folder"),
        (["--prompts", "no/such.txt"], "prompts: no such file or folder: no/such.txt"),
        (["--prompts", "someone/prompts"], "say which files of the hub dataset 'someone/prompts' in prompts_files"),
        (["--prompts", "{}/empty.txt"], "not a single prompt in"),
        (["--prompts", "{}/other.csv"], "none of the columns prompt, caption, text"),
        (["--prompts", "{}/sd"], "model_index.json is not readable (expected a list of texts or of objects)"),
        (["--prompts", "{}/lora"], "no .txt, .csv, .tsv, .json, .parquet files in"),
        (["--prompts", "{}/sd", "--prompts_files", "x*"], "files that match x* in"),
        (["--prompts", "{}/broken.parquet"], "broken.parquet is not readable"),
        (["--prompts", "{}/prompts.txt", "--prompt_column", "p"], "has no column 'p'; it has prompt"),
        (["--mixed_precision", "fp16"], "needs a GPU"),
        (["--output_dir", "{}/prompts.txt/out"], "output_dir: cannot create {}/prompts.txt/out (Not a directory)"),
    ],
)
def test_generate_refuses_before_a_model_is_loaded(assets, tmp_path, monkeypatch, extra, message):
    (assets / "empty.txt").write_text("\n\n")
    (assets / "other.csv").write_text("name,age\nx,1\n")
    (assets / "broken.parquet").write_bytes(b"PAR1 not")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("evaluation.generate.open_pipeline", lambda *a: pytest.fail("a model was loaded"))
    said = refused(generate, assets, tmp_path / "out", *(e.format(assets) for e in extra))
    assert message.format(assets) in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--models", "lora"], "models: 'lora'; expected base or NAME=PATH"),
        (["--models", "a b=x"], "models: 'a b=x'"),
        (["--models", "a="], "models: 'a='"),
        (["--runs", "base"], "runs: 'base'; expected NAME=PATH"),
        (["--models", "[base, x=1, x=2]"], "the name 'x' is given twice"),
        (["--models", "[]"], "models is empty"),
        (["--scorers", "[]"], "scorers is empty"),
        (["--resolution", "65"], "resolution is 65"),
    ],
)
def test_the_config_refuses(assets, extra, message):
    with pytest.raises(UserError, match=re.escape(message)):
        configured(assets, Path("o"), *extra)


@pytest.mark.parametrize("step", [generate, score, compare])
def test_another_protocol_is_refused_and_named(assets, out, step):
    before = sorted(p.name for p in out.rglob("*"))
    said = refused(step, assets, out, "--guidance_scale", "5", "--seed", "1")
    assert "drawn with another protocol (seed 0, now 1; guidance_scale 3.0, now 5.0)" in said
    assert sorted(p.name for p in out.rglob("*")) == before


def test_steps_out_of_order_say_which_comes_first(assets, tmp_path, out):
    for step in (score, compare):
        assert "run evaluate.py generate first" in refused(step, assets, tmp_path / "new")
    (out / "scores.parquet").unlink()
    assert "run evaluate.py score first" in refused(compare, assets, out)
    (out / "index.parquet").unlink()
    assert "run evaluate.py generate first" in refused(score, assets, out)


def test_missing_images_and_models_are_named(assets, out):
    assert "no images of other in" in refused(compare, assets, out, "--models", f"[base, other={assets / 'lora'}]")
    for step in (score, compare):
        said = refused(step, assets, out, "--models", f"[base, tuned={assets / 'bare-unet'}]")
        assert f"the images of 'tuned' are by {assets / 'lora'}, not by {assets / 'bare-unet'}" in said
    file = next((out / "images" / "tuned").glob("*.png"))
    file.unlink()
    for step in (score, compare):
        said = refused(step, assets, out)
        assert f"1 of 12 images are missing, such as images/tuned/{file.name}" in said and "generate again" in said


def test_an_unreadable_image_is_named(assets, out):
    (out / "scores.parquet").unlink()
    file = next((out / "images" / "base").glob("*.png"))
    file.write_bytes(file.read_bytes()[:200])
    said = refused(score, assets, out)
    assert f"images/base/{file.name} is no readable image" in said


def test_scores_of_another_origin_are_refused(assets, out, monkeypatch):
    table = pq.read_table(out / "scores.parquet")
    noted = json.loads(table.schema.metadata[b"noted"])
    noted["protocol"]["resolution"] = 64
    pq.write_table(table.replace_schema_metadata({"noted": json.dumps(noted)}), out / "scores.parquet")
    assert "the scores are of another protocol (resolution)" in refused(compare, assets, out)
    noted["protocol"]["resolution"] = SIDE
    noted["scorers"][BRIGHT] = "elsewhere"
    pq.write_table(table.replace_schema_metadata({"noted": json.dumps(noted)}), out / "scores.parquet")
    assert f"scores of '{BRIGHT}' are by elsewhere, the config says {BRIGHT}" in refused(compare, assets, out)
    pq.write_table(table.replace_schema_metadata({}), out / "scores.parquet")
    assert "not written by evaluate.py score" in refused(compare, assets, out)
    (out / "scores.parquet").write_bytes(b"PAR1")
    assert "not a readable parquet file" in refused(compare, assets, out)
    (out / "protocol.json").write_text("{")
    assert "protocol.json: not readable" in refused(compare, assets, out)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", "scorer 'nonsense' is unknown; expected one of: pickscore, hpsv2, hpsv2.1"),
        ("no_such_module:f", "cannot import no_such_module"),
        ("judges_of_the_test:missing", "has no function 'missing'"),
        ("judges_of_the_test:wrong", "gave (1,) scores for 4 images"),
        ("oracle_appeal", "judges the embedded world only: not a prompt of the embedded world"),
        ("imagereward", "not installed (pip install image-reward)"),
        ("hpsv2", "scorer 'hpsv2': hpsv2_checkpoints: no such file or folder: /no/such"),
    ],
)
def test_a_scorer_that_cannot_judge_is_refused(assets, out, name, message):
    assert message in refused(score, assets, out, "--scorers", name, "--hpsv2_checkpoints", "/no/such")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file: file.write_bytes(b"not safetensors at all"), "failed: "),
        (lambda file: save_lora(file.parent, seed=0, xl=True), "size mismatch"),
        (
            lambda file: save_file({"transformer.to_q.lora_A.weight": torch.zeros(2, 2)}, file),
            "none of its weights belong to this U-Net",
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


def test_the_command_line(assets, tmp_path, monkeypatch):
    assert evaluate.join_lists(["--a", "b", "--votes", "x", "y", "--c"]) == ["--a", "b", "--votes", '["x", "y"]', "--c"]
    assert evaluate.join_lists(["--votes"]) == ["--votes"] and evaluate.join_lists(["--a"]) == ["--a"]
    hub = launch(["generate", *arguments(assets, tmp_path / "o", "--models", "x=some/one")], HF_HUB_OFFLINE="1")
    assert hub.returncode == 2 and hub.stderr.startswith(
        "error: model 'x': some/one is no local folder; the hub gave no"
    )
    assert hub.stderr.count("\n") == 1
    for argv, message in ((["judge"], "'judge'; expected one of: generate, score, compare"), (["--help"], "generate")):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *argv])
        if argv == ["--help"]:
            evaluate.main()
            continue
        with pytest.raises(UserError, match=re.escape(message)):
            evaluate.main()
