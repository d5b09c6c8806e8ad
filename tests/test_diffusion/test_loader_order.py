"""Rows of a batch that accelerate hands out belong to the samples whose indices travel beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Subset, SubsetRandomSampler

pytest.importorskip("accelerate")
from accelerate import Accelerator

from infobatch_mm import keeps_order
from infobatch_mm.diffusion import AcceleratedInfoBatch

pytestmark = pytest.mark.usefixtures("no_accelerator_of_another_test")


class Captions(Dataset):
    """Sequences of many lengths, of which batches are read in one go."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __len__(self) -> int:
        return 16

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        self.asked.append(indices)
        return [{"id": index, "tokens": [index] * (1 + index * 7 % 5)} for index in indices]


def in_order(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(item["tokens"]) for item in items)
    rows = [item["tokens"] + [0] * (longest - len(item["tokens"])) for item in items]
    return {"id": torch.tensor([item["id"] for item in items]), "tokens": torch.tensor(rows)}


def by_length(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return in_order(sorted(items, key=lambda item: len(item["tokens"])))


def train(dataset: Dataset, collate_fn: Callable, workers: int = 0) -> None:
    """Two passes, in which each sample weighs what it is."""
    accelerator = Accelerator(cpu=True)
    loader = DataLoader(dataset, batch_size=4, shuffle=True, collate_fn=collate_fn, num_workers=workers)
    infobatch = AcceleratedInfoBatch(accelerator, loader, 2)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model, optimizer, loader = infobatch.prepare(model, optimizer, loader)
    for _ in range(2):
        for batch in loader:
            assert infobatch._in_hand.index.tolist() == batch["id"].tolist()
            with accelerator.accumulate(model):
                loss = infobatch.weigh(model(batch["id"].float()[:, None]).flatten() ** 2)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_is_refused_whose_collate_function_sorts(workers: int):
    with pytest.raises(ValueError, match="by_length reorders or mixes its samples"):
        train(Captions(), by_length, workers)


@pytest.mark.parametrize("collate_fn", [in_order, keeps_order(lambda items: in_order(items))])
def test_batches_are_read_at_once_and_in_order(collate_fn: Callable):
    dataset = Captions()
    train(Subset(dataset, range(16)), collate_fn)
    assert [len(batch) for batch in dataset.asked] in ([4] * batches for batches in range(5, 9))


@pytest.mark.parametrize("item_seed", [False, True])
def test_without_pruning_a_loader_of_batches_keeps_its_own_sampler(item_seed: bool):
    """torch keeps the sampler of a ``batch_sampler`` there, and another one at the loader."""
    torch.manual_seed(0)
    batches = BatchSampler(SubsetRandomSampler(range(8)), 4, False)
    loader = DataLoader(list(range(23)), batch_sampler=batches)
    accelerator = Accelerator(cpu=True)
    infobatch = AcceleratedInfoBatch(accelerator, loader, 2, policy="none", item_seed=item_seed)
    seen = [index for _ in infobatch.prepare(loader) for index in infobatch.index.tolist()]
    assert sorted(seen[:8]) == list(range(8)) and seen[:8] != list(range(8))


def test_pruning_refuses_a_loader_of_batches_that_chooses_its_samples():
    loader = DataLoader(list(range(23)), batch_sampler=BatchSampler(SubsetRandomSampler(range(8)), 4, False))
    with pytest.raises(ValueError, match="has a SubsetRandomSampler of 8 draws from 23 samples"):
        AcceleratedInfoBatch(Accelerator(cpu=True), loader, 2)
