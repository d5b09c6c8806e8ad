"""Properties of any number of processes, over several hundred random trainings.

``many_processes`` draws and runs them; here their journals are judged. What a pass should have done is worked out by
brute force from the journalled scores of the pass before, sharing no code with the package.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import on_ranks
from reference import is_below, kept_count, mean_score, steps_after_pass

from .many_processes import (
    CASES,
    KINDS,
    PROCESSES,
    Case,
    loss_of,
    one_process,
    rows_of_host,
    run_case,
)

# A hang in a collective ends by itself after a minute.
pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]

Scores = list[float | None]
#: number of a case: the journal of each rank
Journals = dict[int, list[dict[str, Any]]]


@dataclass
class Pass:
    """One pass: what each rank saw, and what brute force expects of it."""

    case: Case
    index: int
    ranks: list[dict[str, Any]]
    scores: Scores
    well_learned: set[int] = field(default_factory=set)
    kept: int = 0

    def __post_init__(self) -> None:
        case = self.case
        mean = mean_score(self.scores)
        if case.r > 0 and self.start < Fraction(repr(case.delta)) * total_samples(case) and mean is not None:
            self.well_learned = {i for i, s in enumerate(self.scores) if s is not None and is_below(s, mean)}
        n = len(self.well_learned)
        self.kept = kept_count(n, case.num_samples - n, case.r, case.global_batch)

    @property
    def start(self) -> int:
        """Progress before the pass, in samples of full data."""
        return self.index * self.case.num_samples

    @property
    def pruned(self) -> bool:
        return self.kept < len(self.well_learned)

    @property
    def span(self) -> int:
        """Samples of full data that the pass stands for."""
        return min(self.case.num_samples, total_samples(self.case) - self.start)

    @property
    def visits(self) -> int:
        """Length of the plan."""
        visits = self.case.num_samples - len(self.well_learned) + self.kept
        if self.case.kind != "iterations":
            return visits
        # The same share of the plan as of the data, in full batches, at least one.
        batches = math.floor(Fraction(self.span, self.case.num_samples) * visits / self.case.global_batch)
        return max(1, batches) * self.case.global_batch

    @property
    def full_visits(self) -> int:
        """Visits of the unpruned run in the same span."""
        if self.case.kind == "iterations" or (self.case.kind == "core" and not self.case.ours):
            return self.span
        if self.case.ours:
            return min(self.span, host_batches(self.case) * self.case.batch * self.case.world)
        return min(self.span, host_batches(self.case) * self.case.global_batch)

    @property
    def plan(self) -> dict[str, Any]:
        return self.ranks[0]["plan"]

    @property
    def where(self) -> str:
        return f"pass {self.index} of {self.case}"

    @property
    def rows(self) -> int:
        """Visits of each process, repeated and padding ones included, before a tail is dropped."""
        return math.ceil(self.visits / self.case.world)

    @property
    def batches(self) -> int:
        """Batches that a loader makes of them."""
        return batches_of(self.case, self.rows)

    def weight(self, index: int) -> float:
        return len(self.well_learned) / self.kept if self.pruned and index in self.well_learned else 1.0

    def walked(self, rank: int) -> list[int]:
        """Indices of one process in the order of its visits, negative for padding."""
        return [index for step in self.ranks[rank]["steps"] for index in step["index"]]

    def real_visits(self) -> list[int]:
        """Samples visited by any process, repeated as often as they were."""
        return [index for rank in range(self.case.world) for index in self.walked(rank) if index >= 0]

    def steps(self) -> Iterator[tuple[dict[str, Any], ...]]:
        """The batches that all processes had in the same step."""
        # That there are equally many is a test of its own.
        return zip(*(entry["steps"] for entry in self.ranks), strict=False)

    def losses_in(self, step: dict[str, Any], rank: int) -> list[float]:
        """Losses of a batch, padding visits included."""
        return [loss_of(self.case, max(index, -1 - index), self.index, rank) for index in step["index"]]

    def losses(self, rank: int) -> Iterator[tuple[int, float]]:
        """Index and loss of the real visits of a process."""
        for index in self.walked(rank):
            if index >= 0:
                yield index, loss_of(self.case, index, self.index, rank)


def total_samples(case: Case) -> int:
    """The whole training in samples of full data."""
    return case.length * (case.global_batch if case.kind == "iterations" else case.num_samples)


def scores_in(after: dict[str, Any]) -> Scores:
    return [score if seen else None for score, seen in zip(after["scores"], after["seen"], strict=True)]


def passes_of(case: Case, journals: list[dict[str, Any]]) -> list[Pass]:
    scores: Scores = [None] * case.num_samples
    passes = []
    for index, entries in enumerate(zip(*(journal["passes"] for journal in journals), strict=True)):
        passes.append(Pass(case, index, list(entries), scores))
        scores = scores_in(journals[0]["after"][index])
    return passes


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.slow)])
def journals(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Journals:
    folder = tmp_path_factory.mktemp("many")
    on_ranks(PROCESSES, one_process, str(folder), request.param == "all")
    return read_journals(folder)


def read_journals(folder: Path) -> Journals:
    found: Journals = {}
    for world in range(1, PROCESSES + 1):
        ranks = [torch.load(folder / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]
        found |= {number: [journal[number] for journal in ranks] for number in ranks[0]}
    return found


@pytest.fixture(params=[(world, kind) for world in range(1, PROCESSES + 1) for kind in KINDS], ids=str)
def cases(request: pytest.FixtureRequest, journals: Journals) -> list[Case]:
    """The cases of one world size and kind."""
    world, kind = request.param
    if kind != "core":
        pytest.importorskip("mmengine")
    return [case for case in made(journals) if (case.world, case.kind) == (world, kind)]


def made(journals: Journals) -> list[Case]:
    """The cases that were run."""
    return [case for case in CASES if case.number in journals]


def all_passes(cases: list[Case], journals: Journals) -> Iterator[Pass]:
    for case in cases:
        yield from passes_of(case, journals[case.number])


def test_there_are_many_cases_and_they_reach_the_corners(journals: Journals):
    pytest.importorskip("mmengine")
    assert len(made(journals)) == len(journals) >= (350 if len(journals) == len(CASES) else 180)
    reached: Counter[str] = Counter()
    for single in all_passes(made(journals), journals):
        case = single.case
        reached["pruned"] += single.pruned
        reached["pruned in several processes"] += single.pruned and case.world > 1
        reached["pruned and partial"] += single.pruned and single.span < case.num_samples
        reached["pruned to a ragged tail"] += single.pruned and single.visits % (case.world * case.batch) > 0
        reached["padded"] += any(index < 0 for rank in range(case.world) for index in single.walked(rank))
        reached["repeated"] += len(single.real_visits()) > case.num_samples
        reached["tail dropped"] += len(single.real_visits()) < single.visits
        reached["remainder left out"] += case.kind == "iterations" and not single.pruned and single.visits < single.span
        reached["could not divide"] += single.kept == len(single.well_learned) > 0
        reached["with workers"] += case.workers > 0 and single.pruned
        reached["after NaN"] += single.pruned and None in single.scores
        reached["fewer samples than processes"] += case.num_samples < case.world
        reached["padding without a finite loss"] += any(
            has_bad_padding(single, step, rank) for rank, entry in enumerate(single.ranks) for step in entry["steps"]
        )
        reached["our loader"] += case.ours and single.pruned
        reached["our loader drops a tail"] += case.ours and case.drop_last and len(single.real_visits()) < single.visits
    assert min(reached.values()) >= 3, reached
    assert reached["pruned in several processes"] > len(journals) / 2, reached


# ---- which samples ------------------------------------------------------------------------------------


def test_all_processes_draw_the_same_legal_plan(cases: list[Case], journals: Journals):
    for single in all_passes(cases, journals):
        assert all(entry["plan"] == single.plan for entry in single.ranks), single.where
        planned = single.plan["indices"]
        assert len(planned) == len(set(planned)) == single.visits, single.where
        assert single.plan["pruned"] == single.pruned, single.where
        if single.span == single.case.num_samples and single.pruned:
            left_out = set(range(single.case.num_samples)) - set(planned)
            assert left_out <= single.well_learned, single.where
            assert len(left_out) == len(single.well_learned) - single.kept, single.where


def test_every_kept_sample_is_visited_once_per_pass_over_all_processes(cases: list[Case], journals: Journals):
    for single in all_passes(cases, journals):
        case, planned = single.case, single.plan["indices"]
        visits = Counter(single.real_visits())
        whole = single.rows * case.world
        dropped = max(0, whole - single.batches * case.batch * case.world)
        assert set(visits) <= set(planned), single.where
        if case.kind == "epochs" and not single.pruned:  # the host's own rounding up repeats samples
            assert visits.total() == whole - dropped, single.where
            assert max(visits.values()) <= math.ceil(whole / case.num_samples), single.where
        else:
            assert max(visits.values(), default=1) == 1, single.where
            assert len(visits) == min(len(planned), whole - dropped), single.where
        if not dropped:
            assert set(visits) == set(planned), single.where


def test_what_iteration_loops_leave_out_of_full_passes_is_random(journals: Journals):
    pytest.importorskip("mmengine")
    for shuffle in (True, False):
        chosen = [case for case in made(journals) if case.kind == "iterations" and case.shuffle == shuffle]
        places: list[float] = []
        for single in all_passes(chosen, journals):
            num_samples = single.case.num_samples
            if single.span == num_samples and not single.pruned:
                left_out = set(range(num_samples)) - set(single.real_visits())
                assert len(left_out) == num_samples % single.case.global_batch, single.where
                places += [(index + 0.5) / num_samples for index in left_out]
        assert len(places) > len(journals) / 6
        assert sum(places) / len(places) == pytest.approx(0.5, abs=0.1)


# ---- how many steps -----------------------------------------------------------------------------------


def test_all_processes_do_equally_many_steps_and_the_loader_says_so(cases: list[Case], journals: Journals):
    for single in all_passes(cases, journals):
        for entry in single.ranks:
            assert len(entry["steps"]) == single.batches, single.where
            assert set(entry["lens"]) <= {len(entry["steps"])}, single.where
        sizes = [[len(step["index"]) for step in entry["steps"]] for entry in single.ranks]
        assert all(other == sizes[0] for other in sizes), single.where


def test_pruned_passes_have_full_batches_only(cases: list[Case], journals: Journals):
    for single in all_passes(cases, journals):
        case = single.case
        if (single.pruned and case.accumulate) or case.kind == "iterations":
            for entry in single.ranks:
                assert all(len(step["index"]) == case.batch for step in entry["steps"]), single.where
                assert len(entry["steps"]) % case.accumulate == 0, single.where
            assert all(index >= 0 for rank in range(case.world) for index in single.walked(rank)), single.where


# ---- weights ------------------------------------------------------------------------------------------


def test_weights_match_the_draw(cases: list[Case], journals: Journals):
    for single in all_passes(cases, journals):
        plan = single.plan
        expected = [single.weight(index) for index in plan["indices"]]
        assert plan["weights"] == pytest.approx(expected, rel=1e-6), single.where
        if single.span == single.case.num_samples and single.case.kind != "iterations":
            assert sum(plan["weights"]) == pytest.approx(single.case.num_samples, rel=1e-5), single.where
        if single.pruned:
            assert plan["threshold"] == pytest.approx(mean_score(single.scores), rel=1e-6), single.where
        else:
            assert plan["threshold"] is None, single.where
        for index, weight in used_weights(single):
            assert weight == pytest.approx(0 if index < 0 else single.weight(index), rel=1e-5), single.where


def used_weights(single: Pass) -> Iterator[tuple[int, float]]:
    """Index and weight of every visit; of the core kind the gradients tell it."""
    if single.case.kind != "core":
        for entry in single.ranks:
            for step in entry["steps"]:
                yield from zip(step["index"], step["weights"], strict=True)
        return
    for together in single.steps():
        visits = sum(index >= 0 for step in together for index in step["index"])
        for step in together:
            for index, grad in zip(step["index"], step["grad"], strict=True):
                yield index, grad * visits / single.case.world


@pytest.mark.parametrize("world", range(1, PROCESSES + 1))
def test_weighted_loss_is_the_mean_and_never_divided_by_the_weights(journals: Journals, world: int):
    chosen = [case for case in made(journals) if (case.world, case.kind) == (world, "core")]
    for single in all_passes(chosen, journals):
        weights = dict(zip(single.plan["indices"], single.plan["weights"], strict=True))
        for together in single.steps():
            visits = sum(index >= 0 for step in together for index in step["index"])
            objective = 0.0
            for rank, step in enumerate(together):
                gammas = [0.0 if index < 0 else weights[index] for index in step["index"]]
                losses = single.losses_in(step, rank)
                terms = [gamma * loss for gamma, loss in zip(gammas, losses, strict=True)]
                # The mean over processes shall be that over the real visits; 1 / size where nothing is padded.
                share = world / visits
                assert visits < len(terms) * world or share * len(terms) == pytest.approx(1), single.where
                assert step["grad"] == pytest.approx([gamma * share for gamma in gammas], rel=1e-6), single.where
                if not has_bad_padding(single, step, rank):
                    assert step["loss"] == close_to(terms, share), single.where
                objective += sum(terms)
            mean = sum(step["loss"] for step in together) / world
            if math.isfinite(objective):
                assert mean == pytest.approx(objective / visits, rel=1e-5, abs=1e-4), single.where


def close_to(terms: list[float], share: float) -> Any:
    """Their sum times ``share``, as near as float32 sums come."""
    return pytest.approx(sum(terms) * share, rel=1e-5, abs=1e-6 * max(map(abs, terms)), nan_ok=True)


def has_bad_padding(single: Pass, step: dict[str, Any], rank: int) -> bool:
    """Whether the sample that a padding visit repeats has no finite loss."""
    pairs = zip(step["index"], single.losses_in(step, rank), strict=True)
    return any(index < 0 and not math.isfinite(loss) for index, loss in pairs)


def test_padding_weighs_nothing_also_where_its_loss_is_not_finite(journals: Journals):
    for single in all_passes([case for case in made(journals) if case.kind == "core"], journals):
        for rank, entry in enumerate(single.ranks):
            for step in entry["steps"]:
                pairs = zip(step["index"], single.losses_in(step, rank), strict=True)
                if all(index < 0 or math.isfinite(loss) for index, loss in pairs):
                    assert math.isfinite(step["loss"]), single.where


def test_processes_together_do_what_one_does(cases: list[Case], journals: Journals):
    for case in filter(is_comparable, cases):
        alone = run_case(case.in_one_process(), 0)
        ranks = journals[case.number]
        for single, entry in zip(passes_of(case, ranks), alone["passes"], strict=True):
            assert single.plan == entry["plan"], single.where
            for together, step in zip(single.steps(), entry["steps"], strict=True):
                if case.kind == "core":
                    mean = sum(other["loss"] for other in together) / case.world
                    if math.isfinite(step["loss"]) and not any(
                        has_bad_padding(single, other, rank) for rank, other in enumerate(together)
                    ):
                        assert mean == pytest.approx(step["loss"], rel=1e-5, abs=1e-4), single.where
                key, share = ("grad", 1 / case.world) if case.kind == "core" else ("weights", 1)
                ours = [pair for other in together for pair in zip(other["index"], other[key], strict=True)]
                expected = dict(zip(step["index"], step[key], strict=True))
                real = {index: value * share for index, value in ours if index >= 0}
                assert real == pytest.approx(expected, rel=1e-6), single.where
        assert ranks[0]["after"] == alone["after"], case


def is_comparable(case: Case) -> bool:
    """Whether one process with the same global batch makes the same batches."""
    if case.world == 1 or case.accumulate == 0 or case.losses == "by rank":
        return False
    divides = case.num_samples % case.world == 0
    return divides or case.kind == "iterations" or (case.kind == "core" and not case.drop_last)


# ---- what all processes hold --------------------------------------------------------------------------


def test_after_each_pass_all_processes_hold_equal_scores(cases: list[Case], journals: Journals):
    for case in cases:
        ranks = journals[case.number]
        times = Counter[int]()
        for single in passes_of(case, ranks):
            after = ranks[0]["after"][single.index]
            assert all(journal["after"][single.index] == after for journal in ranks), single.where
            possible: dict[int, set[float | None]] = {i: {score} for i, score in enumerate(single.scores)}
            visited: dict[int, set[float | None]] = {}
            for rank in range(case.world):
                for index, loss in single.losses(rank):
                    if math.isfinite(loss):
                        visited.setdefault(index, set()).add(loss)
                        times[index] += 1
            possible |= visited
            for index, score in enumerate(scores_in(after)):
                assert score in possible[index], f"sample {index}, {single.where}"
            assert after["times_seen"] == [times[index] for index in range(case.num_samples)], single.where


def test_books_are_equal_and_add_up(cases: list[Case], journals: Journals):
    for case in cases:
        ranks = journals[case.number]
        summary, passes = ranks[0]["summary"], passes_of(case, ranks)
        nonfinite = 0
        for single, after, entry in zip(passes, ranks[0]["after"], summary["per_pass"], strict=True):
            walked = sum(len(single.walked(rank)) for rank in range(case.world))
            kept = min(walked, single.visits)
            nonfinite += sum(not math.isfinite(loss) for rank in range(case.world) for _, loss in single.losses(rank))
            assert (entry["pass"], entry["kept"]) == (single.index, kept), single.where
            assert entry["kept_ratio"] == pytest.approx(kept / single.full_visits), single.where
            assert entry["threshold"] == single.plan["threshold"], single.where
            mean = mean_score(scores_in(after))
            assert entry["score_mean"] == (None if mean is None else pytest.approx(mean, rel=1e-6)), single.where
        assert summary["visits"] == sum(entry["kept"] for entry in summary["per_pass"]), case
        assert summary["nonfinite_losses"] == nonfinite, case
        assert all(journal["summary"] == summary for journal in ranks), case


def test_padding_is_not_booked_as_unusable_samples(journals: Journals):
    for case in made(journals):
        if case.kind == "core":
            assert journals[case.number][0]["summary"]["unusable_visits"] == 0, case


# ---- how long -----------------------------------------------------------------------------------------


def test_passes_are_as_many_as_planned_and_iterations_never_more(cases: list[Case], journals: Journals):
    for case in cases:
        total = Fraction(total_samples(case), case.num_samples)
        passes = passes_of(case, journals[case.number])
        assert len(passes) == math.ceil(total), case
        for journal in journals[case.number]:
            assert journal["summary"]["passes_done"] == math.ceil(total), case
            assert journal["summary"]["passes_total"] == pytest.approx(float(total)), case
            steps = [len(entry["steps"]) for entry in journal["passes"]]
            host = case.length if case.kind == "iterations" else case.length * host_batches(case)
            assert sum(steps) <= host, case
            if case.kind != "core":
                check_due_steps(case, journal["passes"], host)


def batches_of(case: Case, rows: int) -> int:
    """Batches that a loader makes of the visits of one process."""
    return rows // case.batch if case.drop_last else math.ceil(rows / case.batch)


def host_batches(case: Case) -> int:
    """Batches of an epoch of the unpruned run."""
    return batches_of(case, rows_of_host(case))


def check_due_steps(case: Case, entries: list[dict[str, Any]], host: int) -> None:
    """Steps of the learning-rate schedule: exact after each pass, never more than the host's."""
    before = 0
    for index, entry in enumerate(entries):
        due = [step["due"] for step in entry["steps"]]
        if case.kind == "iterations":
            after = steps_after_pass(index + 1, case.num_samples, case.global_batch, case.length)
        else:
            after = (index + 1) * host_batches(case)
        assert [before, *due] == sorted([before, *due]), f"pass {index} of {case}"
        assert due[-1] == after <= host, f"pass {index} of {case}"
        before = after
    assert before == host, case
