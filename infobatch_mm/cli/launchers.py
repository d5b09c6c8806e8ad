"""Processes that a launcher has started, on machines without GPUs."""

from __future__ import annotations

import os

import torch
from mmengine.config import Config
from mmengine.device import get_device

#: Where each launcher tells a process which of how many it is.
LAUNCHERS = {
    "pytorch": ("RANK", "WORLD_SIZE"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS"),
    "mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
}


def start_on_cpu(cfg: Config) -> None:
    """Start this process's group over gloo where there is no GPU: the host's launchers start groups of GPUs only.

    Args:
        cfg (Config): Its ``launcher`` is ``'none'`` or one of :data:`LAUNCHERS`; gets a model wrapper for the CPU.

    Raises:
        SystemExit: If the launcher did not start this process, or does not say where the processes meet.
    """
    if cfg.launcher == "none" or get_device() != "cpu":
        return
    rank, world = (os.environ.get(name) for name in LAUNCHERS[cfg.launcher])
    if rank is None or world is None:
        raise SystemExit(
            f"--launcher {cfg.launcher}: this process was not started by it, {' and '.join(LAUNCHERS[cfg.launcher])} "
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
