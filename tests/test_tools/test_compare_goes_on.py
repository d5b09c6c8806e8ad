"""A comparison in miniature, with two policies, two seeds and controls: killed, and begun again."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

for needed in ("mmpretrain", "matplotlib", "rich", "scipy"):
    pytest.importorskip(needed)

from infobatch_mm.report.logs import validations

ROOT = Path(__file__).parents[2]
TOY = """
import os
import time

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from test_engine.toy_classifier import *

@HOOKS.register_module()
class Dawdle(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if os.environ.get("DAWDLE", "nowhere") in runner.work_dir:
            time.sleep(0.2)
"""
POLICIES = ["infobatch:prune_ratio=0.5,delta=0.75", "variance:prune_ratio=0.4"]
COMMAND = [
    *(sys.executable, str(ROOT / "tools/compare.py"), "toy.py", "--seeds", "0", "1", "--work-dir", "out"),
    *("--policies", *POLICIES, "--controls", "shortened", "smaller", "--margin", "10"),
]


def start(folder: Path, dawdle: str = "nowhere") -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT / 'tests'}", "DAWDLE": dawdle, "OMP_NUM_THREADS": "1"}
    output = (folder / "output.txt").open("w")
    return subprocess.Popen(
        COMMAND, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(folder: Path) -> str:
    process = start(folder)
    assert process.wait(600) == 0, (folder / "output.txt").read_text()[-4000:]
    return (folder / "output.txt").read_text()


def lives(work_dir: Path) -> list[str]:
    return sorted(path.parts[-3] for path in work_dir.glob("*/vis_data/scalars.json"))


def record(work_dir: Path) -> dict[str, Any]:
    return json.loads((work_dir / "arm.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_comparison_goes_on_and_its_verdicts_are_those_of_its_rows(tmp_path: Path) -> None:
    from test_engine.toy_classifier import config

    (tmp_path / "toy_user.py").write_text(TOY)
    cfg = config(
        tmp_path / "unused",
        custom_hooks=[dict(type="Dawdle")],
        custom_imports=dict(imports=["toy_user"]),
        log_level="INFO",
        **{
            "train_cfg.val_interval": 1,
            "default_hooks.checkpoint.by_epoch": True,
            "default_hooks.checkpoint.interval": 1,
        },
    )
    cfg.pop("work_dir")
    cfg.dump(tmp_path / "toy.py")

    process = start(tmp_path, dawdle="variance")
    killed = tmp_path / "out/seed0/variance-prune_ratio-0.4"
    while not (killed / "epoch_2.pth").exists():
        assert process.poll() is None, (tmp_path / "output.txt").read_text()[-4000:]
        time.sleep(0.05)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = [tmp_path / "out/seed0" / name for name in ("baseline", "infobatch-prune_ratio-0.5-delta-0.75")]
    before = [(path / "arm.json").stat().st_mtime_ns for path in done]
    assert all(record(path)["done"] for path in done) and not record(killed)["done"]
    assert record(killed)["wall_time_s"] > 0
    (first_life,) = lives(killed)
    first_validations = [line["step"] for line in validations(killed)]

    finish(tmp_path)
    assert [(path / "arm.json").stat().st_mtime_ns for path in done] == before
    assert [len(lives(path)) for path in done] == [1, 1]
    assert lives(killed)[0] == first_life and len(lives(killed)) == 2
    assert [line["step"] for line in validations(killed)] == [1, 2, 3, 4]
    resumed = killed / lives(killed)[1] / "vis_data/scalars.json"
    assert '"step": 1}' not in resumed.read_text() and first_validations[0] == 1  # it did not begin from the start
    assert record(killed)["done"]

    result = json.loads((tmp_path / "out/comparison.json").read_text())
    check_verdicts(result)
    for seed in ("0", "1"):
        rows = result["rows"][seed]
        assert all(rows[arm]["visits"] < rows["baseline"]["visits"] == 280 for arm in POLICIES)
        for arm, controls in result["controls"].items():
            more = rows[controls["shortened"]]["visits"] - rows[arm]["visits"]
            assert -0.01 * rows[arm]["visits"] <= more <= 70  # whole epochs of 70, rounded up
            assert abs(rows[controls["smaller"]]["visits"] - rows[arm]["visits"]) <= 9  # a sample a step
            assert rows[controls["smaller"]]["iterations"] == rows["baseline"]["iterations"]
    assert (tmp_path / "out/verdicts.png").stat().st_size > 10_000

    every = sorted(path.stat().st_mtime_ns for path in (tmp_path / "out").glob("seed*/*/arm.json"))
    said = finish(tmp_path)  # nothing is left to train
    assert said.count("done before") == len(every)
    assert every == sorted(path.stat().st_mtime_ns for path in (tmp_path / "out").glob("seed*/*/arm.json"))
    check_verdicts(json.loads((tmp_path / "out/comparison.json").read_text()))


def check_verdicts(result: dict[str, Any]) -> None:
    """Every verdict follows from the rows, by hand."""
    metric = result["metric"]
    # Two seeds leave one degree of freedom: Student's distribution is Cauchy's. Two arms share the error of 5 %.
    quantile = math.tan(math.pi * ((1 + (1 - 0.05 / 2)) / 2 - 0.5))
    assert {(each["arm"], each["against"]) for each in result["verdicts"]} == {
        (arm, kind) for arm in POLICIES for kind in ("full", "shortened", "smaller")
    }
    for each in result["verdicts"]:
        other = "baseline" if each["against"] == "full" else result["controls"][each["arm"]][each["against"]]
        gaps = [rows[each["arm"]][metric] - rows[other][metric] for rows in result["rows"].values()]
        mean, half = statistics.mean(gaps), quantile * statistics.stdev(gaps) / math.sqrt(2)
        assert list(each["differences"].values()) == pytest.approx(gaps)
        assert each["interval"] == pytest.approx([mean - half, mean + half])
        pairs = [(rows[each["arm"]]["visits"], rows[other]["visits"]) for rows in result["rows"].values()]
        if statistics.stdev(gaps) < 1e-7:  # accuracies of few images
            assert each["words"] == "undecided: all differences are equal"
            continue
        if each["against"] == "full":
            expected = "lossless" if mean - half > -10 else "inferior" if mean + half < -10 else "undecided"
        else:
            name = {"shortened": "shorter", "smaller": "smaller batches"}[each["against"]]
            expected = (
                f"better than {name}" if mean - half > 0 else f"worse than {name}" if mean + half < 0 else "undecided"
            )
            if (expected.startswith("worse") and any(its > 1.01 * own for own, its in pairs)) or (
                not expected.startswith("worse") and any(its < 0.99 * own for own, its in pairs)
            ):
                expected = "no verdict: the control made"
        assert each["words"].startswith(expected)
