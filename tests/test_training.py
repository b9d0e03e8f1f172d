"""What surrounds the loop: schedule, batch arithmetic, checkpoints that are whole or refused."""

import json
import shutil

import pytest
import torch
from PIL import Image

import train_ncp_dpo
from ncp.common.config import parse
from ncp.common.errors import UserError
from ncp.training import checkpoints
from ncp.training.checkpoints import fault
from ncp.training.drawing import grid
from ncp.training.engine import effective_batch, learning_rate
from ncp.training.meter import Meter
from ncp.training.summary import describe_loss


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


def test_batch_arithmetic():
    c = config("--train_batch_size", "8", "--gradient_accumulation_steps", "64", "--effective_batch_size", "2048")
    assert effective_batch(c, 4) == 2048
    with pytest.raises(UserError, match=r"64 x 2 processes = 1024; set gradient_accumulation_steps: 128$"):
        effective_batch(c, 2)
    with pytest.raises(UserError, match=r"64 x 3 processes = 1536$"):  # 2048 is no multiple of 8 x 3
        effective_batch(c, 3)


def test_beta_is_announced_in_both_conventions():
    said = describe_loss(config(), "auto")
    assert "beta 2500 " in said and "5000" in said and "derivative over 0.016" in said
    assert "eq. 13 as printed" in describe_loss(config(), "1")


@pytest.fixture
def checkpoint(tmp_path):
    """A folder as `save_checkpoint` leaves it, with stand-in contents."""
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    (folder / "optimizer.pt").write_bytes(b"0123456789")
    files = {"optimizer.pt": {"bytes": 10, "sha256": checkpoints.sha256(folder / "optimizer.pt")}}
    (folder / "manifest.json").write_text(json.dumps({"step": 7, "files": files}))
    return folder


def test_a_whole_checkpoint_has_no_fault(checkpoint):
    assert fault(checkpoint) is None


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (lambda f: (f / "optimizer.pt").write_bytes(b"01234"), "optimizer.pt is damaged"),  # truncated
        (lambda f: (f / "optimizer.pt").write_bytes(b"0123456780"), "optimizer.pt is damaged"),  # one bit off
        (lambda f: (f / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda f: (f / "manifest.json").write_text('{"step": 7'), "manifest.json is damaged"),
        (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json is damaged"),
        (lambda f: shutil.rmtree(f), "no such checkpoint folder"),
    ],
)
def test_a_damaged_checkpoint_is_found_out(checkpoint, harm, fault):
    harm(checkpoint)
    assert fault(checkpoint) == fault


def test_grid_has_a_cell_for_every_picture():
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    picture = grid({"reference": [red, red], "tuned": [blue, blue]}, ["a prompt", "another " * 20], cell=100)
    columns, rows = picture.width // 100, 2
    left, head = picture.width - 100 * columns, picture.height - 100 * rows
    centre = lambda row, column: picture.getpixel((left + 100 * column + 50, head + 100 * row + 50))  # noqa: E731
    assert [centre(0, c) for c in (0, 1)] == [(255, 0, 0)] * 2
    assert [centre(1, c) for c in (0, 1)] == [(0, 0, 255)] * 2


def test_meter_averages_between_log_entries():
    from accelerate import Accelerator

    meter = Meter()
    meter.start()
    meter.add({"loss": torch.tensor([1.0, 3.0]), "grad_norm": torch.tensor(5.0)}, samples=2)
    meter.add({"loss": torch.tensor([4.0, 4.0])}, samples=2)
    meter.stop()
    figures = meter.flush(Accelerator(cpu=True))
    assert figures["loss"] == 3 and figures["grad_norm"] == 5
    assert figures["samples_per_second"] > 0 and figures["peak_memory_gib"] > 0
    assert not meter.sums and meter.samples == 0
