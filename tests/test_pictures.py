"""Validation pictures: what their keys change. When they are drawn: test_guard.py; by which sampler: test_models.py."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import arguments, run_here

LEFT, SIDE, GAP = 90, 160, 2  # of `drawing.grid`: the rows' names, a cell, and what is left free around a picture


def drawn(assets: Path, folder: Path, *extra: str) -> list[np.ndarray]:
    """The reference's pictures of one prompt, given twice, after a step of fine-tuning."""
    keys = {"validation_prompts": "[one, one]", "validation_num_inference_steps": "2", "max_train_steps": "1"}
    run_here("sft", arguments(assets, folder, *(w for k, v in keys.items() for w in (f"--{k}", v)), *extra))
    picture = Image.open(folder / "validation" / "step-000001.png")
    top = picture.height - 2 * SIDE
    boxes = [(LEFT + SIDE * i + GAP, top + GAP, LEFT + SIDE * (i + 1) - GAP, top + SIDE - GAP) for i in range(2)]
    return [np.asarray(picture.crop(box)) for box in boxes]


@pytest.fixture(scope="module")
def plain(assets, tmp_path_factory) -> list[np.ndarray]:
    return drawn(assets, tmp_path_factory.mktemp("plain") / "out")


def test_seeds_count_up_from_validation_seed(assets, tmp_path, plain):
    first, second = drawn(assets, tmp_path / "out", "--validation_seed", "1")
    assert np.array_equal(first, plain[1])  # seed 1 in both
    assert not np.array_equal(plain[0], plain[1]) and not np.array_equal(second, first)


@pytest.mark.parametrize("extra", [["--validation_guidance_scale", "1.5"], ["--validation_num_inference_steps", "3"]])
def test_guidance_and_steps_change_the_picture(assets, tmp_path, plain, extra):
    assert not np.array_equal(drawn(assets, tmp_path / "out", *extra)[0], plain[0])
