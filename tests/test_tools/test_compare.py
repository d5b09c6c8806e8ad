"""The comparison of a pair: its controls, its counts, and what it leaves behind."""

from __future__ import annotations

import copy
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

for needed in ("mmengine", "matplotlib", "rich"):
    pytest.importorskip(needed)

from mmengine.config import Config

from infobatch_mm.cli import compare as tool
from infobatch_mm.cli.comparison import checks, lives
from infobatch_mm.cli.comparison.configs import missing_data, untwinned
from infobatch_mm.cli.comparison.controls import at_random, schedule_of
from infobatch_mm.cli.comparison.shortening import shortened
from infobatch_mm.cli.config import merged
from infobatch_mm.report.logs import find_metric
from infobatch_mm.report.runs import read_arm
from infobatch_mm.report.summaries import read_summary

ROOT = Path(__file__).parents[2]


def epochs(**changes: Any) -> Config:
    """A training by epochs: 20 of 100 samples in batches of 8."""
    settings = dict(
        train_cfg=dict(by_epoch=True, max_epochs=20),
        train_dataloader=dict(batch_size=8, dataset=dict(type="Any")),
        param_scheduler=[
            dict(type="LinearLR", end=2, convert_to_iter_based=True),
            dict(type="CosineAnnealingLR", begin=2, end=20, T_max=18),
        ],
        default_hooks=dict(logger=dict(type="LoggerHook")),
    )
    return Config({**settings, **changes})


def iterations(**changes: Any) -> Config:
    """A training of 250 iterations of 8."""
    schedulers = [
        dict(type="LinearLR", by_epoch=False, begin=0, end=50),
        dict(type="PolyLR", by_epoch=False, begin=50, end=250),
    ]
    return epochs(**{"train_cfg": dict(max_iters=250), "param_scheduler": schedulers, **changes})


def short(cfg: Config, visits: int) -> Config:
    """The config shortened as the tool does it, through the options of its command line."""
    options = shortened(cfg, schedule_of(cfg, 100), visits)
    assert all(" " not in option for option in options)
    path = Path("shortened.py")
    cfg.dump(path)
    return merged(path, options)


pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


def test_iterations_are_shortened_after_the_warm_up() -> None:
    cfg = short(iterations(), visits=1200)
    assert cfg.train_cfg.max_iters == 150
    assert [(s.begin, s.end) for s in cfg.param_scheduler] == [(0, 50), (50, 150)]


def test_epochs_are_rounded_up_where_more_than_a_hundredth_would_be_missing() -> None:
    for visits, max_epochs in ((1410, 14), (1449, 15), (1451, 15)):
        cfg = short(epochs(), visits)
        assert cfg.train_cfg.max_epochs == max_epochs
        warm_up, cosine = cfg.param_scheduler
        assert (warm_up.end, warm_up.convert_to_iter_based) == (2, True)
        assert (cosine.begin, cosine.end, cosine.T_max) == (2, max_epochs, max_epochs - 2)


def test_milestones_come_in_proportion() -> None:
    lone = epochs(
        train_cfg=dict(max_epochs=200), param_scheduler=dict(type="MultiStepLR", milestones=[60, 120, 160], gamma=0.2)
    )
    cfg = short(lone, visits=15000)
    assert cfg.train_cfg.max_epochs == 150
    assert cfg.param_scheduler == dict(type="MultiStepLR", milestones=[45, 90, 120], gamma=0.2)


def test_schedulers_by_iteration_follow_in_a_loop_of_epochs() -> None:
    # 13 batches per epoch
    by_iteration = [
        dict(type="LinearLR", by_epoch=False, begin=0, end=26),
        dict(type="CosineAnnealingLR", by_epoch=False, begin=26, end=260, T_max=234),
        dict(type="StepLR", step_size=9, begin=2),
    ]
    cfg = short(epochs(param_scheduler=by_iteration), visits=1100)
    warm_up, cosine, steps = cfg.param_scheduler
    assert cfg.train_cfg.max_epochs == 11
    assert (warm_up.begin, warm_up.end) == (0, 26)
    assert (cosine.begin, cosine.end, cosine.T_max) == (26, 143, 117)
    assert (steps.begin, steps.step_size) == (2, round(9 * 9 / 18))


