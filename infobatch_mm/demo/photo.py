"""What makes a drawn picture hard to read, shared by the demo data sets."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter


def draw_difficulty(rng: np.random.Generator) -> float:
    """Difficulty of one picture, in [0, 1]: most are plain, a long tail is hard."""
    return float(rng.beta(0.7, 2.5))


def photograph(image: Image.Image, rng: np.random.Generator, difficulty: float, blur: float = 1.5) -> Image.Image:
    """Blur, dim and add noise, the more the harder.

    Args:
        image (Image.Image): RGB image.
        rng (np.random.Generator): Source of dimness and noise.
        difficulty (float): In [0, 1].
        blur (float): Radius of the blur at difficulty 1, in pixels; none up to 0.5. Defaults to 1.5.

    Returns:
        Image.Image: RGB image of the same size.
    """
    if difficulty > 0.5:
        image = image.filter(ImageFilter.GaussianBlur(blur * difficulty))
    pixels = np.asarray(image, dtype=np.float32) * (1 - 0.5 * difficulty * rng.uniform())
    pixels += rng.normal(0, 4 + 45 * difficulty, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
