"""The perceptual loss in half precision against eq. 13 in float64, over the whole schedule (tiny/precision.py)."""

import os

import pytest
import torch

from tiny.precision import compare

TIMESTEPS = [1, 2, 3, 5, 8, 12, 20, 35, 60, *range(100, 1000, 50), 975, 990, 999]


@pytest.fixture(autouse=True)
def all_cores():
    """These tensors are large enough for them (tests/conftest.py)."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_default_secant_is_right_at_every_timestep(dtype):
    figures = {t: compare(dtype, "auto", t) for t in TIMESTEPS}
    wrong = {t: f for t, f in figures.items() if abs(f[0] - 1) > 0.02 or f[1] < 0.99}
    assert not wrong, wrong


def test_the_plain_formula_is_not():
    # What the secant is for: were this to pass one day, the default should be the paper's formula again.
    assert all(compare(torch.bfloat16, "1", t)[1] < 0.9 for t in (100, 300, 500))


def test_secant_one_in_float32_is_equation_13():
    for t in (1, 20, 500, 999):
        ratio, cosine = compare(torch.float32, "1", t)
        assert ratio == pytest.approx(1, abs=2e-3) and cosine > 0.9999
