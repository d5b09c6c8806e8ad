"""What a run says of itself in the log."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mmseg")

from mmengine.runner import Runner
from PIL import Image

from infobatch_mm.core import EpochSchedule, IterSchedule, Pruner, build_policy
from infobatch_mm.core.short_runs import short_run_line
from infobatch_mm.demo.street import draw_dataset
from infobatch_mm.engine import InfoBatchHook

from .test_resume import KillAt, Killed
from .toy import EPOCHS, ONE_LINE, config, train


def log_of(runner: Runner) -> list[str]:
    """Lines of the log that are of us."""
    files = sorted(Path(runner.work_dir).glob("*/*.log"))
    return [line for line in files[-1].read_text().splitlines() if "InfoBatch" in line]


# ---- one line for each pass and one at the end ------------------------------------------------------------


@pytest.mark.parametrize(
    ("loop", "policy"),
    [
        ("iterations", "infobatch"),
        ("epochs", "none"),
        pytest.param("iterations", "none", marks=pytest.mark.slow),
        pytest.param("epochs", "infobatch", marks=pytest.mark.slow),
    ],
)
def test_a_line_for_each_pass_and_one_at_the_end(scenes: Path, tmp_path: Path, loop: str, policy: str) -> None:
    overrides = dict(EPOCHS) if loop == "epochs" else {}
    hooks = [dict(ONE_LINE[0], policy=policy)]
    runner, _ = train(config(scenes, tmp_path, log_level="INFO", custom_hooks=hooks, **overrides))
    lines = log_of(runner)
    summary = json.loads(Path(tmp_path, "infobatch_summary.json").read_text())
    passes = [line for line in lines if " done: " in line]
    assert len(passes) == 6
    for number, (line, entry) in enumerate(zip(passes, summary["per_pass"], strict=True), start=1):
        assert f"InfoBatch pass {number} of 6 done: kept {entry['kept_ratio']:.1%}, saved so far" in line
    assert f"saved so far {summary['saved_ratio']:.1%}" in passes[-1]
    (end,) = [line for line in lines if "in place of" in line]
    assert end == lines[-1]
    saved = f"{summary['visits']} visits in place of {summary['visits_full']}, {summary['saved_ratio']:.1%} saved"
    assert re.search(rf"InfoBatch: {re.escape(saved)}, in 6 passes, \d+ s$", end)


def test_a_resumed_run_says_where_it_goes_on(scenes: Path, tmp_path: Path) -> None:
    cfg = config(scenes, tmp_path)
    cfg.default_hooks.checkpoint.interval = 7
    with pytest.raises(Killed):
        train(cfg, KillAt(8))
    runner, _ = train(config(scenes, tmp_path, log_level="INFO", resume=True))
    (line,) = [line for line in log_of(runner) if "goes on" in line]
    assert re.search(r"InfoBatch: goes on in pass 2 of 6, after 8 of its \d+ visits$", line)


# ---- runs that are too short -------------------------------------------------------------------------------


def made(loop: str, length: int, delta: float, policy: str = "infobatch") -> Pruner:
    """A run over 22 samples in batches of 4."""
    schedule = IterSchedule(22, length, 4) if loop == "iterations" else EpochSchedule(22, length, 4)
    return Pruner(schedule, build_policy(policy, 0.5, delta))


def prunes(pruner: Pruner) -> bool:
    first = int(pruner.policy.needs_scores)  # of the passes that may be pruned
    progress = map(pruner.schedule.progress, range(first, pruner.schedule.num_passes))
    return any(map(pruner.policy.is_active, progress))


@pytest.mark.parametrize("policy", ["infobatch", "random"])
@pytest.mark.parametrize("delta", [0.05, 0.3, 0.5, 0.7, 0.875, 0.99])
@pytest.mark.parametrize("loop", ["iterations", "epochs"])
def test_what_a_short_run_is_advised_does_what_it_says(loop: str, delta: float, policy: str) -> None:
    """Whatever the length: the advice is never refused, and a run that follows it prunes."""
    spoken = 0
    for length in range(1, 60 if loop == "iterations" else 15):
        pruner, delta_now, length_now = made(loop, length, delta, policy), delta, length
        # Until there is nothing to say, which may take two changes.
        for _ in range(3):
            line = short_run_line(pruner)
            if line is None:
                break
            spoken += 1
            assert ("prunes nothing" in line) == (policy == "infobatch" and not prunes(pruner))
            if found := re.search(r"use (\d+) (?:iterations|epochs) or more \(now (\d+)\)", line):
                assert int(found[2]) == length_now
                length_now = int(found[1])
            else:
                delta_now = float(re.search(r"use delta=([\d.]+) ", line)[1])  # type: ignore[index]
            InfoBatchHook(delta=delta_now)  # not refused
            pruner = made(loop, length_now, delta_now, policy)
            assert prunes(pruner)
        assert short_run_line(pruner) is None
        assert prunes(pruner)
    assert spoken
    assert short_run_line(Pruner(IterSchedule(22, 3, 4), build_policy("infobatch", 0.0))) is None


def test_a_run_of_one_pass_is_told_so_and_not_to_use_delta_0(scenes: Path, tmp_path: Path) -> None:
    runner, _ = train(config(scenes, tmp_path, log_level="INFO", **{"train_cfg.max_iters": 5}))
    (line,) = [line for line in log_of(runner) if "WARNING" in line]
    assert (
        "this training prunes nothing: it is 0.909 passes over 22 samples, scores come only from the first, and "
        "pruning ends after delta=0.75 of it; use 11 iterations or more (now 5), or train without InfoBatch"
    ) in line


# ---- samples that never get a score -------------------------------------------------------------------------


def blanked(root: Path, numbers: list[int]) -> Path:
    """Leave no valid pixel in some training scenes: 0 is unlabelled."""
    for number in numbers:
        path = root / f"annotations/training/{number:05d}.png"
        Image.fromarray(np.zeros_like(np.array(Image.open(path)))).save(path)
    return root


@pytest.mark.parametrize(
    ("blank", "is_warned"), [pytest.param(16, True, marks=pytest.mark.slow), (2, True), (1, False)]
)
def test_samples_that_are_never_pruned_are_said_once_as_a_warning(tmp_path: Path, blank: int, is_warned: bool) -> None:
    root = blanked(draw_dataset(tmp_path / "scenes", num_train=20, num_val=2, size=32), list(range(blank)))
    hooks = dict(custom_hooks=[dict(ONE_LINE[0], score_ema=0.0)], log_level="INFO")
    runner, recorder = train(config(root, tmp_path / "run", **{"train_cfg.max_iters": 30, **hooks}))
    lines = log_of(runner)
    warnings = [line for line in lines if "WARNING" in line and "have no score" in line]
    assert len(warnings) == is_warned
    if is_warned:
        assert f"{blank} of 20 samples have no score and are never pruned" in warnings[0]
    # visits and samples are counted apart
    visits = sum(index < blank for batch in recorder.indices for index in batch)
    last = [line for line in lines if " done: " in line][-1]
    assert f"{visits} visits so far without a valid pixel" in last
    assert f"{blank} sample{'s' if blank > 1 else ''} without a score" in last
    summary: dict[str, Any] = json.loads(Path(tmp_path, "run/infobatch_summary.json").read_text())
    assert (summary["unusable_visits"], summary["unscored_samples"]) == (visits, blank)