def test_a_config_without_a_schedule_is_only_shorter() -> None:
    cfg = epochs(param_scheduler=[])
    assert shortened(cfg, schedule_of(cfg, 100), 700) == ["train_cfg.max_epochs=7"]
    several = epochs(param_scheduler=dict(generator=[dict(type="PolyLR")]))
    with pytest.raises(ValueError, match="several optimisers"):
        shortened(several, schedule_of(several, 100), 700)


@pytest.mark.parametrize("by_epoch", [True, False], ids=["epochs", "iterations"])
def test_random_pruning_makes_as_many_visits(by_epoch: bool) -> None:
    """Passes drawn by the policy itself, at the share that the tool names, add up to what was saved."""
    torch = pytest.importorskip("torch")
    from infobatch_mm.core import build_policy

    num_samples, batch_size = 4000, 8
    loop = dict(max_epochs=20) if by_epoch else dict(max_iters=20 * num_samples // batch_size)
    hooks = [dict(type="EMAHook"), dict(type="InfoBatchHook", prune_ratio=0.5, delta=0.875)]
    cfg = epochs(train_cfg=loop, custom_hooks=hooks)
    schedule = schedule_of(cfg, num_samples)
    summary = dict(prune_ratio=0.5, delta=0.875, visits_full=80000, visits=63210)
    policy_option, ratio_option = at_random(cfg, schedule, summary)
    assert policy_option == "custom_hooks.1.policy=random"
    name, ratio = ratio_option.split("=")
    assert name == "custom_hooks.1.prune_ratio"

    policy = build_policy("random", float(ratio), 0.875)
    generator, visits = torch.Generator().manual_seed(0), 0
    for p in range(schedule.num_passes):
        drawn = None
        if policy.is_active(schedule.progress(p)):
            scores, seen = torch.zeros(num_samples), torch.zeros(num_samples, dtype=torch.bool)
            drawn = policy.draw(scores, seen, generator, batch_size)
        visits += num_samples if drawn is None else len(drawn)
    # every pass is brought to full batches
    assert abs(visits - 63210) <= 18 * batch_size / 2


def leave_log(work_dir: Path, validations: list[dict[str, Any]], kept: list[int] | None = None) -> None:
    """What a run of 100 samples in batches of 8 leaves behind; pruned where ``kept`` says how much."""
    (work_dir / "20260101_000000/vis_data").mkdir(parents=True)
    lines = [{"lr": 0.1, "loss": 1.0, "time": 0.1, "iter": 10, "step": 10}, *validations]
    if kept:
        per_pass = [{"pass": p, "kept": k, "kept_ratio": k / 100} for p, k in enumerate(kept)]
        lines += [{"infobatch/kept_ratio": entry["kept_ratio"], "step": entry["pass"] + 1} for entry in per_pass]
        summary = {
            "prune_ratio": 0.5,
            "delta": 0.875,
            "num_samples": 100,
            "visits": sum(kept),
            "visits_full": 100 * len(kept),
            "iterations": sum(-(-k // 8) for k in kept),
            "per_pass": per_pass,
        }
        (work_dir / "infobatch_summary.json").write_text(json.dumps(summary))
    scalars = work_dir / "20260101_000000/vis_data/scalars.json"
    scalars.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_metric_is_the_one_in_the_log_or_the_one_asked_for(tmp_path: Path) -> None:
    for name, metrics in (("seg", ("aAcc", "mIoU", "mDice")), ("cls", ("accuracy/top1", "accuracy/top5"))):
        leave_log(tmp_path / name, [{**dict.fromkeys(metrics, 1.0), "step": 1, "time": 0.1, "data_time": 0.1}])
    assert find_metric(tmp_path / "seg", None) == "mIoU"
    assert find_metric(tmp_path / "cls", None) == "accuracy/top1"
    assert find_metric(tmp_path / "seg", "mDice") == "mDice"
    with pytest.raises(SystemExit, match=r"no mIoU: choose with --metric one of accuracy/top1, accuracy/top5$"):
        find_metric(tmp_path / "cls", "mIoU")
    leave_log(tmp_path / "none", [])
    with pytest.raises(SystemExit, match=r"no mIoU and no accuracy/top1: .* nothing was validated"):
        find_metric(tmp_path / "none", None)


@pytest.mark.parametrize("drop_last", [False, True])
def test_visits_of_epochs_are_those_that_were_made(tmp_path: Path, drop_last: bool) -> None:
    schedule = schedule_of(epochs(train_dataloader=dict(batch_size=8, drop_last=drop_last)), 100)
    validations = [{"accuracy/top1": 10.0 * step, "step": step} for step in (2, 4)]
    leave_log(tmp_path / "full", validations)
    leave_log(tmp_path / "pruned", validations, kept=[100, 72, 64, 100])
    full, pruned = (read_arm(tmp_path / name, "accuracy/top1", schedule, 1.25) for name in ("full", "pruned"))
    per_epoch, batches = (96, 12) if drop_last else (100, 13)
    assert full.visits == [2 * per_epoch, 4 * per_epoch]
    assert full.row("accuracy/top1") == {
        "accuracy/top1": 40.0,
        "visits": 4 * per_epoch,
        "iterations": 4 * batches,
        "wall_time_s": 1.2,
    }
    assert pruned.visits == [172, 336]
    assert (pruned.iterations, pruned.kept) == (43, [1.0, 0.72, 0.64, 1.0])


def test_visits_of_iterations_are_full_batches(tmp_path: Path) -> None:
    leave_log(tmp_path / "run", [{"mIoU": 50.0, "step": 100}, {"mIoU": 60.0, "step": 250}])
    arm = read_arm(tmp_path / "run", "mIoU", schedule_of(iterations(), 100), 1.0)
    assert (arm.visits, arm.quality, arm.iterations) == ([800, 2000], [50.0, 60.0], 250)


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    """Configs of 4 epochs, unpruned and pruned, over data that is there."""
    dataset = dict(type="Any", data_root=str(tmp_path))
    cfg = epochs(train_cfg=dict(max_epochs=4), train_dataloader=dict(batch_size=8, dataset=dataset))
    cfg.param_scheduler = [dict(type="CosineAnnealingLR", T_max=4)]
    cfg.val_evaluator = dict(type="Accuracy")
    cfg.dump(tmp_path / "model.py")
    cfg.custom_hooks = [dict(type="InfoBatchHook", prune_ratio=0.5, delta=0.875)]
    cfg.dump(tmp_path / "model-infobatch.py")
    return [str(tmp_path / "model.py"), str(tmp_path / "model-infobatch.py")]


def compare(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[tuple[str, list[str]]]:
    """Run the tool with trainings that only leave their logs; returns the arms and their options."""
    calls: list[tuple[str, list[str]]] = []

    def pretend(arm: str, config: Path, work_dir: Path, options: list[str], progress: Any, **_: Any) -> float:
        calls.append((arm, options))
        cfg = merged(config, options)
        quality = {"baseline": 80.0, "infobatch": 79.0, "shortened": 70.0, "random": 75.0}[arm]
        top1 = quality + (cfg.randomness.seed if arm == "infobatch" else 0)
        kept = {"infobatch": [100, 64, 64, 100], "random": [80, 80, 80, 88]}.get(arm)
        last = cfg.train_cfg.max_epochs
        leave_log(work_dir, [{"accuracy/top1": top1 - last + step, "step": step} for step in range(1, last + 1)], kept)
        return 10.0

    monkeypatch.setattr(lives, "train", pretend)
    monkeypatch.setattr(checks, "check_built", lambda parser, configs: None)
    monkeypatch.setattr("sys.argv", ["compare.py", *arguments])
    tool.main()
    return calls


def test_all_arms_are_trained_and_kept(
    pair: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = dict(compare(monkeypatch, *pair, "--shortened", "--random", "--work-dir", str(tmp_path / "out")))
    common = ["randomness.seed=0", "default_hooks.logger.log_metric_by_epoch=True"]
    assert calls == {
        "baseline": common,
        "infobatch": common,
        "shortened": [*common, "train_cfg.max_epochs=4"],  # three would be 28 visits too few
        # 72 saved of the 400 that four passes before 0.875 of the training visit
        "random": [*common, "custom_hooks.0.policy=random", "custom_hooks.0.prune_ratio=0.180000"],
    }
    result = json.loads((tmp_path / "out/comparison.json").read_text())
    top1, visits = "accuracy/top1", {"baseline": 400, "infobatch": 328, "shortened": 400, "random": 328}
    assert result["metric"] == top1
    assert {arm: result[arm]["visits"] for arm in visits} == visits
    assert {arm: result[arm][top1] for arm in visits} == dict(baseline=80, infobatch=79, shortened=70, random=75)
    assert set(result["baseline"]) == {top1, "visits", "iterations", "wall_time_s"}
    assert result["saved_ratio"] == pytest.approx(0.18)
    assert (tmp_path / "out/comparison.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "shortened" in printed
    assert "18.0%" in printed


def test_several_seeds_give_mean_and_standard_deviation(
    pair: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = compare(monkeypatch, *pair, "--seeds", "0", "1", "5", "--work-dir", str(tmp_path / "out"))
    assert [arm for arm, _ in calls] == ["baseline", "infobatch"] * 3
    pruned = [79, 80, 84]
    for seed, top1 in zip((0, 1, 5), pruned, strict=True):
        result = json.loads((tmp_path / f"out/seed{seed}/comparison.json").read_text())
        assert result["infobatch"]["accuracy/top1"] == top1
        assert (tmp_path / f"out/seed{seed}/comparison.png").is_file()
    kept = json.loads((tmp_path / "out/comparison.json").read_text())
    assert kept["seeds"] == [0, 1, 5]
    assert kept["mean"]["infobatch"]["accuracy/top1"] == statistics.mean(pruned)
    assert kept["std"]["infobatch"]["accuracy/top1"] == pytest.approx(statistics.stdev(pruned))
    assert kept["std"]["baseline"]["accuracy/top1"] == 0
    printed = capsys.readouterr().out
    assert "81.00 ± 2.65" in printed
    assert "(+1.00 ± 2.65)" in printed


@pytest.fixture
def fine_tuning(tmp_path: Path) -> Config:
    """A fine-tuning of 50 iterations that starts from a checkpoint, over data that is there."""
    cfg = iterations(train_cfg=dict(max_iters=50), val_evaluator=dict(type="IoUMetric"))
    cfg.train_dataloader.dataset.data_root = str(tmp_path)
    start = dict(type="Pretrained", checkpoint="", prefix="backbone.")
    cfg.model = dict(backbone=dict(type="ViT", init_cfg=start))
    return cfg


@pytest.mark.parametrize("by_epoch", [True, False], ids=["epochs", "iterations"])
def test_a_pre_training_has_the_quality_of_the_fine_tuning_after_it(
    pair: list[str], fine_tuning: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_epoch: bool
) -> None:
    if not by_epoch:
        for path in pair:
            cfg = Config.fromfile(path)
            cfg.train_cfg = dict(max_iters=52)
            cfg.dump(path)
    for path in pair:
        cfg = Config.fromfile(path)
        cfg.default_hooks.checkpoint = dict(type="CheckpointHook")
        cfg.dump(path)
    fine_tuning.dump(tmp_path / "tuning.py")
    calls: list[tuple[str, Path, list[str]]] = []
    quality = {"baseline": 57.0, "infobatch": 56.0, "shortened": 55.0, "random": 54.0, "scratch": 40.0}

    def pretend(arm: str, config: Path, work_dir: Path, options: list[str], progress: Any, **_: Any) -> float:
        calls.append((arm, work_dir, options))
        arm, _, tuned = arm.partition(", ")
        if tuned:
            leave_log(work_dir, [{"mIoU": quality[arm] - 10, "step": 25}, {"mIoU": quality[arm], "step": 50}])
            return 99.0
        leave_log(work_dir, [], {"infobatch": [100, 64, 64, 100], "random": [80, 80, 80, 88]}.get(arm))
        (work_dir / "last_checkpoint").write_text(f"/somewhere/{arm}-last.pth\n")
        return 10.0

    monkeypatch.setattr(lives, "train", pretend)
    monkeypatch.setattr(checks, "check_built", lambda parser, configs: None)
    arguments = [*pair, "--shortened", "--random", "--then", str(tmp_path / "tuning.py"), "--work-dir", "out"]
    monkeypatch.setattr("sys.argv", ["compare.py", *arguments, "--then-options", "train_cfg.max_iters=7"])
    tool.main()

    options = {arm: given for arm, _, given in calls}
    for arm in ("baseline", "infobatch", "shortened", "random"):
        start = f"model.backbone.init_cfg.checkpoint=/somewhere/{arm}-last.pth"
        assert options[f"{arm}, fine-tuned"] == ["train_cfg.max_iters=7", "randomness.seed=0", start]
    assert options["scratch, fine-tuned"][-1] == "model.backbone.init_cfg=None"
    assert merged(tmp_path / "tuning.py", options["scratch, fine-tuned"]).model.backbone.init_cfg is None
    assert len({work_dir for _, work_dir, _ in calls}) == len(calls) == 9
    result = json.loads(Path("out/comparison.json").read_text())
    assert {arm: result[arm]["mIoU"] for arm in quality} == quality
    visits = dict(baseline=400, infobatch=328, shortened=400, random=328, scratch=0)
    if not by_epoch:  # 52 batches of 8 are 416 visits; the pruned runs' iterations are those of their summary
        visits = dict(baseline=416, infobatch=42 * 8, shortened=41 * 8, random=41 * 8, scratch=0)
    assert {arm: result[arm]["visits"] for arm in visits} == visits
    assert {arm: result[arm]["wall_time_s"] for arm in ("baseline", "scratch")} == dict(baseline=10.0, scratch=0.0)


def test_a_fine_tuning_that_would_measure_nothing_is_refused(
    pair: list[str],
    fine_tuning: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def then(**changes: Any) -> list[str]:
        cfg = copy.deepcopy(fine_tuning)
        cfg.merge_from_dict(changes)
        cfg.dump(tmp_path / "tuning.py")
        return [*pair, "--then", str(tmp_path / "tuning.py")]

    def refused(message: str, arguments: list[str]) -> None:
        with pytest.raises(SystemExit):
            compare(monkeypatch, *arguments)
        assert message in capsys.readouterr().err, message

    refused("has no default_hooks.checkpoint", then())
    for path in pair:
        cfg = Config.fromfile(path)
        cfg.default_hooks.checkpoint = dict(type="CheckpointHook")
        cfg.dump(path)
    start = "model.backbone.init_cfg"
    refused("there is no config nowhere.py", [*pair, "--then", "nowhere.py"])
    refused("starts from no checkpoint", then(**{f"{start}.prefix": None}))
    refused("starts from no checkpoint", then(**{start: [dict(type="TruncNormal")]}))
    refused("starts from no checkpoint", then(**{start: None}))
    refused("has no val_evaluator", then(val_evaluator=None))
    refused("the data set /nowhere", then(**{"train_dataloader.dataset.data_root": "/nowhere"}))
    refused("the data set /nowhere", [*then(), "--then-options", "data_root=/nowhere"])


def test_what_would_fail_later_is_refused_before_training(
    pair: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    several, blind = tmp_path / "several.py", tmp_path / "blind.py"
    blind.write_text(f"_base_ = {pair[0]!r}\nval_evaluator = None")
    pruned_blind = tmp_path / "pruned_blind.py"
    pruned_blind.write_text(f"_base_ = {pair[1]!r}\nval_evaluator = None")
    pruned_several = tmp_path / "pruned_several.py"
    for path, base in ((several, pair[0]), (pruned_several, pair[1])):
        path.write_text(f"_base_ = {base!r}\nparam_scheduler = dict(_delete_=True, generator=[])")
    cases = {
        "has no InfoBatchHook": pair[::-1],
        "there is no config": [pair[0], "nowhere.py"],
        "the data set /nowhere is not there": [*pair, "--cfg-options", "data_root=/nowhere"],
        "absent.npz is not there": [*pair, "--cfg-options", "train_dataloader.dataset.ann_file=absent.npz"],
        "several optimisers": [str(several), str(pruned_several), "--shortened"],
        "blind.py has no val_evaluator": [str(blind), pair[1]],
        "pruned_blind.py has no val_evaluator": [pair[0], str(pruned_blind)],
    }
    for message, arguments in cases.items():
        with pytest.raises(SystemExit):
            compare(monkeypatch, *arguments)
        assert message in capsys.readouterr().err, message


def test_configs_that_are_no_twins_are_told_apart() -> None:
    one = dict(model=dict(type="A"), train_cfg=dict(type="IterBasedTrainLoop", max_iters=9), train_dataloader=dict(x=1))
    line = dict(custom_hooks=[dict(type="InfoBatchHook")], custom_imports=dict(imports=[]))
    written_out = dict(
        train_cfg=dict(type="InfoBatchIterLoop", max_iters=9),
        train_dataloader=dict(x=1, sampler=dict(type="InfoBatchSampler")),
    )
    assert untwinned(Config(one), Config({**one, **line})) == []
    assert untwinned(Config(one), Config({**one, **line, **written_out})) == []
    other = {**one, **line, "model": dict(type="B"), "train_cfg": dict(type="IterBasedTrainLoop", max_iters=4)}
    assert untwinned(Config(one), Config(other)) == ["model", "train_cfg"]


def test_the_data_are_looked_for_where_the_data_sets_say(tmp_path: Path) -> None:
    """Not where a base has left a variable ``data_root``, and below any wrapper."""

    def missing(dataset: dict[str, Any]) -> Path | None:
        return missing_data(Config(dict(data_root="data/of/the/base", train_dataloader=dict(dataset=dataset))))

    (tmp_path / "there").mkdir()
    (tmp_path / "there/list.txt").touch()
    there, away = (dict(type="Any", data_root=str(tmp_path / name)) for name in ("there", "away"))
    for wrap in (
        lambda dataset: dataset,
        lambda dataset: dict(type="RepeatDataset", times=9, dataset=dataset),
        lambda dataset: dict(type="ConcatDataset", datasets=[there, dict(type="RepeatDataset", dataset=dataset)]),
    ):
        assert missing(wrap(there)) is None
        assert missing(wrap(away)) == tmp_path / "away"
        assert missing(wrap(dict(there, ann_file="list.txt"))) is None
        assert missing(wrap(dict(there, ann_file="none.txt"))) == tmp_path / "there/none.txt"
        assert missing(wrap(dict(type="Any", ann_file=str(tmp_path / "there/list.txt")))) is None
    assert missing(dict(type="Any", data_root="s3://bucket/data")) is None


def test_summaries_of_earlier_versions_are_read(tmp_path: Path) -> None:
    (tmp_path / "infobatch_summary.json").write_text(json.dumps({"samples_seen": 7, "samples_full": 9}))
    assert read_summary(tmp_path) == {"visits": 7, "visits_full": 9}


@pytest.mark.parametrize(
    ("typo", "found"),
    [
        pytest.param(
            "custom_hooks = [dict(type='InfoBatchHook', prune_ration=0.5)]", "prune_ration", marks=pytest.mark.slow
        ),
        pytest.param("model = dict(decode_head=dict(type='NoSuchHead'))", "NoSuchHead", marks=pytest.mark.slow),
        pytest.param(
            "custom_hooks = [dict(type='InfoBatchHook'), dict(type='InfoBatchHook')]",
            "more than one InfoBatchHook",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "val_dataloader = dict(dataset=dict(data_prefix=dict(img_path='nowhere')))",
            "nowhere",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["an argument of the hook", "a head", "what only the wiring of a run can find", "a folder of the validation"],
)
def test_a_typo_in_the_pruned_config_is_found_before_anything_is_trained(
    scenes: Path, tmp_path: Path, typo: str, found: str
) -> None:
    pytest.importorskip("mmseg")
    from test_engine.toy import ONE_LINE, config

    cfg = config(scenes, tmp_path / "unused", custom_hooks=[])
    cfg.custom_imports = dict(imports=["infobatch_mm.engine"], allow_failed_imports=False)
    cfg.dump(tmp_path / "model.py")
    pruned = tmp_path / "model-infobatch.py"
    pruned.write_text(f"_base_ = 'model.py'\ncustom_hooks = {ONE_LINE}\n{typo}\n")
    command = [sys.executable, str(ROOT / "tools/compare.py"), "model.py", pruned.name, "--work-dir", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert found in done.stderr
    assert "model-infobatch.py cannot be trained, for the reason above; nothing was trained" in done.stderr
    assert not (tmp_path / "out").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"model.py", "model-infobatch.py"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_classification_demo_learns_and_saves(tmp_path: Path) -> None:
    pytest.importorskip("mmpretrain")
    pytest.importorskip("PIL")
    from infobatch_mm.demo.shapes import draw_dataset

    data = draw_dataset(tmp_path / "shapes")
    configs = [ROOT / f"configs/resnet/resnet18-tiny_1xb32{twin}-16e_demo-32px.py" for twin in ("", "-infobatch")]
    command = [sys.executable, str(ROOT / "tools/compare.py"), *map(str, configs), "--shortened", "--random"]
    subprocess.run([*command, "--work-dir", "out", "--cfg-options", f"data_root={data}"], check=True, cwd=tmp_path)
    result = json.loads((tmp_path / "out/comparison.json").read_text())
    assert 75 < result["baseline"]["accuracy/top1"] < 97
    assert result["infobatch"]["accuracy/top1"] > 65
    assert 0.15 < result["saved_ratio"] < 0.35
    visits = {arm: result[arm]["visits"] for arm in ("infobatch", "shortened", "random")}
    assert visits["random"] == pytest.approx(visits["infobatch"], rel=0.02)
    assert -0.01 * visits["infobatch"] <= visits["shortened"] - visits["infobatch"] <= 2000  # whole epochs, rounded up
