"""Where all processes must come because a user's script calls something on each of them: not coming is found out."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from .distributed import Group, device_of, rank, world_size

#: Seconds that a process waits for the others in a call of the user's.
PATIENCE_S = 60.0


def meet(call: str, group: Group = None, timeout_s: float = PATIENCE_S) -> None:
    """Wait until every process is here, but not for ever.

    A collective on one process alone, as inside ``if accelerator.is_main_process:``, waits for the process group's own
    timeout, of many minutes, and then says nothing of who called what.

    Args:
        call (str): What was called, for the message.
        group (ProcessGroup, optional): Who meets. Defaults to all processes.
        timeout_s (float): Seconds to wait at most. Defaults to 60.

    Raises:
        ValueError: On the processes that called it, if others have not come by then.
    """
    if world_size(group) == 1:
        return
    # A barrier that is looked at: what waits in wait() cannot be called back by every backend.
    here = dist.all_reduce(torch.ones(1, dtype=torch.int32, device=device_of(group)), group=group, async_op=True)
    pause, give_up = 1e-4, time.monotonic() + timeout_s
    while not here.is_completed():
        if time.monotonic() > give_up:
            raise ValueError(
                f"{call} was called on process {rank(group)}, but not within {timeout_s:g} s on every other: all "
                "processes must call it, so take it out of `if is_main_process` and the like, or give a process that "
                "is only late a longer timeout_s"
            )
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    here.wait()
