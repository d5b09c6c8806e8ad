"""Numbers as users give them: Python's, numpy's and 0-d tensors."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from torch import Tensor


def plain(value: Any) -> Any:
    """The Python number in a 0-d tensor or array or a numpy scalar; anything else as it is."""
    if isinstance(value, np.generic) or (isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0):
        return value.item()
    return value


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
        raise ValueError(f"{name}={value!r} is not a whole number: {meaning}")
    number = operator.index(number)
    if number < at_least:
        raise ValueError(f"{name}={number} is below {at_least}: {meaning}")
    return number
