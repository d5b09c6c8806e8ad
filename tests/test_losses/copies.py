"""The ways in which hosts and users copy a model."""

import copy
import io
import pickle

import pytest
import torch
from mmengine.model import ExponentialMovingAverage


def _saved_and_loaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


_COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch_save": _saved_and_loaded,
}
_AND_AVERAGE = {**_COPIES, "moving_average": lambda model: ExponentialMovingAverage(model).module}

every_copy = pytest.mark.parametrize("duplicate", _COPIES.values(), ids=_COPIES.keys())
every_copy_and_average = pytest.mark.parametrize("duplicate", _AND_AVERAGE.values(), ids=_AND_AVERAGE.keys())
