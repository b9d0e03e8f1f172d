"""Training images: decoding, and the square crop that the model is trained on."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP")  # Pillow's other readers can do more than decode pixels


class Unreadable(Exception):
    """Bytes that cannot be decoded as an image; the message says why."""


class CorruptImage(Exception):
    """An image of the dataset that cannot be decoded; the message names file, row and uid."""


def unreadable(where: str, error: Exception) -> str:
    return f"{where}: unreadable image ({error}); corrupt_images: skip goes on without it"


@dataclass
class Crop:
    pixels: np.ndarray  # (R, R, 3) uint8
    time_ids: tuple[int, int, int, int, int, int]  # SDXL's micro-conditioning


def decode_image(data: bytes) -> Image.Image:
    """An upright 8-bit RGB image from encoded bytes; transparency becomes white. Raises Unreadable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # above 89 million pixels
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(data), formats=FORMATS))
            if image.mode.startswith("I"):  # 16 bits: Pillow would clip them at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except UnidentifiedImageError:
        raise Unreadable(f"no {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's decoders raise many kinds on bad bytes
        raise Unreadable(" ".join(str(error).split()) or type(error).__name__) from None


def resize_crop_flip(image: Image.Image, resolution: int, place: np.ndarray, flip: bool) -> Crop:
    """Short side to `resolution`, mirrored if `flip`, then the square at the relative `place` (y, x) in [0, 1]."""
    width, height = image.size
    scale = resolution / min(width, height)
    size = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
    # Crop in source coordinates, so that a very long image is never enlarged as a whole.
    top, left = (round(float(p) * (s - resolution)) for p, s in zip(place, (size[1], size[0]), strict=True))
    if flip:
        image = ImageOps.mirror(image)
    sx, sy = width / size[0], height / size[1]
    box = (left * sx, top * sy, (left + resolution) * sx, (top + resolution) * sy)
    image = image.resize((resolution, resolution), Image.Resampling.BILINEAR, box=box)
    return Crop(np.asarray(image).copy(), (height, width, top, left, resolution, resolution))
