"""What the tools share: a config with the command line merged into it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device

#: Where launchers tell a process which of how many it is.
_LAUNCHERS = {
    "pytorch": ("RANK", "WORLD_SIZE"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS"),
    "mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
}


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of every tool, named as users of the hosts know them."""
    parser.add_argument("--work-dir", help="where to keep logs and checkpoints (default: ./work_dirs/<config name>)")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        help="override settings of the config, e.g. data_root=/data train_dataloader.batch_size=4",
    )
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none")
    # torch.distributed.launch passes it; torchrun sets the variable itself
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0)


def load_config(args: argparse.Namespace) -> Config:
    """The config that the command line names, with its overrides and a work dir."""
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    cfg = Config.fromfile(args.config)
    cfg.launcher = args.launcher
    if args.launcher != "none" and get_device() == "cpu":
        _start_on_cpu(cfg)
    merge_options(cfg, args.cfg_options)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get("work_dir") is None:
        cfg.work_dir = str(Path("work_dirs", Path(args.config).stem))
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


def _start_on_cpu(cfg: Config) -> None:
    """Start this process's group over gloo: the host's launchers do so for GPUs only."""
    rank, world = (os.environ.get(name) for name in _LAUNCHERS[cfg.launcher])
    if rank is None or world is None:
        raise SystemExit(
            f"--launcher {cfg.launcher}: this process was not started by it, {' and '.join(_LAUNCHERS[cfg.launcher])} "
            "are not set; see tools/dist_train.sh"
        )
    if "MASTER_ADDR" not in os.environ and int(os.environ.get("SLURM_NNODES", 1)) > 1:
        raise SystemExit("--launcher slurm on several machines without GPUs: set MASTER_ADDR to the first of them")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    torch.distributed.init_process_group("gloo", rank=int(rank), world_size=int(world))
    if "model_wrapper_cfg" not in cfg:  # as the host wraps by itself
        unused = cfg.get("find_unused_parameters", False)
        cfg.model_wrapper_cfg = dict(broadcast_buffers=False, find_unused_parameters=unused)
    cfg.model_wrapper_cfg.device_ids = None


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
