"""The cases of ``test_many_processes`` and the processes that run them.

Cases are drawn from our own generator, so every process draws the same ones. Four processes start once; in groups
of 1 to 4 they run all cases of a world size and write down what they saw. Nothing is judged here.
"""

from __future__ import annotations

import importlib.util
import math
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from launching import WORKER_CONTEXT, meeting, preload_workers
from torch.utils.data import DataLoader, Dataset

from infobatch_mm import InfoBatch
from infobatch_mm.core import EpochSchedule, IterSchedule, Pruner, Schedule, build_policy

PROCESSES = 4
#: World size and first process of each group; process 3 is alone while the others are three.
GROUPS = [(4, 0), (3, 0), (1, 3), (2, 0)]
DRAWN = {1: 40, 2: 100, 3: 60, 4: 60}
KINDS = ["core", "epochs", "iterations"]
LOSSES = ["mixed", "mixed", "skewed", "few low", "negative", "some nan", "never", "equal", "all nan"]
HAVE_ENGINE = importlib.util.find_spec("mmengine") is not None


@dataclass(frozen=True)
class Case:
    """One training.

    ``kind`` is ``InfoBatch`` in a plain loop, or the engine's epoch or iteration loop; ``batch`` is that of each
    process, ``length`` counts epochs or iterations. ``accumulate`` is the global batch of the core kind in batches
    of all processes, 0 where none is given; ``peek`` looks at the loader before each pass; ``ours`` takes
    ``infobatch.loader``.
    """

    number: int
    world: int
    kind: str
    num_samples: int
    batch: int
    length: int
    r: float
    delta: float
    losses: str
    drop_last: bool = False
    round_up: bool = True
    shuffle: bool = True
    workers: int = 0
    persistent: bool = False
    accumulate: int = 1
    peek: bool = False
    ours: bool = False

    @property
    def global_batch(self) -> int:
        """The batch that pruned passes divide by, as far as the package knows it."""
        return self.world * self.batch * self.accumulate or self.world

    def in_one_process(self) -> Case:
        """The same training with the same global batch in a single process."""
        batch = self.batch * self.world
        return replace(self, world=1, batch=batch, workers=0, persistent=False, peek=False)


def loss_of(case: Case, index: int, pass_index: int, rank: int) -> float:
    """Loss of a visit, a float32; NaN and infinite ones included."""
    mixed = (index * 7919 + pass_index * 104729 + case.number * 31 + 13) % 1009
    loss = mixed / 1009 + 0.01
    if case.losses == "skewed":
        loss += 1000 * (mixed % 10 == 0)
    elif case.losses == "few low":
        loss -= 1000 * (mixed % 10 == 0)
    elif case.losses == "negative":
        loss -= 2
    elif case.losses == "equal":
        loss = 0.3
    elif case.losses == "by rank":
        loss += rank / 2
    elif case.losses == "some nan":
        loss = {0: math.nan, 1: math.inf}.get(mixed % 7, loss)
    elif case.losses == "all nan" or (case.losses == "never" and index % 3 == 0):
        loss = math.nan
    return struct.unpack("f", struct.pack("f", loss))[0]


# ---- drawing ------------------------------------------------------------------------------------------


