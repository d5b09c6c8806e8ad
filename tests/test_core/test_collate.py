"""Rows of a batch belong to the samples whose indices stand beside them, or the collate function is refused."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
import random
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence, pad_sequence
from torch.utils.data import DataLoader, Dataset, default_collate, default_convert

from infobatch_mm import keeps_order
from infobatch_mm.core import rng
from infobatch_mm.core.collate import IndexedCollate
from infobatch_mm.core.loader import IndexedItems

LENGTHS = [4, 2, 5, 3, 1, 6]
Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Record:
    x: torch.Tensor
    names: list[str]


def item(index: int, length: int | None = None) -> dict[str, Any]:
    """A sequence of a length of its own, a picture, a label that others share, a name."""
    length = LENGTHS[index % 6] if length is None else length
    drawn = torch.Generator().manual_seed(index)
    return {
        "id": index,
        "tokens": torch.arange(1, length + 1) + 10 * index,
        "image": torch.rand(2, 3, generator=drawn),
        "label": index % 2,
        "name": f"n{index}",
    }


def values(batch: Any) -> Any:
    """A batch in numbers and strings that can be compared."""
    if isinstance(batch, dict):
        return {key: values(value) for key, value in batch.items()}
    if isinstance(batch, (torch.Tensor, np.ndarray)):
        return batch.tolist()
    return [values(value) for value in batch] if isinstance(batch, (list, tuple)) else batch


def items(count: int = 6, first: int = 0) -> list[tuple[int, Any]]:
    return [(100 + index, item(index)) for index in range(first, first + count)]


class Counting:
    """A collate function that counts its calls."""

    def __init__(self, function: Callable[[list], Any]) -> None:
        self.function = function
        self.calls: list[list] = []

    def __call__(self, bare: list) -> Any:
        self.calls.append(bare)
        return self.function(bare)


# ---- functions that keep the order --------------------------------------------------------------------


def padded(bare: list) -> dict[str, Any]:
    tokens = pad_sequence([one["tokens"] for one in bare], batch_first=True)
    return {"tokens": tokens, "mask": tokens > 0, "image": torch.stack([one["image"] for one in bare])}


def padded_time_first(bare: list) -> torch.Tensor:
    return pad_sequence([one["tokens"] for one in bare])


def as_tuple(bare: list) -> tuple:
    return torch.stack([one["image"] for one in bare]), [one["name"] for one in bare]


def as_namedtuple(bare: list) -> Pair:
    return Pair(torch.stack([one["image"] for one in bare]), torch.tensor([one["label"] for one in bare]))


def as_dataclass(bare: list) -> Record:
    return Record(torch.stack([one["image"] for one in bare]), [one["name"] for one in bare])


def as_object(bare: list) -> SimpleNamespace:
    return SimpleNamespace(inner=SimpleNamespace(image=torch.stack([one["image"] for one in bare])), size=len(bare))


def as_numpy(bare: list) -> dict[str, Any]:
    return {"image": np.stack([one["image"].numpy() for one in bare]), "name": np.array([one["name"] for one in bare])}


def as_object_array(bare: list) -> np.ndarray:
    rows = np.empty(len(bare), dtype=object)
    for place, one in enumerate(bare):
        rows[place] = one["tokens"].numpy()
    return rows


def as_lists(bare: list) -> dict[str, list]:
    return {key: [one[key] for one in bare] for key in bare[0]}


def as_list_of_lists(bare: list) -> list:
    return [one["tokens"].tolist() for one in bare]


def as_objects(bare: list) -> list:
    return [SimpleNamespace(**one) for one in bare]


def as_numbers(bare: list) -> list[float]:
    return [float(one["image"].sum()) for one in bare]


def packed(bare: list) -> Any:
    return pack_sequence([one["tokens"] for one in bare], enforce_sorted=False)


def nested(bare: list) -> torch.Tensor:
    return torch.nested.nested_tensor([one["tokens"] for one in bare])


def sparse(bare: list) -> torch.Tensor:
    return torch.stack([one["image"] for one in bare]).to_sparse()


def half(bare: list) -> torch.Tensor:
    return torch.stack([one["image"] for one in bare]).bfloat16()


def less_their_mean(bare: list) -> torch.Tensor:
    """Each row knows of the others by the rounding only."""
    images = torch.stack([one["image"] for one in bare])
    return (images - images.mean(0)) / images.std(0)


def distances(bare: list) -> dict[str, torch.Tensor]:
    images = torch.stack([one["image"].flatten() for one in bare])
    return {"image": images, "between": torch.cdist(images, images)}


def only_distances(bare: list) -> torch.Tensor:
    return distances(bare)["between"]


def with_places(bare: list) -> dict[str, Any]:
    """Places in the batch are of its rows, not of the samples."""
    places = {"row": torch.arange(len(bare)), "called": [f"row {row}" for row in range(len(bare))], "count": len(bare)}
    return {"image": torch.stack([one["image"] for one in bare]), **places}


def boxes(bare: list) -> dict[str, Any]:
    """As detectors want them: one row per box, which says of which image."""
    rows = [
        torch.tensor([[place, one["id"] + k] for k in range(1 + one.get("more", 0))]) for place, one in enumerate(bare)
    ]
    return {"target": torch.cat(rows), "image": torch.stack([one["image"] for one in bare])}


def with_concatenated(bare: list) -> dict[str, Any]:
    return {"tokens": torch.cat([one["tokens"] for one in bare]), "lengths": [len(one["tokens"]) for one in bare]}


def in_place(bare: list) -> dict[str, Any]:
    """Uses its items up: a second call on the same ones fails."""
    for one in bare:
        one["image"].add_(1)
        one["tokens"] = one.pop("tokens").sum()
        del one["name"]
    return default_collate(bare)


def masked(bare: list) -> dict[str, torch.Tensor]:
    """As for masked language models: as many draws as there are tokens, all at once."""
    batch = padded(bare)
    hidden = torch.rand(batch["tokens"].shape) < 0.5
    return {"mask": batch["mask"], "tokens": batch["tokens"].masked_fill(hidden, -1), "noise": torch.rand(len(bare), 3)}


def masked_one_by_one(bare: list) -> dict[str, Any]:
    rows = [[token if random.random() < 0.5 else -1 for token in one["tokens"].tolist()] for one in bare]
    return {"id": [one["id"] for one in bare], "tokens": rows}


def masked_rows(bare: list) -> list[dict[str, Any]]:
    return [{"id": one["id"], "image": one["image"].numpy() * (np.random.rand(2, 3) < 0.5)} for one in bare]


class MaskedByItsOwn:
    """Draws from a generator of its own, and counts its batches."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)
        self.count = 0

    def __call__(self, bare: list) -> dict[str, Any]:
        self.count += 1
        batch = padded(bare)
        batch["image"] = batch["image"] * torch.from_numpy(self.generator.random(batch["image"].shape) < 0.5)
        return {**batch, "count": self.count}


