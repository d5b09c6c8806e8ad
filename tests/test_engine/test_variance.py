"""Draws in proportion to gradients in runs of MMEngine: scores, weights, savings, resume."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

pytest.importorskip("mmseg")
from infobatch_mm.core import read_scores

from .toy import EPOCHS, Recorder, config, train

VARIANCE = dict(type="variance", prune_ratio=0.4, delta=1.0)
NORM = dict(type="GN", num_groups=1, requires_grad=True)


def hooked(scenes: Path, folder: Path, policy: Any = VARIANCE, hook: Any = None, **overrides: Any) -> Any:
    line = dict(type="InfoBatchHook", policy=policy, **(hook or {}))
    return config(scenes, folder, custom_hooks=[line], **overrides)


class Norms(Recorder):
    """Takes down what comes back to the last layer's parameters, in batches of a single sample."""

    def __init__(self) -> None:
        super().__init__()
        self.norms: dict[int, float] = {}
        self._squares: list[float] = []

    def before_train(self, runner: Any) -> None:
        for each in runner.model.decode_head.conv_seg.parameters():
            each.register_hook(self._look)

    def _look(self, gradient: Tensor) -> None:
        self._squares.append(float(gradient.double().square().sum()))

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        self.norms[self.indices[-1][0]] = math.sqrt(sum(self._squares)) / self.weights[-1][0]
        self._squares = []


@pytest.mark.parametrize("accumulated", [1, 2])
def test_scores_are_the_norms_of_what_comes_back_to_the_last_layer(
    scenes: Path, tmp_path: Path, accumulated: int
) -> None:
    overrides = {f"model.{part}.norm_cfg": NORM for part in ("backbone", "decode_head", "auxiliary_head")}
    overrides |= {"train_dataloader.batch_size": 1, "train_cfg.max_iters": 60}
    overrides |= {"optim_wrapper.accumulative_counts": accumulated}
    recorded = Norms()
    train(hooked(scenes, tmp_path, **overrides), recorded)
    table = read_scores(tmp_path)
    assert table["times_seen"].min() >= 1 and table["times_seen"].max() > table["times_seen"].min()
    norms = [recorded.norms[index] for index in table["index"].tolist()]
    assert table["score"].tolist() == pytest.approx([each * accumulated for each in norms], rel=1e-4)


@pytest.mark.parametrize("loop", ["iterations", "epochs"])
def test_a_target_is_met_within_a_batch_and_the_summary_says_so(scenes: Path, tmp_path: Path, loop: str) -> None:
    overrides = {} if loop == "iterations" else EPOCHS
    policy = dict(type="variance", target_saving=0.4, delta=1.0)
    train(hooked(scenes, tmp_path, policy, **overrides))
    summary = json.loads((tmp_path / "infobatch_summary.json").read_text())
    assert (summary["policy"], summary["score"], summary["target_saving"]) == ("variance", "gradient", 0.4)
    assert summary["prune_ratio"] is None
    assert summary["saved_ratio"] == pytest.approx(0.4, abs=4 / summary["visits_full"] + 0.01)


def test_a_target_that_cannot_be_met_is_refused_before_the_run(scenes: Path, tmp_path: Path) -> None:
    policy = dict(type="variance", target_saving=0.9, delta=0.5)
    with pytest.raises(ValueError, match=r"target_saving=0.9 cannot be met: at most 0\.\d+ of the visits"):
        train(hooked(scenes, tmp_path, policy))


def test_a_resumed_run_visits_the_same_samples_with_the_same_weights(scenes: Path, tmp_path: Path) -> None:
    checkpoint = dict(type="CheckpointHook", by_epoch=False, interval=11, save_last=False)
    policy = dict(VARIANCE, rescale="step", pi_min=0.2)
    _, straight = train(hooked(scenes, tmp_path / "straight", policy))
    train(hooked(scenes, tmp_path / "again", policy, **{"default_hooks.checkpoint": checkpoint}))
    resumed = hooked(scenes, tmp_path / "again", policy, resume=True, **{"default_hooks.checkpoint": checkpoint})
    resumed.load_from = str(tmp_path / "again" / "iter_11.pth")
    _, rest = train(resumed)
    assert rest.indices == straight.indices[11:] and rest.weights == straight.weights[11:]
    drawn = {round(each, 4) for batch in rest.weights for each in batch}
    assert len(drawn) > 3 and min(drawn) < 1 < max(drawn)


def test_scores_of_another_place_are_refused_on_resume(scenes: Path, tmp_path: Path) -> None:
    checkpoint = dict(type="CheckpointHook", by_epoch=False, interval=11, save_last=False)
    train(hooked(scenes, tmp_path, **{"default_hooks.checkpoint": checkpoint}))
    score = dict(type="gradient", layer="decode_head.conv_seg")
    resumed = hooked(scenes, tmp_path, hook=dict(score=score), resume=True)
    resumed.load_from = str(tmp_path / "iter_11.pth")
    with pytest.raises(ValueError, match=r"pruned with .*'gradient'.*this run has .*'layer': 'decode_head.conv_seg'"):
        train(resumed)
