"""Scores that are norms of gradients, and running statistics, in a script on accelerate."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from infobatch_mm.diffusion import AcceleratedInfoBatch

from .toy import forget_accelerators

pytestmark = pytest.mark.filterwarnings("ignore:InfoBatch")
N, B = 64, 8


class Rows(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.x = torch.randn(N, 3, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, N)[:, None]

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> dict:
        return {"x": self.x[index], "index": index}


@pytest.fixture
def accelerator() -> Accelerator:
    forget_accelerators()
    return Accelerator(cpu=True, gradient_accumulation_steps=2)


def trained(accelerator: Accelerator, how: str, passes: int = 3) -> tuple:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    data = Rows()
    loader = DataLoader(data, B, shuffle=True)
    policy = dict(type="variance", prune_ratio=0.5, delta=1.0)
    infobatch = AcceleratedInfoBatch(accelerator, loader, passes + 1, policy=policy)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    model, optimizer, loader = infobatch.prepare(model, optimizer, loader)
    if how == "layer":
        infobatch.observe(model[2])
    for _ in range(passes):
        for batch in loader:
            with accelerator.accumulate(model):
                outputs = model(batch["x"])
                losses = (outputs - batch["x"]).square()
                roots = losses.mean(1).sqrt() if how == "scores" else None
                given = outputs if how != "losses" else None
                accelerator.backward(infobatch.weigh(losses, scores=roots, outputs=given))
                optimizer.step()
                optimizer.zero_grad()
    infobatch.merge()
    return infobatch, model, data.x


@pytest.mark.parametrize("how", ["layer", "outputs", "losses", "scores"])
def test_scores_are_norms_whatever_is_known(accelerator: Accelerator, how: str):
    infobatch, model, x = trained(accelerator, how)
    scores = infobatch._pruner.store.values
    hidden = model[1](model[0](x))
    outputs = model[2](hidden)
    losses = (outputs - x).square().mean(1)
    at_output = 2 * (outputs - x).norm(dim=1) / 3
    expected = {
        "layer": at_output * (hidden.square().sum(1) + 1).sqrt(),
        "outputs": at_output,
        "losses": losses,
        "scores": losses.sqrt(),
    }[how]
    torch.testing.assert_close(scores, expected.detach(), rtol=1e-4, atol=1e-6)
    assert infobatch.summary()["saved_ratio"] == pytest.approx(1 / 3, abs=0.03)


def test_running_statistics_are_estimated_on_uniform_batches(accelerator: Accelerator):
    infobatch, _, x = trained(accelerator, "outputs", passes=2)
    model = nn.BatchNorm1d(3)
    model(x * 7)
    assert infobatch.recalibrate(model, lambda batch: model(batch["x"])) == 1
    spread = x.std(0) / N**0.5
    assert ((model.running_mean - x.mean(0)).abs() < 5 * spread).all()
    assert infobatch.summary()["forward_visits"] == N
