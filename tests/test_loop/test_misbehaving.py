"""Loops that do what real ones do: skip, repeat, split, reorder, cut, look, break off, fetch ahead, resume.

A twin in slow Python, which shares no code with the package, says what each batch must weigh, what each pass must
visit, and what the books must hold.
"""

from __future__ import annotations

import io
import math
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from reference import is_below, kept_count, mean_score
from torch.utils.data import DataLoader

from infobatch_mm import InfoBatch
from infobatch_mm.loop import PassLoader

EPOCHS = 6
CASES = 400
#: What happens to a batch, and how often.
DEEDS = {
    "weigh": 8, "skip": 2, "short": 1, "split": 2, "views": 1, "twice": 1, "reorder": 2, "nan": 1, "peek": 1,
    "resume": 1, "ahead": 1,
}  # fmt: skip
#: What only a loader of ours can tell.
OURS_ONLY = {"peek", "ahead"}


@dataclass
class Case:
    """One training; ``looks`` are the epochs before which the loader is walked for nothing."""

    number: int
    num_samples: int
    batch: int
    r: float
    delta: float
    ours: bool
    drop_last: bool
    workers: int
    deeds: list[str]
    looks: set[int]
    peeks: set[int]
    breaks: dict[int, int]


def drawn(number: int) -> Case:
    generator = random.Random(number)
    choose = generator.choice
    batch = choose([1, 2, 3, 4, 5, 8])
    ours = number % 2 == 0
    weights = {deed: often for deed, often in DEEDS.items() if ours or deed not in OURS_ONLY}
    kinds = generator.sample(list(weights), generator.randint(1, 4))
    return Case(
        number=number,
        num_samples=batch * generator.randint(2, 9) + choose([0, 0, generator.randint(0, batch - 1)]),
        batch=batch,
        r=choose([0.3, 0.5, 0.5, 0.7]),
        delta=choose([0.5, 0.875, 1.0]),
        ours=ours,
        drop_last=choose([False, True]) and ours,
        workers=2 if number % 40 < 2 else 0,
        deeds=["weigh", *kinds],
        looks={generator.randrange(EPOCHS)} if choose([False, True]) else set(),
        peeks={generator.randrange(EPOCHS)} if choose([False, True]) else set(),
        breaks={generator.randrange(EPOCHS): generator.randint(1, 4)} if choose([False, True]) else {},
    )


@dataclass
class Twin:
    """Scores, the pass in hand, and books, in dicts and lists."""

    case: Case
    scores: list[float | None] = field(default_factory=list)
    pass_index: int = 0
    given: list[int] = field(default_factory=list)
    weighed: dict[int, float] = field(default_factory=dict)
    times: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scores = [None] * self.case.num_samples
        self.times = [0] * self.case.num_samples

    def begin(self) -> None:
        """Draw the pass: who is well learned, and how many of them stay."""
        self.given, self.weighed = [], {}
        mean, case = mean_score(self.scores), self.case
        self.well: set[int] = set()
        if mean is not None and self.pass_index < EPOCHS and self.pass_index < case.delta * EPOCHS - 1e-9:
            self.well = {i for i, score in enumerate(self.scores) if score is not None and is_below(score, mean)}
        others = case.num_samples - len(self.well)
        self.stay = kept_count(len(self.well), others, case.r, case.batch)
        self.visits = others + self.stay

    def weight(self, index: int) -> float:
        return len(self.well) / self.stay if index in self.well else 1.0

    def take(self, index: list[int], losses: list[float]) -> None:
        """The losses of one call; of a sample that is in it several times their mean, of a later call none."""
        for sample in sorted(set(index)):
            if sample not in self.weighed:
                own = [loss for each, loss in zip(index, losses, strict=True) if each == sample]
                self.weighed[sample] = sum(own) / len(own)

    def end(self) -> None:
        for sample, loss in self.weighed.items():
            if math.isfinite(loss):
                self.scores[sample] = loss
                self.times[sample] += 1
        self.kept.append(len(self.weighed))
        self.pass_index += 1


def loss_of(case: Case, index: torch.Tensor, epoch: int) -> torch.Tensor:
    return ((index * 7919 + epoch * 104729 + case.number * 31 + 13) % 1009).float() / 1009 + 0.01


