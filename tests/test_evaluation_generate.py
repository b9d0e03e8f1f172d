"""What decides an image, what generate leaves, and what it refuses."""

import hashlib
import itertools
import json
import shutil
from pathlib import Path

import evaluations
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from evaluations import (
    PROMPTS,
    SD15,
    arguments,
    change,
    configured,
    images,
    other_weights,
    refused,
    save_lora,
    save_scheduler,
)
from PIL import Image
from pipelines import SIDE
from support import ROOT, python

from evaluate import compare
from evaluation.generate import generate, seed_of
from evaluation.protocol import PROTOCOL, SCHEDULERS
from evaluation.score import score
from ncp.common.errors import UserError

assets, own_judge, drawn, out = evaluations.assets, evaluations.own_judge, evaluations.drawn, evaluations.out


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
    done = python(*two, ROOT / "evaluate.py", "generate", *argv, ACCELERATE_USE_CPU="true")
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

    scored = python(*two, ROOT / "evaluate.py", "score", *argv, ACCELERATE_USE_CPU="true", PYTHONPATH=str(assets))
    assert scored.returncode == 0, scored.stderr
    both = [pq.read_table(f / "scores.parquet").to_pylist() for f in (drawn, tmp_path / "two")]
    assert [r["file"] for r in both[0]] == [r["file"] for r in both[1]]
    assert np.allclose(*[[r["score"] for r in rows] for rows in both], atol=1)


VALUES = {
    "pretrained_model_name_or_path": ["{}/xl"],
    "prediction_type": ["v_prediction", "sample"],
    "pretrained_vae_model_name_or_path": ["{}/vae"],
    "seed": ["1"],
    "scheduler": [s for s in SCHEDULERS if s != "ddim"],
    "num_inference_steps": ["4"],
    "guidance_scale": ["1", "5"],
    "resolution": [str(2 * SIDE)],
    "mixed_precision": ["bf16"],  # fp16 needs a GPU
}


def test_every_value_of_the_protocol_draws_another_image(assets, tmp_path):
    """Of one prompt, in SD and in SDXL: whoever ignores a value draws an image twice."""
    shutil.copytree(assets / "sd" / "vae", assets / "vae")
    other_weights(assets / "vae" / "diffusion_pytorch_model.safetensors")
    tried = [[], *([f"--{key}", v.format(assets)] for key, values in VALUES.items() for v in values)]
    tried.append(["--pretrained_model_name_or_path", str(assets / "xl"), "--mixed_precision", "bf16"])
    tried.append(["--prediction_type", "v_prediction", "--rescale_betas_zero_snr", "true"])
    drawn = {}
    for extra in tried:
        out = tmp_path / str(len(drawn))
        generate(configured(assets, out, "--models", "base", "--max_prompts", "1", *extra))
        (pixels,) = images(out / "images").values()
        side = 2 * SIDE if "--resolution" in extra else SIDE
        assert pixels.shape == (side, side, 3) and pixels.std() > 1, extra
        drawn[" ".join(extra)] = pixels
    for (one, first), (other, second) in itertools.combinations(drawn.items(), 2):
        assert first.shape != second.shape or (first != second).any(), (one, other)
    # The others decide which files are read: test_a_variant_of_the_weights_is_read, and the tests of the hub. The last
    # one is SD3's: tests/test_sd3.py.
    others = {"revision", "variant", "rescale_betas_zero_snr", "max_sequence_length"}
    assert VALUES.keys() == set(PROTOCOL) - others


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
        (["--prompts", "{}/lora"], "no .txt, .csv, .tsv, .json, .jsonl, .parquet files in"),
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
