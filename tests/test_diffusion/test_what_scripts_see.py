"""What a script on accelerate logs, is told on the console, and is warned of."""

from __future__ import annotations

import gc
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("diffusers", reason="diffusers is not installed")

from accelerate import Accelerator
from launching import launched
from torch.utils.data import DataLoader

from infobatch_mm import keeps_order
from infobatch_mm.accelerated.batch import Batch
from infobatch_mm.accelerated.checks import process_mismatch
from infobatch_mm.diffusion import AcceleratedInfoBatch

from .toy import Points, Run, Setup, forget_accelerators

pytestmark = pytest.mark.usefixtures("no_accelerator_of_another_test")


# ---- the loss that is logged -----------------------------------------------------------------------------------


def test_the_logged_loss_of_pruned_passes_is_that_of_all_samples() -> None:
    """The model stands still: what is logged on the average over a pass is the mean over the data set."""
    run = Run(Setup(samples=400, batch_size=8, epochs=40))
    every = ((run.model(run.loader.dataset.x) - run.loader.dataset.y) ** 2).mean().item()
    logged: dict[int, list[float]] = {}
    plain: dict[int, list[float]] = {}
    for _ in range(30):
        for batch in run.loader:
            current = run.pruner.pass_index
            losses = (run.model(batch["x"]) - batch["y"]) ** 2
            run.infobatch.weigh(losses)
            logged.setdefault(current, []).append(run.infobatch.loss.item())
            plain.setdefault(current, []).append(losses.mean().item())
    means = [[sum(each[p]) / len(each[p]) for p in range(1, 30)] for each in (logged, plain)]
    ours, kept = (sum(each) / len(each) for each in means)
    assert ours == pytest.approx(every, rel=0.05)
    assert kept > 1.2 * every  # the kept samples are the harder ones
    assert not run.infobatch.loss.requires_grad


def test_without_weights_the_logged_loss_is_the_plain_mean_to_the_bit() -> None:
    losses = torch.rand(49, generator=torch.Generator().manual_seed(0)) * 1e-3
    batch = Batch(torch.arange(49), torch.ones(49), 0)
    assert torch.equal(batch.mean(losses), losses.mean()) and torch.equal(batch.weighted(losses), losses.mean())


# ---- losses that are not finite --------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("score", ["raw", "timestep"])
@pytest.mark.filterwarnings("ignore:InfoBatch")
def test_a_loss_that_is_not_finite_counts_though_its_score_is(value: float, score: str) -> None:
    run = Run(Setup(samples=8, more={"score": score}))
    with pytest.warns(UserWarning, match="2 visits of pass 1 had a loss"):
        for batch in run.loader:
            losses = torch.where((batch["index"] == 3) | (batch["index"] == 5), value, batch["index"].float())
            run.infobatch.weigh(losses, scores=torch.ones(4), log_snr=torch.zeros(4))
    assert run.infobatch.summary()["nonfinite_losses"] == 2
    assert run.pruner.store.seen.tolist() == [index not in (3, 5) for index in range(8)]


# ---- more losses than samples ----------------------------------------------------------------------------------


class Subjects(Points):
    """Pictures of a subject and of its class, as DreamBooth with prior preservation reads them."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"instance": self.x[index], "class": -self.x[index % 5]}


@keeps_order
def instances_then_classes(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {"pixels": torch.stack([item["instance"] for item in items] + [item["class"] for item in items])}


def test_prior_preservation_is_told_what_to_weigh_and_then_trains() -> None:
    loader = DataLoader(Subjects(16), 4, shuffle=True, collate_fn=instances_then_classes)
    infobatch = AcceleratedInfoBatch(Accelerator(cpu=True), loader, 8)
    model, loader = infobatch.prepare(torch.nn.Linear(4, 1), loader)
    batch = next(iter(loader))
    losses = model(batch["pixels"]) ** 2
    advice = re.escape("infobatch.weigh(losses[:4]) + prior_loss_weight * losses[4:].mean()")
    with pytest.raises(ValueError, match=rf"losses of 4 samples.*got shape \(8, 1\): if they are two halves.*{advice}"):
        infobatch.weigh(losses)
    for batch in loader:
        assert torch.equal(batch["pixels"][:4], loader.dataset.x[infobatch.index])
        losses = model(batch["pixels"]) ** 2
        loss = infobatch.weigh(losses[:4]) + 0.5 * losses[4:].mean()
        assert loss.item() == pytest.approx((losses[:4].mean() + 0.5 * losses[4:].mean()).item())
    assert infobatch.passes_done == 1


def test_losses_of_several_crops_are_counted() -> None:
    run = Run(Setup())
    next(iter(run.loader))
    with pytest.raises(ValueError, match=r"if they are 3 parts, weigh the part"):
        run.infobatch.weigh(torch.ones(12))
    with pytest.raises(ValueError, match=r"got shape \(10,\): use reduction='none'"):
        run.infobatch.weigh(torch.ones(10))


# ---- caches ----------------------------------------------------------------------------------------------------


def test_a_walk_that_fills_a_cache_is_warned_of_once_and_counts_for_nothing() -> None:
    run = Run(Setup(samples=16))
    cache: dict[int, torch.Tensor] = {}
    with pytest.warns(UserWarning, match=r"not weighed.*cache\[step\] belongs to other samples.*cache\[infobatch"):
        for batch in run.loader:
            cache.update(zip(run.infobatch.index.tolist(), batch["x"], strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in run.loader:
            pass
    assert sorted(cache) == list(range(16)) and run.infobatch.passes_done == 0
    for _ in range(3):  # by the index of its sample, an entry is that of the batch, also where passes are pruned
        for batch in run.loader:
            cached = torch.stack([cache[index] for index in run.infobatch.index.tolist()])
            assert torch.equal(cached, batch["x"])
            run.infobatch.weigh(batch["index"].float())
    assert run.infobatch.summary()["saved_ratio"] > 0


def test_a_look_at_some_batches_is_not_taken_for_a_cache() -> None:
    run = Run(Setup())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next(iter(run.loader))
        for i, _ in enumerate(run.loader):
            if i == 5:
                break
        for batch in run.loader:
            run.infobatch.weigh(batch["index"].float())


# ---- the console -----------------------------------------------------------------------------------------------


def test_each_pass_and_the_end_have_a_line_on_the_main_process(caplog: pytest.LogCaptureFixture) -> None:
    run = Run(Setup())
    with caplog.at_level(logging.INFO, logger="infobatch_mm"):
        run.train()
    lines = [record.getMessage() for record in caplog.records if record.name == "infobatch_mm"]
    books = run.infobatch.summary()
    assert len(lines) == 9
    second = books["per_pass"][1]
    saved = 1 - (46 + second["kept"]) / 92
    assert lines[1] == (
        f"InfoBatch pass 2 of 8 done: kept {second['kept_ratio']:.1%}, saved so far {saved:.1%}, worth "
        f"{second['worth']:.1%} of a full pass (efficiency {second['efficiency']:.2f}, limit {second['limit']:.2f})"
    )
    assert re.fullmatch(
        rf"InfoBatch: {books['visits']} visits in place of 368, {books['saved_ratio']:.1%} saved, in 8 passes, \d+ s",
        lines[-1],
    )


#: Passes that are walked, and whether the script then stops; each in a process of its own, forked before it begins.
SCRIPT = """
import os
import sys
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from infobatch_mm.diffusion import AcceleratedInfoBatch

