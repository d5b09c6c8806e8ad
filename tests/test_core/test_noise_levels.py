"""Scores by noise level: a share of what is usual there, averaged over visits."""

from __future__ import annotations

import math
import operator
import random
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch

from infobatch_mm import InfoBatch
from infobatch_mm.core import EpochSchedule, Pruner, ScoreStore
from infobatch_mm.core.score_rule import build_score
from infobatch_mm.policies import InfoBatchPolicy
from infobatch_mm.scores.noise_levels import NUM_BINS, bins_of
from test_core.test_pruner import through_a_file

N = 40
Visit = tuple[int, float, float]  # index, loss, log-SNR


def store_of(score_ema: float | None = None) -> ScoreStore:
    return ScoreStore(N, score_ema, "timestep")


def record(store: ScoreStore, visits: list[Visit], batch_size: int = 7) -> None:
    for start in range(0, len(visits), batch_size):
        index, loss, level = zip(*visits[start : start + batch_size], strict=True)
        store.record(torch.tensor(index), torch.tensor(loss), log_snr=torch.tensor(level))


def a_pass(rng: random.Random, falls_to: float = 1.0, spread: float = 6) -> list[Visit]:
    """Visits of two thirds of the samples: losses of images that differ somewhat, at levels that differ much."""
    visits = []
    for index in rng.sample(range(N), 2 * N // 3):
        level = rng.uniform(-spread, spread)
        visits.append((index, (0.5 + index / N) * math.exp(level / 2) * rng.uniform(0.9, 1.1) * falls_to, level))
    return visits


def bin_of(level: float) -> int:
    return math.floor(min(max(level, -20), 20) / 0.25)


def twin(passes: list[list[Visit]], decay: float) -> dict[int, float]:
    """The scores, from the definition: every visit so far counts for the mean at a level, the older the less."""
    history: dict[int, list[float]] = defaultdict(list)
    for number, visits in enumerate(passes):
        so_far = [
            (bin_of(level), loss, 0.5 ** (number - earlier))
            for earlier in range(number + 1)
            for _, loss, level in passes[earlier]
        ]
        shares = []
        for _, loss, level in visits:
            for reach in range(200):
                near = [(value, part) for key, value, part in so_far if abs(key - bin_of(level)) <= reach]
                if sum(part for _, part in near) >= 10:
                    break
            shares.append(loss * sum(part for _, part in near) / sum(value * part for value, part in near))
        for (index, _, _), share in zip(visits, shares, strict=True):
            history[index].insert(0, share * len(shares) / sum(shares))
    counts = {index: [decay**k for k in range(len(seen))] for index, seen in history.items()}
    return {i: sum(a * b for a, b in zip(seen, counts[i], strict=True)) / sum(counts[i]) for i, seen in history.items()}


@pytest.mark.parametrize("spread", [6, 0.5])
@pytest.mark.parametrize("score_ema", [0.0, 0.5, 0.9])
def test_a_score_is_the_average_share_of_the_mean_at_its_level(score_ema: float, spread: float):
    rng = random.Random(0)
    passes = [a_pass(rng, 0.7**number, spread) for number in range(5)]
    store = store_of(score_ema)
    for visits in passes:
        record(store, visits)
        store.settle()
    expected = twin(passes, score_ema)
    assert {i: store.values[i].item() for i in expected} == pytest.approx(expected, rel=1e-5)
    assert store.seen.tolist() == [i in expected for i in range(N)]
    assert store.times_seen.sum() == sum(len(visits) for visits in passes)


def test_shares_of_a_pass_are_one_on_average_though_the_loss_falls():
    rng = random.Random(1)
    store = store_of(0.0)
    for number in range(4):
        visits = a_pass(rng, falls_to=0.3**number)
        record(store, visits)
        store.settle()
        assert store.values[[index for index, _, _ in visits]].mean().item() == pytest.approx(1, abs=1e-6)


def test_images_are_ranked_where_raw_losses_rank_levels():
    rng = random.Random(2)
    stores = {"raw": ScoreStore(N), "ema": ScoreStore(N, score="ema"), "timestep": store_of()}
    for _ in range(12):
        visits = a_pass(rng)
        for store in stores.values():
            record(store, visits)
            store.settle()
    seen = {name: store.values.numpy()[store.seen.numpy()] for name, store in stores.items()}
    by_image = np.arange(N)[stores["raw"].seen.numpy()]
    rank = {name: np.corrcoef(np.argsort(np.argsort(found)), by_image)[0, 1] for name, found in seen.items()}
    assert rank["timestep"] > 0.9
    assert rank["raw"] < rank["ema"] < 0.8


def test_nothing_is_a_score_before_its_pass_is_over():
    store = store_of()
    record(store, [(3, 1.0, 0.0)])
    store.flush()
    assert not store.seen.any() and not store.times_seen.any()
    store.merge()
    assert not store.seen.any()
    store.settle()
    assert store.seen.nonzero().flatten().tolist() == [3] and store.values[3] == 1
    store.settle()  # a pass without a visit
    assert store.values[3] == 1 and store.times_seen[3] == 1


def test_the_order_of_the_visits_changes_no_bit():
    rng = random.Random(3)
    visits = [(i, rng.random() * 10 ** rng.uniform(-9, 3), 0.0) for i in range(N)]  # sums of these are rounded
    first, second = store_of(), store_of()
    record(first, visits)
    record(second, rng.sample(visits, len(visits)), batch_size=3)
    for store in (first, second):
        store.settle()
    assert torch.equal(first.values, second.values)
    sums = [store.state_dict()["noise_levels"]["sums"] for store in (first, second)]
    assert torch.equal(*sums) and sums[0].any()


def test_several_visits_in_a_pass_are_averaged_in_their_order():
    store = store_of(0.5)
    record(store, [(i % 2, loss, 0.0) for i, loss in enumerate([1.0, 4.0] * 6 + [3.0, 4.0] * 6)])
    store.settle()
    counts = [0.5**k for k in range(12)]
    shares = [3 / 3] * 6 + [1 / 3] * 6  # the last one first, over the mean of 3
    assert store.values[0].item() == pytest.approx(sum(map(operator.mul, shares, counts)) / sum(counts), rel=1e-5)


@pytest.mark.parametrize("at", [0, 1, 10, 26])
def test_a_state_within_a_pass_goes_on_to_the_bit(at: int):
    rng = random.Random(4)
    before, visits, after = a_pass(rng), a_pass(rng), a_pass(rng)
    straight, resumed = store_of(), store_of()
    record(straight, before)
    straight.settle()
    record(straight, visits[:at])
    record(resumed, after)  # is forgotten
    resumed.flush()
    resumed.load_state_dict(through_a_file(straight.state_dict()))
    for store in (straight, resumed):
        record(store, visits[at:])
        store.settle()
        record(store, after)
        store.settle()
    assert torch.equal(straight.values, resumed.values)
    assert torch.equal(straight.times_seen, resumed.times_seen)


def test_bins_are_quarters_of_log_snr_and_have_ends():
    levels = torch.tensor([-math.inf, -20.0, -19.76, -19.74, -0.01, 0.0, 0.24, 0.26, 19.99, 20.0, math.inf])
    assert bins_of(levels).tolist() == [0, 0, 0, 1, 79, 80, 80, 81, 159, 160, 160]
    assert NUM_BINS == 161


def test_levels_without_noise_and_without_image_are_scored_too():
    store = store_of()
    visits = [(i, 1.0 + 2 * (i % 2), math.inf) for i in range(10)] + [(i, 5.0, -math.inf) for i in range(10, 20)]
    record(store, visits)
    store.settle()
    assert store.values[:20].tolist() == pytest.approx([0.5, 1.5] * 5 + [1] * 10)


def test_of_few_samples_the_levels_are_taken_together():
    store = store_of()
    record(store, [(i, float(1 + i % 2), float(i)) for i in range(12)])
    store.settle()
    low, high = store.values[0:12:2], store.values[1:12:2]
    assert (low < 0.8).all() and (high > 1.2).all()  # not all 1, as if each were what is usual at its level


def test_what_is_no_number_is_counted_and_no_score():
    store = store_of()
    broken = [(0, math.nan, 0.0), (1, 1.0, math.nan), (2, math.inf, 1.0), (-1, 1.0, 0.0)]
    record(store, [*broken, *((i, 2.0, 9.0) for i in range(10, 20)), *((i, 4.0, -9.0) for i in range(20, 30))], 50)
    store.settle()
    assert store.num_nonfinite == 3
    assert store.seen.nonzero().flatten().tolist() == list(range(10, 30))
    assert store.values[10:30].tolist() == pytest.approx([1] * 20)


def test_losses_of_nothing_divide_nothing():
    store = store_of()
    record(store, [(0, 0.0, 0.0), (1, 0.0, 3.0)])
    store.settle()
    assert store.seen.sum() == 2 and torch.isfinite(store.values).all()


def test_negative_losses_are_refused():
    store = store_of()
    record(store, [(0, 1.0, 0.0), (1, -2.5, 0.0)])
    with pytest.raises(ValueError, match=r"none below 0, but got -2\.5"):
        store.flush()


def test_a_missing_or_misshapen_level_is_refused():
    with pytest.raises(ValueError, match="score='timestep' needs the noise level"):
        store_of().record(torch.tensor([0]), torch.tensor([1.0]))
    with pytest.raises(ValueError, match=r"2 losses but log_snr of shape \(1,\)"):
        store_of().record(torch.tensor([0, 1]), torch.ones(2), log_snr=torch.zeros(1))
    with pytest.raises(ValueError, match=r"log_snr holds torch\.int64: .* not the timestep"):
        store_of().record(torch.tensor([0, 1]), torch.ones(2), log_snr=torch.tensor([3, 999]))
    store = store_of()
    store.record(torch.tensor([0, 1]), torch.ones(2), log_snr=[0.5, 1.5])  # type: ignore[arg-type]
    store.settle()
    assert store.seen[:2].all()


def test_the_caller_may_reuse_its_levels():
    store, level = store_of(), torch.zeros(20)
    store.record(torch.arange(20), torch.tensor([1.0, 3.0]).repeat(10), log_snr=level)
    level[::2] = 9  # would be another bin
    store.settle()
    assert store.values[:20].tolist() == pytest.approx([0.5, 1.5] * 10)


# ---- in a training ----------------------------------------------------------------------------------------


def test_a_loop_of_your_own_ranks_by_noise_level():
    infobatch = InfoBatch(N, 6, score="timestep", score_ema=0.5, batch_size=4)
    rng = random.Random(5)
    passes = []
    for _ in range(6):
        walked = list(infobatch.sampler)
        visits = [(i, (0.5 + i / N) * math.exp(level), level) for i in walked for level in [rng.uniform(-3, 3)]]
        passes.append(visits)
        for start in range(0, len(visits), 4):
            index, loss, level = zip(*visits[start : start + 4], strict=True)
            infobatch.weigh(torch.tensor(loss), index, torch.tensor(level))
    expected = twin(passes, 0.5)
    state = infobatch.state_dict()
    assert state["scores"].tolist() == pytest.approx([expected[i] for i in range(N)], rel=1e-5)
    books = infobatch.summary()
    assert (books["score"], books["score_ema"]) == ("timestep", 0.5) and books["visits"] < 6 * N
    assert books["per_pass"][0]["score_mean"] == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError, match="needs the noise level"):
        infobatch = InfoBatch(N, 2, score="timestep")
        infobatch.weigh(torch.ones(1), [next(iter(infobatch.sampler))])


