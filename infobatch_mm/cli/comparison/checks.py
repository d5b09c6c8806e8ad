"""What a comparison refuses before anything is trained, since it would fail or mislead afterwards."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from mmengine.config import Config

from ..config import merged
from .building import check_built
from .configs import hook_index, length_of, missing_data, optimiser_settings, untwinned
from .controls import schedule_of
from .pruned_arms import pruned_arms, write_config
from .request import Request
from .settings import differing
from .shortening import shortened, unmoved_points


def check(parser: argparse.ArgumentParser, request: Request) -> Config:
    """Refuse before anything is trained what would fail afterwards.

    Args:
        parser (ArgumentParser): Tells the user, and ends the process.
        request (Request): What is asked for.

    Returns:
        Config: The unpruned config with its overrides.
    """
    for config in (request.unpruned, *request.pruned):
        if not config.is_file():
            parser.error(f"there is no config {config}")
    if len(set(request.seeds)) < len(request.seeds):
        parser.error(f"--seeds {' '.join(map(str, request.seeds))}: each seed is one run, give it once")
    cfg = merged(request.unpruned, request.cfg_options)
    configs = {request.unpruned: cfg}
    for path in request.pruned:
        configs[path] = merged(path, request.cfg_options)
        _check_pair(parser, request, path, cfg, configs[path])
    if missing := missing_data(cfg):
        parser.error(
            f"the data set {missing} is not there: draw it (make demo-data, make demo-shapes), or say where it is "
            "with data_root="
        )
    if hook_index(cfg) is not None:
        parser.error(f"{request.unpruned} has an InfoBatchHook already: give the unpruned config first")
    if request.then is not None:
        _check_fine_tuning(parser, request, request.then, cfg)
    else:
        for config, each in configs.items():
            if not each.get("val_evaluator"):
                parser.error(f"{config} has no val_evaluator: there would be nothing to compare by")
    if "shortened" in request.controls:
        _check_shortening(parser, cfg)
    _check_that_all_can_be_built(parser, request)
    return cfg


def _check_that_all_can_be_built(parser: argparse.ArgumentParser, request: Request) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            arms = pruned_arms(request, Path(folder))
        except ValueError as error:
            parser.error(str(error))
        for arm in arms:
            write_config(request.unpruned, arm)
        wanted = {request.unpruned: request.cfg_options}
        check_built(parser, {**wanted, **{arm.config: request.cfg_options for arm in arms}})
    if request.then is not None:
        check_built(parser, {request.then: request.then_options})


def _check_shortening(parser: argparse.ArgumentParser, cfg: Config) -> None:
    """Refuse a config that cannot be shortened; warn of what stays where it is."""
    try:
        shortened(cfg, schedule_of(cfg, cfg.train_dataloader.batch_size), 1)
    except ValueError as error:
        parser.error(f"the control 'shortened': {error}")
    if points := unmoved_points(cfg):
        print(
            f"the control 'shortened': {', '.join(points)} of its hooks stay where they are, though it ends earlier",
            file=sys.stderr,
        )


def _check_pair(parser: argparse.ArgumentParser, request: Request, path: Path, cfg: Config, pruned: Config) -> None:
    """Refuse two configs that are no pair; warn where they differ in what a user may have meant."""
    if hook_index(pruned) is None:
        parser.error(
            f"{path} has no InfoBatchHook among its custom_hooks: give the unpruned config first, then the one with "
            "the hook"
        )
    if pruned.train_dataloader.dataset != cfg.train_dataloader.dataset:
        parser.error(f"{path} trains on other data than {request.unpruned}: give a config and its pruned twin")
    names = (f"in {request.unpruned.name}", f"in {path.name}")
    if differ := differing(length_of(cfg), length_of(pruned), names):
        parser.error(
            f"{path} has another length of training than {request.unpruned} ({differ}): the comparison would be of "
            "these, and not of the pruning; make them equal"
        )
    if differ := differing(optimiser_settings(cfg), optimiser_settings(pruned), names):
        parser.error(
            f"{path} has other optimiser settings than {request.unpruned} ({differ}): the comparison would be of "
            "these, and not of the pruning; make them equal"
        )
    if others := untwinned(cfg, pruned):
        print(
            f"{path} is no twin of {request.unpruned}: they differ in {', '.join(others)} beside the hook, and so will "
            "their results",
            file=sys.stderr,
        )


def _check_fine_tuning(parser: argparse.ArgumentParser, request: Request, then: Path, pretrained: Config) -> None:
    """Refuse a fine-tuning that could not start from a checkpoint, or would measure nothing."""
    if not then.is_file():
        parser.error(f"there is no config {then}")
    if "checkpoint" not in pretrained.get("default_hooks", {}):
        parser.error(
            f"--then: {request.unpruned} has no default_hooks.checkpoint: there would be nothing to go on from"
        )
    cfg = merged(then, request.then_options)
    start = cfg.model.backbone.get("init_cfg")
    # Without the prefix not one name would match, and the host would go on from random weights.
    if not isinstance(start, dict) or start.get("type") != "Pretrained" or not start.get("prefix"):
        parser.error(
            f"--then: the backbone of {then} starts from no checkpoint: give it init_cfg=dict(type='Pretrained', "
            "checkpoint='', prefix='backbone.')"
        )
    if not cfg.get("val_evaluator"):
        parser.error(f"--then: {then} has no val_evaluator: there would be nothing to compare by")
    if missing := missing_data(cfg):
        parser.error(f"--then: the data set {missing} of {then} is not there: draw it, or say where it is")
