"""A config of MMEngine with the command line merged into it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction

from .launchers import LAUNCHERS, start_on_cpu


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of every subcommand that runs a config, named as users of the hosts know them."""
    parser.add_argument("--work-dir", help="where to keep logs and checkpoints (default: ./work_dirs/<config name>)")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        help="override settings of the config, e.g. data_root=/data train_dataloader.batch_size=4",
    )
    parser.add_argument("--launcher", choices=["none", *LAUNCHERS], default="none")
    # torch.distributed.launch passes it; torchrun sets the variable itself
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0)


def load_config(args: argparse.Namespace) -> Config:
    """The config that the command line names, with its overrides and a work dir."""
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    cfg = Config.fromfile(args.config)
    cfg.launcher = args.launcher
    start_on_cpu(cfg)
    merge_options(cfg, args.cfg_options)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get("work_dir") is None:
        cfg.work_dir = str(Path("work_dirs", Path(args.config).stem))
    return cfg


def merged(config: Path, options: list[str]) -> Config:
    """A config with overrides as they stand on a command line.

    Args:
        config (Path): Its file.
        options (list[str]): What follows ``--cfg-options``; may be empty.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg-options", nargs="*", action=DictAction, default={})
    cfg = Config.fromfile(config)
    merge_options(cfg, parser.parse_args(["--cfg-options", *options]).cfg_options if options else None)
    return cfg


def merge_options(cfg: Config, options: dict[str, Any] | None) -> None:
    """Merge overrides into a config; a top-level ``data_root`` among them reaches its data sets."""
    if not options:
        return
    before = cfg.get("data_root")
    cfg.merge_from_dict(options)
    if "data_root" in options:
        for split in ("train", "val", "test"):
            _set_data_root(cfg.get(f"{split}_dataloader"), before, options["data_root"])


def _set_data_root(node: Any, before: str | None, root: str) -> None:
    """A top-level ``data_root`` reaches the data sets that took their copy of it when the file was read.

    Where the file has none at its top level, it reaches all of them.
    """
    if isinstance(node, dict):
        if "data_root" in node and before in (None, node["data_root"]):
            node["data_root"] = root
        for child in node.values():
            _set_data_root(child, before, root)
    elif isinstance(node, (list, tuple)):
        for child in node:
            _set_data_root(child, before, root)
