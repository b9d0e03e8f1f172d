"""Training from a cache is training from pixels: same batches, nothing encoded twice, nothing half-written."""

import resource
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from pipelines import SIDE, jpeg, save_dataset
from runs import arguments, as_a_process, assert_same_weights, call, launch, refusal, run_here
from safetensors.torch import load_file
from support import torchrun

import cache_latents
import ncp
import ncp.training.models
import ncp.training.run
import train_ncp_dpo
from ncp.common.config import parse
from ncp.common.errors import UserError
from ncp.training import cache
from ncp.training.engine import make_accelerator
from ncp.training.inputs import conditions, embed_prompts, latents, vae_moments
from ncp.training.models import load_models
from ncp.training.pairs import open_pairs
from ncp.training.pipeline import describe
from ncp.training.samples import PairDataset, loader
from ncp.training.weights import WEIGHTS


@pytest.fixture(scope="module")
def assets(assets, tmp_path_factory) -> Path:
    """The pipelines of the suite; a dataset whose rows share images and prompts; an SD cache of it."""
    folder = tmp_path_factory.mktemp("cache")
    for model in ("sd", "xl"):
        (folder / model).symlink_to(assets / model)
    save_dataset(folder / "data" / "train.parquet", **shared_images())
    make(folder, folder / "cached-sd")
    return folder


def shared_images() -> dict:
    """Rows 8 to 11 are new games of images and prompts of rows 0 to 3, with the sides swapped."""
    first = list(range(8))
    return {
        "caption": [f"prompt number {i}" for i in [*first, *range(4)]],
        "image_0_uid": [f"a{i}" for i in first] + [f"b{i}" for i in range(4)],
        "image_1_uid": [f"b{i}" for i in first] + [f"a{i}" for i in range(4)],
        "jpg_0": [jpeg(2 * i, (40 + i, 36)) for i in first] + [jpeg(2 * i + 1, (33, 48 + i)) for i in range(4)],
        "jpg_1": [jpeg(2 * i + 1, (33, 48 + i)) for i in first] + [jpeg(2 * i, (40 + i, 36)) for i in range(4)],
    }


def make(assets: Path, folder: Path, *extra: str, model: str = "sd") -> None:
    """cache_latents.py in this process."""
    argv = arguments(assets, folder / "unused", "--cached_latents", str(folder), *extra, model=model)
    call(cache_latents.main, argv)


def first_batches(argv: list[str], count: int):
    """(config, models, batches) of a DPO run with these arguments."""
    config = parse(train_ncp_dpo.Config, argv)
    description, pairs = describe(config), open_pairs(config)
    opened = cache.open_cache(config, description, pairs)
    shape = description.latent_shape(config.resolution)
    dataset = PairDataset(config, pairs, shape, description.timesteps(config.k), 2, opened)
    with as_a_process():
        accelerator = make_accelerator(config)
    m = load_models(config, description, accelerator)
    batches = iter(loader(dataset, config, 0, 0, 1))
    return config, m, [next(batches) for _ in range(count)]


# ---------------------------------------------------------------- the same training


@pytest.mark.parametrize("model", ["sd", "xl"])
def test_cache_and_pixels_give_the_same_batches_and_losses(assets, tmp_path, model):
    make(assets, tmp_path / "c", model=model)
    extra = ["--proportion_empty_prompts", "0.4", "--train_batch_size", "4", "--max_train_steps", "5", "--beta", "1e6"]
    seen = []
    for more in ([], ["--cached_latents", str(tmp_path / "c")]):
        config, m, batches = first_batches(arguments(assets, tmp_path / "out", *extra, *more, model=model), 5)
        for name, p in m.unet.named_parameters():
            if "lora_B" in name:  # zero at the start, where the loss is log 2 whatever the batch
                torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(0))
        seen.append([])
        for batch in batches:
            with torch.no_grad():
                losses, _ = train_ncp_dpo.ncp_dpo(m, m.unet, batch, config)
            seen[-1].append((latents(m, batch), conditions(m, batch), batch, losses))
    for (x0, c, batch, losses), (x0_, c_, batch_, losses_) in zip(*seen, strict=True):
        torch.testing.assert_close(x0_, x0, rtol=2**-11, atol=1e-3)
        torch.testing.assert_close(c_, c, rtol=2**-10, atol=1e-3)
        assert all(torch.equal(batch_[k], batch[k]) for k in ("eps", "z", "posterior", "timestep", "time_ids"))
        torch.testing.assert_close(losses_, losses, rtol=5e-3, atol=1e-3)
    texts = torch.cat([c["encoder_hidden_states"][:4] for _, c, *_ in seen[0]]).flatten(1)
    assert 1 < len(torch.unique(texts, dim=0)) < 20  # several prompts, and the empty one more than once
    assert (torch.cat([losses for *_, losses in seen[0]]) - 0.6931).abs().max() > 0.05  # there was something to compare


