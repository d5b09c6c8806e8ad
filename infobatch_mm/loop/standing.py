"""Where a training stands: what is done, what it came to, and the state from which it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core.standing import Standing
from .passes import Passes


class LoopStanding(Standing):
    """What :class:`.InfoBatch` says of itself between steps."""

    _passes: Passes
    _identity: dict[str, Any]  # settings that a resumed run must have as well

    @property
    def passes_done(self) -> int:
        """Passes that are done; where a loop over epochs goes on after a resume."""
        return self._passes.locate() + self._pruner.pass_index  # in this order: the one may book the pass

    def summary(self) -> dict[str, Any]:
        """Policy, passes, visits, saved share and one entry per finished pass, as plain numbers.

        On several processes, visits that others skipped since the last ``merge()`` are not known.
        """
        return self._pruner.summary(is_over=self._passes.locate())

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint: plain tensors and numbers, loads with ``weights_only=True``.

        On several processes call ``merge()`` on all of them first, then this on one.
        """
        passes = self._passes
        is_over = passes.locate()
        walk, sizes = passes.walk, passes.sizes
        plan = None if walk is None or walk.finished else walk.rearranged()
        whole = {"is_over": is_over, "full_batches": None if sizes.batch_size is None else sizes.full_batches}
        return {**self._pruner.state_dict(plan), **self._identity, **whole}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the next unvisited position of the same plan.

        Raises:
            ValueError: If the state belongs to another data set, policy, seed or length of training, or to a
                newer version, or is damaged.
        """
        parsed = self._pruner.check_state(state)
        for name, here in self._identity.items():
            if (there := state.get(name, here)) != here:
                raise ValueError(
                    f"cannot resume: the checkpoint was trained with {name}={there!r}, this run has {name}={here!r}; "
                    "use the same, or start a new run from its weights"
                )
        self._passes.forget()
        self._passes.sizes.expect(parsed.batch_size)
        self._pruner.load_state_dict(parsed)
        self._passes.sizes.resumed_batches = state.get("full_batches")
        if state.get("is_over", state.get("tail_dropped", False)):
            self._pruner.finish_pass(together=False)  # a state is of all processes
