"""Two processes: what they exchange, and that together they do what one would.

The processes start once for the whole file and write down what they saw; the tests read it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from launching import meeting, on_ranks
from reference import ReferenceRun
from torch.utils.data import DataLoader, TensorDataset

from infobatch_mm import InfoBatch
from infobatch_mm.core import ScoreStore
from infobatch_mm.core.distributed import all_gather_ragged, rank, world_size

pytestmark = pytest.mark.dist

WORLD = 2
#: name: (num_samples, global batch_size given to InfoBatch or None, batch size of each rank's loader)
RUNS = {"odd": (11, 4, 2), "even": (24, 4, 2), "free": (11, None, 2), "one": (3, None, 4)}
EPOCHS, DELTA = 5, 0.8
STATE_AFTER = (2, 2)  # epoch and batches of the "even" run at which a state is taken
GATHERED = {
    "ragged": ([2**24 + 1, 2**53 + 1, -5], [7]),
    "one empty": ([], [2**24 + 3, 2**24 + 5]),
    "other empty": ([2**62], []),
    "all empty": ([], []),
}
DTYPES = [
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.bool,
]


def losses_of(index: torch.Tensor, epoch: int) -> torch.Tensor:
    index = torch.where(index < 0, -1 - index, index)
    return ((index * 7919 + epoch * 104729 + 13) % 1009).float() / 1009 + 0.01


def train(name: str, world: int, states: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """One training of ``RUNS`` on this process; answers one entry per epoch."""
    num_samples, batch_size, per_rank = RUNS[name]
    infobatch = InfoBatch(num_samples, EPOCHS, 0.5, DELTA, seed=5, batch_size=batch_size)
    dataset = infobatch.attach(TensorDataset(torch.arange(num_samples)))
    loader = DataLoader(dataset, per_rank * WORLD // world, sampler=infobatch.sampler)
    seen = []
    for epoch in range(EPOCHS):
        entry: dict[str, Any] = {"len": len(loader), "steps": []}
        for step, (index, (item,)) in enumerate(loader, 1):
            assert torch.equal(item, torch.where(index < 0, -1 - index, index))
            losses = losses_of(index, epoch).requires_grad_()
            weighted = infobatch.weigh(losses, index)
            weighted.backward()
            entry["steps"].append({"index": index.tolist(), "loss": weighted.item(), "grad": losses.grad.tolist()})
            if states is not None and (epoch, step) == STATE_AFTER:
                states["midway"] = infobatch.state_dict()
        infobatch.merge()  # of a loader of the user's, a pass is booked here, or where the next one begins
        entry["summary"] = infobatch.summary()
        state = infobatch.state_dict()
        entry["scores"], entry["times_seen"], entry["unmerged"] = (
            state["scores"],
            state["times_seen"],
            state["unmerged"],
        )
        seen.append(entry)
    return seen


def merged_stores(me: int, score_ema: float = 0.0) -> list[dict[str, Any]]:
    """A store that both ranks write to, looked at after every merge."""
    store, looks = ScoreStore(8, score_ema), []

    def look() -> None:
        looks.append({"values": store.values.clone(), "times": store.times_seen.clone(), "unmerged": store.unmerged})

    # Sample 2 is visited on both ranks, sample 0 twice on rank 0, sample 5 has no finite loss.
    if me == 0:
        store.record(torch.tensor([0, 2, 0]), torch.tensor([1.0, 2.0, 3.0]))
    else:
        store.record(torch.tensor([2, 5]), torch.tensor([4.0, float("nan")]))
        store.record(torch.tensor([7]), torch.tensor([5.0]))
    store.flush()
    look()
    for _ in range(3):
        store.merge()
        look()
    if me == 0:  # the other rank has nothing to tell this time
        store.record(torch.tensor([2, 7]), torch.tensor([6.0, 7.0]))
    store.merge()
    look()
    store.merge()
    look()
    return looks


def levelled_store(me: int | None) -> dict[str, Any]:
    """Scores by noise level of visits that two ranks share, or of all where one process makes them."""
    store, looks = ScoreStore(20, 0.5, "timestep"), []
    for current in range(3):
        index = torch.randperm(20, generator=torch.Generator().manual_seed(current))[:15]
        for step, batch in enumerate(index.split(2)):
            if me in (None, step % WORLD):
                store.record(batch, losses_of(batch, current), log_snr=losses_of(batch, current + 9) * 10)
                store.flush()
            if step == 2:
                looks.append(store.unmerged)
                store.merge()
                looks.append(store.unmerged)
        store.merge()
        store.settle()
    return {"values": store.values, "times": store.times_seen, "unmerged": looks}


def one_process(me: int, folder: str) -> None:
    with meeting(folder, me, WORLD):
        torch.save(what_is_seen(me), Path(folder) / f"{me}.pt")


def what_is_seen(me: int) -> dict[str, Any]:
    states: dict[str, Any] = {}
    seen: dict[str, Any] = {"place": (rank(), world_size()), "states": states}
    seen["gathered"] = {key: all_gather_ragged(torch.tensor(v[me], dtype=torch.int64)) for key, v in GATHERED.items()}
    seen["dtypes"] = [all_gather_ragged(torch.ones(me + 1).to(dtype)) for dtype in DTYPES]
    seen["merged"] = merged_stores(me)
    seen["averaged"] = merged_stores(me, score_ema=0.5)
    seen["levelled"] = levelled_store(me)
    for name in RUNS:
        seen[name] = train(name, WORLD, states if name == "even" else None)
    try:
        InfoBatch(10, 2, batch_size=5)
        seen["refused"] = ""
    except ValueError as error:
        seen["refused"] = str(error)
    return seen


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(WORLD, one_process, str(folder))
    return [torch.load(folder / f"{me}.pt", weights_only=True) for me in range(WORLD)]


def test_rank_and_world_size_are_known(ranks: list[dict[str, Any]]):
    assert [seen["place"] for seen in ranks] == [(0, 2), (1, 2)]
    assert (rank(), world_size()) == (0, 1)  # here nothing is initialised


@pytest.mark.parametrize("key", list(GATHERED))
def test_ragged_gather_keeps_large_integers_exactly(ranks: list[dict[str, Any]], key: str):
    for seen in ranks:
        assert [part.tolist() for part in seen["gathered"][key]] == list(GATHERED[key])
        assert all(part.dtype == torch.int64 for part in seen["gathered"][key])


def test_ragged_gather_keeps_the_dtype(ranks: list[dict[str, Any]]):
    for seen in ranks:
        for dtype, parts in zip(DTYPES, seen["dtypes"], strict=True):
            assert [part.dtype for part in parts] == [dtype] * 2
            assert [part.tolist() for part in parts] == [[1], [1, 1]]


def test_gather_in_one_process_is_the_tensor_itself():
    tensor = torch.tensor([2**24 + 1])
    assert all_gather_ragged(tensor)[0] is tensor


def test_merge_gives_all_ranks_equal_scores_and_is_idempotent(ranks: list[dict[str, Any]]):
    first, second = (seen["merged"] for seen in ranks)
    assert not torch.equal(first[0]["values"], second[0]["values"])  # before
    assert first[0]["unmerged"] and second[0]["unmerged"]
    for look in first[1:4] + second[1:4]:
        assert look["values"].tolist() == [3.0, 0, 4.0, 0, 0, 0, 0, 5.0]
        assert look["times"].tolist() == [2, 0, 2, 0, 0, 0, 0, 1]
        assert not look["unmerged"]
    for look in first[4:] + second[4:]:
        assert look["values"].tolist() == [3.0, 0, 6.0, 0, 0, 0, 0, 7.0]
        assert look["times"].tolist() == [2, 0, 3, 0, 0, 0, 0, 2]


def test_merged_averages_count_every_visit_once(ranks: list[dict[str, Any]]):
    first, second = (seen["averaged"] for seen in ranks)
    assert first[0]["values"][2] == 2.0 and second[0]["values"][2] == 4.0  # before
    for look in first[1:4] + second[1:4]:
        twin = [(0.5 * 1 + 3) / 1.5, 0, (0.5 * 2 + 4) / 1.5, 0, 0, 0, 0, 5]
        assert look["values"].tolist() == pytest.approx(twin)
        assert look["times"].tolist() == [2, 0, 2, 0, 0, 0, 0, 1]
    for look in first[4:] + second[4:]:
        twin = [(0.5 * 1 + 3) / 1.5, 0, (0.25 * 2 + 0.5 * 4 + 6) / 1.75, 0, 0, 0, 0, (0.5 * 5 + 7) / 1.5]
        assert look["values"].tolist() == pytest.approx(twin)


def test_scores_by_noise_level_are_those_of_one_process_to_the_bit(ranks: list[dict[str, Any]]):
    alone = levelled_store(None)
    for seen in ranks:
        assert torch.equal(seen["levelled"]["values"], alone["values"])
        assert torch.equal(seen["levelled"]["times"], alone["times"])
        assert seen["levelled"]["unmerged"] == [True, False] * 3
    assert alone["unmerged"] == [False] * 6


@pytest.mark.parametrize("name", list(RUNS))
def test_ranks_do_equal_numbers_of_steps(ranks: list[dict[str, Any]], name: str):
    for first, second in zip(ranks[0][name], ranks[1][name], strict=True):
        assert first["len"] == second["len"] == len(first["steps"]) == len(second["steps"])
        for ours, theirs in zip(first["steps"], second["steps"], strict=True):
            assert len(ours["index"]) == len(theirs["index"])


@pytest.mark.parametrize("name", list(RUNS))
def test_every_sample_of_a_plan_is_visited_once_and_padding_weighs_nothing(ranks: list[dict[str, Any]], name: str):
    num_samples, batch_size, _ = RUNS[name]
    twin = ReferenceRun(num_samples, EPOCHS, 0.5, DELTA, batch_size or WORLD)
    pruned = padded = 0
    for epoch in range(EPOCHS):
        weights: dict[int, float] = {}
        for step in range(ranks[0][name][epoch]["len"]):
            both = [seen[name][epoch]["steps"][step] for seen in ranks]
            visits = [(i, g) for entry in both for i, g in zip(entry["index"], entry["grad"], strict=True)]
            real = [(i, g) for i, g in visits if i >= 0]
            assert all(g == 0 for i, g in visits if i < 0)
            padded += len(visits) - len(real)
            for index, grad in real:
                assert index not in weights
                # The mean over ranks is the mean over the real visits: d/d loss = gamma / real, on each rank x world.
                weights[index] = grad * len(real) / WORLD
        pruned += twin.prunes()
        if twin.prunes():
            assert all(i >= 0 for seen in ranks for entry in seen[name][epoch]["steps"] for i in entry["index"])
        assert weights == pytest.approx(twin.weights(list(weights)), rel=1e-5)
        twin.finish(list(weights), losses_of(torch.tensor(list(weights)), epoch).tolist())
    assert padded == (0 if num_samples % 2 == 0 else EPOCHS - pruned)
    assert pruned or name == "one"


@pytest.mark.parametrize("name", list(RUNS))
def test_after_a_pass_all_ranks_hold_equal_scores_and_books(ranks: list[dict[str, Any]], name: str):
    for first, second in zip(ranks[0][name], ranks[1][name], strict=True):
        assert torch.equal(first["scores"], second["scores"])
        assert torch.equal(first["times_seen"], second["times_seen"])
        assert not first["unmerged"] and not second["unmerged"]
        assert first["summary"]["per_pass"] == second["summary"]["per_pass"]
        assert first["summary"]["visits"] == second["summary"]["visits"] == int(first["times_seen"].sum())


@pytest.mark.parametrize("name", ["odd", "even"])
def test_two_processes_together_equal_one(ranks: list[dict[str, Any]], name: str):
    # With the same global batch: the same visits, and the mean over ranks of loss and gradient is the one process's.
    for epoch, alone in enumerate(train(name, 1)):
        assert alone["len"] == ranks[0][name][epoch]["len"]
        for step, single in enumerate(alone["steps"]):
            both = [seen[name][epoch]["steps"][step] for seen in ranks]
            assert sum(entry["loss"] for entry in both) / 2 == pytest.approx(single["loss"], rel=1e-6)
            expected = dict(zip(single["index"], single["grad"], strict=True))
            pairs = [(i, g / 2) for entry in both for i, g in zip(entry["index"], entry["grad"], strict=True)]
            assert {i: g for i, g in pairs if i >= 0} == pytest.approx(expected, rel=1e-6)
        assert torch.equal(alone["scores"], ranks[0][name][epoch]["scores"])


def test_state_taken_midway_says_that_it_is_not_merged(ranks: list[dict[str, Any]]):
    assert all(seen["states"]["midway"]["unmerged"] for seen in ranks)


def test_state_of_two_processes_continues_in_one(ranks: list[dict[str, Any]]):
    num_samples, batch_size, _ = RUNS["even"]
    epoch, done = STATE_AFTER
    resumed = InfoBatch(num_samples, EPOCHS, 0.5, DELTA, seed=5, batch_size=batch_size)
    resumed.load_state_dict(ranks[0]["states"]["midway"])
    rest = {i for seen in ranks for entry in seen["even"][epoch]["steps"][done:] for i in entry["index"]}
    walked = list(resumed.sampler)
    assert len(walked) == len(rest) > 0 and set(walked) == rest


def test_global_batch_that_does_not_divide_is_refused_with_both_numbers(ranks: list[dict[str, Any]]):
    for seen in ranks:
        assert "batch_size=5" in seen["refused"] and "2 processes" in seen["refused"]
