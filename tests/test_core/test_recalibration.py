"""Running statistics of batch normalisation, estimated once more on uniform batches."""

import copy
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from infobatch_mm import InfoBatch
from infobatch_mm.core.recalibration import BATCHES, batch_norms, check_norm, estimating, uniform_batches

pytestmark = pytest.mark.filterwarnings("ignore:InfoBatch")
N, B = 200, 8


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 4), nn.BatchNorm1d(4))


def test_statistics_are_the_means_over_the_batches_and_nothing_else_changes():
    model = network()
    batches = torch.randn(6, B, 3)
    for batch in torch.randn(9, B, 3) * 5:
        model(batch)  # other statistics, and a count of batches
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with estimating(model) as layers:
        assert len(layers) == 2 and not torch.is_grad_enabled()
        for batch in batches:
            model(batch)
    assert torch.equal(torch.get_rng_state(), generator)
    entering = model[0](batches.flatten(0, 1)).detach().unflatten(0, (6, B))
    torch.testing.assert_close(model[1].running_mean, entering.mean(1).mean(0))
    torch.testing.assert_close(model[1].running_var, entering.var(1).mean(0))
    after = model.state_dict()
    kept = [name for name in after if "running" not in name]
    assert all(torch.equal(after[name], before[name]) for name in kept)
    assert [each.momentum for each in layers] == [0.1, 0.1]


def test_layers_without_a_batch_frozen_ones_and_ones_without_statistics_are_left_alone():
    model = nn.ModuleList([network(), nn.BatchNorm1d(5), nn.BatchNorm1d(5).eval(), nn.BatchNorm1d(5, False)])
    model.append(nn.BatchNorm1d(5, track_running_stats=False))
    model[1].running_mean.fill_(7)
    model[2].running_mean.fill_(8)
    assert len(batch_norms(model)) == 4
    with estimating(model):
        model[0](torch.randn(B, 3))
        model[2](torch.randn(B, 5))
    assert model[1].running_mean.tolist() == [7] * 5 and model[2].running_mean.tolist() == [8] * 5
    assert not torch.equal(model[0][1].running_mean, torch.zeros(5))


def test_an_exception_leaves_the_layers_as_they_were():
    model = network()
    model(torch.randn(B, 3))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="broken"), estimating(model):
        raise RuntimeError("broken")
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert model[1].momentum == 0.1


@pytest.mark.parametrize(("num_samples", "world"), [(1000, 1), (1000, 4), (20, 2), (3, 2), (100, 3)])
def test_batches_are_drawn_alike_apart_and_of_one_size_on_all_processes(num_samples: int, world: int):
    shares = [uniform_batches(num_samples, B, (1, 2), place, world) for place in range(world)]
    assert shares == [uniform_batches(num_samples, B, (1, 2), place, world) for place in range(world)]
    assert shares[0] != uniform_batches(num_samples, B, (1, 3), 0, world)
    everything = [index for share in shares for batch in share for index in batch]
    assert len(set(everything)) == len(everything) and set(everything) <= set(range(num_samples))
    assert len({tuple(map(len, share)) for share in shares}) == 1 and len(shares[0]) >= 1
    if num_samples == 1000:
        assert sum(map(len, shares)) == BATCHES and len(shares[0][0]) == B


def test_an_option_that_is_unknown_is_refused():
    check_norm(None)
    check_norm("recalibrate")
    with pytest.raises(ValueError, match="norm='recalibrated': use 'recalibrate'"):
        check_norm("recalibrated")


def test_a_loop_recalibrates_once_after_pruned_passes_and_counts_its_visits():
    data = torch.randn(N, 3) * torch.linspace(0.1, 4, N)[:, None]
    model = network()
    infobatch = InfoBatch(N, num_epochs=4, delta=1.0, policy=dict(type="infobatch", prune_ratio=0.8))
    loader = infobatch.loader(data, batch_size=B)
    found = []
    for _ in range(3):
        for index, batch in loader:
            infobatch.weigh(model(batch).square().mean(1), index)
        biased = model[1].running_mean.clone()
        found.append(infobatch.recalibrate(model, loader))
    assert found == [0, 2, 2] and not torch.equal(model[1].running_mean, biased)
    summary = infobatch.summary()
    assert summary["forward_visits"] == 2 * BATCHES * B
    assert sum(entry["kept"] for entry in summary["per_pass"]) == summary["visits"]
    resumed = InfoBatch(N, num_epochs=4, delta=1.0, policy=dict(type="infobatch", prune_ratio=0.8))
    resumed.load_state_dict(infobatch.state_dict())
    assert resumed.summary()["forward_visits"] == 2 * BATCHES * B
    entering = model[0](data).detach()
    spread = entering.std(0) / (BATCHES * B) ** 0.5
    assert ((model[1].running_mean - entering.mean(0)).abs() < 5 * spread).all()


def one_process(place: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=place, world_size=2)
    model = network()
    with estimating(model):
        model(torch.full((2, 3), float(place)) + torch.eye(2, 3))
    torch.save(model.state_dict(), f"{folder}/{place}.pt")
    dist.destroy_process_group()


def test_processes_end_with_the_same_statistics(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(one_process, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{place}.pt", weights_only=True) for place in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    model = network()
    with torch.no_grad():
        means = [model[0](torch.full((2, 3), float(place)) + torch.eye(2, 3)).mean(0) for place in range(2)]
    torch.testing.assert_close(first["1.running_mean"], torch.stack(means).mean(0))


class Failing(nn.Module):
    """Raises in its second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = network(), 0

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 2:
            raise RuntimeError("out of memory")
        return self.inner(batch)


@pytest.mark.parametrize(("size", "batch", "keep"), [(64, 32, "steps"), (100, 64, "batch"), (60, 32, "batch")])
def test_it_works_at_any_time_again_after_a_failure_and_for_every_pass_that_left_out_something(
    size: int, batch: int, keep: str
):
    data = torch.randn(size, 3)
    policy = dict(type="random", prune_ratio=0.4, delta=1.0, keep=keep, lr_rule="none" if keep == "steps" else None)
    infobatch = InfoBatch(size, num_epochs=4, policy=policy)
    loader, model = infobatch.loader(data, batch_size=batch), network()
    for _ in range(2):
        for index, items in loader:
            infobatch.weigh(model(items).square().mean(1), index)
            assert infobatch.recalibrate(model, loader) == 2  # amid a pass as well
    assert infobatch.summary()["saved_ratio"] > 0
    other = Failing()
    before = copy.deepcopy(other.state_dict())
    try:
        infobatch.recalibrate(other, loader)
    except RuntimeError:
        assert all(torch.equal(each, before[name]) for name, each in other.state_dict().items())
    other.calls = 9
    assert infobatch.recalibrate(other.eval(), loader) == 0 and infobatch.recalibrate(other.train(), loader) == 2
