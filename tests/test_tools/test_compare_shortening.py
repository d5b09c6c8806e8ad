"""The shorter run of a comparison: validated at its end, with a schedule that is complete, and visits enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mmengine")

from mmengine.config import Config

from infobatch_mm.cli.comparison.controls import schedule_of
from infobatch_mm.cli.comparison.shortening import shortened, unmoved_points, whole
from infobatch_mm.cli.config import merged

from .test_compare import epochs, iterations, short

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


@pytest.mark.parametrize(
    ("loop", "visits", "end", "begin"),
    [
        (dict(max_epochs=10, val_begin=8), 600, 6, 4),
        (dict(max_epochs=10, val_begin=1), 600, 6, 1),
        (dict(max_epochs=10, val_begin=10), 90, 1, 1),
        (dict(max_iters=250, val_begin=200), 1200, 150, 120),
    ],
)
def test_the_last_epoch_or_iteration_is_validated(loop: dict[str, Any], visits: int, end: int, begin: int) -> None:
    cfg = short((epochs if "max_epochs" in loop else iterations)(train_cfg=loop, param_scheduler=[]), visits)
    assert (cfg.train_cfg.get("max_epochs") or cfg.train_cfg.max_iters, cfg.train_cfg.val_begin) == (end, begin)


def test_a_run_that_is_not_shorter_is_validated_as_it_was() -> None:
    cfg = epochs(train_cfg=dict(max_epochs=10, val_begin=8), param_scheduler=[])
    assert shortened(cfg, schedule_of(cfg, 100), 1000) == ["train_cfg.max_epochs=10"]


@pytest.mark.parametrize(
    ("visits", "count"), [(2400, 3), (1980, 2), (2020, 2), (2021, 3), (3000, 3), (1, 1), (999, 1), (1001, 1)]
)
def test_epochs_leave_no_more_than_a_hundredth_out(visits: int, count: int) -> None:
    assert whole(visits, 1000) == count
    assert count * 1000 >= 0.99 * visits


def test_periods_of_restarts_come_in_proportion() -> None:
    restarts = dict(type="CosineRestartLR", periods=[5, 5, 10], restart_weights=[1, 1, 1])
    assert short(epochs(param_scheduler=[restarts]), 1000).param_scheduler[0].periods == [2, 3, 5]  # ends at 2.5, 5, 10
    after = [dict(type="LinearLR", end=2), dict(restarts, begin=2, periods=[9, 9])]
    assert short(epochs(param_scheduler=after), 1100).param_scheduler[1].periods == [4, 5]
    cfg = epochs(param_scheduler=[dict(restarts, periods=(10, 10))])
    cfg.dump("tuple.py")
    assert merged(Path("tuple.py"), shortened(cfg, schedule_of(cfg, 100), 2000)).param_scheduler == cfg.param_scheduler


def test_a_scheduler_keeps_a_step() -> None:
    decay = dict(type="PolyLR", begin=10, end=12)
    found = short(epochs(param_scheduler=[decay]), 300).param_scheduler[0]  # both ends would lie at 2
    assert (found.begin, found.end) == (2, 3)


def test_points_in_time_of_hooks_are_named() -> None:
    hooks = [
        dict(type="PipelineSwitchHook", switch_epoch=9, switch_pipeline=[]),
        dict(type="EMAHook", begin_iter=500, begin_epoch=0, interval=3),
        dict(type="YOLOXModeSwitchHook", num_last_epochs=15),
    ]
    cfg = Config(dict(custom_hooks=hooks, default_hooks=dict(checkpoint=dict(by_epoch=True, interval=4))))
    assert unmoved_points(cfg) == [
        "PipelineSwitchHook.switch_epoch=9",
        "EMAHook.begin_iter=500",
        "YOLOXModeSwitchHook.num_last_epochs=15",
    ]
    assert unmoved_points(Config({})) == []
