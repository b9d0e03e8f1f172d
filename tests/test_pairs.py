"""Which rows of a dataset train, which are held out, and which are left out and counted."""

import random

import numpy as np
import pyarrow as pa
import pytest
from filter_data import SCHEMA, filtered, random_rows, row, write_shards
from filter_data import config as filter_config
from pipelines import save_dataset
from runs import small_dataset
from support import ROOT

from filtering.rules import decide
from ncp.common.config import parse
from ncp.common.errors import UserError
from ncp.common.judgements import read_judgements
from ncp.common.splits import local_files
from ncp.training.pairs import DROPPED, decisive, hold_out, open_pairs
from train_ncp_dpo import Config


def opened(folder, tmp_path, *extra):
    """`open_pairs` of a folder."""
    argv = ["--pretrained_model_name_or_path", "m", "--output_dir", "o", "--dataset_name", str(folder)]
    return open_pairs(parse(Config, [*argv, "--cache_dir", str(tmp_path / "cache"), *extra]))


def test_decisive_keeps_wins_and_counts_the_rest():
    nan = float("nan")
    columns = {
        "label_0": [1, 0, 0.5, nan, 1, 1, 0.7, 1, 1],
        "label_1": [0, 1, 0.5, nan, 0, 0, 0.3, 0, 0],
        "image_0_uid": ["a", "a", "a", "a", "a", "a", "a", "a", "a"],
        "image_1_uid": ["b", "b", "b", "b", "a", "b", "b", None, "b"],
        "caption": ["p", "p", "p", "p", "p", "", "p", "p", "p"],
    }
    plain = {
        "without a caption": 1,
        "without an image's uid": 1,
        "without a label": 1,
        "with labels other than 1 and 0, 0 and 1, 0.5 and 0.5": 1,
        "of an image against itself": 1,
        "ties": 1,
    }
    rows, winner, dropped = decisive(read_judgements(pa.table(columns)))
    assert rows.tolist() == [0, 1, 8] and winner.tolist() == [0, 1, 0] and dropped == plain
    columns["has_label"] = [True, None, *[True] * 7]
    columns["best_image_uid"] = ["a", "b", "b", "", "a", "a", "a", "a", "b"]
    rows, winner, dropped = decisive(read_judgements(pa.table(columns)))
    assert rows.tolist() == [0] and winner.tolist() == [0]
    # Row 1 is not labeled; row 3 is said to be labeled, and has no labels; row 8 contradicts itself.
    plain["with labels other than 1 and 0, 0 and 1, 0.5 and 0.5"] = 2
    assert dropped == plain | {"whose best_image_uid is not the winner's": 1}


@pytest.mark.parametrize("seed", range(20))
def test_training_on_raw_rows_is_training_on_what_the_filter_leaves(tmp_path, seed):
    """For rows of every kind, the pairs that train are those of rule no_ties, by (caption, winner, loser)."""
    rows = [r | {"ranking_id": i} for i, r in enumerate(random_rows(random.Random(seed)))]  # no duplicates
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    for check in ("check", "ignore"):
        made = decide(table, filter_config(rule="no_ties", best_image_uid=check))
        columns = table.drop_columns([] if check == "check" else ["best_image_uid"])
        kept, winner, dropped = decisive(read_judgements(columns))
        assert sorted(kept.tolist()) == sorted(made.row.tolist())
        assert (winner == ~made.first_wins[kept]).all()
        counts = {DROPPED[reason]: count for reason, count in made.dropped.items() if count}
        assert dropped == counts and sum(counts.values()) + len(kept) == len(rows)


def test_optional_columns_are_looked_at_only_where_they_are(tmp_path):
    unlabeled = {"has_label": [i != 3 for i in range(12)]}
    contradictory = {"best_image_uid": [f"{'b' if i in (0, 5) else 'a' if i % 2 == 0 else 'b'}{i}" for i in range(12)]}
    for columns, left, reasons in (
        ({}, 12, {}),
        ({"has_label": None, "best_image_uid": None}, 12, {}),
        (unlabeled, 11, {"without a label": 1}),
        (contradictory, 11, {"whose best_image_uid is not the winner's": 1}),
        (unlabeled | contradictory, 10, {"without a label": 1, "whose best_image_uid is not the winner's": 1}),
    ):
        _, dataset = small_dataset(tmp_path, **columns)
        assert len(dataset.pairs) == left and dataset.pairs.dropped == reasons
        assert len(dataset.pairs.table) == left + sum(reasons.values())
    save_dataset(tmp_path / "data" / "z.train.parquet", has_label=None)
    with pytest.raises(UserError, match=r"z\.train\.parquet: column has_label is there in some files and missing in"):
        small_dataset(tmp_path)
    with pytest.raises(UserError, match=r"column has_label is (double|int64); expected true or false"):
        small_dataset(tmp_path / "typed", has_label=[1] * 12)


