"""What passes of policies cost and are worth, by norms that their scores did not see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..core import PruningPolicy, Snapshot, build_policy
from ..core.worth import Worth, equal_length, pass_worth
from .calibration import calibrated
from .estimates import Estimate, efficiencies, estimate
from .gradients import Measured

#: Ways to know norms, and what they are for a reader.
WAYS = {
    "norm": "gradient of all weights",
    "gradient": "score gradient",
    "loss": "score loss",
    "calibrated": "loss, calibrated",
    "nothing": "-",
}


@dataclass(frozen=True)
class Case:
    """A policy to look at.

    Attributes:
        title (str): Its name for a reader.
        policy (PruningPolicy): With its settings.
        saving (float, optional): Share of a pass's visits that it is asked to save; None where it is as it comes.
    """

    title: str
    policy: PruningPolicy
    saving: float | None = None


@dataclass(frozen=True)
class Row:
    """A policy that goes by one way to know norms.

    Attributes:
        policy (str): Its name.
        way (str): One of :data:`WAYS`.
        saving (float, optional): What it was asked to save of a pass.
        worth (Worth): Of its passes.
        efficiency (Estimate, optional): Worth over cost, with its interval; None where visits are not weighted.
        equal_length (Estimate, optional): Share of a full training, shortened, that is as good.
    """

    policy: str
    way: str
    saving: float | None
    worth: Worth
    efficiency: Estimate | None
    equal_length: Estimate | None

    def plain(self) -> dict[str, Any]:
        """The row for JSON: intervals as value, low, high."""
        shown = {name: getattr(self, name) for name in ("efficiency", "equal_length")}
        return {
            **{name: getattr(self, name) for name in ("policy", "way", "saving")},
            **{name: getattr(self.worth, name) for name in ("cost", "worth")},
            **{name: None if each is None else each.plain() for name, each in shown.items()},
        }


def cases(savings: Sequence[float], own: PruningPolicy | None = None) -> list[Case]:
    """The policies of a forecast.

    Args:
        savings (Sequence[float]): Shares of a pass's visits to save, each in (0, 0.9].
        own (PruningPolicy, optional): The one that the training names.

    Raises:
        ValueError: If a saving is out of its range.
    """
    for saving in savings:
        if not 0 < saving <= 0.9:
            raise ValueError(f"--savings {saving}: a pass can save a share in (0, 0.9] of its visits; use 0.3 or 0.5")
    found = [Case("infobatch, r = 0.5", build_policy("infobatch", 0.5))]
    for name in ("random", "variance"):
        found += [Case(name, build_policy(dict(type=name, prune_ratio=saving)), saving) for saving in savings]
    settings = None if own is None else {**own.settings(), "delta": None}
    known = [{**each.policy.settings(), "delta": None} for each in found]
    if own is not None and own.name != "none" and settings not in known:
        found.append(Case(f"{own.name}, as configured", own))
    return found


def chances_of(policy: PruningPolicy, scores: np.ndarray) -> tuple[np.ndarray, bool] | None:
    """With which chance a pass visits samples, and whether it weighs them by the inverse.

    Args:
        policy (PruningPolicy): The policy.
        scores (ndarray): Shape ``(n,)``; NaN for samples without one.

    Returns:
        tuple: Shape ``(n,)``, and the truth value; None for a policy that draws by itself, or needs more than scores.
    """
    if type(policy).draw is not PruningPolicy.draw:
        return None
    seen = np.isfinite(scores)
    values = torch.from_numpy(np.where(seen, scores, 0.0).astype(np.float32))
    mask = torch.from_numpy(seen)
    # In the middle of what is pruned of a training, which has saved its share of what it is to save by then.
    target, delta = getattr(policy, "target_saving", None), getattr(policy, "delta", 1.0)
    snapshot = Snapshot(
        values, mask, mask.to(torch.int32), delta / 2, 10, pass_share=delta / 20, saved=0.5 * (target or 0.0)
    )
    try:
        found = policy.chances(snapshot)
    except (KeyError, ValueError):  # it asks for columns, or for as many samples as the data set has
        return None
    if found is None:
        return np.ones(len(scores)), True
    return found.by_sample(), policy.rescale != "none" and getattr(found, "weighted", True)


def ways_of(measured: Measured) -> dict[str, np.ndarray]:
    """What each way to know norms says at each visit, shape ``(n, 2)`` each."""
    found = {"norm": np.sqrt(measured.squares), **measured.scores}
    if "loss" in found:
        found["calibrated"] = calibrated(found["loss"], measured.squares)
    return {name: found[name] for name in WAYS if name in found}


def table(
    measured: Measured, policies: Sequence[Case], limit: float, noises: np.ndarray, counts: np.ndarray
) -> list[Row]:
    """Cost and worth of each policy by each way to know norms.

    Chances follow the scores of one visit, and are judged by the gradients of the other; then the other way round, and
    both are taken together. Judged by the visit that it is of, a score would flatter itself.

    Args:
        measured (Measured): Of n samples.
        policies (Sequence[Case]): The policies.
        limit (float): The largest efficiency of any.
        noises (ndarray): Noise scale over batch size of each resample; may be infinite.
        counts (ndarray): See :func:`.resampled`.
    """
    rows = []
    ways = ways_of(measured)
    nothing = {"nothing": np.zeros(measured.squares.shape)}
    for case in policies:
        knows = ways if case.policy.needs_scores else nothing
        rows += [
            row
            for way, scores in knows.items()
            if (row := _row(case, way, scores, measured.squares[:, ::-1], limit, noises, counts)) is not None
        ]
    return rows


def _row(
    case: Case, way: str, scores: np.ndarray, squares: np.ndarray, limit: float, noises: np.ndarray, counts: np.ndarray
) -> Row | None:
    """One row; scores and the squares that judge them have the shape ``(n, 2)``."""
    found = [chances_of(case.policy, each) for each in scores.T]
    if any(each is None for each in found):
        return None
    chances = np.stack([each[0] for each in found if each is not None], 1)
    weighted = all(each[1] for each in found if each is not None)
    worth = replace(pass_worth(np.sqrt(squares).ravel(), np.maximum(chances, 1e-9).ravel(), weighted), limit=limit)
    row = Row(case.title, way, case.saving, worth, None, None)
    if worth.worth is None:
        return row
    by_resample = efficiencies(squares, chances, counts)
    lengths = [length(worth.cost, *each) for each in zip(by_resample, noises, strict=True)]
    return replace(row, efficiency=estimate(by_resample), equal_length=estimate(np.array(lengths)))


def length(cost: float, efficiency: float, noise: float) -> float:
    """Share of a full training, shortened, that is as good; see :func:`.core.worth.equal_length`."""
    return equal_length(Worth(cost, cost * efficiency, efficiency), noise)


def at(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """Rows whose attributes are as wanted."""
    return [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]
