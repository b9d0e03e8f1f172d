"""Everything that may lie on the hub, through huggingface_hub itself, against repositories laid out as real ones.

The ids of models and judges are those of the shipped configs; sizes are tiny. What goes wrong there is one line and
exit status 2.
"""

import json
import math
import shutil
from datetime import datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from fake_hub import TOKEN, FakeHub, run_scripts
from judges import DIMENSION, LAYERS, PATCH, VOCABULARY, WIDTH, open_clip_state, save_processor
from pipelines import SIDE, save_dataset, save_pipeline
from transformers import CLIPConfig, CLIPModel

SDXL, VAE = "stabilityai/stable-diffusion-xl-base-1.0", "madebyollin/sdxl-vae-fp16-fix"  # of configs/sdxl_*.yaml
PICKSCORE, CLIP = "yuvalkirstain/PickScore_v1", "openai/clip-vit-large-patch14"
JUNK = b"not what was asked for"
UPLOAD = {"push_to_hub": "true", "hub_model_id": "me/other"}
DATASETS_SAY_GATED = "Dataset 'me/pickapic' is a gated dataset on the Hub. You must be authenticated to access it."


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    with FakeHub() as hub:
        # Real pipelines hold single-file checkpoints, other variants and other formats beside what is read.
        extra = {"README.md": b"---\nlicense: other\n---\n", "unet/diffusion_pytorch_model.fp16.safetensors": JUNK}
        extra |= {"text_encoder/model.fp16.safetensors": JUNK, "vae/diffusion_pytorch_model.fp16.safetensors": JUNK}
        xl = tree(save_pipeline(folder / "xl", xl=True))
        hub.add("models", SDXL, {**xl, **extra, "sd_xl_base_1.0.safetensors": JUNK, "vae_1_0/config.json": b"{}"})
        sd = tree(save_pipeline(folder / "sd"))
        hub.add("models", "me/sd", {"README.md": b"empty for now"})
        hub.add("models", "me/sd", {**sd, **extra, "v1-5-pruned.ckpt": JUNK}, revision="v1.5")
        # A VAE repository has its config.json at the root, and no model_index.json.
        vae = tree(folder / "xl" / "vae")
        config = {**json.loads(vae["config.json"]), "force_upcast": False}
        files = {"README.md": b"---\nlicense: mit\n---\n", "sdxl_vae.safetensors": JUNK, "sdxl.vae.safetensors": JUNK}
        hub.add("models", VAE, {**vae, **files, "config.json": json.dumps(config).encode()})
        add_data(hub, folder)
        add_judges(hub, folder)
        yield hub


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def add_data(hub: FakeHub, folder: Path) -> None:
    """Pick-a-Pic's layout, and prompts."""
    files = {"README.md": b"---\nlicense: mit\n---\n"}
    for name, rows in {
        "train-00000-of-00002": 8,
        "train-00001-of-00002": 12,
        "validation_unique-00000-of-00001": 3,
    }.items():
        file = save_dataset(folder / f"{name}.parquet", rows=rows, created_at=[datetime(2023, 1, 1)] * rows)
        files[f"data/{name}-0123456789abcdef.parquet"] = file.read_bytes()
    hub.add("datasets", "me/pickapic", {"README.md": b"soon"})
    hub.add("datasets", "me/pickapic", files, revision="v2")
    hub.add("datasets", "me/pickapic", files)
    hub.add("datasets", "me/prompts", {"benchmark/anime.json": b'["a cat", "a dog"]', "benchmark/photo.json": b'["a"]',
                                       "images/1.png": JUNK})  # fmt: skip


