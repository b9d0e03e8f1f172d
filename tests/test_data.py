"""Samples are a function of (seed, position); what cannot train does not."""

import io
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from filter_data import SCHEMA, filtered, random_rows, row, write_shards
from filter_data import config as filter_config
from PIL import Image
from pipelines import jpeg, save_dataset

import filter_pickapic
from ncp.common.config import parse
from ncp.common.errors import UserError
from ncp.common.judgements import read_judgements
from ncp.common.splits import local_files
from ncp.training.images import decode_image, resize_crop_flip
from ncp.training.pairs import DROPPED, decisive, hold_out, open_pairs
from ncp.training.samples import PairDataset, collate, loader
from train_ncp_dpo import Config

ROOT = Path(__file__).parents[1]
SHAPE = (4, 16, 16)


def make(tmp_path, *extra, **columns):
    """(config, dataset) over a 12-row parquet file."""
    data = save_dataset(tmp_path / "data" / "train.parquet", **columns).parent
    argv = ["--pretrained_model_name_or_path", "m", "--output_dir", "o", "--dataset_name", str(data)]
    argv += ["--resolution", "32", "--cache_dir", str(tmp_path / "cache"), "--dataloader_num_workers", "0", *extra]
    config = parse(Config, argv)
    return config, PairDataset(config, open_pairs(config), SHAPE, 1000, losers=True)


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)


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
        made = filter_pickapic.decide(table, filter_config(rule="no_ties", best_image_uid=check))
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
        _, dataset = make(tmp_path, **columns)
        assert len(dataset.pairs) == left and dataset.pairs.dropped == reasons
        assert len(dataset.pairs.table) == left + sum(reasons.values())
    save_dataset(tmp_path / "data" / "z.train.parquet", has_label=None)
    with pytest.raises(UserError, match=r"z\.train\.parquet: column has_label is there in some files and missing in"):
        make(tmp_path)
    with pytest.raises(UserError, match=r"column has_label is (double|int64); expected true or false"):
        make(tmp_path / "typed", has_label=[1] * 12)


def test_a_dataset_filtered_without_best_image_uid_trains_without_it(tmp_path):
    rows = [row(f"a{i}>b{i}", i, caption=f"prompt {i}", best_image_uid=f"b{i}" if i < 3 else f"a{i}") for i in range(9)]
    source = write_shards(tmp_path / "in", rows)
    assert len(opened(source, tmp_path).table) == 9 and len(opened(source, tmp_path)) == 6
    filtered(source, tmp_path / "check")
    filtered(source, tmp_path / "ignore", "--best_image_uid", "ignore")
    assert len(opened(tmp_path / "check", tmp_path)) == 6
    assert len(opened(tmp_path / "ignore", tmp_path)) == 9


# ---------------------------------------------------------------- held-out pairs


def opened(folder, tmp_path, *extra):
    """`open_pairs` of a folder."""
    argv = ["--pretrained_model_name_or_path", "m", "--output_dir", "o", "--dataset_name", str(folder)]
    return open_pairs(parse(Config, [*argv, "--cache_dir", str(tmp_path / "cache"), *extra]))


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


# ---------------------------------------------------------------- samples


def test_a_sample_depends_on_seed_and_position_only(tmp_path):
    _, first = make(tmp_path, "--proportion_empty_prompts", "0.5")
    _, second = make(tmp_path, "--proportion_empty_prompts", "0.5")
    order = np.random.default_rng(0).permutation(30).tolist()
    samples = {n: first[n] for n in range(30)}
    assert all(same(samples[n], second[n]) for n in order)
    _, other = make(tmp_path, "--seed", "1")
    assert not torch.equal(other[3]["eps"], samples[3]["eps"])
    assert not torch.equal(samples[3]["eps"], samples[15]["eps"])  # the next epoch draws anew
    assert {s["prompt"] == "" for s in samples.values()} == {True, False}


