"""What a user asks a comparison for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Request:
    """The command line of a comparison.

    Attributes:
        unpruned (Path): Config of the unpruned run.
        pruned (Path): Its twin with the hook.
        work_dir (Path): Where the runs go, with several seeds a folder for each.
        seeds (list[int]): One run of each arm for each of them.
        shortened (bool): Whether the unpruned config is also trained for as many visits as the pruned one made.
        random (bool): Whether samples are also pruned at random, as many visits.
        metric (str, optional): Name in the log of what runs are compared by.
        cfg_options (list[str]): Overrides of both configs, ``key=value``.
        then (Path, optional): Config of a fine-tuning from the last checkpoint of each run.
        then_options (list[str]): Overrides of the fine-tunings.
    """

    unpruned: Path
    pruned: Path
    work_dir: Path
    seeds: list[int]
    shortened: bool
    random: bool
    metric: str | None
    cfg_options: list[str]
    then: Path | None
    then_options: list[str]
