"""Schedules that are made for another number of updates than the training makes are said, with both numbers."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("diffusers", reason="diffusers is not installed")

from diffusers.optimization import get_scheduler
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    PolynomialLR,
    SequentialLR,
    StepLR,
)

from infobatch_mm.core import EpochSchedule
from infobatch_mm.core.lengths import length_line, length_of

from .toy import Run, Setup

pytestmark = pytest.mark.usefixtures("no_accelerator_of_another_test")


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


def partial_of(function: Any) -> Any:
    return LambdaLR(optimizer(), functools.partial(function, num_training_steps=70))


def keyword(step: int, *, num_training_steps: int) -> float:
    return 1.0


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial"])
def test_the_length_of_diffusers_schedules_is_found(name: str) -> None:
    assert length_of(get_scheduler(name, optimizer(), num_warmup_steps=3, num_training_steps=70)) == 70


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "cosine_with_min_lr"])
def test_the_length_of_transformers_schedules_is_found(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    more = {"scheduler_specific_kwargs": {"min_lr": 1e-3}} if name == "cosine_with_min_lr" else {}
    schedule = transformers.get_scheduler(name, optimizer(), num_warmup_steps=3, num_training_steps=70, **more)
    assert length_of(schedule) == 70


@pytest.mark.parametrize(
    ("build", "length"),
    [
        (lambda: OneCycleLR(optimizer(), 0.1, total_steps=70), 70),
        (lambda: CosineAnnealingLR(optimizer(), T_max=70), 70),
        (lambda: PolynomialLR(optimizer(), total_iters=70), 70),
        (lambda: partial_of(keyword), 70),
        (lambda: warmed_up(CosineAnnealingLR), 70),
        (lambda: warmed_up(StepLR), None),
        (lambda: StepLR(optimizer(), 70), None),
        (lambda: LinearLR(optimizer(), total_iters=70), None),  # a warm-up, as a rule
        (lambda: LambdaLR(optimizer(), lambda step: 1.0), None),
        (lambda: LambdaLR(optimizer(), abs), None),
        (lambda: partial_of(lambda step, num_training_steps: 1.0), 70),
        (lambda: get_scheduler("constant", optimizer()), None),
        (lambda: get_scheduler("constant_with_warmup", optimizer(), num_warmup_steps=3), None),
        (lambda: get_scheduler("piecewise_constant", optimizer(), step_rules="1:70,0.1"), None),
        (lambda: object(), None),
    ],
    ids=[
        *("OneCycleLR", "CosineAnnealingLR", "PolynomialLR", "partial", "sequential", "sequential, unknown"),
        *("StepLR", "LinearLR", "lambda", "builtin", "partial of lambda", "constant", "warmup", "piecewise", "nothing"),
    ],
)
def test_a_length_is_found_where_it_is_said_and_nothing_is_made_of_others(build: Any, length: int | None) -> None:
    assert length_of(build()) == length


def warmed_up(kind: Any) -> SequentialLR:
    made = optimizer()
    return SequentialLR(made, [LinearLR(made, total_iters=10), kind(made, 60)], milestones=[10])


def schedule(length: int, accumulate: int = 1, steps: int | None = None) -> EpochSchedule:
    return EpochSchedule(100, length, 4, accumulated=accumulate, max_steps=steps)


def line(made_for: int, training: EpochSchedule, per_update: int = 1, accumulate: int = 1) -> str | None:
    made = get_scheduler("cosine", optimizer(), num_warmup_steps=0, num_training_steps=made_for)
    return length_line(made, training, per_update, accumulate)


@pytest.mark.parametrize(
    ("made_for", "training", "more"),
    [
        (2500, schedule(100), {}),
        (200, schedule(100, steps=200), {}),
        (700, schedule(100, accumulate=4), {"accumulate": 4}),
        (2500, schedule(100, accumulate=4), {"accumulate": 4}),  # some scripts count batches
        (600, schedule(100, accumulate=4), {"accumulate": 4}),  # or round down
        (5000, schedule(100), {"per_update": 2}),
        (4900, schedule(100), {"per_update": 2}),  # of 49 batches before they are shared out
    ],
)  # fmt: skip
def test_a_schedule_as_long_as_the_training_is_fine(
    made_for: int, training: EpochSchedule, more: dict[str, int]
) -> None:
    assert line(made_for, training, **more) is None


def test_another_one_is_said_with_both_numbers_and_what_to_do() -> None:
    told = line(200, schedule(100))
    assert told is not None and "LambdaLR is made for 200 updates, this training makes 2500 (100 epochs)" in told
    assert "max_train_steps=200" in told
    told = line(180, schedule(8))
    assert told is not None and "180 updates, this training makes 200 (8 epochs)" in told
    told = line(2500, schedule(100, steps=200))
    assert told is not None and "2500 updates, this training makes 200 (max_train_steps)" in told
    assert "give both the same number" in told
    told = line(2500, schedule(100), per_update=4)
    assert told is not None and "multiply its length by accelerator.num_processes" in told


def test_it_is_said_when_the_schedule_is_prepared() -> None:
    with pytest.warns(UserWarning, match=r"made for 91 updates, this training makes 96 \(8 epochs\).*_steps=91"):
        Run(Setup(too_short=5))
    with pytest.warns(UserWarning, match=r"made for 85 updates, this training makes 90 \(max_train_steps\)"):
        Run(Setup(steps=90, too_short=5))


@pytest.mark.parametrize("kind", ["linear", "OneCycleLR", "CosineAnnealingLR", "constant", "piecewise_constant"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_nothing_is_said_of_schedules_that_fit(kind: str, accumulate: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Run(Setup(scheduler=kind, accumulate=accumulate))
        Run(Setup(scheduler=kind, accumulate=accumulate, policy="none", too_short=5))  # the script as it was
