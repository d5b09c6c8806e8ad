"""Where all processes must come because a user's script calls something on each of them: not coming is found out."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from .distributed import Group, device_of, rank, world_size

#: Seconds that a process waits for the others in a call of the user's.
PATIENCE_S = 60.0


class Meeting:
    """Has processes wait for each other, but not for ever.

    A collective on one process alone, as inside ``if accelerator.is_main_process:``, pairs with whatever the others do
    next in their process group, as a sum of gradients, and ends in a crash that names neither; or it waits for many
    minutes. So processes meet in a group of their own.

    Args:
        group (ProcessGroup, optional): Who meets. Defaults to all processes. Each of them must make one.
    """

    def __init__(self, group: Group = None) -> None:
        self._group = group
        self._apart: Group = None
        if world_size(group) > 1:
            ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
            backend = "gloo" if dist.is_gloo_available() else None
            self._apart = dist.new_group(ranks, backend=backend, use_local_synchronization=True)

    def wait(self, call: str, timeout_s: float = PATIENCE_S) -> None:
        """Wait until every process is here.

        Args:
            call (str): What was called, for the message.
            timeout_s (float): Seconds to wait at most. Defaults to 60.

        Raises:
            ValueError: On the processes that called it, if others have not come by then.
        """
        if self._apart is None:
            return
        # Looked at, because not every backend lets a wait() be called off.
        sign = torch.ones(1, dtype=torch.int32, device=device_of(self._apart))
        here = dist.all_reduce(sign, group=self._apart, async_op=True)
        pause, give_up = 1e-4, time.monotonic() + timeout_s
        while not here.is_completed():
            if time.monotonic() > give_up:
                raise ValueError(
                    f"{call} was called on process {rank(self._group)}, but not within {timeout_s:g} s on every other: "
                    "all processes must call it, so take it out of `if is_main_process` and the like, or give a "
                    "process that is only late a longer timeout_s"
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        here.wait()
