"""Processes, for tests: scripts that a launcher starts, and functions on ranks that meet over gloo."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def torchrun(processes: int = 2) -> list[str]:
    """Arguments of the interpreter that start a script in so many processes, which meet at a free port."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]


def accelerate_launch(processes: int = 2) -> list[str]:
    """The same by accelerate."""
    return [
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes), "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
    ]


def launched(
    launcher: list[str],
    script: Any,
    *arguments: Any,
    cwd: Path | None = None,
    fails: bool = False,
    timeout: float = 400,
    **environment: str,
) -> str:
    """Run a script to its end, which is expected to be a failure if ``fails``; returns what it printed."""
    process = subprocess.Popen(
        [sys.executable, *launcher, str(script), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output = process.communicate(timeout=timeout)[0]
    finally:
        process.terminate()  # a launcher passes it on to its own
    assert bool(process.returncode) == fails, output[-4000:]
    return output


#: How loaders of ranks start workers. By fork, CPython 3.11 can lock up in a child that is forked while a thread of
#: gloo enters the interpreter; by spawn, the default in a spawned process, each worker imports torch for seconds.
WORKER_CONTEXT = "forkserver"


def preload_workers(*packages: str) -> None:
    """Have the server that forks this process's workers import what they need."""
    multiprocessing.get_context(WORKER_CONTEXT).set_forkserver_preload(list(packages))


def on_ranks(world: int, target: Callable[..., None], *arguments: Any) -> None:
    """Call a function of a rank and of these arguments in so many processes, and wait for them.

    A server forks them, and what it has imported is imported once: for the tests of the engine, all that is needed.
    """
    mp.start_processes(target, arguments, nprocs=world, start_method="forkserver")


@contextmanager
def meeting(folder: Any, rank: int, world: int, name: str = "meet", closes: bool = True) -> Iterator[None]:
    """Be one of several ranks that meet at a file; a collective that waits for another gives up after a minute.

    With ``closes=False`` for ranks that leave a collective unfinished: to close the group would wait for it.
    """
    torch.set_num_threads(1)
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=world, timeout=timeout)
    yield
    if closes:
        dist.barrier()  # none leaves while another still talks to it
        dist.destroy_process_group()


def forget_accelerators() -> None:
    """Have the next ``Accelerator`` be as the first; processes that met stay together."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    together = PartialState._shared_state and PartialState().num_processes > 1
    AcceleratorState._reset_state(reset_partial_state=not together)
    GradientState._reset_state()
