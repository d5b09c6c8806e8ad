"""Train a model from a config, with or without InfoBatch.

infobatch-mm train CONFIG [--work-dir DIR] [--resume [CHECKPOINT]] [--cfg-options k=v ...]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from .config import add_common_arguments, load_config


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    parser = argparse.ArgumentParser(description="Train a model from a config")
    parser.add_argument("config", help="path of the config file")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        help="resume from the given checkpoint, or from the latest one in the work dir",
    )
    parser.add_argument("--amp", action="store_true", help="train with automatic mixed precision")
    parser.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate with the batch size")
    add_common_arguments(parser)
    args = parser.parse_args(argv)

    cfg = load_config(args)
    if args.amp:
        cfg.optim_wrapper.type = "AmpOptimWrapper"
        cfg.optim_wrapper.setdefault("loss_scale", "dynamic")
    if args.auto_scale_lr:
        if "base_batch_size" not in cfg.get("auto_scale_lr", {}):
            parser.error("--auto-scale-lr needs auto_scale_lr = dict(base_batch_size=...) in the config")
        cfg.auto_scale_lr.enable = True
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == "auto" else args.resume
    build_runner(cfg).train()


def build_runner(cfg: Config) -> Runner:
    """The runner of a config, of the class that it names if it names one."""
    return RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)