IN_ORDER = [
    *(padded, padded_time_first, as_tuple, as_namedtuple, as_dataclass, as_object, as_numpy, as_object_array, as_lists),
    *(as_list_of_lists, as_objects, as_numbers, packed, nested, sparse, half, less_their_mean, distances),
    *(only_distances, with_places, boxes, with_concatenated, in_place, masked, masked_one_by_one, masked_rows, list),
    MaskedByItsOwn(),
]


@pytest.mark.parametrize("function", IN_ORDER, ids=lambda f: getattr(f, "__name__", type(f).__name__))
@pytest.mark.parametrize("size", [2, 3, 6])
def test_functions_that_keep_the_order_are_followed(function: Callable, size: int):
    collate = IndexedCollate(function)
    for batch in range(9):
        index, _ = collate(items(size, batch * size))
        assert index.dtype == torch.int64
        assert (index - 100).tolist() == list(range(batch * size, (batch + 1) * size))
    assert collate._columns  # it was proven


@pytest.mark.parametrize("size", [1, 2, 6])
def test_the_result_is_handed_through_and_of_the_items_themselves(size: int):
    delivered: list[Any] = []

    def remembered(bare: list) -> Any:
        delivered.append(as_lists(bare))
        return delivered[-1]

    given = items(size)
    _, batch = IndexedCollate(remembered)(given)
    assert batch is delivered[-1]
    assert all(one is two["image"] for one, (_, two) in zip(batch["image"], given, strict=True))


def test_items_are_collated_for_real_once():
    given = items()
    expected = in_place(copy.deepcopy([bare for _, bare in given]))
    _, batch = IndexedCollate(in_place)(given)
    for key, value in expected.items():
        assert torch.equal(batch[key], value)


def test_items_that_cannot_be_copied_are_tried_as_they_are():
    class Lonely:
        def __init__(self, value: int) -> None:
            self.value = value

        def __reduce_ex__(self, protocol: Any) -> Any:
            raise TypeError("one of a kind")

    def in_order(bare: list) -> torch.Tensor:
        return torch.tensor([one.value for one in bare])

    def by_value(bare: list) -> torch.Tensor:
        return in_order(bare).sort().values

    given = [(index, Lonely(value)) for index, value in enumerate([3, 1, 2])]
    assert IndexedCollate(in_order)(given)[1].tolist() == [3, 1, 2]
    with pytest.raises(ValueError, match="reorders"):
        IndexedCollate(by_value)(given)


@pytest.mark.parametrize("function", [padded, masked, masked_one_by_one, masked_rows])
def test_generators_are_left_where_they_were(function: Callable):
    def draws() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    def rounds(collate: Callable) -> Any:
        rng.restore(before)
        batches = [collate(items(6, 6 * number)) for number in range(4)]
        return batches, draws()

    before = rng.capture()
    expected, after = rounds(lambda given: function([bare for _, bare in given]))
    got, after_ours = rounds(IndexedCollate(function))
    assert after == after_ours
    assert values([batch for _, batch in got]) == values(expected)


