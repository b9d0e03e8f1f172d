"""The same rows, wherever they come from: parquet read in place, the copy of `datasets`, prompt/chosen/rejected."""

import pickle
import shutil
from collections import namedtuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fake_hub import FakeHub
from pipelines import SIDE, save_dataset, save_pipeline
from preference_sets import PROMPTS, picture, prepared, save_chosen_rejected
from runs import call, timesteps
from safetensors.torch import load_file
from support import python

import cache_latents
import train_ncp_dpo
from ncp.common.config import parse
from ncp.common.errors import UserError
from ncp.training import rows, tables
from ncp.training.pairs import open_pairs
from ncp.training.rows import ParquetRows, can_be_read_in_place, open_rows
from ncp.training.samples import PairDataset, loader
from ncp.training.tables import read_columns

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("sd"))


def arguments(data, tmp_path, **changes: object) -> list[str]:
    settings = {
        "pretrained_model_name_or_path": "m", "dataset_name": data, "output_dir": tmp_path / "lora",
        "resolution": SIDE, "cache_dir": tmp_path / "arrow", "mixed_precision": "no", "max_train_steps": 2,
        "train_batch_size": 2, "rank": 4, "use_8bit_adam": "false", "report_to": "none", "dataloader_num_workers": 0,
        **changes,
    }  # fmt: skip
    return [str(a) for k, v in settings.items() for a in (f"--{k}", v)]


def samples(data, tmp_path, **changes: object) -> PairDataset:
    config = parse(train_ncp_dpo.Config, arguments(data, tmp_path, **changes))
    return PairDataset(config, open_pairs(config), (4, 16, 16), timesteps(config), images=2)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)


def in_groups(file, rows_per_group: int) -> None:
    pq.write_table(pq.read_table(file), file, row_group_size=rows_per_group)


# ---------------------------------------------------------------- in place


@pytest.mark.parametrize("rows_per_group", [1, 5, 30])
def test_rows_of_several_files_and_groups(tmp_path, rows_per_group):
    files = [save_dataset(tmp_path / f"{k}.parquet", rows=30 + k) for k in range(3)]
    in_groups(files[1], rows_per_group)
    whole = pa.concat_tables(pq.read_table(f, columns=["jpg_1", "caption"]) for f in files).to_pylist()
    table = pickle.loads(pickle.dumps(open_rows(files, ["jpg_1", "caption"])))  # as a worker may get it
    order = np.random.default_rng(0).permutation(len(table)).tolist()
    assert len(table) == 93 and [table[n] for n in order] == [whole[n] for n in order]
    assert table.select_columns(["caption"])[61] == {"caption": whole[61]["caption"]}
    assert read_columns(table, ["caption"])["caption"].to_pylist() == [r["caption"] for r in whole]


def test_only_small_row_groups_are_read_in_place(tmp_path, monkeypatch):
    file = save_dataset(tmp_path / "train.parquet", rows=40)
    size = pq.read_metadata(file).row_group(0).column(pq.read_schema(file).names.index("jpg_0")).total_uncompressed_size
    monkeypatch.setattr(rows, "GROUP_BYTES", size - 1)
    assert not can_be_read_in_place([file], ["jpg_0"]) and can_be_read_in_place([file], ["caption"])
    monkeypatch.setattr(rows, "GROUP_BYTES", size)
    assert can_be_read_in_place([file], ["jpg_0"])
    monkeypatch.setattr(rows, "GROUP_BYTES", 0)
    for rows_per_group, small in ((16, True), (17, False)):
        in_groups(file, rows_per_group)
        assert can_be_read_in_place([file], ["jpg_0"]) == small


def test_a_copy_gives_the_same_samples_and_is_announced_once(tmp_path, monkeypatch, capsys):
    save_dataset(tmp_path / "data/train.parquet", rows=24)
    in_place = samples(tmp_path / "data", tmp_path, heldout_pairs=3)
    assert isinstance(in_place.pairs.table, ParquetRows) and not (tmp_path / "arrow").exists()
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(rows, "GROUP_ROWS", 0)
    monkeypatch.setattr(rows, "GROUP_BYTES", 0)
    copied = samples(tmp_path / "data", tmp_path, heldout_pairs=3)
    said = capsys.readouterr().out
    assert f"copy: about 0.0 GB to {tmp_path / 'arrow'}, once, since row groups are too large" in said
    assert not isinstance(copied.pairs.table, ParquetRows) and list((tmp_path / "arrow").rglob("*.arrow"))
    assert all(same(copied[n], in_place[n]) for n in range(40))
    assert all(same(copied.heldout(k), in_place.heldout(k)) for k in range(3))
    assert copied.pairs.columns(["caption"]).equals(in_place.pairs.columns(["caption"]))
    assert copied.pairs.name(3) == in_place.pairs.name(3)
    samples(tmp_path / "data", tmp_path)
    assert capsys.readouterr().out == ""  # the copy is there


