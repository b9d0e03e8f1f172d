"""The embedded default: an exact oracle, an honest dataset, and a comparison that can lose."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tiny import oracle, world
from tiny.preferences import DATA, MODEL, judge, schema


def rendered(n: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    every = world.all_scenes()
    scenes = [every[i] for i in rng.integers(len(every), size=n)]
    return scenes, [world.render(s, rng) for s in scenes], rng


def test_scenes_are_split_without_overlap():
    train, validation = world.split_scenes()
    assert len(world.all_scenes()) == 448 and len(train) + len(validation) == 448
    assert not set(train) & set(validation)
    for field in ("shape", "colour", "background"):
        assert {getattr(s, field) for s in validation} == {getattr(s, field) for s in train}


@pytest.mark.parametrize("template", range(len(world.TEMPLATES)))
def test_prompts_parse_back(template):
    assert all(world.parse(s.prompt(template)) == s for s in world.all_scenes())
    with pytest.raises(ValueError, match="not a prompt of the embedded world"):
        world.parse("a photo of a cat")


def test_the_oracle_reads_back_what_was_drawn():
    scenes, images, rng = rendered(150)
    right = oracle.score(images, [s.prompt() for s in scenes])
    assert right["alignment"].mean() > 0.98 and np.quantile(right["alignment"], 0.05) > 0.9
    # One wrong word of three costs a third.
    wrong = oracle.score(images, [world.with_wrong_word(s, rng).prompt(1) for s in scenes])
    assert right["alignment"].mean() - wrong["alignment"].mean() == pytest.approx(1 / 3, abs=0.03)
    assert np.array_equal(right["appeal"], wrong["appeal"])  # appeal does not know the prompt
    assert np.allclose(right["overall"], (right["alignment"] + right["appeal"]) / 2)


def test_appeal_prefers_large_centred_clean_pictures():
    def picture(radius=19.0, dx=0.0, speckle=0.0):
        cover = world.mask("circle", 32 + dx, 32, radius)[..., None]
        noise = np.random.default_rng(0).normal(0, speckle, (64, 64, 1)) if speckle else 0
        return np.clip(cover * [0.84, 0.14, 0.16] + (1 - cover) * [0.96, 0.96, 0.96] + noise, 0, 1)

    images = [picture(), picture(radius=9), picture(dx=11), picture(speckle=0.06)]
    appeal = oracle.score(images, ["a red circle on a white background"] * 4)["appeal"]
    assert appeal[0] > 0.9 and all(appeal[0] - a > 0.15 for a in appeal[1:])


def test_an_empty_picture_scores_low_without_failing():
    scores = oracle.score([np.full((64, 64, 3), 0.5)], ["a red circle on a white background"])
    assert scores["alignment"][0] < 0.1 and 0 <= scores["appeal"][0] <= 0.25


def test_judges_follow_bradley_terry_with_ties():
    # Davidson: P(win) : P(loss) : P(tie) = e^(d/2) : e^(-d/2) : nu. With d = log 4 and nu = 0.5: 2 : 0.5 : 0.5.
    rng = np.random.default_rng(0)
    outcomes = np.array([judge(np.log(4), 0.5, rng) for _ in range(20_000)])
    shares = [(outcomes == v).mean() for v in (1.0, 0.0, 0.5)]
    assert shares == pytest.approx([2 / 3, 1 / 6, 1 / 6], abs=0.01)


def test_the_dataset_is_pick_a_pics_schema_with_its_flaws():
    tables = {}
    for split in ("train", "validation"):
        files = sorted(DATA.glob(f"{split}-*.parquet"))
        assert files and all(pq.read_schema(f).remove_metadata().equals(schema()) for f in files)
        columns = ["caption", "image_0_uid", "image_1_uid", "label_0", "label_1", "has_label", "best_image_uid"]
        tables[split] = [row for f in files for row in pq.read_table(f, columns=columns).to_pylist()]
    prompts = {split: {r["caption"] for r in rows} for split, rows in tables.items()}
    assert not prompts["train"] & prompts["validation"]
    assert not {world.parse(p) for p in prompts["train"]} & {world.parse(p) for p in prompts["validation"]}
    rows = [r for r in tables["train"] if r["has_label"]]
    assert len(rows) < len(tables["train"])
    assert 0.09 < np.mean([r["label_0"] == 0.5 for r in rows]) < 0.15
    wins, losses = set(), set()
    for r in rows:
        if r["label_0"] != 0.5:
            won = 0 if r["label_0"] == 1 else 1
            assert r["best_image_uid"] == r[f"image_{won}_uid"]
            wins.add((r["caption"], r[f"image_{won}_uid"]))
            losses.add((r["caption"], r[f"image_{1 - won}_uid"]))
    assert 0.2 < len(wins & losses) / len(wins | losses) < 0.7  # contradictions exist, and so do absolute winners


def test_annotators_agree_with_the_oracle_more_often_than_not():
    import io

    from PIL import Image

    table = pq.read_table(sorted(DATA.glob("train-*.parquet"))[0]).to_pylist()[:200]
    games = [r for r in table if r["label_0"] in (0.0, 1.0)]
    scores = [
        oracle.score([Image.open(io.BytesIO(r[f"jpg_{i}"])) for r in games], [r["caption"] for r in games])["overall"]
        for i in (0, 1)
    ]
    agreement = np.mean((scores[0] > scores[1]) == [r["label_0"] == 1 for r in games])
    assert 0.6 < agreement < 0.9  # a taste, with noise


def test_the_embedded_default_stays_small():
    size = sum(f.stat().st_size for folder in (MODEL, DATA) for f in Path(folder).rglob("*") if f.is_file())
    assert size < 20e6
    assert json.loads((MODEL / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"


def test_the_tiny_sd3_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    """With the losses that it would have had: each step draws images, noise and timesteps of its own."""
    from diffusers import StableDiffusion3Pipeline

    from tiny import build_sd3

    losses, stop = {}, None

    class Log(build_sd3.Log):
        def __call__(self, loss):
            super().__call__(loss=loss)
            losses.setdefault(self.step, []).append(loss.item())
            if self.step == stop:
                raise KeyboardInterrupt

    monkeypatch.setattr(build_sd3, "Log", Log)
    settings = {"steps": 4, "images": 24, "batch_size": 4, "save_steps": 2}
    (tmp_path / "whole").mkdir()
    build_sd3.train(tmp_path / "whole", **settings)
    (tmp_path / "half").mkdir()
    stop = 3
    with pytest.raises(KeyboardInterrupt):
        build_sd3.train(tmp_path / "half", **settings)
    stop = None
    build_sd3.train(tmp_path / "half", **settings)
    assert [len(losses[step]) for step in (1, 2, 3, 4)] == [2, 2, 3, 2]
    for found in losses.values():  # to rounding, which depends on where tensors lie in memory
        assert found == pytest.approx(found[:1] * len(found), rel=1e-2)
    assert abs(losses[3][0] / losses[4][0] - 1) > 5e-2
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "half/model-sd3", text_encoder_3=None, tokenizer_3=None)
    assert pipe.transformer.config.num_layers == 8 and pipe.vae.config.shift_factor
