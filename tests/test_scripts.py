"""The real scripts, launched on real files: what they write, what they refuse, and that every option runs."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from pipelines import SIDE, jpeg, save_dataset
from runs import SCRIPTS, arguments, assert_same_weights, launch, loaded, refusal, run_here, weights
from safetensors.torch import save_file
from support import torchrun

import ncp.training.run
import train_ncp_dpo
from ncp.common.config import parse
from ncp.common.files import sha256
from ncp.training.checkpoints import read_manifest
from ncp.training.weights import WEIGHTS, lora_state

# ---------------------------------------------------------------- what a run leaves


@pytest.mark.parametrize("model", ["sd", "xl"])
def test_only_lora_weights_change_and_they_are_finite(assets, tmp_path, model):
    run = run_here("dpo", arguments(assets, tmp_path / "out", model=model))
    m, on_disk = run.models, UNet2DConditionModel.from_pretrained(assets / model, subfolder="unet")
    for (name, before), after in zip(on_disk.named_parameters(), m.reference.parameters(), strict=True):
        assert torch.equal(before, after), name
    lora = lora_state(m.unet)
    assert lora and all(v.dtype == torch.float32 and v.isfinite().all() for v in lora.values())
    # B starts at zero: whatever is there now was learned.
    assert all(v.abs().max() > 0 for k, v in lora.items() if "lora_B" in k)
    trainable = {n for n, p in m.unet.named_parameters() if p.requires_grad}
    assert all("lora" in n for n in trainable) and len(trainable) == len(lora)


@pytest.mark.parametrize("model", ["sd", "xl"])
def test_lora_loads_into_an_untouched_pipeline_and_draws_the_same(assets, tmp_path, model):
    argv = arguments(assets, tmp_path / "out", "--lora_alpha", "32", "--learning_rate", "1e-2", model=model)
    m = run_here("dpo", argv).models
    settings = {"height": SIDE, "width": SIDE, "num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "np"}

    def picture(pipe) -> torch.Tensor:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        return torch.from_numpy(pipe("a prompt", generator=torch.Generator().manual_seed(0), **settings).images)

    pipe = DiffusionPipeline.from_pretrained(assets / model)
    base = picture(pipe)
    pipe.load_lora_weights(tmp_path / "out")
    loaded = picture(pipe)
    pipe.unload_lora_weights()
    pipe.register_modules(unet=m.unet)
    # alpha 32 with rank 64 only survives through the metadata.
    torch.testing.assert_close(loaded, picture(pipe), atol=1e-4, rtol=0)
    assert (loaded - base).abs().max() > 1e-3


def test_the_output_folder_of_a_launched_run(assets, tmp_path):
    out = tmp_path / "out"
    extra = ["--validation_prompts", "[one, two]", "--validation_num_inference_steps", "2", "--validation_steps", "1"]
    argv = arguments(assets, out, *extra, "--report_to", "tensorboard", "--checkpointing_steps", "1")
    done = launch(
        "train_ncp_dpo.py", argv, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu.yaml"
    )
    assert done.returncode == 0, done.stderr
    for text in (
        "effective batch: 2 pairs",
        "learning rate: 0.001",
        "beta 2500",
        "5000",
        "12 decisive pairs",
        str(out),
    ):
        assert text in done.stdout
    assert "Warning" not in done.stderr and "kernels" not in done.stderr  # a clean first screen
    names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert {"pytorch_lora_weights.safetensors", "config.yaml", "environment.yaml", "README.md"} <= names
    assert {"validation/step-000001.png", "validation/step-000002.png"} <= names
    assert {"checkpoint-1/manifest.json", "checkpoint-2/manifest.json"} <= names
    assert any("tfevents" in n for n in names)
    card = (out / "README.md").read_text()
    for text in (f"base_model: {assets / 'sd'}", "NCP-DPO", "load_lora_weights", "4 (2 steps of 2)", "step-000002.png"):
        assert text in card
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(out.glob("logs/ncp"))))
    events.Reload()
    logged = {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for tag in ("loss", "reward_w", "reward_l", "margin", "accuracy", "abs_logit", "winner_drift", "grad_norm",
                "samples_per_second", "peak_memory_gib", "learning_rate"):  # fmt: skip
        assert len(logged[tag]) == 2, tag
    # The first step starts at the reference: log 2, no margin.
    assert logged["loss"][0] == pytest.approx(0.693147, abs=1e-6) and logged["margin"][0] == 0
    assert "validation" in events.Tags()["images"]


def test_another_vae_is_used(assets, tmp_path):
    shutil.copytree(assets / "sd" / "vae", tmp_path / "vae")
    config = tmp_path / "vae" / "config.json"
    config.write_text(config.read_text().replace('"scaling_factor": 0.5', '"scaling_factor": 0.25'))
    extra = ["--pretrained_vae_model_name_or_path", str(tmp_path / "vae")]
    m = run_here("sft", arguments(assets, tmp_path / "out", *extra)).models
    assert m.pipe.vae.config.scaling_factor == 0.25


@pytest.mark.parametrize("private", [True, False])
def test_push_to_hub_uploads_what_a_reader_needs(assets, tmp_path, monkeypatch, private):
    import huggingface_hub

    calls = {}
    reply = type("Repo", (), {"repo_id": "me/mine"})
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, **kw: calls.update(name=name, **kw) or reply)
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **kw: calls.update(kw))
    extra = [] if private else ["--hub_private_repo", "false"]
    run_here("sft", arguments(assets, tmp_path / "out", "--push_to_hub", "--hub_model_id", "me/mine", *extra))
    assert calls["name"] == calls["repo_id"] == "me/mine" and calls["private"] is private
    assert calls["folder_path"] == tmp_path / "out"
    wanted = {"pytorch_lora_weights.safetensors", "README.md", "config.yaml", "environment.yaml"}
    assert wanted <= set(calls["allow_patterns"])
    assert 'load_lora_weights("me/mine")' in (tmp_path / "out" / "README.md").read_text()


# ---------------------------------------------------------------- one run, many ways to it


@pytest.mark.parametrize("kind", SCRIPTS)
def test_resuming_gives_the_weights_of_the_uninterrupted_run(assets, tmp_path, kind):
    extra = [
        "--max_train_steps",
        "4",
        "--checkpointing_steps",
        "2",
        "--gradient_accumulation_steps",
        "2",
        "--use_ema",
        "true",
    ]
    run_here(kind, arguments(assets, tmp_path / "whole", *extra))
    part = tmp_path / "part"
    part.mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", part / "checkpoint-2")
    (part / "checkpoint-3").mkdir()  # what a crash might leave
    run_here(kind, arguments(assets, part, *extra, "--resume_from_checkpoint", "latest"))
    assert_same_weights(tmp_path / "whole", part)


def test_eight_bit_state_is_in_use_and_in_the_checkpoint(assets, tmp_path):
    run_here("dpo", arguments(assets, tmp_path / "out"))
    state = torch.load(tmp_path / "out" / "checkpoint-2" / "optimizer.pt", weights_only=True)

    def moments(tree):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from moments(value)
            elif key == "state1":
                yield value.dtype

    assert torch.uint8 in set(moments(state["optimizer"]["state"]))


def test_two_processes_and_another_split_give_the_same_run(assets, tmp_path):
    # AdamW moves a weight by lr whatever its gradient's size: with a small epsilon, summation noise would show.
    extra = ["--use_8bit_adam", "false", "--adam_epsilon", "1e-3", "--max_train_steps", "3", "--learning_rate", "1e-2"]
    run_here("dpo", arguments(assets, tmp_path / "one", *extra, "--train_batch_size", "4"))
    split = ["--train_batch_size", "1", "--gradient_accumulation_steps", "2"]
    argv = arguments(assets, tmp_path / "two", *extra, *split)
    done = launch("train_ncp_dpo.py", argv, *torchrun(2), ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    assert "1 x 2 accumulation x 2 processes" in done.stdout
    one, other = (weights(tmp_path / n) for n in ("one", "two"))
    moved = {k: (one[k].abs().max()) for k in one if "lora_B" in k or "lora.up" in k}
    for k in moved:
        assert (one[k] - other[k]).abs().max() < 1e-3 * max(moved.values()), k


@pytest.mark.parametrize("kind", SCRIPTS)
@pytest.mark.parametrize("model", ["sd", "xl"])
def test_gradient_checkpointing_leaves_the_gradients_alone(assets, tmp_path, kind, model):
    gradients = []
    for checkpointing in ("false", "true"):
        config = parse(
            SCRIPTS[kind].Config, arguments(assets, tmp_path, "--gradient_checkpointing", checkpointing, model=model)
        )
        m, batch = loaded(config, images=1 if kind == "sft" else 2)
        for name, p in m.unet.named_parameters():
            if "lora_B" in name:  # zero at the start, where lora_A would have no gradient
                torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(0))
        losses, _ = getattr(SCRIPTS[kind], f"ncp_{kind}")(m, m.unet, batch, config)
        losses.mean().backward()
        gradients.append({n: p.grad for n, p in m.unet.named_parameters() if p.requires_grad})
    for name, plain in gradients[0].items():
        assert plain.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], plain, rtol=1e-4, atol=1e-6 * float(plain.abs().max()))


# ---------------------------------------------------------------- what they refuse


def altered(assets: Path, tmp: Path, file: str, old: str, new: str) -> list[str]:
    """Arguments for a copy of the SD pipeline with one text in one of its files replaced."""
    shutil.copytree(assets / "sd", tmp / "m")
    text = (tmp / "m" / file).read_text()
    assert old in text
    (tmp / "m" / file).write_text(text.replace(old, new))
    return ["--pretrained_model_name_or_path", str(tmp / "m")]


def dataset(tmp: Path, **columns) -> list[str]:
    return ["--dataset_name", str(save_dataset(tmp / "d.parquet", **columns))]


SCHEDULER = "scheduler/scheduler_config.json"
BAD = {
    "unknown key": (lambda a, t: ["--train_batchsize", "2"], "did you mean --train_batch_size?"),
    "wrong type": (lambda a, t: ["--rank", "many"], "--rank is 'many'; expected an integer"),
    "out of range": (lambda a, t: ["--proportion_empty_prompts", "2"], "expected at most 1"),
    "no model": (lambda a, t: ["--pretrained_model_name_or_path", str(t / "none")], "no such model file or folder"),
    "not a pipeline": (lambda a, t: ["--pretrained_model_name_or_path", str(a)], "model_index.json is missing"),
    "no dataset": (lambda a, t: ["--dataset_name", str(t / "none")], "no such file or folder"),
    "empty dataset": (lambda a, t: ["--dataset_name", str(a / "sd")], "no parquet files in"),
    "no column": (lambda a, t: dataset(t, label_1=None), "d.parquet: column label_1 is missing"),
    "only ties": (
        lambda a, t: dataset(t, label_0=[0.5] * 12, label_1=[0.5] * 12),
        "not a single decisive pair among 12 rows (12 ties)",
    ),
    "corrupt image": (lambda a, t: dataset(t, jpg_0=[jpeg(0)[:50]] * 12), "unreadable image"),
    "not parquet": (lambda a, t: ["--dataset_name", str(junk(t / "d.parquet"))], "not a readable parquet file"),
    "unrelated output": (lambda a, t: ["--output_dir", str(junk(t / "old" / "thesis.txt").parent)], "is not empty"),
    "nothing to resume": (lambda a, t: ["--resume_from_checkpoint", "latest"], "no valid checkpoint in"),
    "no such checkpoint": (lambda a, t: ["--resume_from_checkpoint", str(t / "c-5")], "no such checkpoint folder"),
    "batch arithmetic": (
        lambda a, t: ["--effective_batch_size", "100"],
        "train_batch_size 2 x gradient_accumulation_steps 1",
    ),
    "resolution": (lambda a, t: ["--resolution", "33"], "needs a multiple of 2"),
    "block": (lambda a, t: ["--encoder_blocks", "7"], "encoder block '7'"),
    "fp16 without a GPU": (lambda a, t: ["--mixed_precision", "fp16"], "needs a GPU"),
    "tracker": (lambda a, t: ["--report_to", "notebook"], "report_to is 'notebook'"),
    "tracker that is not installed": (lambda a, t: ["--report_to", "swanlab"], "which is not installed"),
    "another prediction": (
        lambda a, t: altered(a, t, SCHEDULER, '"prediction_type": "epsilon"', '"prediction_type": "flow"'),
        "prediction_type 'flow'; expected one of: epsilon, v_prediction, sample",
    ),
    "zero terminal SNR": (
        lambda a, t: altered(a, t, SCHEDULER, '"rescale_betas_zero_snr": false', '"rescale_betas_zero_snr": true'),
        "zero terminal SNR",
    ),
    "learned variance": (
        lambda a, t: altered(a, t, SCHEDULER, '"fixed_small"', '"learned_range"'),
        "variance_type 'learned_range'",
    ),
    "not a U-Net": (
        lambda a, t: altered(a, t, "model_index.json", "UNet2DConditionModel", "UNetMotionModel"),
        "the denoiser is a UNetMotionModel",
    ),
    "inpainting": (
        lambda a, t: altered(a, t, "unet/config.json", '"in_channels": 4', '"in_channels": 9'),
        "takes 9 channels",
    ),
    "an unknown file of the model": (
        lambda a, t: altered(a, t, SCHEDULER, "{", "["),
        "scheduler_config.json: not readable as JSON",
    ),
}


def junk(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("not what was expected")
    return file


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_before_any_model_loads(assets, tmp_path, monkeypatch, capsys, case):
    build, message = BAD[case]
    argv = [*arguments(assets, tmp_path / "out"), *build(assets, tmp_path)]
    if case != "corrupt image":  # which only a run can meet
        monkeypatch.setattr(ncp.training.run, "load_models", lambda *_: pytest.fail("a model was loaded first"))
    before = sorted(tmp_path.rglob("*"))
    said = refusal(train_ncp_dpo.main, argv, capsys)
    assert message in next(line for line in said.splitlines() if line.startswith("error: "))
    if case != "corrupt image":
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_launched_script_says_it_in_one_line(assets, tmp_path, kind):
    done = launch(f"train_ncp_{kind}.py", arguments(assets, tmp_path / "out", "--lerning_rate", "1"))
    assert done.returncode == 2
    assert done.stderr == "error: command line: unknown argument --lerning_rate; did you mean --learning_rate?\n"


@pytest.mark.parametrize("key", ["pretrained_model_name_or_path", "dataset_name"])
def test_a_hub_that_does_not_answer_is_said_in_one_line(assets, tmp_path, key):
    argv = arguments(assets, tmp_path / "out", f"--{key}", "someone/something")
    done = launch("train_ncp_dpo.py", argv, HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "someone/something" in done.stderr and "Traceback" not in done.stderr


def test_a_malicious_pickle_is_not_run(assets, tmp_path):
    run_here("dpo", arguments(assets, tmp_path / "out"))
    checkpoint = tmp_path / "out" / "checkpoint-2"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    torch.save({"optimizer": Evil()}, checkpoint / "optimizer.pt")
    manifest = read_manifest(checkpoint)
    file = checkpoint / "optimizer.pt"
    manifest["files"]["optimizer.pt"] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    argv = arguments(assets, tmp_path / "out", "--resume_from_checkpoint", "latest", "--max_train_steps", "3")
    with pytest.raises(Exception, match=r"[Ww]eights"):
        run_here("dpo", argv)
    assert not (tmp_path / "pwned").exists()


def test_a_resumed_lora_file_is_checked(assets, tmp_path):
    run = launch("train_ncp_sft.py", arguments(assets, tmp_path / "out", "--checkpointing_steps", "1"))
    assert run.returncode == 0, run.stderr
    save_file({"x": torch.zeros(1)}, tmp_path / "out" / "checkpoint-2" / WEIGHTS)
    argv = arguments(assets, tmp_path / "out", "--resume_from_checkpoint", "latest", "--max_train_steps", "3")
    again = launch("train_ncp_sft.py", argv)
    assert again.returncode == 0
    assert "skipping" in again.stderr and "pytorch_lora_weights.safetensors is damaged" in again.stderr
    assert "steps: 1 to 3" in again.stdout
