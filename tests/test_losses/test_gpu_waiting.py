"""On a GPU, where torch itself tells: no ordinary step waits for it more often than the host's own does.

In the mode "error" of ``torch.cuda.set_sync_debug_mode`` whatever makes the step wait raises, with its line; where the
host's own step waits, both are counted in the mode "warn".
"""

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

pytest.importorskip("mmseg")
pytest.importorskip("mmpretrain")
from mmengine.structures import BaseDataElement
from oracle_alone import seed
from oracle_losses import passes
from waiting_kinds import KINDS, Kind, Run

from infobatch_mm import InfoBatch
from infobatch_mm.core.store import ScoreStore

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, on which torch tells what waits"),
]
DEVICE = "cuda"
SAMPLES, BATCH = 64, 4


@pytest.fixture(autouse=True)
def waiting_is_no_error_elsewhere() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def refused(step: Callable[[], object]) -> None:
    """Take a step in which waiting is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits_of(step: Callable[[], object]) -> list[str]:
    """Lines of a step that wait, one for each time."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{each.filename}:{each.lineno}" for each in seen if "synchronizing CUDA operation" in str(each.message)]


def moved(value: object) -> object:
    """The same on the device: tensors and data samples, in lists too."""
    if isinstance(value, (list, tuple)):
        return type(value)(moved(each) for each in value)
    return value.to(DEVICE) if isinstance(value, (torch.Tensor, BaseDataElement)) else value


def warm_step(kind: Kind, is_ours: bool, pruned: bool) -> Callable[[], object]:
    """A step of a model that has taken some: a loss has proven then what it has to."""
    run = Run(kind, is_ours)
    run.model.to(DEVICE)
    for turn in range(3):
        seed(turn)
        run.step(moved(kind.batch(turn)), False)
    seed(3)
    batch = moved(kind.batch(3))
    torch.cuda.synchronize()
    return lambda: run.step(batch, pruned)


@passes
@pytest.mark.parametrize("name", KINDS)
def test_a_step_waits_no_more_than_the_hosts_own(name: str, pruned: bool) -> None:
    kind = KINDS[name]
    theirs = waits_of(warm_step(kind, is_ours=False, pruned=False))
    step = warm_step(kind, is_ours=True, pruned=pruned)
    if not theirs:
        refused(step)
        return
    ours = waits_of(step)
    if kind.evaluations > 1:  # the host's loss waits in each
        assert not [line for line in ours if "infobatch_mm" in line]
    assert len(ours) <= len(theirs) * kind.evaluations, "\n".join(ours)


def test_hundreds_of_records_do_not_wait() -> None:
    store, losses = ScoreStore(SAMPLES), torch.rand(BATCH, device=DEVICE)

    def record() -> None:
        for turn in range(600):
            store.record(torch.arange(BATCH) + turn % 60, losses + turn)

    record()
    refused(record)
    store.merge()
    assert store.seen.sum() == 63 and store.times_seen.sum() == 2 * 600 * BATCH
    assert store.values[62].item() == pytest.approx(599 + float(losses[3]), rel=1e-6)


@pytest.mark.parametrize("indices_on", ["cpu", DEVICE])
def test_a_loop_of_ones_own_does_not_wait(indices_on: str) -> None:
    """In a full pass, and in a pruned one."""
    infobatch = InfoBatch(SAMPLES, num_epochs=4, batch_size=BATCH)
    loader = DataLoader(infobatch.attach(range(SAMPLES)), BATCH, sampler=infobatch.sampler)
    points = torch.randn(SAMPLES, 8, device=DEVICE)
    model = nn.Linear(8, 1).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        for turn, (index, _) in enumerate(loader):
            index = index.to(indices_on)
            inputs = points[index.to(DEVICE)]

            def step(index: torch.Tensor = index, inputs: torch.Tensor = inputs) -> None:
                optimizer.zero_grad()
                infobatch.weigh(model(inputs).square().mean(1), index).backward()
                optimizer.step()

            if 1 < turn < 5:  # the last step of a pass ends it
                refused(step)
            else:
                step()
    assert infobatch.summary()["passes_done"] >= 1


def test_a_loop_on_accelerate_does_not_wait() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    from infobatch_mm.diffusion import AcceleratedInfoBatch

    accelerator = accelerate.Accelerator()
    given = DataLoader(torch.randn(SAMPLES, 8), BATCH, shuffle=True)
    infobatch = AcceleratedInfoBatch(accelerator, given, num_epochs=4, score="timestep")
    model = nn.Linear(8, 1)
    model, optimizer, loader = infobatch.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-3), given)
    log_snr = torch.linspace(-3, 3, BATCH, device=accelerator.device)
    for _ in range(2):
        for turn, inputs in enumerate(loader):

            def step(inputs: torch.Tensor = inputs) -> None:
                optimizer.zero_grad()
                accelerator.backward(infobatch.weigh(model(inputs).square(), log_snr=log_snr))
                optimizer.step()

            if 1 < turn < 5:
                refused(step)
            else:
                step()
    assert infobatch.passes_done == 2
