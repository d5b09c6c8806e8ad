"""A small segmentation data set in ADE20K's layout, drawn on the spot.

Street scenes of eight of ADE20K's 150 classes. Most scenes are plain and soon learned; a long tail is
cluttered, dim, noisy and has surfaces whose colour tells nothing, so that there is something to prune.

    python -m infobatch_mm.demo.street data/demo
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .command import run
from .photo import draw_difficulty, photograph

#: Class -> its value in ADE20K's annotations (1-150, 0 is unlabelled) and the usual colour of its surface.
CLASSES: dict[str, tuple[int, tuple[int, int, int]]] = {
    "building": (2, (150, 100, 90)),
    "sky": (3, (130, 180, 235)),
    "tree": (5, (40, 110, 50)),
    "road": (7, (95, 95, 100)),
    "grass": (10, (110, 170, 70)),
    "person": (13, (215, 160, 130)),
    "car": (21, (190, 40, 45)),
    "sea": (27, (50, 90, 160)),
}
_GROUNDS = ("road", "grass", "sea")
_OBJECTS = ("building", "tree", "person", "car")


def draw_scene(rng: np.random.Generator, difficulty: float, size: int) -> tuple[Image.Image, Image.Image]:
    """Draw one scene.

    Args:
        rng (np.random.Generator): Source of the scene.
        difficulty (float): In [0, 1]; more objects, odder colours, dimmer light, more noise.
        size (int): Width and height in pixels.

    Returns:
        tuple: RGB image and index annotation, both ``size`` x ``size``.
    """
    label = Image.new("L", (size, size), CLASSES["sky"][0])
    image = Image.new("RGB", (size, size), _colour(rng, "sky", difficulty))
    on_image, on_label = ImageDraw.Draw(image), ImageDraw.Draw(label)

    def paint(name: str, shape: str, box: list[float]) -> None:
        getattr(on_image, shape)(box, fill=_colour(rng, name, difficulty))
        getattr(on_label, shape)(box, fill=CLASSES[name][0])

    horizon = size * rng.uniform(0.35, 0.65)
    paint(str(rng.choice(_GROUNDS)), "rectangle", [0, horizon, size, size])
    for _ in range(1 + rng.poisson(1 + 7 * difficulty)):
        name = str(rng.choice(_OBJECTS))
        scale = size * rng.uniform(0.2, 0.45) * (1 - 0.6 * difficulty)
        x, foot = rng.uniform(0, size), horizon + rng.uniform(-0.05, 0.4) * size
        if name == "building":
            paint(name, "rectangle", [x, foot - 1.3 * scale, x + scale, foot])
        elif name == "tree":
            paint(name, "ellipse", [x, foot - 1.2 * scale, x + scale, foot])
        elif name == "car":
            paint(name, "rectangle", [x, foot - 0.4 * scale, x + scale, foot])
        else:
            paint(name, "ellipse", [x, foot - 0.9 * scale, x + 0.3 * scale, foot])

    # What cannot be told is not labelled: a thin frame around nothing in particular, as annotators leave.
    on_label.line([0, horizon, size, horizon], fill=0, width=1)
    return photograph(image, rng, difficulty), label


def _colour(rng: np.random.Generator, name: str, difficulty: float) -> tuple[int, int, int]:
    usual = np.array(CLASSES[name][1], dtype=np.float32)
    odd = rng.uniform(0, 255, 3)
    share = difficulty * rng.uniform()
    mixed = (1 - share) * usual + share * odd + rng.normal(0, 6, 3)
    r, g, b = (int(v) for v in mixed.clip(0, 255))
    return r, g, b


def draw_dataset(root: str | Path, num_train: int = 480, num_val: int = 120, size: int = 96, seed: int = 0) -> Path:
    """Draw ``images/{training,validation}/*.jpg`` and ``annotations/{...}/*.png`` below ``root``.

    Args:
        root (str | Path): Folder to draw into; made if it is not there.
        num_train (int): Training scenes. Defaults to 480.
        num_val (int): Validation scenes. Defaults to 120.
        size (int): Width and height in pixels. Defaults to 96.
        seed (int): Equal seeds draw equal data. Defaults to 0.

    Returns:
        Path: ``root``.
    """
    root = Path(root)
    rng = np.random.default_rng(seed)
    for split, count in (("training", num_train), ("validation", num_val)):
        for folder in ("images", "annotations"):
            (root / folder / split).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image, label = draw_scene(rng, draw_difficulty(rng), size)
            image.save(root / "images" / split / f"{i:05d}.jpg", quality=95)
            label.save(root / "annotations" / split / f"{i:05d}.png")
    return root


def main() -> None:
    """Command line."""
    run(draw_dataset, "Draw a small segmentation data set in ADE20K's layout", "data/demo", "scenes")


if __name__ == "__main__":
    main()
