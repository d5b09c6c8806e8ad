"""What ``test_accelerated_distributed`` has its processes do, all in one launch; each writes down what it saw.

    accelerate launch two_processes.py FOLDER [--all]

Nothing is judged here. Without ``--all`` fewer sizes, schedules and checkpoints are gone through.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState, GradientState
from torch.distributed.algorithms.join import Join
from torch.utils.data import DataLoader

from infobatch_mm.diffusion import AcceleratedInfoBatch

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_diffusion.toy import SCHEDULERS, Points, Run, Setup, forget_accelerators

#: How two processes share batches of 4 samples.
CUTS: dict[str, dict[str, Any]] = {
    "default": {"batch_size": 2},
    "split": {"batch_size": 4, "split": True},
    "dispatched": {"batch_size": 2, "dispatch": True},
    "dispatched, split": {"batch_size": 4, "dispatch": True, "split": True},
    "uneven": {"batch_size": 2, "even": False},
    "uneven, split": {"batch_size": 4, "even": False, "split": True},
    "drop_last": {"batch_size": 2, "drop_last": True},
    "drop_last, split": {"batch_size": 4, "drop_last": True, "split": True},
    "drop_last, dispatched": {"batch_size": 2, "drop_last": True, "dispatch": True},
}
SIZES = [9, 10, 11, 12]
#: What the default suite looks at: tails of every length in some cut, one of them in random order for every cut.
FEW_SHARES = [
    *(("default", samples, False) for samples in SIZES),
    *(("split", samples, False) for samples in (9, 10)),
    *(("dispatched", samples, False) for samples in (9, 10, 11)),
    *(("uneven", samples, False) for samples in (9, 10, 11)),
    ("dispatched, split", 11, False),
    *(("uneven, split", samples, False) for samples in (10, 11)),
    ("drop_last", 11, False),
    ("drop_last, split", 10, False),
    ("drop_last, dispatched", 9, False),
    *((name, 11, True) for name in CUTS),
]
FEW_SCHEDULERS = ["cosine", "piecewise_constant", "OneCycleLR"]
PASSES = 4  # the last one is full again
#: Trainings that are to be those of one process with batches of 4; without a tail, which accelerate would fill up.
TRAININGS = {
    "default": Setup(samples=44, batch_size=2),
    "workers": Setup(samples=44, batch_size=2, workers=1, epochs=4),
    "dispatched": Setup(samples=44, batch_size=2, dispatch=True),
    "split": Setup(samples=44, split=True),
    "split, accumulated": Setup(samples=44, split=True, accumulate=4),
    "by noise level": Setup(samples=44, batch_size=2, more={"score": "timestep"}),
    "by gradient, accumulated": Setup(samples=44, batch_size=2, accumulate=2, policy="variance"),
    "in steps": Setup(samples=44, batch_size=2, steps=80),
    "split, accumulated, in steps": Setup(samples=44, split=True, accumulate=4, steps=20),
    "split, dispatched": Setup(samples=44, split=True, dispatch=True),
}
#: Updates of 3 to an epoch, or of 2 where the last batch is dropped.
STEPS = 7
POLICIES = (None, "none", "infobatch")
RESUMED = Setup(samples=46, batch_size=2, noise=True, item_seed=True)
SAVED_AT = [1, 6, 12, 13, 15, 20, 21, 22, 40]
FEW_SAVED_AT = [6, 12, 21]  # in a full pass, at its end, in a pruned one
LEFT_AT = 21


class Shares:
    """Walks over a loader alone, without a model: the loss of a sample is its index, but for the first pass."""

    def __init__(self, cut: dict[str, Any], samples: int, shuffle: bool, order: list[int] | None = None) -> None:
        forget_accelerators()
        shared = {"split_batches": cut.get("split", False), "even_batches": cut.get("even", True)}
        config = DataLoaderConfiguration(**shared, dispatch_batches=cut.get("dispatch"))
        self.accelerator = Accelerator(cpu=True, dataloader_config=config)
        torch.manual_seed(0)
        how = {"sampler": order} if order is not None else {"shuffle": shuffle}
        loader = DataLoader(Points(samples), cut["batch_size"], drop_last=cut.get("drop_last", False), **how)
        self.infobatch = None
        self.plans: dict[int, list[int]] = {}  # by pass
        if order is None:
            self.infobatch = AcceleratedInfoBatch(self.accelerator, loader, PASSES, delta=0.75)
            self.loader = self.infobatch.prepare(loader)
        else:
            self.loader = self.accelerator.prepare(loader)

    def walk(self, steps: int = 1000) -> Iterator[list[int]]:
        for _, batch in zip(range(steps), self.loader, strict=False):
            if self.infobatch is not None:
                pruner = self.infobatch._pruner
                self.plans[pruner.pass_index] = pruner.plan.indices.tolist()
                self.infobatch.weigh(batch["index"].float())
            yield batch["index"].tolist()


def shares(folder: Path, name: str, samples: int, shuffle: bool) -> dict[str, Any]:
    """Four passes, the first of them also by accelerate alone, and as it goes on after its first step."""
    cut = CUTS[name]
    ours = Shares(cut, samples, shuffle)
    passes = [list(ours.walk()) for _ in range(PASSES)]
    plans = [ours.plans[current] for current in range(PASSES)]
    result: dict[str, Any] = {"passes": passes, "plans": plans}
    result["alone"] = list(Shares(cut, samples, shuffle, plans[0]).walk())
    ours.infobatch.merge()
    result["books"] = ours.infobatch.summary()["per_pass"]
    result["scores"] = ours.infobatch._pruner.store.values.tolist()

    first = Shares(cut, samples, shuffle)
    result["begun"] = list(first.walk(1))
    first.infobatch.merge()
    checkpoint = folder / f"{name} {samples} {shuffle}"
    first.accelerator.save_state(str(checkpoint))
    first.accelerator.wait_for_everyone()
    list(first.walk())  # broken off, so that this is another pass
    first.infobatch.merge()
    result["books_after_break"] = first.infobatch.summary()["per_pass"]
    resumed = Shares(cut, samples, shuffle)
    resumed.accelerator.load_state(str(checkpoint))
    result["rest_after_resume"] = list(resumed.walk())
    return result


def training(setup: Setup) -> dict[str, Any]:
    run = Run(setup)
    weights: list[list[float]] = []
    run.train(lambda step: weights.append(run.infobatch._in_hand.weights.tolist()))
    run.infobatch.merge()
    return {
        "journal": run.journal,
        "weights": weights,
        "parameters": run.parameters,
        "scores": run.pruner.store.values.tolist(),
        "books": run.infobatch.summary()["per_pass"],
        "iterations": run.infobatch.summary()["iterations"],
    }


def rates(setup: dict[str, Any]) -> list[float]:
    return Run(Setup(ddp=False, **setup)).train().at_pass_end


def joined() -> dict[str, Any]:
    """Uneven processes as accelerate's ``join_uneven_inputs`` has them train; on the CPU it does nothing by itself."""
    run = Run(Setup(samples=10, batch_size=2, even=False, epochs=4))
    steps = []
    for _ in range(4):
        with Join([run.model]):
            for batch in run.loader:
                steps.append(batch["index"].tolist())
                run.accelerator.backward(run.infobatch.weigh((run.model(batch["x"]) - batch["y"]) ** 2))
                run.optimizer.step()
                run.scheduler.step()
                run.optimizer.zero_grad()
        run.infobatch.merge()
    return {"steps": steps, "books": run.infobatch.summary()["per_pass"], "lr": run.scheduler.get_last_lr()}


