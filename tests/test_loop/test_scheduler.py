"""Schedules of torch stepped by progress: where the unpruned training is after as many passes, to the bit."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from infobatch_mm import InfoBatch

N, B, EPOCHS = 61, 4, 8

BY_STEP: dict[str, Callable[[Optimizer, int], LRScheduler]] = {
    "OneCycleLR": lambda optimizer, total: OneCycleLR(optimizer, 0.1, total_steps=total),
    "CosineAnnealingLR": CosineAnnealingLR,
    "PolynomialLR": lambda optimizer, total: PolynomialLR(optimizer, total, 0.9),
    "LambdaLR": lambda optimizer, total: LambdaLR(optimizer, lambda step: 1 - step / (2 * total)),
    "SequentialLR": lambda optimizer, total: SequentialLR(
        optimizer, [LinearLR(optimizer, 0.1, total_iters=9), CosineAnnealingLR(optimizer, total - 9)], [9]
    ),
}
BY_EPOCH: dict[str, Callable[[Optimizer, int], LRScheduler]] = {
    "MultiStepLR": lambda optimizer, total: MultiStepLR(optimizer, [2, 5]),
    "StepLR": lambda optimizer, total: StepLR(optimizer, 3),
    "ExponentialLR": lambda optimizer, total: ExponentialLR(optimizer, 0.7),
    "CosineAnnealingLR": CosineAnnealingLR,
}


class Run:
    """A training whose learning rates are looked at; ``policy=None`` is torch alone."""

    def __init__(
        self,
        build: Callable[[Optimizer, int], LRScheduler],
        interval: str,
        policy: str | None = "infobatch",
        every: int = 1,
        ours: bool = True,
        drop_last: bool = False,
        batch: int = B,
    ) -> None:
        self.optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        self.interval, self.every, self.policy = interval, every, policy
        self.infobatch = InfoBatch(
            N, EPOCHS, 0.5, 0.7, policy=policy or "none", batch_size=None if ours else batch * every
        )
        data: Any = list(range(N))
        if ours:
            self.loader: Any = self.infobatch.loader(data, batch, drop_last=drop_last)
        else:
            self.loader = torch.utils.data.DataLoader(
                self.infobatch.attach(data), batch, sampler=self.infobatch.sampler, drop_last=drop_last
            )
        updates = -(-len(self.loader) // every)
        scheduler = build(self.optimizer, EPOCHS * (updates if interval == "step" else 1))
        self.scheduler: Any = scheduler
        if policy is not None:
            self.scheduler = self.infobatch.schedule(scheduler, interval, every)
        self.at_pass_end: list[float] = []
        self.rates: list[float] = []

    @property
    def rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def train(self, stop: int = -1) -> Run:
        for epoch in range(self.infobatch.passes_done, EPOCHS):
            for i, (index, _) in enumerate(self.loader, 1):
                self.infobatch.weigh(((index * 7919 + epoch * 104729) % 1009).float(), index)
                if i % self.every == 0 or i == len(self.loader):
                    self.optimizer.step()
                    if self.interval == "step":
                        self.scheduler.step()
                    self.rates.append(self.rate)
                    if len(self.rates) == stop:
                        return self
            if self.interval == "epoch":
                self.scheduler.step()
            self.at_pass_end.append(self.rate)
        return self

    def state(self) -> dict[str, Any]:
        buffer = io.BytesIO()
        parts = {"infobatch": self.infobatch, "scheduler": self.scheduler, "optimizer": self.optimizer}
        torch.save({name: part.state_dict() for name, part in parts.items()}, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=True)

    def load(self, state: dict[str, Any], scheduler_first: bool) -> Run:
        self.optimizer.load_state_dict(state["optimizer"])
        for name in ("scheduler", "infobatch") if scheduler_first else ("infobatch", "scheduler"):
            getattr(self, name).load_state_dict(state[name])
        return self


CASES = [*((build, "step") for build in BY_STEP.values()), *((build, "epoch") for build in BY_EPOCH.values())]
ALL = pytest.mark.parametrize(("build", "interval"), CASES, ids=[*BY_STEP, *(f"{name} by epoch" for name in BY_EPOCH)])


@ALL
@pytest.mark.parametrize(
    ("every", "drop_last", "ours"), [(1, False, True), (3, False, True), (1, True, True), (1, False, False)]
)
def test_a_pruned_run_is_at_every_pass_boundary_where_the_unpruned_one_is(
    build: Any, interval: str, every: int, drop_last: bool, ours: bool
):
    alone = Run(build, interval, None, every, drop_last=drop_last).train()
    pruned = Run(build, interval, every=every, drop_last=drop_last, ours=ours).train()
    assert len(pruned.rates) < len(alone.rates)
    assert pruned.at_pass_end == alone.at_pass_end
    assert len(set(alone.at_pass_end)) > 1
    assert pruned.scheduler.last_epoch == alone.scheduler.last_epoch
    if interval == "step":  # evenly on the way: none of its rates is one that the unpruned run does not have
        assert set(pruned.rates) <= {*alone.rates, 0.1}


@ALL
@pytest.mark.parametrize("stop", [3, 16, 20, 29])
@pytest.mark.parametrize("scheduler_first", [False, True])
def test_a_resumed_run_goes_on_with_the_same_rates(build: Any, interval: str, stop: int, scheduler_first: bool):
    straight = Run(build, interval).train()
    killed = Run(build, interval).train(stop)
    state = killed.state()
    resumed = Run(build, interval).load(state, scheduler_first).train()
    assert killed.rates + resumed.rates == straight.rates
    assert straight.at_pass_end[-len(resumed.at_pass_end) :] == resumed.at_pass_end


def test_with_policy_none_each_call_is_one_step():
    for interval, build in (("step", BY_STEP["OneCycleLR"]), ("epoch", BY_EPOCH["MultiStepLR"])):
        assert Run(build, interval, "none").train().rates == Run(build, interval, None).train().rates


def test_the_state_is_the_schedulers_own():
    run = Run(BY_STEP["CosineAnnealingLR"], "step").train(10)
    assert run.scheduler.state_dict() == run.scheduler.scheduler.state_dict()
    assert run.scheduler.get_last_lr() == run.scheduler.scheduler.get_last_lr()


def test_skipped_batches_and_broken_walks_are_made_up_for_with_the_next_pass():
    alone = Run(BY_STEP["CosineAnnealingLR"], "step", None).train()
    run = Run(BY_STEP["CosineAnnealingLR"], "step")
    for epoch in range(EPOCHS):
        first = None
        for i, (index, _) in enumerate(run.loader):
            if i == 1:
                continue
            run.infobatch.weigh(1.0 + index.float(), index)
            run.optimizer.step()
            run.scheduler.step()
            first = run.scheduler.last_epoch if first is None else first
            if epoch % 3 == 2 and i == 5:
                break
        assert first > epoch * 16
    assert run.scheduler.last_epoch <= alone.scheduler.last_epoch


def test_epochs_beyond_the_last_step_no_further():
    run = Run(BY_STEP["OneCycleLR"], "step").train()
    end = run.scheduler.last_epoch
    for index, _ in run.loader:
        run.infobatch.weigh(index.float(), index)
        run.scheduler.step()  # OneCycleLR raises beyond its end
    assert run.scheduler.last_epoch == end


@pytest.mark.parametrize("name", ["CosineAnnealingLR", "LambdaLR"])
def test_resumed_with_another_batch_size_it_ends_at_its_end(name: str):
    state = Run(BY_STEP[name], "step").train(20).state()
    for batch in (2, 8):
        resumed = Run(BY_STEP[name], "step", batch=batch).load(state, True).train()
        end = Run(BY_STEP[name], "step", None, batch=B if name == "CosineAnnealingLR" else batch).train()
        assert resumed.scheduler.last_epoch == end.scheduler.last_epoch
        assert resumed.rate == pytest.approx(end.rate, abs=1e-9)


def test_what_cannot_follow_the_progress_is_refused():
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    infobatch = InfoBatch(10, 2)
    with pytest.raises(ValueError, match=r"make infobatch.loader\(\) first"):
        infobatch.schedule(StepLR(optimizer, 1))
    infobatch.loader(list(range(10)), 2)
    with pytest.raises(ValueError, match="interval='batch' is neither 'step' nor 'epoch'"):
        infobatch.schedule(StepLR(optimizer, 1), "batch")
    with pytest.raises(ValueError, match="ReduceLROnPlateau goes by validations"):
        infobatch.schedule(ReduceLROnPlateau(optimizer))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a ChainedScheduler does not say how many steps it has taken"):
        infobatch.schedule(ChainedScheduler([StepLR(optimizer, 1)]))
    with pytest.raises(ValueError, match="every=0 is below 1"):
        infobatch.schedule(StepLR(optimizer, 1), every=0)


def test_a_schedule_that_is_stepped_in_another_rhythm_is_refused_in_the_second_pass():
    run = Run(BY_EPOCH["MultiStepLR"], "step")
    with pytest.raises(ValueError, match=r"called 1 times in pass 1, in which 15 batches .* interval='epoch'"):
        for _ in range(EPOCHS):
            for index, _ in run.loader:
                run.infobatch.weigh(index.float(), index)
            run.scheduler.step()
    run = Run(BY_STEP["CosineAnnealingLR"], "step")
    with pytest.raises(ValueError, match=r"called 8 times in pass 1, in which 15 batches .* every=N"):
        for _ in range(EPOCHS):
            for i, (index, _) in enumerate(run.loader, 1):
                run.infobatch.weigh(index.float(), index)
                if i % 2 == 0 or i == len(run.loader):
                    run.scheduler.step()
    run = Run(BY_EPOCH["MultiStepLR"], "epoch")
    with pytest.raises(ValueError, match="called 16 times in pass 1: a schedule with interval='epoch'"):
        for _ in range(EPOCHS):
            for index, _ in run.loader:
                run.infobatch.weigh(index.float(), index)
                run.scheduler.step()


def test_a_few_batches_may_be_skipped_with_their_steps():
    run = Run(BY_STEP["CosineAnnealingLR"], "step")
    for _ in range(3):
        for i, (index, _) in enumerate(run.loader):
            run.infobatch.weigh(index.float(), index)
            if i % 4:  # as where gradients overflowed
                run.scheduler.step()
    assert run.scheduler.last_epoch > 2 * 16


def test_accumulation_may_leave_the_rest_of_a_pass_out():
    for partial in (False, True):
        optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        infobatch = InfoBatch(20, 5, policy="none")
        loader = infobatch.loader(list(range(20)), 4)
        raw = OneCycleLR(optimizer, 0.1, total_steps=5 * (len(loader) // 2))
        scheduler = infobatch.schedule(raw, every=2, partial=partial)

        def train(infobatch: Any = infobatch, loader: Any = loader, optimizer: Any = optimizer, step: Any = scheduler):
            for _ in range(5):
                for i, (index, _) in enumerate(loader, 1):
                    infobatch.weigh(index.float(), index)
                    if i % 2 == 0:
                        optimizer.step()
                        step.step()

        if partial:
            with pytest.raises(ValueError, match=r"called 2 times in pass 1, in which 5 batches .*partial=False"):
                train()
        else:
            train()
            assert raw.last_epoch == 10


def test_a_schedule_that_was_replaced_steps_no_more():
    run = Run(BY_EPOCH["ExponentialLR"], "epoch")
    run.scheduler = run.infobatch.schedule(ExponentialLR(run.optimizer, 0.9), "epoch")
    assert run.train().at_pass_end == pytest.approx([0.1 * 0.9 ** (epoch + 1) for epoch in range(EPOCHS)])


def test_a_schedule_in_its_midst_is_refused():
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    raw = CosineAnnealingLR(optimizer, 40)
    optimizer.step()
    raw.step()
    infobatch = InfoBatch(8, 10)
    infobatch.loader(list(range(8)), 4)
    with pytest.raises(ValueError, match="the CosineAnnealingLR has taken 1 steps already, the training none"):
        infobatch.schedule(raw)
