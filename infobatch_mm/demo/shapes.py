"""A small image-classification data set in ImageNet's layout, drawn on the spot.

Ten classes of figures and textures. Most pictures show theirs large and clear, soon learned; in a long tail it
is small, faint, turned, behind clutter, dim and noisy, so that there is something to prune.

    python -m infobatch_mm.demo.shapes data/demo-shapes
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .command import run
from .photo import draw_difficulty, photograph

_Colour = tuple[int, int, int]


def _polar(angles: np.ndarray, radii: np.ndarray | float) -> np.ndarray:
    """Corners of an outline from their polar coordinates, shape ``(N, 2)``; angle 0 points up."""
    return np.stack([radii * np.sin(angles), -radii * np.cos(angles)], axis=1)


def _regular(corners: int) -> np.ndarray:
    return _polar(2 * np.pi * np.arange(corners) / corners, 1.0)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 48)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y - 2.5], axis=1) / 15


_ROUND = np.linspace(0, 2 * np.pi, 48)
_CROSS = [(-1, 3), (1, 3), (1, 1), (3, 1), (3, -1), (1, -1), (1, -3), (-1, -3), (-1, -1), (-3, -1), (-3, 1), (-1, 1)]
#: Outlines of the figures around (0, 0), of radius 1.
_OUTLINES: dict[str, np.ndarray] = {
    "circle": _regular(48),
    "cross": np.array(_CROSS) / 3,
    "heart": _heart(),
    "hexagon": _regular(6),
    # along the outer edge and back along the inner one
    "ring": np.concatenate([_polar(_ROUND, 1.0), _polar(_ROUND[::-1], 0.55)]),
    "square": _regular(4) @ np.array([[1, 1], [-1, 1]]) / np.sqrt(2),
    "star": _polar(np.pi * np.arange(10) / 5, np.tile([1.0, 0.42], 5)),
    "triangle": _regular(3),
}
_TEXTURES = ("checkers", "stripes")
#: Names of the classes; in the order of their folders.
CLASSES: tuple[str, ...] = tuple(sorted([*_OUTLINES, *_TEXTURES]))
# Figures are drawn larger and shrunk, for smooth edges.
_FINER = 4


def draw_picture(rng: np.random.Generator, name: str, difficulty: float, size: int) -> Image.Image:
    """Draw one picture.

    Args:
        rng (np.random.Generator): Source of the picture.
        name (str): One of :data:`CLASSES`.
        difficulty (float): In [0, 1]; smaller and fainter, turned further, more clutter, less light, more noise.
        size (int): Width and height in pixels.

    Returns:
        Image.Image: RGB image of ``size`` x ``size``.
    """
    canvas = _FINER * size
    ground, ink = _colours(rng, difficulty)
    image = Image.new("RGB", (canvas, canvas), ground)
    draw = ImageDraw.Draw(image)
    radius = canvas * rng.uniform(0.34, 0.42) * (1 - 0.5 * difficulty)
    slack = canvas / 2 - radius
    centre = canvas / 2 + rng.uniform(-1, 1, 2) * slack * (0.3 + 0.7 * difficulty)
    angle = rng.uniform(-1, 1) * np.pi * (0.06 + 0.5 * difficulty)
    cos, sin = np.cos(angle), np.sin(angle)
    rotation = np.array([[cos, sin], [-sin, cos]])
    for outline in _outlines(rng, name):
        draw.polygon([(x, y) for x, y in centre + radius * outline @ rotation], fill=ink)
    for _ in range(rng.poisson(5 * difficulty)):
        ends = [tuple(end) for end in rng.uniform(0, canvas, (2, 2))]
        r, g, b = (int(v) for v in rng.uniform(0, 255, 3))
        draw.line(ends, fill=(r, g, b), width=int(canvas * rng.uniform(0.02, 0.08)))
    return photograph(image.reduce(_FINER), rng, difficulty, blur=0.8)


def _outlines(rng: np.random.Generator, name: str) -> list[np.ndarray]:
    """The polygons that a class is drawn with, of radius 1."""
    if name in _OUTLINES:
        return [_OUTLINES[name]]
    fields = int(rng.integers(4, 6))
    edge = 2 / fields  # the texture fills a square of -1 to 1
    columns = [np.array([[0, 0], [edge, 0], [edge, 2], [0, 2]]) + [edge * i - 1, -1] for i in range(0, fields, 2)]
    if name == "stripes":
        return columns
    cell = np.array([[0, 0], [edge, 0], [edge, edge], [0, edge]])
    cells = [(i, j) for i in range(fields) for j in range(fields) if (i + j) % 2 == 0]
    return [cell + [edge * i - 1, edge * j - 1] for i, j in cells]


def _colours(rng: np.random.Generator, difficulty: float) -> tuple[_Colour, _Colour]:
    """Colours of ground and figure, which tell nothing of the class; the harder, the more alike."""
    ground, other = rng.uniform(40, 215, (2, 3))
    away = np.where(ground < 128, 1, -1) * rng.uniform(60, 140, 3)
    ink = ground + away * (1 - 0.7 * difficulty) + (other - 128) * 0.2
    first, second = ([int(v) for v in colour.clip(0, 255)] for colour in (ground, ink))
    return (first[0], first[1], first[2]), (second[0], second[1], second[2])


def draw_dataset(root: str | Path, num_train: int = 2000, num_val: int = 400, size: int = 32, seed: int = 0) -> Path:
    """Draw ``{train,val}/<class>/<number>.png`` below ``root``, the classes in turn.

    Args:
        root (str | Path): Folder to draw into; made if it is not there.
        num_train (int): Training pictures. Defaults to 2000.
        num_val (int): Validation pictures. Defaults to 400.
        size (int): Width and height in pixels. Defaults to 32.
        seed (int): Equal seeds draw equal data. Defaults to 0.

    Returns:
        Path: ``root``.
    """
    root = Path(root)
    rng = np.random.default_rng(seed)
    for split, count in (("train", num_train), ("val", num_val)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            name = CLASSES[i % len(CLASSES)]
            draw_picture(rng, name, draw_difficulty(rng), size).save(root / split / name / f"{i:05d}.png")
    return root


def main() -> None:
    """Command line."""
    run(draw_dataset, "Draw a small image-classification data set in ImageNet's layout", "data/demo-shapes", "pictures")


if __name__ == "__main__":
    main()
