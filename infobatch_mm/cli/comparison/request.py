"""What a user asks a comparison for."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from ...report.verdicts import CONTROLS


@dataclass(frozen=True)
class Request:
    """The command line of a comparison.

    Attributes:
        unpruned (Path): Config of the unpruned run.
        pruned (list[Path]): Its twins with the hook, an arm each.
        policies (list[str]): More arms, made of the unpruned config; see :func:`.parse_spec`.
        work_dir (Path): Where the runs go, with several seeds a folder for each.
        seeds (list[int]): One run of each arm for each of them.
        controls (list[str]): Kinds of controls, of :data:`.CONTROLS`.
        metric (str, optional): Name in the log of what runs are compared by.
        margin (float, optional): What a pruned run may be worse by than the full one, in units of the metric.
        lower_is_better (bool, optional): Whether the metric is a loss; None to tell by its name.
        cfg_options (list[str]): Overrides of all configs, ``key=value``.
        then (Path, optional): Config of a fine-tuning from the last checkpoint of each run.
        then_options (list[str]): Overrides of the fine-tunings.
    """

    unpruned: Path
    pruned: list[Path]
    policies: list[str]
    work_dir: Path
    seeds: list[int]
    controls: list[str]
    metric: str | None
    margin: float | None
    lower_is_better: bool | None
    cfg_options: list[str]
    then: Path | None
    then_options: list[str]


def add_statistics_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of both commands that compare: seeds, controls, and what verdicts need."""
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0],
        help="one run of each arm for each of them; verdicts take two or more (default: 0)",
    )
    parser.add_argument(
        "--controls",
        nargs="*",
        choices=list(CONTROLS),
        metavar="NAME",
        help="also train controls with about as many visits as each pruned arm: "
        f"{', '.join(CONTROLS)} (without a name: all)",
    )
    parser.add_argument("--shortened", action="store_true", help="--controls shortened: unpruned, for fewer passes")
    parser.add_argument("--random", action="store_true", help="--controls random: pruned at random, with weights")
    parser.add_argument("--policies", nargs="+", default=[], metavar="SPEC", help="arms: NAME or NAME:key=value,...")
    parser.add_argument("--margin", type=_margin, help="what a lossless run may be worse by, in units of the metric")


def take_controls(args: argparse.Namespace) -> list[str]:
    """The kinds of controls that the command line asks for, each once; its flags are taken off."""
    given = vars(args).pop("controls")
    wanted = set(CONTROLS if given == [] else given or [])
    wanted |= {kind for kind in ("shortened", "random") if vars(args).pop(kind)}
    return [kind for kind in CONTROLS if kind in wanted]


def _margin(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: give a number of at least 0")
    return value