def test_workers_read_in_place(tmp_path):
    save_dataset(tmp_path / "data/train.parquet", rows=24)
    dataset = samples(tmp_path / "data", tmp_path, max_train_steps=4)
    alone = list(loader(dataset, dataset.config, 0, 0, 1))
    dataset.config.dataloader_num_workers = 2
    assert all(same(a, b) for a, b in zip(alone, loader(dataset, dataset.config, 0, 0, 1), strict=True))


def test_a_disk_without_room_for_the_copy_is_said_before(tmp_path, monkeypatch):
    save_dataset(tmp_path / "data/train.parquet", rows=24)
    monkeypatch.setattr(rows, "GROUP_ROWS", 0)
    monkeypatch.setattr(rows, "GROUP_BYTES", 0)
    monkeypatch.setattr(tables.shutil, "disk_usage", lambda _: Usage(1000, 900, 100))
    with pytest.raises(UserError, match=r"cache_dir: .*/arrow needs 0\.0 GB, and 0\.0 GB are free there"):
        samples(tmp_path / "data", tmp_path)
    assert not list(tmp_path.rglob("*.arrow"))


@pytest.mark.parametrize("harm", ["a damaged page", "a file cut short"])
def test_what_cannot_be_read_any_more_is_named_or_skipped(tmp_path, harm):
    file = save_dataset(tmp_path / "data/train.parquet", rows=12)
    in_groups(file, 4)
    column = pq.read_metadata(file).row_group(2).column(pq.read_schema(file).names.index("jpg_0"))
    at = column.dictionary_page_offset or column.data_page_offset
    dataset, tolerant = (samples(tmp_path / "data", tmp_path, corrupt_images=x) for x in ("error", "skip"))
    rows.opened.cache_clear()
    footer = file.read_bytes()[at + 64 :] if harm == "a damaged page" else b""
    whole = file.read_bytes()
    file.write_bytes(whole[:at] + (b"\xff" * 64 + footer if footer else b""))
    bad = [n for n in range(12) if dataset.pair_index(n) >= 8]
    for n in bad if footer else range(12):
        error = dataset[n]["error"]
        assert f"train.parquet row {dataset.pair_index(n)}: unreadable image (" in error and "\n" not in error
    sample = tolerant[bad[0]]
    assert ("error" in sample) == (not footer) and (not footer or sample["skipped"] > 0)
    rows.opened.cache_clear()


def test_files_that_differ_in_type_are_one_table(tmp_path):
    save_dataset(tmp_path / "data/train-0.parquet")
    save_dataset(tmp_path / "data/train-1.parquet", label_0=[1] * 12, label_1=[0] * 12)  # int64, not float64
    assert len(samples(tmp_path / "data", tmp_path).pairs) == 24


# ---------------------------------------------------------------- prompt, chosen, rejected


def test_chosen_wins_and_uids_are_those_of_the_converted_dataset(tmp_path, capsys):
    """Read directly or through prepare_preferences.py: the same samples, in the same order, of the same images."""
    save_chosen_rejected(tmp_path / "data/train-0.parquet")
    direct = samples(tmp_path / "data", tmp_path, heldout_pairs=2)
    assert "once, since its columns are prompt, chosen, rejected;" in capsys.readouterr().out
    prepared(["--format", "chosen_rejected", "--dataset_name", tmp_path / "data"], tmp_path / "out")
    converted = samples(tmp_path / "out", tmp_path, heldout_pairs=2)
    assert len(direct.pairs) == 4 and direct.pairs.heldout == 2
    names = ["caption", "image_0_uid", "image_1_uid", "label_0", "label_1"]
    assert direct.pairs.columns(names).equals(converted.pairs.columns(names))
    assert all(same(direct[n], converted[n]) for n in range(12))
    row = direct.pairs.table[3]
    assert (row["caption"], row["jpg_0"], row["jpg_1"]) == (PROMPTS[3], picture(6), picture(7))
    assert (row["label_0"], row["label_1"]) == (1, 0) and direct.pairs.winner.tolist() == [0] * 6
    assert direct.pairs.source(3).endswith("train-0.parquet row 3")


