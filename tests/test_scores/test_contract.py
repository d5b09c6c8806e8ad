"""What every score of the package promises, whatever its rule."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from infobatch_mm.core import EpochSchedule, Pruner, ScoreStore
from infobatch_mm.core.rng import generator
from infobatch_mm.core.score_rule import build_score, registered
from infobatch_mm.policies import InfoBatchPolicy

N = 20

#: Every score of the package, and arguments that make another one of it.
SCORES: list[Any] = [*sorted(registered()), dict(type="ema", score_ema=0.5), dict(type="timestep", score_ema=0.0)]


@pytest.fixture(params=SCORES, ids=str)
def score(request: pytest.FixtureRequest) -> Any:
    return request.param


def visit(store: ScoreStore, seed: int, **changes: Any) -> None:
    """Record a batch of eight samples, one of them twice."""
    source = generator(seed)
    index = torch.cat([torch.randperm(N, generator=source)[:7], torch.tensor([3])])
    losses, log_snr = torch.rand(8, generator=source), torch.randn(8, generator=source)
    store.record(index, changes.get("losses", losses), changes.get("valid"), log_snr)


def same(one: ScoreStore, other: ScoreStore) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("values", "seen", "times_seen"))


def test_a_pass_gives_finite_scores_to_what_it_visits_and_nothing_else(score: Any):
    store = ScoreStore(N, score=score)
    for seed in range(3):
        visit(store, seed)
    store.settle()
    assert 7 < int(store.seen.sum()) <= N and torch.isfinite(store.values).all()
    assert torch.equal(store.times_seen > 0, store.seen) and int(store.times_seen.sum()) == 24
    assert not store.values[~store.seen].any()


def test_what_is_unusable_is_counted_and_changes_nothing(score: Any):
    store, clean = ScoreStore(N, score=score), ScoreStore(N, score=score)
    for each in (store, clean):
        visit(each, 0)
        each.settle()
    visit(store, 1, losses=torch.full((8,), torch.nan))
    visit(store, 2, valid=torch.zeros(8, dtype=torch.bool))
    store.record(torch.tensor([-1]), torch.ones(1), None, torch.zeros(1))  # only fills a batch up
    store.settle()
    assert (store.num_nonfinite, store.num_invalid) == (8, 8)
    assert torch.equal(store.seen, clean.seen) and torch.equal(store.times_seen, clean.times_seen)


def test_inputs_are_left_alone(score: Any):
    store = ScoreStore(N, score=score)
    index, losses, log_snr = torch.arange(4), torch.rand(4, requires_grad=True), torch.zeros(4)
    before = losses.detach().clone()
    store.record(index, losses, None, log_snr)
    index.fill_(7)
    log_snr.fill_(9)
    store.settle()
    assert store.seen.nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert torch.equal(losses.detach(), before)


@pytest.mark.parametrize("amid", [False, True], ids=["between passes", "in a pass"])
def test_a_resumed_store_goes_on_as_if_nothing_had_happened(score: Any, amid: bool):
    store = ScoreStore(N, score=score)
    visit(store, 0)
    store.settle()
    if amid:
        visit(store, 1)
    file = io.BytesIO()
    torch.save(store.state_dict(), file)
    file.seek(0)
    resumed = ScoreStore(N, score=score)
    visit(resumed, 9)  # which is forgotten
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for each in (store, resumed):
        visit(each, 2)
        each.settle()
    assert same(store, resumed)


def test_settings_make_the_same_score(score: Any):
    settings = ScoreStore(N, score=score).settings()
    assert set(settings) == {"score", "score_ema"}
    assert build_score(settings["score"], settings["score_ema"]).settings() == settings
    assert build_score(dict(type=settings["score"], score_ema=settings["score_ema"])).settings() == settings


def test_a_state_of_another_score_or_a_damaged_one_is_refused(score: Any):
    def pruner(score: Any) -> Pruner:
        return Pruner(EpochSchedule(N, 4, 2), InfoBatchPolicy(), score=score)

    state = pruner(score).state_dict()
    for other in SCORES:
        if build_score(other).settings() != build_score(score).settings():
            with pytest.raises(ValueError, match=r"the checkpoint was pruned with .*, this run has"):
                pruner(other).check_state(state)
    for key in ScoreStore(N, score=score).rule.state_dict():
        with pytest.raises(ValueError, match=f"damaged at '{key}'"):
            pruner(score).check_state({**state, key: None})


def test_a_dict_that_contradicts_itself_or_asks_for_too_much_is_refused():
    with pytest.raises(ValueError, match=r"score_ema=0.5 and score=dict\(score_ema=0.8, ...\): set it in one of them"):
        build_score(dict(type="ema", score_ema=0.8), 0.5)
    with pytest.raises(ValueError, match=r"score 'ema' cannot be made with .*decay"):
        build_score(dict(type="ema", decay=0.8))
    with pytest.raises(ValueError, match="unknown score 'loss': choose one of"):
        build_score(dict(type="loss"))