@pytest.mark.parametrize("held", ["attribute", "closure", "partial", "torch", "random", "method"])
def test_what_a_function_keeps_of_its_own_is_left_where_it_was(held: str):
    def make() -> Callable:
        numpy, torchs, python = np.random.default_rng(0), torch.Generator().manual_seed(0), random.Random(0)

        def by_closure(bare: list) -> dict[str, Any]:
            return {"id": [one["id"] for one in bare], "noise": numpy.random(len(bare))}

        def given(bare: list, *, generator: Any) -> dict[str, Any]:
            return {"id": [one["id"] for one in bare], "noise": draw(generator, len(bare))}

        def draw(generator: Any, count: int) -> list[float]:
            if isinstance(generator, torch.Generator):
                return torch.rand(count, generator=generator).tolist()
            return [generator.random() for _ in range(count)]

        own = MaskedByItsOwn()
        functions: dict[str, Callable] = {
            "attribute": own,
            "method": own.__call__,
            "closure": by_closure,
            "partial": functools.partial(given, generator=numpy),
            "torch": functools.partial(given, generator=torchs),
            "random": functools.partial(given, generator=python),
        }
        return functions[held]

    alone, ours = make(), IndexedCollate(make())
    for number in range(4):
        given = items(6, 6 * number)
        assert values(alone([bare for _, bare in given])) == values(ours(given)[1])


# ---- trust ----------------------------------------------------------------------------------------------


class Tensors(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index])


def trusted_functions() -> list[Callable]:
    functions = [default_collate, default_convert, functools.partial(default_collate)]
    functions.append(DataLoader(Tensors()).collate_fn)
    return functions


@pytest.mark.parametrize("function", trusted_functions())
def test_functions_of_torch_are_trusted(function: Callable, monkeypatch: pytest.MonkeyPatch):
    collate = IndexedCollate(function)
    collate.collate_fn = counting = Counting(function)
    collate([(place, torch.tensor([place])) for place in range(4)])
    assert len(counting.calls) == 1


@pytest.mark.parametrize("arguments", [{}, {"return_tensors": "pt"}])
def test_functions_of_the_hosts_are_trusted(arguments: dict):
    collators = pytest.importorskip("transformers.data.data_collator")
    mmengine = pytest.importorskip("mmengine.dataset")
    functions = [functools.partial(collators.default_data_collator, **arguments), mmengine.pseudo_collate]
    functions += [functools.partial(mmengine.default_collate), collators.DefaultDataCollator()]
    assert all(IndexedCollate(function)._trusted for function in functions)

    class Sorted(collators.DefaultDataCollator):
        def __call__(self, features: list, return_tensors: Any = None) -> Any:
            return super().__call__(sorted(features, key=lambda one: -one["id"]), return_tensors)

    assert not IndexedCollate(Sorted())._trusted
    assert not IndexedCollate(Sorted().__call__)._trusted


def test_what_only_bears_the_name_of_a_trusted_function_is_not_trusted():
    @functools.wraps(default_collate)
    def in_reverse(bare: list) -> Any:
        return default_collate(bare[::-1])

    collate_of_torch = torch.utils.data._utils.collate.collate
    mapped = functools.partial(collate_of_torch, collate_fn_map={int: lambda batch, **_: torch.tensor(sorted(batch))})
    for function in (in_reverse, mapped):
        with pytest.raises(ValueError, match="reorders"):
            IndexedCollate(function)([(place, value) for place, value in enumerate([3, 1, 2, 7])])


class Slotted:
    __slots__ = ()

    def __call__(self, bare: list) -> Any:
        return bare[::-1]

    def method(self, bare: list) -> Any:
        return bare[::-1]


class Plain(Slotted):
    pass


@keeps_order
class Decorated(Slotted):
    pass


@keeps_order
def decorated(bare: list) -> Any:
    return bare[::-1]


@pytest.mark.parametrize(
    "marked",
    [
        decorated,
        functools.partial(decorated),
        functools.partial(keeps_order(lambda bare, extra: bare[::-1]), extra=[]),
        keeps_order(functools.partial(lambda bare, extra: bare[::-1], extra=[])),
        keeps_order(lambda bare: bare[::-1]),
        keeps_order(Slotted()),
        keeps_order(Plain()),
        keeps_order(Slotted().method),
        keeps_order(keeps_order(Slotted().method)),
        keeps_order(list),
        keeps_order(default_collate),
        Decorated(),
    ],
)
def test_a_marked_function_is_trusted(marked: Callable):
    counting = Counting(marked)
    collate = IndexedCollate(marked)
    collate.collate_fn = counting
    index, _ = collate([(1, 1), (2, 2), (3, 3)])
    assert index.tolist() == [1, 2, 3] and len(counting.calls) == 1


def test_marking_leaves_torch_alone_and_a_function_itself():
    assert keeps_order(default_collate) is default_collate and not hasattr(default_collate, "keeps_order")
    assert decorated([1, 2]) == [2, 1] and decorated.keeps_order is True


@pytest.mark.parametrize("function", [decorated, keeps_order(Slotted()), keeps_order(Slotted().method), padded])
def test_collation_survives_pickling(function: Callable):
    collate = pickle.loads(pickle.dumps(IndexedCollate(function)))
    assert collate(items())[0].tolist() == [100, 101, 102, 103, 104, 105]


# ---- reordering and mixing ------------------------------------------------------------------------------


def by_length(bare: list) -> Any:
    return padded(sorted(bare, key=lambda one: len(one["tokens"])))


