"""Shared by the tests of scripts on accelerate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture
def no_accelerator_of_another_test() -> Iterator[None]:
    """Have the next test's ``Accelerator`` be as the first."""
    from launching import forget_accelerators

    yield
    forget_accelerators()


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, float]]]:
    """What a script logs, step by step."""
    from accelerate import Accelerator

    from .example_scripts import forget_all

    logged: list[dict[str, float]] = []
    log = Accelerator.log

    def keep(self: Accelerator, values: dict[str, float], *args: Any, **kwargs: Any) -> None:
        logged.append({name: values[name] for name in ("loss", "lr")})
        log(self, values, *args, **kwargs)

    monkeypatch.setattr(Accelerator, "log", keep)
    yield logged
    forget_all()