def resumed(folder: Path, saved_at: list[int]) -> dict[str, Any]:
    """A straight run, and the same resumed from checkpoints on its way."""
    straight = Run(RESUMED)
    straight.train(lambda step: straight.save(folder / str(step)) if step in saved_at else None)
    result: dict[str, Any] = {"straight": (straight.journal, straight.parameters), "resumed": {}}
    for step in saved_at:
        run = Run(RESUMED).load(folder / str(step)).train()
        result["resumed"][step] = (run.journal, run.parameters)
    return result


def unmerged(folder: Path) -> dict[str, Any]:
    run = Run(RESUMED).train(lambda step: step == LEFT_AT)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run.accelerator.save_state(str(folder))
    run.accelerator.wait_for_everyone()
    other = Run(RESUMED)
    with warnings.catch_warnings(record=True) as told_again:
        warnings.simplefilter("always")
        other.load(folder)
    return {"saved": [str(each.message) for each in told], "loaded": [str(each.message) for each in told_again]}


def not_on_the_cpu() -> str:
    """What is told where accelerate finds no device and was not asked for the CPU: each process is alone then."""
    try:
        AcceleratedInfoBatch(Accelerator(), DataLoader(torch.arange(32.0), 4), 8)
        return ""
    except ValueError as error:
        return str(error)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def merged_alone(accelerator: Accelerator, folder: Path) -> tuple[str, float]:
    """A merge on the main process alone, and the seconds that it waits; a wait of its own is left behind."""
    loader = DataLoader(torch.arange(32.0), 4, shuffle=True)
    infobatch = AcceleratedInfoBatch(accelerator, loader, 8)
    told, begun = "", time.monotonic()
    for step, x in enumerate(infobatch.prepare(loader)):
        infobatch.weigh(x)
        if step == 1:
            infobatch.merge()
            break
    if accelerator.is_main_process:
        begun = time.monotonic()
        try:
            infobatch.merge(timeout_s=2)
        except ValueError as error:
            told = str(error)
        (folder / "merged alone").touch()
    while not (folder / "merged alone").exists():  # not in a collective, which would be the one that it waits for
        time.sleep(0.05)
    return told, time.monotonic() - begun


