"""Intervals and the words that follow from them, against numbers computed by hand."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path

import pytest

for needed in ("scipy", "rich", "matplotlib"):
    pytest.importorskip(needed)

from rich.console import Console

from infobatch_mm.report.logs import default_margin, is_loss, set_aside, validations
from infobatch_mm.report.statistics import Interval, confidence, paired_interval
from infobatch_mm.report.verdict_figures import verdict_figure
from infobatch_mm.report.verdict_tables import verdict_table
from infobatch_mm.report.verdicts import against_control, against_full, verdicts

# Of a printed table of Student's t: two-sided 95 %, by degrees of freedom.
TABLE = {1: 12.706, 2: 4.303, 4: 2.776, 9: 2.262}


@pytest.mark.parametrize("degrees", TABLE)
def test_an_interval_is_that_of_students_table(degrees: int) -> None:
    gaps = [random.Random(degrees).gauss(0.3, 1.0) for _ in range(degrees + 1)]
    found = paired_interval(gaps, 0.95)
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / degrees)
    half = TABLE[degrees] * deviation / math.sqrt(len(gaps))
    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx((mean, mean - half, mean + half), rel=1e-3)


def test_an_interval_holds_the_true_difference_as_often_as_it_says() -> None:
    draws, hits = random.Random(0), 0
    for _ in range(4000):
        found = paired_interval([draws.gauss(0.7, 2.0) for _ in range(4)], 0.9)
        hits += found is not None and found.low <= 0.7 <= found.high
    assert hits / 4000 == pytest.approx(0.9, abs=3 * math.sqrt(0.9 * 0.1 / 4000))


def test_no_interval_without_spread_or_numbers() -> None:
    assert paired_interval([0.4], 0.95) is None
    assert paired_interval([0.4, math.nan], 0.95) is None
    assert paired_interval([0.25, 0.25, 0.25], 0.95) == Interval(0.25, 0.25, 0.25)


def test_several_arms_share_the_error() -> None:
    assert confidence(1) == 0.95
    assert confidence(4) == pytest.approx(1 - 0.0125)
    # Two seeds: one degree of freedom, where Student's quantile is a tangent.
    found = paired_interval([1.0, 2.0], confidence(4))
    half = math.tan(math.pi * (1 - 0.0125) / 2) * statistics.stdev([1.0, 2.0]) / math.sqrt(2)
    assert found is not None and (found.low, found.high) == pytest.approx((1.5 - half, 1.5 + half))


@pytest.mark.parametrize(
    ("low", "high", "margin", "words"),
    [
        (-0.4, 0.3, 0.5, "lossless"),
        (-0.5, 0.3, 0.5, "undecided"),  # the end must be better than the margin
        (-0.4, -0.1, 0.5, "lossless"),  # worse for certain, and by less than the margin
        (-2.0, -0.6, 0.5, "inferior"),
        (-2.0, -0.4, 0.5, "undecided"),
        (0.1, 0.3, 0.0, "lossless"),
        (0.1, 0.3, None, "no margin stated"),
    ],
)
def test_lossless_is_an_interval_above_the_margin(low: float, high: float, margin: float | None, words: str) -> None:
    assert against_full(Interval((low + high) / 2, low, high), margin) == words


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.1, 0.3, "better than shorter"), (-0.3, -0.1, "worse than shorter"), (0.0, 0.2, "undecided")],
)
def test_better_than_shorter_is_an_interval_above_zero(low: float, high: float, words: str) -> None:
    assert against_control(Interval((low + high) / 2, low, high), "shortened") == words


def rows(metric: str, **values: float) -> dict[str, dict[str, float]]:
    return {arm: {metric: value} for arm, value in values.items()}


def test_verdicts_pair_the_seeds() -> None:
    # Seeds differ by ten points; within a seed the arm is 0.2 better than full, 0.1 at most beside it.
    seeds = {
        0: rows("mIoU", baseline=50.0, a=50.3, short=49.0),
        1: rows("mIoU", baseline=60.0, a=60.2, short=59.1),
        2: rows("mIoU", baseline=40.0, a=40.1, short=39.0),
    }
    full, short = verdicts("mIoU", seeds, {"a": {"full": "baseline", "shortened": "short"}}, 0.5, False)
    # Two degrees of freedom: the quantile of a two-sided level L is L sqrt(2 / (1 - L^2)).
    half = 0.95 * math.sqrt(2 / (1 - 0.95**2)) * 0.1 / math.sqrt(3)
    assert full.interval is not None
    assert (full.interval.low, full.interval.high) == pytest.approx((0.2 - half, 0.2 + half))
    assert list(full.differences.values()) == pytest.approx([0.3, 0.2, 0.1])
    assert (full.words, short.words) == ("lossless", "better than shorter")
    assert json.loads(json.dumps(full.as_json()))["interval"] == pytest.approx([0.2 - half, 0.2 + half])

    # Where lower is better, the arm is worse by 0.2 +- 0.248.
    for margin, expected in ((0.5, "lossless"), (0.04, "undecided"), (None, "no margin stated")):
        turned = verdicts("mIoU", seeds, {"a": {"full": "baseline"}}, margin, True)[0]
        assert turned.interval == full.interval  # of the metric itself; the words turn it round
        assert turned.words == expected
    assert verdicts("mIoU", seeds, {"a": {"shortened": "short"}}, 0.5, True)[0].words == "worse than shorter"


def test_one_seed_and_unmeasured_metrics_give_no_verdict() -> None:
    one = verdicts("mIoU", {0: rows("mIoU", baseline=50.0, a=99.0)}, {"a": {"full": "baseline"}}, 0.5, False)
    assert one[0].words == "no verdict: one seed" and one[0].interval is None
    blind = {seed: rows("loss", baseline=math.nan, a=1.0) for seed in (0, 1)}
    assert verdicts("loss", blind, {"a": {"full": "baseline"}}, 0.5, True)[0].words.startswith(
        "no verdict: not measured"
    )


def test_the_table_and_the_figure_say_how_they_are_to_be_read(tmp_path: Path) -> None:
    seeds = {seed: rows("mIoU", baseline=50.0 + seed, a=49.9 + 1.1 * seed, b=45.0, short=48.0) for seed in (0, 1, 2)}
    opponents = {"a": {"full": "baseline", "shortened": "short"}, "b": {"full": "baseline", "shortened": "short"}}
    found = verdicts("mIoU", seeds, opponents, 0.5, False)
    console = Console(width=160, record=True, file=(tmp_path / "out.txt").open("w"))
    console.print(verdict_table("title", "mIoU", found))
    said = " ".join(console.export_text().split())
    for words in (
        "lossless",
        "inferior",
        "97.5 %",
        "level 1 - 0.05/2",
        "Bonferroni",
        "differences of all seeds are equal",
    ):
        assert words in said
    verdict_figure("title", "mIoU", found, False, tmp_path / "verdicts.png")
    assert (tmp_path / "verdicts.png").stat().st_size > 10_000


def test_margins_and_directions_are_known_of_some_metrics_only() -> None:
    assert (default_margin("mIoU"), default_margin("accuracy/top1"), default_margin("mDice")) == (0.5, 0.5, None)
    assert is_loss("held_out_loss") and is_loss("valLoss") and not is_loss("mIoU")


def leave_life(work_dir: Path, name: str, *points: tuple[int, float], rest: str = "") -> None:
    folder = work_dir / name / "vis_data"
    folder.mkdir(parents=True)
    lines = [json.dumps({"lr": 0.1, "iter": 1, "step": 1})]
    lines += [json.dumps({"mIoU": value, "step": step}) for step, value in points]
    (folder / "scalars.json").write_text("\n".join(lines) + "\n" + rest)


def test_all_lives_of_a_run_are_read_and_the_later_one_counts(tmp_path: Path) -> None:
    leave_life(tmp_path, "20260101_000000", (10, 1.0), (20, 2.0), (30, 3.0), rest='{"mIoU": 4.0, "st')
    leave_life(tmp_path, "20260101_000100")  # killed before it validated anything
    leave_life(tmp_path, "20260101_000200", (20, 2.5), (40, 4.5))
    assert [(line["step"], line["mIoU"]) for line in validations(tmp_path)] == [(10, 1.0), (20, 2.5), (40, 4.5)]
    set_aside(tmp_path)
    assert validations(tmp_path) == []
    leave_life(tmp_path, "20260101_000300", (10, 7.0))
    assert [line["mIoU"] for line in validations(tmp_path)] == [7.0]
