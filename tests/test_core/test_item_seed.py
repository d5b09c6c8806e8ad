"""Every item under a seed of its own: the same in any process, at any time, and nobody else notices."""

from __future__ import annotations

import copy
import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from infobatch_mm import InfoBatch
from infobatch_mm.core import rng
from infobatch_mm.core.sampler import SeededIndex, item_seed

N = 23


class Augmented(Dataset):
    """Items are draws from all three global generators."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> torch.Tensor:
        assert type(index) is int
        return torch.tensor([index, random.random(), np.random.rand(), float(torch.rand(()))], dtype=torch.float64)


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def passes(workers: int = 0, item_seed: bool = True, seed: int = 0, **loader_kwargs: Any) -> list[torch.Tensor]:
    """What three passes delivered, in the order of their visits."""
    infobatch = InfoBatch(N, 3, seed=seed, item_seed=item_seed, delta=1.0)
    loader = DataLoader(
        infobatch.attach(Augmented()),
        batch_size=4,
        sampler=infobatch.sampler,
        num_workers=workers,
        generator=torch.Generator(),
        **loader_kwargs,
    )
    seen = []
    for _ in range(3):
        batches = []
        for index, items in loader:
            infobatch.weigh(torch.ones(len(index)) * (1 + index), index)
            batches.append(items)
        seen.append(torch.cat(batches))
    return seen


@pytest.mark.parametrize(("workers", "persistent"), [(1, False), (2, False), (2, True)])
def test_items_are_the_same_with_any_number_of_workers(workers: int, persistent: bool):
    for here, there in zip(passes(), passes(workers, persistent_workers=persistent), strict=True):
        assert torch.equal(here, there)


def test_items_differ_between_positions_passes_and_seeds():
    seen = torch.cat([*passes(), *passes(seed=1)])[:, 1:]
    for column in seen.T:
        assert len(column.unique()) == len(seen)


def test_without_item_seed_items_are_drawn_from_the_global_generators():
    first = passes(item_seed=False)
    assert not torch.equal(first[0][:, 1:], passes(item_seed=False)[0][:, 1:])


def test_the_global_generators_are_left_as_they_were():
    rng_before = rng.capture()
    expected = draws()
    rng.restore(rng_before)
    passes()
    assert draws() == expected
    rng.restore(rng_before)
    with pytest.raises(RuntimeError), rng.seeded((1, 2, 3)):
        draws()
        raise RuntimeError
    assert draws() == expected


def test_a_resumed_pass_goes_on_with_the_same_items():
    whole = passes()[0]
    first = InfoBatch(N, 3, item_seed=True)
    loader = iter(DataLoader(first.attach(Augmented()), batch_size=4, sampler=first.sampler))
    for _ in range(2):
        index, _ = next(loader)
        first.weigh(torch.ones(len(index)), index)
    resumed = InfoBatch(N, 3, item_seed=True)
    resumed.load_state_dict(first.state_dict())
    rest = [items for _, items in DataLoader(resumed.attach(Augmented()), batch_size=4, sampler=resumed.sampler)]
    assert torch.equal(torch.cat(rest), whole[8:])


@pytest.mark.parametrize("remake", [copy.copy, copy.deepcopy, lambda index: pickle.loads(pickle.dumps(index))])
def test_a_seeded_index_is_an_integer_that_keeps_its_seed_on_the_way(remake: Any):
    index = remake(SeededIndex(-7, (3, 4, 5)))
    assert index == -7 and isinstance(index, int) and index.seed == (3, 4, 5)
    with item_seed(index):
        here = draws()
    with rng.seeded((3, 4, 5)):
        assert draws() == here
