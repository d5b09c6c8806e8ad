"""Whatever ends a run, the next one goes on as if nothing had happened; whatever is broken is counted.

The short version runs by default. The long one:

    pytest -m slow tests/test_engine/test_faults.py
"""

from __future__ import annotations

import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("mmseg")

from mmengine.config import Config
from mmengine.fileio import LocalBackend
from mmengine.hooks import Hook, checkpoint_hook
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmseg.registry import MODELS, TRANSFORMS
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from infobatch_mm.core.score_file import read_scores

from .processes import GROUP_NORM, Journal, Run, final_state, lived
from .toy import EPOCHS, Recorder, config, train

ITERATION = 0.06  # seconds, roughly


# ---- a run, its twin that nothing happens to, and what must be equal ------------------------------


@dataclass(frozen=True)
class Setting:
    """A training of the toy segmentor; the first fields decide what it computes, the last only how it runs."""

    epochs: bool = False
    ranks: int = 1
    norm: str = "BN"
    accumulate: int = 1
    ema: bool = False
    schedule: str = "poly"
    workers: int = 0
    persistent: bool = False
    interval: int = 3
    keep: int = -1
    validate: int = 1000

    def config(self, scenes: Path, work_dir: Path, resume: bool = False, **more: Any) -> Config:
        overrides = {**(EPOCHS if self.epochs else {}), **(GROUP_NORM if self.norm == "GN" else {})}
        end = 6 if self.epochs else 33
        if self.schedule == "one cycle":
            cycle = dict(type="OneCycleLR", eta_max=0.1, total_steps=end)
            per_epoch = dict(by_epoch=True, convert_to_iter_based=True) if self.epochs else {}
            overrides["param_scheduler"] = [{**cycle, **per_epoch}]
        hooks = [dict(type="InfoBatchHook", prune_ratio=0.5, delta=0.75, item_seed=True)]
        cfg = config(scenes, work_dir, resume=resume, **overrides)
        cfg.merge_from_dict(
            {
                "custom_hooks": [dict(type="EMAHook", momentum=0.1)] * self.ema + hooks,
                "train_dataloader.batch_size": 4 // self.ranks,
                "train_dataloader.num_workers": self.workers,
                "train_dataloader.persistent_workers": self.persistent,
                "train_dataloader.drop_last": self.epochs,
                "default_hooks.checkpoint": dict(
                    interval=self.interval, save_last=True, by_epoch=False, max_keep_ckpts=self.keep
                ),
                "optim_wrapper.accumulative_counts": self.accumulate,
                "train_cfg.val_interval": self.validate,
                **more,
            }
        )
        return cfg

    def __str__(self) -> str:
        default = Setting()
        return ",".join(f"{key}={value}" for key, value in vars(self).items() if value != getattr(default, key))

    @property
    def twin(self) -> Setting:
        """The same computation without workers, and without a checkpoint before the end."""
        return replace(self, workers=0, persistent=False, interval=-1, keep=-1, validate=1000)


class Stage:
    """Where the runs of these tests take place; what is still alive at the end is killed."""

    def __init__(self, scenes: Path, root: Path) -> None:
        self.scenes, self.root = scenes, root
        self.runs: list[Run] = []
        self._twins: dict[Setting, Run] = {}
        self._folders = 0

    def folder(self) -> Path:
        self._folders += 1
        return self.root / str(self._folders)

    def begin(
        self,
        setting: Setting,
        work_dir: Path,
        prepare: Callable[[int, Any], None] | None = None,
        *,
        resume: bool = False,
        **more: Any,
    ) -> Run:
        run = Run(setting.config(self.scenes, work_dir, resume, **more), setting.ranks, prepare)
        self.runs.append(run)
        return run

    def twin(self, setting: Setting) -> Run:
        """The run that was never killed; only its begin, so that it can take place beside others."""
        key = setting.twin
        if key not in self._twins:
            self._twins[key] = self.begin(key, self.folder())
        return self._twins[key]