def test_a_dataset_filtered_without_best_image_uid_trains_without_it(tmp_path):
    rows = [row(f"a{i}>b{i}", i, caption=f"prompt {i}", best_image_uid=f"b{i}" if i < 3 else f"a{i}") for i in range(9)]
    source = write_shards(tmp_path / "in", rows)
    assert len(opened(source, tmp_path).table) == 9 and len(opened(source, tmp_path)) == 6
    filtered(source, tmp_path / "check")
    filtered(source, tmp_path / "ignore", "--best_image_uid", "ignore")
    assert len(opened(tmp_path / "check", tmp_path)) == 6
    assert len(opened(tmp_path / "ignore", tmp_path)) == 9


def test_split_selects_files_by_name(tmp_path):
    for name in ("train-0.parquet", "train-1.parquet", "test_unique-0.parquet", ".cache/train-2.parquet"):
        save_dataset(tmp_path / "data" / name)
    names = lambda split: [p.name for p in local_files(str(tmp_path), split).values()]  # noqa: E731
    assert names("train") == ["train-0.parquet", "train-1.parquet"]
    assert names("test_unique") == ["test_unique-0.parquet"]
    with pytest.raises(UserError, match="no parquet files for split 'test'"):
        names("test")


# ---------------------------------------------------------------- held-out pairs


def random_games(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(caption (P,), images (P, 2)): several games a prompt, in mixed order, some images under two prompts."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 300))
    caption = rng.integers(0, max(2, count // 4), count)
    images = 6 * caption[:, None] + np.stack([rng.permutation(6)[:2] for _ in range(count)])
    strays = rng.random(count) < 0.05
    images[strays, 0] = rng.integers(0, 6 * (caption.max() + 1), int(strays.sum()))
    return caption, images


def check_held_out(caption, images, count: int) -> None:
    """What holding out promises, pair by pair and without NumPy's set operations."""
    train, held = (x.tolist() for x in hold_out(caption, images, count))
    assert len({int(caption[i]) for i in held}) == len(held) == count and train == sorted(set(train) - set(held))
    held_captions = {int(caption[i]) for i in held}
    held_images = {int(image) for i in held for image in images[i]}

    def shares(i: int) -> bool:
        return int(caption[i]) in held_captions or bool(held_images & set(images[i].tolist()))

    # A pair trains if and only if it shares neither: no more is set aside than must be.
    assert train == [i for i in range(len(caption)) if not shares(i)]


@pytest.mark.parametrize("seed", range(30))
def test_held_out_pairs_share_nothing_with_training(seed):
    caption, images = random_games(seed)
    captions = len(np.unique(caption))
    for count in {0, 1, captions // 3, captions - 1} - {captions}:
        check_held_out(caption, images, count)
        relabeled = hold_out(1000 - caption, 7 * images, count)  # codes are names, not numbers
        assert all(np.array_equal(a, b) for a, b in zip(hold_out(caption, images, count), relabeled, strict=True))
    assert all(len(found) == 0 for found in hold_out(caption, images, captions))


def test_held_out_prompts_are_evenly_spaced():
    # Prompts appear in the order 9, 8, 7, ..., 0, three games each; of 10 prompts, 2 hold out the 3rd and the 8th
    # (positions (2k + 1) * 10 // 4 = 2 and 7), and the middle one of each prompt's games, rows 7 and 22.
    caption = np.arange(10)[::-1].repeat(3)
    train, held = hold_out(caption, np.arange(60).reshape(30, 2), 2)
    assert held.tolist() == [7, 22] and sorted({*range(30)} - {*train.tolist()}) == [6, 7, 8, 21, 22, 23]


@pytest.mark.parametrize("extra", [[], ["--max_train_samples", "50"]])
def test_held_out_pairs_of_the_embedded_dataset(tmp_path, extra):
    pairs = opened(ROOT / "tiny/data", tmp_path, "--heldout_pairs", "16", *extra)
    names = [pairs.table[int(row)] for row in pairs.rows]
    train, held = names[: len(pairs)], names[len(pairs) :]
    of = lambda rows, *columns: {r[c] for r in rows for c in columns}  # noqa: E731
    assert len(held) == 16 == len(of(held, "caption")) and len(pairs) == (50 if extra else len(train)) > 20
    assert not of(train, "caption") & of(held, "caption")
    assert not of(train, "image_0_uid", "image_1_uid") & of(held, "image_0_uid", "image_1_uid")
    # Each row is counted once.
    assert len(pairs) + pairs.heldout + sum(pairs.dropped.values()) == len(pairs.table)
    assert pairs.dropped["set aside with a prompt or image that is held out"] > 0
    assert ("beyond max_train_samples" in pairs.dropped) == bool(extra)


def test_more_held_out_pairs_than_prompts_are_refused(tmp_path):
    folder = write_shards(tmp_path / "in", [row(f"a>{x}", i, caption="xyz"[i % 3]) for i, x in enumerate("bcdefg")])
    for count in (3, 6):
        with pytest.raises(UserError, match=rf"heldout_pairs is {count}; .* has 6 decisive pairs of 3 prompts; .*none"):
            opened(folder, tmp_path, "--heldout_pairs", str(count))
    # All six games have image a: no two of them may stand on both sides.
    with pytest.raises(UserError, match=r"heldout_pairs is 1; .* of 3 prompts; .*and their images none is left"):
        opened(folder, tmp_path, "--heldout_pairs", "1")
