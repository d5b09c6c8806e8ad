"""``keep="steps"`` in loops: as many steps as without pruning, on smaller batches, at learning rates to match."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import meeting, on_ranks
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, OneCycleLR
from torch.utils.data import DataLoader

from infobatch_mm import InfoBatch

N, B, EPOCHS = 61, 6, 6
KEEP = dict(type="infobatch", prune_ratio=0.6, delta=0.8, keep="steps")

Step = tuple[list[int], list[float], float]


class Data(torch.utils.data.Dataset):
    """Points, and what they are to be mapped to: some of them far off."""

    def __init__(self, num_samples: int = N) -> None:
        drawn = torch.Generator().manual_seed(0)
        self.x = torch.randn(num_samples, 3, generator=drawn)
        self.y = self.x.sum(1) + 3 * torch.rand(num_samples, generator=drawn) ** 3

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[index], self.y[index]

    def __len__(self) -> int:
        return len(self.x)


class Run:
    """A training that writes down what each of its steps is made of.

    Attributes:
        steps (list): Samples of each batch, their weights, and the learning rate within the step that was made with it
            (NaN where gradients are accumulated).
        passes (list[int]): Batches of each pass.
        updates (list[int]): Optimiser steps of each pass.
        rates (list[float]): Learning rate of the host after each of them.
    """

    def __init__(
        self,
        make: Callable[..., Optimizer] = SGD,
        schedule: Callable[[Optimizer, int], Any] = CosineAnnealingLR,
        policy: Any = KEEP,
        every: int = 1,
        batch: int = B,
        whole: int | None = None,
        epochs: int = EPOCHS,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Linear(3, 1)
        self.optimizer = make(self.model.parameters(), lr=0.05)
        self.infobatch = InfoBatch(N, epochs, policy=policy, batch_size=whole)
        self.loader = self.infobatch.loader(Data(), batch, **options)
        self.every, self.epochs = every, epochs
        scheduler = schedule(self.optimizer, epochs * -(-len(self.loader) // every))
        self.scheduler = self.infobatch.schedule(scheduler, every=every)
        self.inside = float("nan")
        self.optimizer.register_step_pre_hook(self._look)
        self.steps: list[Step] = []
        self.passes: list[int] = []
        self.updates: list[int] = []
        self.rates: list[float] = []

    def _look(self, optimizer: Optimizer, *_: Any) -> None:
        self.inside = float(optimizer.param_groups[0]["lr"])

    @property
    def rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def train(self, stop: int = -1) -> Run:
        for _ in range(self.infobatch.passes_done, self.epochs):
            batches = len(self.loader)
            count = updates = 0
            for count, (index, (x, y)) in enumerate(self.loader, 1):
                self.inside = float("nan")
                weights = self.infobatch._passes.walk.weights(index)
                loss = self.infobatch.weigh((self.model(x).squeeze(1) - y) ** 2, index)
                loss.backward()
                if count % self.every == 0 or count == batches:
                    before = self.rate
                    self.optimizer.step()
                    assert self.rate == before
                    self.optimizer.zero_grad()
                    self.scheduler.step()
                    updates += 1
                    self.rates.append(self.rate)
                self.steps.append((index.tolist(), weights.tolist(), self.inside))
                if len(self.steps) == stop:
                    return self
            assert count == batches
            self.passes.append(count)
            self.updates.append(updates)
        return self

    def by_pass(self) -> Iterator[list[Step]]:
        rest = list(self.steps)
        for count in self.passes:
            yield rest[:count]
            rest = rest[count:]

    def parameters(self) -> list[float]:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()]).tolist()


# ---- counts ---------------------------------------------------------------------------------------------

LOADERS: dict[str, dict[str, Any]] = {
    "main": {},
    "drop_last": {"drop_last": True},
    "workers": {"num_workers": 2, "persistent_workers": True},
    "any order": {"num_workers": 2, "in_order": False},
}


@pytest.mark.parametrize("options", LOADERS.values(), ids=LOADERS)
def test_a_pruned_pass_makes_the_steps_of_a_full_one_in_batches_of_one_size(options: dict[str, Any]):
    run = Run(**options).train()
    whole = N // B if options.get("drop_last") else math.ceil(N / B)
    assert run.passes == run.updates == [whole] * EPOCHS
    sizes = [[len(index) for index, _, _ in steps] for steps in run.by_pass()]
    assert sum(sizes[0]) == sum(sizes[-1]) == (whole * B if options.get("drop_last") else N)
    for pruned in sizes[1:-1]:
        assert len(set(pruned)) == 1 and pruned[0] < B
    for steps in run.by_pass():
        visited = [i for index, _, _ in steps for i in index]
        assert len(set(visited)) == len(visited)
        weights = [weight for _, each, _ in steps for weight in each]
        assert sum(weights) == pytest.approx(len(weights))  # their mean is 1
    books = run.infobatch.summary()["per_pass"]
    assert [entry["kept"] for entry in books] == [sum(each) for each in sizes]


@pytest.mark.parametrize(("batch", "whole"), [(B, None), (B, 3 * B)])
def test_accumulated_gradients_make_as_many_updates(batch: int, whole: int | None):
    """Batches of which three make an update, whether the global batch is said to be one of them or all three."""
    run = Run(every=3, batch=batch, whole=whole).train()
    full = math.ceil(math.ceil(N / B) / 3)
    assert run.updates == [full] * EPOCHS
    pruned = [{len(index) for index, _, _ in steps} for steps in list(run.by_pass())[1:-1]]
    assert all(len(sizes) == 1 and max(sizes) < B for sizes in pruned)


# ---- learning rates -------------------------------------------------------------------------------------

SCHEDULES: dict[str, Callable[[Optimizer, int], Any]] = {
    "CosineAnnealingLR": CosineAnnealingLR,
    "OneCycleLR": lambda optimizer, total: OneCycleLR(optimizer, 0.1, total_steps=total),
}


@pytest.mark.parametrize("make", [SGD, AdamW])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("rule", ["none", "sqrt", "linear"])
def test_the_hosts_rates_are_its_own_and_the_steps_of_smaller_batches_have_their_share(
    rule: str, schedule: Callable[[Optimizer, int], Any], make: Callable[..., Optimizer]
):
    """After each step the host's rate is torch's own after as many steps of the unpruned training, to the bit."""
    alone = make([torch.nn.Parameter(torch.zeros(1))], lr=0.05)
    scheduler = schedule(alone, EPOCHS * math.ceil(N / B))
    run = Run(make, schedule, {**KEEP, "lr_rule": rule}).train()
    power = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[rule]
    rates = []
    for number, steps in enumerate(run.by_pass()):
        for index, _, inside in steps:
            share = len(index) / B if 0 < number < EPOCHS - 1 else 1.0
            before = alone.param_groups[0]["lr"]
            assert inside == (before * share**power if share**power != 1 else before)
            alone.step()
            scheduler.step()
            rates.append(alone.param_groups[0]["lr"])
    assert run.rates == rates


def test_a_schedule_by_epochs_names_the_optimizer_as_well():
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    infobatch = InfoBatch(N, EPOCHS, policy=KEEP)
    loader = infobatch.loader(Data(), B)
    scheduler = infobatch.schedule(MultiStepLR(optimizer, [3], 0.5), interval="epoch")
    inside: list[tuple[int, float, float]] = []
    rates: list[float] = []
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    for epoch in range(EPOCHS):
        for index, _ in loader:
            infobatch.weigh(index.float(), index)
            optimizer.step()
            inside.append((epoch, len(index) / B, rates[-1]))
        scheduler.step()
    for epoch, share, rate in inside:
        assert rate == (0.5 if epoch >= 3 else 1.0) * (math.sqrt(share) if 0 < epoch < EPOCHS - 1 else 1.0)


def test_a_batch_that_was_fetched_ahead_is_stepped_at_the_rate_of_its_own_pass():
    """The last batch of a full pass is weighed when the walk of the next one has begun, which is a pruned one."""
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    infobatch = InfoBatch(60, EPOCHS, policy={**KEEP, "delta": 1.0})
    infobatch.follow(optimizer)
    loader = infobatch.loader(Data(60), B)
    inside: list[float] = []
    optimizer.register_step_pre_hook(lambda *_: inside.append(optimizer.param_groups[0]["lr"]))

    def batches() -> Iterator[torch.Tensor]:
        for _ in range(EPOCHS):
            yield from (index for index, _ in loader)

    ahead = batches()
    current = next(ahead, None)
    sizes = []
    while current is not None:
        following = next(ahead, None)
        infobatch.weigh(current.float(), current)
        optimizer.step()
        sizes.append(len(current))
        current = following
    assert inside == pytest.approx([math.sqrt(size / B) for size in sizes])
    assert set(sizes[:10]) == {B} and max(sizes[10:]) < B


def test_after_the_training_an_optimizers_steps_are_its_own():
    run = Run(policy={**KEEP, "delta": 1.0}).train()  # its last pass is one of smaller batches
    assert len(run.steps[-1][0]) < B and run.steps[-1][2] < run.rates[-2]
    run.optimizer.param_groups[0]["lr"] = 0.125
    run.optimizer.step()
    assert run.inside == 0.125


def test_with_full_passes_alone_nothing_is_touched_to_the_bit():
    ours, theirs = (
        Run(AdamW, policy={**KEEP, "prune_ratio": 0.0}),
        Run(AdamW, policy=dict(type="infobatch", prune_ratio=0.0)),
    )
    assert ours.train().steps == theirs.train().steps
    assert ours.parameters() == theirs.parameters()


# ---- resume ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2])
def test_a_run_killed_at_any_step_goes_on_with_the_same_samples_weights_and_rates(every: int):
    straight = Run(AdamW, every=every).train()
    whole = math.ceil(N / B)
    for stop in (3, whole, whole + 4, 2 * whole, 3 * whole + 6, 5 * whole + 2):
        while math.isnan(straight.steps[stop - 1][2]):  # gradients on their way to an update are in no checkpoint
            stop += 1
        killed = Run(AdamW, every=every).train(stop)
        file = io.BytesIO()
        torch.save(
            [each.state_dict() for each in (killed.infobatch, killed.model, killed.optimizer, killed.scheduler)], file
        )
        file.seek(0)
        states = torch.load(file, weights_only=True)
        resumed = Run(AdamW, every=every)
        for each, state in zip(
            (resumed.infobatch, resumed.model, resumed.optimizer, resumed.scheduler), states, strict=True
        ):
            each.load_state_dict(state)
        resumed.train()
        assert repr(resumed.steps) == repr(straight.steps[stop:])  # NaN is NaN
        assert resumed.parameters() == straight.parameters()


def test_a_state_that_is_loaded_before_the_loader_is_made_goes_on_as_well():
    straight, killed = Run().train(), Run().train(17)
    infobatch = InfoBatch(N, EPOCHS, policy=KEEP)
    infobatch.load_state_dict(killed.infobatch.state_dict())
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    infobatch.follow(optimizer)
    loader = infobatch.loader(Data(), B)
    rest = math.ceil(N / B) * 2 - 17
    assert len(loader) == rest
    for index, _ in loader:
        infobatch.weigh(index.float(), index)
        assert index.tolist() == straight.steps[17][0]
        break


# ---- what is refused ------------------------------------------------------------------------------------


def test_a_dataloader_of_the_users_is_refused():
    infobatch = InfoBatch(N, EPOCHS, policy=KEEP, batch_size=B)
    loader = DataLoader(infobatch.attach(Data()), B, sampler=infobatch.sampler)
    with pytest.raises(ValueError, match=r"a DataLoader of your own keeps its batch_size: walk infobatch.loader"):
        next(iter(loader))


def test_a_loop_whose_optimizer_is_not_known_is_refused_in_its_first_step():
    infobatch = InfoBatch(N, EPOCHS, policy=KEEP)
    index, _ = next(iter(infobatch.loader(Data(), B)))
    with pytest.raises(ValueError, match=r"lr_rule='sqrt' multiplies .* infobatch.follow\(optimizer\)"):
        infobatch.weigh(index.float(), index)
    alone = InfoBatch(N, EPOCHS, policy={**KEEP, "lr_rule": "none"})
    index, _ = next(iter(alone.loader(Data(), B)))
    alone.weigh(index.float(), index)


def test_batches_of_one_sample_are_refused_before_training():
    with pytest.raises(ValueError, match=r"the global batch_size=1 is the smallest: give each process 2 samples"):
        InfoBatch(N, EPOCHS, policy=KEEP).loader(Data(), 1)
    # Parts of a global batch of three are samples, of which there is no smaller one.
    with pytest.raises(ValueError, match=r"the global batch_size=3 is the smallest"):
        InfoBatch(N, EPOCHS, policy=KEEP, batch_size=3).loader(Data(), 1)


def test_loaders_of_different_batches_are_refused():
    infobatch = InfoBatch(N, EPOCHS, policy=KEEP, batch_size=12)
    infobatch.loader(Data(), 6)
    with pytest.raises(ValueError, match=r"batch_size=4 of another loader, the first one has 6"):
        infobatch.loader(Data(), 4)


# ---- two ranks ------------------------------------------------------------------------------------------


def one_rank(rank: int, folder: str) -> None:
    with meeting(folder, rank, 2):
        run = Run(batch=B // 2).train()
        killed = Run(batch=B // 2).train(17)
        killed.infobatch.merge()
        resumed = Run(batch=B // 2)
        for name in ("infobatch", "model", "optimizer", "scheduler"):
            getattr(resumed, name).load_state_dict(getattr(killed, name).state_dict())
        resumed.train()
        books = run.infobatch.summary()
        torch.save([run.steps, run.passes, run.rates, resumed.steps, books], Path(folder, f"{rank}.pt"))


@pytest.mark.dist
@pytest.mark.timeout(200)
def test_ranks_make_as_many_steps_on_equal_shares_of_smaller_batches(tmp_path: Path):
    on_ranks(2, one_rank, str(tmp_path))
    (first, passes, rates, resumed, books), (other, *theirs) = (
        torch.load(tmp_path / f"{rank}.pt") for rank in range(2)
    )
    whole = math.ceil(math.ceil(N / 2) / (B // 2))
    assert passes == theirs[0] == [whole] * EPOCHS and rates == theirs[1] and books == theirs[3]
    for number in range(1, EPOCHS - 1):
        mine, its = (steps[number * whole : (number + 1) * whole] for steps in (first, other))
        sizes = {len(index) for index, _, _ in [*mine, *its]}
        assert len(sizes) == 1 and max(sizes) < B // 2
        assert [inside for _, _, inside in mine] == [inside for _, _, inside in its]
        visited = [i for index, _, _ in [*mine, *its] for i in index]
        assert len(set(visited)) == len(visited) == books["per_pass"][number]["kept"]
    assert resumed == first[17:] and theirs[2] == other[17:]