@pytest.fixture(scope="module")
def stage(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    stage = Stage(scenes, tmp_path_factory.mktemp("faults"))
    yield stage
    for run in stage.runs:
        run.kill()


def differences(ours: Any, theirs: Any, tolerance: float = 0.0, where: str = "") -> list[str]:
    """Where two nested states differ, to the bit or by more than ``tolerance``."""
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        return [at for key in ours for at in differences(ours[key], theirs[key], tolerance, f"{where}.{key}")]
    if isinstance(ours, (list, tuple)) and isinstance(theirs, type(ours)) and len(ours) == len(theirs):
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [at for i, pair in pairs for at in differences(*pair, tolerance, f"{where}[{i}]")]
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        close = torch.allclose(ours, theirs, tolerance, tolerance) if tolerance else torch.equal(ours, theirs)
        return [] if close else [where]
    if isinstance(ours, float) and isinstance(theirs, float) and tolerance:
        return [] if abs(ours - theirs) <= tolerance * (1 + abs(theirs)) else [where]
    return [] if ours == theirs else [f"{where}: {ours!r:.80} is not {theirs!r:.80}"]


def outcome(work_dir: Path) -> dict[str, Any]:
    """All that a run leaves behind and that does not tell the time."""
    checkpoint = final_state(work_dir)
    parts = ("state_dict", "ema_state_dict", "optimizer", "param_schedulers")
    found = {key: checkpoint[key] for key in parts if key in checkpoint}
    summary = json.loads((work_dir / "infobatch_summary.json").read_text())
    scores = read_scores(work_dir)
    return {
        **found,
        "infobatch": {**checkpoint["infobatch"], "wall_time_s": 0},
        "summary": {**summary, "wall_time_s": 0},
        "scores": {key: torch.from_numpy(np.nan_to_num(scores[key], nan=-1)) for key in scores if key != "name"},
    }


def assert_as_if_nothing_had_happened(lives: list[Run], twin: Run, tolerance: float = 0.0) -> None:
    """The lives of a run, put together, are the twin: every iteration, and what is left behind."""
    twin.finish()
    for rank in range(len(twin.processes)):
        journal = lived(*lives, rank=rank)
        assert [entry["iter"] for entry in journal] == list(range(len(journal)))
        visits = [(entry["pass"], index) for entry in journal for index in entry["indices"]]
        assert len(visits) == len(set(visits)), "a visit was repeated"
        assert not differences(journal, twin.journal(rank), tolerance)
    assert not differences(outcome(lives[-1].work_dir), outcome(twin.work_dir), tolerance)


def goes_on(run: Run, twin: Run) -> bool:
    """Whether a resumed run began in the middle of a pass, with iterations before it taken from a checkpoint."""
    start = run.journal()[0]["iter"] if run.journal() else 0
    passes = [entry["pass"] for entry in twin.journal()]
    return start > 0 and passes[start - 1] == passes[start]


# ---- kills at random moments ----------------------------------------------------------------------


def moments(setting: Setting, twin: Run, kills: int, dice: random.Random) -> list[int]:
    """Iterations after which to kill: the newest checkpoint is then one written in the middle of a pass."""
    passes = [entry["pass"] for entry in twin.finish().journal()]
    newest = {i: i - i % setting.interval for i in range(setting.interval, len(passes) - 1)}
    fit = [i for i, start in newest.items() if start and passes[start - 1] == passes[start]]
    return sorted(dice.sample(fit, kills))


def kill_at_random(stage: Stage, setting: Setting, lives_of: list[int], seed: str, tolerance: float = 0.0) -> None:
    """Runs with so many kills each, at moments drawn from a seed; every run is then finished and compared."""
    dice = random.Random(seed)
    twin = stage.twin(setting)
    killed = middle = 0
    for kills in lives_of:
        work_dir, lives = stage.folder(), []
        for moment in moments(setting, twin, kills, dice):
            lives.append(stage.begin(setting, work_dir, resume=bool(lives)))
            codes = lives[-1].kill_after(moment, dice.uniform(0, 1.5 * ITERATION))
            killed += -signal.SIGKILL in codes
        lives.append(stage.begin(setting, work_dir, resume=True).finish())
        assert_as_if_nothing_had_happened(lives, twin, tolerance)
        middle += sum(goes_on(life, twin) for life in lives[1:])
    print(f"{killed} kills, {middle} of the resumed lives began in the middle of a pass")
    assert killed == sum(lives_of)
    assert middle


@pytest.mark.parametrize(
    "setting",
    [
        Setting(workers=2, interval=4, keep=1),
        Setting(epochs=True, accumulate=3, ema=True, interval=2, schedule="one cycle"),
    ],
    ids=str,
)
def test_a_run_killed_at_random_moments_goes_on_exactly(stage: Stage, setting: Setting) -> None:
    kill_at_random(stage, setting, lives_of=[2], seed=str(setting))


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [
        Setting(interval=2),
        Setting(workers=2, persistent=True, interval=5, schedule="one cycle"),
        Setting(norm="GN", accumulate=3, interval=4, keep=1),
        Setting(ema=True, workers=2, interval=3, validate=4),
        Setting(ema=True, accumulate=3, workers=2, persistent=True, interval=5, keep=2),
        Setting(epochs=True, interval=3, keep=1),
        Setting(epochs=True, workers=2, norm="GN", interval=2, schedule="one cycle"),
        Setting(epochs=True, workers=2, persistent=True, accumulate=3, interval=4),
        Setting(epochs=True, ema=True, interval=4, validate=2),
        Setting(epochs=True, ema=True, accumulate=3, workers=2, interval=2, keep=1, schedule="one cycle"),
    ],
    ids=str,
)
def test_runs_killed_at_many_random_moments_go_on_exactly(stage: Stage, setting: Setting) -> None:
    kill_at_random(stage, setting, lives_of=[1, 1, 3], seed=str(setting))