class Training:
    """One case, beside its twin."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.twin = Twin(case)
        self.generator = random.Random(case.number + 10_000)
        self.build()

    def build(self) -> None:
        case = self.case
        self.infobatch = InfoBatch(case.num_samples, EPOCHS, case.r, case.delta, batch_size=case.batch)
        data, options = list(range(case.num_samples)), dict(drop_last=case.drop_last, num_workers=case.workers)
        self.loader: Any
        if case.ours:
            self.loader = self.infobatch.loader(data, **options)
        else:
            attached = self.infobatch.attach(data)
            self.loader = DataLoader(attached, case.batch, sampler=self.infobatch.sampler, **options)
        assert isinstance(self.loader, PassLoader) == case.ours

    def resume(self) -> None:
        buffer = io.BytesIO()
        torch.save(self.infobatch.state_dict(), buffer)
        buffer.seek(0)
        self.build()
        self.infobatch.load_state_dict(torch.load(buffer, weights_only=True))

    def run(self) -> None:
        case, twin = self.case, self.twin
        for epoch in range(EPOCHS):
            twin.begin()
            if epoch in case.looks:
                list(self.loader)
            if epoch in case.peeks:
                next(iter(self.loader))
            stop, rest = case.breaks.get(epoch), True
            ended = False
            while rest:  # once, and once more after each resume
                rest, ended = self.walk(epoch, stop)
            if case.ours and not ended:
                # A walk that was broken off ends where the next one begins.
                assert self.infobatch.summary()["passes_done"] in (epoch, epoch + 1)
            if not twin.weighed:  # counts for nothing: the same pass once more, all of it weighed
                twin.given = []
                for index, _ in self.loader:
                    twin.given += index.tolist()
                    self.weigh(index, index, epoch)
            twin.end()
        next(iter(self.loader))
        self.check_books()

    def walk(self, epoch: int, stop: int | None) -> tuple[bool, bool]:
        """Walk the pass, or the rest of it; whether it is to be resumed, and whether it came to its end."""
        case, twin = self.case, self.twin
        in_hand: torch.Tensor | None = None
        self.touched = False
        for index, item in self.loader:
            assert index.tolist() == item.tolist()
            fresh = set(index.tolist())
            assert len(fresh) == len(index) and not fresh & set(twin.given), f"handed out twice: {case}"
            twin.given += index.tolist()
            deed = self.generator.choice(case.deeds)
            if in_hand is not None:
                self.weigh(in_hand, in_hand, epoch)
                in_hand = None
            if deed == "ahead":
                in_hand = index
            else:
                self.do(deed, index, epoch)
            if deed == "resume":
                self.resume()
                return self.infobatch.passes_done == epoch, False  # as `range(passes_done, EPOCHS)` goes on
            if stop is not None and len(twin.given) >= stop * case.batch and (self.touched or in_hand is not None):
                if in_hand is not None:
                    self.weigh(in_hand, in_hand, epoch)
                return False, False
        if in_hand is not None:
            self.weigh(in_hand, in_hand, epoch)
        if twin.weighed:
            left_out = twin.visits % case.batch if case.drop_last else 0
            assert len(twin.given) == twin.visits - left_out, f"pass {epoch} of {case}"
        return False, True

    def do(self, deed: str, index: torch.Tensor, epoch: int) -> None:
        if deed == "skip":
            return
        if deed == "short" and len(index) > 1:
            part = index[:-1]
            self.weigh(part, part, epoch)
        elif deed == "split":
            for part in index.split(2):
                self.weigh(part, part, epoch)
        elif deed == "views":
            self.weigh(index.repeat(2), index.repeat(2), epoch)
        elif deed == "reorder":
            index = index.flip(0)
            self.weigh(index, index, epoch)
        else:
            self.weigh(index, index, epoch, nan=deed == "nan")
            if deed == "twice":
                self.weigh(index, index, epoch + 3)
        if deed == "peek":
            next(iter(self.loader))

    def weigh(self, index: torch.Tensor, _: torch.Tensor, epoch: int, nan: bool = False) -> None:
        losses = loss_of(self.case, index, epoch)
        views = len(index) // len(set(index.tolist()))
        losses = losses + torch.arange(views).repeat_interleave(len(index) // views) / 7
        if nan:
            losses[0] = math.nan
        self.twin.take(index.tolist(), losses.tolist())
        losses.requires_grad_()
        self.touched = True
        self.infobatch.weigh(losses, index).backward()
        expected = [self.twin.weight(i) / len(index) for i in index.tolist()]
        assert losses.grad.tolist() == pytest.approx(expected, rel=1e-6), self.case

    def check_books(self) -> None:
        twin, summary, state = self.twin, self.infobatch.summary(), self.infobatch.state_dict()
        assert summary["passes_done"] == EPOCHS, self.case
        assert [entry["kept"] for entry in summary["per_pass"]] == twin.kept, self.case
        assert summary["visits"] == sum(twin.kept), self.case
        assert state["times_seen"].tolist() == twin.times, self.case
        scores = [score if seen else None for score, seen in zip(state["scores"].tolist(), state["seen"], strict=True)]
        expected = [None if score is None else pytest.approx(score, rel=1e-6) for score in twin.scores]
        assert scores == expected, self.case
        assert 0 <= summary["saved_ratio"] < 1


@pytest.mark.parametrize("block", [*range(3), *(pytest.param(each, marks=pytest.mark.slow) for each in range(3, 8))])
def test_no_loop_derails_a_training(block: int):
    for number in range(block * CASES // 8, (block + 1) * CASES // 8):
        Training(drawn(number)).run()


def test_the_cases_reach_what_they_are_for():
    cases = [drawn(number) for number in range(CASES)]
    for deed in DEEDS:
        assert sum(deed in case.deeds for case in cases) > 30
    assert all(sum(bool(getattr(case, name)) for case in cases) > 50 for name in ("looks", "peeks", "breaks", "ours"))
    assert sum(case.workers > 0 for case in cases) >= 20
