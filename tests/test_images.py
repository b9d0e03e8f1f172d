"""Images as training sees them: decoded upright and on white, and cut to the square."""

import io

import numpy as np
import pytest
from PIL import Image

from ncp.training.images import decode_image, resize_crop_flip


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
