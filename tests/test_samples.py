"""Samples are a function of (seed, position), however a run is split; a corrupt image is named or skipped."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import jpeg, save_dataset
from runs import small_dataset

from ncp.training.images import resize_crop_flip
from ncp.training.samples import collate, loader


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)


def test_a_sample_depends_on_seed_and_position_only(tmp_path):
    _, first = small_dataset(tmp_path, "--proportion_empty_prompts", "0.5")
    _, second = small_dataset(tmp_path, "--proportion_empty_prompts", "0.5")
    order = np.random.default_rng(0).permutation(30).tolist()
    samples = {n: first[n] for n in range(30)}
    assert all(same(samples[n], second[n]) for n in order)
    _, other = small_dataset(tmp_path, "--seed", "1")
    assert not torch.equal(other[3]["eps"], samples[3]["eps"])
    assert not torch.equal(samples[3]["eps"], samples[15]["eps"])  # the next epoch draws anew
    assert {s["prompt"] == "" for s in samples.values()} == {True, False}


def test_each_epoch_is_a_permutation_and_epochs_differ(tmp_path):
    _, dataset = small_dataset(tmp_path)
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
    config, dataset = small_dataset(tmp_path, *extra)
    seen = []
    for rank in range(processes):
        sampler = loader(dataset, config, 1, rank, processes).batch_sampler
        assert len(list(sampler)) == len(sampler)
        per_step = np.array(list(sampler)).reshape(2, -1)  # steps 1 and 2 of 0, 1, 2
        seen.append(per_step)
    steps = np.concatenate(seen, axis=1)
    assert [sorted(s) for s in steps.tolist()] == [[4, 5, 6, 7], [8, 9, 10, 11]]


def test_workers_change_nothing(tmp_path):
    config, dataset = small_dataset(tmp_path, "--train_batch_size", "2", "--max_train_steps", "3")
    alone = list(loader(dataset, config, 0, 0, 1))
    config.dataloader_num_workers = 2
    assert all(same(a, b) for a, b in zip(alone, loader(dataset, config, 0, 0, 1), strict=True))


def test_timesteps_have_a_predecessor(tmp_path):
    for offset, lowest in (("1", 1), ("700", 700), ("x0", 1)):
        _, dataset = small_dataset(tmp_path, "--timestep_offset", offset)
        t = [dataset[n]["timestep"].item() for n in range(200)]
        assert lowest <= min(t) and max(t) <= 999
        assert max(t) - min(t) > 0.8 * (999 - lowest)


def test_winners_come_first_with_their_own_size_and_crop(tmp_path):
    _, dataset = small_dataset(tmp_path, "--center_crop", "true", "--random_flip", "false")
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
    _, dataset = small_dataset(tmp_path, "--center_crop", "true")
    _, straight = small_dataset(tmp_path, "--center_crop", "true", "--random_flip", "false")
    outcomes = set()
    for n in range(12):
        mirrored = []
        for image, plain in zip(dataset[n]["pixels"].float(), straight[n]["pixels"].float(), strict=True):
            # Nearer to the mirror image than to the image; an odd margin moves the crop by a pixel.
            mirrored.append((image - plain.flip(-1)).abs().mean() < (image - plain).abs().mean())
        assert mirrored[0] == mirrored[1]
        outcomes.add(bool(mirrored[0]))
    assert outcomes == {True, False}


def test_a_corrupt_image_is_named_or_skipped_and_counted(tmp_path):
    images = [jpeg(i) for i in range(12)]
    images[5] = images[5][:60]
    _, dataset = small_dataset(tmp_path, jpg_0=images)
    at = next(n for n in range(12) if dataset.pair_index(n) == 5)
    error = dataset[at]["error"]
    assert "train.parquet row 5, jpg_0, uid a5" in error and "\n" not in error
    assert collate([dataset[at], dataset[at]]) == {"error": error}
    _, tolerant = small_dataset(tmp_path, "--corrupt_images", "skip", jpg_0=images)
    sample = tolerant[at]
    assert sample["skipped"] == 1 and sample["prompt"] == "prompt number 6"


def test_all_images_corrupt_ends_even_when_skipping(tmp_path):
    _, dataset = small_dataset(tmp_path, "--corrupt_images", "skip", jpg_0=[b"x"] * 12)
    assert "unreadable image" in dataset[0]["error"]


def test_a_row_of_the_second_shard_is_named_there(tmp_path):
    images = [jpeg(i) for i in range(12)]
    images[3] = b"not an image"
    save_dataset(tmp_path / "data" / "train-0.parquet")
    save_dataset(tmp_path / "data" / "train-1.parquet", jpg_1=images)
    _, dataset = small_dataset(tmp_path)  # adds train.parquet, which sorts last
    assert dataset.pairs.source(15).endswith("train-1.parquet row 3")
    at = next(n for n in range(36) if dataset.pair_index(n) == 15)
    assert "train-1.parquet row 3, jpg_1, uid b3" in dataset[at]["error"]
