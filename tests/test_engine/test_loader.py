"""Batches that know their indices."""

from __future__ import annotations

import pickle
import random
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

pytest.importorskip("mmengine")

from infobatch_mm.engine.loader import IndexedDataset, IndexedLoader, leaf_datasets, sample_name


class Numbers(Dataset):
    """Ten items, one of which is replaced as MMEngine's BaseDataset would."""

    metainfo: ClassVar = {"classes": ("a",)}

    def __init__(self, broken: int | None = None) -> None:
        self.broken = broken
        self.pipeline = "first"

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        return self._rand_another() if index == self.broken else 100 + index

    def _rand_another(self) -> int:
        return 105


class Wrapper:
    def __init__(self, *datasets: Any) -> None:
        self.datasets = list(datasets)

    def __getitem__(self, index: int) -> Any:
        return self.datasets[0][index]


def test_the_host_sees_its_own_data_set() -> None:
    numbers = Numbers()
    indexed = IndexedDataset(numbers)
    assert len(indexed) == 10
    assert indexed[3] == numbers[3]
    assert indexed.metainfo is numbers.metainfo
    indexed.pipeline = "second"  # as hooks that switch pipelines do
    assert numbers.pipeline == "second"
    assert not hasattr(indexed, "no_such_attribute")


def test_the_wrapped_data_set_survives_pickling() -> None:
    indexed = pickle.loads(pickle.dumps(IndexedDataset(Numbers(broken=4))))
    assert indexed.__getitems__([3, 4]) == [(3, False, 103), (4, True, 105)]


@pytest.mark.parametrize(("workers", "context"), [(0, None), (2, "fork"), (1, "spawn")])
def test_batches_are_the_hosts_and_indices_stand_beside(workers: int, context: str | None) -> None:
    host = DataLoader(Numbers(broken=4), batch_size=4, num_workers=workers, multiprocessing_context=context)
    ours = IndexedLoader(host)
    seen = []
    for expected, batch in zip(host, ours, strict=True):
        assert torch.equal(expected, batch)
        seen.append((ours.current.indices.tolist(), ours.current.replaced.tolist()))
    assert seen == [
        ([0, 1, 2, 3], [False] * 4),
        ([4, 5, 6, 7], [True, False, False, False]),
        ([8, 9], [False, False]),
    ]


def test_loader_keeps_what_the_host_set() -> None:
    host = DataLoader(
        Numbers(), batch_size=3, num_workers=2, prefetch_factor=3, persistent_workers=True, drop_last=True
    )
    ours = IndexedLoader(host)
    for name in ("batch_size", "num_workers", "prefetch_factor", "persistent_workers", "drop_last", "pin_memory"):
        assert getattr(ours, name) == getattr(host, name)
    assert len(ours) == len(host)


def test_starting_a_pass_draws_nothing_from_the_global_generators() -> None:
    loader = IndexedLoader(DataLoader(Numbers(), batch_size=4, num_workers=1), own_seed=5)
    before = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    loader.start_pass(0)
    list(loader)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert before[2] == random.getstate()


def test_leaves_are_found_below_any_stack_of_wrappers() -> None:
    a, b = Numbers(), Numbers()
    assert list(leaf_datasets(Wrapper(a, Wrapper(b)))) == [a, b]
    assert list(leaf_datasets(a)) == [a]


def test_sample_names() -> None:
    class Named(Numbers):
        def get_data_info(self, index: int) -> dict:
            return {"img_path": f"/data/x/{index}.jpg"}

    assert sample_name(Named(), 3) == "3.jpg"
    assert sample_name(Named(), 3, folders=1) == "x/3.jpg"
    assert sample_name(Numbers(), 3) == ""


def test_iterating_without_a_batch_size_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size=None"):
        IndexedLoader(DataLoader(Numbers(), batch_size=None))
