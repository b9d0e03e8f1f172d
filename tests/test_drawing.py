"""Grids of pictures."""

from PIL import Image

from ncp.training.drawing import grid


def test_grid_has_a_cell_for_every_picture():
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    picture = grid({"reference": [red, red], "tuned": [blue, blue]}, ["a prompt", "another " * 20], cell=100)
    columns, rows = picture.width // 100, 2
    left, head = picture.width - 100 * columns, picture.height - 100 * rows
    centre = lambda row, column: picture.getpixel((left + 100 * column + 50, head + 100 * row + 50))  # noqa: E731
    assert [centre(0, c) for c in (0, 1)] == [(255, 0, 0)] * 2
    assert [centre(1, c) for c in (0, 1)] == [(0, 0, 255)] * 2
