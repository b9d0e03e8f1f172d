"""Prompts of every kind of file, and of the published layouts."""

import json
from pathlib import Path

import evaluations
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluations import configured
from support import ROOT

from evaluation.prompts import read_prompts
from evaluation.protocol import EvaluationConfig
from ncp.common.config import parse

assets, own_judge = evaluations.assets, evaluations.own_judge


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
    config = parse(EvaluationConfig, ["--config", str(ROOT / f"configs/eval_{preset}.yaml")])
    rows, _ = read_prompts(config)
    assert [(r["prompt"], r["category"]) for r in rows] == expected
    assert asked == {"name": config.prompts, "repo_type": "dataset", "allow_patterns": config.prompts_files}


def test_the_embedded_prompts_are_held_out(assets):
    from tiny import world

    prompts = prompts_of(assets, "tiny")
    trained = set(world.split_scenes()[0])
    assert len(prompts) == 88 * 3 and not any(world.parse(p) in trained for p, _ in prompts)
