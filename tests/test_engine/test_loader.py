"""Batches that know their indices."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

pytest.importorskip("mmengine")

from infobatch_mm.core.sampler import SeededIndex
from infobatch_mm.engine.loader import IndexedDataset, IndexedLoader
from infobatch_mm.engine.repeats import leaf_datasets
from infobatch_mm.engine.sample_names import sample_name


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


@pytest.mark.parametrize(
    ("workers", "context"), [(0, None), (2, "fork"), pytest.param(1, "spawn", marks=pytest.mark.slow)]
)
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


class AtOnce(Dataset):
    """Reads the items of a batch in one go, and counts how often."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        return 100 + index

    def __getitems__(self, indices: list[int]) -> list[int]:
        self.asked.append(indices)
        return [100 + index for index in indices]


def test_a_data_set_that_reads_batches_is_asked_for_batches() -> None:
    dataset = AtOnce()
    host = DataLoader(Subset(dataset, range(9, -1, -1)), batch_size=4)
    ours = IndexedLoader(host)
    seen = [(batch.tolist(), ours.current.indices.tolist(), ours.current.replaced.tolist()) for batch in ours]
    assert dataset.asked == [[9, 8, 7, 6], [5, 4, 3, 2], [1, 0]]
    assert seen[0] == ([109, 108, 107, 106], [0, 1, 2, 3], [False] * 4)


def test_items_that_may_be_replaced_or_have_seeds_are_read_one_by_one() -> None:
    class Replacing(AtOnce):
        def _rand_another(self) -> int:
            return 105

        def __getitem__(self, index: int) -> int:
            return self._rand_another() if index == 4 else 100 + index

    for dataset, indices, expected in [
        (Replacing(), [3, 4], [(3, False, 103), (4, True, 105)]),
        (AtOnce(), [3, SeededIndex(4, (1, 2, 3))], [(3, False, 103), (4, False, 104)]),
    ]:
        assert IndexedDataset(dataset).__getitems__(indices) == expected
        assert not dataset.asked


def from_the_largest(items: list[int]) -> torch.Tensor:
    return default_collate(sorted(items, reverse=True))


def without_the_fifth(items: list[int]) -> torch.Tensor:
    return default_collate([item for item in items if item != 105])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("collate_fn", "message"),
    [
        (from_the_largest, "from_the_largest reorders or mixes its samples"),
        (without_the_fifth, "without_the_fifth returned 3 rows for 4 samples"),
    ],
)
def test_batches_in_another_order_or_number_are_refused(collate_fn: Any, message: str, workers: int) -> None:
    host = DataLoader(Numbers(), batch_size=4, num_workers=workers, collate_fn=collate_fn)
    with pytest.raises(ValueError, match=message):
        list(IndexedLoader(host))


def test_the_hosts_collation_stays_at_hand() -> None:
    assert IndexedLoader(DataLoader(Numbers(), collate_fn=from_the_largest)).host_collate_fn is from_the_largest


def test_a_run_is_refused_whose_collate_function_sorts(scenes: Path, tmp_path: Path) -> None:
    pytest.importorskip("mmseg")
    from mmengine.dataset import pseudo_collate
    from mmengine.registry import FUNCTIONS

    from .toy import config, train

    @FUNCTIONS.register_module(force=True)
    def by_name(items: list[dict]) -> dict:
        return pseudo_collate(sorted(items, key=lambda item: item["data_samples"].img_path))

    @FUNCTIONS.register_module(force=True)
    def in_order(items: list[dict]) -> dict:
        return pseudo_collate(items)

    def run(collate: str) -> Any:
        overrides = {"train_cfg.max_iters": 12, "train_dataloader.collate_fn": dict(type=collate)}
        return train(config(scenes, tmp_path / collate, **overrides))[1]

    with pytest.raises(ValueError, match="by_name reorders or mixes its samples"):
        run("by_name")
    twin, ours = run("pseudo_collate"), run("in_order")
    assert ours.indices == twin.indices and ours.losses == twin.losses and ours.pixels == twin.pixels


def test_indices_are_on_the_cpu_whatever_the_default_device_is() -> None:
    collate = IndexedLoader(DataLoader(Numbers(), batch_size=4)).collate_fn
    with torch.device("meta"):
        (indices, replaced), _ = collate([(3, False, torch.ones(1)), (4, True, torch.ones(1))])
    assert (indices.device.type, indices.tolist(), replaced.tolist()) == ("cpu", [3, 4], [False, True])


def test_one_object_twice_is_watched_once() -> None:
    numbers = Numbers(broken=4)
    indexed = IndexedDataset(Wrapper(numbers, numbers))
    assert indexed.__getitems__([4, 3]) == [(4, True, 105), (3, False, 103)]
    assert "_rand_another" not in vars(numbers)
    numbers._rand_another = mine = lambda: 107  # type: ignore[method-assign]
    assert indexed.__getitems__([4]) == [(4, True, 107)]
    assert vars(numbers)["_rand_another"] is mine


def test_watched_repeats_are_told_by_the_index_of_their_unit() -> None:
    indexed = IndexedDataset(Numbers(), num_units=4)
    assert indexed.__getitems__([3, 4, 9]) == [(3, False, 103), (0, False, 104), (1, False, 109)]
    assert pickle.loads(pickle.dumps(indexed)).__getitems__([9]) == [(1, False, 109)]
