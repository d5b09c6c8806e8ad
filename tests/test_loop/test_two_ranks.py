"""Two processes over gloo whose loops differ: no step waits for the other, the books are one."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launching import WORKER_CONTEXT, meeting, on_ranks, preload_workers
from torch.utils.data import DataLoader

from infobatch_mm import InfoBatch

pytestmark = [pytest.mark.dist, pytest.mark.timeout(200)]

EPOCHS = 5
CASES = 24
DEEDS = ["weigh", "weigh", "weigh", "skip", "short", "split", "views", "twice", "nan", "merge", "peek"]


def drawn(number: int) -> dict[str, Any]:
    """A case, the same on both ranks; what each does in a step is drawn by itself."""
    generator = random.Random(number)
    batch = generator.choice([2, 3, 4])
    ours = number % 2 == 0
    look = {0: "both", 1: "rank 0", 2: ""}[number % 3] if ours else ""
    return dict(
        number=number,
        num_samples=2 * batch * generator.randint(3, 7) + generator.choice([0, 0, 1, 2]),
        batch=batch,
        ours=ours,
        drop_last=ours and generator.choice([False, True]),
        workers=1 if number in (4, 5) else 0,
        look=look,
        # What a walk leaves when it is broken off, the ranks can only settle together, at the next one.
        stop=None if look == "rank 0" else generator.choice([None, None, 2]),
    )


def run(case: dict[str, Any], rank: int) -> dict[str, Any]:
    infobatch = InfoBatch(case["num_samples"], EPOCHS, 0.5, 1.0, batch_size=2 * case["batch"], seed=case["number"])
    data = list(range(case["num_samples"]))
    context = WORKER_CONTEXT if case["workers"] else None
    options = dict(drop_last=case["drop_last"], num_workers=case["workers"], multiprocessing_context=context)
    loader: Any
    if case["ours"]:
        loader = infobatch.loader(data, **options)
    else:
        loader = DataLoader(infobatch.attach(data), case["batch"], sampler=infobatch.sampler, **options)
    both = random.Random(case["number"])
    own = random.Random(1000 * case["number"] + rank)
    steps, weighed, weights = [], [], []
    for epoch in range(EPOCHS):
        if case["look"] == "both" or (case["look"] == "rank 0" and rank == 0):
            list(loader)
        made: set[int] = set()
        count = 0
        for index, _ in loader:
            count += 1
            shared, deed = both.choice(DEEDS), own.choice(DEEDS)
            if count == 1:
                deed = "weigh"  # a pass of which a rank weighs nothing is told to both, elsewhere
            if shared == "merge":
                infobatch.merge()
            if deed == "peek" and case["ours"] and rank == 0 and count > 1:
                next(iter(loader))
            parts = [] if deed == "skip" else [index]
            if deed == "short" and len(index) > 1:
                parts = [index[:-1]]
            elif deed == "split":
                parts = list(index.split(2))
            elif deed == "views":
                parts = [index.repeat(2)]
            elif deed == "twice":
                parts = [index, index]
            for part in parts:
                losses = ((part.abs() * 7919 + epoch * 104729) % 1009).float()
                if deed == "nan":
                    losses[0] = float("nan")
                losses.requires_grad_()
                infobatch.weigh(losses, part).backward()
                made |= {i for i in part.tolist() if i >= 0}
                weights += zip(part.tolist(), (losses.grad * len(part)).tolist(), strict=True)
            if count == case["stop"]:
                break
        steps.append(count)
        weighed.append(len(made))
    next(iter(loader))  # ends the last pass where it was broken off
    infobatch.merge()
    state = infobatch.state_dict()
    return {
        "steps": steps,
        "weighed": weighed,
        "summary": infobatch.summary(),
        "scores": state["scores"].tolist(),
        "times_seen": state["times_seen"].tolist(),
        "largest": max(weight for _, weight in weights),
    }


def one_rank(rank: int, folder: str) -> None:
    preload_workers("infobatch_mm")
    with meeting(folder, rank, 2):
        seen = what_is_seen(rank)
    with meeting(folder, rank, 2, "alone", closes=False):
        seen["alone"] = [merged_alone(rank, each, folder) for each in range(2)]
        torch.save(seen, Path(folder, f"{rank}.pt"))
    os._exit(0)  # an end in order would wait for the merge that the other never made


def what_is_seen(rank: int) -> dict[str, Any]:
    seen = {}
    for number in range(CASES):
        try:
            seen[number] = run(drawn(number), rank)
        except Exception as error:
            raise RuntimeError(f"rank {rank}: {drawn(number)}") from error
    different = InfoBatch(16, 3, batch_size=4)
    loader = different.loader(list(range(16)))
    for index, _ in loader:
        different.weigh(index.float(), index)
    if rank:
        different._pruner.pass_index += 1  # as a rank that has walked once more
    try:
        for index, _ in loader:
            different.weigh(index.float(), index)
        told = ""
    except ValueError as error:
        told = str(error)
    return {"seen": seen, "told": told, "group": in_a_group(rank)}


def in_a_group(rank: int) -> Any:
    """Two replicas of one tensor-parallel model: both see the same samples, and are alone in their groups."""
    groups = [dist.new_group([each]) for each in range(2)]
    infobatch = InfoBatch(20, 3, batch_size=4, process_group=groups[rank])
    visits = []
    for _ in range(3):
        for index, _ in infobatch.loader(list(range(20))):
            infobatch.weigh(index.float(), index)
            visits.append(index.tolist())
    return visits, infobatch.summary()


def merged_alone(rank: int, merges: int, folder: str) -> tuple[float, str] | None:
    """One process merges, the other goes on, as a training does."""
    infobatch, told = InfoBatch(8, 4, batch_size=4), Path(folder, f"told.{merges}")
    result = None
    for index, _ in infobatch.loader(list(range(8))):
        infobatch.weigh(index.float(), index)
        if rank == merges:
            begun = time.monotonic()
            try:
                infobatch.merge(timeout_s=2)
            except ValueError as error:
                result = time.monotonic() - begun, str(error)
            told.touch()
        break
    # The other process waits for the writer here, not for its collective.
    while not told.exists():
        time.sleep(0.05)
    return result


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(2, one_rank, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_both_ranks_make_equally_many_steps_and_hold_one_set_of_books(ranks: list[dict[str, Any]]):
    pruned = skipped = 0
    for number in range(CASES):
        case, (one, other) = drawn(number), (rank["seen"][number] for rank in ranks)
        assert one["steps"] == other["steps"], case
        assert one["scores"] == other["scores"] and one["times_seen"] == other["times_seen"], case
        assert one["summary"] == other["summary"], case
        books = one["summary"]["per_pass"]
        assert len(books) == one["summary"]["passes_done"] == EPOCHS, case
        kept = [mine + theirs for mine, theirs in zip(one["weighed"], other["weighed"], strict=True)]
        assert [entry["kept"] for entry in books] == kept, case
        pruned += one["largest"] > 1
        skipped += one["summary"]["visits_skipped"]
    assert pruned > CASES / 2 and skipped > CASES


def test_ranks_that_end_different_passes_are_both_told(ranks: list[dict[str, Any]]):
    assert all("the processes end different passes, 2 and 3" in rank["told"] for rank in ranks)


def test_a_process_group_shares_the_data_of_its_own(ranks: list[dict[str, Any]]):
    alone = InfoBatch(20, 3, batch_size=4)
    visits = []
    for _ in range(3):
        for index, _ in alone.loader(list(range(20))):
            alone.weigh(index.float(), index)
            visits.append(index.tolist())
    for rank in ranks:
        assert tuple(rank["group"]) == (visits, alone.summary())


@pytest.mark.parametrize("merges", [0, 1])
def test_merge_on_one_process_alone_ends_in_seconds_with_its_name(ranks: list[dict[str, Any]], merges: int):
    seconds, message = ranks[merges]["alone"][merges]
    assert 1 < seconds < 30 and ranks[1 - merges]["alone"][merges] is None
    assert message.startswith(f"infobatch.merge() was called on process {merges}, but not within 2 s on every other")
    assert "take it out of `if is_main_process`" in message
