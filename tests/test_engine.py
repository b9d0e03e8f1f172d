"""Learning rate and effective batch, by hand."""

import dataclasses
import itertools

import numpy as np
import pytest

import train_ncp_dpo
from ncp.common.config import parse
from ncp.common.errors import UserError
from ncp.training.engine import effective_batch, learning_rate


def config(*extra: str):
    return parse(
        train_ncp_dpo.Config,
        ["--pretrained_model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o", *extra],
    )


def test_learning_rate_warms_up_then_stays():
    c = config("--learning_rate", "1e-8", "--lr_warmup_steps", "4", "--max_train_steps", "10")
    # 1e-8 x 2048 pairs = 2.048e-5, reached at step 4 by quarters.
    rates = [learning_rate(c, step, 2048) for step in (1, 2, 4, 10)]
    assert rates == pytest.approx([0.512e-5, 1.024e-5, 2.048e-5, 2.048e-5])
    assert learning_rate(config("--scale_lr", "false"), 1, 2048) == 1e-8


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_falling_learning_rate(name):
    """Highest at the end of the warm-up, half of it in the middle of the rest, 0 one step after the last."""
    c = config("--scale_lr", "false", "--learning_rate", "1", "--lr_warmup_steps", "3", "--max_train_steps", "12")
    c = dataclasses.replace(c, lr_scheduler=name)
    rates = [learning_rate(c, step, 1) for step in range(1, 13)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1]) and rates[7] == pytest.approx(0.5)
    assert all(a > b > 0 for a, b in itertools.pairwise(rates[2:]))
    assert rates[-1] == pytest.approx(0.1 if name == "linear" else (1 - np.cos(np.pi / 10)) / 2)
    no_warmup = dataclasses.replace(c, lr_warmup_steps=0)
    assert learning_rate(no_warmup, 1, 1) == 1


def test_batch_arithmetic():
    c = config("--train_batch_size", "8", "--gradient_accumulation_steps", "64", "--effective_batch_size", "2048")
    assert effective_batch(c, 4) == 2048
    with pytest.raises(UserError, match=r"64 x 2 processes = 1024; set gradient_accumulation_steps: 128$"):
        effective_batch(c, 2)
    with pytest.raises(UserError, match=r"64 x 3 processes = 1536$"):  # 2048 is no multiple of 8 x 3
        effective_batch(c, 3)
