"""What gives no verdict: equal differences, controls with other visits, and what was never measured."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

for needed in ("scipy", "rich", "matplotlib"):
    pytest.importorskip(needed)

from rich.console import Console

from infobatch_mm.core import EpochSchedule, IterSchedule
from infobatch_mm.report.figures import comparison_figure
from infobatch_mm.report.logs import is_loss, last_value
from infobatch_mm.report.runs import Arm, read_arm
from infobatch_mm.report.seeds import means, write_numbers
from infobatch_mm.report.tables import comparison_table
from infobatch_mm.report.verdict_figures import verdict_figure
from infobatch_mm.report.verdict_tables import how_to_read, verdict_table
from infobatch_mm.report.verdicts import Verdict, verdicts

OPPONENTS = {"a": {"full": "baseline", "shortened": "short"}}
COSTS = dict(iterations=9, wall_time_s=1.0)


def judged(
    *seeds: tuple[float, float, float], margin: float | None = 0.5, visits: tuple[tuple[int, int, int], ...] = ()
) -> list[Verdict]:
    """Verdicts on the metric of baseline, arm and shorter run by seed, and on their visits."""
    rows = {}
    for seed, values in enumerate(seeds):
        made = visits[seed] if visits else (100, 70, 70)
        rows[seed] = {
            name: {"top1": value, "visits": count}
            for name, value, count in zip(("baseline", "a", "short"), values, made, strict=True)
        }
    return verdicts("top1", rows, OPPONENTS, margin, False)


# ---- equal differences -------------------------------------------------------------------------------------------

EQUAL = "undecided: all differences are equal"


@pytest.mark.parametrize(
    "seeds",
    [
        [(75.0, 75.5, 74.5), (74.5, 75.0, 74.0)],
        [(70.0, 70.1, 69.9), (70.1, 70.2, 70.0)],  # 0.1 each, but for rounding
        [(70.0, 70.0, 69.0), (71.0, 71.0, 70.0)],  # as good as full, by fewer visits
    ],
    ids=["exactly", "but for rounding", "without a difference"],
)
def test_equal_differences_of_seeds_are_no_certainty(seeds: list[tuple[float, float, float]]) -> None:
    found = judged(*seeds, margin=0.0)
    assert [each.words for each in found] == [EQUAL, EQUAL]
    assert "no width" in how_to_read(found, False)
    # The smallest step of an accuracy over 10,000 images is a difference.
    (baseline, arm, short), second = seeds
    apart = judged((baseline, arm + 0.01, short), second, margin=0.0)
    assert EQUAL not in [each.words for each in apart] and "no width" not in how_to_read(apart, False)


def test_an_arm_that_pruned_nothing_is_the_full_run() -> None:
    same = judged((70.0, 70.0, 70.0), (71.0, 71.0, 71.0), margin=0.0, visits=((100, 100, 100),) * 2)
    assert [each.words for each in same] == ["lossless", EQUAL]
    assert judged((70.0, 70.0, 70.0), (71.0, 71.0, 71.0), margin=None)[0].words == EQUAL


# ---- visits of controls ------------------------------------------------------------------------------------------

BETTER = [(75.0, 75.5, 70.0), (74.5, 75.1, 69.95), (74.0, 74.4, 69.2)]
WORSE = [(75.0, 70.5, 75.0), (74.5, 70.1, 74.95), (74.0, 69.4, 74.2)]
OPEN = [(75.0, 75.5, 75.0), (74.5, 74.1, 74.5), (74.0, 74.4, 74.2)]


@pytest.mark.parametrize(
    ("seeds", "control", "words"),
    [
        (BETTER, (700, 700, 693), "better than shorter"),
        (BETTER, (800, 700, 700), "better than shorter"),  # a harder opponent
        (BETTER, (700, 700, 581), "no verdict: the control made 17.0% fewer visits in seed 2"),
        (WORSE, (700, 700, 700), "worse than shorter"),
        (WORSE, (700, 581, 700), "worse than shorter"),  # an easier opponent
        (WORSE, (700, 700, 800), "no verdict: the control made 14.3% more visits in seed 2"),
        (OPEN, (700, 700, 800), "undecided"),
        (OPEN, (581, 700, 700), "no verdict: the control made 17.0% fewer visits in seed 0"),
    ],
)
def test_a_control_that_made_other_visits_gives_no_verdict(
    seeds: list[tuple[float, float, float]], control: tuple[int, int, int], words: str
) -> None:
    found = judged(*seeds, visits=tuple((1000, 700, count) for count in control))[1]
    assert found.words == words
    assert found.as_json()["visits"] == {seed: (700, count) for seed, count in enumerate(control)}
    said = how_to_read([found, *judged(*seeds)[:1]], False)
    assert ("better: than a control" in said) == words.startswith("better")


# ---- what was not measured ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [(math.nan, 1.0), (1.0, math.inf), (math.inf, -math.inf)])
def test_what_is_not_finite_is_null_in_files_and_a_dash_in_tables(tmp_path: Path, values: tuple[float, float]) -> None:
    seeds = {
        seed: {
            "baseline": {"loss": 1.0, "visits": 9, **COSTS},
            "a": {"loss": value, "visits": 7, **COSTS},
        }
        for seed, value in enumerate(values)
    }
    numbers = means("loss", seeds)
    found = verdicts("loss", seeds, {"a": {"full": "baseline"}}, 0.5, True)
    assert found[0].words == "no verdict: not measured in all seeds"
    write_numbers(tmp_path / "out.json", {**numbers, "verdicts": [found[0].as_json()], "rows": seeds})
    kept = json.loads((tmp_path / "out.json").read_text(), parse_constant=lambda text: pytest.fail(text))
    assert kept["mean"]["a"] == dict(loss=None, visits=7, iterations=9, wall_time_s=1.0)
    assert kept["std"]["a"]["loss"] is None and kept["mean"]["baseline"]["loss"] == 1.0
    assert kept["verdicts"][0]["mean"] is None

    console = Console(width=200, record=True, file=(tmp_path / "out.txt").open("w"))
    console.print(comparison_table("", "loss", list(seeds.values()), pruned=["a"]))
    console.print(verdict_table("", "loss", found, True))
    said = console.export_text()
    assert "nan" not in said and "inf " not in said and "│ - " in said.replace("  ", "")
    verdict_figure("title", "loss", found, True, tmp_path / "verdicts.png")
    arm = Arm([3, 7], [values[1], values[0]], 9, 1.0, [])
    comparison_figure("title", "loss", {"baseline": Arm([9], [1.0], 9, 1.0, []), "a": arm}, tmp_path / "arms.png")


def test_one_seed_without_a_measurement_says_so() -> None:
    assert judged((math.nan, 1.0, 1.0))[0].words == "no verdict: not measured in all seeds"


def test_a_run_that_validated_nothing_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "run/20260101_000000/vis_data"
    folder.mkdir(parents=True)
    (folder / "scalars.json").write_text('{"loss": 1, "iter": 3, "step": 3}\n')
    assert math.isnan(last_value(tmp_path / "run", "top1"))
    row = read_arm(tmp_path / "run", "top1", EpochSchedule(70, 4, 8, 9), 1.0, length=4).row("top1")
    assert math.isnan(row["top1"]) and (row["visits"], row["iterations"]) == (280, 36)
    row = read_arm(tmp_path / "run", "top1", IterSchedule(70, 30, 8), 1.0, length=30).row("top1")
    assert math.isnan(row["top1"]) and (row["visits"], row["iterations"]) == (240, 30)


def test_a_loss_is_a_word_of_a_name() -> None:
    losses = ("loss", "held_out_loss", "valLoss", "decode.loss_ce", "val/LOSS", "losses")
    assert [name for name in losses if not is_loss(name)] == []
    others = ("Glossiness", "lossless_acc", "mIoU", "accuracy/top1", "flosser")
    assert [name for name in others if is_loss(name)] == []
