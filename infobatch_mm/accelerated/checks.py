"""What a script on accelerate is refused for, before it trains."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from ..core.checks import is_number
from ..core.distributed import world_size
from ..core.schedule import EpochSchedule
from ..core.state import damaged

#: Numbers that a state has beside the pruner's; none of them can be negative.
_COUNTS = ("num_epochs", "iterations", "updates", "wall_time_s")


def check_accelerator(accelerator: Any) -> None:
    """Refuse an accelerator under which a pass cannot be shared out or resumed.

    Raises:
        ValueError: With what to change.
    """
    if not isinstance(accelerator, Accelerator):
        raise ValueError(
            f"AcceleratedInfoBatch needs the run's Accelerator, got {type(accelerator).__name__}; without accelerate "
            "use infobatch_mm.InfoBatch"
        )
    if accelerator.use_stateful_dataloader:
        raise ValueError(
            "use_stateful_dataloader=True: the loader would resume where it was, and InfoBatch, which saves the "
            "position of each pass itself, a second time; leave it out of DataLoaderConfiguration"
        )
    if accelerator.gradient_accumulation_steps > 1 and not accelerator.gradient_state.sync_with_dataloader:
        raise ValueError(
            "sync_with_dataloader=False: gradients would be accumulated across the ends of passes, of which learning "
            "rates by progress know nothing; leave it out of GradientAccumulationPlugin"
        )
    mesh = getattr(accelerator, "torch_device_mesh", None)
    shared = [name for name in (mesh.mesh_dim_names or () if mesh else ()) if name in ("tp", "cp", "sp")]
    if shared:
        raise ValueError(
            f"the accelerator's device mesh has a dimension {shared[0]!r}, in which processes see the same samples: "
            "pruning needs data parallelism alone"
        )
    if error := process_mismatch(accelerator.num_processes):
        raise ValueError(error)


def check_unprepared(dataloader: Any) -> None:
    """Refuse a loader that accelerate shares out already: it is to be rebuilt first.

    Raises:
        ValueError: With what to do.
    """
    if getattr(dataloader, "_is_accelerate_prepared", False):
        raise ValueError(
            "the train dataloader is prepared already: give it to AcceleratedInfoBatch as it was before "
            "accelerator.prepare, and call infobatch.prepare in its place"
        )


def process_mismatch(shares: int) -> str | None:
    """What is wrong where accelerate shares the data among fewer or more processes than there are; None if nothing.

    Args:
        shares (int): Processes among which accelerate shares the data.
    """
    known = world_size()
    started = known if known > 1 else _started()
    if shares == started or shares == known > 1:
        return None
    if shares > started:
        return (
            f"accelerate shares the data among {shares} processes, torch.distributed knows {started}: the scores of a "
            "pass could not be exchanged; make AcceleratedInfoBatch while the process group of the Accelerator is "
            "there, and start the script by accelerate launch or torchrun"
        )
    who = "torch.distributed knows" if known > 1 else "the launcher started"
    advice = "pruning needs data parallelism alone, with the process group of the Accelerator"
    if shares == 1 and _is_on_cpu(known):
        advice = "each would train on all the data; without a GPU make Accelerator(cpu=True)"
    return f"accelerate shares the data among {shares} processes, {who} {started}: {advice}"


def _started() -> int:
    """Processes that torchrun or accelerate launch started, as they tell each of them."""
    told = os.environ.get("WORLD_SIZE", "")
    return int(told) if told.isdecimal() and "LOCAL_RANK" in os.environ else 1


def _is_on_cpu(known: int) -> bool:
    # torch.accelerator, of torch 2.6 and newer, knows of others than CUDA.
    on_devices = getattr(torch, "accelerator", torch.cuda).is_available()
    return not on_devices or (known > 1 and dist.get_backend() == dist.Backend.GLOO)


def check_counts(state: Mapping[str, Any], schedule: EpochSchedule) -> None:
    """Refuse a state that is damaged, or of a training of another length.

    Args:
        state (Mapping): As of :meth:`.AcceleratedInfoBatch.state_dict`.
        schedule (EpochSchedule): This run's.

    Raises:
        ValueError: With both lengths: of epochs, or of steps where the checkpoint or this run was given these.
    """
    for key in _COUNTS:
        if not is_number(state.get(key)) or state[key] < 0:
            raise damaged(key)
    before = state["schedule"]
    pass_steps = before.get("pass_steps", schedule.pass_steps)
    total = before.get("total_steps", state["num_epochs"] * pass_steps)
    if not all(is_number(each) and each > 0 for each in (pass_steps, total)):
        raise damaged("schedule")
    # In steps of other batches a length is the same up to a step.
    slack = 0.0 if pass_steps == schedule.pass_steps else max(1 / pass_steps, 1 / schedule.pass_steps)
    theirs, ours = total / pass_steps, schedule.total_steps / schedule.pass_steps
    if theirs == ours or abs(theirs - ours) < slack:
        return
    if schedule.max_steps is None and theirs == state["num_epochs"]:
        raise ValueError(
            f"cannot resume: the checkpoint is of a training of {state['num_epochs']} epochs, this one has "
            f"{schedule.num_passes}; annealing and learning rate go by their number: use the same"
        )
    raise ValueError(
        f"cannot resume: the checkpoint is of a training of {total} steps, {pass_steps} to an epoch, this one has "
        f"{schedule.total_steps}, {schedule.pass_steps} to an epoch; annealing and learning rate go by their number: "
        f"use max_train_steps={round(theirs * schedule.pass_steps)}"
    )
