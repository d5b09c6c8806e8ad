"""A device that is far away, on a machine that has none: it computes as the CPU does and notes who waits for it.

A tensor there says that its device is ``meta``, which has no numbers of its own; these have them, on the CPU. What
would make a step on a GPU wait is noted: a look at a value, a choice by a mask, whose size must be known, and a copy in
either direction that is not ``non_blocking``. A copy to the CPU that nobody waits for holds nothing of use before the
next step.
"""

import contextlib
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

FAR = torch.device("meta")
#: The size of what they return, or what they return, is a question to the device.
_LOOKS = {
    "_local_scalar_dense",
    "allclose",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "equal",
    "_unique2",
    "unique_dim",
    "bincount",
}
_INDEXES = {"index", "index_put", "index_put_"}


class FarTensor(Tensor):
    """A tensor on the far device; ``near`` holds its numbers."""

    @staticmethod
    def __new__(cls, near: Tensor) -> Tensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=FAR,
        )

    def __init__(self, near: Tensor) -> None:
        self.near = near

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {}, Notes())


@dataclass
class Wait:
    """Who waited for what: ``lines`` are ``file:line``, without torch's own, the innermost last."""

    what: str
    lines: list[str]

    @property
    def is_ours(self) -> bool:
        """Whether a line of this package asked for it, and not one of the host's."""
        return bool(self.lines) and "infobatch_mm/" in self.lines[-1]

    def __str__(self) -> str:
        return f"{self.what} at {' > '.join(self.lines[-3:])}"


@dataclass
class Notes:
    """Waits of a step, and copies under way."""

    waits: list[Wait] = field(default_factory=list)
    under_way: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def wait(self, what: str) -> None:
        skipped = ("/torch/", __file__)
        frames = [frame for frame in traceback.extract_stack() if not any(s in frame.filename for s in skipped)]
        self.waits.append(Wait(what, [f"{frame.filename}:{frame.lineno}" for frame in frames]))


class _Dispatch(TorchDispatchMode):
    def __init__(self, notes: Notes) -> None:
        super().__init__()
        self.notes = notes

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {}, self.notes)


class _FromLists(TorchFunctionMode):
    """Numbers that are made a tensor on a device go there by a copy, which torch leaves out for ``meta``."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor):
            device = kwargs.pop("device", None)
            made = func(*args, **kwargs)
            return made if device is None else made.to(device)
        if func is torch.Tensor.new_tensor and isinstance(args[0], FarTensor):
            return torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype)).to(kwargs.get("device", FAR))
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], FarTensor):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(each).to(FAR) if isinstance(each, list) else each for each in index)
            return func(args[0], index, *args[2:])
        if func is torch.Tensor.tolist and isinstance(args[0], FarTensor):
            return args[0].cpu().tolist()
        return func(*args, **kwargs)


def _run(func: Any, args: tuple, kwargs: dict[str, Any], notes: Notes) -> Any:
    name, kwargs = func.overloadpacket.__name__, dict(kwargs)
    tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
    from_far = any(isinstance(each, FarTensor) for each in tensors)
    to_far = from_far if kwargs.get("device") is None else torch.device(kwargs["device"]).type == FAR.type
    if kwargs.get("device") is not None:
        kwargs["device"] = torch.device("cpu")
    near = [each for each in tensors if not isinstance(each, FarTensor) and each.dim() > 0]
    assert not any(each.device == FAR for each in tensors if not isinstance(each, FarTensor)), f"{func} of no numbers"
    mixed = from_far and not all(isinstance(each, FarTensor) for each in tensors)
    if (name == "_to_copy" and from_far != to_far) or (name == "copy_" and mixed):
        if not (kwargs.get("non_blocking") or args[2:3] == (True,)):
            notes.wait("a blocking copy")
        elif name == "copy_" and not isinstance(args[0], FarTensor):
            notes.under_way.append((args[0], args[1].near.clone()))
            return args[0]
        elif name == "_to_copy" and not to_far:
            result = func(*tree_map(_near, args), **kwargs)
            notes.under_way.append((torch.full_like(result, 77), result))
            return notes.under_way[-1][0]
    elif from_far and name in _INDEXES:
        for each in args[1]:
            if each is not None and each.dtype in (torch.bool, torch.uint8):
                notes.wait("a choice by a mask")
            elif each is not None and each.dim() and not isinstance(each, FarTensor):
                notes.wait("a blocking copy of indices")
    elif from_far and (name in _LOOKS or (name == "repeat_interleave" and kwargs.get("output_size") is None)):
        notes.wait(name)
    elif from_far and near:
        raise RuntimeError(f"{func} of tensors on two devices, of the shapes {[tuple(each.shape) for each in tensors]}")
    result = func(*tree_map(_near, args), **tree_map(_near, kwargs))
    written = [argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.returns]
    if any(written):  # in place: the tensor that was given
        given = kwargs.get("out", args[0])
        return given if isinstance(given, FarTensor) else result
    return tree_map(lambda each: FarTensor(each) if isinstance(each, Tensor) else each, result) if to_far else result


def _near(value: Any) -> Any:
    return value.near if isinstance(value, FarTensor) else value


@contextlib.contextmanager
def noted(notes: Notes | None = None) -> Iterator[Notes]:
    """Work on the far device, and note who waits for it; notes that go on are of the next step."""
    notes = notes or Notes()
    for landing, result in notes.under_way:
        landing.copy_(result)
    notes.under_way.clear()
    with _Dispatch(notes), _FromLists():
        yield notes


def far(value: Any) -> Any:
    """The same on the far device: a tensor, a data sample, a model (itself), or lists and dicts of them."""
    if isinstance(value, nn.Module):
        for module in value.modules():
            for name, each in module._parameters.items():
                if each is not None:
                    module._parameters[name] = nn.Parameter(FarTensor(each.detach().clone()), each.requires_grad)
            for name, each in module._buffers.items():
                if each is not None:
                    module._buffers[name] = FarTensor(each.clone())
        if hasattr(value, "data_preprocessor"):
            value.data_preprocessor._device = FAR
        return value
    if isinstance(value, BaseDataElement):
        with noted():
            return value.to(FAR)
    if isinstance(value, dict):
        return {key: far(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(far(each) for each in value)
    return FarTensor(value) if isinstance(value, Tensor) else value


def near(value: Any) -> Any:
    """Back on the CPU: what far tensors hold, in lists and dicts too."""
    return tree_map(_near, value)