def add_judges(hub: FakeHub, folder: Path) -> None:
    """Small random models at the published ids."""
    torch.manual_seed(0)
    tower = {"hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    text = {**tower, "vocab_size": VOCABULARY, "max_position_embeddings": 77, "eos_token_id": 2}
    vision = {**tower, "image_size": SIDE, "patch_size": PATCH}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=DIMENSION))
    model.logit_scale.data.fill_(math.log(50))
    model.save_pretrained(folder / "clip")
    save_processor(folder / "processor")
    torch.save({"state_dict": open_clip_state()}, folder / "hps.pt")
    clip, processor, hps = tree(folder / "clip"), tree(folder / "processor"), (folder / "hps.pt").read_bytes()
    hub.add("models", PICKSCORE, clip)
    hub.add("models", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", {**processor, "open_clip_pytorch_model.bin": JUNK})
    hub.add("models", CLIP, {**clip, **processor, "tf_model.h5": JUNK})
    hub.add("models", "xswu/HPSv2", {"README.md": b"", "HPS_v2_compressed.pt": hps, "HPS_v2.1_compressed.pt": hps})


def arguments(output: Path, **changes: object) -> list[str]:
    """A step of training, on what the hub holds, of the SDXL config as it is shipped."""
    settings = {
        "config": "configs/sdxl_ncp_dpo.yaml", "dataset_name": "me/pickapic", "output_dir": output,
        "resolution": SIDE, "mixed_precision": "no", "train_batch_size": 2, "gradient_accumulation_steps": 1,
        "effective_batch_size": "null", "max_train_steps": 1, "lr_warmup_steps": 0, "heldout_pairs": 2,
        "dataloader_num_workers": 0,
        "report_to": "none", "validation_num_inference_steps": 2, "rank": 4, **changes,
    }  # fmt: skip
    return [str(a) for k, v in settings.items() if v is not None for a in (f"--{k}", v)]


def evaluation(output: Path, **changes: object) -> list[str]:
    settings = {
        "pretrained_model_name_or_path": SDXL, "pretrained_vae_model_name_or_path": VAE, "models": "base",
        "prompts": "me/prompts", "prompts_files": "benchmark/*.json", "output_dir": output, "max_prompts": 2,
        "num_inference_steps": 2, "resolution": SIDE, "mixed_precision": "no", "scorers": "pickscore", **changes,
    }  # fmt: skip
    return [str(a) for k, v in settings.items() if v is not None for a in (f"--{k}", v)]


def test_every_path_through_the_hub(hub, tmp_path):
    """Filter, train from a shipped SDXL config, upload, evaluate the upload, judge; SD with a revision and a cache."""
    hub.faults[SDXL, "unet/diffusion_pytorch_model.safetensors"] = "cut once"  # the client goes on where it was cut
    sd = {"config": None, "pretrained_model_name_or_path": "me/sd", "pretrained_vae_model_name_or_path": VAE}
    sd |= {"revision": "v1.5", "cached_latents": tmp_path / "cache"}
    xl = {"push_to_hub": "true", "hub_model_id": "me/mine", "checkpointing_steps": 1}
    judged = {"models": "[base, mine=me/mine]", "scorers": "[pickscore, hpsv2, hpsv2.1, clip]"}
    jobs = {
        "filter": ("filter_pickapic.py", ["--dataset_name", "me/pickapic", "--revision", "v2", "--output_dir",
                                          tmp_path / "filtered"]),
        "train": ("train_ncp_dpo.py", arguments(tmp_path / "xl", **xl)),
        "cache": ("cache_latents.py", arguments(tmp_path / "sd", **sd)),
        "cached": ("train_ncp_dpo.py", arguments(tmp_path / "sd", **sd)),
        "generate": ("evaluate.py", ["generate", *evaluation(tmp_path / "eval", **judged)]),
        "score": ("evaluate.py", ["score", *evaluation(tmp_path / "eval", **judged)]),
    }  # fmt: skip
    results = run_scripts(jobs, hub.environment(tmp_path / "home", TOKEN))
    for name, (status, _, err) in results.items():
        assert status == 0 and "error" not in err.lower(), (name, err)

    assert not hub.unanswered, hub.unanswered
    assert not hub.faults  # the connection was cut, once
    downloads = [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    read = {path.split("/resolve/")[1].partition("/")[2] for path in downloads}
    assert not [f for f in read if "fp16" in f or f.endswith((".ckpt", ".h5", ".png", ".bin"))]
    assert not {"sd_xl_base_1.0.safetensors", "sdxl_vae.safetensors"} & read
    asked = {path for _, path in hub.requests if path.startswith(f"/{VAE}/resolve/")}
    assert asked and all(path.startswith(f"/{VAE}/resolve/main/") or "v1.5" not in path for path in asked)
    assert not [path for path in asked if path.endswith("model_index.json")]

    commits = {name: hub.revisions["models", name] for name in (SDXL, VAE, "me/sd")}
    inputs = json.loads((tmp_path / "xl" / "checkpoint-1" / "manifest.json").read_text())["inputs"]
    assert inputs["unet"] == inputs["tokenizer_2"] == f"{SDXL}@{commits[SDXL]['main']}"
    assert inputs["vae"] == f"{VAE}@{commits[VAE]['main']}"
    made = json.loads((tmp_path / "cache" / "manifest.json").read_text())["fingerprint"]
    assert made["tokenizer"] == made["text_encoder"] == f"me/sd@{commits['me/sd']['v1.5']}"
    assert made["vae"] == f"{VAE}@{commits[VAE]['main']}"  # `revision` is of the model alone

    manifest = json.loads((tmp_path / "filtered" / "manifest.json").read_text())
    assert manifest["rows"]["input"] == 20 and hub.revisions["datasets", "me/pickapic"]["v2"] in json.dumps(manifest)
    assert "20 rows in me/pickapic" in results["train"][1]

    uploaded = hub.files("models", "me/mine")
    assert {"pytorch_lora_weights.safetensors", "README.md", "config.yaml"} <= uploaded.keys()
    assert (
        uploaded["pytorch_lora_weights.safetensors"]
        == (tmp_path / "xl" / "pytorch_lora_weights.safetensors").read_bytes()
    )
    assert not [f for f in uploaded if f.startswith(("checkpoint", "logs"))]
    assert "private" in (hub.created.get("visibility"), *hub.created)  # in the words of newer and older clients
    assert [f for f in uploaded if f.startswith("validation/")]

    noted = json.loads((tmp_path / "eval" / "protocol.json").read_text())
    assert noted["models"]["mine"]["weights"] == hub.revisions["models", "me/mine"]["main"]
    assert noted["base"] == {"commit": commits[SDXL]["main"], "replacement VAE": f"{VAE}@{commits[VAE]['main']}"}
    scores = pq.read_table(tmp_path / "eval" / "scores.parquet").to_pylist()
    assert len(scores) == 2 * 2 * 4 and all(math.isfinite(r["score"]) for r in scores)
    assert {r["prompt"] for r in scores} == {"a cat", "a dog"}


# ---------------------------------------------------------------- what goes wrong


def failures(tmp: Path) -> dict[str, tuple[tuple[str, list], str, dict]]:
    """{case: ((script, arguments), what the line says, the hub's faults)}; the cases that need images come last."""

    def train(**changes: object) -> tuple[str, list]:
        own = {"pretrained_vae_model_name_or_path": None, "config": None, "pretrained_model_name_or_path": SDXL}
        return "train_ncp_sft.py", arguments(tmp / "o", **{**own, **changes})

    def select(**changes: object) -> tuple[str, list]:
        settings = {"dataset_name": "me/pickapic", "output_dir": tmp / "f", **changes}
        return "filter_pickapic.py", [a for k, v in settings.items() for a in (f"--{k}", v)]

    def draw(**changes: object) -> tuple[str, list]:
        return "evaluate.py", ["generate", *evaluation(tmp / "e", **changes)]

    def judge(name: str, **changes: object) -> tuple[str, list]:
        return "evaluate.py", ["score", *evaluation(tmp / "images", scorers=name, **changes)]

    nobody, gated, lost = "no such repository", "it is gated: accept its terms", "no connection"
    no_file, no_revision = "the repository has no such file", "no such revision"
    shard, weights = "data/train-00000-of-00002-0123456789abcdef.parquet", "unet/diffusion_pytorch_model.safetensors"
    none, vae = {"pretrained_model_name_or_path": "me/none"}, {"pretrained_vae_model_name_or_path": VAE}
    no_vae, not_vae = ({"pretrained_vae_model_name_or_path": name} for name in ("me/none", "me/sd"))

    def lacks(name: str, file: str, reason: str) -> str:
        return f"model '{name}' is no local folder, and the hub gave no {file}: {reason}"

    index, config = "model_index.json", "config.json"
    data, filtered = "dataset_name: 'me/{}' is no local folder, and loading it failed: ", "the hub gave no such dataset"
    loading, drawing = f"model '{SDXL}': loading it failed: ", "is no local folder; the hub gave no model_index.json: "
    prompts = "prompts: 'me/{}' is no local file or folder, and the hub did not give it: "
    pickscore = "scorer 'pickscore': loading {} and laion/CLIP-ViT-H-14-laion2B-s32B-b79K failed: "
    return {
        "model: no repository": (train(**none), lacks("me/none", index, nobody), {}),
        "model: no revision": (train(revision="v3"), lacks(SDXL, index, no_revision), {}),
        "model: no file": (train(), lacks(SDXL, f"unet/{config}", no_file), {(SDXL, f"unet/{config}"): "missing"}),
        "model: gated": (train(), lacks(SDXL, index, gated), {(SDXL, "*"): "gated"}),
        "model: connection": (train(), lacks(SDXL, index, lost), {(SDXL, index): "drop"}),
        "model: no weights": (train(), loading, {(SDXL, weights): "missing"}),
        "model: weights cut": (train(), loading + lost, {(SDXL, weights): "cut"}),
        "VAE: no repository": (train(**no_vae), lacks("me/none", config, nobody), {}),
        "VAE: something else": (train(**not_vae), lacks("me/sd", config, no_file), {}),
        "VAE: gated": (train(**vae), lacks(VAE, config, gated), {(VAE, "*"): "gated"}),
        "VAE: connection": (train(**vae), lacks(VAE, config, lost), {(VAE, "*"): "drop"}),
        "data: no repository": (
            train(dataset_name="me/none"),
            data.format("none") + "Dataset 'me/none' doesn't exist",
            {},
        ),
        "data: gated": (train(), data.format("pickapic") + DATASETS_SAY_GATED, {("me/pickapic", "*"): "gated"}),
        "data: connection": (train(), data.format("pickapic") + lost, {("me/pickapic", shard): "drop"}),
        "upload: no token": (train(**UPLOAD), "push_to_hub: the hub did not take 'me/other': access denied (401)", {}),
        "filter: no repository": (select(dataset_name="me/none"), f"{filtered} ({nobody}", {}),
        "filter: no revision": (select(revision="v3"), f"{filtered} ({no_revision})", {}),
        "filter: gated": (select(), f"{filtered} ({gated}", {("me/pickapic", "*"): "gated"}),
        "filter: connection": (
            select(),
            f"{shard}: not a readable parquet file ({lost}",
            {("me/pickapic", shard): "drop"},
        ),
        "evaluation: no base": (draw(**none), f"model 'base': me/none {drawing}{nobody}", {}),
        "evaluation: no revision": (draw(revision="v3"), f"model 'base': {SDXL} {drawing}{no_revision}", {}),
        "evaluation: no such LoRA": (draw(models="[base, x=me/none]"), f"model 'x': me/none {drawing}{nobody}", {}),
        "evaluation: a judge": (draw(models="x=xswu/HPSv2"), "model 'x': the hub's xswu/HPSv2 holds neither a", {}),
        "evaluation: gated": (draw(models="x=me/sd"), f"model 'x': me/sd {drawing}{gated}", {("me/sd", "*"): "gated"}),
        "evaluation: no VAE": (draw(**no_vae), lacks("me/none", config, nobody), {}),
        "prompts: no repository": (draw(prompts="me/none"), prompts.format("none") + nobody, {}),
        "prompts: no file": (draw(prompts_files="no/*.json"), "files that match no/*.json in me/prompts", {}),
        "prompts: gated": (draw(), prompts.format("prompts") + gated, {("me/prompts", "*"): "gated"}),
        "prompts: connection": (draw(), lost, {("me/prompts", "benchmark/anime.json"): "drop"}),
        "images": (("evaluate.py", ["generate", *evaluation(tmp / "images")]), "", {}),
        "judge: no repository": (
            judge("pickscore", pickscore_model="me/none"),
            pickscore.format("me/none") + nobody,
            {},
        ),
        "judge: gated": (judge("pickscore"), pickscore.format(PICKSCORE) + gated, {(PICKSCORE, "*"): "gated"}),
        "judge: no file": (judge("hpsv2"), f"failed: {no_file}", {("xswu/HPSv2", "HPS_v2_compressed.pt"): "missing"}),
        "judge: connection": (judge("clip"), f"scorer 'clip': loading {CLIP} failed: {lost}", {(CLIP, "*"): "drop"}),
    }


def test_what_goes_wrong_at_the_hub_is_one_line(hub, tmp_path):
    """Nothing is in the client's local cache, and an output folder is begun only for what a run alone can meet."""
    cases, home, begun = failures(tmp_path), tmp_path / "home", {}

    def before(name: str) -> None:
        hub.faults = dict(cases[name][2])
        begun[name] = [f for f in (tmp_path / "o", tmp_path / "e", tmp_path / "f") if f.exists()]  # by the one before
        for left in (home, *begun[name]):
            shutil.rmtree(left, ignore_errors=True)

    try:
        results = run_scripts({name: case[0] for name, case in cases.items()}, hub.environment(home), before)
    finally:
        hub.faults = {}
    status, _, err = results.pop("images")
    assert status == 0, err
    wrong = {}
    for name, (status, _, err) in results.items():
        line, expected = (err.strip().splitlines() or [""])[-1], cases[name][1]
        good = status == 2 and line.startswith("error: ") and expected in line and len(line) < 400
        if not good or "Traceback" in err or err.count("error: ") != 1:
            wrong[name] = (status, expected, err)
    assert not wrong, "\n".join(map(str, wrong.items()))
    names = list(cases)
    assert {names[i - 1] for i, name in enumerate(names) if begun[name]} == {
        "model: no weights", "model: weights cut", "upload: no token"
    }  # fmt: skip
