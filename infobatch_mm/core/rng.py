"""The process's global random generators: their state as plain tensors and numbers, and seeds of single items."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def generator(*key: int) -> torch.Generator:
    """A generator of its own, seeded by ``key``.

    Args:
        key (int): Non-negative numbers. They are hashed, which keeps (seed 0, pass 1) apart from (seed 1, pass 0).
    """
    mixed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    return torch.Generator("cpu").manual_seed(mixed & (2**63 - 1))


def capture() -> dict[str, Any]:
    """State of Python's, numpy's and torch's global generators."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    assert isinstance(keys, np.ndarray)
    return {
        "python": [version, torch.tensor(internal, dtype=torch.int64, device="cpu"), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "other": {kind: module.get_rng_state().cpu() for kind, module in _other_devices().items()},
    }


def restore(state: Mapping[str, Any]) -> None:
    """Put the generators back to where :func:`capture` found them."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    modules = _other_devices()
    for kind, found in state.get("other", {}).items():
        if kind in modules:
            modules[kind].set_rng_state(found.cpu())


def _other_devices() -> dict[str, Any]:
    """Modules of the devices here that are not CUDA's, such as ``torch.xpu``, ``torch.npu`` or ``torch.mps``."""
    names = [name for name in ("xpu", "npu", "mps", "mlu", "hpu") if hasattr(torch, name)]
    modules = {name: getattr(torch, name) for name in names}
    return {name: module for name, module in modules.items() if getattr(module, "is_available", lambda: False)()}


@contextmanager
def seeded(key: tuple[int, ...]) -> Iterator[None]:
    """Draw from Python's, numpy's and torch's CPU generator under a seed made of ``key``, then put them back.

    Args:
        key (tuple[int, ...]): Non-negative numbers; equal keys give equal draws, in any process.
    """
    python, legacy, default = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seeds = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(seeds[0]))
    np.random.seed(int(seeds[1]))
    # torch.manual_seed would seed the devices too, which are not put back.
    torch.default_generator.manual_seed(int(seeds[2]))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
        torch.set_rng_state(default)
