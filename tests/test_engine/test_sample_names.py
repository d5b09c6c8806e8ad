"""Names of samples, and the fingerprint that tells data sets apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("mmengine")

from mmengine.dataset import BaseDataset, ClassBalancedDataset, ConcatDataset, RepeatDataset

from infobatch_mm.engine.sample_names import fingerprint, names_at, names_in_chunks, sample_name


class Images(BaseDataset):
    """Images ``/data/<folder>/<number>.jpg``; one of them may be another."""

    def __init__(self, length: int, folder: str = "a", replaced: int | None = None, **kwargs: Any) -> None:
        self.length, self.folder, self.replaced = length, folder, replaced
        super().__init__(**kwargs)

    def load_data_list(self) -> list[dict]:
        return [
            {"img_path": f"/data/{self.folder}/{'other' if i == self.replaced else i}.jpg", "label": i % 3}
            for i in range(self.length)
        ]

    def get_cat_ids(self, idx: int) -> list[int]:
        return [0 if idx == 1 else 1]


class OwnInfo(Images):
    """Says another name than its list."""

    def get_data_info(self, idx: int) -> dict:
        return {"img_path": f"/own/{'other' if idx == self.replaced else idx}.png"}


class Nameless(Images):
    def get_data_info(self, idx: int) -> dict:
        raise KeyError("no paths here")


@pytest.mark.parametrize("length", [1, 3, 22, 255, 256, 300])
def test_one_replaced_image_gives_another_fingerprint(length: int) -> None:
    before = fingerprint(Images(length, serialize_data=False))
    assert before == fingerprint(Images(length, serialize_data=True))
    changed = {fingerprint(Images(length, replaced=i, serialize_data=False)) for i in range(length)}
    assert before not in changed
    assert len(changed) == length


def test_of_a_data_set_that_may_open_files_few_names_are_asked() -> None:
    class Counted(OwnInfo):
        asked = 0

        def get_data_info(self, idx: int) -> dict:
            type(self).asked += 1
            return super().get_data_info(idx)

    fingerprint(Counted(1000))
    assert 200 < Counted.asked <= 256
    # all of them where they are not more
    assert len({fingerprint(OwnInfo(256, replaced=i)) for i in (None, 0, 1, 100, 255)}) == 5


def test_equal_names_in_another_order_give_another_fingerprint() -> None:
    shuffled = Images(10, indices=[1, 0, *range(2, 10)])
    assert fingerprint(Images(10)) != fingerprint(shuffled)


STACKS = {
    "plain": lambda: Images(7),
    "not serialized": lambda: Images(7, serialize_data=False),
    "not yet loaded": lambda: Images(7, lazy_init=True),
    "a part": lambda: Images(7, indices=[5, 2]),
    "own info": lambda: OwnInfo(4),
    "repeated": lambda: RepeatDataset(Images(3), times=4),
    "repeated twice over": lambda: RepeatDataset(dict(type=RepeatDataset, dataset=Images(3), times=2), times=2),
    "concatenated": lambda: ConcatDataset([Images(3, "a"), Images(2, "b", serialize_data=False), Images(4, "c")]),
    "with one that answers itself": lambda: ConcatDataset([Images(3), OwnInfo(2)]),
    "the same twice": lambda: ConcatDataset([shared := Images(3), shared]),
    "balanced": lambda: ClassBalancedDataset(Images(7), 0.5),
    "nameless": lambda: Nameless(3),
}


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("folders", [0, 1])
def test_many_names_are_those_of_one_at_a_time(stack: str, folders: int) -> None:
    dataset = STACKS[stack]()
    one_by_one = [sample_name(dataset, i, folders) for i in range(len(dataset))]
    order = np.random.default_rng(0).permutation(len(dataset))
    assert names_at(dataset, np.arange(len(dataset)), folders) == one_by_one
    assert names_at(dataset, order, folders) == [one_by_one[i] for i in order]


def test_names_come_in_chunks() -> None:
    chunks = names_in_chunks(ConcatDataset([Images(3, "a"), Images(4, "b")]), size=2)
    assert chunks is not None
    assert list(chunks) == [["a/0.jpg", "a/1.jpg"], ["a/2.jpg", "b/0.jpg"], ["b/1.jpg", "b/2.jpg"], ["b/3.jpg"]]
    first = names_in_chunks(RepeatDataset(Images(3), times=9), size=2, folders=0, length=3)
    assert first is not None
    assert list(first) == [["0.jpg", "1.jpg"], ["2.jpg"]]
    assert names_in_chunks(Nameless(3)) is None
    assert fingerprint(Nameless(3)) == ""


def test_in_bulk_no_info_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call per sample is what takes minutes for 10**8 of them."""
    dataset = RepeatDataset(Images(100), times=2)
    calls: list[int] = []
    chunks = names_in_chunks(dataset)
    monkeypatch.setattr(Images, "__getattribute__", noting(calls), raising=False)
    assert chunks is not None
    assert sum(map(len, chunks)) == 200
    assert "get_data_info" not in calls


def noting(calls: list[Any]) -> Any:
    def getattribute(self: Any, name: str) -> Any:
        calls.append(name)
        return object.__getattribute__(self, name)

    return getattribute