for number, (passes, stops) in enumerate([(3, False), (20, False), (3, True), (0, False)]):
    if os.fork() == 0:
        os.dup2(os.open(f"{sys.argv[1]}/told.{number}", os.O_WRONLY | os.O_CREAT), 2)
        break
    os.wait()
else:
    sys.exit()
loader = DataLoader(torch.arange(32.0), 4, shuffle=True)
infobatch = AcceleratedInfoBatch(Accelerator(cpu=True), loader, 20)
loader = infobatch.prepare(loader)
for _ in range(passes):
    for x in loader:
        infobatch.weigh(x)
if stops:
    raise RuntimeError("stopped")
"""


def test_a_script_that_ends_before_its_training_is_told_so_at_its_end(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    launched([], tmp_path / "script.py", tmp_path)
    early, *others = ((tmp_path / f"told.{number}").read_text() for number in range(4))
    told = early.strip().splitlines()
    assert [line[:26] for line in told[-4:-1]] == [f"InfoBatch pass {n} of 20 done"[:26] for n in (1, 2, 3)]
    assert "the script ended after 3 of 20 passes" in told[-1] and "num_epochs=3, or max_train_steps" in told[-1]
    whole, stopped, nothing = others
    assert "pass 20 of 20 done" in whole and "RuntimeError: stopped" in stopped  # the error says why
    assert not any("the script ended" in each for each in (whole, stopped, nothing))


def test_nothing_is_kept_alive_by_the_wait_for_its_end() -> None:
    import weakref

    run = Run(Setup())
    known = weakref.ref(run.infobatch)
    del run
    forget_accelerators()
    gc.collect()
    assert known() is None


@pytest.mark.parametrize(("steps", "message"), [(12, "prunes nothing: it is 1 pass over 46 samples"), (None, None)])
def test_a_training_that_is_too_short_is_warned_of(steps: int | None, message: str | None) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        Run(Setup(steps=steps))
    messages = [str(each.message) for each in told]
    assert bool(messages) == bool(message) and (not message or re.search(message, messages[0]))


# ---- processes that do not fit ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shares", "known", "environment", "message"),
    [
        (1, 1, {}, None),
        (1, 1, {"WORLD_SIZE": "2"}, None),  # of a cluster's scheduler
        (2, 2, {"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, None),
        (1, 2, {}, r"among 1 processes, torch.distributed knows 2: .*without a GPU make Accelerator\(cpu=True\)"),
        (1, 1, {"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, r"the launcher started 2: .*Accelerator\(cpu=True\)"),
        (2, 4, {}, "among 2 processes, torch.distributed knows 4: pruning needs data parallelism alone"),
        (2, 1, {}, "among 2 processes, torch.distributed knows 1: the scores of a pass could not be exchanged"),
    ],
)
def test_processes_that_are_not_accelerates_are_told_what_is_likely(
    monkeypatch: pytest.MonkeyPatch, shares: int, known: int, environment: dict[str, str], message: str | None
) -> None:
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("infobatch_mm.accelerated.checks.world_size", lambda: known)
    monkeypatch.setattr(getattr(torch, "accelerator", torch.cuda), "is_available", lambda: False)
    told = process_mismatch(shares)
    assert (told is None) == (message is None) and (message is None or re.search(message, told or ""))
