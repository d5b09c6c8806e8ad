"""Checkpoints as the hosts make them, whole ones and others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mmseg")

from mmengine.evaluator import BaseMetric
from mmengine.fileio import LocalBackend
from mmengine.hooks import Hook
from mmengine.registry import METRICS
from mmengine.runner import Runner

from infobatch_mm.engine.checkpoints import is_whole

from .test_resume import KillAt, Killed
from .toy import EPOCHS, ONE_LINE, Recorder, config, train

LOOPS = {"iter": {}, "epoch": EPOCHS}
BEST = {
    "iter": {"train_cfg.val_interval": 5},
    "epoch": {**EPOCHS, "train_cfg.val_interval": 1},
}


def log_of(runner: Any) -> str:
    return next(Path(runner.log_dir).glob("*.log")).read_text()


def books(folder: Path) -> dict[str, Any]:
    return {**json.loads(Path(folder, "infobatch_summary.json").read_text()), "wall_time_s": 0}


@pytest.mark.parametrize(
    ("loop", "by_epoch"),
    [("iter", False), pytest.param("epoch", False, marks=pytest.mark.slow), ("epoch", True)],
)
def test_resume_beside_save_best_and_max_keep_ckpts_is_exact(
    scenes: Path, tmp_path: Path, loop: str, by_epoch: bool
) -> None:
    """The host writes its checkpoint again within a validation, when the score was the best so far."""
    checkpoint = dict(
        type="CheckpointHook", by_epoch=by_epoch, interval=1 if by_epoch else 5, max_keep_ckpts=1, save_best="mIoU"
    )

    class DrawingValidation(Hook):
        def before_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
            torch.rand(3)

    def run(name: str, *hooks: Hook, **overrides: Any) -> Recorder:
        cfg = config(scenes, tmp_path / name, **BEST[loop], **overrides)
        cfg.default_hooks.checkpoint = checkpoint
        return train(cfg, DrawingValidation(), *hooks)[1]

    straight = run("straight")
    with pytest.raises(Killed):
        run("killed", KillAt(len(straight.losses) // 2))
    files = sorted(path.name.split("_")[0] for path in Path(tmp_path, "killed").glob("*.pth"))
    assert files == sorted(["best", "epoch" if by_epoch else "iter"])
    resumed = run("killed", resume=True)
    assert 0 < len(resumed.losses) < len(straight.losses)
    assert resumed.losses == straight.losses[-len(resumed.losses) :]
    assert resumed.lrs == straight.lrs[-len(resumed.lrs) :]
    assert books(tmp_path / "straight") == books(tmp_path / "killed")


@METRICS.register_module(force=True)
class Sinking(BaseMetric):
    """Lower, and so better, at each evaluation."""

    value = 0.0

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.append(0)

    def compute_metrics(self, results: Any) -> dict[str, float]:
        self.value -= 1
        return {"sinking": self.value}


def full_disk(monkeypatch: pytest.MonkeyPatch, fails: int) -> None:
    """The n-th write of a checkpoint stops half-way."""
    put, left = LocalBackend.put, [fails]

    def half(self: Any, obj: bytes, filepath: str) -> None:
        left[0] -= 1
        put(self, obj[: len(obj) // 2] if left[0] == 0 else obj, filepath)
        if left[0] == 0:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(LocalBackend, "put", half)


# Written are: an interval's, the best, the interval's again with the name of the best; and so on.
@pytest.mark.parametrize("fails", [4, 5, 6])
def test_the_checkpoints_before_stay_until_the_next_are_written(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    cfg = config(scenes, tmp_path, val_evaluator=dict(_delete_=True, type="Sinking"), **{"train_cfg.val_interval": 5})
    cfg.default_hooks.checkpoint = dict(
        type="CheckpointHook", by_epoch=False, interval=5, max_keep_ckpts=1, save_best="sinking", rule="less"
    )
    full_disk(monkeypatch, fails)
    with pytest.raises(OSError, match="No space left"):
        train(cfg)
    files = list(tmp_path.glob("*.pth"))
    assert {path.name.split("_")[0] for path in files} == {"best", "iter"}
    assert all(is_whole(path) for path in files)
    assert is_whole((tmp_path / "last_checkpoint").read_text())


def test_outdated_checkpoints_are_removed_all_the_same(scenes: Path, tmp_path: Path) -> None:
    cfg = config(scenes, tmp_path, **{"train_cfg.val_interval": 6})
    cfg.default_hooks.checkpoint = dict(
        type="CheckpointHook", by_epoch=False, interval=3, max_keep_ckpts=2, save_best="mIoU", save_last=True
    )
    runner, _ = train(cfg)
    names = sorted(path.name for path in tmp_path.glob("*.pth"))
    assert len([name for name in names if name.startswith("iter_")]) == 2
    assert len([name for name in names if name.startswith("best_")]) == 1
    hook = next(hook for hook in runner.hooks if type(hook).__name__ == "CheckpointHook")
    assert "_save_checkpoint" not in vars(hook) and "_save_best_checkpoint" not in vars(hook)
    assert "save_checkpoint" not in vars(runner)


def test_checkpoints_in_a_folder_of_their_own_are_found(scenes: Path, tmp_path: Path) -> None:
    def cfg(**overrides: Any) -> Any:
        made = config(scenes, tmp_path / "run", **overrides)
        made.default_hooks.checkpoint = dict(
            type="CheckpointHook", by_epoch=False, interval=5, out_dir=str(tmp_path / "out"), max_keep_ckpts=3
        )
        return made

    with pytest.raises(Killed):
        train(cfg(), KillAt(17))
    last = Path((tmp_path / "run/last_checkpoint").read_text())
    assert last.name == "iter_15.pth" and tmp_path / "out" in last.parents
    last.write_bytes(b"")
    # published ones hold nothing but weights
    published = last.with_name("iter_10-0a1b2c3d.pth")
    torch.save({"state_dict": {}}, published)
    runner, resumed = train(cfg(resume=True, log_level="INFO"))
    assert "iter_10.pth" in log_of(runner) and len(resumed.losses) == runner.iter - 10


def test_a_validation_before_training_saves_no_best_where_none_is_asked_for(scenes: Path, tmp_path: Path) -> None:
    class ValidateFirst(Hook):
        def before_train(self, runner: Any) -> None:
            runner.val_loop.run()

    runner, _ = train(config(scenes, tmp_path), ValidateFirst())
    assert runner.iter == runner.max_iters


def test_resuming_a_best_checkpoint_says_what_it_lacks(scenes: Path, tmp_path: Path) -> None:
    cfg = config(scenes, tmp_path / "first", **BEST["iter"])
    cfg.default_hooks.checkpoint.save_best = "mIoU"
    train(cfg)
    best = next(Path(tmp_path, "first").glob("best_*.pth"))
    cfg = config(scenes, tmp_path / "second", resume=True, load_from=str(best), log_level="INFO")
    runner, _ = train(cfg)
    assert "holds no optimizer" in log_of(runner)
    assert runner.iter == runner.max_iters


# ---- the same run in other batches, or in another schedule ---------------------------------------------


@pytest.mark.parametrize(("before", "after"), [pytest.param(4, 2, marks=pytest.mark.slow), (2, 4), (4, 3)])
def test_another_batch_size_keeps_scores_and_progress_of_an_iteration_loop(
    scenes: Path, tmp_path: Path, before: int, after: int
) -> None:
    cfg = config(scenes, tmp_path, **{"train_dataloader.batch_size": before})
    cfg.default_hooks.checkpoint.interval = 8
    with pytest.raises(Killed):
        train(cfg, KillAt(17))
    checkpoint = torch.load(tmp_path / "iter_16.pth", weights_only=False)
    state, scheduler = checkpoint["infobatch"], checkpoint["param_schedulers"][0]
    first = Look()
    cfg = config(scenes, tmp_path, resume=True, log_level="INFO", **{"train_dataloader.batch_size": after})
    runner, resumed = train(cfg, first)
    assert torch.equal(first.scores, state["pruner"]["scores"])
    assert f"global batch of {before}" in log_of(runner) and f"this run has {after}" in log_of(runner)
    # Iterations are the measure: the rate goes on where it was, and at the end every step was taken.
    assert scheduler["last_step"] == state["scheduler_steps"]
    assert resumed.lrs[0] == scheduler["_last_value"][0]
    assert all(later <= earlier for earlier, later in zip(resumed.lrs, resumed.lrs[1:], strict=False))
    assert runner.iter == runner.max_iters
    assert runner.param_schedulers[0].last_step == 32  # as at the end of the unpruned run
    summary = books(tmp_path)
    done = state["pruner"]["visited"] + sum(entry["kept"] for entry in state["pruner"]["history"])
    assert summary["visits"] == done + sum(map(len, resumed.indices))
    assert 0 < summary["saved_ratio"] < 0.5


@pytest.mark.parametrize("policy", ["infobatch", "none"])
@pytest.mark.parametrize(
    ("first", "second", "third"),
    [(4, 2, 4), pytest.param(2, 4, 2, marks=pytest.mark.slow), pytest.param(4, 2, 2, marks=pytest.mark.slow)],
)
def test_batch_sizes_may_change_again_and_again(
    scenes: Path, tmp_path: Path, first: int, second: int, third: int, policy: str
) -> None:
    for life, batch in enumerate((first, second, third)):
        cfg = config(scenes, tmp_path, resume=life > 0, **{"train_dataloader.batch_size": batch})
        cfg.custom_hooks[0].policy = policy
        cfg.default_hooks.checkpoint.interval = 4
        if life == 2:
            runner, _ = train(cfg)
        else:
            with pytest.raises(Killed):
                train(cfg, KillAt(9 * life + 9))
    assert runner.iter == runner.max_iters
    summary = books(tmp_path)
    assert 0 <= summary["saved_ratio"] < 0.5
    assert [entry["pass"] for entry in summary["per_pass"]] == sorted({entry["pass"] for entry in summary["per_pass"]})


@pytest.mark.parametrize(
    ("before", "after", "per_iteration"),
    [
        (4, 2, True),
        (2, 4, False),
        pytest.param(4, 2, False, marks=pytest.mark.slow),
        pytest.param(2, 4, True, marks=pytest.mark.slow),
    ],
)
def test_another_batch_size_keeps_scores_and_progress_of_an_epoch_loop(
    scenes: Path, tmp_path: Path, before: int, after: int, per_iteration: bool
) -> None:
    overrides = {**EPOCHS, "train_dataloader.drop_last": True}
    overrides["param_scheduler"] = [
        dict(
            type="PolyLR",
            power=1.0,
            eta_min=1e-4,
            by_epoch=True,
            begin=0,
            end=6,
            convert_to_iter_based=per_iteration,
        )
    ]

    def cfg(name: str, batch: int, **more: Any) -> Any:
        made = config(scenes, tmp_path / name, **overrides, **{"train_dataloader.batch_size": batch, **more})
        made.default_hooks.checkpoint.interval = 3
        return made

    _, straight = train(cfg("straight", before))
    kill = len(straight.losses) // 2
    with pytest.raises(Killed):
        train(cfg("run", before), KillAt(kill))
    state = torch.load(Path((tmp_path / "run/last_checkpoint").read_text()), weights_only=False)["infobatch"]
    first = Look()
    runner, resumed = train(cfg("run", after, resume=True), first)
    assert torch.equal(first.scores, state["pruner"]["scores"])
    assert runner.epoch == 6 and runner.iter == runner.max_iters
    assert len(books(tmp_path / "run")["per_pass"]) == 6
    # the same rate at the end of every pass as in the run that was not stopped
    assert resumed.boundary_lrs == pytest.approx(straight.boundary_lrs[-len(resumed.boundary_lrs) :], rel=1e-6)
    assert resumed.lrs[0] == pytest.approx(straight.lrs[kill - kill % 3], rel=1e-6)
    # of the pass in flight about as much is visited as was left of it
    plan = state["pruner"]["plan"]
    if plan is not None:
        left = len(plan["indices"]) - state["pruner"]["visited"]
        passes = [i for i, batch in enumerate(resumed.batch_idx) if batch == 0]
        visited = sum(map(len, resumed.indices[: passes[0] if passes else None]))
        assert abs(visited - left) <= 2 * max(before, after)


class Look(Hook):
    """The scores with which a run begins."""

    scores: torch.Tensor

    def before_train_epoch(self, runner: Any) -> None:
        if not hasattr(self, "scores"):
            hook = next(hook for hook in runner.hooks if type(hook).__name__ == "InfoBatchHook")
            self.scores = hook._pruner.store.values.clone()


@pytest.mark.parametrize("max_iters", [24, pytest.param(44, marks=pytest.mark.slow)])
def test_a_longer_or_shorter_schedule_goes_on_where_it_was(scenes: Path, tmp_path: Path, max_iters: int) -> None:
    cfg = config(scenes, tmp_path)
    cfg.default_hooks.checkpoint.interval = 5
    with pytest.raises(Killed):
        train(cfg, KillAt(18))
    state = torch.load(tmp_path / "iter_15.pth", weights_only=False)["infobatch"]["pruner"]
    runner, resumed = train(config(scenes, tmp_path, resume=True, **{"train_cfg.max_iters": max_iters}))
    # the plan in flight goes on: its pass is as long as before
    plan = state["plan"]
    rest = plan["indices"][state["visited"] :].tolist()
    assert [i for batch in resumed.indices for i in batch][: len(rest)] == rest
    assert runner.iter == runner.max_iters
    assert books(tmp_path)["passes_total"] == pytest.approx(max_iters * 4 / 22)


@pytest.mark.parametrize("max_iters", [23, *(pytest.param(each, marks=pytest.mark.slow) for each in (24, 26))])
def test_a_finished_run_goes_on_in_a_longer_schedule(scenes: Path, tmp_path: Path, max_iters: int) -> None:
    """Its last pass was a part of one; what was left out of it comes now."""

    def cfg(max_iters: int, **overrides: Any) -> Any:
        made = config(scenes, tmp_path, **overrides, **{"train_cfg.max_iters": max_iters})
        made.default_hooks.checkpoint.save_last = True
        made.custom_hooks[0].prune_ratio = 0.0  # every pass as long as the host's
        return made

    first, _ = train(cfg(max_iters))
    runner, resumed = train(cfg(40, resume=True))
    straight = (40 * 4) // 22 * 5 + 2  # seven passes of five batches and one of two
    assert abs(first.iter + len(resumed.losses) - straight) <= 1
    assert resumed.lrs[0] <= 0.1 and runner.iter == runner.max_iters


def test_another_seed_on_resume_is_not_used_and_said_so(scenes: Path, tmp_path: Path) -> None:
    cfg = config(scenes, tmp_path)
    cfg.default_hooks.checkpoint.interval = 8
    with pytest.raises(Killed):
        train(cfg, KillAt(9))
    cfg = config(scenes, tmp_path, resume=True, log_level="INFO")
    cfg.custom_hooks[0].seed = 7
    runner, _ = train(cfg)
    assert "seed=7 is not used" in log_of(runner)
    assert books(tmp_path)["seed"] == 3


@pytest.mark.parametrize(("before", "after"), [(2, 4), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_rates_of_a_run_without_the_hook_go_on_with_another_batch_size(
    scenes: Path, tmp_path: Path, before: int, after: int
) -> None:
    overrides = {**EPOCHS, "train_dataloader.drop_last": True}
    overrides["param_scheduler"] = [
        dict(type="PolyLR", power=1.0, eta_min=1e-4, by_epoch=True, begin=0, end=6, convert_to_iter_based=True)
    ]

    def cfg(batch: int, **more: Any) -> Any:
        made = config(scenes, tmp_path, **overrides, **{"train_dataloader.batch_size": batch, **more})
        made.default_hooks.checkpoint = dict(type="CheckpointHook", by_epoch=True, interval=3)
        return made

    with pytest.raises(Killed):
        train(cfg(before, custom_hooks=[]), KillAt(4 * (22 // before)))
    _, resumed = train(cfg(after, resume=True))
    assert resumed.lrs[0] == pytest.approx(0.05, rel=0.05)
    rates = resumed.boundary_lrs
    assert rates == pytest.approx([0.1 * 2 / 6, 0.1 / 6, 1e-4], rel=0.15, abs=0.004)


# ---- damaged ------------------------------------------------------------------------------------------


def _repeated_visit(state: dict[str, Any]) -> None:
    state["pruner"]["plan"]["indices"][0] = state["pruner"]["plan"]["indices"][1]


def _no_generators(state: dict[str, Any]) -> None:
    del state["rng"]


def _no_gradients(state: dict[str, Any]) -> None:
    state["gradients"] = None


def _no_pruner(state: dict[str, Any]) -> None:
    state["pruner"] = None


@pytest.fixture(scope="module")
def finished(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the midst of a pass."""
    cfg = config(scenes, tmp_path_factory.mktemp("finished"), **{"train_cfg.max_iters": 12})
    cfg.default_hooks.checkpoint.interval = 8
    runner, _ = train(cfg)
    return Path(runner.work_dir, "iter_8.pth")


