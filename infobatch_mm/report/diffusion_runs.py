"""A finished training of a latent-diffusion model in numbers, and its samples."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from .summaries import read_summary

#: What diffusion trainings are compared by: the denoising loss on held-out images. Lower is better.
METRIC = "held_out_loss"
#: In the output folder of a training: what was measured at its end.
_METRICS_FILE = "metrics.json"


def read_row(output_dir: Path) -> dict[str, float]:
    """The run in four numbers; NaN where no held-out loss was measured."""
    summary = read_summary(output_dir)
    assert summary is not None
    metrics = output_dir / _METRICS_FILE
    return {
        METRIC: json.loads(metrics.read_text())[METRIC] if metrics.is_file() else math.nan,
        "visits": summary["visits"],
        "iterations": summary["iterations"],
        "wall_time_s": summary["wall_time_s"],
    }


def side_by_side(root: Path, arms: Sequence[str], path: Path) -> bool:
    """Draw the last samples of each run beside each other, under their names.

    Args:
        root (Path): Folder of the runs.
        arms (Sequence[str]): Their names.
        path (Path): The picture to write.

    Returns:
        bool: False where no run has samples, and nothing was written.
    """
    last = {arm: sorted((root / arm / "samples").glob("*.png"))[-1:] for arm in arms}
    arms = [arm for arm in arms if last[arm]]
    if not arms:
        return False
    found = [Image.open(last[arm][0]) for arm in arms]
    zoom = max(1, round(480 / found[0].width))
    grids = [grid.resize((grid.width * zoom, grid.height * zoom), Image.Resampling.NEAREST) for grid in found]
    gap, head = 12, 20
    width, height = grids[0].size
    canvas = Image.new("RGB", (len(grids) * (width + gap) + gap, height + head + gap), "white")
    for i, (arm, grid) in enumerate(zip(arms, grids, strict=True)):
        left = gap + i * (width + gap)
        ImageDraw.Draw(canvas).text((left, 4), arm, fill="black")
        canvas.paste(grid, (left, head))
    canvas.save(path)
    return True