# ---- several processes ----------------------------------------------------------------------------

TWO = Setting(ranks=2, norm="GN", interval=5)


def one_rank_dies(run: Run, iteration: int, rank: int, delay: float = 0.0) -> list[int]:
    run.reach(iteration)
    time.sleep(delay)
    run.kill(rank=rank)
    return run.wait(timeout=120)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DieAt(Hook):
    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter == self.iteration:
            die()


def with_dying_rank(rank: int, runner: Any, *, who: int, iteration: int) -> None:
    if rank == who:
        runner.register_hook(DieAt(iteration))


def test_a_rank_that_dies_ends_the_run_and_any_number_of_ranks_goes_on(stage: Stage) -> None:
    twin, work_dir = stage.twin(TWO), stage.folder()
    killed = stage.begin(TWO, work_dir, partial(with_dying_rank, who=1, iteration=12))
    codes = killed.wait(timeout=120)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] != 0
    assert len(killed.journal()) == 12, "rank 0 went on alone"
    twin.finish()

    alone_dir = copy_of(work_dir, stage.folder())
    two = stage.begin(TWO, work_dir, resume=True)
    one = stage.begin(replace(TWO, ranks=1), alone_dir, resume=True)
    two.finish()
    assert_as_if_nothing_had_happened([killed, two], twin)
    assert goes_on(two, twin)

    # Sums over ranks are rounded otherwise, so later plans may differ: the one in flight does not.
    first = one.finish().journal()[0]
    rest = [entry for entry in one.journal() if entry["pass"] == first["pass"]]
    shares = [[e for e in twin.journal(rank)[first["iter"] :] if e["pass"] == first["pass"]] for rank in (0, 1)]
    assert len(rest) == len(shares[0]) > 0
    for entry, *pair in zip(rest, *shares, strict=True):
        for key in ("indices", "weights"):
            assert entry[key] == [value for both in zip(pair[0][key], pair[1][key], strict=True) for value in both]
        assert entry["lr"] == pair[0]["lr"]
        assert entry["pixels"] == pytest.approx(pair[0]["pixels"] + pair[1]["pixels"], rel=1e-12)
    assert len(one.journal()) > len(rest)
    visits = [(entry["pass"], index) for entry in one.journal() for index in entry["indices"]]
    assert len(visits) == len(set(visits))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "tolerance"),
    [
        (Setting(ranks=2, workers=2, interval=2), 0.0),
        (Setting(ranks=2, epochs=True, ema=True, workers=2, persistent=True, interval=3, keep=1), 0.0),
        # The checkpoint holds the mean of the ranks' gradients: their sum is rounded once more.
        (Setting(ranks=2, norm="GN", accumulate=3, interval=4), 1e-5),
    ],
    ids=str,
)
def test_ranks_killed_at_random_moments_go_on_exactly(stage: Stage, setting: Setting, tolerance: float) -> None:
    kill_at_random(stage, setting, lives_of=[1, 2], seed=str(setting), tolerance=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("setting", [Setting(ranks=2, interval=2), Setting(ranks=2, epochs=True, workers=2)], ids=str)
def test_one_rank_killed_at_a_random_moment_ends_the_run_which_goes_on_exactly(
    stage: Stage, setting: Setting, rank: int
) -> None:
    dice, twin, work_dir = random.Random(f"{setting}{rank}"), stage.twin(setting), stage.folder()
    killed = stage.begin(setting, work_dir)
    codes = one_rank_dies(killed, *moments(setting, twin, 1, dice), rank, dice.uniform(0, 1.5 * ITERATION))
    assert codes[rank] == -signal.SIGKILL
    assert all(codes)
    assert_as_if_nothing_had_happened([killed, stage.begin(setting, work_dir, resume=True).finish()], twin)


# ---- a checkpoint that is being written -----------------------------------------------------------


def dying_while_saving(rank: int, runner: Any, *, moment: str, checkpoint: str = "iter_6.pth") -> None:
    """Kill this process at a moment of writing a checkpoint; to be called in a child process."""
    put, remove = LocalBackend.put, LocalBackend.remove

    def dying_put(self: LocalBackend, data: bytes, path: str) -> None:
        if Path(path).name.removesuffix(".unfinished") != checkpoint:
            return put(self, data, path)
        put(self, data[: {"opened": 0, "half written": len(data) // 2}.get(moment, len(data))], path)
        if moment in ("opened", "half written", "written"):
            die()

    def dying_open(path: str, mode: str = "r") -> Any:
        file = open(path, mode)  # noqa: SIM115
        if moment == "pointer emptied" and mode == "w" and (Path(path).parent / checkpoint).exists():
            die()
        return file

    def dying_remove(self: LocalBackend, path: str) -> None:
        if moment == "pointer written":
            die()
        remove(self, path)

    LocalBackend.put, LocalBackend.remove = dying_put, dying_remove
    checkpoint_hook.open = dying_open


SHORT_MOMENTS = ["half written", "pointer emptied"]


@pytest.mark.parametrize(
    ("moment", "start"),
    [
        pytest.param(moment, start, marks=[] if moment in SHORT_MOMENTS else pytest.mark.slow)
        for moment, start in [
            ("opened", 3),
            ("half written", 3),
            ("written", 3),
            ("pointer emptied", 6),
            ("pointer written", 6),
        ]
    ],
)
def test_killed_while_saving_a_run_that_keeps_one_checkpoint_still_has_one(
    stage: Stage, moment: str, start: int
) -> None:
    setting = Setting(keep=1)
    twin, work_dir = stage.twin(setting), stage.folder()
    killed = stage.begin(setting, work_dir, partial(dying_while_saving, moment=moment))
    assert killed.wait() == [-signal.SIGKILL]
    assert Path(work_dir, "iter_3.pth").exists()
    resumed = stage.begin(setting, work_dir, resume=True).finish()
    assert resumed.journal()[0]["iter"] == start
    assert_as_if_nothing_had_happened([killed, resumed], twin)


# ---- a checkpoint that is missing or damaged ------------------------------------------------------


def copy_of(work_dir: Path, folder: Path) -> Path:
    """A copy of a run's folder that points to its own checkpoint."""
    shutil.copytree(work_dir, folder)
    pointer = folder / "last_checkpoint"
    pointer.write_text(str(folder / Path(pointer.read_text()).name))
    return folder


def cut(path: Path, share: float = 0.5) -> None:
    os.truncate(path, int(path.stat().st_size * share))


@pytest.fixture(scope="module")
def killed_at_ten(stage: Stage) -> Run:
    """A run with checkpoints of iterations 3, 6 and 9."""
    run = stage.begin(Setting(), stage.folder())
    assert run.kill_after(10) == [-signal.SIGKILL]
    assert Path(run.work_dir, "last_checkpoint").read_text().endswith("iter_9.pth")
    return run


def empty_pointer(folder: Path) -> None:
    Path(folder, "last_checkpoint").write_text("")


def pointer_to_a_missing_file(folder: Path) -> None:
    Path(folder, "last_checkpoint").write_text(str(folder / "iter_12.pth"))


def newest_cut_short(folder: Path) -> None:
    cut(folder / "iter_9.pth")


def newest_without_its_last_byte(folder: Path) -> None:
    cut(folder / "iter_9.pth", 1 - 1e-6)


def newest_empty(folder: Path) -> None:
    cut(folder / "iter_9.pth", 0)


def two_cut_short(folder: Path) -> None:
    cut(folder / "iter_9.pth", 0.9)
    cut(folder / "iter_6.pth", 0.1)


@pytest.mark.parametrize(
    ("damage", "start"),
    [
        (empty_pointer, 9),
        pytest.param(pointer_to_a_missing_file, 9, marks=pytest.mark.slow),
        (newest_cut_short, 6),
        pytest.param(newest_without_its_last_byte, 6, marks=pytest.mark.slow),
        pytest.param(newest_empty, 6, marks=pytest.mark.slow),
        pytest.param(two_cut_short, 3, marks=pytest.mark.slow),
    ],
)
def test_resume_goes_on_from_the_newest_whole_checkpoint_with_a_warning(
    stage: Stage, killed_at_ten: Run, tmp_path: Path, damage: Callable[[Path], None], start: int
) -> None:
    folder = copy_of(killed_at_ten.work_dir, tmp_path / "run")
    damage(folder)
    journal = tmp_path / "journal"
    runner, _ = train(Setting().config(stage.scenes, folder, resume=True), Journal(journal))
    assert f"resuming from {folder / f'iter_{start}.pth'}" in log_of(runner)
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    twin = stage.twin(Setting()).finish()
    assert entries == twin.journal()[start:]
    assert not differences(outcome(folder), outcome(twin.work_dir))


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("iter_9.pth", r"cannot resume: .*iter_9\.pth is damaged or was cut short; .*iter_6\.pth is whole"),
        ("iter_12.pth", r"cannot resume: .*iter_12\.pth does not exist; .*iter_6\.pth is whole"),
    ],
    ids=["cut short", "missing"],
)
def test_a_named_checkpoint_that_is_not_whole_is_one_clear_error_before_training(
    stage: Stage, killed_at_ten: Run, tmp_path: Path, named: str, message: str
) -> None:
    folder = copy_of(killed_at_ten.work_dir, tmp_path / "run")
    cut(folder / "iter_9.pth")
    recorder = Recorder()
    with pytest.raises(ValueError, match=message):
        train(Setting().config(stage.scenes, folder, resume=True, load_from=str(folder / named)), recorder)
    assert not recorder.indices


def test_without_any_whole_checkpoint_resume_is_one_clear_error(
    stage: Stage, killed_at_ten: Run, tmp_path: Path
) -> None:
    folder = copy_of(killed_at_ten.work_dir, tmp_path / "run")
    for path in folder.glob("*.pth"):
        cut(path, 0.7)
    recorder = Recorder()
    with pytest.raises(ValueError, match=r"cannot resume: .*cut short, and .* has no other"):
        train(Setting().config(stage.scenes, folder, resume=True), recorder)
    assert not recorder.indices


def log_of(runner: Any) -> str:
    return next(Path(runner.log_dir).glob("*.log")).read_text()


# ---- a worker that dies ---------------------------------------------------------------------------


@TRANSFORMS.register_module(force=True)
class DieOnce:
    """Kills its own process at the first visit after a marker was set, and removes the marker."""

    def __init__(self, marker: str) -> None:
        self.marker = Path(marker)

    def __call__(self, results: dict) -> dict:
        if self.marker.exists():
            self.marker.unlink()
            die()
        return results


class SetMarker(Hook):
    def __init__(self, marker: Path, iteration: int) -> None:
        self.marker, self.iteration = marker, iteration

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if runner.iter == self.iteration:
            self.marker.touch()


def with_marker(rank: int, runner: Any, *, marker: Path, iteration: int) -> None:
    runner.register_hook(SetMarker(marker, iteration))


@pytest.mark.parametrize(
    "setting",
    [
        pytest.param(Setting(workers=2), marks=pytest.mark.slow),
        pytest.param(Setting(workers=2, persistent=True, epochs=True), marks=pytest.mark.slow),
        pytest.param(Setting(workers=2, ranks=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_worker_that_dies_ends_the_run_which_goes_on_exactly(stage: Stage, setting: Setting) -> None:
    twin, work_dir = stage.twin(setting), stage.folder()
    marker = work_dir / "marker"
    steps = setting.config(stage.scenes, work_dir).train_dataloader.dataset.pipeline
    pipeline = {"train_dataloader.dataset.pipeline": [*steps[:2], dict(type="DieOnce", marker=str(marker)), *steps[2:]]}
    prepare = partial(with_marker, marker=marker, iteration=7)
    killed = stage.begin(setting, work_dir, prepare, **pipeline)
    assert all(code > 0 for code in killed.wait(timeout=120))
    assert any("DataLoader worker" in killed.output(rank) for rank in range(setting.ranks))
    resumed = stage.begin(setting, work_dir, partial(with_marker, marker=marker, iteration=-1), resume=True, **pipeline)
    assert_as_if_nothing_had_happened([killed, resumed.finish()], twin)
    assert resumed.journal()[0]["iter"] >= 6


# ---- broken data ----------------------------------------------------------------------------------

BROKEN = 7
NAN = float("nan")


@TRANSFORMS.register_module(force=True)
class SpoilScene:
    """Fills the image of one scene with a value."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, results: dict) -> dict:
        if results["img_path"].endswith(f"{BROKEN:05}.jpg"):
            results["img"] = np.full_like(results["img"], self.value, dtype=np.float32)
        return results


@TRANSFORMS.register_module(force=True)
class RareClass:
    """Gives one scene a class that no other has."""

    def __call__(self, results: dict) -> dict:
        if results["img_path"].endswith(f"{BROKEN:05}.jpg"):
            results["gt_seg_map"][:] = 29
        return results


@MODELS.register_module(force=True)
class BoundlessLoss(nn.Module):
    """Infinite for an image that has only the rare class."""

    loss_name = "loss_ce"

    def forward(self, logits: Tensor, labels: Tensor, weight: Any = None, ignore_index: int = 255) -> Tensor:
        losses = functional.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")
        return (losses.mean(dim=(1, 2)) / (labels != 29).float().mean(dim=(1, 2))).mean()


@OPTIM_WRAPPERS.register_module(force=True)
class IdleOptimWrapper(OptimWrapper):
    def step(self, **kwargs: Any) -> None:
        """What a NaN gradient does to the parameters is the host's affair: this is about scores."""


def own_scenes(stage: Stage, folder: Path) -> Path:
    return Path(shutil.copytree(stage.scenes, folder))


def file_of(scenes: Path, kind: str) -> Path:
    """The image or annotation of the broken scene; index and name agree."""
    return next(Path(scenes, kind, "training").glob(f"*{BROKEN:05}.*"))


def break_image(scenes: Path, cfg: Config) -> None:
    cut(file_of(scenes, "images"), 0)
    cfg.train_dataloader.dataset.pipeline[0].ignore_empty = True


def truncate_image(scenes: Path, cfg: Config) -> None:
    cut(file_of(scenes, "images"))
    cfg.train_dataloader.dataset.pipeline[0].update(ignore_empty=True, imdecode_backend="pillow")


def ignore_all_pixels(scenes: Path, cfg: Config) -> None:
    path = file_of(scenes, "annotations")
    Image.fromarray(np.zeros_like(np.array(Image.open(path)))).save(path)  # 0 is ignored: reduce_zero_label


def nan_loss(scenes: Path, cfg: Config) -> None:
    cfg.train_dataloader.dataset.pipeline.insert(2, dict(type="SpoilScene", value=NAN))
    cfg.optim_wrapper.type = "IdleOptimWrapper"


def inf_loss(scenes: Path, cfg: Config) -> None:
    cfg.train_dataloader.dataset.pipeline.insert(2, dict(type="RareClass"))
    cfg.model.decode_head.loss_decode = dict(type="BoundlessLoss")
    cfg.optim_wrapper.type = "IdleOptimWrapper"


@pytest.mark.parametrize(
    ("spoil", "counter", "workers"),
    [
        pytest.param(break_image, "unusable_visits", 0, marks=pytest.mark.slow),
        (truncate_image, "unusable_visits", 2),
        (ignore_all_pixels, "unusable_visits", 0),
        (nan_loss, "nonfinite_losses", 0),
        pytest.param(inf_loss, "nonfinite_losses", 0, marks=pytest.mark.slow),
    ],
)
def test_a_broken_sample_is_counted_and_neither_scored_nor_pruned(
    stage: Stage, tmp_path: Path, spoil: Callable[[Path, Config], None], counter: str, workers: int
) -> None:
    scenes = own_scenes(stage, tmp_path / "scenes")
    # GroupNorm and evaluation mode keep what is broken within its own image.
    setting = Setting(epochs=True, norm="GN", workers=workers, persistent=workers > 0)
    more = {"train_dataloader.drop_last": False, "log_level": "INFO"}
    cfg = setting.config(scenes, tmp_path / "run", **more)
    spoil(scenes, cfg)
    runner, recorder = train(cfg)
    passes: list[list[tuple[int, float]]] = []
    for batch, indices, weights in zip(recorder.batch_idx, recorder.indices, recorder.weights, strict=True):
        if batch == 0:
            passes.append([])
        passes[-1] += zip(indices, weights, strict=True)
    assert len(passes) == 6
    assert min(map(len, passes)) < 22, "nothing was pruned at all"
    assert all((BROKEN, 1.0) in visits for visits in passes)
    summary = json.loads((tmp_path / "run/infobatch_summary.json").read_text())
    other = {"unusable_visits", "nonfinite_losses"} - {counter}
    assert summary[counter] == len(passes)
    assert summary[other.pop()] == 0
    scores = read_scores(tmp_path / "run")
    kinds = {nan_loss: math.isnan, inf_loss: math.isinf}
    assert spoil not in kinds or sum(kinds[spoil](loss["decode.loss_ce"]) for loss in recorder.losses) == len(passes)
    assert np.isnan(scores["score"][BROKEN])
    assert scores["times_seen"][BROKEN] == 0
    assert np.isfinite(np.delete(scores["score"], BROKEN)).all()
    assert f"{len(passes)} visits so far" in log_of(runner)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_broken_image_that_the_host_does_not_ignore_ends_the_run_with_its_error(
    stage: Stage, tmp_path: Path, workers: int
) -> None:
    scenes = own_scenes(stage, tmp_path / "scenes")
    cut(file_of(scenes, "images"), 0)
    recorder = Recorder()
    with pytest.raises(Exception, match=r"imdecode|load image"):
        train(Setting(workers=workers).config(scenes, tmp_path / "run"), recorder)
    assert all(BROKEN not in indices for indices in recorder.indices)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_the_sample_that_stands_in_for_a_broken_one_repeats_after_a_kill(
    stage: Stage, tmp_path: Path, workers: int
) -> None:
    setting = Setting(workers=workers, interval=4)
    lives: dict[str, list[Run]] = {"killed": [], "twin": []}
    for name, resume in (("twin", False), ("killed", False), ("killed", True)):
        folder = tmp_path / name / "scenes"
        scenes = folder if folder.exists() else own_scenes(stage, folder)
        cfg = setting.config(scenes, tmp_path / name / "run", resume)
        break_image(scenes, cfg)
        lives[name].append(Run(cfg))
        stage.runs.append(lives[name][-1])
        lives[name][-1].kill_after(10) if name == "killed" and not resume else lives[name][-1].finish()
    assert_as_if_nothing_had_happened(lives["killed"], lives["twin"][0])


# ---- a full disk ----------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("partial_file", "file"),
    [
        ("infobatch_summary.json.tmp", "infobatch_summary.json"),
        ("infobatch_scores.tmp.parquet", "infobatch_scores.parquet"),
        pytest.param("infobatch_scores.tmp.npz", "infobatch_scores.npz", marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_for_summary_or_scores_is_a_warning(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partial_file: str, file: str
) -> None:
    if file.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    elif file.endswith(".npz"):
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    Path(tmp_path, partial_file).symlink_to("/dev/full")
    runner, recorder = train(Setting().config(stage.scenes, tmp_path))
    assert runner.iter == runner.max_iters == len(recorder.losses)
    assert "could not write to" in log_of(runner)
    assert "No space left on device" in log_of(runner)
    assert not Path(tmp_path, file).exists()


class FillDisk(Hook):
    """No file of this process may grow beyond half of the first checkpoint, from an iteration on."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter == self.iteration:
            half = Path(runner.work_dir, "iter_3.pth").stat().st_size // 2
            resource.setrlimit(resource.RLIMIT_FSIZE, (half, half))


def disk_full_from(rank: int, runner: Any, *, iteration: int) -> None:
    runner.register_hook(FillDisk(iteration))


def test_a_full_disk_for_the_checkpoint_ends_the_run_and_leaves_the_one_before(stage: Stage) -> None:
    setting = Setting(keep=1)
    twin, work_dir = stage.twin(setting), stage.folder()
    ended = stage.begin(setting, work_dir, partial(disk_full_from, iteration=4))
    assert ended.wait() == [1]
    assert "OSError" in ended.output()
    assert len(ended.journal()) == 6
    assert [path.name for path in Path(work_dir).glob("iter_*")] == ["iter_3.pth"]
    resumed = stage.begin(setting, work_dir, resume=True).finish()
    assert resumed.journal()[0]["iter"] == 3
    assert_as_if_nothing_had_happened([ended, resumed], twin)


# ---- being asked to end ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT])
@pytest.mark.parametrize(
    "setting",
    [
        Setting(workers=2),
        pytest.param(Setting(epochs=True, accumulate=3, interval=4), marks=pytest.mark.slow),
        pytest.param(TWO, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_run_that_is_asked_to_end_goes_on_exactly(stage: Stage, setting: Setting, how: signal.Signals) -> None:
    twin, work_dir = stage.twin(setting), stage.folder()
    ended = stage.begin(setting, work_dir)
    assert all(ended.kill_after(8, 0.5 * ITERATION, how))
    resumed = stage.begin(setting, work_dir, resume=True).finish()
    assert_as_if_nothing_had_happened([ended, resumed], twin)
    assert resumed.journal()[0]["iter"] > 0