@pytest.mark.parametrize(
    ("damage", "where"),
    [
        (_repeated_visit, "plan"),
        (_no_generators, "rng"),
        (_no_pruner, "pruner"),
        (_no_gradients, "gradients"),
    ],
)
def test_a_damaged_state_is_refused_by_name(
    scenes: Path, finished: Path, tmp_path: Path, damage: Callable[[dict[str, Any]], None], where: str
) -> None:
    """The hook's own entries, and one of the pruner's, whose others are core's."""
    checkpoint = torch.load(finished, weights_only=False)
    damage(checkpoint["infobatch"])
    torch.save(checkpoint, tmp_path / "damaged.pth")
    more = {"train_cfg.max_iters": 12, "load_from": str(tmp_path / "damaged.pth")}
    runner = Runner.from_cfg(config(scenes, tmp_path, resume=True, **more))
    with pytest.raises(ValueError, match=f"cannot resume: .*damaged at '{where}'"):
        runner.train()


@pytest.mark.parametrize("size", [0, 1, 2, 1000])
def test_a_file_cut_short_is_not_whole(tmp_path: Path, size: int) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save({"weight": torch.zeros(10_000)}, path)
    assert is_whole(path)
    path.write_bytes(path.read_bytes()[:-size] if size else b"")
    assert not is_whole(path)
    path.write_bytes(bytes(1000))  # as a loss of power leaves it
    assert not is_whole(path)
    assert not is_whole(tmp_path / "none.pth")
    torch.save({"weight": torch.zeros(10)}, path, _use_new_zipfile_serialization=False)
    assert is_whole(path)


