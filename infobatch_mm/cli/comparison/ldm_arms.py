"""The arms of a comparison of latent-diffusion trainings, as flags of ``train-ldm``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...core import EpochSchedule
from ...diffusion.options import parse_options
from .controls import delta_of, random_ratio
from .settings import differing
from .sharing import Control
from .shortening import whole
from .specs import Spec, check_names, parse_specs

#: An output folder for options that are only looked at.
_NOWHERE = ("--output_dir", ".")
#: Settings of a spec, and the options that they are.
_OPTIONS = {
    "prune_ratio": "--prune_ratio",
    "delta": "--delta",
    "quantile": "--prune_quantile",
    "score": "--score",
    "score_ema": "--score_ema",
}
#: Options in which an arm may differ from the unpruned run: its recipe, the pruning, and what is only about output.
_FREE = (
    *("config", "output_dir", "resume_from_checkpoint", "logger"),
    *("policy", "prune_ratio", "delta", "prune_quantile", "score", "score_ema"),
    *("checkpointing_steps", "checkpoints_total_limit"),
    *("save_images_epochs", "eval_batch_size", "ddpm_num_inference_steps"),
)
#: Why some controls are not to be had.
LEFT_OUT = {
    "smaller": "train-ldm has no option for keep='steps'",
    "unweighted": "train-ldm has no option for rescale='none'",
}


def pruned_arms(args: argparse.Namespace) -> dict[str, list[str]]:
    """Flags of each pruned arm, by its name.

    Args:
        args (Namespace): ``full``, ``pruned``, ``policies`` and ``scores`` of the command line.

    Raises:
        ValueError: If there are none, two of one name, or a policy that cannot be made or told to ``train-ldm``.
    """
    if args.scores and len(args.pruned) != 1:
        raise ValueError(f"--scores makes arms of one pruned recipe, and there are {len(args.pruned)}")
    recipes = [["--config", str(path)] for path in args.pruned]
    names = [Path(path).stem for path in args.pruned]
    if args.scores:
        names, recipes = list(args.scores), [[*recipes[0], "--score", score] for score in args.scores]
    elif len(names) == 1 and not args.policies:
        names = ["infobatch"]
    for spec in parse_specs(args.policies):
        names.append(spec.text)
        recipes.append(["--config", args.full, *_flags(spec)])
    if not names:
        raise ValueError("there is no pruned arm: give a pruned recipe, or --policies")
    check_names(names)
    return dict(zip(names, recipes, strict=True))


def _flags(spec: Spec) -> list[str]:
    given = {**spec.policy, **spec.hook}
    flags = ["--policy", given.pop("type")]
    for key, value in given.items():
        if key not in _OPTIONS:
            raise ValueError(f"--policies {spec.text}: train-ldm has no option for {key}; it has {sorted(_OPTIONS)}")
        flags += [_OPTIONS[key], str(value)]
    return flags


def check_twins(full: str, arms: dict[str, list[str]], options: Sequence[str]) -> None:
    """Refuse an arm that differs from the unpruned run in more than pruning and output.

    Args:
        full (str): The unpruned recipe.
        arms (dict): Flags of each pruned arm.
        options (Sequence[str]): Flags of all runs.

    Raises:
        ValueError: With both values.
    """
    baseline = _training_options(["--config", full, *options])
    for name, flags in arms.items():
        if differ := differing(baseline, _training_options([*flags, *options]), ("unpruned", f"of {name}")):
            raise ValueError(
                f"{name} has other options than {full} ({differ}): the comparison would be of these, and not "
                "of the pruning; make them equal"
            )


def _training_options(flags: list[str]) -> dict[str, Any]:
    options = vars(parse_options([*flags, *_NOWHERE]))
    return {name: value for name, value in options.items() if name not in _FREE}


def control_flags(control: Control, full: list[str], pruned: list[str], summary: dict[str, Any]) -> list[str]:
    """Flags of a control.

    Args:
        control (Control): Which: shortened, or random.
        full (list[str]): Flags of the unpruned run.
        pruned (list[str]): Flags of the pruned arm whose visits it makes.
        summary (dict): ``infobatch_summary.json`` of that arm.
    """
    if control.kind == "shortened":
        return [*full, *shortened(parse_options([*full, *_NOWHERE]), summary)]
    ratio = random_ratio(passes_of(summary), summary)
    return [*pruned, "--policy", "random", "--prune_ratio", f"{ratio:.6f}", "--delta", str(delta_of(summary))]


def shortened(args: argparse.Namespace, summary: dict[str, Any]) -> list[str]:
    """Flags of an unpruned run that makes about as many visits as a pruned one made: in whole epochs, or in steps."""
    if args.max_train_steps is not None:
        return [
            "--max_train_steps",
            str(max(1, round(args.max_train_steps * summary["visits"] / summary["visits_full"]))),
        ]
    return ["--num_epochs", str(min(args.num_epochs, whole(summary["visits"], summary["num_samples"])))]


def passes_of(summary: dict[str, Any]) -> EpochSchedule:
    """The passes of a run, whose last one may be partial, visit by visit."""
    visits = round(summary["passes_total"] * summary["num_samples"])
    return EpochSchedule(summary["num_samples"], None, batch_size=1, max_steps=visits)
