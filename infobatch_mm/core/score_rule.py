"""What a score is: how the losses of a sample become what it is ranked by; known by its name."""

from __future__ import annotations

import copy
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
from torch import Tensor

from .checks import is_number, what_is_wrong
from .distributed import Group
from .registry import claim
from .worth import as_norms


class Columns(Protocol):
    """What a rule writes, one entry for each sample: see :class:`.ScoreStore`."""

    values: Tensor
    seen: Tensor
    times_seen: Tensor


class ScoreRule(ABC):
    """Folds new losses into the scores of their samples.

    Args:
        group (ProcessGroup, optional): The processes that share the data. Defaults to all.

    Attributes:
        score_ema (float): Decay of an average over a sample's visits, in [0, 1); 0 where there is none.
    """

    #: Name under which users select it and checkpoints record it.
    name: str
    #: Whether a loss takes the place of what was there, so that nothing of it need be kept for the merge.
    overwrites = False
    #: Whether losses wait for the end of their pass before they become scores; see :meth:`hold`.
    defers = False
    #: Whether a loss is nothing without its noise level, which models of MMEngine do not tell.
    needs_noise_levels = False
    #: Whether it takes norms of gradients in place of losses, which hosts have only after the backward pass.
    takes_norms = False
    #: First version of the state that knows of it.
    state_version = 1
    score_ema = 0.0
    group: Group = None
    #: Where a model has its last layer, in rules that :attr:`takes_norms`; None for where hosts have it.
    layer: str | None = None

    def __init__(self, group: Group = None) -> None:
        self.group = group

    def settings(self) -> dict[str, Any]:
        """What identifies the rule in checkpoints and summaries, as plain values."""
        return {"score": self.name, "score_ema": self.score_ema}

    def __repr__(self) -> str:
        # The form that build_score() takes: a host that writes its config down, with an instance in it, writes Python
        # that can be read again.
        taken = inspect.signature(type(self)).parameters
        arguments = {key: value for key, value in self.settings().items() if key in taken}
        return f"dict({', '.join(f'{key}={value!r}' for key, value in {'type': self.name, **arguments}.items())})"

    @property
    def columns(self) -> Mapping[str, Tensor]:
        """What else it keeps of each sample, for policies that ask for it: by name, shape ``(N,)`` each."""
        return {}

    def norms(self, scores: np.ndarray) -> np.ndarray | None:
        """Norms of gradients that scores stand for, up to a factor, from which the worth of a pass is told.

        Args:
            scores (ndarray): Shape ``(n,)``, float32.

        Returns:
            ndarray: Shape ``(n,)``, none negative: by default the scores themselves, as losses follow norms roughly.
            None where scores are something else.
        """
        return as_norms(scores)

    @property
    def tells_norms(self) -> bool:
        """Whether its scores say anything of norms."""
        return self.norms(np.ones(1, np.float32)) is not None

    @abstractmethod
    def fold(self, columns: Columns, where: np.ndarray, losses: np.ndarray) -> None:
        """Write new losses into the scores.

        Args:
            columns (Columns): The scores.
            where (ndarray): Their samples, shape ``(V,)``, int64; one may come several times, in the order of visits.
            losses (ndarray): Shape ``(V,)``, float32, finite.
        """

    # ---- for rules that defer, and ones that need more than the loss --------------------------------

    def evidence(self, losses: Tensor, log_snr: Tensor | None) -> Tensor:
        """What is kept beside each loss, shape ``(B,)``, on the device of the losses; NaN makes a visit unusable.

        Raises:
            ValueError: If it is needed and missing, or of another shape.
        """
        return losses

    def take_source(self, source: str) -> None:
        """Learn what norms are of, in rules that :attr:`takes_norms`: ``'layer'``, ``'outputs'`` or ``'losses'``."""
        return None

    def hold(self, indices: Tensor, losses: Tensor, evidence: Tensor) -> None:
        """Keep usable losses, on the CPU, until :meth:`settle`."""
        raise NotImplementedError

    def merge(self) -> None:
        """Exchange what is held; every rank must call it."""
        return None

    def settle(self) -> tuple[Tensor, Tensor]:
        """End a pass, after a merge: indices and losses to fold, shape ``(V,)``, int64 and float32."""
        raise NotImplementedError

    @property
    def unmerged(self) -> bool:
        """Whether this rank holds something that the others have not seen."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold beside the scores, under keys of its own."""
        return {}

    @classmethod
    def damaged(cls, state: Mapping[str, Any], num_samples: int) -> str | None:
        """Key of a checkpoint's state of this rule that makes no sense; None if all does."""
        return None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; what was held is forgotten."""
        return None


R = TypeVar("R", bound=type[ScoreRule])

_RULES: dict[str, type[ScoreRule]] = {}


def register_score(rule: R) -> R:
    """Make a score known by its ``name``, so that every host can name it; decorates the class.

    Args:
        rule (type): The class. Its constructor takes ``group``, and hands it on.

    Returns:
        type: The same class.

    Raises:
        ValueError: If it is no score, has no name, or another class has it.
    """
    if not isinstance(rule, type) or not issubclass(rule, ScoreRule):
        raise ValueError(f"register_score takes a subclass of ScoreRule, got {rule!r}")
    if not isinstance(name := getattr(rule, "name", None), str) or not name:
        raise ValueError(f"{rule.__qualname__} has name={name!r}: a score is selected by its name, a text")
    claim(_RULES, rule.name, rule)
    return rule


def registered() -> dict[str, type[ScoreRule]]:
    """All scores by name."""
    return dict(_RULES)


def build_score(
    score: str | Mapping[str, Any] | ScoreRule | None = None, score_ema: float | None = None, group: Group = None
) -> ScoreRule:
    """Turn the user's choice into a rule.

    Args:
        score (str | dict | ScoreRule, optional): A name, ``dict(type=name, ...)`` with arguments of its own, or an
            instance, of which the training takes a copy. Defaults to None: ``'ema'`` where ``score_ema`` is given and
            not 0, else ``'raw'``.
        score_ema (float, optional): Decay of the average over a sample's visits, in [0, 1). Defaults to None: 0.9 for
            scores that are averages.
        group (ProcessGroup, optional): The processes that share the data. Defaults to all.

    Raises:
        ValueError: If one is out of its range, or they contradict each other.
    """
    if isinstance(score, ScoreRule):
        return _taken(score, score_ema, group)
    given: dict[str, Any] = {}
    if isinstance(score, Mapping):
        given = {key: score[key] for key in score}
        score = given.pop("type", None)
    if score_ema is not None:
        if "score_ema" in given and given["score_ema"] != score_ema:
            raise ValueError(
                f"score_ema={score_ema!r} and score=dict(score_ema={given['score_ema']!r}, ...): set it in one of them"
            )
        given["score_ema"] = score_ema
    if "score_ema" in given:
        check_score_ema(given["score_ema"])
    if score is None:
        score = "ema" if given.get("score_ema") else "raw"
    if isinstance(score, type):
        raise ValueError(f"score={score.__qualname__} is a class: make an instance of it, or give its name")
    if not isinstance(score, str) or score not in _RULES:
        raise ValueError(
            f"unknown score {score!r}: choose one of {sorted(_RULES)}, or decorate yours with register_score and have "
            "it imported"
        )
    try:
        return _checked(_RULES[score](group=group, **given))
    except TypeError as error:
        raise ValueError(f"score {score!r} cannot be made with {given}: {error}") from error


def _checked(rule: ScoreRule) -> ScoreRule:
    """A rule that checkpoints and summaries can hold: found out now, not when one is read."""
    if type(rule).__module__.startswith("infobatch_mm."):
        return rule
    who, settings, state = f"score {rule.name!r} ({type(rule).__qualname__})", rule.settings(), rule.state_dict()
    if not isinstance(settings, dict) or settings.get("score") != rule.name:
        raise ValueError(
            f"{who} has settings() {settings!r}: return its name under 'score', and its arguments, so that a run is "
            "not resumed with others"
        )
    taken = inspect.signature(type(rule)).parameters.values()
    named = [each.name for each in taken if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    if missing := [name for name in named if name not in (*settings, "group")]:
        raise ValueError(f"{who} has an argument {missing[0]!r} that its settings() leave out: return it there as well")
    for what, found in (("settings()", settings), ("state_dict()", state)):
        if not _is_plain(found, tensors=what == "state_dict()"):
            raise ValueError(
                f"{who} has {what} that cannot be written down and read again: {found!r}; give finite numbers, texts, "
                "lists and dicts of Python's" + (", and tensors" if what == "state_dict()" else "")
            )
    return rule


def _is_plain(value: Any, tensors: bool) -> bool:
    """Whether JSON, and a checkpoint that is loaded with ``weights_only=True``, give a value back as it was."""
    if type(value) is dict:
        return all(type(key) is str and _is_plain(each, tensors) for key, each in value.items())
    if type(value) in (list, tuple):
        return all(_is_plain(each, tensors) for each in value)
    if type(value) is float:
        return math.isfinite(value)
    return value is None or type(value) in (int, bool, str) or (tensors and type(value) is Tensor)


def _taken(rule: ScoreRule, score_ema: float | None, group: Group) -> ScoreRule:
    """A copy of a user's instance: what it holds of one training must not reach another."""
    known = _RULES.get(rule.name, type(rule))
    if known is not type(rule):
        raise ValueError(
            f"score {rule.name!r} is {known.__qualname__}: give {type(rule).__qualname__}, which has its name, another"
        )
    if score_ema not in (None, rule.score_ema):
        raise ValueError(
            f"score_ema={score_ema!r} and a score with score_ema={rule.score_ema!r}: set it in one of them"
        )
    if rule.group is not group:
        raise ValueError(
            f"score {rule.name!r} was made for other processes than this training: give its name, or dict(type="
            f"{rule.name!r}, ...), and it is made for the right ones"
        )
    try:
        return copy.deepcopy(_checked(rule), {id(group): group})  # a process group cannot be copied
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"score {rule.name!r} cannot be copied ({error}): give its name, or dict(type={rule.name!r}, ...)"
        ) from error


def check_score_ema(score_ema: float) -> None:
    """Refuse a decay that is outside [0, 1)."""
    if not is_number(score_ema) or not 0 <= score_ema < 1:
        raise ValueError(
            f"score_ema={score_ema!r} {what_is_wrong(score_ema, '[0, 1)')}: it is the decay of the average over a "
            "sample's visits; use 0 for its last loss, 0.5 or 0.8 for an average over about two or five"
        )
