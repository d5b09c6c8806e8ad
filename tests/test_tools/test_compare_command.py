"""The command that compares: what it trains, refuses, and does not train again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

for needed in ("mmengine", "matplotlib", "rich", "scipy"):
    pytest.importorskip(needed)

from mmengine.config import Config
from rich.progress import Progress

from infobatch_mm.cli.comparison import lives
from infobatch_mm.cli.comparison.record import alone_in

from .comparing import Trainings, compare, config

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


@pytest.fixture
def unpruned(tmp_path: Path) -> str:
    config(tmp_path, custom_hooks=[dict(type="EMAHook")], custom_imports=dict(imports=["json"])).dump("model.py")
    return "model.py"


def test_policies_are_arms_of_the_unpruned_config(unpruned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainings = Trainings(monkeypatch)
    specs = ["variance:target_saving=0.3,norm=recalibrate", "random"]
    result = compare(unpruned, "--policies", *specs, "--controls", "shortened", "random", "--seeds", "0", "1", "2")
    assert [arm for arm, _ in trainings.calls] == 3 * [
        *("baseline", *specs, "shortened", "shortened for random", f"random for {specs[0]}", "random for random")
    ]
    assert trainings.hooks["baseline"] == [dict(type="EMAHook")]
    policy = dict(type="variance", target_saving=0.3)
    assert trainings.hooks[specs[0]] == [
        dict(type="EMAHook"),
        dict(type="InfoBatchHook", policy=policy, norm="recalibrate"),
    ]
    written = Config.fromfile("out/configs/random.py")
    assert written.custom_imports.imports == ["json", "infobatch_mm.engine"]
    assert result["controls"][specs[0]] == dict(full="baseline", shortened="shortened", random=f"random for {specs[0]}")
    assert result["controls"]["random"]["shortened"] == "shortened for random"
    assert (result["seeds"], result["margin"], result["lower_is_better"]) == ([0, 1, 2], 0.5, False)
    assert {each["level"] for each in result["verdicts"]} == {1 - 0.05 / 2}
    verdict = next(each for each in result["verdicts"] if (each["arm"], each["against"]) == ("random", "full"))
    rows = result["rows"]
    gaps = [rows[seed]["random"]["accuracy/top1"] - rows[seed]["baseline"]["accuracy/top1"] for seed in "012"]
    assert list(verdict["differences"].values()) == gaps
    assert verdict["words"] == "lossless"
    assert result["settings"]["random"]["merged"]["custom_hooks"][1]["policy"] == dict(type="random")
    assert result["settings"]["shortened"]["options"]["2"][0] == "randomness.seed=2"
    assert "python" in result["versions"] and "--policies" in result["command"]
    assert Path("out/verdicts.png").is_file() and Path("out/seed1/comparison.png").is_file()


def test_what_cannot_be_compared_is_refused(
    unpruned: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainings = Trainings(monkeypatch)
    hook = dict(type="InfoBatchHook", prune_ratio=0.5)

    def twin(name: str, **changes: Any) -> str:
        cfg = config(tmp_path, custom_hooks=[hook])
        cfg.merge_from_dict(changes)
        cfg.dump(f"{name}.py")
        return f"{name}.py"

    schedule = [dict(type="CosineAnnealingLR", T_max=3)]
    cases = {
        "optim_wrapper.optimizer.lr: 0.1 in model.py, 0.2 in rate.py": [
            twin("rate", **{"optim_wrapper.optimizer.lr": 0.2})
        ],
        "param_scheduler.0.T_max: 4 in model.py, 3 in schedule.py": [twin("schedule", param_scheduler=schedule)],
        "train_dataloader.batch_size: 8 in model.py, 4 in batch.py": [
            twin("batch", **{"train_dataloader.batch_size": 4})
        ],
        "auto_scale_lr.enable: None in model.py, True in scaled.py": [twin("scaled", auto_scale_lr=dict(enable=True))],
        "there is no pruned arm": [],
        "unknown policy 'nonesuch'": ["--policies", "nonesuch"],
        "takes no pruning: its arguments are": ["--policies", "random:pruning=1"],
        "have one folder": ["--policies", "random", "random"],
        "give it once": [twin("good"), "--seeds", "1", "1"],
        "-1: give a number of at least 0": [twin("good"), "--margin=-1"],
        "invalid choice: 'nothing'": [twin("good"), "--controls", "nothing"],
    }
    for message, arguments in cases.items():
        with pytest.raises(SystemExit):
            compare(unpruned, *arguments)
        assert message in capsys.readouterr().err, message
    with pytest.raises(SystemExit):
        compare(twin("good"), "--policies", "random")
    assert "has an InfoBatchHook already" in capsys.readouterr().err
    assert trainings.calls == [] and not Path("out").exists()


def test_done_arms_are_not_trained_again_and_interrupted_ones_go_on(
    unpruned: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainings = Trainings(monkeypatch)
    arguments = [unpruned, "--shortened", "--policies", "infobatch"]
    trainings.interrupted = "infobatch"
    with pytest.raises(KeyboardInterrupt):
        compare(*arguments)
    assert json.loads(Path("out/infobatch/arm.json").read_text())["wall_time_s"] == 7.0
    trainings.interrupted = ""
    result = compare(*arguments)
    assert trainings.calls == [("baseline", False), ("infobatch", False), ("infobatch", True), ("shortened", False)]
    assert result["infobatch"]["wall_time_s"] == 17.0  # of both lives
    assert result["verdicts"][0]["words"] == "no verdict: one seed"
    said = capsys.readouterr().out
    assert "no verdict: one seed" in said and "lossless" not in said and "better than" not in said
    again = compare(*arguments)
    assert len(trainings.calls) == 4
    assert {**again, "command": ""} == {**result, "command": ""}
    # Another policy beside it takes what is there.
    compare(*arguments, "random")
    assert [arm for arm, _ in trainings.calls[4:]] == ["random", "shortened for random"]

    capsys.readouterr()
    with pytest.raises(
        SystemExit, match=r"out/baseline holds an arm with other settings \(optim_wrapper.optimizer.lr: "
    ):
        compare(*arguments, "--cfg-options", "optim_wrapper.optimizer.lr=0.3")
    record = json.loads(Path("out/infobatch/arm.json").read_text())
    record["settings"]["train_cfg"]["max_epochs"] = 9
    Path("out/infobatch/arm.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit, match=r"train_cfg.max_epochs: 9 there, 4 here"):
        compare(*arguments)
    assert len(trainings.calls) == 6


def test_an_arm_without_a_checkpoint_begins_from_the_start(unpruned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainings = Trainings(monkeypatch)
    trainings.interrupted = "baseline"
    arguments = [unpruned, "--policies", "infobatch"]
    with pytest.raises(KeyboardInterrupt):
        compare(*arguments)
    stale = Path("out/baseline/20260101_000001/vis_data/scalars.json")
    stale.write_text(json.dumps({"accuracy/top1": 99.0, "step": 9}) + "\n")  # of a life that counts no more
    Path("out/baseline/epoch_2.pth").unlink()
    trainings.interrupted = ""
    result = compare(*arguments)
    assert trainings.calls[1] == ("baseline", False)
    assert result["baseline"]["accuracy/top1"] == pytest.approx(80.08)


def test_two_trainings_never_share_a_folder(unpruned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fcntl")
    trainings = Trainings(monkeypatch)
    Path("out/baseline").mkdir(parents=True)
    with alone_in(Path("out/baseline")), pytest.raises(SystemExit, match="another training goes on in out/baseline"):
        lives.train_once("baseline", Path(unpruned), Path("out/baseline"), [], Progress())
    assert trainings.calls == []
