"""What the processes of a run hold beside model and optimiser, and a host's checkpoint leaves out."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from mmengine.dist import all_gather_object, all_reduce
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapperDict
from mmengine.runner import BaseLoop
from torch import Tensor, nn

from ..core import rng


def capture(runner: Any, generators: Mapping[str, Any] | None = None, alone: bool = False) -> dict[str, Any]:
    """What each process has of its own, and gradients on their way to the next update; every process must call it.

    Args:
        runner (Runner): The runner.
        generators (Mapping, optional): This process's generators. Defaults to their state by now.
        alone (bool): Whether to speak of this process only, without the others. Defaults to False.

    Returns:
        dict: ``rng`` and ``buffers``, lists by rank, the latter of what differs from rank 0's; ``gradients``
        by parameter name, with several processes the mean of theirs, which is what the update is made of;
        ``inner_counts`` of the optimiser wrappers, by which they know when to update.
    """
    model, wrappers = bare_model(runner), optim_wrappers(runner)
    parameters = dict(model.named_parameters())
    accumulating = any(not wrapper.should_update() for wrapper in wrappers)
    names = [name for name, p in parameters.items() if accumulating and p.grad is not None]
    own = rng.capture() if generators is None else generators
    state: dict[str, Any] = {"inner_counts": inner_counts(runner)}
    if alone or runner.world_size == 1:
        gradients = {name: _gradient(parameters[name]).cpu() for name in names}
        return {**state, "rng": [own], "buffers": [{}], "gradients": gradients}
    # The host's default keeps the buffers of BatchNorm apart. Few differ, and those that do are small.
    buffers = dict(model.named_buffers())
    digests = {name: _digest(buffer) for name, buffer in buffers.items()}
    everyones = all_gather_object((own, names, digests))
    first = everyones[0][2]
    differing = {name: buffers[name].detach().cpu() for name in buffers if digests[name] != first.get(name)}
    gradients = {}
    # A parameter that some process has no gradient for is one that all must talk about.
    for name in sorted({name for _, theirs, _ in everyones for name in theirs}):
        gradients[name] = _gradient(parameters[name])
        all_reduce(gradients[name], op="mean")
        gradients[name] = gradients[name].cpu()
    return {
        **state,
        "rng": [generators for generators, _, _ in everyones],
        "buffers": all_gather_object(differing),
        "gradients": gradients,
    }


def restore(runner: Any, state: Mapping[str, Any]) -> None:
    """Put back what :func:`capture` found; what processes have of their own only on as many of them."""
    model, wrappers = bare_model(runner), optim_wrappers(runner)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    for name, gradient in state["gradients"].items():
        # As the host, go on with a model of which parts were renamed.
        if name in parameters and parameters[name].shape == gradient.shape:
            parameters[name].grad = gradient.to(parameters[name])
    if len(state["inner_counts"]) == len(wrappers):
        for wrapper, count in zip(wrappers, state["inner_counts"], strict=True):
            wrapper._inner_count = count
    if len(state["rng"]) == runner.world_size:
        rng.restore(state["rng"][runner.rank])
        for name, buffer in state["buffers"][runner.rank].items():
            if name in buffers and buffers[name].shape == buffer.shape:
                buffers[name].copy_(buffer)


class ValidationAside:
    """Keeps validation, and what hooks do before and after it, out of the random streams of a run.

    A run that resumes after a validation does not repeat it.

    Args:
        runner (Runner): Its validation loop is wrapped, if it has one.

    Attributes:
        generators (Mapping, optional): State of this process's generators before the validation that runs now.
    """

    def __init__(self, runner: Any) -> None:
        self.generators: Mapping[str, Any] | None = None
        loop = getattr(runner, "_val_loop", None)
        self._loop = loop if isinstance(loop, BaseLoop) else None
        if self._loop is not None:
            self._loop.run = self._aside(self._loop.run)  # type: ignore[method-assign]

    def _aside(self, validate: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            self.generators = rng.capture()
            try:
                return validate()
            finally:
                rng.restore(self.generators)
                self.generators = None

        return run

    def restore(self) -> None:
        """Give the loop its own method back."""
        if self._loop is not None:
            vars(self._loop).pop("run")


def bare_model(runner: Any) -> nn.Module:
    """The model of a runner without the wrapper that distributes it."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def optim_wrappers(runner: Any) -> list[Any]:
    """The optimiser wrappers of a runner, also where they are several."""
    wrapper = runner.optim_wrapper
    return list(wrapper.values()) if isinstance(wrapper, OptimWrapperDict) else [wrapper]


def inner_counts(runner: Any) -> list[int]:
    """By how many batches each optimiser wrapper has gone on, by which it knows when to update."""
    return [wrapper._inner_count for wrapper in optim_wrappers(runner)]


def _gradient(parameter: nn.Parameter) -> Tensor:
    """A copy of the gradient, 0 where there is none."""
    return parameter.new_zeros(parameter.shape) if parameter.grad is None else parameter.grad.detach().clone()


def _digest(buffer: Tensor) -> int:
    return zlib.crc32(buffer.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
