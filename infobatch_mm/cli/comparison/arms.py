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
from .controls import at_random, schedule_of, smaller, unweighted
from .lives import settings_of, train_once
from .pruned_arms import PrunedArm
from .record import place_for, record_of
from .request import Request
from .sharing import Control, Family, assign, reasons_against
from .shortening import shortened
from .specs import folder_of


@dataclass(frozen=True)
class Training:
    """An arm that was trained.

    Attributes:
        config (Path): Its config.
        options (list[str]): Its overrides.
        wall_time_s (float): Wall-clock of its training, without a fine-tuning after it.
    """

    config: Path
    options: list[str]
    wall_time_s: float


class Arms:
    """All arms of a comparison with one seed.

    Args:
        request (Request): What the user asks for, checked.
        pruned (list[PrunedArm]): The pruned arms.
        seed (int): Of all arms.
        work_dir (Path): Where the arms go, a folder each.
        cfg (Config): The unpruned config with its overrides.

    Attributes:
        trained (dict[str, Training]): The arms so far, by name.
        left_out (list[str]): Controls that this seed cannot have, and why, in words.
    """

    def __init__(self, request: Request, pruned: list[PrunedArm], seed: int, work_dir: Path, cfg: Config) -> None:
        self.request = request
        self.pruned = {arm.name: arm for arm in pruned}
        self.work_dir = work_dir
        self.trained: dict[str, Training] = {}
        self.left_out: list[str] = []
        self._folders: dict[str, Path] = {}
        self._seed_number = seed
        self._cfg = cfg
        self._seed = f"randomness.seed={seed}"
        self._options = [*request.cfg_options, self._seed]
        if "logger" in cfg.get("default_hooks", {}):  # validations are found in the log by the loop's own count
            self._options.append(f"default_hooks.logger.log_metric_by_epoch={is_by_epoch(cfg)}")

    def check_what_is_there(self) -> None:
        """Refuse arms with other settings in the folders of baseline and pruned arms, before anything is trained."""
        configs = {"baseline": self.request.unpruned, **{arm.name: arm.config for arm in self.pruned.values()}}
        for name, config in configs.items():
            record_of(self._folder(name), settings_of(config, self._options))

    def train_pruned(self, progress: Progress) -> str:
        """Train the unpruned arm, then the pruned ones; returns the metric that arms are compared by."""
        self._train("baseline", self.request.unpruned, [], progress)
        metric = find_metric(self._measured("baseline"), self.request.metric)
        for arm in self.pruned.values():
            self._train(arm.name, arm.config, [], progress)
        return metric

    def family(self) -> Family:
        """The controls of the pruned arms, which have been trained."""
        summaries = {name: self._summary(name) for name in self.pruned}
        configs = {name: (self._config(name), summary) for name, summary in summaries.items()}
        kinds = self.request.controls
        return assign(kinds, summaries, reasons_against(kinds, configs, self._schedule()))

    def train_controls(self, controls: list[Control], progress: Progress) -> None:
        """Train the controls, and the fine-tuning from random weights where there are fine-tunings."""
        for control in controls:
            pruned = control.kind != "shortened"
            config = self.pruned[control.owner].config if pruned else self.request.unpruned
            try:
                options = self._control_options(control)
            except ValueError as error:  # the visits of this seed are others than the first one's
                self.left_out.append(f"no control '{control.name}' in seed {self._seed_number}: {error}")
                continue
            settings = settings_of(config, [*self._options, *options])
            self._folders[control.name] = place_for(self._folder(control.name), settings)
            self._train(control.name, config, options, progress)
        if self.request.then is not None:
            self._fine_tune("scratch", self.request.then, "=None", progress)

    def read(self, metric: str) -> dict[str, Arm]:
        """What each arm gave, by its name."""
        schedule = self._schedule()
        arms = {}
        for name, trained in self.trained.items():
            loop = merged(trained.config, trained.options).train_cfg
            length = loop.get("max_epochs") or loop.max_iters
            fine_tuned = None if self.request.then is None else self._measured(name)
            arms[name] = read_arm(self._folder(name), metric, schedule, trained.wall_time_s, fine_tuned, length)
        if self.request.then is not None:
            arms["scratch"] = Arm([0], [last_value(self._measured("scratch"), metric)], 0, 0.0, [])
        return arms

    def _control_options(self, control: Control) -> list[str]:
        summary, schedule = self._summary(control.owner), self._schedule()
        if control.kind == "shortened":
            return shortened(self._cfg, schedule, summary["visits"])
        cfg = self._config(control.owner)
        if control.kind == "unweighted":
            return unweighted(cfg)
        return (at_random if control.kind == "random" else smaller)(cfg, schedule, summary)

    def _train(self, name: str, config: Path, extra: list[str], progress: Progress) -> None:
        options = [*self._options, *extra]
        seconds = train_once(name, config, self._folder(name), options, progress)
        self.trained[name] = Training(config, options, seconds)
        if self.request.then is not None:
            checkpoint = last_checkpoint(self._folder(name))
            self._fine_tune(name, self.request.then, f".checkpoint={checkpoint}", progress, Path(checkpoint))

    def _fine_tune(self, name: str, config: Path, change: str, progress: Progress, start: Path | None = None) -> None:
        options = [*self.request.then_options, self._seed, f"model.backbone.init_cfg{change}"]
        train_once(f"{name}, fine-tuned", config, self._measured(name), options, progress, start)

    def _folder(self, name: str) -> Path:
        return self._folders.get(name, self.work_dir / folder_of(name))

    def _measured(self, name: str) -> Path:
        """The folder whose log has the metric of an arm: a fine-tuning's where there is one."""
        return (
            self._folder(name) if self.request.then is None else self.work_dir / "fine-tuned" / self._folder(name).name
        )

    def _summary(self, name: str) -> dict[str, Any]:
        summary = read_summary(self._folder(name))
        assert summary is not None
        return summary

    def _config(self, name: str) -> Config:
        return merged(self.pruned[name].config, self.request.cfg_options)

    def _schedule(self) -> Schedule:
        first = next(iter(self.pruned))
        return schedule_of(self._cfg, self._summary(first)["num_samples"])
