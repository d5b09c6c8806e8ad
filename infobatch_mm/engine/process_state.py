"""What the processes of a run hold beside model and optimiser, and a host's checkpoint leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine.dist import all_gather_object, all_reduce
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapperDict
from torch import Tensor, nn

from ..core import rng


def capture(runner: Any, generators: Mapping[str, Any] | None = None, alone: bool = False) -> dict[str, Any]:
    """Generators of every process, and gradients on their way to the next update; every process must call it.

    Args:
        runner (Runner): The runner.
        generators (Mapping, optional): This process's generators. Defaults to their state by now.
        alone (bool): Whether to speak of this process only, without the others. Defaults to False.

    Returns:
        dict: ``rng``, a list by rank, and ``gradients`` by parameter name: with several processes the mean
        of theirs, which is what the update is made of.
    """
    own = rng.capture() if generators is None else generators
    parameters = dict(bare_model(runner).named_parameters())
    accumulating = any(not wrapper.should_update() for wrapper in optim_wrappers(runner))
    names = [name for name, p in parameters.items() if accumulating and p.grad is not None]
    if alone or runner.world_size == 1:
        return {"rng": [own], "gradients": {name: _gradient(parameters[name]).cpu() for name in names}}
    everyones = all_gather_object((own, names))
    gradients = {}
    # A parameter that some process has no gradient for is one that all must talk about.
    for name in sorted({name for _, theirs in everyones for name in theirs}):
        gradients[name] = _gradient(parameters[name])
        all_reduce(gradients[name], op="mean")
        gradients[name] = gradients[name].cpu()
    return {"rng": [generators for generators, _ in everyones], "gradients": gradients}


def restore(runner: Any, state: Mapping[str, Any]) -> None:
    """Put back what :func:`capture` found; generators only on as many processes as they are of."""
    parameters = dict(bare_model(runner).named_parameters())
    for name, gradient in state["gradients"].items():
        parameters[name].grad = gradient.to(parameters[name])
    if len(state["rng"]) == runner.world_size:
        rng.restore(state["rng"][runner.rank])


def bare_model(runner: Any) -> nn.Module:
    """The model of a runner without the wrapper that distributes it."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def optim_wrappers(runner: Any) -> list[Any]:
    """The optimiser wrappers of a runner, also where they are several."""
    wrapper = runner.optim_wrapper
    return list(wrapper.values()) if isinstance(wrapper, OptimWrapperDict) else [wrapper]


def _gradient(parameter: nn.Parameter) -> Tensor:
    """A copy of the gradient, 0 where there is none."""
    return parameter.new_zeros(parameter.shape) if parameter.grad is None else parameter.grad.detach().clone()
