"""The state of a training in a checkpoint: parsed once into a typed value, and refused where it is of another run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import unusable
from .plan import Plan
from .score_rule import registered
from .worth import Worth, is_worth

if TYPE_CHECKING:
    from .training import Training

#: 2 where scores are averages, 3 where they are by noise level, 4 where they are norms of gradients, which the versions
#: before do not know of.
STATE_VERSION = 4

#: What every version holds.
_KEYS = (
    *("version", "num_samples", "fingerprint", "settings", "batch_size", "schedule", "seed"),
    *("scores", "seen", "times_seen", "num_nonfinite", "num_invalid", "unmerged"),
    *("pass_index", "visited", "visits_before", "full_before", "plan", "history"),
)
#: Of these, the numbers; none of them can be negative.
_COUNTS = (
    *("num_samples", "batch_size", "seed"),
    *("num_nonfinite", "num_invalid", "pass_index", "visited"),
)


#: Names in summaries, or among what must be equal on all processes, that are no score's.
_OURS = (
    *("num_samples", "fingerprint", "batch_size", "seed", "shuffle", "item_seed", "num_epochs", "max_train_steps"),
    *("num_repeats", "policy", "prune_ratio", "delta", "group", "score_settings", "skipped"),
    *("passes_done", "passes_total", "visits", "visits_full", "saved_ratio", "per_pass", "iterations", "wall_time_s"),
)


@dataclass(frozen=True)
class PrunerState:
    """What :meth:`.Training.state_dict` wrote, of any version, checked for damage.

    Attributes:
        num_samples (int): Size of the data set.
        fingerprint (str): Identifies it beyond its length.
        settings (dict): What samples are pruned by: the policy's settings and the score's.
        batch_size (int): Global batch size.
        loop (str): What the host counts its training in.
        pass_samples (int, optional): Visits that the plan in flight was drawn of.
        schedule (Mapping): Settings of the schedule.
        seed (int): Seed of all draws.
        store (Mapping): State of the scores, for :meth:`.ScoreStore.load_state_dict`.
        unmerged (bool): Whether it holds the scores of one process only.
        pass_index (int): As of :class:`.Books`, like the others.
        visited (int): Position in the plan in flight.
        skipped (int): Visits of it that were handed out and not weighed.
        visits_before (int): Visits that no pass in the history accounts for.
        full_before (int): What the unpruned run would have made in their place.
        forward_visits (int): Visits without a backward pass.
        last_pruned (int): The last pass whose plan left samples out, or -1.
        plan (Plan, optional): The plan in flight.
        history (list[dict]): One entry per finished pass.
    """

    num_samples: int
    fingerprint: str
    settings: dict[str, Any]
    batch_size: int
    loop: str
    pass_samples: int | None
    schedule: Mapping[str, Any]
    seed: int
    store: Mapping[str, Any]
    unmerged: bool
    pass_index: int
    visited: int
    skipped: int
    visits_before: int
    full_before: int
    forward_visits: int
    last_pruned: int
    plan: Plan | None
    history: list[dict[str, Any]]


def parse(state: Any) -> PrunerState:
    """Read a state of any version.

    Raises:
        ValueError: For a newer version, or if something is missing or makes no sense.
    """
    if not isinstance(state, Mapping):
        raise damaged(type(state).__name__)
    version = state.get("version")
    if not isinstance(version, int) or version > STATE_VERSION:
        raise ValueError(
            f"cannot resume: the checkpoint's InfoBatch state has version {version!r}, this package reads "
            f"versions up to {STATE_VERSION}; update infobatch_mm"
        )
    for key in _KEYS:
        if key not in state:
            raise damaged(key)
    for key in _COUNTS:
        if not isinstance(state[key], int) or state[key] < 0:
            raise damaged(key)
    for key in ("skipped", "visits_before", "full_before", "forward_visits", "last_pruned"):
        if not isinstance(state.get(key, 0), int) or (key == "skipped" and state.get(key, 0) < 0):
            raise damaged(key)
    for key in ("settings", "schedule", "score_settings"):
        if not isinstance(state.get(key, {}), Mapping):
            raise damaged(key)
    history = state["history"]
    if not isinstance(history, list) or len(history) > state["pass_index"]:
        raise damaged("history")
    if not all(isinstance(entry, Mapping) and {"pass", "kept"} <= set(entry) for entry in history):
        raise damaged("history")
    if not isinstance(state.get("score", ""), str):
        raise damaged("score")
    # States of earlier versions have no average, or one of losses only.
    average = state.get("score_ema", 0.0)
    score = state.get("score", "ema" if average else "raw")
    num_samples, schedule = state["num_samples"], state["schedule"]
    _check_scores(state, score, num_samples)
    return PrunerState(
        num_samples=num_samples,
        fingerprint=state["fingerprint"],
        settings={**state["settings"], **state.get("score_settings", {"score": score, "score_ema": average})},
        batch_size=state["batch_size"],
        loop=schedule.get("loop", ""),
        pass_samples=schedule.get("pass_samples"),
        schedule=schedule,
        seed=state["seed"],
        store=state,
        unmerged=bool(state["unmerged"]),
        pass_index=state["pass_index"],
        visited=state["visited"],
        skipped=int(state.get("skipped", 0)),
        visits_before=int(state["visits_before"]),
        full_before=int(state["full_before"]),
        forward_visits=int(state.get("forward_visits", 0)),
        last_pruned=int(state.get("last_pruned", -1)),
        plan=None if state["plan"] is None else _plan(state["plan"], num_samples),
        history=[dict(entry) for entry in history],
    )


def check_fits(state: PrunerState, training: Training) -> None:
    """Refuse a state that belongs to another run.

    Raises:
        ValueError: With both values.
    """
    schedule = training.schedule
    if state.loop != schedule.loop:
        raise ValueError(
            f"cannot resume: the checkpoint was trained by {state.loop}, this run trains by {schedule.loop}; use "
            "the same kind of loop, or start a new run from its weights (load_from in MMEngine)"
        )
    if state.num_samples != schedule.num_samples:
        raise ValueError(
            f"cannot resume: the checkpoint scores {state.num_samples} samples, this data set has "
            f"{schedule.num_samples}; resume with the data set it was trained on"
        )
    if state.fingerprint != training.fingerprint:
        raise ValueError(
            "cannot resume: the checkpoint scores a data set with other sample names (fingerprint "
            f"{state.fingerprint!r}, this data set has {training.fingerprint!r}); resume with the data set it was "
            "trained on"
        )
    rule = training.store.rule
    # A user's instance need not be registered, and parse() has not asked it then.
    is_unknown = rule.name not in registered() and rule.name == state.settings["score"]
    if is_unknown and (key := rule.damaged(state.store, state.num_samples)) is not None:
        raise damaged(key)
    here = {**training.policy.settings(), **training.store.settings()}
    if state.settings != here:
        raise ValueError(
            f"cannot resume: the checkpoint was pruned with {state.settings}, this run has {here}; "
            "use the same settings, or start a new run from its weights (load_from in MMEngine)"
        )


def check_names(training: Training) -> None:
    """Refuse a score of a user's whose settings or state have names of ours: one would take the place of the other.

    Raises:
        ValueError: With the first of them.
    """
    rule = training.store.rule
    in_settings = {*training.schedule.settings(), *training.policy.settings(), *_OURS}
    in_state = {*_KEYS, *_OURS, "unusable", "score", "score_ema"}
    found = (("settings()", rule.settings(), in_settings), ("state_dict()", rule.state_dict(), in_state))
    for what, names, ours in found:
        if taken := sorted(names.keys() & ours):
            raise ValueError(
                f"score {rule.name!r} has {what} with {taken[0]!r}, a name of InfoBatch's own: use another"
            )


def state_of(training: Training, plan: Plan | None) -> dict[str, Any]:
    """What :func:`parse` reads: plain tensors and numbers, no collectives.

    Args:
        training (Training): Whose state.
        plan (Plan, optional): The plan in flight.
    """
    schedule, store = training.schedule, training.store
    return {
        "version": store.rule.state_version,
        "num_samples": schedule.num_samples,
        "fingerprint": training.fingerprint,
        "settings": training.policy.settings(),
        # What versions before score_settings read.
        "score": store.score,
        "score_ema": store.score_ema,
        "score_settings": store.settings(),
        "batch_size": schedule.batch_size,
        "schedule": {**schedule.settings(), "pass_samples": schedule.plan_visits(training.pass_index)},
        "seed": training.seed,
        **store.state_dict(),
        "pass_index": training.pass_index,
        "visited": training.visited,
        "skipped": training.skipped,
        "visits_before": training.visits_before,
        "full_before": training.full_before,
        "forward_visits": training.forward_visits,
        "last_pruned": training.last_pruned,
        "plan": None
        if plan is None
        else {
            "indices": plan.indices,
            "weights": plan.weights,
            "pruned": plan.pruned,
            "threshold": plan.threshold,
            "blanks": list(plan.blanks),
            **({} if plan.scale == 1.0 else {"scale": plan.scale}),
            **({} if plan.batch_size is None else {"batch_size": plan.batch_size}),
            **({} if plan.worth is None else {"worth": asdict(plan.worth)}),
        },
        "history": [dict(entry) for entry in training.history],
    }


def damaged(key: str) -> ValueError:
    """The refusal of a state in which an entry is missing or makes no sense."""
    return ValueError(f"cannot resume: the checkpoint's InfoBatch state is damaged at {key!r}; use another checkpoint")


def _check_scores(state: Mapping[str, Any], score: str, num_samples: int) -> None:
    key: str | None
    for key, dtype in (("scores", torch.float32), ("seen", torch.bool), ("times_seen", torch.int32)):
        tensor = state[key]
        if not isinstance(tensor, Tensor) or tensor.shape != (num_samples,) or tensor.dtype != dtype:
            raise damaged(key)
    if not bool(torch.isfinite(state["scores"]).all()):
        raise damaged("scores")
    if "unusable" in state and not unusable.fits(state["unusable"], num_samples):
        raise damaged("unusable")
    rule = registered().get(score)  # one that nobody has registered here is refused for its name
    if rule is not None and (key := rule.damaged(state, num_samples)) is not None:
        raise damaged(key)


def _plan(plan: Any, num_samples: int) -> Plan:
    indices, weights = (plan.get(key) if isinstance(plan, Mapping) else None for key in ("indices", "weights"))
    if (
        not isinstance(indices, Tensor)
        or not isinstance(weights, Tensor)
        or indices.dim() != 1
        or indices.shape != weights.shape
        or indices.dtype != torch.int64
        or bool(((indices < 0) | (indices >= num_samples)).any())
        or not {"pruned", "threshold"} <= set(plan)
        # every sample at most once, and none that weighs nothing
        or len(indices) != torch.bincount(indices.cpu(), minlength=1).count_nonzero()
        or not bool(((weights > 0) & torch.isfinite(weights)).all())
    ):
        raise damaged("plan")
    blanks = plan.get("blanks", (0, 0))  # which earlier versions do not know of
    if not isinstance(blanks, (list, tuple)) or len(blanks) != 2 or not 0 <= blanks[1] <= blanks[0] <= num_samples:
        raise damaged("plan")
    scale = plan.get("scale", 1.0)
    if not isinstance(scale, float) or not 0 < scale < float("inf"):
        raise damaged("plan")
    batch = plan.get("batch_size")
    if batch is not None and (type(batch) is not int or batch < 1 or not plan["pruned"] or len(indices) % batch):
        raise damaged("plan")
    worth = plan.get("worth")
    if worth is not None and not is_worth(worth):
        raise damaged("plan")
    pruned, threshold, blanks = bool(plan["pruned"]), plan["threshold"], (int(blanks[0]), int(blanks[1]))
    worth = None if worth is None else Worth(**worth)
    return Plan(indices.cpu(), weights.cpu(), pruned, threshold, blanks, scale, batch, worth)