def by_length_descending(bare: list) -> Any:
    return padded(sorted(bare, key=lambda one: -len(one["tokens"])))


def by_label(bare: list) -> Any:
    """A stable sort."""
    return as_lists(sorted(bare, key=lambda one: one["label"]))


def in_reverse(bare: list) -> Any:
    return as_objects(bare[::-1])


def rotated(bare: list) -> Any:
    return padded_time_first(bare[1:] + bare[:1])


def halves(bare: list) -> Any:
    return as_numpy(bare[::2] + bare[1::2])


def shuffled(bare: list) -> Any:
    return as_tuple(random.sample(bare, len(bare)))


def shuffled_by_torch(bare: list) -> Any:
    return [bare[place]["name"] for place in torch.randperm(len(bare))]


def partly_sorted(bare: list) -> dict[str, Any]:
    """Names stay in their order, so that a look at one leaf would not do."""
    return {"name": [one["name"] for one in bare], "image": by_length(bare)["image"]}


def packed_in_order_of_length(bare: list) -> Any:
    return pack_sequence(sorted([one["tokens"] for one in bare], key=lambda one: -len(one)))


def mixup_of_pairs(bare: list) -> dict[str, Any]:
    images = torch.stack([one["image"] for one in bare])
    return {"image": 0.7 * images + 0.3 * images.flip(0), "label": [one["label"] for one in bare]}


def mixup(bare: list) -> dict[str, Any]:
    """The labels of the samples themselves stay in order."""
    share, other = float(np.random.beta(8, 8)), torch.randperm(len(bare))
    images = torch.stack([one["image"] for one in bare])
    label = torch.tensor([one["id"] for one in bare])
    mixed = share * images + (1 - share) * images[other]
    return {"image": mixed, "label": label, "label_of_other": label[other], "share": share}


