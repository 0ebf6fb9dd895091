"""Drawn scenes with captions that compose: data for demos and tests that a small CLIP can learn.

A scene is one large object and up to two small ones beside it, each with a color, a texture and a
shape, on a colored ground. Scene `i` of a seed is a pure function of both, so a longer set begins
with the shorter one, and another seed is a validation split.
"""

import functools
import io
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

COLORS = {
    "red": (214, 40, 40),
    "green": (34, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (244, 208, 32),
    "purple": (140, 50, 170),
    "orange": (245, 130, 30),
    "cyan": (40, 190, 210),
    "black": (20, 20, 20),
}
GROUNDS = {
    "white": (245, 245, 245),
    "grey": (150, 150, 150),
    "pink": (250, 200, 205),
    "brown": (110, 75, 50),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
TEXTURES = ("", "striped", "dotted")
CLASSES = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)
"""Name of each label: color and shape of the large object."""

_SIDES = (
    ("left of", (-1.0, 0.0)),
    ("right of", (1.0, 0.0)),
    ("above", (0.0, -1.0)),
    ("below", (0.0, 1.0)),
)
_SUPERSAMPLING = 2


class Thing(NamedTuple):
    """One object; lengths are shares of the image's side."""

    color: str
    texture: str
    shape: str
    side: str
    """Where it lies from the large object; empty: it is the large one."""
    x: float
    y: float
    radius: float

    def __str__(self) -> str:
        size = "small" if self.side else "large"
        return " ".join(filter(None, ("a", size, self.color, self.texture, self.shape)))


def iter_scenes(count: int, seed: int, size: int = 64) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, parts) of `count` scenes of `size` x `size` pixels: jpg, txt, and cls as in CLASSES."""
    for number in range(count):
        rng = np.random.Generator(np.random.Philox(key=[seed, number]))
        ground = list(GROUNDS)[int(rng.integers(len(GROUNDS)))]
        things = draw_things(rng)
        pixels = render(things, GROUNDS[ground], size, rng)
        main = things[0]
        yield (
            f"scene{number:07d}",
            {
                "jpg": _encode(pixels),
                "txt": describe(things, ground),
                "cls": CLASSES.index(f"{main.color} {main.shape}"),
            },
        )


def draw_things(rng: np.random.Generator) -> list[Thing]:
    """The large object, then up to two small ones, not on opposite sides of it."""
    first = int(rng.integers(4))
    second = (first + 2 + int(rng.integers(2))) % 4 if first < 2 else int(rng.integers(2))
    # Few scenes have one object: there are only 768 different ones.
    sides = [_SIDES[side] for side in (first, second)][: int(rng.choice(3, p=[0.1, 0.6, 0.3]))]
    # The large object makes room: it moves away from the small ones.
    shift = -0.17 * np.sum([way for _, way in sides], axis=0) if sides else np.zeros(2)
    center = 0.5 + shift + rng.uniform(-0.04, 0.04, 2)
    looks = rng.choice(len(CLASSES), 1 + len(sides), replace=False).tolist()
    things = []
    for look, (side, way) in zip(looks, [("", (0.0, 0.0)), *sides], strict=True):
        color, shape = CLASSES[look].split()
        texture = TEXTURES[int(rng.integers(len(TEXTURES)))]
        slack = rng.uniform(-0.08, 0.08, 2) * (np.array(way) == 0) if side else 0
        x, y = center + 0.43 * np.array(way) + slack
        radius = rng.uniform(0.11, 0.13) if side else rng.uniform(0.23, 0.27)
        things.append(Thing(color, texture, shape, side, float(x), float(y), float(radius)))
    return things


def describe(things: list[Thing], ground: str) -> str:
    """The caption: `a small red circle left of a large blue striped square on grey`."""
    main, *others = things
    if not others:
        return f"{main} on {ground}"
    parts = [f"{thing} {thing.side}" for thing in others]
    return f"{' and '.join(parts)} {main} on {ground}"


def render(
    things: list[Thing],
    ground: tuple[int, int, int],
    size: int,
    rng: np.random.Generator,
) -> NDArray[np.uint8]:  # (size, size, 3)
    """The picture, with a little noise so that equal scenes are not equal bytes."""
    side = size * _SUPERSAMPLING
    canvas = Image.new("RGB", (side, side), ground)
    for thing in things:
        mask = Image.new("L", (side, side), 0)
        _draw_shape(ImageDraw.Draw(mask), thing, side)
        canvas.paste(_texture(thing, side), mask=mask)
    pixels = np.asarray(canvas.resize((size, size), Image.Resampling.BOX), np.float32)
    noise = 4 * rng.standard_normal(pixels.shape, np.float32)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


def _draw_shape(draw: ImageDraw.ImageDraw, thing: Thing, side: int) -> None:
    center, radius = np.array([thing.x, thing.y]) * side, thing.radius * side
    if thing.shape in ("circle", "ring"):
        draw.ellipse(_box(center, radius), fill=255)
        if thing.shape == "ring":
            draw.ellipse(_box(center, radius * 0.5), fill=0)
    elif thing.shape == "heart":
        for way in (-0.45, 0.45):
            draw.ellipse(_box(center + radius * np.array([way, -0.3]), radius * 0.52), fill=255)
        _draw_outline(draw, center, radius, [(-0.95, -0.05), (0.95, -0.05), (0.0, 1.0)])
    else:
        _draw_outline(draw, center, radius, _OUTLINES[thing.shape])


def _star() -> list[tuple[float, float]]:
    angles = np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2, 0.42, 1.05)
    x, y = radii * np.sin(angles), -radii * np.cos(angles)
    return list(zip(x.tolist(), y.tolist(), strict=True))


_OUTLINES = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0.0, -1.0), (0.95, 0.8), (-0.95, 0.8)],
    "diamond": [(0.0, -1.05), (0.7, 0.0), (0.0, 1.05), (-0.7, 0.0)],
    "star": _star(),
    "cross": [
        (x, y)
        for x, y in (
            *((-0.33, -1.0), (0.33, -1.0), (0.33, -0.33), (1.0, -0.33)),
            *((1.0, 0.33), (0.33, 0.33), (0.33, 1.0), (-0.33, 1.0)),
            *((-0.33, 0.33), (-1.0, 0.33), (-1.0, -0.33), (-0.33, -0.33)),
        )
    ],
}


def _draw_outline(
    draw: ImageDraw.ImageDraw,
    center: NDArray[np.float64],  # (2,)
    radius: float,
    corners: list[tuple[float, float]],
) -> None:
    draw.polygon([tuple(center + radius * np.array(corner)) for corner in corners], fill=255)


def _box(center: NDArray[np.float64], radius: float) -> list[float]:
    return [*(center - radius).tolist(), *(center + radius).tolist()]


@functools.cache
def _pattern(texture: str, side: int) -> NDArray[np.bool_]:  # (side, side)
    """Where the texture is light."""
    period = max(4.0, 0.11 * side)
    y, x = np.mgrid[:side, :side]
    if texture == "striped":
        return (x + y) % period < 0.42 * period
    if texture == "dotted":
        from_dot = np.hypot(x % period - period / 2, y % period - period / 2)
        return from_dot < 0.3 * period
    return np.zeros((side, side), bool)


def _texture(thing: Thing, side: int) -> Image.Image:
    color = np.array(COLORS[thing.color], np.uint8)
    light = (color // 4 + 191).astype(np.uint8)
    return Image.fromarray(np.where(_pattern(thing.texture, side)[..., None], light, color))


def _encode(
    pixels: NDArray[np.uint8],  # (h, w, 3)
) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()
