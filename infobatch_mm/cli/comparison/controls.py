"""The control runs of a comparison: the options by which they make about as many visits as the pruned run made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...core import EpochSchedule, IterSchedule, PruningPolicy, Schedule, build_policy
from ...policies import InfoBatchPolicy
from .configs import hook_index, is_by_epoch

if TYPE_CHECKING:
    from mmengine.config import Config

# Arguments of a policy by which each step changes the model.
_STEP = ("keep", "lr_rule", "rescale")


def schedule_of(cfg: Config, num_samples: int) -> Schedule:
    """The unpruned run of a config, as passes over its data.

    Args:
        cfg (Config): The unpruned config.
        num_samples (int): Length of its training data set.
    """
    batch_size = cfg.train_dataloader.batch_size
    if not is_by_epoch(cfg):
        return IterSchedule(num_samples, cfg.train_cfg.max_iters, batch_size)
    batches = num_samples / batch_size
    batches = math.floor(batches) if cfg.train_dataloader.get("drop_last") else math.ceil(batches)
    return EpochSchedule(num_samples, cfg.train_cfg.max_epochs, batch_size, batches)


def policy_of(cfg: Config, **changes: Any) -> PruningPolicy:
    """The policy of a pruned config.

    Args:
        cfg (Config): It has the hook.
        changes: Arguments of the policy in place of its own.

    Raises:
        ValueError: If the policy takes no such argument, or not this value.
    """
    hook = _hook(cfg)
    policy = hook.get("policy") or "infobatch"
    policy = {"type": policy} if isinstance(policy, str) else dict(policy)
    return build_policy({**policy, **changes}, hook.get("prune_ratio"), hook.get("delta"))


def at_random(cfg: Config, schedule: Schedule, summary: dict[str, Any]) -> list[str]:
    """Options that make the pruned run prune at random, as many visits as it saved; see :func:`random_ratio`.

    Its steps are as many, and its learning rates and weights follow the same rules, as in the pruned run.

    Args:
        cfg (Config): The pruned config.
        schedule (Schedule): Its :func:`schedule_of`.
        summary (dict): ``infobatch_summary.json`` of the pruned run.

    Returns:
        list[str]: For ``--cfg-options``.

    Raises:
        ValueError: If random pruning cannot follow these rules, or batches cannot be made that small.
    """
    delta = delta_of(summary)
    if step := step_rules(policy_of(cfg).settings()):
        # Smaller batches are coarse: a target makes up for that over the passes.
        by_target = step.get("keep") == "steps"
        how = how_much(summary) if by_target else {"prune_ratio": round(random_ratio(schedule, summary), 6)}
        return _random(cfg, schedule, {"delta": delta, **how, **step})
    options: dict[str, Any] = {"policy": "random", "prune_ratio": f"{random_ratio(schedule, summary):.6f}"}
    if _hook(cfg).get("delta") != delta:
        options["delta"] = delta
    return _set(cfg, options, unset=("score", "score_ema"))


def smaller(cfg: Config, schedule: Schedule, summary: dict[str, Any]) -> list[str]:
    """Options that make as many steps as the unpruned run, on smaller batches drawn uniformly, at equal visits.

    Args:
        cfg (Config): The pruned config.
        schedule (Schedule): Its :func:`schedule_of`.
        summary (dict): ``infobatch_summary.json`` of the pruned run.

    Returns:
        list[str]: For ``--cfg-options``.

    Raises:
        ValueError: If batches cannot be made that small.
    """
    if schedule.batch_size < 2:
        raise ValueError(f"batches of {schedule.batch_size} cannot be made smaller")
    return _random(cfg, schedule, {"keep": "steps", "delta": 1.0, **how_much(summary), **lr_rule_of(summary)})


def unweighted(cfg: Config) -> list[str]:
    """Options that give every visit of the pruned run a weight of one.

    Args:
        cfg (Config): The pruned config.

    Returns:
        list[str]: For ``--cfg-options``.

    Raises:
        ValueError: If its policy gives no weights, or cannot be told to leave them out.
    """
    own = policy_of(cfg)
    if own.rescale == "none":
        raise ValueError(f"{own.name} has no weights here (rescale='none')")
    try:
        policy_of(cfg, rescale="none")
    except ValueError:
        raise ValueError(f"{own.name} takes no rescale='none'") from None
    policy = _hook(cfg).get("policy")
    options: dict[str, Any] = {"policy.rescale": "none"}
    if not isinstance(policy, dict):
        options |= {"policy.type": policy or "infobatch"}
        if "policy" in _hook(cfg):
            options = {"policy._delete_": True, **options}
    return _set(cfg, options)


def random_ratio(schedule: Schedule, summary: dict[str, Any]) -> float:
    """The share that prunes at random, in all passes before ``delta`` alike, as many visits as a pruned run saved.

    Args:
        schedule (Schedule): The unpruned run.
        summary (dict): ``infobatch_summary.json`` of the pruned one.

    Returns:
        float: In [0, 1).
    """
    policy = InfoBatchPolicy(delta=delta_of(summary))
    passes = [p for p in range(schedule.num_passes) if policy.is_active(schedule.progress(p))]
    prunable = sum(schedule.full_visits(p) for p in passes)
    return max(0.0, summary["visits_full"] - summary["visits"]) / prunable if prunable else 0.0


def delta_of(summary: dict[str, Any]) -> float:
    """Share of the training that a pruned run pruned; policies without an annealing prune to the end."""
    return 1.0 if summary["delta"] is None else summary["delta"]


def how_much(summary: dict[str, Any]) -> dict[str, float]:
    """Argument of a policy that saves what a pruned run saved."""
    saving = round(1 - summary["visits"] / summary["visits_full"], 6)
    return {"target_saving": saving} if saving > 0 else {"prune_ratio": 0.0}


def step_rules(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a policy that decide how many steps there are, and how large each is, as far as they are not the
    usual ones.

    Args:
        settings (Mapping): Of a policy, or the summary of its run.
    """
    return {key: settings[key] for key in _STEP if key in settings}


def lr_rule_of(summary: dict[str, Any]) -> dict[str, str]:
    """Argument of a policy that treats the learning rate of smaller batches as a pruned run did."""
    return {"lr_rule": summary["lr_rule"]} if "lr_rule" in summary else {}


def _random(cfg: Config, schedule: Schedule, arguments: dict[str, Any]) -> list[str]:
    """Overrides by which a pruned config prunes at random, with these arguments and no others."""
    policy = {"type": "random", **arguments}
    num_samples = schedule.num_samples
    share = max(schedule.batch_size, schedule.full_batches(0)) / num_samples  # a sample for each step at least
    build_policy(policy).check_length(min(1.0, num_samples / schedule.total_samples), share)
    options = {f"policy.{key}": value for key, value in policy.items()}
    if "policy" in _hook(cfg):
        options = {"policy._delete_": True, **options}
    return _set(cfg, options, unset=("prune_ratio", "delta", "score", "score_ema"))


def _hook(cfg: Config) -> Any:
    index = hook_index(cfg)
    assert index is not None
    return cfg.custom_hooks[index]


def _set(cfg: Config, options: dict[str, Any], unset: tuple[str, ...] = ()) -> list[str]:
    """Overrides of the hook's settings; what is to be unset gets None where the hook has it."""
    options = {**options, **{key: None for key in unset if _hook(cfg).get(key) is not None}}
    return [f"custom_hooks.{hook_index(cfg)}.{key}={value}" for key, value in options.items()]
