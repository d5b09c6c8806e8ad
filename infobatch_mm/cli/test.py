"""Evaluate a checkpoint by the test settings of its config.

infobatch-mm test CONFIG CHECKPOINT [--work-dir DIR] [--out DIR] [--show-dir DIR] [--tta]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mmengine.runner import Runner

from .config import add_common_arguments, load_config


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as the command line says."""
    parser = argparse.ArgumentParser(description="Evaluate a checkpoint")
    parser.add_argument("config", help="path of the config file")
    parser.add_argument("checkpoint", help="path of the checkpoint")
    parser.add_argument("--out", help="folder to keep the predictions in, for offline evaluation")
    parser.add_argument("--show", action="store_true", help="show the predictions")
    parser.add_argument("--show-dir", help="folder to keep pictures of the predictions in")
    parser.add_argument("--wait-time", type=float, default=2, help="seconds that a picture is shown")
    parser.add_argument("--tta", action="store_true", help="augment at test time, by the config's tta_model")
    add_common_arguments(parser)
    args = parser.parse_args(argv)

    cfg = load_config(args)
    cfg.load_from = args.checkpoint
    if args.show or args.show_dir:
        hook = cfg.default_hooks.get("visualization")
        if hook is None:
            parser.error("--show and --show-dir need a visualization hook in the config's default_hooks")
        hook.update(draw=True, show=args.show, wait_time=args.wait_time)
        if args.show_dir:
            cfg.visualizer["save_dir"] = args.show_dir
    if args.tta:
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
        cfg.tta_model.module = cfg.model
        cfg.model = cfg.tta_model
    if args.out:
        cfg.test_evaluator.update(output_dir=args.out, keep_results=True)
    Runner.from_cfg(cfg).test()