@pytest.mark.parametrize("form", ["bytes", "struct", "large"])
def test_images_without_the_feature_of_datasets(tmp_path, form):
    """Plain bytes, a struct without metadata, 64-bit offsets."""
    kind = pa.large_binary() if form == "large" else pa.binary()
    columns = {"prompt": PROMPTS}
    for side, name in enumerate(("chosen", "rejected")):
        images = [picture(2 * k + side) for k in range(6)]
        struct = pa.struct([("bytes", kind), ("path", pa.string())])
        values = pa.array([{"bytes": i, "path": None} for i in images], struct) if form == "struct" else images
        columns[name] = pa.array(values, struct if form == "struct" else kind)
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "data/train.parquet")
    table = samples(tmp_path / "data", tmp_path).pairs.table
    assert [table[k]["jpg_1"] for k in range(6)] == [picture(2 * k + 1) for k in range(6)]


def test_rows_that_lack_an_image_or_a_prompt_do_not_train(tmp_path):
    chosen = [{"bytes": picture(2 * k), "path": None} for k in range(6)]
    save_chosen_rejected(
        tmp_path / "data/train.parquet", prompt=["a", "", None, "d", "e", "f"], chosen=[*chosen[:3], None, *chosen[4:]]
    )
    pairs = samples(tmp_path / "data", tmp_path).pairs
    assert pairs.rows.tolist() == [0, 4, 5]
    assert pairs.dropped == {"without a caption": 2, "without an image's uid": 1}


def test_an_image_that_stands_in_two_rows_is_held_out_with_both(tmp_path):
    chosen = [{"bytes": picture(2 * (k % 3)), "path": None} for k in range(6)]  # rows 0 and 3, 1 and 4, 2 and 5
    save_chosen_rejected(tmp_path / "data/train.parquet", chosen=chosen)
    pairs = samples(tmp_path / "data", tmp_path, heldout_pairs=1).pairs
    (held,) = pairs.rows[len(pairs) :].tolist()
    assert len(pairs) == 4 and (held + 3) % 6 not in pairs.rows.tolist()


REFUSED = {
    "paths only": (
        {"chosen": [{"bytes": None, "path": f"{k}.jpg"} for k in range(6)]},
        r"row 0 has a path in chosen and no bytes; prepare_preferences\.py --format chosen_rejected reads the files",
    ),
    "text": ({"prompt": list(range(6))}, r"column prompt is int64; expected text"),
    "no images": ({"rejected": PROMPTS}, r"column rejected is string; expected image"),
    "a column less": (
        {"rejected": None},
        r"is missing; expected Pick-a-Pic's: .*; or prompt, chosen, rejected; prepare_",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_columns_are_refused_in_a_line(tmp_path, case):
    changes, message = REFUSED[case]
    columns = {"prompt": PROMPTS, "chosen": [picture(k) for k in range(6)], "rejected": [picture(k) for k in range(6)]}
    columns = {k: v for k, v in {**columns, **changes}.items() if v is not None}
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "data/train.parquet")
    with pytest.raises(UserError, match=message) as error:
        samples(tmp_path / "data", tmp_path)
    assert "\n" not in str(error.value)


def test_training_from_pixels_and_from_a_cache(pipeline, tmp_path):
    save_chosen_rejected(tmp_path / "data/train.parquet")
    argv = arguments(tmp_path / "data", tmp_path, pretrained_model_name_or_path=pipeline, heldout_pairs=1)
    call(train_ncp_dpo.main, argv)
    cached = [*argv, "--cached_latents", str(tmp_path / "cache")]
    call(cache_latents.main, cached)
    shutil.rmtree(tmp_path / "lora")
    call(train_ncp_dpo.main, cached)
    assert (tmp_path / "lora/pytorch_lora_weights.safetensors").is_file()
    # The cache knows the images by their bytes: it also serves the dataset that was made of this one.
    prepared(["--format", "chosen_rejected", "--dataset_name", tmp_path / "data"], tmp_path / "out")
    argv = [*cached, "--dataset_name", str(tmp_path / "out"), "--output_dir", str(tmp_path / "other")]
    call(train_ncp_dpo.main, argv)
    first, second = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("lora", "other"))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_chosen_and_rejected_from_the_hub(pipeline, tmp_path):
    file = tmp_path / "train.parquet"
    save_chosen_rejected(file)
    argv = arguments("me/pairs", tmp_path, pretrained_model_name_or_path=pipeline)
    with FakeHub() as hub:
        hub.add("datasets", "me/pairs", {"data/train-00000-of-00001.parquet": file.read_bytes(), "README.md": b""})
        done = python("train_ncp_dpo.py", *argv, **hub.environment(tmp_path / "home", None))
    assert done.returncode == 0, done.stderr
    assert "6 decisive pairs of 6 rows in me/pairs" in done.stdout
    assert f"to {tmp_path / 'arrow'}, once, since it is on the hub" in done.stdout