@pytest.mark.parametrize("kind", ["dpo", "cpo", "sft"])
def test_with_a_cache_neither_vae_nor_text_encoder_is_loaded(assets, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(ncp.training.models, "load_pipe", lambda *_: pytest.fail("VAE and text encoders were loaded"))
    extra = ["--cached_latents", str(assets / "cached-sd"), "--dataloader_num_workers", "2"]
    run = run_here(kind, arguments(assets, tmp_path / "out", *extra))
    assert run.models.pipe is None
    assert (tmp_path / "out" / WEIGHTS).is_file()


def test_pictures_are_drawn_with_a_cache_too(assets, tmp_path):
    extra = ["--validation_prompts", "one", "--validation_num_inference_steps", "2"]
    for name, more in {"pixels": [], "cached": ["--cached_latents", str(assets / "cached-sd")]}.items():
        run_here("sft", arguments(assets, tmp_path / name, *extra, *more))
        assert (tmp_path / name / "validation" / "step-000002.png").is_file()


def test_resuming_from_a_cache_gives_the_weights_of_the_uninterrupted_run(assets, tmp_path):
    extra = ["--max_train_steps", "4", "--checkpointing_steps", "2", "--cached_latents", str(assets / "cached-sd")]
    run_here("dpo", arguments(assets, tmp_path / "whole", *extra))
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    run_here("dpo", arguments(assets, tmp_path / "part", *extra, "--resume_from_checkpoint", "latest"))
    assert_same_weights(tmp_path / "whole", tmp_path / "part")


def test_a_dataset_without_images_trains_from_a_cache(assets, tmp_path):
    save_dataset(tmp_path / "slim" / "train.parquet", **shared_images() | {"jpg_0": None, "jpg_1": None})
    extra = ["--cached_latents", str(assets / "cached-sd"), "--dataset_name", str(tmp_path / "slim")]
    run_here("dpo", arguments(assets, tmp_path / "slim-out", *extra))
    run_here("dpo", arguments(assets, tmp_path / "out", *extra[:2]))
    assert_same_weights(tmp_path / "slim-out", tmp_path / "out")


def test_both_flips_serve_a_run_without_flips(assets, tmp_path):
    cached = ["--cached_latents", str(assets / "cached-sd"), "--random_flip", "false"]
    _, m, (batch,) = first_batches(arguments(assets, tmp_path / "o", *cached), 1)
    _, pixel_m, (pixels,) = first_batches(arguments(assets, tmp_path / "o", "--random_flip", "false"), 1)
    torch.testing.assert_close(latents(m, batch), latents(pixel_m, pixels), rtol=2**-11, atol=1e-3)


# ---------------------------------------------------------------- making it


def test_each_image_and_prompt_is_encoded_once(assets, tmp_path, monkeypatch):
    encoded = {"images": 0, "prompts": 0}

    def count_images(vae, pixels):
        encoded["images"] += len(pixels)
        return vae_moments(vae, pixels)

    def count_prompts(pipe, prompts, length):
        encoded["prompts"] += len(prompts)
        return embed_prompts(pipe, prompts, length)

    monkeypatch.setattr(cache_latents, "vae_moments", count_images)
    monkeypatch.setattr(cache_latents, "embed_prompts", count_prompts)
    make(assets, tmp_path / "c")
    assert encoded == {"images": 2 * 16, "prompts": 8 + 1}  # 24 images in rows, 16 distinct, both ways round
    assert cache.read_index(tmp_path / "c", "images").to_pylist()[:3] == ["a0", "b0", "a1"]
    assert cache.read_index(tmp_path / "c", "prompts").to_pylist()[:2] == ["", "prompt number 0"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_an_interrupted_cache_is_continued(assets, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache, "SHARD_BYTES", 40_000)
    make(assets, tmp_path / "whole")
    save_file, written = cache_latents.save_file, []

    def save(tensors, path):
        save_file(tensors, path)
        if len(written) == 2:
            path.write_bytes(path.read_bytes()[:1000])
            raise KeyboardInterrupt
        written.append(path.name)

    monkeypatch.setattr(cache_latents, "save_file", save)
    with pytest.raises(KeyboardInterrupt):
        make(assets, tmp_path / "c")
    assert len(list((tmp_path / "c").glob("*.safetensors"))) == 2 and not list((tmp_path / "c").glob(".*"))
    argv = arguments(assets, tmp_path / "o", "--cached_latents", str(tmp_path / "c"))
    with pytest.raises(UserError, match="is not finished"):
        first_batches(argv, 1)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "c").glob("*.safetensors")}
    monkeypatch.setattr(cache_latents, "save_file", save_file)
    make(assets, tmp_path / "c")
    assert files_of(tmp_path / "c") == files_of(tmp_path / "whole")
    assert len(files_of(tmp_path / "c")) > 6 and all(p.stat().st_mtime_ns == t for p, t in before.items())
    capsys.readouterr()
    make(assets, tmp_path / "c")
    assert "already holds this cache" in capsys.readouterr().out


