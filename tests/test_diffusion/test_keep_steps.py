"""``keep="steps"`` on accelerate: as many updates as without pruning, on smaller batches, however they are shared."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("diffusers", reason="diffusers is not installed")

from accelerate import Accelerator
from accelerate.utils import DistributedType
from launching import accelerate_launch, launched

from infobatch_mm.core import EpochSchedule, Pruner
from infobatch_mm.diffusion import AcceleratedInfoBatch
from infobatch_mm.policies import RandomPolicy

from .keep_steps_processes import AS_ONE, KEEP, SHARED, Seen, seen_in
from .toy import Points, Run, Setup, forget_accelerators

pytestmark = pytest.mark.usefixtures("no_accelerator_of_another_test")

N, B, EPOCHS = 46, 4, 8
SETUPS: dict[str, Setup] = {
    "default": Setup(policy=KEEP),
    "workers": Setup(policy=KEEP, workers=1),
    "drop_last": Setup(policy=KEEP, drop_last=True),
    "in order": Setup(policy=KEEP, shuffle=False),
    "accumulated": Setup(policy=KEEP, accumulate=4),
    "OneCycleLR": Setup(policy=KEEP, scheduler="OneCycleLR"),
    "in steps": Setup(policy=KEEP, steps=81),
}


def by_pass(journal: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    return {current: list(steps) for current, steps in groupby(journal, key=lambda entry: entry["pass"])}


def check(seen: list[Seen], batch: int, updates_only: bool = False) -> int:
    """Batches and rates of all processes of a training; returns how many passes were of smaller batches.

    Args:
        seen (list): Of each process.
        batch (int): Samples in a full batch of a process.
        updates_only (bool): Whether the last pass is partial.
    """
    smaller = 0
    passes = [by_pass(each["journal"]) for each in seen]
    whole = len(passes[0][0])
    last = max(passes[0])
    for number in passes[0]:
        steps = [each[number] for each in passes]
        made = {len(each) for each in steps}
        assert made == {whole} or (updates_only and number == last and max(made) < whole)
        sizes = {len(entry["index"]) for each in steps for entry in each}
        visited = [index for each in steps for entry in each for index in entry["index"]]
        if any(entry["weights"] != [1.0] * len(entry["weights"]) for each in steps for entry in each):
            assert len(sizes) == 1 and len(set(visited)) == len(visited)
            smaller += max(sizes) < batch
            share = max(sizes) / batch
        else:
            share = 1.0
        for each in steps:
            for entry in each:
                if entry["updated"]:
                    assert entry["within"] == entry["before"] * (math.sqrt(share) if share < 1 else 1)
                else:
                    assert entry["within"] is None
    return smaller


@pytest.mark.parametrize("name", list(SETUPS))
def test_pruned_passes_make_the_steps_and_updates_of_full_ones(name: str):
    setup = SETUPS[name]
    seen = seen_in(Run(setup))
    assert check([seen], B, updates_only=name == "in steps") >= 4
    # The rates of the host are accelerate's own after as many updates of the unpruned training.
    plain: dict[str, Any] = {**vars(setup), "policy": None, "workers": 0}
    alone = Run(Setup(**plain)).train()
    rates = [entry["lr"] for entry in alone.journal if entry["updated"]]
    assert [entry["lr"] for entry in seen["journal"] if entry["updated"]] == rates
    assert seen["books"]["iterations"] == len(alone.journal)


def test_what_is_expected_of_updates_is_what_a_full_training_makes():
    run = Run(SETUPS["accumulated"])
    expected: set[int] = set()

    def look(step: int) -> None:
        expected.add(run.infobatch.updates_expected)

    run.train(look)
    assert expected == {run.infobatch.updates_done} == {EPOCHS * math.ceil(math.ceil(N / B) / 4)}


@pytest.mark.parametrize("stop", [5, 12, 17, 24, 40])
def test_a_run_killed_at_any_step_goes_on_with_the_same_samples_weights_and_rates(tmp_path: Path, stop: int):
    setup = Setup(policy=KEEP, item_seed=True)
    straight = seen_in(Run(setup))["journal"]
    killed = Run(setup)
    seen_in(killed, stop)
    killed.save(tmp_path / "checkpoint")
    resumed = Run(setup).load(tmp_path / "checkpoint")
    rest = seen_in(resumed)["journal"]
    assert rest == straight[stop:]


def test_after_the_training_an_optimizers_steps_are_its_own():
    run = Run(Setup(policy=KEEP, more={"delta": 1.0}))
    journal = seen_in(run)["journal"]
    assert journal[-1]["within"] < journal[-1]["before"]  # of the last pass's smaller batches
    within: list[float] = []
    optimizer = run.optimizer.optimizer
    optimizer.register_step_pre_hook(lambda *_: within.append(optimizer.param_groups[0]["lr"]))
    optimizer.param_groups[0]["lr"] = 0.125
    optimizer.step()
    assert within == [0.125]


# ---- what is refused ------------------------------------------------------------------------------------


def made(policy: dict[str, Any] = KEEP, batch_size: int = 4) -> tuple[AcceleratedInfoBatch, DataLoader]:
    forget_accelerators()
    loader = DataLoader(Points(N), batch_size, shuffle=True)
    return AcceleratedInfoBatch(Accelerator(cpu=True), loader, EPOCHS, policy=policy), loader


def test_a_batch_of_one_sample_is_refused():
    with pytest.raises(ValueError, match=r"the global batch_size=1 is the smallest: give each process 2 samples"):
        made(batch_size=1)


def test_a_script_without_a_prepared_optimizer_is_refused_in_its_first_step():
    infobatch, loader = made()
    batch = next(iter(infobatch.prepare(loader)))
    with pytest.raises(ValueError, match=r"no optimizer is known: give it to infobatch.prepare\(\)"):
        infobatch.weigh(batch["y"])
    infobatch, loader = made({**KEEP, "lr_rule": "none"})
    infobatch.weigh(next(iter(infobatch.prepare(loader)))["y"])


@pytest.mark.parametrize("engine", [DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_engines_that_step_the_optimizer_themselves_are_refused(engine: DistributedType):
    from infobatch_mm.accelerated.rates import ScriptRates

    class Engine:
        distributed_type = engine

    def training(**more: Any) -> Pruner:
        return Pruner(EpochSchedule(N, EPOCHS, B), RandomPolicy(keep="steps", **more))

    with pytest.raises(ValueError, match=rf"{engine.value} steps the optimizer itself"):
        ScriptRates(Engine(), training())
    ScriptRates(Engine(), training(lr_rule="none"))


# ---- two processes --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Seen]]:
    folder = tmp_path_factory.mktemp("keep")
    script = Path(__file__).with_name("keep_steps_processes.py")
    launched(accelerate_launch(), script, folder, cwd=folder, CUDA_VISIBLE_DEVICES="")
    return [json.loads((folder / f"seen.{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("name", list(SHARED))
def test_two_processes_make_as_many_steps_on_equal_shares(ranks: list[dict[str, Seen]], name: str):
    seen = [rank[name] for rank in ranks]
    own = SHARED[name].batch_size // (2 if SHARED[name].split else 1)
    assert check(seen, own) >= 4
    assert seen[0]["books"]["per_pass"] == seen[1]["books"]["per_pass"]
    for number, entry in enumerate(seen[0]["books"]["per_pass"][1:-1], 1):
        visits = [step for each in seen for step in each["journal"] if step["pass"] == number]
        assert entry["kept"] == sum(len(step["index"]) for step in visits)
    for each in seen:
        assert each["resumed"] == each["journal"][each["stop"] :]


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_train_as_one(ranks: list[dict[str, Seen]]):
    """With the same global batches: the same samples in each of them, and the same parameters."""
    one = seen_in(Run(dataclasses.replace(AS_ONE, batch_size=8)))
    two = [rank["as one"] for rank in ranks]
    for step, entry in enumerate(one["journal"]):
        both = [index for each in two for index in each["journal"][step]["index"]]
        if entry["weights"] != [1.0] * len(entry["weights"]):
            assert sorted(both) == sorted(entry["index"])
        assert two[0]["journal"][step]["within"] == entry["within"]
    torch.testing.assert_close(two[0]["parameters"], one["parameters"], rtol=0, atol=1e-5)