def pruner_of(**score: Any) -> Pruner:
    return Pruner(EpochSchedule(N, 4, 4), InfoBatchPolicy(), **score)


def test_a_state_says_what_it_ranks_by_and_which_version_can_read_it():
    states = {name: pruner_of(score=name).state_dict() for name in ("raw", "ema", "timestep")}
    assert [state["version"] for state in states.values()] == [1, 2, 3]
    for name, state in states.items():
        pruner_of(score=name).check_state(through_a_file(state))
        for other in states:
            if other != name:
                with pytest.raises(ValueError, match=f"'score': '{name}'.* this run has .*'score': '{other}'"):
                    pruner_of(score=other).check_state(state)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("indices", torch.tensor([N])),
        ("indices", torch.tensor([-1])),
        ("indices", torch.tensor([0, 1])),
        ("losses", torch.tensor([math.nan])),
        ("losses", torch.tensor([-1.0])),
        ("bins", torch.tensor([200], dtype=torch.uint8)),
        ("bins", torch.tensor([1])),
        ("sums", torch.zeros(2, 3, dtype=torch.float64)),
        ("sums", None),
    ],
)
def test_damaged_levels_are_refused(key: str, value: Any):
    pruner = pruner_of(score="timestep")
    record(pruner.store, [(0, 1.0, 0.0)])
    state = pruner.state_dict()
    pruner.check_state(state)
    state["noise_levels"] = {**state["noise_levels"], key: value}
    with pytest.raises(ValueError, match="damaged at 'noise_levels'"):
        pruner_of(score="timestep").load_state_dict(state)
    state.pop("noise_levels")
    with pytest.raises(ValueError, match="damaged at 'noise_levels'"):
        pruner_of(score="timestep").load_state_dict(state)