def test_another_version_of_this_project_finds_its_cache(assets, tmp_path, monkeypatch, capsys):
    """Both a finished one, and one that it goes on with."""
    before = files_of(assets / "cached-sd")
    shutil.copytree(assets / "cached-sd", tmp_path / "c")
    manifest = cache.read_cache_manifest(tmp_path / "c")
    cache.write_cache_manifest(tmp_path / "c", {k: v for k, v in manifest.items() if k != "files"})
    (tmp_path / "c" / "prompts-00000.safetensors").unlink()
    monkeypatch.setattr(ncp, "__version__", "99.0")
    make(assets, assets / "cached-sd")
    assert "already holds this cache; nothing to do" in capsys.readouterr().out
    make(assets, tmp_path / "c")
    assert "1 files" in capsys.readouterr().out  # images stay
    assert cache.read_cache_manifest(tmp_path / "c")["version"] == "99.0"
    del before["manifest.json"]
    assert {name: content for name, content in files_of(tmp_path / "c").items() if name in before} == before


def test_two_launched_processes_write_the_cache_of_one(assets, tmp_path):
    argv = arguments(assets, tmp_path / "o", "--cached_latents", str(tmp_path / "c"))
    done = launch("cache_latents.py", argv, *torchrun(2), ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    assert "16, both ways round" in done.stdout and "2 x cpu" in done.stdout and "Warning" not in done.stderr
    one, other = (load_file(f / "images-00000.safetensors") for f in (assets / "cached-sd", tmp_path / "c"))
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert files_of(assets / "cached-sd").keys() == files_of(tmp_path / "c").keys()


def test_unreadable_images_follow_the_training_scripts_policy(assets, tmp_path):
    columns = shared_images()
    columns["jpg_1"][3] = columns["jpg_0"][11] = jpeg(7)[:60]  # image b3, in rows 3 and 11
    save_dataset(tmp_path / "d" / "train.parquet", **columns)
    extra = ["--dataset_name", str(tmp_path / "d")]
    with pytest.raises(UserError, match=r"row 3, jpg_1: unreadable image .* corrupt_images: skip goes on"):
        make(assets, tmp_path / "c", *extra)
    skip = [*extra, "--corrupt_images", "skip", "--train_batch_size", "12"]
    make(assets, tmp_path / "c", *skip)
    cached = ["--cached_latents", str(tmp_path / "c")]
    _, _, (pixels,) = first_batches(arguments(assets, tmp_path / "o", *skip), 1)
    _, _, (batch,) = first_batches(arguments(assets, tmp_path / "o", *skip, *cached), 1)
    assert batch["skipped"] == pixels["skipped"] >= 2
    assert torch.equal(batch["time_ids"], pixels["time_ids"])  # the same pairs stand in
    _, _, (batch,) = first_batches(arguments(assets, tmp_path / "o", *skip[:2], *cached, *skip[4:]), 1)
    assert "unreadable when the cache was made" in batch["error"]


def test_a_vae_that_overflows_is_said(assets, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_latents, "vae_moments", lambda vae, x: torch.full((len(x), 8, 16, 16), 1e5))
    with pytest.raises(UserError, match=r"this VAE overflows; use bf16"):
        make(assets, tmp_path / "c")


def test_the_sizes_announced_are_those_written(assets, tmp_path, capsys):
    for model in ("sd", "xl"):
        make(assets, tmp_path / model, model=model)
        config = parse(cache_latents.Config, arguments(assets, tmp_path / "o", model=model))
        sizes = cache.sizes(config, describe(config))
        for kind, count in {"images": 16, "prompts": 9}.items():
            tensors = load_file(tmp_path / model / f"{kind}-00000.safetensors")
            assert sum(t.nbytes for t in tensors.values()) == count * sizes[kind]
        assert f"{sizes['images'] / 1024:,.0f} KiB each" in capsys.readouterr().out


# ---------------------------------------------------------------- what is refused


def altered(folder: Path, tmp: Path, change) -> list[str]:
    shutil.copytree(folder, tmp / "c")
    change(tmp / "c")
    return ["--cached_latents", str(tmp / "c")]


def use(a: Path, *extra: str) -> list[str]:
    return ["--cached_latents", str(a / "cached-sd"), *extra]


def other_model(a: Path, t: Path) -> list[str]:
    shutil.copytree(a / "sd", t / "m")
    weights = t / "m" / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    return use(a, "--pretrained_model_name_or_path", str(t / "m"))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


REFUSED = {
    "random crop": (lambda a, t: use(a, "--center_crop", "false"), "cached_latents needs center_crop: true"),
    "resolution": (lambda a, t: use(a, "--resolution", "16"), f"was made with resolution {SIDE} (this run: 16)"),
    "precision": (
        lambda a, t: use(a, "--mixed_precision", "bf16"),
        "was made with mixed_precision no (this run: bf16); run cache_latents.py",
    ),
    "weights": (other_model, "was made with vae "),
    "no flips": (
        lambda a, t: altered(
            a / "cached-sd",
            t,
            lambda c: cache.write_cache_manifest(c, no_flips(cache.read_cache_manifest(c))),
        ),
        "was made with random_flip False (this run: True)",
    ),
    "no cache": (lambda a, t: ["--cached_latents", str(t / "none")], "holds no cache; run cache_latents.py"),
    "missing file": (
        lambda a, t: altered(a / "cached-sd", t, lambda c: (c / "images-00000.safetensors").unlink()),
        "images-00000.safetensors is missing or damaged",
    ),
    "cut file": (
        lambda a, t: altered(a / "cached-sd", t, lambda c: cut(c / "prompts-00000.safetensors")),
        "prompts-00000.safetensors is missing or damaged",
    ),
    "another manifest": (
        lambda a, t: altered(a / "cached-sd", t, lambda c: (c / "manifest.json").write_text("[]")),
        "manifest.json is not a cache's manifest",
    ),
    "other images": (
        lambda a, t: use(a, "--dataset_name", str(save_dataset(t / "d.parquet"))),
        "lacks the caption of",
    ),
}


def no_flips(manifest: dict) -> dict:
    manifest["fingerprint"]["random_flip"] = False
    return manifest


@pytest.mark.parametrize("case", REFUSED)
def test_a_cache_that_does_not_fit_is_refused_in_one_line(assets, tmp_path, monkeypatch, capsys, case):
    build, message = REFUSED[case]
    argv = arguments(assets, tmp_path / "out", *build(assets, tmp_path))
    monkeypatch.setattr(ncp.training.run, "load_models", lambda *_: pytest.fail("a model was loaded first"))
    error = refusal(train_ncp_dpo.main, argv, capsys)
    assert error.count("\n") == 1 and message in error
    assert not (tmp_path / "out").exists()


Usage = namedtuple("Usage", "total used free")
UNFIT = {
    "nowhere": ([], "'cached_latents' is missing (the folder to write)"),
    "something else there": (["--cached_latents", "{assets}/sd"], "holds something else"),
    "a file": (["--cached_latents", "{assets}/data/train.parquet"], "is a file"),
    "other settings": (
        ["--cached_latents", "{assets}/cached-sd", "--resolution", "16"],
        f"made with resolution {SIDE}",
    ),
    "other data": (["--cached_latents", "{assets}/cached-sd", "--max_train_samples", "3"], "for another dataset"),
    "a full disk": (["--cached_latents", "{tmp}/c"], "needs 0.0 GB, and 0.0 GB are free there"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_cache_that_cannot_be_made_is_refused_in_one_line(assets, tmp_path, monkeypatch, capsys, case):
    extra, message = UNFIT[case]
    extra = [text.format(assets=assets, tmp=tmp_path) for text in extra]
    monkeypatch.setattr(cache_latents, "load_pipe", lambda *_: pytest.fail("a model was loaded first"))
    if case == "a full disk":
        monkeypatch.setattr(cache_latents.shutil, "disk_usage", lambda _: Usage(1000, 900, 100))
    before = files_of(assets / "cached-sd")
    error = refusal(cache_latents.main, arguments(assets, tmp_path / "out", *extra), capsys)
    assert error.count("\n") == 1 and message in error
    assert files_of(assets / "cached-sd") == before and list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_while_shards_are_written_is_one_line_and_the_cache_goes_on(assets, tmp_path, capsys):
    argv = arguments(assets, tmp_path / "-", "--cached_latents", str(tmp_path / "c"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # the shard of images is larger
    try:
        said = refusal(cache_latents.main, argv, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"error: cached_latents: cannot write to {tmp_path / 'c'} (" in said and "File too large" in said
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["images.parquet", "manifest.json", "prompts.parquet"]
    call(cache_latents.main, argv)
    assert files_of(tmp_path / "c") == files_of(assets / "cached-sd")


def test_a_row_without_a_uid_is_not_cached(assets, tmp_path):
    columns = shared_images()
    columns["image_0_uid"][5] = None  # the only row of image b5
    file = save_dataset(tmp_path / "d.parquet", **columns)
    make(assets, tmp_path / "c", "--dataset_name", str(file))
    uids = cache.read_index(tmp_path / "c", "images").to_pylist()
    assert "b5" not in uids and "a4" in uids and None not in uids