def refusals() -> dict[str, str]:
    """What processes are told that differ in an argument, or cannot share a batch."""
    told = {}
    rank = Accelerator(cpu=True).process_index
    for name, build in {
        "seed": lambda: Run(Setup(more={"seed": rank + 4})),
        "fingerprint": lambda: Run(Setup(more={"fingerprint": "ab"[rank]})),
        "samples": lambda: Run(Setup(samples=40 + rank)),
        "odd": lambda: Run(Setup(batch_size=3, split=True)),
        "large": lambda: Run(Setup(samples=7, batch_size=4)),
    }.items():
        try:
            build()
        except ValueError as error:
            told[name] = str(error)
    return told


def updates(setup: Setup) -> dict[str, list[int]]:
    run = Run(setup)
    made: list[int] = []
    expected: list[int] = []

    def look(step: int) -> None:
        made.append(run.infobatch.updates_done)
        expected.append(run.infobatch.updates_expected)

    run.train(look)
    return {"made": made, "expected": expected, "updated": [entry["updated"] for entry in run.journal]}


def in_steps(cut: dict[str, Any], policy: str | None) -> dict[str, Any]:
    """Two passes and a part of a third, of which some processes may have no last batch."""
    run = Run(Setup(samples=11, steps=STEPS, epochs=100, policy=policy, ddp=False, seedable=True, **cut)).train()
    books: dict[str, Any] = {}
    if run.infobatch is not None:
        run.infobatch.merge()
        books = run.infobatch.summary()
        books["num_passes"] = run.infobatch.num_passes
    return {"journal": run.journal, "books": books, "lr": run.scheduler.get_last_lr()}


def everything(folder: Path, all_of_it: bool) -> Iterator[tuple[str, Any]]:
    looked_at = list(itertools.product(CUTS, SIZES, (False, True))) if all_of_it else FEW_SHARES
    yield "shares", {" ".join(map(str, each)): shares(folder, *each) for each in looked_at}
    yield "trainings", {name: training(setup) for name, setup in TRAININGS.items()}
    yield (
        "rates",
        {
            f"{kind} {accumulate} {name}": [
                rates({"policy": policy, "scheduler": kind, "accumulate": accumulate, **cut})
                for policy in (None, "infobatch")
            ]
            for kind in (SCHEDULERS if all_of_it else FEW_SCHEDULERS)
            for accumulate in (1, 4)
            for name, cut in (("default", {"batch_size": 4}), ("split", {"batch_size": 8, "split": True}))
        },
    )
    runs = [
        Run(Setup(policy=policy, noise=True, seedable=seedable)).train()
        for seedable in (False, True)
        for policy in (None, "none")
    ]
    yield "none", [[run.journal, run.parameters] for run in runs]
    yield "in steps", {f"{name} {policy}": in_steps(CUTS[name], policy) for name in CUTS for policy in POLICIES}
    yield "joined", joined()
    yield "resumed", resumed(folder, SAVED_AT if all_of_it else FEW_SAVED_AT)
    yield "unmerged", unmerged(folder / "unmerged")
    yield "refusals", refusals()
    yield "updates", updates(Setup(accumulate=3))


if __name__ == "__main__":
    told = not_on_the_cpu()
    folder, accelerator = Path(sys.argv[1]), Accelerator(cpu=True)
    seen = {**dict(everything(folder, "--all" in sys.argv)), "not on the CPU": told}
    seen["merged alone"] = merged_alone(Accelerator(cpu=True), folder)
    (folder / f"seen.{accelerator.process_index}.json").write_text(json.dumps(seen))
    accelerator.end_training()
