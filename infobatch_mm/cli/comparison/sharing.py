"""Which controls a comparison needs: one may serve several pruned arms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...report.verdicts import FULL
from .controls import at_random, delta_of, lr_rule_of, smaller, step_rules, unweighted

#: Controls of arms whose visits are no further apart than this share are one.
_ALIKE = 0.01


@dataclass(frozen=True)
class Control:
    """A control run.

    Attributes:
        name (str): Among the arms.
        kind (str): One of :data:`.CONTROLS`.
        owner (str): The pruned arm whose visits it makes.
    """

    name: str
    kind: str
    owner: str


@dataclass(frozen=True)
class Family:
    """The controls of all pruned arms.

    Attributes:
        controls (list[Control]): In the order in which they are trained.
        opponents (dict[str, dict[str, str]]): For each pruned arm, the name of the arm to compare with, by its kind.
        left_out (list[str]): What cannot be trained, and why, in words.
    """

    controls: list[Control]
    opponents: dict[str, dict[str, str]]
    left_out: list[str]


def assign(kinds: Sequence[str], arms: Mapping[str, dict[str, Any]], reasons: Mapping[tuple[str, str], str]) -> Family:
    """Give each pruned arm its controls.

    Args:
        kinds (Sequence[str]): Wanted kinds of controls.
        arms (Mapping[str, dict]): ``infobatch_summary.json`` of each pruned arm.
        reasons (Mapping[tuple[str, str], str]): Why an arm, by its name, can have no control of a kind.

    Returns:
        Family: A control whose visits are within 1 % of one that is there, and that is the same else, is shared.
    """
    family = Family([], {arm: {FULL: "baseline"} for arm in arms}, [])
    taken = {"baseline", *arms}
    for kind in kinds:
        for arm in arms:
            if reason := reasons.get((arm, kind)):
                family.left_out.append(f"no control '{kind}' for {arm}: {reason}")
                continue
            name = next((each.name for each in family.controls if _serves(each, kind, arm, arms)), None)
            if name is None:
                name = kind if kind not in taken else f"{kind} for {arm}"
                taken.add(name)
                family.controls.append(Control(name, kind, arm))
            family.opponents[arm][kind] = name
    return family


def reasons_against(
    kinds: Sequence[str], arms: Mapping[str, tuple[Any, dict[str, Any]]], schedule: Any
) -> dict[tuple[str, str], str]:
    """Why arms can have no control of a kind, by arm and kind.

    Args:
        kinds (Sequence[str]): Wanted kinds of controls.
        arms (Mapping[str, tuple[Config, dict]]): Config and summary of each pruned arm.
        schedule (Schedule): The unpruned run.
    """
    found = {}
    for arm, (cfg, summary) in arms.items():
        attempts: dict[str, Callable[[], object]] = {
            "random": partial(at_random, cfg, schedule, summary),
            "smaller": partial(smaller, cfg, schedule, summary),
            "unweighted": partial(unweighted, cfg),
        }
        for kind in attempts.keys() & set(kinds):
            try:
                attempts[kind]()
            except ValueError as error:
                found[arm, kind] = str(error)
    return found


def _serves(control: Control, kind: str, arm: str, arms: Mapping[str, dict[str, Any]]) -> bool:
    """Whether a control that is there serves another arm as well."""
    if control.kind != kind or kind == "unweighted":  # which is the arm's own policy
        return False
    there, here = arms[control.owner], arms[arm]
    if kind == "random" and (delta_of(there), step_rules(there)) != (delta_of(here), step_rules(here)):
        return False
    if kind == "smaller" and lr_rule_of(there) != lr_rule_of(here):
        return False
    return abs(here["visits"] - there["visits"]) <= _ALIKE * there["visits"]
