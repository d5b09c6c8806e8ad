"""The scores of the published policies, each told slowly by its formula, and what two ranks make of them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import meeting, on_ranks

from infobatch_mm import InfoBatch
from infobatch_mm.core import ScoreStore
from infobatch_mm.core.score_rule import build_score

N, PASSES, BATCH = 24, 9, 4

#: Samples and losses of the batches of some passes.
Passes = list[list[tuple[list[int], list[float]]]]


def passes_of(seed: int) -> Passes:
    """Passes that visit about two thirds of the samples, in batches of four, the last one smaller."""
    source = random.Random(seed)
    found: Passes = []
    for _ in range(PASSES):
        samples = source.sample(range(N), 18)
        batches = [samples[start : start + BATCH] for start in range(0, 18, BATCH)]
        found.append([(batch, [as_float32(source.expovariate(1.5)) for _ in batch]) for batch in batches])
    return found


def as_float32(value: float) -> float:
    return torch.tensor(value).item()


def visits_of(passes: Passes, sample: int) -> Iterator[tuple[int, float, list[float]]]:
    """In the order of its visits: the pass, its loss, and the losses of its batch."""
    for number, batches in enumerate(passes):
        for samples, losses in batches:
            if sample in samples:
                yield number, losses[samples.index(sample)], losses


def stored(passes: Passes, score: Any) -> ScoreStore:
    store = ScoreStore(N, score=score)
    for batches in passes:
        for samples, losses in batches:
            store.record(torch.tensor(samples), torch.tensor(losses))
        store.merge()
        store.settle()
    return store


# ---- by their formulas ---------------------------------------------------------------------------------


def weighted_mean(values: list[float], decay: float) -> float:
    """The newest counts 1, the one before it ``decay``, and so on."""
    counts = [decay**age for age in range(len(values))][::-1]
    return sum(count * value for count, value in zip(counts, values, strict=True)) / sum(counts)


def ucb(visits: list[tuple[int, float, list[float]]], decay: float, confidence: float) -> float:
    losses = [loss for _, loss, _ in visits]
    gaps = [(losses[i] - weighted_mean(losses[:i], decay)) ** 2 for i in range(1, len(losses))]
    return weighted_mean(losses, decay) + confidence * (weighted_mean(gaps, decay) if gaps else 0.0)


def second_difference(visits: list[tuple[int, float, list[float]]], number: int) -> float:
    losses = [0.0] * (number + 2) + [loss for _, loss, _ in visits]
    bends = [abs(losses[i] - 2 * losses[i - 1] + losses[i - 2]) for i in range(len(losses) - number, len(losses))]
    return sum(bends) / number


def forgetting(visits: list[tuple[int, float, list[float]]], learned_below: float) -> float:
    learned = [loss < learned_below for _, loss, _ in visits]
    if not any(learned):
        return len(learned)
    return sum(before and not after for before, after in pairwise(learned))


def batch_loss(visits: list[tuple[int, float, list[float]]], decay: float) -> float:
    return weighted_mean([sum(losses) / len(losses) for _, _, losses in visits], decay)


TOLD: dict[str, tuple[Any, Any]] = {
    "ucb": ("ucb", lambda visits: ucb(visits, 0.9, 1.0)),
    "ucb, otherwise": (dict(type="ucb", score_ema=0.3, confidence=2.5), lambda visits: ucb(visits, 0.3, 2.5)),
    "second_difference": ("second_difference", lambda visits: second_difference(visits, 3)),
    "one difference": (dict(type="second_difference", differences=1), lambda visits: second_difference(visits, 1)),
    "forgetting": ("forgetting", lambda visits: forgetting(visits, math.log(2))),
    "forgetting, otherwise": (dict(type="forgetting", learned_below=0.2), lambda visits: forgetting(visits, 0.2)),
    "bls": ("bls", lambda visits: batch_loss(visits, 0.9)),
    "bls, last": (dict(type="bls", score_ema=0.0), lambda visits: batch_loss(visits[-1:], 0.5)),
    "window": ("window", lambda visits: visits[-1][1]),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", list(TOLD))
def test_a_score_is_what_its_formula_says(name: str, seed: int):
    score, formula = TOLD[name]
    passes = passes_of(seed)
    store = stored(passes, score)
    expected = [formula(visits) if (visits := list(visits_of(passes, i))) else 0.0 for i in range(N)]
    assert store.values.tolist() == pytest.approx(expected, rel=2e-6, abs=1e-7)
    assert store.times_seen.tolist() == [len(list(visits_of(passes, i))) for i in range(N)]
    assert len({round(value, 6) for value in expected}) > 2


@pytest.mark.parametrize("seed", range(3))
def test_a_window_tells_who_was_above_its_batchs_mean_in_the_last_pass_and_in_how_many_each_was(seed: int):
    passes = passes_of(seed)
    columns = stored(passes, "window").rule.columns
    above = [False] * N
    for samples, losses in passes[-1]:
        for sample, loss in zip(samples, losses, strict=True):
            above[sample] = loss >= sum(losses) / len(losses)
    assert columns["above"].tolist() == above and 0 < sum(above) < 18
    assert columns["passes"].tolist() == [len(list(visits_of(passes, i))) for i in range(N)]


def test_two_looks_at_a_sample_are_one_pass_of_it():
    store = ScoreStore(3, score="window")
    store.record(torch.tensor([0, 1, 0, 1]), torch.tensor([1.0, 5.0, 2.0, 6.0]))
    store.settle()
    assert store.rule.columns["passes"].tolist() == [1, 1, 0] and store.times_seen.tolist() == [2, 2, 0]
    assert store.rule.columns["above"].tolist() == [False, True, False] and store.values.tolist() == [2, 6, 0]


def test_a_loss_that_is_not_finite_is_no_part_of_its_batchs_mean():
    store = ScoreStore(4, score="bls")
    store.record(torch.arange(4), torch.tensor([1.0, float("nan"), 3.0, float("inf")]))
    store.settle()
    assert store.seen.tolist() == [True, False, True, False] and store.values.tolist() == [2.0, 0.0, 2.0, 0.0]


def test_losses_whose_squares_no_float_holds_have_a_finite_bound():
    store = ScoreStore(1, score="ucb")
    for loss in (0.0, 3e38, 0.0):
        store.record(torch.tensor([0]), torch.tensor([loss]))
        store.settle()
    assert torch.isfinite(store.values).all() and store.rule.damaged(store.state_dict(), 1) is None


# ---- in a loop, whose losses come in the order of their samples -------------------------------------------


@pytest.mark.parametrize("score", [dict(type="bls", score_ema=0.0), "window"], ids=["bls", "window"])
def test_in_a_loop_a_batch_is_what_was_weighed_together(score: Any):
    infobatch = InfoBatch(8, 3, batch_size=4, policy="none", score=score, seed=1)
    for _ in range(2):
        means = [0.0] * 8
        for index, _ in infobatch.loader(list(range(8))):
            losses = (index.float() ** 2).requires_grad_()
            for sample in index.tolist():
                means[sample] = losses.mean().item()
            # Scores that have no use for a noise level must not take it for a mean.
            infobatch.weigh(losses, index, log_snr=torch.full((4,), 77.0)).backward()
    store = infobatch._pruner.store
    if score == "window":
        above = [sample**2 >= means[sample] for sample in range(8)]
        assert store.rule.columns["above"].tolist() == above and 0 < sum(above) < 8
    else:
        assert store.values.tolist() == means and len(set(means)) == 2


def test_no_graph_is_kept_until_the_pass_ends():
    losses = torch.ones(3, requires_grad=True) * 2
    for name in ("bls", "ucb", "window", "second_difference", "forgetting"):
        assert not build_score(name).evidence(losses, None).requires_grad


# ---- refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (dict(type="ucb", confidence=-1), "confidence=-1 is no number from 0 on"),
        (dict(type="ucb", confidence="high"), "confidence='high' is no number"),
        (dict(type="second_difference", differences=0), "differences=0 is below 1"),
        (dict(type="second_difference", score_ema=0.5), "score_ema=0.5 contradict each other"),
        (dict(type="forgetting", learned_below=0), "learned_below=0 is no number above 0"),
        (dict(type="forgetting", score_ema=0.5), "score_ema=0.5 contradict each other"),
        (dict(type="window", score_ema=0.5), "score_ema=0.5 contradict each other"),
    ],
    ids=str,
)
def test_an_argument_out_of_its_range_is_refused(score: Any, message: str):
    with pytest.raises(ValueError, match=message):
        build_score(score)


# ---- on two ranks ------------------------------------------------------------------------------------------


RANKED = [TOLD[name][0] for name in TOLD]


def shared(me: int, folder: str) -> None:
    with meeting(folder, me, 2):
        torch.save([seen_of(score, me) for score in RANKED], Path(folder) / f"{me}.pt")


def seen_of(score: Any, me: int | None) -> dict[str, Any]:
    """What a store holds after passes whose batches two ranks share, or one process makes alone."""
    store, unmerged = ScoreStore(N, score=score), []
    for batches in passes_of(5):
        for step, (samples, losses) in enumerate(batches):
            if me in (None, step % 2):
                store.record(torch.tensor(samples), torch.tensor(losses))
            if step == 2:  # as before a checkpoint
                store.flush()
                unmerged.append(store.unmerged)
                store.merge()
                unmerged.append(store.unmerged)
        store.merge()
        store.settle()
    state = store.state_dict()
    del state["unusable"], state["unmerged"]
    return {"state": state, "columns": dict(store.rule.columns), "unmerged": unmerged}


@pytest.mark.dist
def test_two_ranks_hold_to_the_bit_what_one_process_holds(tmp_path: Path):
    on_ranks(2, shared, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{me}.pt", weights_only=True) for me in range(2)]
    for place, score in enumerate(RANKED):
        alone = seen_of(score, None)
        assert not any(alone["unmerged"])
        for seen in (rank[place] for rank in ranks):
            assert seen["unmerged"] == [True, False] * PASSES
            assert equal(seen["state"], alone["state"]) and equal(seen["columns"], alone["columns"])


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
