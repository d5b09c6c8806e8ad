"""The table of a forecast, against passes that are worked out by hand, and the sentence that follows from it."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("scipy")

from infobatch_mm.core import build_policy
from infobatch_mm.forecast.advice import advice
from infobatch_mm.forecast.estimates import RESAMPLES, Estimate, resampled
from infobatch_mm.forecast.forecast import Forecast, forecast
from infobatch_mm.forecast.gradients import Look, Measured
from infobatch_mm.forecast.table import Row, cases, chances_of, table

from .constructed import of_norms
from .test_gradients import Regression

INF = float("inf")


def rows(taken: Measured, noise: float = INF, savings: tuple[float, ...] = (0.5,), limit: float = 9.0) -> list[Row]:
    return table(taken, cases(savings), limit, np.full(1 + RESAMPLES, noise), resampled(len(taken), 0))


def row(found: list[Row], policy: str, way: str) -> Row:
    return next(each for each in found if each.policy.startswith(policy) and each.way == way)


def halves() -> Measured:
    """Four samples of norm 1 and four of norm 3; losses in proportion."""
    norms = np.repeat(np.array([1.0, 3.0] * 4)[:, None], 2, 1)
    return of_norms(norms, {"loss": norms / 5})


def test_worth_is_as_worked_out_by_hand() -> None:
    found = rows(halves())
    drawn = row(found, "variance", "norm")
    # Chances of 1/4 and 3/4; 40 / (4 / 0.25 + 36 / 0.75) of a full pass.
    assert (drawn.worth.cost, drawn.worth.worth) == pytest.approx((0.5, 40 / 64), abs=1e-4)
    assert drawn.efficiency.value == pytest.approx(1.25, abs=1e-4)
    assert drawn.equal_length.value == pytest.approx(40 / 64, abs=1e-4)  # where noise alone limits
    assert row(rows(halves(), noise=0.0), "variance", "norm").equal_length.value == pytest.approx(0.5, abs=1e-4)
    published = row(found, "infobatch", "loss")
    # Half of the samples lie below the mean, and are visited with a chance of 1/2.
    assert (published.worth.cost, published.worth.worth) == pytest.approx((0.75, 40 / (4 / 0.5 + 36)))
    at_random = row(found, "random", "nothing")
    assert (at_random.worth.cost, at_random.worth.worth) == pytest.approx((0.5, 0.5))


def test_a_score_is_judged_by_another_visit() -> None:
    norms = np.random.default_rng(0).lognormal(0.0, 0.8, (2000, 2))  # nothing in common
    drawn = row(rows(of_norms(norms)), "variance", "norm")
    assert drawn.efficiency.high < 1


def test_samples_without_a_score_are_visited() -> None:
    scores = np.array([np.nan, 0.1, 0.2, 5.0] * 5)
    for policy in (build_policy("infobatch"), build_policy(dict(type="variance", prune_ratio=0.4))):
        assert (chances_of(policy, scores)[0][::4] == 1).all()


def test_policies_that_draw_by_themselves_are_left_out_and_the_users_own_is_there() -> None:
    assert chances_of(build_policy("orderdp"), np.random.default_rng(0).random(20)) is None
    titles = [each.title for each in cases([0.3], build_policy(dict(type="variance", prune_ratio=0.7)))]
    assert titles == ["infobatch, r = 0.5", "random", "variance", "variance, as configured"]
    assert len(cases([0.3], build_policy("infobatch", 0.5, 0.7))) == 3  # it is there


@pytest.mark.parametrize("delta", [0.3, 0.8, 1.0])
def test_what_a_training_is_to_save_is_shared_out_over_its_pruned_passes(delta: float) -> None:
    policy = build_policy(dict(type="variance", target_saving=0.2, delta=delta))
    chances, weighted = chances_of(policy, np.random.default_rng(0).random(400))
    assert weighted and chances.mean() == pytest.approx(1 - 0.2 / delta)


@pytest.mark.parametrize("saving", [0.0, 0.95, -1.0, 1.0])
def test_savings_out_of_range_are_refused(saving: float) -> None:
    with pytest.raises(ValueError, match=rf"--savings {saving}: "):
        cases([saving])


def of(limit: float, noise_scale: float, low: float = 1.2) -> Forecast:
    efficiency = Estimate(1.6, low, 1.8)
    drawn = row(rows(halves(), savings=(0.4,), limit=limit), "variance", "norm")
    drawn = Row("variance", "gradient", 0.4, drawn.worth, efficiency, Estimate(0.9, 0.8, 0.95))
    limits, noise = Estimate(limit, 1.0, limit + 0.1), noise_scale / 16
    most = limit if noise == INF else (1 + noise) / (1 + noise / limit)
    return Forecast(
        800, halves(), 16, limits, Estimate(noise_scale, 0.0, INF), Estimate(most, 1.0, 9.0), 0.5, [drawn], None, []
    )


def test_the_advice_says_which_case_it_is() -> None:
    assert advice(of(1.25, INF)).startswith("no unbiased pruning can save more than 20% of a run that is as good")
    assert advice(of(1.25, INF)).endswith("to save as many visits, train 20% shorter, and measure what that costs")
    assert "gradients are of one size" in advice(of(1.0, INF))
    assert "noise does not limit here" in advice(of(3.0, 1.6)) and "0.1" in advice(of(3.0, 1.6))
    paying = advice(of(3.0, 1600.0))
    assert paying.startswith("draws by gradient at a saving of 40% are worth 90% [80%, 95%] of a full run")
    assert paying.count("shortened to as many visits is worth 60%. ")
    assert "the score does not find which" in advice(of(3.0, INF, low=0.9))


def test_a_forecast_holds_plain_numbers_and_counts_what_is_done() -> None:
    class Scored(Regression):
        def look(self, index: int, key: tuple[int, ...]) -> Look:
            return Look(super().look(index, key).loss, 1.0)

    done: list[int] = []
    found = forecast(Scored(12), 9, [0.5], done=lambda: done.append(1))
    assert len(done) == 9 and found.batch_size == 4
    assert {each.way for each in found.rows} == {"norm", "gradient", "loss", "calibrated", "nothing"}
    plain = json.loads(json.dumps(found.plain(), allow_nan=False))
    assert plain["measured"] == 9 and len(plain["rows"]) == 4 + 1 + 4
    noise = found.noise_scale.value / 4
    assert found.most.value == pytest.approx((1 + noise) / (1 + noise / found.limit.value))
    assert 1 <= found.most.low <= found.most.value <= found.limit.value
    again = forecast(Scored(12), 9, [0.5])
    assert again.plain() == found.plain()
