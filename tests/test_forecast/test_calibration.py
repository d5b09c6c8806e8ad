"""Calibration of scores by true gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")

from infobatch_mm.core import ScoreStore, build_policy
from infobatch_mm.core.score_file import write_scores
from infobatch_mm.core.worth import limit
from infobatch_mm.forecast.calibration import calibrate, calibrated
from infobatch_mm.forecast.estimates import efficiencies, resampled
from infobatch_mm.forecast.table import Case, chances_of
from infobatch_mm.forecast.whole import forecast_whole, scores_of_run

from .constructed import of_norms


def test_calibrated_squares_never_fall_and_are_the_best_of_their_kind() -> None:
    source = np.random.default_rng(0)
    scores, squares = source.integers(0, 15, 40).astype(float), source.random(40)
    found = calibrate(scores, squares)
    assert (np.diff(found.scores) > 0).all() and (np.diff(found.squares) >= 0).all()
    # The largest of the smallest means over blocks that hold a place (Robertson, Wright and Dykstra, 1988, 1.4).
    for score, fitted in zip(found.scores, found.squares, strict=True):
        blocks = [
            [squares[(scores >= a) & (scores <= b)].mean() for b in found.scores if b >= score]
            for a in found.scores
            if a <= score
        ]
        assert fitted == pytest.approx(max(min(each) for each in blocks))


def test_between_and_beyond_what_was_seen() -> None:
    found = calibrate(np.array([1.0, 3.0]), np.array([4.0, 16.0]))
    np.testing.assert_allclose(found.norms(np.array([0.0, 1.0, 2.0, 9.0])), np.sqrt([4.0, 4.0, 10.0, 16.0]))
    assert np.isnan(found.norms(np.array([np.nan]))[0])


def test_a_score_that_knows_nothing_is_not_flattered_by_its_own_samples() -> None:
    policy = build_policy(dict(type="variance", prune_ratio=0.5))

    def efficiency(norms: np.ndarray, squares: np.ndarray) -> float:
        chances = np.stack([chances_of(policy, each)[0] for each in norms.T], 1)
        return efficiencies(squares, chances, np.ones((1, len(norms))))[0]

    honest, own = [], []
    for seed in range(20):
        source = np.random.default_rng(seed)
        squares = np.repeat(source.lognormal(0.0, 1.5, 80)[:, None], 2, 1)
        scores = np.repeat(source.random(80)[:, None], 2, 1)
        honest.append(efficiency(calibrated(scores, squares), squares))
        fitted = calibrate(scores[:, 0], squares[:, 0]).norms(scores)
        own.append(efficiency(fitted, squares))
    assert np.mean(honest) < 1.01 < 1.02 < np.mean(own)


def test_samples_without_a_score_are_not_calibrated() -> None:
    scores, squares = np.random.default_rng(2).random((2, 30, 2))
    scores[4, 0] = np.nan
    found = calibrated(scores, squares)
    assert np.isnan(found[4, 0]) and np.isfinite(found).sum() == 59


@pytest.fixture
def run_of_1000(tmp_path):
    """Scores whose square is proportional to the squared norm, of 990 samples of 1000."""
    norms = np.random.default_rng(3).lognormal(0.0, 0.7, 1000)
    store = ScoreStore(1000)
    store.record(torch.arange(990), torch.from_numpy(norms[:990].astype(np.float32)) ** 2 / 7)
    store.merge()
    write_scores(str(tmp_path), store)
    return tmp_path, norms


def test_the_whole_data_set_is_foretold_from_a_few_gradients(run_of_1000) -> None:
    path, norms = run_of_1000
    scores = scores_of_run(path, 1000)
    chosen = np.random.default_rng(4).permutation(1000)[:200]
    taken = of_norms(np.repeat(norms[chosen][:, None], 2, 1), num_samples=1000)
    taken = type(taken)(**{**vars(taken), "indices": chosen})
    case = Case("variance", build_policy(dict(type="variance", prune_ratio=0.5)), 0.5)
    found = forecast_whole(scores, taken, [case], float("inf"), resampled(200, 0))
    assert found.num_scored == 990 and found.reached == pytest.approx(limit(norms), rel=0.1)
    by_score, by_norm = found.rows
    true = chances_of(case.policy, norms)[0]
    assert by_norm.worth.cost == pytest.approx(0.5, abs=0.01)
    expected = np.square(norms).sum() / (np.square(norms) / true).sum()
    assert by_norm.worth.worth == pytest.approx(expected, rel=0.05)
    assert by_norm.equal_length.value == pytest.approx(by_norm.worth.worth)
    assert by_score.worth.worth < by_norm.worth.worth  # a squared norm is no norm
    assert found.checks[1].low < by_norm.efficiency.value < found.checks[1].high


def test_scores_of_another_data_set_are_refused(run_of_1000, tmp_path) -> None:
    with pytest.raises(ValueError, match="are of 1000 samples, the training data of the config has 70"):
        scores_of_run(run_of_1000[0], 70)
    with pytest.raises(ValueError, match="there is no infobatch_scores file"):
        scores_of_run(tmp_path / "none", 70)