# ---- seeds of items -----------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", ["iter", pytest.param("epoch", marks=pytest.mark.slow)])
def test_item_seed_repeats_augmentations_with_any_number_of_workers(scenes: Path, tmp_path: Path, loop: str) -> None:
    hooks = [{**ONE_LINE[0], "item_seed": True}]
    seen = {}
    for workers, persistent in ((0, False), (2, False), (2, True)):
        overrides = {**LOOPS[loop], "train_dataloader.num_workers": workers}
        overrides["train_dataloader.persistent_workers"] = persistent
        name = f"{workers}{persistent}"
        _, recorder = train(config(scenes, tmp_path / name, custom_hooks=hooks, **overrides))
        seen[name] = (recorder.indices, recorder.pixels, recorder.losses)
    assert seen["0False"] == seen["2False"] == seen["2True"]


def test_a_work_dir_that_cannot_be_read_is_refused_on_every_process(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 looks for all: an error of its disk must reach the others, which wait for its answer."""
    from infobatch_mm.engine import checkpoints

    def unreadable(work_dir: str) -> str:
        raise PermissionError(13, "Permission denied", work_dir)

    monkeypatch.setattr(checkpoints, "find_latest_checkpoint", unreadable)
    with pytest.raises(ValueError, match=r"cannot resume: .* cannot be read: .*Permission denied"):
        train(config(scenes, tmp_path, resume=True))
