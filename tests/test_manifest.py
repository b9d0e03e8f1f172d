"""What filter_pickapic.py says of a dataset reaches the run that trains on it: screen, tracker, model card."""

import json
import shutil
from pathlib import Path

import pytest
from pipelines import save_pipeline
from runs import arguments, run_here

import filter_pickapic
from ncp.common.config import parse
from ncp.common.errors import UserError
from ncp.training.pairs import Pairs, open_pairs
from ncp.training.settings import TrainingConfig


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> Path:
    """An SD pipeline, and the embedded dataset as filter_pickapic.py leaves it."""
    folder = tmp_path_factory.mktemp("assets")
    save_pipeline(folder / "sd")
    filter_pickapic.main(["--dataset_name", "tiny/data", "--output_dir", str(folder / "data"), "--rule", "x_y"])
    return folder


def test_a_run_says_how_its_data_was_filtered(assets, tmp_path, capsys):
    manifest = json.loads((assets / "data" / "manifest.json").read_text())
    argv = arguments(assets, tmp_path / "out", "--max_train_steps", "1", "--report_to", "tensorboard")
    run_here("sft", argv)
    pairs, prompts = manifest["pairs"]["total"], manifest["pairs"]["unique_prompts"]
    line = f"rule x_y: {pairs:,} pairs of {manifest['rows']['input']:,} rows of tiny/data, {prompts:,} prompts"
    assert pairs > 20 and f"filtered: {line}" in capsys.readouterr().out
    assert f"| filtered | {line}" in (tmp_path / "out" / "README.md").read_text()
    logged = "".join(p.read_text(errors="ignore") for p in (tmp_path / "out" / "logs").rglob("hparams.yml"))
    assert line in " ".join(logged.split())


def opened(folder: Path) -> Pairs:
    extra = ["--dataset_name", str(folder), "--cache_dir", str(folder.parent / "arrow")]
    return open_pairs(parse(TrainingConfig, arguments(folder, folder / "out", *extra)))


def copied(assets: Path, tmp_path: Path) -> Path:
    shutil.copytree(assets / "data", tmp_path / "data")
    return tmp_path / "data"


def test_data_that_changed_since_is_refused(assets, tmp_path):
    folder = copied(assets, tmp_path)
    assert opened(folder).manifest["options"]["rule"] == "x_y"
    file = next(folder.rglob("*.parquet"))
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(UserError, match=r"\.parquet: (missing or changed since|not a readable parquet)"):
        opened(folder)


@pytest.mark.parametrize("content", ["{", '{"tool": "filter_pickapic"}', "[]"])
def test_a_damaged_manifest_is_said(assets, tmp_path, content):
    folder = copied(assets, tmp_path)
    (folder / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json: not a readable manifest of filter_pickapic\.py"):
        opened(folder)


def test_a_manifest_of_something_else_says_nothing(assets, tmp_path):
    folder = copied(assets, tmp_path)
    (folder / "manifest.json").write_text('{"tool": "another"}')
    assert opened(folder).manifest is None
