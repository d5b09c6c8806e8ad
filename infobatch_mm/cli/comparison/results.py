"""What a comparison leaves behind: its numbers, its verdicts, how they came about."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...report.logs import default_margin, is_loss
from ...report.seeds import Rows
from ...report.tables import saved_share
from ...report.verdicts import Verdict, verdicts
from ...report.versions import installed


@dataclass(frozen=True)
class Question:
    """By what arms are compared.

    Attributes:
        metric (str): Name of the metric.
        margin (float, optional): What a pruned arm may be worse by than the full run.
        lower_is_better (bool): Whether the metric is a loss.
    """

    metric: str
    margin: float | None
    lower_is_better: bool


def question(metric: str, margin: float | None, lower_is_better: bool | None = None) -> Question:
    """What is asked of a metric where the user has not said all of it.

    Args:
        metric (str): Name of the metric.
        margin (float, optional): The user's.
        lower_is_better (bool, optional): The user's word. Defaults to None: losses are known by their names.
    """
    margin = default_margin(metric) if margin is None else margin
    return Question(metric, margin, is_loss(metric) if lower_is_better is None else lower_is_better)


def saved_by(arms: Iterable[str], rows: Rows) -> dict[str, float]:
    """Share of the baseline's visits that each pruned arm saved."""
    return {arm: saved_share(rows, arm, "visits") for arm in arms}


def judged(asked: Question, seeds: Mapping[int, Rows], opponents: Mapping[str, Mapping[str, str]]) -> list[Verdict]:
    """The verdicts; see :func:`.verdicts`."""
    return verdicts(asked.metric, seeds, opponents, asked.margin, asked.lower_is_better)


def account(
    asked: Question,
    seeds: Mapping[int, Rows],
    opponents: Mapping[str, Mapping[str, str]],
    found: Sequence[Verdict],
    left_out: Sequence[str],
    settings: Mapping[str, Any],
    argv: Sequence[str] | None,
) -> dict[str, Any]:
    """All that a reader needs to judge the verdicts, and to repeat them.

    Args:
        asked (Question): By what arms are compared.
        seeds (Mapping[int, Rows]): The rows of each seed.
        opponents (Mapping): For each pruned arm, the name of what it is compared with, by its kind.
        found (Sequence[Verdict]): What :func:`judged` found.
        left_out (Sequence[str]): Controls that could not be trained, and why.
        settings (Mapping): All settings of each arm, by name.
        argv (Sequence[str], optional): Arguments of the command. Defaults to this process's own.

    Returns:
        dict: For ``comparison.json``.
    """
    return {
        "seeds": list(seeds),
        "margin": asked.margin,
        "lower_is_better": asked.lower_is_better,
        "controls": {arm: {kind: name for kind, name in each.items()} for arm, each in opponents.items()},
        "left_out": list(left_out),
        "rows": {str(seed): rows for seed, rows in seeds.items()},
        "verdicts": [each.as_json() for each in found],
        "command": shlex.join([sys.argv[0], *(sys.argv[1:] if argv is None else argv)]),
        "versions": installed(),
        "settings": dict(settings),
    }
