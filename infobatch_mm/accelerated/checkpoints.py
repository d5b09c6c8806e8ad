"""Our part of accelerate's checkpoints: registered, and checked before anything is loaded or written."""

from __future__ import annotations

import contextlib
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..core.store import ScoreStore


class CheckpointEntry:
    """Has an accelerator save and load an object, and look at a checkpoint first.

    Args:
        accelerator (Accelerator): The run's.
        owner: What has the state.
        check_state (Callable): Refuses a state of another run.
        store (ScoreStore): Its scores.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        owner: Any,
        check_state: Callable[[Mapping[str, Any]], Any],
        store: ScoreStore,
    ) -> None:
        self._accelerator = accelerator
        self._owner = owner
        self._check_state = check_state
        self._store = store
        accelerator.register_for_checkpointing(owner)
        self._hooks = [
            accelerator.register_load_state_pre_hook(self._before_load),
            accelerator.register_save_state_pre_hook(self._before_save),
        ]

    def remove(self) -> None:
        """Have the accelerator forget the object."""
        self._accelerator._custom_objects.remove(self._owner)
        for hook in self._hooks:
            hook.remove()

    def _before_load(self, models: Any, input_dir: str) -> None:
        """Refuse a checkpoint that this run cannot go on from before accelerate loads half of it."""
        objects = self._accelerator._custom_objects  # saved under their numbers
        path = Path(input_dir, f"custom_checkpoint_{objects.index(self._owner)}.pkl")
        state: Mapping[str, Any] = {}
        with contextlib.suppress(OSError, pickle.UnpicklingError):  # no file, or another object's
            state = torch.load(path, map_location="cpu", weights_only=True)
        if "pass_index" not in state:
            raise ValueError(
                f"cannot resume: the checkpoint {input_dir} was saved without InfoBatch; finish that run without it, "
                "or start a new one from its weights"
            )
        self._check_state(state)

    def _before_save(self, models: Any, weights: Any, output_dir: str) -> None:
        self._store.flush()
        if self._store.unmerged:
            warnings.warn(
                "the scores of the other processes are not in this checkpoint: call infobatch.merge() on every process "
                "before accelerator.save_state()",
                stacklevel=2,
            )


def alike(one: Any, other: Any) -> bool:
    """Whether two data sets may be one that was made twice, as ``find_executable_batch_size`` makes them."""
    return one is other or (type(one) is type(other) and len(one) == len(other))