def test_each_epoch_is_a_permutation_and_epochs_differ(tmp_path):
    _, dataset = make(tmp_path)
    epochs = [[dataset.pair_index(12 * e + i) for i in range(12)] for e in range(3)]
    assert all(sorted(e) == list(range(12)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(
    ("batch", "accumulation", "processes"), [(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2)]
)
def test_any_split_of_a_step_sees_the_same_positions(tmp_path, batch, accumulation, processes):
    extra = [
        "--train_batch_size",
        str(batch),
        "--gradient_accumulation_steps",
        str(accumulation),
        "--max_train_steps",
        "3",
    ]
    config, dataset = make(tmp_path, *extra)
    seen = []
    for rank in range(processes):
        sampler = loader(dataset, config, 1, rank, processes).batch_sampler
        assert len(list(sampler)) == len(sampler)
        per_step = np.array(list(sampler)).reshape(2, -1)  # steps 1 and 2 of 0, 1, 2
        seen.append(per_step)
    steps = np.concatenate(seen, axis=1)
    assert [sorted(s) for s in steps.tolist()] == [[4, 5, 6, 7], [8, 9, 10, 11]]


def test_workers_change_nothing(tmp_path):
    config, dataset = make(tmp_path, "--train_batch_size", "2", "--max_train_steps", "3")
    alone = list(loader(dataset, config, 0, 0, 1))
    config.dataloader_num_workers = 2
    assert all(same(a, b) for a, b in zip(alone, loader(dataset, config, 0, 0, 1), strict=True))


def test_timesteps_have_a_predecessor(tmp_path):
    for offset, lowest in (("1", 1), ("700", 700), ("x0", 1)):
        _, dataset = make(tmp_path, "--timestep_offset", offset)
        t = [dataset[n]["timestep"].item() for n in range(200)]
        assert lowest <= min(t) and max(t) <= 999
        assert max(t) - min(t) > 0.8 * (999 - lowest)


def test_winners_come_first_with_their_own_size_and_crop(tmp_path):
    _, dataset = make(tmp_path, "--center_crop", "true", "--random_flip", "false")
    for n in range(12):
        sample, index = dataset[n], dataset.pair_index(n)
        won_by_first = index % 2 == 0
        sizes = [(36, 40 + index), (48 + index, 33)]  # (height, width) of jpg_0 and jpg_1 in save_dataset
        expected = sizes if won_by_first else sizes[::-1]
        assert [tuple(ids[:2].tolist()) for ids in sample["time_ids"]] == expected
        assert sample["time_ids"][:, 4:].tolist() == [[32, 32], [32, 32]]
        winner = Image.open(io.BytesIO(jpeg(2 * index + (not won_by_first), expected[0][::-1])))
        cropped = resize_crop_flip(winner, 32, np.array([0.5, 0.5]), False)
        assert np.array_equal(sample["pixels"][0].permute(1, 2, 0).numpy(), cropped.pixels)


def test_a_pair_is_flipped_together(tmp_path):
    _, dataset = make(tmp_path, "--center_crop", "true")
    _, straight = make(tmp_path, "--center_crop", "true", "--random_flip", "false")
    outcomes = set()
    for n in range(12):
        mirrored = []
        for image, plain in zip(dataset[n]["pixels"].float(), straight[n]["pixels"].float(), strict=True):
            # Nearer to the mirror image than to the image; an odd margin moves the crop by a pixel.
            mirrored.append((image - plain.flip(-1)).abs().mean() < (image - plain).abs().mean())
        assert mirrored[0] == mirrored[1]
        outcomes.add(bool(mirrored[0]))
    assert outcomes == {True, False}


def test_resize_and_crop_take_the_stated_window():
    # A 20 x 10 image whose columns count up: short side to 5 halves it, and the crop at x = 1.0 is its right end.
    columns = np.repeat((np.arange(20) * 10)[None, :, None], 10, 0).repeat(3, 2).astype(np.uint8)
    right = resize_crop_flip(Image.fromarray(columns), 5, np.array([0.0, 1.0]), False)
    assert right.time_ids == (10, 20, 0, 5, 5, 5)
    assert right.pixels[2, 1:-1, 0].tolist() == [125, 145, 165]  # bilinear means of pixels 12 and 13, 14 and 15, ...
    left = resize_crop_flip(Image.fromarray(columns), 5, np.array([0.0, 1.0]), True)
    assert np.array_equal(
        left.pixels, resize_crop_flip(Image.fromarray(columns[:, ::-1]), 5, np.array([0.0, 1.0]), False).pixels
    )


@pytest.mark.parametrize("size", [(1, 1), (2000, 10), (7, 300)])
def test_odd_sizes_become_squares(size):
    crop = resize_crop_flip(Image.new("RGB", size, "red"), 32, np.array([0.3, 0.9]), True)
    assert crop.pixels.shape == (32, 32, 3) and (crop.pixels == [255, 0, 0]).all()


def test_decode_handles_what_files_hold():
    def encoded(image: Image.Image, kind: str, **options) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert decode_image(encoded(clear, "PNG")).getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(encoded(Image.new("CMYK", (4, 4)), "JPEG")).mode == "RGB"
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate a quarter turn to see it upright
    assert decode_image(encoded(Image.new("RGB", (6, 4)), "JPEG", exif=exif)).size == (4, 6)


def test_a_corrupt_image_is_named_or_skipped_and_counted(tmp_path):
    images = [jpeg(i) for i in range(12)]
    images[5] = images[5][:60]
    _, dataset = make(tmp_path, jpg_0=images)
    at = next(n for n in range(12) if dataset.pair_index(n) == 5)
    error = dataset[at]["error"]
    assert "train.parquet row 5, jpg_0, uid a5" in error and "\n" not in error
    assert collate([dataset[at], dataset[at]]) == {"error": error}
    _, tolerant = make(tmp_path, "--corrupt_images", "skip", jpg_0=images)
    sample = tolerant[at]
    assert sample["skipped"] == 1 and sample["prompt"] == "prompt number 6"


def test_all_images_corrupt_ends_even_when_skipping(tmp_path):
    _, dataset = make(tmp_path, "--corrupt_images", "skip", jpg_0=[b"x"] * 12)
    assert "unreadable image" in dataset[0]["error"]


def test_split_selects_files_by_name(tmp_path):
    for name in ("train-0.parquet", "train-1.parquet", "test_unique-0.parquet", ".cache/train-2.parquet"):
        save_dataset(tmp_path / "data" / name)
    names = lambda split: [p.name for p in local_files(str(tmp_path), split).values()]  # noqa: E731
    assert names("train") == ["train-0.parquet", "train-1.parquet"]
    assert names("test_unique") == ["test_unique-0.parquet"]
    with pytest.raises(UserError, match="no parquet files for split 'test'"):
        names("test")


def test_a_row_of_the_second_shard_is_named_there(tmp_path):
    images = [jpeg(i) for i in range(12)]
    images[3] = b"not an image"
    save_dataset(tmp_path / "data" / "train-0.parquet")
    save_dataset(tmp_path / "data" / "train-1.parquet", jpg_1=images)
    _, dataset = make(tmp_path)  # adds train.parquet, which sorts last
    assert dataset.pairs.source(15).endswith("train-1.parquet row 3")
    at = next(n for n in range(36) if dataset.pair_index(n) == 15)
    assert "train-1.parquet row 3, jpg_1, uid b3" in dataset[at]["error"]
