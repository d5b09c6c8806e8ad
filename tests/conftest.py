"""Shared by all tests."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
# Upstream mmengine 0.10.7 reads its own checkpoints with torch.load's old default; the fork copes by itself.
with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    importlib.metadata.version("mmengine")
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"


@pytest.fixture(autouse=True, scope="module")
def imports_are_no_garbage() -> None:
    """MMEngine collects garbage for each data set that it builds: with all hosts imported that is half of a small run's
    time. What lives before a module's tests is left out of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_of_a_run_left_behind() -> Iterator[None]:
    """MMEngine keeps what a runner named for the life of the process: the scope in which the next test's models are
    looked up, and the visualizer (a second one of that name is the first, and writes into the first's directory)."""
    yield
    if "mmengine" in sys.modules:
        from mmengine.registry import DefaultScope
        from mmengine.visualization import Visualizer

        for manager in (DefaultScope, *_family(Visualizer)):
            manager._instance_dict.clear()


def _family(cls: type) -> Iterator[type]:
    yield cls
    for subclass in cls.__subclasses__():
        yield from _family(subclass)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 training and 4 validation scenes of 32 x 32, drawn once."""
    pytest.importorskip("PIL")
    from infobatch_mm.demo.street import draw_dataset

    return draw_dataset(tmp_path_factory.mktemp("scenes"), num_train=22, num_val=4, size=32)
