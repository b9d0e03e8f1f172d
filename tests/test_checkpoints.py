"""A checkpoint is whole, or it is said what is wrong with it."""

import json
import shutil

import pytest

from ncp.common.files import sha256
from ncp.training.checkpoints import fault


@pytest.fixture
def checkpoint(tmp_path):
    """A folder as `State.save` leaves it, with stand-in contents."""
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    (folder / "optimizer.pt").write_bytes(b"0123456789")
    files = {"optimizer.pt": {"bytes": 10, "sha256": sha256(folder / "optimizer.pt")}}
    (folder / "manifest.json").write_text(json.dumps({"step": 7, "files": files}))
    return folder


def test_a_whole_checkpoint_has_no_fault(checkpoint):
    assert fault(checkpoint) is None


@pytest.mark.parametrize(
    ("harm", "said"),
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
def test_a_damaged_checkpoint_is_found_out(checkpoint, harm, said):
    harm(checkpoint)
    assert fault(checkpoint) == said
