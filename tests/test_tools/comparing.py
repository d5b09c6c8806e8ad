"""Comparisons that train nothing: a config, and what stands in for its trainings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config

from infobatch_mm.cli import compare as tool
from infobatch_mm.cli.comparison import checks, lives
from infobatch_mm.cli.config import merged


def config(tmp_path: Path, **changes: Any) -> Config:
    """4 epochs of 100 samples in batches of 8."""
    return Config(
        {
            "train_cfg": dict(by_epoch=True, max_epochs=4),
            "train_dataloader": dict(batch_size=8, dataset=dict(type="Any", data_root=str(tmp_path))),
            "optim_wrapper": dict(optimizer=dict(type="SGD", lr=0.1)),
            "param_scheduler": [dict(type="CosineAnnealingLR", T_max=4)],
            "default_hooks": dict(logger=dict(type="LoggerHook")),
            "val_evaluator": dict(type="Accuracy"),
            **changes,
        }
    )


class Trainings:
    """Trainings that only leave their logs; one can be told to end in an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, bool]] = []
        self.hooks: dict[str, Any] = {}
        self.interrupted = ""
        monkeypatch.setattr(lives, "train", self)
        monkeypatch.setattr(checks, "check_built", lambda parser, configs: None)

    def __call__(
        self,
        arm: str,
        config: Path,
        work_dir: Path,
        options: list[str],
        progress: Any,
        *,
        resume: bool,
        alive: Any,
        **_: Any,
    ) -> float:
        self.calls.append((arm, resume))
        cfg = merged(config, options)
        self.hooks[arm] = cfg.get("custom_hooks")
        folder = work_dir / f"20260101_00000{len(self.calls)}/vis_data"
        folder.mkdir(parents=True)
        pruned = any(hook["type"] == "InfoBatchHook" for hook in cfg.custom_hooks)
        top1 = 80.0 - pruned * (0.1 + 0.01 * cfg.randomness.seed) + cfg.randomness.seed + len(arm) * 0.01
        last = cfg.train_cfg.max_epochs
        if arm == self.interrupted:
            alive(7.0)
            (work_dir / "epoch_2.pth").touch()
            (work_dir / "last_checkpoint").write_text(str(work_dir / "epoch_2.pth"))
            raise KeyboardInterrupt
        steps = range(3 if resume else 1, last + 1)
        lines = [{"accuracy/top1": top1 - last + step, "step": step} for step in steps]
        (folder / "scalars.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if pruned:
            kept = [100, 64, 64, 100] if "random" in arm else [100, 60, 60, 60]
            per_pass = [{"pass": p, "kept": k, "kept_ratio": k / 100} for p, k in enumerate(kept)]
            found = dict(delta=0.875, num_samples=100, visits=sum(kept), visits_full=400, iterations=50)
            (work_dir / "infobatch_summary.json").write_text(json.dumps({**found, "per_pass": per_pass}))
        return 10.0


def compare(*arguments: str) -> dict[str, Any]:
    tool.main([*arguments, "--work-dir", "out"])
    return json.loads(Path("out/comparison.json").read_text())
