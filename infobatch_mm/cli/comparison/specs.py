"""Pruned arms as they are typed: ``NAME`` or ``NAME:key=value,key=value``."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...core import build_policy
from ...core.recalibration import check_norm
from ...core.score_rule import build_score

#: Settings of the hook, and not of a policy.
HOOK_KEYS = ("score", "score_ema", "norm")


@dataclass(frozen=True)
class Spec:
    """A policy with its settings.

    Attributes:
        text (str): As it was typed.
        policy (dict): ``type`` and arguments.
        hook (dict): Settings of the hook: any of :data:`HOOK_KEYS`.
    """

    text: str
    policy: dict[str, Any]
    hook: dict[str, Any] = field(default_factory=dict)


def parse_spec(text: str) -> Spec:
    """Read what was typed.

    Args:
        text (str): ``'variance'``, or ``'variance:target_saving=0.4,score=gradient'``. Values are Python's literals,
            else texts.

    Raises:
        ValueError: If it cannot be read.
    """
    name, colon, rest = text.partition(":")
    if colon and not rest.strip():
        raise ValueError(f"--policies {text}: there is nothing after the colon: write NAME or NAME:key=value,key=value")
    given: dict[str, Any] = {}
    # A comma within a value is followed by no name.
    for part in re.split(r",(?=\s*[A-Za-z_]\w*=)", rest) if rest else []:
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals or not key.isidentifier():
            raise ValueError(f"--policies {text}: {part!r} is no setting: write NAME:key=value,key=value")
        if key in given:
            raise ValueError(f"--policies {text}: {key} is set twice: {given[key]!r} and {value!r}")
        try:
            given[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            given[key] = value
    if not name or "type" in given:
        raise ValueError(f"--policies {text}: the name of a policy comes first: write NAME:key=value,key=value")
    hook = {key: given.pop(key) for key in HOOK_KEYS if key in given}
    return Spec(text, {"type": name, **given}, hook)


def check_spec(spec: Spec) -> None:
    """Refuse an unknown policy, an argument that it does not take, and a value that is out of range.

    Raises:
        ValueError: With what is wrong.
    """
    if spec.policy["type"] == "none":
        raise ValueError(f"--policies {spec.text}: this policy prunes nothing, as the baseline, which is always there")
    try:
        build_policy(spec.policy)
        build_score(spec.hook.get("score"), spec.hook.get("score_ema"))
        check_norm(spec.hook.get("norm"))
    except ValueError as error:
        raise ValueError(f"--policies {spec.text}: {error}") from error


def parse_specs(texts: Sequence[str]) -> list[Spec]:
    """Read and check what was typed after ``--policies``.

    Raises:
        ValueError: If one cannot be read or made, or two of them are the same arm in other words.
    """
    specs: list[Spec] = []
    for text in texts:
        spec = parse_spec(text)
        check_spec(spec)
        for other in specs:
            if other.text != text and (other.policy, other.hook) == (spec.policy, spec.hook):
                raise ValueError(f"--policies {other.text} and {text} are the same arm: leave one of them out")
        specs.append(spec)
    return specs


def folder_of(name: str) -> str:
    """The folder of an arm: its name without what paths do not like."""
    return re.sub(r"[^\w.+-]+", "-", name)


def check_names(names: Iterable[str]) -> None:
    """Refuse arms that would lie in one folder, or in that of another thing.

    Raises:
        ValueError: With both names.
    """
    there = {name: name for name in ("baseline", "scratch", "fine-tuned", "configs")}
    for name in names:
        folder = folder_of(name)
        if folder in there:
            raise ValueError(
                f"the arms {there[folder]!r} and {name!r} have one folder, {folder}: leave one of them out"
            )
        there[folder] = name
