"""``norm='recalibrate'`` in runs of MMEngine."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.hooks import Hook

pytest.importorskip("mmseg")
from infobatch_mm.core.recalibration import batch_norms

from .toy import Recorder, config, train

CHECKPOINT = dict(type="CheckpointHook", by_epoch=False, interval=11, save_last=True)


def run(scenes: Path, folder: Path, norm: str | None, *hooks: Hook, **overrides: Any) -> tuple[Any, Recorder]:
    line = dict(type="InfoBatchHook", prune_ratio=0.7, delta=1.0, norm=norm)
    more = {"default_hooks.checkpoint": CHECKPOINT, "train_cfg.val_interval": 11, **overrides}
    return train(config(scenes, folder, custom_hooks=[line], **more), *hooks)


class Statistics(Hook):
    """Running statistics that validations see."""

    priority = "VERY_LOW"

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def before_val_epoch(self, runner: Any) -> None:
        self.seen.append(torch.cat([each.running_mean.clone() for each in batch_norms(runner.model)]))


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "infobatch_summary.json").read_text())


def test_validations_and_checkpoints_have_other_statistics_and_the_training_is_the_same(
    scenes: Path, tmp_path: Path
) -> None:
    plain, ours = Statistics(), Statistics()
    _, without = run(scenes, tmp_path / "without", None, plain)
    runner, with_it = run(scenes, tmp_path / "with", "recalibrate", ours)
    # Training normalises by its batches: the same losses, samples and weights, to the bit.
    assert with_it.losses == without.losses and with_it.indices == without.indices
    assert len(plain.seen) == len(ours.seen) >= 2
    assert not any(torch.equal(*each) for each in list(zip(plain.seen, ours.seen, strict=True))[1:])
    assert summary(tmp_path / "without")["forward_visits"] == 0
    assert summary(tmp_path / "with")["forward_visits"] > 0
    assert summary(tmp_path / "with")["visits"] == summary(tmp_path / "without")["visits"]
    last = torch.load((tmp_path / "with/last_checkpoint").read_text(), weights_only=False)["state_dict"]
    for name, each in runner.model.state_dict().items():
        assert torch.equal(each, last[name])


def test_a_resumed_run_ends_with_the_same_statistics(scenes: Path, tmp_path: Path) -> None:
    straight, _ = run(scenes, tmp_path / "straight", "recalibrate")
    run(scenes, tmp_path / "again", "recalibrate")
    overrides = {"load_from": str(tmp_path / "again/iter_11.pth"), "resume": True}
    resumed, _ = run(scenes, tmp_path / "again", "recalibrate", **overrides)
    for name, each in resumed.model.state_dict().items():
        assert torch.equal(each, straight.model.state_dict()[name]), name
    assert summary(tmp_path / "again")["forward_visits"] == summary(tmp_path / "straight")["forward_visits"]


def test_the_log_counts_the_layers_and_a_model_without_any_is_left_alone(
    scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    group = dict(type="GN", num_groups=1, requires_grad=True)
    overrides = {f"model.{part}.norm_cfg": group for part in ("backbone", "decode_head", "auxiliary_head")}
    overrides |= {"log_level": "INFO", "train_cfg.max_iters": 12}
    run(scenes, tmp_path / "group", "recalibrate", **overrides)
    assert summary(tmp_path / "group")["forward_visits"] == 0
    assert "batch normalisation" not in _log(tmp_path / "group")
    run(scenes, tmp_path / "batch", None, **{"log_level": "INFO", "train_cfg.max_iters": 12})
    assert "layers of batch normalisation: the batches of a pruned pass are a biased sample" in _log(tmp_path / "batch")


def _log(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.rglob("*.log"))


def test_an_unknown_option_is_refused(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="norm='precise': use 'recalibrate'"):
        run(scenes, tmp_path, "precise")


def test_the_average_of_a_model_has_statistics_of_its_own(scenes: Path, tmp_path: Path) -> None:
    line = dict(type="InfoBatchHook", prune_ratio=0.7, delta=1.0, norm="recalibrate")
    average = dict(type="EMAHook", momentum=0.3)
    more = {"default_hooks.checkpoint": CHECKPOINT, "train_cfg.val_interval": 11}
    seen = Statistics()
    train(config(scenes, tmp_path, custom_hooks=[line, average], **more), seen)
    saved = torch.load((tmp_path / "last_checkpoint").read_text(), weights_only=False)
    name = next(key for key in saved["state_dict"] if key.endswith("running_mean"))
    of_average, of_model = saved["state_dict"][name], saved["ema_state_dict"][f"module.{name}"]
    assert not torch.equal(of_average, of_model)
    # The validation of the average sees what its checkpoint holds: the same weights on the same batches.
    torch.testing.assert_close(seen.seen[-1][: len(of_average)], of_average)