@pytest.mark.parametrize(
    ("score", "score_ema", "resolved"),
    [
        (None, None, ("raw", 0.0)),
        (None, 0, ("raw", 0.0)),
        (None, 0.8, ("ema", 0.8)),
        ("raw", None, ("raw", 0.0)),
        ("ema", None, ("ema", 0.9)),
        ("timestep", None, ("timestep", 0.9)),
        ("timestep", 0, ("timestep", 0.0)),
        ("timestep", 0.5, ("timestep", 0.5)),
    ],
)
def test_score_and_average_complete_each_other(score: str | None, score_ema: float | None, resolved: tuple[str, float]):
    built = build_score(score, score_ema)
    assert (built.name, built.score_ema) == resolved


@pytest.mark.parametrize(
    ("score", "score_ema", "message"),
    [
        ("raw", 0.5, "score='raw' and score_ema=0.5 contradict"),
        ("ema", 0, "score='ema' and score_ema=0 contradict"),
        ("loss", None, "unknown score 'loss': choose one of"),
        ("timestep", 1, r"score_ema=1 is outside \[0, 1\)"),
    ],
)
def test_what_contradicts_itself_is_refused(score: str, score_ema: float | None, message: str):
    with pytest.raises(ValueError, match=message):
        ScoreStore(N, score_ema, score)
