"""A user's own config on a data set of their own, compared from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("mmseg")

from PIL import Image, ImageDraw

from infobatch_mm.core.score_file import read_scores

ROOT = Path(__file__).parents[2]
NUM, ITERS = 20, 60

#: What the user has: a class of their own, the base of somebody's config, and theirs, under a repeat as DRIVE's.
CELLS = """
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS


@DATASETS.register_module()
class Cells(BaseSegDataset):
    METAINFO = dict(classes=("background", "cell"), palette=[[0, 0, 0], [255, 255, 255]])

    def __init__(self, **kwargs):
        super().__init__(img_suffix=".png", seg_map_suffix=".png", **kwargs)
"""
MINE = """
_base_ = "base.py"
custom_imports = dict(imports=["cells"], allow_failed_imports=False)
pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
cells = dict(type="Cells", data_root="cells_1024", pipeline=pipeline)
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type="RepeatDataset",
        times=40000,
        dataset=dict(data_prefix=dict(img_path="train/images", seg_map_path="train/masks"), **cells),
    )
)
val_dataloader = dict(
    dataset=dict(_delete_=True, data_prefix=dict(img_path="val/images", seg_map_path="val/masks"), **cells)
)
model = dict(decode_head=dict(num_classes=2), auxiliary_head=dict(num_classes=2))
"""
PRUNED = """
_base_ = "mine.py"
custom_imports = dict(imports=["cells", "infobatch_mm.engine"], allow_failed_imports=False)
custom_hooks = [dict(type="InfoBatchHook", prune_ratio=0.5, delta=0.875)]
"""


def draw_cells(folder: Path, number: int, seed: int) -> None:
    """Grey images with brighter discs, and their masks; some are easy, some are not."""
    rng = np.random.default_rng(seed)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for i in range(number):
        image, mask = Image.new("RGB", (32, 32), (60, 60, 60)), Image.new("L", (32, 32))
        brightness = 90 + int(130 * rng.random())
        for _ in range(rng.integers(1, 5)):
            x, y, r = (int(value) for value in (*rng.integers(4, 28, 2), rng.integers(3, 8)))
            ImageDraw.Draw(image).ellipse((x - r, y - r, x + r, y + r), fill=(brightness,) * 3)
            ImageDraw.Draw(mask).ellipse((x - r, y - r, x + r, y + r), fill=1)
        noise = np.array(image) + rng.normal(0, 20, (32, 32, 1))
        Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(folder / f"images/{i:02d}.png")
        mask.save(folder / f"masks/{i:02d}.png")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The user's directory."""
    from test_engine.toy import config

    draw_cells(tmp_path / "cells_1024/train", NUM, seed=0)
    draw_cells(tmp_path / "cells_1024/val", 4, seed=1)
    base = config(tmp_path, tmp_path / "unused", custom_hooks=[], log_level="INFO")
    base.pop("work_dir")
    base.pop("experiment_name")
    base.data_root = "data/DRIVE"  # of the base; theirs is elsewhere
    base.train_cfg.max_iters, base.train_cfg.val_interval = ITERS, 20
    base.param_scheduler[0].end = ITERS
    base.default_hooks.logger.interval = 5
    base.default_hooks.checkpoint.save_last = True
    base.dump(tmp_path / "base.py")
    (tmp_path / "cells.py").write_text(CELLS)
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "mine-infobatch.py").write_text(PRUNED)
    return tmp_path


def last_checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load((folder / "last_checkpoint").read_text().strip(), weights_only=False)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_users_config_is_compared_from_the_command_line(project: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/compare.py"), "mine.py", "mine-infobatch.py", "--work-dir", "out"]
    environment = {**os.environ, "PYTHONPATH": "."}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((project / "out/comparison.json").read_text())
    summary = json.loads((project / "out/infobatch/infobatch_summary.json").read_text())
    assert result["metric"] == "mIoU"
    assert 0.05 < result["saved_ratio"] < 0.45
    assert summary["num_samples"] == NUM
    assert result["baseline"]["visits"] == ITERS * 4
    assert result["infobatch"]["visits"] == summary["visits"] < ITERS * 4
    for arm in ("baseline", "infobatch"):
        state = last_checkpoint(project / "out" / arm)
        assert state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(1e-4), arm
        assert state["param_schedulers"][0]["last_step"] == ITERS - 1, arm
    scores = read_scores(project / "out/infobatch")
    assert scores["name"].tolist() == [f"images/{i:02d}.png" for i in range(NUM)]
    assert np.isfinite(scores["score"]).all()
    assert f"a pass is one over its {NUM} images, not over {NUM * 40000:,} repeated ones" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_users_run_goes_on_after_a_kill(project: Path) -> None:
    options = ["default_hooks.checkpoint.interval=7", "custom_hooks.0.item_seed=True"]
    command = [sys.executable, str(ROOT / "tools/train.py"), "mine-infobatch.py", "--cfg-options", *options]
    environment = {**os.environ, "PYTHONPATH": "."}

    def run(*more: str, out: str = "out") -> str:
        arguments = [*command, "--work-dir", out, *more]
        return subprocess.run(
            arguments, cwd=project, env=environment, capture_output=True, text=True, check=True
        ).stdout

    run(out="straight")
    run()
    (project / "out/last_checkpoint").write_text(str(project / "out/iter_21.pth"))
    said = run("--resume")
    assert "goes on in pass" in said
    straight, resumed = (last_checkpoint(project / name) for name in ("straight", "out"))
    assert all(torch.equal(resumed["state_dict"][key], value) for key, value in straight["state_dict"].items())
    # one image in another's place
    for part in ("images", "masks"):
        file = project / f"cells_1024/train/{part}/07.png"
        file.rename(file.with_name("07b.png"))
    with pytest.raises(subprocess.CalledProcessError) as refused:
        run("--resume")
    assert "cannot resume: the checkpoint scores a data set with other sample names" in refused.value.stderr
