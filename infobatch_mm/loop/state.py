"""What a checkpoint of a loop holds beside the pruner's own state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .passes import Passes


def state_of(passes: Passes, identity: Mapping[str, Any]) -> dict[str, Any]:
    """State of a training: plain tensors and numbers.

    Args:
        passes (Passes): Where it stands.
        identity (Mapping[str, Any]): Settings that a resumed run must have as well.
    """
    is_over = passes.locate()
    walk, sizes = passes.walk, passes.sizes
    plan = None if walk is None or walk.finished else walk.rearranged()
    whole = {"is_over": is_over, "full_batches": None if sizes.batch_size is None else sizes.full_batches}
    return {**passes.pruner.state_dict(plan), **identity, **whole}


def load_state(passes: Passes, identity: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Go on where :func:`state_of` was called.

    Raises:
        ValueError: With both values, if the state belongs to another run, or is damaged.
    """
    pruner = passes.pruner
    pruner.check_state(state)
    for name, here in identity.items():
        if (there := state.get(name, here)) != here:
            raise ValueError(
                f"cannot resume: the checkpoint was trained with {name}={there!r}, this run has {name}={here!r}; "
                "use the same, or start a new run from its weights"
            )
    passes.forget()
    passes.sizes.expect(state["batch_size"])
    pruner.load_state_dict(state)
    passes.sizes.resumed_batches = state.get("full_batches")
    if state.get("is_over", state.get("tail_dropped", False)):
        pruner.finish_pass(together=False)  # a state is of all processes
