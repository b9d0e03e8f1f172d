"""The input: which files belong to a split, for the filter, the trainers and the hub alike."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from filter_data import config, filtered, many_games, read_output, row, table, write_shards

import filter_pickapic
from filtering.source import list_files, open_shards
from ncp.common.config import parse
from ncp.common.errors import UserError
from ncp.common.splits import files_of_split
from ncp.training.pairs import open_pairs
from ncp.training.settings import TrainingConfig


@pytest.fixture
def many_rows() -> list[dict]:
    return many_games()


# Names of parquet files, and what they give for a split: the chosen ones, or parts of the refusal.
SPLIT_FILES = {
    "shards, validation aside": ("train-00000-of-00002 train-00001-of-00002 validation-00000-of-1", "train", [0, 1]),
    "data folder, others aside": ("data/train-0 data/train-1 data/test-0 x", "train", [0, 1]),
    "folders": ("default/train/0000 default/test/0000", "train", [0]),
    "no split named": ("a b/c b/.c .cache/d", "train", [0, 1]),
    "words inside words": ("portraits latest medieval constraint-0 device", "train", [0, 1, 2, 3, 4]),
    "dataset's name first": ("pickapic-train-0 pickapic-validation-0", "train", [0]),
    "dataset's name first, the other": ("pickapic-train-0 pickapic-validation-0", "validation", [1]),
    "number first": ("0000.train 0001.train 0000.validation_unique", "train", [0, 1]),
    "underscores": ("pickapic_v2_train_00000_of_00002 pickapic_v2_test_unique_00000_of_00001", "train", [0]),
    "test_unique is no test": ("test-0 test_unique-0", "test", [0]),
    "test_unique": ("test-0 test_unique-0 train-0", "test_unique", [1]),
    "capitals": ("Train/0 Validation/0", "train", [0]),
    "capitals asked for": ("Train/0 Validation/0", "Validation", [1]),
    "numbers behind": ("train0 train1 val0", "train", [0, 1]),
    "sets": ("trainset testset", "train", [0]),
    "other words for it": ("training-0 dev-0 eval-0", "train", [0]),
    "other words asked for": ("training-0 dev-0 eval-0", "val", [1]),
    "the same twice": ("training/train-0 val/validation-0", "train", [0]),
    "partial folder of the hub": ("default/partial-train/0000 default/partial-test/0000", "train", [0]),
    "a split of its own name": ("unlabeled-0 train-0", "unlabeled", [0]),
    "two others at once": ("train-0 test-validation-0", "train", [0]),
    "two at once": ("train-0 train-val-0", "train", "unclear which ... (train: train-0.parquet; train and validat"),
    "folder against file": ("train/validation-0 train/train-0", "train", "train and validation: train/validation-0."),
    "some without a word": ("train-0 0001 0002", "train", "unclear which ... (no split in the name: 0001.parquet, 00"),
    "validation beside the nameless": ("0000 0001 validation-0", "train", "unclear which ... validation: validation-0"),
    "many are not all listed": ("train-0 a b c d e f", "train", "a.parquet, b.parquet, c.parquet and 3 more"),
    "no such split": ("test-0 test_unique-0", "train", "no parquet files for split 'train' ... (test: test-0.parquet"),
    "no split but train": ("a", "test", "no parquet files for split 'test'"),
    "nothing": ("", "train", "no parquet files in"),
    "only hidden files": (".cache/train-0", "train", "no parquet files in"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPLIT_FILES)
def test_files_of_split(case):
    text, split, expected = SPLIT_FILES[case]
    names = [f"{name}.parquet" for name in text.split()]
    for order in (names, names[::-1]):
        if isinstance(expected, list):
            assert files_of_split(order, split, "d") == sorted(names[i] for i in expected)
        else:
            with pytest.raises(UserError) as refused:
                files_of_split(order, split, "d")
            assert all(part in str(refused.value) for part in expected.split(" ... "))
            assert "\n" not in str(refused.value)
            if "unclear" in str(refused.value):
                assert "give a file or a folder of one split, or set dataset_split" in str(refused.value)


@pytest.mark.parametrize("case", SPLIT_FILES)
def test_both_programs_and_the_hub_read_the_same_files(case, tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    text, split, expected = SPLIT_FILES[case]
    names = [f"{name}.parquet" for name in text.split()]
    for i, name in enumerate(names):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table([row(f"a{i}>b{i}", i)]), tmp_path / "in" / name)
    (tmp_path / "in").mkdir(exist_ok=True)

    class Api:
        def dataset_info(self, name, revision, files_metadata):
            files = [type("File", (), {"rfilename": n, "size": 1}) for n in ["README.md", *names]]
            return type("Info", (), {"sha": "c0ffee", "siblings": files})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    argv = ["--pretrained_model_name_or_path", "m", "--output_dir", "o", "--dataset_name", str(tmp_path / "in")]
    training = parse(TrainingConfig, [*argv, "--dataset_split", split, "--cache_dir", str(tmp_path / "cache")])
    local, hub = (config(dataset_name=d, dataset_split=split) for d in (str(tmp_path / "in"), "someone/pairs"))

    def trained() -> list[str]:
        pairs = open_pairs(training)
        assert sorted(pairs.name(i)["winner"] for i in range(len(pairs))) == [f"a{i}" for i in sorted(expected)]
        return [file.relative_to(tmp_path / "in").as_posix() for file in pairs.files]

    for read in (
        lambda: [shard.name for shard in open_shards(local)[0]],
        lambda: [name for name, _, _ in list_files(hub)[0]],
        trained,
    ):
        if isinstance(expected, list):
            assert read() == sorted(names[i] for i in expected)
        else:
            with pytest.raises(UserError) as refused:
                read()
            assert all(part in str(refused.value) for part in expected.split(" ... "))


def test_hub_dataset(tmp_path, many_rows, monkeypatch):
    """The hub's two client classes are stood in for by local files; what they are asked for is what is checked."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    source = write_shards(tmp_path / "in", many_rows, shards=2)
    paths = sorted((source / "data").glob("*.parquet"))
    asked = []

    class Api:
        def dataset_info(self, name, revision, files_metadata):
            asked.append((name, revision, files_metadata))
            found = [type("File", (), {"rfilename": f"data/{p.name}", "size": p.stat().st_size}) for p in paths]
            return type("Info", (), {"sha": "c0ffee", "siblings": found})

    class FileSystem:
        def open(self, path, mode, cache_type):
            assert path.startswith("datasets/someone/pairs@c0ffee/data/") and (mode, cache_type) == ("rb", "none")
            return open(source / "data" / Path(path).name, mode)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", FileSystem)
    filter_pickapic.main(["--dataset_name=someone/pairs", "--revision=v2", f"--output_dir={tmp_path / 'hub'}"])
    filtered(source, tmp_path / "local")
    assert asked == [("someone/pairs", "v2", True)]
    assert json.loads((tmp_path / "hub/manifest.json").read_text())["commit"] == "c0ffee"
    assert read_output(tmp_path / "hub") == read_output(tmp_path / "local")
