"""export_lora.py: output folders and checkpoints, new and old, to kohya's file and to a pipeline without a LoRA."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import lora_runs
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from lora_runs import draw
from pipelines import save_pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import python

import export_lora
from ncp.common import files
from ncp.common.errors import UserError
from ncp.training.fuse import STATED, fuse, fused_pipeline
from ncp.training.weights import WEIGHTS

runs = lora_runs.runs


def export(*arguments: object) -> None:
    export_lora.main([str(a) for a in arguments])


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as content:
        return content.metadata()


def test_an_output_folder_gives_the_file_that_its_run_wrote(runs, tmp_path):
    out = runs["sd"][0]
    file = out / f"{out.name}.safetensors"
    content, told = load_file(file), metadata(file)
    file.unlink()
    export("--lora", out)
    again = load_file(file)
    assert metadata(file) == told and again.keys() == content.keys()
    assert all(torch.equal(again[k], content[k]) for k in content)
    # In half precision half as large, and elsewhere under another name.
    export("--lora", out, "--precision", "fp16", "--output", tmp_path / "new" / "mine.safetensors")
    half = load_file(tmp_path / "new" / "mine.safetensors")
    assert {v.dtype for k, v in half.items() if "lora_" in k.partition(".")[2]} == {torch.float16}
    assert metadata(tmp_path / "new" / "mine.safetensors")["modelspec.title"] == "mine"
    for key, value in content.items():
        torch.testing.assert_close(half[key].float(), value, rtol=1e-3, atol=1e-7)


def test_a_checkpoint_is_exported_with_its_step(runs):
    out, base, _, alpha = runs["sd"]
    checkpoint = out / "checkpoint-2"
    export("--lora", checkpoint)
    file = checkpoint / f"{out.name}-step00000002.safetensors"
    told = metadata(file)
    assert told["ss_steps"] == "2" and told["ss_output_name"] == file.stem and told["ss_network_alpha"] == str(alpha)
    assert "NCP-SFT" in told["modelspec.description"] and "8 pairs of 4 prompts" in told["modelspec.description"]
    torch.testing.assert_close(draw(base, file), draw(base, checkpoint / WEIGHTS), atol=1e-6, rtol=0)
    file.unlink()


def test_an_older_output_folder_says_what_its_card_does(runs, tmp_path):
    """Older checkpoints do not say what was trained on how much; the card of the output folder says some of it."""
    out = tmp_path / "old"
    shutil.copytree(runs["xl"][0], out)
    (out / f"{runs['xl'][0].name}.safetensors").unlink()
    manifest = json.loads((out / "checkpoint-2" / "manifest.json").read_text())
    del manifest["facts"]
    (out / "checkpoint-2" / "manifest.json").write_text(json.dumps(manifest))
    for folder, file, steps in (
        (out, out / "old.safetensors", "2"),
        (out / "checkpoint-2", out / "checkpoint-2" / "old-step00000002.safetensors", "2"),
    ):
        export("--lora", folder)
        told = metadata(file)
        assert told["modelspec.description"] == "NCP-DPO (arXiv 2406.17636), version 0.1.0, 8 pairs"
        assert told["ss_steps"] == steps and "ss_num_train_images" not in told and told["ss_sd_model_name"] == "xl"
        assert len(load_file(file)) == 3 * len(load_file(folder / WEIGHTS)) // 2


def test_a_lora_alone_is_enough_for_a_file(runs, tmp_path):
    (tmp_path / "bare").mkdir()
    shutil.copy(runs["sd"][0] / WEIGHTS, tmp_path / "bare")
    export("--lora", tmp_path / "bare")
    told = metadata(tmp_path / "bare" / "bare.safetensors")
    assert told["ss_network_dim"] == "8" and told["ss_network_alpha"] == "4"
    assert told["modelspec.description"] == "preference optimization (arXiv 2406.17636)"
    assert not {"ss_sd_model_name", "ss_steps", "modelspec.resolution", "ss_seed"} & told.keys()


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_a_fused_pipeline_draws_as_base_and_lora(runs, tmp_path, kind):
    out, base, _, _ = runs[kind]
    export("--lora", out, "--fuse", "--output", tmp_path / "fused")
    with_lora, fused, without = draw(base, out / WEIGHTS), draw(tmp_path / "fused"), draw(base)
    torch.testing.assert_close(fused, with_lora, atol=1e-4, rtol=0)
    assert (fused - without).abs().max() > 1e-2
    # Only the U-Net's attention has changed; nothing is left of the LoRA, and every other file is there.
    names = {f.relative_to(base).as_posix() for f in Path(base).rglob("*") if f.is_file()}
    assert {f.relative_to(tmp_path / "fused").as_posix() for f in (tmp_path / "fused").rglob("*.*") if f.is_file()} >= {
        n for n in names if n.endswith((".safetensors", "config.json", "model_index.json"))
    }
    for part in ("unet", "vae", "text_encoder"):
        file = next(p.relative_to(base) for p in (Path(base) / part).glob("*.safetensors"))
        old, new = load_file(base / file), load_file(tmp_path / "fused" / file)
        changed = {k for k in old if not torch.equal(old[k], new[k])}
        assert old.keys() == new.keys() and all(".attn" in k and ".to_" in k for k in changed)
        assert bool(changed) == (part == "unet")


def test_the_sum_is_of_the_formula_and_rounded_once(runs, tmp_path):
    """W + alpha / rank up @ down in float64, by hand."""
    out, base, rank, alpha = runs["sd"]
    export("--lora", out, "--fuse", "--precision", "fp16", "--output", tmp_path / "half")
    new = load_file(tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors")
    old = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")
    lora = load_file(out / WEIGHTS)
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0"
    up, down = (lora[f"unet.{layer}.lora.{part}.weight"].double() for part in ("up", "down"))
    expected = old[f"{layer}.weight"].double() + alpha / rank * up @ down
    assert {v.dtype for v in new.values()} == {torch.float16}
    # Half a unit in the last place of float16, and a little for the float32 sum before it.
    torch.testing.assert_close(new[f"{layer}.weight"].double(), expected, rtol=2**-11 + 1e-6, atol=3.1e-8)
    assert not torch.equal(new[f"{layer}.weight"], old[f"{layer}.weight"].half())
    assert DiffusionPipeline.from_pretrained(tmp_path / "half", dtype=torch.float16).unet.dtype == torch.float16


def test_fusing_twice_adds_twice():
    linear = torch.nn.ModuleDict({"to_q": torch.nn.Linear(3, 2, bias=False)})
    before = linear["to_q"].weight.detach().clone()
    state = {"to_q.lora_A.weight": torch.tensor([[1.0, 2, 3]]), "to_q.lora_B.weight": torch.tensor([[1.0], [10]])}
    for _ in range(2):
        fuse(linear, state, 0.5)
    added = torch.tensor([[1.0, 2, 3], [10, 20, 30]])  # twice alpha / rank = 0.5
    torch.testing.assert_close(linear["to_q"].weight.detach(), before + added)


def test_another_base_can_be_named(runs, tmp_path):
    out, base, _, _ = runs["sd"]
    other = tmp_path / "other"
    shutil.copytree(base, other)
    unet = UNet2DConditionModel.from_pretrained(other / "unet")
    with torch.no_grad():
        for weight in unet.parameters():
            weight.mul_(1.05)
    unet.save_pretrained(other / "unet")
    export("--lora", out, "--fuse", "--pretrained_model_name_or_path", other, "--output", tmp_path / "fused")
    torch.testing.assert_close(draw(tmp_path / "fused"), draw(other, out / WEIGHTS), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("own", "key", "value"),
    [
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, "rescale_betas_zero_snr", False),
        ({"prediction_type": "v_prediction"}, "rescale_betas_zero_snr", True),
        ({"prediction_type": "v_prediction"}, "prediction_type", "epsilon"),
        ({}, "prediction_type", "sample"),
    ],
)
def test_a_fused_pipeline_has_the_schedule_that_training_saw(tmp_path, own, key, value):
    base = save_pipeline(tmp_path / "base", **own)
    stated = {"revision": None, "variant": None, "single_file_config": None, **dict.fromkeys(STATED)}
    settings = {"pretrained_model_name_or_path": str(base), **stated}
    untouched = fused_pipeline(SimpleNamespace(**settings), {}, 1.0, torch.float32).scheduler
    assert type(untouched).__name__ == "DDPMScheduler"  # the base's own
    seen = fused_pipeline(SimpleNamespace(**{**settings, key: value}), {}, 1.0, torch.float32).scheduler.config
    assert seen[key] == value


# ---------------------------------------------------------------- what it refuses


def _without_lora(folder: Path, out: Path, base: Path) -> list[object]:
    (folder / "empty").mkdir()
    return ["--lora", folder / "empty"]


def _unfinished(folder: Path, out: Path, base: Path) -> list[object]:
    shutil.copytree(out / "checkpoint-2", folder / "run" / "checkpoint-2")
    shutil.copytree(out / "checkpoint-2", folder / "run" / "checkpoint-10")
    return ["--lora", folder / "run"]


def _damaged(folder: Path, out: Path, base: Path) -> list[object]:
    shutil.copytree(out / "checkpoint-2", folder / "run" / "checkpoint-2")
    file = folder / "run" / "checkpoint-2" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    return ["--lora", file.parent]


def _of(content):
    def build(folder: Path, out: Path, base: Path) -> list[object]:
        (folder / "run").mkdir()
        if isinstance(content, bytes):
            (folder / "run" / WEIGHTS).write_bytes(content)
        else:
            tensors, told = content
            note = {"lora_adapter_metadata": json.dumps(told)}
            save_file(tensors, folder / "run" / WEIGHTS, {"format": "pt", **note})
        return ["--lora", folder / "run"]

    return build


def _smaller_base(folder: Path, out: Path, base: Path) -> list[object]:
    config = json.loads((base / "unet" / "config.json").read_text())
    shutil.copytree(base, folder / "small")
    (folder / "small" / "unet" / "config.json").write_text(json.dumps(config | {"cross_attention_dim": 48}))
    return ["--lora", out, "--fuse", "--pretrained_model_name_or_path", folder / "small"]


def _base_without_the_layer(folder: Path, out: Path, base: Path) -> list[object]:
    config = json.loads((base / "unet" / "config.json").read_text())
    config["down_block_types"] = ["DownBlock2D", *config["down_block_types"][1:]]
    shutil.copytree(base, folder / "other")
    (folder / "other" / "unet" / "config.json").write_text(json.dumps(config))
    return ["--lora", out, "--fuse", "--pretrained_model_name_or_path", folder / "other"]


def _base_of_another_kind(folder: Path, out: Path, base: Path) -> list[object]:
    shutil.copytree(base, folder / "flux")
    (folder / "flux" / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    return ["--lora", out, "--fuse", "--pretrained_model_name_or_path", folder / "flux"]


def _full_folder(folder: Path, out: Path, base: Path) -> list[object]:
    (folder / "there").mkdir()
    (folder / "there" / "thesis.txt").write_text("two years")
    return ["--lora", out, "--fuse", "--output", folder / "there"]


LAYER = "unet.down_blocks.0.attn1.to_q.lora"
PAIR = {f"{LAYER}.down.weight": torch.ones(2, 4), f"{LAYER}.up.weight": torch.ones(4, 2)}
REFUSED = {
    "no folder": (lambda f, out, base: ["--lora", f / "none"], "lora: no such folder: "),
    "no lora": (lambda f, out, base: [], "'lora' is missing"),
    "an empty folder": (_without_lora, f"no {WEIGHTS} in "),
    "an unfinished run": (_unfinished, "has not finished, but there is .*checkpoint-10$"),
    "a damaged checkpoint": (_damaged, f"{WEIGHTS} is damaged"),
    "no safetensors": (_of(b"nothing"), "not a readable safetensors file"),
    "no layer": (_of(({}, {})), "not a LoRA in diffusers' format"),
    "half a layer": (_of(({f"{LAYER}.down.weight": torch.ones(2, 4)}, {})), "half of a layer: .*lora_B"),
    "a text encoder's": (
        _of(({**PAIR, "text_encoder.q.lora.up.weight": torch.ones(4, 2)}, {})),
        "text_encoder.q.lora.up.weight is no LoRA weight of a U-Net's linear layer",
    ),
    "two ranks": (
        _of(({**PAIR, f"{LAYER.replace('to_q', 'to_k')}.down.weight": torch.ones(3, 4),
              f"{LAYER.replace('to_q', 'to_k')}.up.weight": torch.ones(4, 3)}, {})),
        "expected one rank and one alpha for all layers",
    ),
    "DoRA": (_of((PAIR, {"unet.use_dora": True})), "one alpha for all layers, not use_dora"),
    "rank-stabilised": (_of((PAIR, {"unet.use_rslora": True})), "not use_rslora"),
    "a suffix": (lambda f, out, base: ["--lora", out, "--output", f / "x.ckpt"], r"x.ckpt is no \.safetensors file"),
    "the lora itself": (lambda f, out, base: ["--lora", out, "--output", out / WEIGHTS], "is the LoRA itself"),
    "a full folder": (_full_folder, "there is not empty; choose another folder"),
    "a file for a folder": (lambda f, out, base: ["--lora", out, "--fuse", "--output", out / WEIGHTS], "is not empty"),
    "no base": (_of((PAIR, {})), "fuse needs pretrained_model_name_or_path"),
    "a base that is not there": (
        lambda f, out, base: ["--lora", out, "--fuse", "--pretrained_model_name_or_path", f / "none"],
        "no such model file or folder",
    ),
    "a base of other size": (_smaller_base, r"attn2.to_k is 32 x 48, and the LoRA is for 32 x 32; another base"),
    "a base without the layer": (_base_without_the_layer, "its unet has no down_blocks.0.attentions.0"),
    "a base of another kind": (_base_of_another_kind, "a FluxPipeline; expected StableDiffusionPipeline or"),
    "a precision": (lambda f, out, base: ["--lora", out, "--precision", "half"], "expected one of: fp32, fp16, bf16"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(runs, tmp_path, monkeypatch, case):
    out, base, _, _ = runs["sd"]
    build, message = REFUSED[case]
    arguments = build(tmp_path, out, Path(base)) + (["--fuse"] if case == "no base" else [])
    if "--fuse" in arguments and "--output" not in arguments:
        arguments += ["--output", tmp_path / "fused"]
    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    before = {p: p.stat().st_mtime_ns for folder in (tmp_path, out) for p in folder.rglob("*")}
    with pytest.raises(UserError, match=message) as refusal:
        export(*arguments)
    assert "\n" not in str(refusal.value)
    assert {p: p.stat().st_mtime_ns for folder in (tmp_path, out) for p in folder.rglob("*")} == before


def test_a_write_that_fails_leaves_what_was_there(runs, tmp_path, monkeypatch):
    out = runs["sd"][0]
    (tmp_path / "x.safetensors").write_text("older")

    def full(pipe, folder):
        folder.mkdir()
        (folder / "half").write_text("")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_lora, "save_pipeline", full)
    with pytest.raises(UserError, match=r"output: cannot write .*fused \(No space left on device\)"):
        export("--lora", out, "--fuse", "--output", tmp_path / "fused")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"output: cannot write .*x\.safetensors"):
        export("--lora", out, "--output", tmp_path / "file" / "x.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "x.safetensors"]
    assert (tmp_path / "x.safetensors").read_text() == "older"


def test_the_program_is_called_as_documented(runs, tmp_path):
    out = runs["xl"][0]
    done = python("export_lora.py", "--lora", out, "--output", tmp_path / "x.safetensors", "--precision", "bf16")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.startswith(f"wrote {tmp_path / 'x.safetensors'} (") and "rank 4, alpha 4, bf16" in done.stdout


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc to name what is synced")
def test_a_fused_pipeline_is_on_the_disk_before_it_has_its_name(runs, tmp_path, monkeypatch):
    """Its weights lie in folders within the folder."""
    synced, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda n: (synced.append(os.readlink(f"/proc/self/fd/{n}")), fsync(n)))
    monkeypatch.setattr(files.os, "replace", lambda *pair: (synced.append("replace"), replace(*pair)))
    export("--lora", runs["sd"][0], "--fuse", "--output", tmp_path / "fused")
    before = synced[: synced.index("replace")]
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "fused" / weights).is_file() and str(tmp_path / ".fused.tmp" / weights) in before