class MixupOfItsOwn:
    """Draws where no seed of ours reaches."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def __call__(self, bare: list) -> dict[str, Any]:
        images = np.stack([one["image"] for one in bare])
        other = self.generator.permutation(len(bare))
        share = self.generator.uniform(0.2, 0.8)
        return {"image": share * images + (1 - share) * images[other], "id": [one["id"] for one in bare]}


def shuffled_in_part(bare: list) -> dict[str, Any]:
    return {"name": [one["name"] for one in bare], "image": as_tuple(random.sample(bare, len(bare)))[0]}


OUT_OF_ORDER = [
    *(by_length, by_length_descending, by_label, in_reverse, rotated, halves, shuffled, shuffled_by_torch),
    *(partly_sorted, packed_in_order_of_length, mixup_of_pairs, mixup, MixupOfItsOwn(), shuffled_in_part),
]


def feed(collate: IndexedCollate, size: int, batches: int = 8) -> None:
    for batch in range(batches):
        collate(items(size, batch * size))


@pytest.mark.parametrize("function", OUT_OF_ORDER, ids=lambda f: getattr(f, "__name__", type(f).__name__))
@pytest.mark.parametrize("size", [2, 3, 6, 16])
def test_functions_that_reorder_or_mix_are_refused(function: Callable, size: int):
    if size == 2 and function in (halves, by_label):
        pytest.skip("leaves these samples in order")
    name = getattr(function, "__qualname__", type(function).__qualname__)
    with pytest.raises(ValueError, match=f"the collate function .*{name} (reorders or mixes|draws at random)"):
        feed(IndexedCollate(function), size)


@pytest.mark.parametrize("function", OUT_OF_ORDER, ids=lambda f: getattr(f, "__name__", type(f).__name__))
def test_with_samples_enough_they_are_refused_in_the_first_batch(function: Callable):
    for first in range(0, 80, 16):
        with pytest.raises(ValueError, match="reorders or mixes its samples"):
            IndexedCollate(function)(items(16, first))


def test_every_fixed_order_but_one_is_refused():
    for order in itertools.permutations(range(4)):
        collate = IndexedCollate(lambda bare, order=order: [bare[place] for place in order[: len(bare)]])
        collate = IndexedCollate(functools.partial(_in_order, order=order))
        if order == (0, 1, 2, 3):
            collate(items(4))
        else:
            with pytest.raises(ValueError, match="reorders"):
                collate(items(4))


def _in_order(bare: list, order: tuple[int, ...]) -> Any:
    return as_tuple([bare[place] for place in order if place < len(bare)])


def test_the_message_names_the_function_the_leaf_and_the_way_out():
    with pytest.raises(ValueError) as raised:
        IndexedCollate(functools.partial(by_length))(items())
    message = str(raised.value)
    assert message.startswith(
        f"the collate function {__name__}.by_length reorders or mixes its samples (seen at tokens of what it returns)"
    )
    for way_out in ("sort in the loop, together with the index", "in their order", "keeps_order", "without pruning"):
        assert way_out in message


@pytest.mark.parametrize("lasts", [1, 2, 5, 20])
def test_a_sort_that_changes_nothing_at_first_is_found_later(lasts: int):
    collate = IndexedCollate(by_late_label)

    def batch(number: int) -> list:
        return [(i, {"id": 10 * number + i, "late": i == 0 and number >= lasts}) for i in range(6)]

    with pytest.raises(ValueError, match="reorders"):
        for number in range(2 * lasts + 2):
            collate(batch(number))
    assert number < 2 * lasts + 1


def by_late_label(bare: list) -> Any:
    return [one["id"] for one in sorted(bare, key=lambda one: one["late"])]


def test_equal_rows_prove_nothing_and_the_next_batch_is_tried():
    counting = Counting(lambda bare: torch.tensor(sorted(bare)))
    collate = IndexedCollate(counting)
    for number in range(3):
        index, batch = collate([(0, 7), (1, 7), (2, 7)])
        assert index.tolist() == [0, 1, 2] and batch.tolist() == [7, 7, 7]
        assert len(counting.calls) > 2 * (number + 1)
    with pytest.raises(ValueError, match="reorders"):
        collate([(0, 7), (1, 7), (2, 6)])


def test_rows_some_of_which_are_equal_prove_nothing():
    """Turned by one, labels 0 0 0 1 come as if nothing but the first two had been exchanged for each other."""
    collate = IndexedCollate(lambda bare: [*bare[1:], bare[0]])
    for _ in range(2):
        collate([(0, 0), (1, 0), (2, 0), (3, 1)])
    with pytest.raises(ValueError, match="reorders"):
        collate([(0, 5), (1, 6), (2, 7), (3, 8)])


@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_time_axis_as_long_as_the_batch_is_no_axis_of_it(size: int):
    """Sequences all as long as there are samples; their sums differ, so do their steps."""
    given = [(place, item(place, length=size)) for place in range(size)]

    def time_first(bare: list) -> torch.Tensor:
        return torch.stack([one["tokens"] for one in bare], dim=1)

    def batch_first(bare: list) -> torch.Tensor:
        return torch.stack([one["tokens"] for one in bare])

    for function, axis in ((time_first, 1), (batch_first, 0)):
        collate = IndexedCollate(function)
        collate(given)
        assert [column.axes for column in collate._columns] == [(axis,)]
        with pytest.raises(ValueError, match="reorders"):
            IndexedCollate(lambda bare, function=function: function(bare[::-1]))(given)


def test_a_tuple_as_long_as_the_batch_is_none_of_its_rows():
    collate = IndexedCollate(lambda bare: (as_tuple(bare)[0], torch.tensor([one["label"] for one in bare]), "train"))
    collate(items(3))
    assert collate._columns[0].path == (0,)


def test_boxes_are_told_from_images_in_any_number():
    """One box to each image in the first batch; later as many as there are images, but not one to each."""
    collate = IndexedCollate(boxes)
    collate(items(4))
    for more in ([1, 0, 2, 0], [0, 3, 0, 0], [2, 2, 2, 2], [0, 0, 0, 0], [0, 0, 0, 5]) * 2:
        collate([(place, {**item(place), "more": count}) for place, count in enumerate(more)])
    assert [column.path for column in collate._columns] == [("image",)]


# ---- what cannot be verified ----------------------------------------------------------------------------


def concatenated(bare: list) -> dict[str, Any]:
    tokens = torch.cat([one["tokens"] for one in bare])
    return {"tokens": tokens, "ends": torch.tensor([0] + [len(one["tokens"]) for one in bare]).cumsum(0)}


def all_random(bare: list) -> torch.Tensor:
    return torch.stack([one["image"] for one in bare]) + torch.rand(len(bare), 2, 3)


def total(bare: list) -> float:
    return sum(float(one["image"].sum()) for one in bare)


def only_if_sorted(bare: list) -> Any:
    return pack_sequence([one["tokens"] for one in bare])


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (concatenated, "returns nothing that has one row for each of its samples"),
        (total, "returns nothing that has one row for each of its samples"),
        (lambda bare: None, "returns nothing that has one row for each of its samples"),
        (all_random, "draws at random whatever it returns one row of per sample"),
        (only_if_sorted, r"fails on copies of its samples, repeated or in another order \(RuntimeError\("),
    ],
)
@pytest.mark.parametrize("size", [2, 5])
def test_what_cannot_be_verified_is_refused(function: Callable, reason: str, size: int):
    given = [(place, item(place, length=9 - place)) for place in range(size)]
    with pytest.raises(ValueError, match=f"{reason}.*, so that its order cannot be verified: .*keeps_order"):
        IndexedCollate(function)(given)
    IndexedCollate(keeps_order(lambda bare: function(bare)))(given)


def test_an_error_of_the_users_own_is_raised_as_it_is():
    error = KeyError("no such thing")

    def failing(bare: list) -> Any:
        raise error

    with pytest.raises(KeyError) as raised:
        IndexedCollate(failing)(items())
    assert raised.value is error


# ---- dropping and adding --------------------------------------------------------------------------------


def without_none(bare: list) -> Any:
    return padded([one for one in bare if one is not None])


def without_broken(bare: list) -> Any:
    return padded([one for one in bare if one is not None and len(one["tokens"])])


def without_broken_in_place(bare: list) -> Any:
    return in_place([one for one in bare if one is not None])


def with_marked_none(bare: list) -> Any:
    return {"id": [-1 if one is None else one["id"] for one in bare]}


def filled_up(bare: list) -> Any:
    good = [one for one in bare if one is not None]
    return padded((good * len(bare))[: len(bare)])


def filled_up_at_random(bare: list) -> Any:
    good = [one for one in bare if one is not None]
    return padded([one if one is not None else random.choice(good) for one in bare])


def with_holes(size: int, *holes: int, first: int = 0, hole: Any = None) -> list:
    given = items(size, first)
    return [(index, hole if place in holes else one) for place, (index, one) in enumerate(given)]


BROKEN = {**item(0), "tokens": torch.tensor([], dtype=torch.int64)}


@pytest.mark.parametrize("function", [without_none, without_broken, without_broken_in_place])
@pytest.mark.parametrize("good_batches", [0, 1, 4])
@pytest.mark.parametrize("holes", [(0,), (5,), (1, 2), (0, 1, 2, 4, 5), (0, 1, 2, 3, 4)])
def test_which_are_dropped_is_found_out(function: Callable, good_batches: int, holes: tuple[int, ...]):
    collate = IndexedCollate(function, drops=True)
    for number in range(good_batches):
        assert collate(items(6, number))[0].tolist() == [100 + number + place for place in range(6)]
    index, batch = collate(with_holes(6, *holes))
    assert index.tolist() == [100 + place for place in range(6) if place not in holes]
    assert len(batch["image"]) == len(index)
    assert collate(items(6))[0].tolist() == [100, 101, 102, 103, 104, 105]


@pytest.mark.parametrize("good_batches", [0, 1, 4])
@pytest.mark.parametrize("holes", [(0,), (5,), (1, 2)])
def test_which_broken_ones_are_dropped_is_found_out(good_batches: int, holes: tuple[int, ...]):
    collate = IndexedCollate(without_broken, drops=True)
    for number in range(good_batches):
        collate(items(6, number))
    index, batch = collate(with_holes(6, *holes, hole=BROKEN))
    assert index.tolist() == [100 + place for place in range(6) if place not in holes]
    assert torch.equal(batch["tokens"][:, 0], torch.tensor([1 + 10 * (place - 100) for place in index.tolist()]))


@pytest.mark.parametrize("good_batches", [0, 2])
def test_both_kinds_of_broken_items_are_found_out(good_batches: int):
    collate = IndexedCollate(without_broken, drops=True)
    for number in range(good_batches):
        collate(items(6, number))
    given = with_holes(6, 1)
    given[3] = (103, BROKEN)
    assert collate(given)[0].tolist() == [100, 102, 104, 105]


@pytest.mark.parametrize("good_batches", [0, 1])
def test_a_batch_of_which_nothing_is_left_has_no_rows(good_batches: int):
    collate = IndexedCollate(lambda bare: padded(good) if (good := [one for one in bare if one]) else None, drops=True)
    for number in range(good_batches):
        collate(items(6, number))
    index, batch = collate(with_holes(6, *range(6)))
    assert index.shape == (0,) and index.dtype == torch.int64 and batch is None


def test_a_single_row_may_lose_its_axis():
    collate = IndexedCollate(lambda bare: torch.stack([one["image"] for one in bare]).squeeze())
    collate(items(6))
    assert collate(items(1, 3))[0].tolist() == [103]


def test_rows_that_turn_random_later_are_no_reason_to_stop():
    def now_and_then(bare: list) -> torch.Tensor:
        batch = torch.stack([one["image"] for one in bare])
        return batch + torch.rand(batch.shape) if bare[0]["late"] else batch

    collate = IndexedCollate(now_and_then)
    for number in range(9):
        given = [(index, {**one, "late": number % 2}) for index, one in items(6)]
        assert collate(given)[0].tolist() == [100, 101, 102, 103, 104, 105]


def test_a_last_item_that_is_dropped_leaves_no_row():
    collate = IndexedCollate(lambda bare: [one for one in bare if one is not None], drops=True)
    collate(items(6))
    assert collate([(7, None)])[0].tolist() == []


@pytest.mark.parametrize("size", [2, 6])
@pytest.mark.parametrize("good_batches", [0, 1, 5])
def test_dropping_is_refused_where_samples_are_counted(size: int, good_batches: int):
    collate = IndexedCollate(without_none)
    for number in range(good_batches):
        collate(items(size, number))
    finding = f"without_none returned {size - 1} rows for {size} samples: return one row for each item"
    with pytest.raises(ValueError, match=finding):
        collate(with_holes(size, 1))


@pytest.mark.parametrize("size", [2, 6])
@pytest.mark.parametrize("good_batches", [0, 1, 2])
def test_dropping_broken_ones_is_refused_where_samples_are_counted(size: int, good_batches: int):
    collate = IndexedCollate(without_broken)
    for number in range(good_batches):
        collate(items(size, number))
    with pytest.raises(ValueError, match=f"returned {size - 1} rows for {size} samples"):
        collate(with_holes(size, 1, hole=BROKEN))


def without_longest(bare: list) -> Any:
    """Without it, another one would be the longest."""
    longest = max(len(one["tokens"]) for one in bare)
    return padded([one for one in bare if len(one["tokens"]) < longest] if longest > 6 else bare)


def without_some(bare: list) -> Any:
    return padded([one for one in bare if one["id"] < 6 or random.random() < 0.5])


def used_up(bare: list) -> Any:
    return in_place([one for one in bare if one["id"] < 6])


def without_one_of_two(bare: list) -> Any:
    """The first or the second, by one coin for the batch."""
    coin = random.random() < 0.5
    return as_lists([one for one in bare if one["id"] % 6 != coin or one["id"] < 6])


@pytest.mark.parametrize("good_batches", [0, 1, 2])
def test_an_item_dropped_at_random_is_never_taken_for_another(good_batches: int):
    """Found before a batch that is tried anyway, or after one that is not."""
    refused = 0
    for number in range(40):
        collate = IndexedCollate(without_one_of_two, drops=True)
        for _ in range(good_batches):
            collate(items(6))
        try:
            index, batch = collate(items(6, 6 + 6 * number))
        except ValueError:
            refused += 1
        else:
            assert batch["id"] == [row - 100 for row in index.tolist()]
    assert refused > 10


@pytest.mark.parametrize("function", [without_longest, without_some, used_up])
def test_what_cannot_be_made_out_is_refused(function: Callable):
    collate = IndexedCollate(function, drops=True)
    for _ in range(3):
        collate(items(6))
    given = [(place, item(place + 4, length=5 + place)) for place in range(6)]
    with pytest.raises(ValueError, match=r"returned \d rows for 6 samples, and which it dropped cannot be made out"):
        for _ in range(9):
            collate([(index, dict(bare)) for index, bare in given])


def without_many(bare: list) -> Any:
    return all_random([bare[0]] + [one for one in bare[1:] if random.random() < 0.5])


def without_repetitions(bare: list) -> Any:
    return padded(list({one["id"]: one for one in bare}.values()))


@pytest.mark.parametrize("function", [by_length, without_longest, without_repetitions, without_many])
def test_dropping_and_reordering_is_refused_at_once(function: Callable):
    given = [(place, item(place, length=9 - place)) for place in range(6)]
    with pytest.raises(ValueError, match=f"the collate function .*{function.__name__}"):
        IndexedCollate(function, drops=True)(given)


def test_a_sort_of_what_is_left_is_refused():
    def left(bare: list) -> Any:
        return by_length([one for one in bare if one is not None])

    with pytest.raises(ValueError, match="reorders"):
        IndexedCollate(left, drops=True)(with_holes(6, 2))


@pytest.mark.parametrize("function", [filled_up, filled_up_at_random])
@pytest.mark.parametrize("good_batches", [0, 1, 2, 4])
@pytest.mark.parametrize("drops", [True, False])
def test_filling_up_for_broken_items_is_refused(function: Callable, good_batches: int, drops: bool):
    collate = IndexedCollate(function, drops)
    for number in range(good_batches):
        collate(items(6, number))
    with pytest.raises(ValueError, match=r"reorders or mixes|draws at random"):
        collate(with_holes(6, 1))


@pytest.mark.parametrize("good_batches", [0, 1, 2])
def test_a_row_for_a_broken_item_is_a_row(good_batches: int):
    collate = IndexedCollate(with_marked_none, drops=True)
    for number in range(good_batches):
        collate(items(6, number))
    index, batch = collate(with_holes(6, 1))
    assert index.tolist() == [100, 101, 102, 103, 104, 105] and batch["id"][1] == -1


def two_crops(bare: list) -> torch.Tensor:
    return torch.cat([torch.stack([one["image"][:, part] for one in bare]) for part in (0, 1)])


def two_crops_in_turn(bare: list) -> list:
    return [one["image"][:, part] for one in bare for part in (0, 1)]


@pytest.mark.parametrize("function", [two_crops, two_crops_in_turn])
@pytest.mark.parametrize("drops", [True, False])
@pytest.mark.parametrize("size", [2, 6])
def test_adding_samples_is_refused(function: Callable, drops: bool, size: int):
    finding = f"{function.__name__} returned {2 * size} rows for {size} samples: return one row for each item"
    with pytest.raises(ValueError, match=finding):
        IndexedCollate(function, drops)(items(size))


def test_adding_samples_later_is_refused():
    collate = IndexedCollate(lambda bare: as_tuple(bare if bare[0]["id"] < 7 else bare + bare[:1]), drops=True)
    for number in range(3):
        collate(items(6, number))
    with pytest.raises(ValueError, match="returned 7 rows for 6 samples"):
        collate(items(6, 12))


def test_batches_of_another_kind_are_proven_as_well():
    def by_turns(bare: list) -> Any:
        is_odd = max(one["id"] for one in bare) // 6 % 2
        return {"odd": as_tuple(bare)[0]} if is_odd else {"even": by_length(bare)["image"]}

    collate = IndexedCollate(by_turns)
    collate(items(6, 6))
    with pytest.raises(ValueError, match=r"reorders or mixes its samples \(seen at even of"):
        for number in range(2, 6):
            collate(items(6, 6 * number))


# ---- what it costs --------------------------------------------------------------------------------------


def test_batches_of_two_kinds_may_take_turns():
    collate = IndexedCollate(lambda bare: {("odd", "even")[bare[0] % 2]: torch.tensor(bare)})
    for number in range(12):
        assert collate([(row, 2 * row + number % 2) for row in range(6)])[0].tolist() == list(range(6))


def extra_calls(function: Callable, batches: int, size: int = 6) -> int:
    counting = Counting(function)
    collate = IndexedCollate(counting)
    for number in range(batches):
        collate(items(size, number))
    return len(counting.calls) - batches


@pytest.mark.parametrize("function", [padded, masked])
def test_trials_become_exponentially_rare(function: Callable):
    first = extra_calls(function, 1)
    assert first <= 14
    for exponent in range(1, 9):
        calls = {extra_calls(function, batches) for batches in (2**exponent, 2 ** (exponent + 1) - 1)}
        assert calls == {first + 3 * exponent}


def test_batches_of_one_item_cost_nothing():
    assert extra_calls(padded, 20, size=1) == 0


# ---- in loaders -----------------------------------------------------------------------------------------


class Sequences(Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Any]:
        return item(index)


WORKERS = [(0, None, False), (2, "fork", False), (2, "fork", True), (1, "spawn", False)]


def loader(function: Callable, workers: int, context: str | None, persistent: bool, drops: bool = False) -> DataLoader:
    return DataLoader(
        IndexedItems(Sequences()), 6, collate_fn=IndexedCollate(function, drops), num_workers=workers,
        multiprocessing_context=context, persistent_workers=persistent,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("workers", "context", "persistent"), [*WORKERS[:2], pytest.param(*WORKERS[3], marks=pytest.mark.slow)]
)
def test_sorting_is_refused_in_workers_too(workers: int, context: str | None, persistent: bool):
    with pytest.raises(ValueError, match="by_length reorders"):
        list(loader(by_length, workers, context, persistent))


@pytest.mark.parametrize(
    ("function", "workers", "context", "persistent"),
    [
        *((masked, *workers) for workers in (WORKERS[0], *WORKERS[2:])),
        *((decorated, *workers) for workers in WORKERS[:3]),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((masked, *WORKERS[1]), (decorated, *WORKERS[3]))),
    ],
)
def test_order_is_kept_in_workers_too(function: Callable, workers: int, context: str | None, persistent: bool):
    walked = loader(function, workers, context, persistent)
    for _ in range(2):
        assert torch.cat([index for index, _ in walked]).tolist() == list(range(24))


# ---- items of a batch at once ---------------------------------------------------------------------------


class AtOnce(Sequences):
    """Reads the items of a batch in one go."""

    def __init__(self, missing: int = 0) -> None:
        self.asked: list[list[int]] = []
        self.missing = missing

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("asked for one item")

    def __getitems__(self, indices: list[int]) -> list:
        assert all(type(index) is int for index in indices)
        self.asked.append(indices)
        return [item(index) for index in indices][self.missing :]


def test_a_data_set_that_reads_batches_is_asked_for_batches():
    dataset = AtOnce()
    subset = torch.utils.data.Subset(dataset, range(23, -1, -1))
    walked = DataLoader(IndexedItems(subset), 6, collate_fn=IndexedCollate(padded))
    assert torch.cat([index for index, _ in walked]).tolist() == list(range(24))
    assert dataset.asked == [list(range(23 - 6 * batch, 17 - 6 * batch, -1)) for batch in range(4)]


def test_padding_is_read_as_the_sample_that_it_repeats():
    dataset = AtOnce()
    assert [(index, bare["id"]) for index, bare in IndexedItems(dataset).__getitems__([3, -1, -8])] == [
        (3, 3),
        (-1, 0),
        (-8, 7),
    ]
    assert dataset.asked == [[3, 0, 7]]
    assert [index for index, _ in IndexedItems(Sequences()).__getitems__([3, -1])] == [3, -1]


def test_items_with_seeds_are_read_one_by_one():
    from infobatch_mm.core.sampler import SeededIndex

    class Both(AtOnce):
        def __getitem__(self, index: int) -> Any:
            return {"id": index, "noise": random.random()}

    dataset = Both()
    one, two = ([IndexedItems(dataset).__getitems__([SeededIndex(4, (1, 2, n)), 5])[0]] for n in (3, 3))
    assert one == two and not dataset.asked and type(one[0][0]) is int


def test_a_batch_of_too_few_items_is_refused():
    with pytest.raises(ValueError, match=r"AtOnce\.__getitems__ gave 3 items for 4 indices"):
        IndexedItems(AtOnce(missing=1)).__getitems__([0, 1, 2, 3])


def test_prior_preservation_is_told_how_to_go_on():
    def collate(items: list) -> torch.Tensor:
        return torch.tensor([*items, *(100 + item for item in items)])

    wrapped = IndexedCollate(collate)
    with pytest.raises(ValueError, match=r"4 rows for 2 samples.*first 2 rows .* prior preservation.*keeps_order"):
        wrapped([(0, 0), (1, 1)])
    index, batch = IndexedCollate(keeps_order(collate))([(0, 0), (1, 1)])
    assert index.tolist() == [0, 1] and batch.tolist() == [0, 1, 100, 101]
