"""The arms of a comparison with one seed: trained one after the other, then read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config
from rich.progress import Progress

from ...core import Schedule
from ...report.logs import find_metric, last_value
from ...report.runs import Arm, last_checkpoint, read_arm
from ...report.summaries import read_summary
from ..config import merged
from .configs import is_by_epoch
from .controls import at_random, schedule_of, shortened
from .request import Request
from .training import train


@dataclass(frozen=True)
class _Trained:
    """An arm that was trained.

    Attributes:
        wall_time_s (float): Wall-clock of its training, without a fine-tuning after it.
        length (int): Epochs or iterations that its config says.
    """

    wall_time_s: float
    length: int


class Comparison:
    """All arms of a pair with one seed.

    Args:
        request (Request): What the user asks for, checked.
        seed (int): Of all arms.
        work_dir (Path): Where the arms go, a folder each.
        cfg (Config): The unpruned config with its overrides.
        progress (Progress): Shows the trainings.
    """

    def __init__(self, request: Request, seed: int, work_dir: Path, cfg: Config, progress: Progress) -> None:
        self.request = request
        self.work_dir = work_dir
        self._seed = f"randomness.seed={seed}"
        self._cfg = cfg
        self._progress = progress
        self._trained: dict[str, _Trained] = {}
        self._options = [*request.cfg_options, self._seed]
        if "logger" in cfg.get("default_hooks", {}):  # validations are found in the log by the loop's own count
            self._options.append(f"default_hooks.logger.log_metric_by_epoch={is_by_epoch(cfg)}")

    def run(self) -> tuple[str, dict[str, Arm]]:
        """Train all arms.

        Returns:
            tuple: The metric that they are compared by, and what each arm gave, by its name.
        """
        request = self.request
        self._train("baseline", request.unpruned)
        metric = find_metric(self._measured("baseline"), request.metric)
        self._train("infobatch", request.pruned)
        summary = read_summary(self.work_dir / "infobatch")
        assert summary is not None
        schedule = schedule_of(self._cfg, summary["num_samples"])
        self._train_controls(schedule, summary)
        arms = {arm: self._read(arm, metric, schedule) for arm in self._trained}
        if request.then is not None:
            arms["scratch"] = Arm([0], [last_value(self._measured("scratch"), metric)], 0, 0.0, [])
        return metric, arms

    def _train_controls(self, schedule: Schedule, summary: dict[str, Any]) -> None:
        """Train the arms that are as long as the pruned one was, and the fine-tuning from random weights."""
        request = self.request
        if request.shortened:
            self._train("shortened", request.unpruned, *shortened(self._cfg, schedule, summary["visits"]))
        if request.random:
            pruned = merged(request.pruned, request.cfg_options)
            self._train("random", request.pruned, *at_random(pruned, schedule, summary))
        if request.then is not None:
            self._fine_tune("scratch", request.then, "=None")

    def _train(self, arm: str, config: Path, *extra: str) -> None:
        options = [*self._options, *extra]
        seconds = train(arm, config, self.work_dir / arm, options, self._progress)
        loop = merged(config, options).train_cfg
        self._trained[arm] = _Trained(seconds, loop.get("max_epochs") or loop.max_iters)
        if self.request.then is not None:
            self._fine_tune(arm, self.request.then, f".checkpoint={last_checkpoint(self.work_dir / arm)}")

    def _fine_tune(self, arm: str, config: Path, start: str) -> None:
        options = [*self.request.then_options, self._seed, f"model.backbone.init_cfg{start}"]
        train(f"{arm}, fine-tuned", config, self._measured(arm), options, self._progress)

    def _measured(self, arm: str) -> Path:
        """The folder whose log has the metric of an arm: a fine-tuning's where there is one."""
        return self.work_dir / arm if self.request.then is None else self.work_dir / "fine-tuned" / arm

    def _read(self, arm: str, metric: str, schedule: Schedule) -> Arm:
        trained = self._trained[arm]
        fine_tuned = None if self.request.then is None else self._measured(arm)
        return read_arm(self.work_dir / arm, metric, schedule, trained.wall_time_s, fine_tuned, trained.length)
