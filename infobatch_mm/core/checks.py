"""Numbers as users give them: Python's, numpy's and 0-d tensors."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor


def plain(value: Any) -> Any:
    """The Python number in a 0-d tensor or array or a numpy scalar; anything else as it is."""
    if isinstance(value, np.generic) or (isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0):
        return value.item()
    return value


def is_number(value: Any) -> bool:
    """Whether a setting is a finite number, also one of numpy or in a 0-d tensor, and no bool."""
    value = plain(value)
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def whole_number(name: str, value: Any, at_least: int, meaning: str) -> int:
    """A setting that counts something.

    Args:
        name (str): The setting's name, for the message.
        value: What the user gave: an int, or one of numpy or in a 0-d tensor.
        at_least (int): The smallest value that makes sense.
        meaning (str): What it is, and what to give, for the message.

    Returns:
        int: The value.

    Raises:
        ValueError: If it is no whole number, or too small.
    """
    number = plain(value)
    if isinstance(number, bool) or not hasattr(type(number), "__index__"):
        if hasattr(number, "__len__") and not isinstance(number, str):
            raise ValueError(f"{name}={type(value).__name__}(...) is not a whole number: give its length, len(...)")
        quoted = isinstance(number, str) and number.strip().lstrip("+-").isdecimal()
        whole = isinstance(number, float) and number.is_integer()
        hint = " but text, leave out the quotes" if quoted else f" but a float, write {int(number)}" if whole else ""
        raise ValueError(f"{name}={value!r} is not a whole number{hint}: {meaning}")
    number = operator.index(number)
    if number < at_least:
        raise ValueError(f"{name}={number} is below {at_least}: {meaning}")
    return number


def what_is_wrong(value: Any, interval: str) -> str:
    """What is wrong with a setting that should be a number in an interval, for a message: its quotes, for one."""
    if isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return f"is text, not a number in {interval}"
        return f"is text: leave out the quotes, it must be a number in {interval}"
    return f"is outside {interval}"


def checked_length(num_epochs: Any, max_train_steps: Any) -> tuple[int | None, int | None]:
    """The length of a training: its epochs, or its steps, which take their place.

    Raises:
        ValueError: If both are missing, or the one that counts is no whole number, at least 1.
    """
    if max_train_steps is not None:
        return None, whole_number("max_train_steps", max_train_steps, 1, "the training needs at least one step")
    if num_epochs is None:
        raise ValueError(
            "how long is the training? give num_epochs, its passes over the data, or max_train_steps, the steps of the "
            "unpruned run"
        )
    return whole_number("num_epochs", num_epochs, 1, "the training needs at least one pass over the data"), None


def checked_index(losses: Tensor, index: Any) -> Tensor:
    """Sample indices of some losses, shape ``(B,)``, int64, on their own device.

    Raises:
        ValueError: If there is not one loss for each sample and one index for each loss, or an index is no integer.
    """
    if losses.dim() != 1:
        raise ValueError(
            f"weigh() needs one loss per sample, shape (B,), but got shape {tuple(losses.shape)}: use "
            "reduction='none' and average over all but the first dimension"
        )
    # A list of numbers lies where the data set's own indices do, whatever the default device is.
    index = index if isinstance(index, Tensor) else torch.as_tensor(index, device="cpu")
    if index.shape != losses.shape:
        found = f"{losses.numel()} losses but {index.numel()} sample indices of shape {tuple(index.shape)}"
        if index.dim() == 1 and 0 < len(index) < len(losses) and len(losses) % len(index) == 0:
            raise ValueError(
                f"{found}: for views of each sample repeat the index, weigh(losses, index.repeat"
                f"({len(losses) // len(index)})); of rows that are no samples, as with prior preservation, weigh the "
                f"first part alone, weigh(losses[:{len(index)}], index) + losses[{len(index)}:].mean()"
            )
        raise ValueError(found)
    if index.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise ValueError(f"sample indices must be integers, got {index.dtype}: floats round large indices")
    return index.to(torch.int64)