def corners(world: int) -> Iterator[dict[str, Any]]:
    """Hard cases on purpose."""
    core, epochs, iterations = (dict(kind=kind) for kind in KINDS)
    yield core | dict(num_samples=1, batch=1, accumulate=0)
    yield core | dict(num_samples=1, batch=3, accumulate=0)
    yield core | dict(num_samples=max(1, world - 1), batch=2, accumulate=0)
    yield core | dict(num_samples=world * 5 - 1, batch=5, accumulate=0, drop_last=True)
    yield core | dict(num_samples=world * 9 - 1, batch=4, drop_last=True, ours=True)
    yield core | dict(num_samples=61, batch=1, r=0.99, delta=1.0)
    yield core | dict(num_samples=world * 4, batch=4, delta=1.0)
    yield core | dict(num_samples=59, batch=4, delta=1.0, drop_last=True, losses="skewed")
    yield core | dict(num_samples=31, batch=2, delta=1.0, losses="equal")
    yield core | dict(num_samples=31, batch=2, delta=1.0, losses="all nan")
    yield core | dict(num_samples=37, batch=2, r=0.0)
    yield core | dict(num_samples=37, batch=2, accumulate=2, delta=1.0, losses="some nan")
    yield epochs | dict(num_samples=1, batch=1)
    yield epochs | dict(num_samples=1, batch=4)
    yield epochs | dict(num_samples=world * 5 - 1, batch=5)
    yield epochs | dict(num_samples=53, batch=1, r=0.99, delta=1.0, losses="skewed")
    yield epochs | dict(num_samples=41, batch=4, delta=1.0, losses="by rank")
    yield epochs | dict(num_samples=43, batch=3, delta=1.0, drop_last=True)
    yield epochs | dict(num_samples=48, batch=2, delta=1.0, round_up=False)
    yield epochs | dict(num_samples=23, batch=2, r=0.0)
    yield iterations | dict(num_samples=world, batch=1, length=9)
    yield iterations | dict(num_samples=world * 3, batch=3, length=1)
    yield iterations | dict(num_samples=world * 6 - 1, batch=3, length=9, delta=1.0)
    yield iterations | dict(num_samples=53, batch=1, length=150, r=0.9, delta=1.0, losses="skewed")
    yield iterations | dict(num_samples=60, batch=5, length=17, delta=1.0, losses="equal")
    yield iterations | dict(num_samples=60, batch=5, length=17, r=0.0)
    for kind in (core, epochs, iterations):
        for workers, persistent in ((1, False), (2, True)):
            read_ahead = dict(workers=workers, persistent=persistent, delta=1.0, r=0.5, losses="mixed")
            yield kind | read_ahead | dict(num_samples=29, batch=2, length=43 // world if kind is iterations else 3)
    yield core | dict(num_samples=31, batch=3, length=3, delta=1.0, workers=1, drop_last=True, losses="mixed")


def drawn(generator: random.Random, number: int, world: int, **given: Any) -> Case:
    """A case at random where it is not given, changed as far as its kind requires."""
    choose = generator.choice
    kind = given.get("kind", KINDS[number % 3])
    num_samples = choose([generator.randint(1, 70), generator.randint(20, 90), choose([2, 3, 7, 13, 31, 61, 89])])
    batch = choose([1, 1, 2, 3, 4, 5, 8])
    epochs = choose([1, 2, 4, 5, 6, 7])
    free = dict(
        num_samples=num_samples,
        batch=batch,
        r=choose([0.0, 0.1, 0.25, 0.3, 0.5, 0.5, 0.7, 0.9, 0.99]),
        delta=choose([0.1, 0.3, 0.5, 0.7, 0.875, 0.875, 1.0]),
        losses=choose([*LOSSES, "by rank"] if kind == "epochs" else LOSSES),
        drop_last=choose([False, False, True]),
        shuffle=choose([True, True, False]),
        round_up=choose([True, True, False]) or kind != "epochs",
        accumulate=choose([0, 0, 1, 1, 1, 2]) if kind == "core" else 1,
        peek=choose([False, False, True]) and kind == "core",
        ours=choose([False, True]) and kind == "core",
    )
    # Drawn in any case, so that what is given does not move the draws of the cases behind it.
    iterations = generator.randint(1, max(1, epochs * num_samples // (world * batch)))
    if "workers" in given or "r" in given or "delta" in given or "losses" in given:
        free |= dict(drop_last=False, round_up=True)
        free["accumulate"] = min(free["accumulate"], 1)
    case = Case(
        **dict(number=number, world=world, kind=kind, length=iterations if kind == "iterations" else epochs)
        | free
        | given
    )
    return legal(case)


def legal(case: Case) -> Case:
    """What the package and its host accept."""
    whole = case.world * case.batch
    if case.kind == "iterations":
        num_samples = max(case.num_samples, case.world)
        return replace(case, num_samples=num_samples, batch=min(case.batch, num_samples // case.world))
    if case.kind == "core":
        accumulate = case.accumulate if case.num_samples >= whole * case.accumulate else 0
        ours = case.ours and accumulate > 0
        # A pass of which a DataLoader drops all is never done: pruned ones may be so short, too.
        drop_last = case.drop_last and rows_of_host(case) >= case.batch and accumulate > 0
        # A peek at the only, ragged batch of a pass walks the whole of it.
        return replace(case, accumulate=accumulate, peek=case.peek and accumulate > 0, ours=ours, drop_last=drop_last)
    round_up = case.round_up or case.num_samples % case.world > 0
    return replace(case, round_up=round_up, drop_last=case.drop_last and rows_of_host(case) >= case.batch)


def rows_of_host(case: Case) -> int:
    """Visits of each process in a full epoch, repeated ones included."""
    return math.ceil(case.num_samples / case.world)


def all_cases() -> list[Case]:
    """The same list in every process and run."""
    cases: list[Case] = []
    LONG.clear()
    for world, count in DRAWN.items():
        generator = random.Random(world)
        for given in corners(world):
            cases.append(drawn(generator, len(cases), world, **given))
        for place in range(count):
            cases.append(drawn(generator, len(cases), world))
            if place % 3:
                LONG.add(cases[-1].number)
    # Each process imports MMEngine once more for such workers; the ranks of the engine's own tests have workers too.
    LONG.update(case.number for case in cases if case.workers and case.kind != "core")
    return cases


#: Numbers of the cases that the default suite leaves out: two in three of the drawn ones.
LONG: set[int] = set()
CASES = all_cases()


# ---- running ------------------------------------------------------------------------------------------


class Toy(Dataset):
    """Items that tell their index."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        assert 0 <= index < self.length
        return 3 * index + 1


def run_case(case: Case, rank: int) -> dict[str, Any]:
    """The journal of one process: an entry per pass, and the books at the end."""
    return run_core(case, rank) if case.kind == "core" else run_engine(case, rank)


def losses_of(case: Case, indices: list[int], pass_index: int, rank: int) -> torch.Tensor:
    return torch.tensor([loss_of(case, index, pass_index, rank) for index in indices])


def run_core(case: Case, rank: int) -> dict[str, Any]:
    infobatch = InfoBatch(
        case.num_samples,
        case.length,
        case.r,
        case.delta,
        seed=case.number,
        batch_size=case.global_batch if case.accumulate else None,
        shuffle=case.shuffle,
    )
    options: dict[str, Any] = dict(
        drop_last=case.drop_last,
        num_workers=case.workers,
        persistent_workers=case.persistent,
        multiprocessing_context=WORKER_CONTEXT if case.workers else None,
    )
    dataset = Toy(case.num_samples)
    loader: Any
    if case.ours:
        loader = infobatch.loader(dataset, case.batch, **options)
    else:
        loader = DataLoader(infobatch.attach(dataset), case.batch, sampler=infobatch.sampler, **options)
    entries: list[dict[str, Any]] = []
    after: list[dict[str, Any]] = []

    def look() -> None:
        # Of a loader of the user's, a pass whose tail was dropped ends when the next walk starts.
        state = infobatch.state_dict()
        while len(after) < state["pass_index"]:
            after.append(scores_in(state))

    for epoch in range(case.length):
        if case.peek:
            next(iter(loader), None)
        entry: dict[str, Any] = {"lens": [], "steps": []}
        if infobatch.summary()["passes_done"] == epoch:
            entry["lens"].append(len(loader))
        for index, item in loader:
            if not entry["steps"]:
                look()
                entry["plan"] = infobatch.state_dict()["plan"]
            entry["lens"].append(len(loader))
            real = torch.where(index < 0, -1 - index, index)
            assert torch.equal(item, 3 * real + 1)
            losses = losses_of(case, real.tolist(), epoch, rank).requires_grad_()
            weighted = infobatch.weigh(losses, index)
            weighted.backward()
            assert losses.grad is not None
            entry["steps"].append({"index": index.tolist(), "loss": weighted.item(), "grad": losses.grad.tolist()})
        infobatch.merge()
        entry["plan"] = {key: as_list(value) for key, value in entry["plan"].items()}
        entries.append(entry)
        look()
    iter(infobatch.sampler)
    look()
    stop_workers(loader._loader if case.ours else loader)
    return {"passes": entries, "after": after, "summary": infobatch.summary()}


def run_engine(case: Case, rank: int) -> dict[str, Any]:
    """What the engine's loops and hook do, without a model."""
    from mmengine.dataset import DefaultSampler, InfiniteSampler

    from infobatch_mm.engine.samplers import pass_loader

    dataset: Any = Toy(case.num_samples)
    sampler: Any = InfiniteSampler(dataset, case.shuffle, seed=0)
    if case.kind == "epochs":
        sampler = DefaultSampler(dataset, case.shuffle, seed=0, round_up=case.round_up)
    host = DataLoader(
        dataset,
        case.batch,
        sampler=sampler,
        drop_last=case.drop_last,
        num_workers=case.workers,
        persistent_workers=case.persistent,
        multiprocessing_context=WORKER_CONTEXT if case.workers else None,
    )
    loader = pass_loader(host, seed=case.number)
    schedule: Schedule
    if case.kind == "epochs":
        schedule = EpochSchedule(case.num_samples, case.length, case.batch * case.world, len(host))
    else:
        schedule = IterSchedule(case.num_samples, case.length, case.batch * case.world)
    policy = build_policy("infobatch", case.r, case.delta)
    pruner = Pruner(schedule, policy, case.number, loader.sampler.shuffle)
    loader.sampler.bind(pruner)

    entries: list[dict[str, Any]] = []
    after: list[dict[str, Any]] = []
    while not pruner.finished:
        plan = pruner.begin_pass()
        loader.start_pass(pruner.pass_index)
        whole = {"indices": plan.indices, "weights": plan.weights, "pruned": plan.pruned, "threshold": plan.threshold}
        entry: dict[str, Any] = {
            "plan": {key: as_list(value) for key, value in whole.items()},
            "lens": [pruner.batches, len(loader)],
            "steps": [],
        }
        for items in loader:
            indices, replaced = loader.current
            assert torch.equal(torch.as_tensor(items), 3 * indices + 1)
            weights = pruner.weights(indices)
            losses = losses_of(case, indices.tolist(), pruner.pass_index, rank)
            pruner.record(indices, losses, ~replaced)
            pruner.advance(len(indices) * case.world)
            due = schedule.steps_at(pruner.pass_index, pruner.batches_done, pruner.batches)
            entry["lens"].append(len(loader))
            entry["steps"].append({"index": indices.tolist(), "weights": weights.tolist(), "due": due})
        pruner.finish_pass()
        entries.append(entry)
        after.append(scores_in(pruner.state_dict()))
    stop_workers(loader)
    return {"passes": entries, "after": after, "summary": pruner.summary()}


def as_list(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else value


def scores_in(state: dict[str, Any]) -> dict[str, Any]:
    return {key: as_list(state[key]) for key in ("scores", "seen", "times_seen")}


def stop_workers(loader: DataLoader) -> None:
    # Left to the garbage collector, persistent workers take seconds to end.
    if loader.persistent_workers and loader._iterator is not None:
        loader._iterator._shutdown_workers()  # type: ignore[attr-defined]


def one_process(me: int, folder: str, all_of_it: bool) -> None:
    """Run the cases of every group that this process belongs to."""
    preload_workers("infobatch_mm", *["infobatch_mm.engine"] * (HAVE_ENGINE and all_of_it))
    for world, first in GROUPS:
        rank = me - first
        if not 0 <= rank < world:
            continue
        with meeting(folder, rank, world, f"meet.{world}"):
            journals = {}
            for case in CASES:
                if (
                    case.world == world
                    and (HAVE_ENGINE or case.kind == "core")
                    and (all_of_it or case.number not in LONG)
                ):
                    try:
                        journals[case.number] = run_case(case, rank)
                    except Exception as error:
                        raise RuntimeError(f"rank {rank}: {case}") from error
            torch.save(journals, Path(folder) / f"{world}-{rank}.pt")
