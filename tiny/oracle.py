"""The exact judge of the embedded world: prompt alignment and visual appeal, from pixels alone.

It measures an image (background colour, object mask, object colour, best-fitting shape) and
compares the measurements with the prompt. Both scores are in [0, 1] and use no neural network, so
an improvement by this judge cannot be an artefact of a learned reward.

    alignment = mean(shape, colour, background), each the probability of the named word
    appeal    = mean(size, centring, clean object, clean background): the taste of the simulated
                annotators, who like one large, centred, plainly painted object on a plain ground
    overall   = (alignment + appeal) / 2
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from hashlib import sha256

import numpy as np

from tiny.world import COLOURS, SHAPES, SIDE, mask, parse

PALETTE = np.array(list(COLOURS.values()), np.float32) / 255
QUESTIONS = ("overall", "appeal", "alignment")  # the paper's Q1, Q2, Q3
_SCORES: dict[tuple[bytes, str], tuple[float, float]] = {}


def score(images: Iterable, prompts: Iterable[str]) -> dict[str, np.ndarray]:
    """Scores of images against their prompts.

    images: PIL images or arrays (H, W, 3), uint8 or float in [0, 1]; other sizes are resized to 64.
    Returns {"alignment", "appeal", "overall"}: float64 arrays (N,) in [0, 1].
    Raises ValueError for a prompt outside the world.
    """
    rows = [_known(_to_array(image), prompt) for image, prompt in zip(images, prompts, strict=True)]
    alignment, appeal = np.array(rows, dtype=np.float64).reshape(-1, 2).T
    return {"alignment": alignment, "appeal": appeal, "overall": (alignment + appeal) / 2}


def measure(x: np.ndarray) -> dict:
    """Measures an image (SIDE, SIDE, 3) float in [0, 1], independently of its prompt.

    Keys: background and colour (RGB), shape_fit (IoU of each of SHAPES), area (share of the image),
    offset (pixels from the centre), object_std and background_std (luminance). Without a visible
    object: area 0, shape_fit all 0, colour nan.
    """
    border = np.concatenate(
        [x[:3].reshape(-1, 3), x[-3:].reshape(-1, 3), x[3:-3, :3].reshape(-1, 3), x[3:-3, -3:].reshape(-1, 3)]
    )
    background = np.median(border, axis=0)
    distance = np.linalg.norm(x - background, axis=-1)
    threshold = max(0.2, 0.5 * np.percentile(distance, 98))
    obj = distance > threshold
    luminance = x.mean(-1)
    if obj.sum() < 40:
        return {
            "background": background,
            "colour": np.full(3, np.nan),
            "shape_fit": np.zeros(len(SHAPES)),
            "area": 0.0,
            "offset": np.inf,
            "object_std": np.inf,
            "background_std": float(luminance.std()),
        }
    ys, xs = np.nonzero(obj)
    cy, cx = ys.mean() + 0.5, xs.mean() + 0.5
    core, ground = _erode(obj), _erode(~obj)
    core = core if core.sum() >= 10 else obj
    fit = np.array([_iou(obj, _template(s, cx, cy, obj.sum())) for s in SHAPES])
    return {
        "background": background,
        "colour": np.median(x[core], axis=0),
        "shape_fit": fit,
        "area": obj.mean(),
        "offset": float(np.hypot(cx - SIDE / 2, cy - SIDE / 2)),
        "object_std": float(luminance[core].std()),
        "background_std": float(luminance[ground].std()) if ground.any() else np.inf,
    }


def _known(x: np.ndarray, prompt: str) -> tuple[float, float]:
    """`_score_one`, once per image and prompt: three judges ask for one score each."""
    key = (sha256(x.tobytes()).digest(), prompt)
    if key not in _SCORES:
        _SCORES[key] = _score_one(x, prompt)
    return _SCORES[key]


def _score_one(x: np.ndarray, prompt: str) -> tuple[float, float]:
    scene, m = parse(prompt), measure(x)
    background = _softmax(-_sq(PALETTE - m["background"]) / (2 * 0.12**2))[list(COLOURS).index(scene.background)]
    if m["area"] == 0:
        return background / 3, _bump(m["background_std"], 0.06) / 4
    colour = _softmax(-_sq(PALETTE - m["colour"]) / (2 * 0.12**2))[list(COLOURS).index(scene.colour)]
    fit = m["shape_fit"]
    shape = _softmax(fit / 0.03)[SHAPES.index(scene.shape)] * min(1.0, fit.max() / 0.85)
    appeal = (
        _bump(np.sqrt(m["area"]) - 0.52, 0.14)
        + _bump(m["offset"], 8.0)
        + _bump(m["object_std"], 0.08)
        + _bump(m["background_std"], 0.06)
    ) / 4
    return float(shape + colour + background) / 3, float(appeal)


def _template(shape: str, cx: float, cy: float, area: float) -> np.ndarray:
    """The shape's mask with a given centroid and area in pixels."""
    unit_area, ox, oy = _unit_moments(shape)
    radius = np.sqrt(area / unit_area)
    return mask(shape, cx - ox * radius, cy - oy * radius, radius) > 0.5


@lru_cache
def _unit_moments(shape: str) -> tuple[float, float, float]:
    """(area, centroid x, centroid y) of a shape of unit radius."""
    m = mask(shape, 200, 200, 100, side=400)
    ys, xs = np.mgrid[0:400, 0:400] + 0.5
    return (
        float(m.sum() / 1e4),
        float((m * xs).sum() / m.sum() - 200) / 100,
        float((m * ys).sum() / m.sum() - 200) / 100,
    )


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / max(1, (a | b).sum())


def _erode(m: np.ndarray) -> np.ndarray:
    """Pixels whose four neighbours are in the mask too. Edges, which every codec blurs, are left out."""
    p = np.pad(m, 1, mode="edge")
    return m & p[:-2, 1:-1] & p[2:, 1:-1] & p[1:-1, :-2] & p[1:-1, 2:]


def _bump(value: float, width: float) -> float:
    return float(np.exp(-((value / width) ** 2)))


def _sq(v: np.ndarray) -> np.ndarray:
    return (v**2).sum(-1)


def _softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def _to_array(image) -> np.ndarray:
    from PIL import Image

    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX))
    x = np.asarray(image)
    x = x.astype(np.float32) / 255 if x.dtype == np.uint8 else x.astype(np.float32)
    if x.shape != (SIDE, SIDE, 3):
        raise ValueError(f"image of shape {x.shape}; expected ({SIDE}, {SIDE}, 3)")
    return x
