"""The embedded world: one coloured shape on a coloured background, and the words that describe it.

A prompt fixes three attributes (shape, colour, background). Position, size, texture and the
background's finish are free: the base model draws them at random, and the simulated annotators
prefer some of them. Everything here is NumPy. The renderer is exact, and deterministic given its
random generator; `tiny/oracle.py` measures what it has drawn.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

SIDE = 64  # pixels
COLOURS = {  # sRGB, chosen at least 0.5 apart (Euclidean, unit cube)
    "red": (215, 35, 40),
    "yellow": (245, 220, 50),
    "green": (45, 150, 60),
    "cyan": (60, 205, 215),
    "blue": (45, 80, 215),
    "pink": (235, 100, 170),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
TEXTURES = ("plain", "striped", "dotted")
FINISHES = ("plain", "gradient", "grainy")
PLAIN_FIRST = (0.2, 0.4, 0.4)  # how often each texture and each finish is drawn
TEMPLATES = (
    "a {colour} {shape} on a {background} background",
    "{colour} {shape}, {background} background",
    "a picture of a {colour} {shape} in front of a {background} wall",
)


@dataclass(frozen=True)
class Scene:
    """What a prompt says: three words."""

    shape: str
    colour: str
    background: str

    def prompt(self, template: int = 0) -> str:
        return TEMPLATES[template].format(shape=self.shape, colour=self.colour, background=self.background)


def all_scenes() -> list[Scene]:
    """Every scene whose shape and background differ in colour: 8 x 8 x 7 = 448, in a fixed order."""
    return [
        Scene(shape, colour, background)
        for shape, colour, background in itertools.product(SHAPES, COLOURS, COLOURS)
        if colour != background
    ]


def split_scenes(validation: int = 88, seed: int = 7) -> tuple[list[Scene], list[Scene]]:
    """(train, validation) scenes, disjoint. Every value of every attribute occurs in both."""
    scenes = all_scenes()
    order = np.random.default_rng(seed).permutation(len(scenes))
    return [scenes[i] for i in order[validation:]], [scenes[i] for i in order[:validation]]


def parse(prompt: str) -> Scene:
    """The scene that a prompt of this world describes.

    Raises ValueError for a prompt that names no shape or not exactly two colours.
    """
    words = prompt.lower().replace(",", " ").split()
    shapes = [w for w in words if w in SHAPES]
    colours = [w for w in words if w in COLOURS]
    if len(shapes) != 1 or len(colours) != 2:
        raise ValueError(f"not a prompt of the embedded world (one shape, two colours): {prompt!r}")
    return Scene(shapes[0], colours[0], colours[1])


def inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether points are inside a shape of unit size; u to the right, v downwards, both about [-1, 1]."""
    r = np.hypot(u, v)
    if shape == "circle":
        return r <= 0.9
    if shape == "square":
        return np.maximum(abs(u), abs(v)) <= 0.8
    if shape == "triangle":
        return (v <= 0.75) & (abs(u) <= (v + 0.95) * 0.6)
    if shape == "diamond":
        return abs(u) * 1.25 + abs(v) <= 1.05
    if shape == "star":  # five points: the edge of a pentagram in polar form
        angle = (np.arctan2(u, -v) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5
        return r * (np.cos(angle) + np.tan(0.3 * np.pi) * abs(np.sin(angle))) <= 1.05
    if shape == "cross":
        return np.minimum(abs(u), abs(v)) <= np.where(np.maximum(abs(u), abs(v)) <= 0.95, 0.28, -1)
    if shape == "ring":
        return (r <= 0.95) & (r >= 0.5)
    if shape == "heart":
        x, y = u * 1.2, -(v - 0.1) * 1.2 + 0.1
        return (x**2 + y**2 - 0.7) ** 3 <= 1.3 * x**2 * y**3
    raise ValueError(f"unknown shape {shape!r}; one of {', '.join(SHAPES)}")


def mask(shape: str, cx: float, cy: float, radius: float, side: int = SIDE, supersample: int = 2) -> np.ndarray:
    """Coverage in [0, 1] of a shape with centre (cx, cy) and `radius` pixels: (side, side) float32."""
    n = side * supersample
    grid = (np.arange(n, dtype=np.float32) + 0.5) / supersample
    m = inside(shape, (grid[None, :] - cx) / radius, (grid[:, None] - cy) / radius)
    return m.reshape(side, supersample, side, supersample).mean((1, 3), dtype=np.float32)


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """One image of a scene with its free attributes drawn from `rng`: (SIDE, SIDE, 3) float32 in [0, 1].

    In most the object is small, off centre, textured or uneven, so that a model trained on them can learn much from
    annotators who prefer the opposite.
    """
    radius = rng.uniform(8, 24)
    cx, cy = SIDE / 2 + rng.uniform(-1, 1, 2) * min(16.0, SIDE / 2 - radius + 2)
    texture, finish = rng.choice(TEXTURES, p=PLAIN_FIRST), rng.choice(FINISHES, p=PLAIN_FIRST)
    ink = np.array(COLOURS[scene.colour], np.float32) / 255
    paper = np.array(COLOURS[scene.background], np.float32) / 255

    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
    background = np.broadcast_to(paper, (SIDE, SIDE, 3)).copy()
    if finish == "gradient":
        ramp = (y / (SIDE - 1) - 0.5) * rng.choice([-1, 1])
        background += 0.2 * ramp[..., None]
    elif finish == "grainy":
        coarse = rng.normal(0, 0.05, (SIDE // 4, SIDE // 4, 1)).astype(np.float32)
        background += np.kron(coarse, np.ones((4, 4, 1), np.float32))

    foreground = np.broadcast_to(ink, (SIDE, SIDE, 3)).copy()
    second = ink + 0.45 * (np.float32(0.5) - ink)  # towards grey: visible on black and on white
    if texture == "striped":
        foreground[((x + y) % 12) < 5] = second
    elif texture == "dotted":
        foreground[np.hypot((x % 10) - 5, (y % 10) - 5) < 2.9] = second

    coverage = mask(scene.shape, cx, cy, radius)[..., None]
    return np.clip(background * (1 - coverage) + foreground * coverage, 0, 1)


def with_wrong_word(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one of its three words replaced: a mislabelled caption, as web data has them."""
    field = rng.choice(["shape", "colour", "background"])
    values = SHAPES if field == "shape" else tuple(COLOURS)
    taken = {scene.shape, scene.colour, scene.background}
    choice = rng.choice([v for v in values if v not in taken])
    return Scene(**{**scene.__dict__, field: str(choice)})
