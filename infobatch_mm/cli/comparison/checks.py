"""What a comparison refuses before anything is trained, since it would fail or mislead afterwards."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from mmengine.config import Config

from ..config import merged
from ..subcommands import command
from .configs import hook_index, missing_data, untwinned
from .controls import schedule_of, shortened
from .request import Request


def check(parser: argparse.ArgumentParser, request: Request) -> Config:
    """Refuse before anything is trained what would fail afterwards.

    Args:
        parser (ArgumentParser): Tells the user, and ends the process.
        request (Request): What is asked for.

    Returns:
        Config: The unpruned config with its overrides.
    """
    for config in (request.unpruned, request.pruned):
        if not config.is_file():
            parser.error(f"there is no config {config}")
    cfg = merged(request.unpruned, request.cfg_options)
    pruned = merged(request.pruned, request.cfg_options)
    _check_pair(parser, request, cfg, pruned)
    if request.then is not None:
        _check_fine_tuning(parser, request, request.then, cfg)
    else:
        for config, each in ((request.unpruned, cfg), (request.pruned, pruned)):
            if not each.get("val_evaluator"):
                parser.error(f"{config} has no val_evaluator: there would be nothing to compare by")
    if differing := untwinned(cfg, pruned):
        print(
            f"{request.pruned} is no twin of {request.unpruned}: they differ in {', '.join(differing)} beside the "
            "hook, and so will their results",
            file=sys.stderr,
        )
    if request.shortened:
        try:
            shortened(cfg, schedule_of(cfg, cfg.train_dataloader.batch_size), 1)
        except ValueError as error:
            parser.error(f"--shortened: {error}")
    check_built(parser, {request.unpruned: request.cfg_options, request.pruned: request.cfg_options})
    if request.then is not None:
        check_built(parser, {request.then: request.then_options})
    return cfg


def _check_pair(parser: argparse.ArgumentParser, request: Request, cfg: Config, pruned: Config) -> None:
    """Refuse two configs that are no pair, or whose data are not there."""
    if hook_index(pruned) is None:
        parser.error(
            f"{request.pruned} has no InfoBatchHook among its custom_hooks: give the unpruned config first, then the "
            "one with the hook"
        )
    if pruned.train_dataloader.dataset != cfg.train_dataloader.dataset:
        parser.error(
            f"{request.pruned} trains on other data than {request.unpruned}: give a config and its pruned twin"
        )
    if missing := missing_data(cfg):
        parser.error(
            f"the data set {missing} is not there: draw it (make demo-data, make demo-shapes), or say where it is "
            "with data_root="
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


def check_built(parser: argparse.ArgumentParser, configs: dict[Path, list[str]]) -> None:
    """Refuse a config that cannot be built: a typo in the second must not wait until the first is trained.

    Args:
        parser (ArgumentParser): Tells the user, and ends the process.
        configs (dict[Path, list[str]]): Overrides of each config. Each is built in a process of its own, at once.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = {}
        for number, (config, options) in enumerate(configs.items()):
            arguments = [str(config), "--work-dir", f"{folder}/{number}"]
            arguments += ["--cfg-options", *options] if options else []
            processes[config] = subprocess.Popen(
                [*command("infobatch_mm.cli.preflight"), *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        outputs = {config: process.communicate()[0] for config, process in processes.items()}
    for config, process in processes.items():
        if process.returncode:
            print("".join(outputs[config].splitlines(keepends=True)[-25:]), file=sys.stderr)
            parser.error(f"{config} cannot be trained, for the reason above; nothing was trained")
