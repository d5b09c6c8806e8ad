"""Shared by all tests."""

from __future__ import annotations

import contextlib
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


@pytest.fixture(autouse=True)
def no_scope_left_behind() -> Iterator[None]:
    """A run's default scope decides where the next test's models are looked up: a runner leaves its own behind."""
    yield
    if "mmengine" in sys.modules:
        from mmengine.registry import DefaultScope

        DefaultScope._instance_dict.clear()


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 training and 4 validation scenes of 32 x 32, drawn once."""
    pytest.importorskip("PIL")
    from infobatch_mm.demo.street import draw_dataset

    return draw_dataset(tmp_path_factory.mktemp("scenes"), num_train=22, num_val=4, size=32)
