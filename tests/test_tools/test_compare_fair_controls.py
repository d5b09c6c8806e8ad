"""Controls of a comparison: like their arm in all but one thing, in every seed, wherever they lie."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

for needed in ("mmengine", "matplotlib", "rich", "scipy"):
    pytest.importorskip(needed)

from mmengine.config import Config
from rich.progress import Progress

from infobatch_mm.cli.comparison import lives
from infobatch_mm.cli.comparison.arms import Arms
from infobatch_mm.cli.comparison.controls import at_random, policy_of, schedule_of
from infobatch_mm.cli.comparison.record import Record, place_for, seed_of
from infobatch_mm.cli.comparison.request import Request
from infobatch_mm.cli.comparison.sharing import assign, reasons_against
from infobatch_mm.cli.config import merged

from .comparing import Trainings, compare, config

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


@pytest.fixture
def unpruned(tmp_path: Path) -> str:
    config(tmp_path, custom_hooks=[]).dump("model.py")
    return "model.py"


# ---- like their arm ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (dict(keep="steps", lr_rule="linear"), dict(target_saving=0.25, keep="steps", lr_rule="linear")),
        (dict(keep="steps", rescale="unbiased"), dict(target_saving=0.25, keep="steps", rescale="unbiased")),
        (dict(rescale="step"), dict(prune_ratio=0.25, rescale="step")),
        (dict(), dict(prune_ratio=0.25)),
    ],
    ids=["steps and rates", "steps and weights", "weights", "nothing"],
)
def test_random_pruning_makes_the_steps_of_its_arm(
    tmp_path: Path, own: dict[str, Any], expected: dict[str, Any]
) -> None:
    hook = dict(type="InfoBatchHook", policy=dict(type="variance", pi_min=0.2, **own), score="ema")
    cfg = config(tmp_path, custom_hooks=[hook])
    cfg.dump("pruned.py")
    summary = dict(visits=300, visits_full=400, delta=1.0, num_samples=100, **own)
    found = merged(Path("pruned.py"), at_random(cfg, schedule_of(cfg, 100), summary))
    assert policy_of(found).settings() == {"policy": "random", "delta": 1.0, **expected}
    assert found.custom_hooks[0].get("score") is None


def test_arms_of_other_steps_share_no_random_control() -> None:
    there = dict(visits=6000, visits_full=10_000, delta=1.0)
    arms = {"a": there, "b": dict(there, keep="steps"), "c": dict(there, rescale="step"), "d": dict(there)}
    found = assign(["random"], arms, {}).opponents
    assert [found[arm]["random"] for arm in "abcd"] == ["random", "random for b", "random for c", "random"]


def test_random_steps_that_cannot_be_are_left_out_with_the_reason(tmp_path: Path) -> None:
    hook = dict(type="InfoBatchHook", policy=dict(type="variance", keep="steps"))
    cfg = config(tmp_path, custom_hooks=[hook])
    summary = dict(visits=20, visits_full=400, delta=1.0, num_samples=100)
    assert "cannot be met" in reasons_against(["random"], {"a": (cfg, summary)}, schedule_of(cfg, 100))["a", "random"]


# ---- in every seed -----------------------------------------------------------------------------------------------


class Uneven(Trainings):
    """Trainings whose visits, and whether they are validated, can be set by arm and seed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch)
        self.kept: dict[tuple[str, int], list[int]] = {}
        self.blind: set[str] = set()
        self.gain: dict[str, float] = {}

    def __call__(self, arm: str, config: Path, work_dir: Path, options: list[str], progress: Any, **more: Any) -> float:
        seconds = super().__call__(arm, config, work_dir, options, progress, **more)
        path = work_dir / "infobatch_summary.json"
        if (kept := self.kept.get((arm, merged(config, options).randomness.seed))) is not None:
            found = json.loads(path.read_text())
            per_pass = [{"pass": p, "kept": k, "kept_ratio": k / 100} for p, k in enumerate(kept)]
            path.write_text(json.dumps({**found, "visits": sum(kept), "per_pass": per_pass}))
        for scalars in work_dir.glob("*/vis_data/scalars.json"):
            lines = [] if arm in self.blind else map(json.loads, scalars.read_text().splitlines())
            top1 = "accuracy/top1"
            better = [{**line, top1: line[top1] + self.gain.get(arm, 0.0)} for line in lines]
            scalars.write_text("".join(json.dumps(line) + "\n" for line in better))
        return seconds


def test_a_shared_control_is_checked_in_every_seed(unpruned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainings = Uneven(monkeypatch)
    trainings.gain = dict(ucb=9.0, repb=9.0)
    for seed in (0, 1):
        trainings.kept["ucb", seed] = [100, 60, 60, 80]
        trainings.kept["repb", seed] = [100, 60, 60, 80] if seed == 0 else [100, 100, 100, 100]
    result = compare(unpruned, "--policies", "ucb", "repb", "--controls", "shortened", "--seeds", "0", "1")
    assert result["controls"]["repb"]["shortened"] == result["controls"]["ucb"]["shortened"] == "shortened"
    words = {each["arm"]: each["words"] for each in result["verdicts"] if each["against"] == "shortened"}
    assert words == dict(repb="no verdict: the control made 25.0% fewer visits in seed 1", ucb="better than shorter")


def test_a_control_that_a_later_seed_cannot_have_gives_no_verdict(
    unpruned: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainings = Uneven(monkeypatch)
    trainings.kept["variance", 1] = [5, 5, 5, 5]
    result = compare(unpruned, "--policies", "variance", "--controls", "smaller", "--seeds", "0", "1")
    assert [arm for arm, _ in trainings.calls] == ["baseline", "variance", "smaller", "baseline", "variance"]
    assert result["rows"]["1"]["smaller"] == dict.fromkeys(("accuracy/top1", "visits", "iterations", "wall_time_s"))
    assert result["mean"]["smaller"]["accuracy/top1"] is None
    words = {each["against"]: each["words"] for each in result["verdicts"]}
    assert words["smaller"] == "no verdict: not measured in all seeds"
    assert result["left_out"][0].startswith("no control 'smaller' in seed 1: ")
    assert "no control 'smaller' in seed 1: " in capsys.readouterr().out
    assert list(result["settings"]["smaller"]["options"]) == ["0"]


def test_an_arm_that_validated_nothing_has_a_row(unpruned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainings = Uneven(monkeypatch)
    trainings.blind.add("variance")
    result = compare(unpruned, "--policies", "variance", "--shortened", "--seeds", "0", "1")
    assert result["rows"]["0"]["variance"]["accuracy/top1"] is None
    assert result["rows"]["0"]["variance"]["visits"] == 280
    assert {each["words"] for each in result["verdicts"]} == {"no verdict: not measured in all seeds"}


# ---- wherever they lie -------------------------------------------------------------------------------------------


def test_a_seed_is_found_where_it_was_trained(unpruned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainings = Trainings(monkeypatch)
    arguments = [unpruned, "--policies", "variance", "--shortened", "--seeds"]
    one = compare(*arguments, "0")
    assert len(trainings.calls) == 3
    both = compare(*arguments, "0", "1")
    assert len(trainings.calls) == 6
    assert both["rows"]["0"]["variance"] == one["variance"]
    assert json.loads(Path("out/seed0/comparison.json").read_text())["variance"] == one["variance"]
    assert Path("out/seed1/variance").is_dir() and not Path("out/seed0/variance").exists()
    assert compare(*arguments, "1")["variance"] == both["rows"]["1"]["variance"] and len(trainings.calls) == 6
    compare(*arguments, "2")  # which lies nowhere, and the work dir holds another
    assert len(trainings.calls) == 9 and Path("out/seed2/variance").is_dir()


def test_a_control_whose_owner_is_another_gets_a_folder_of_its_own(
    unpruned: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings = Uneven(monkeypatch)
    trainings.kept["ucb", 0] = [100, 50, 50, 100]
    command = [unpruned, "--controls", "random", "--policies"]
    compare(*command, "variance", "ucb")
    assert [arm for arm, _ in trainings.calls[3:]] == ["random", "random for ucb"]
    compare(*command, "ucb", "variance")
    assert [arm for arm, _ in trainings.calls[5:]] == ["random", "random for variance"]
    assert Path("out/random-2").is_dir() and Path("out/random-for-variance").is_dir()
    compare(*command, "ucb", "variance")
    compare(*command, "variance", "ucb")
    assert len(trainings.calls) == 7


def test_namesakes_of_folders_are_taken_in_their_order() -> None:
    def leave(name: str, **settings: Any) -> None:
        Path(name).mkdir()
        Record(Path(name), {"randomness": {"seed": 3}, **settings}).write()

    assert place_for(Path("net-1"), {"a": 1}) == Path("net-1")
    leave("net-1", a=0)
    assert place_for(Path("net-1"), {"randomness": {"seed": 3}, "a": 1}) == Path("net-1-2")
    leave("net-1-2", a=2)
    assert place_for(Path("net-1"), {"randomness": {"seed": 3}, "a": 1}) == Path("net-1-3")
    assert place_for(Path("net-1"), {"randomness": {"seed": 3}, "a": 2}) == Path("net-1-2")
    assert (seed_of(Path("net-1")), seed_of(Path("net-3"))) == (3, None)


def test_a_fine_tuning_from_another_checkpoint_of_the_same_name_is_not_done(
    unpruned: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    monkeypatch.setattr(lives, "train", lambda arm, *args, **more: trained.append(arm) or 1.0)
    checkpoint = Path("last.pth")

    def tune() -> None:
        lives.train_once("tuned", Path(unpruned), Path("tuned"), [], Progress(), checkpoint)

    checkpoint.write_bytes(b"one")
    tune()
    tune()
    assert trained == ["tuned"]
    checkpoint.write_bytes(b"two")
    with pytest.raises(SystemExit, match=r"tuned holds an arm with other settings \(start.sha256: .*delete that"):
        tune()


def test_a_pre_training_that_is_made_again_is_fine_tuned_again(unpruned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []

    def pretend(arm: str, config: Path, work_dir: Path, *_: Any, **__: Any) -> float:
        trained.append(arm)
        (work_dir / "last.pth").write_text(f"weights {len(trained)}")
        (work_dir / "last_checkpoint").write_text(str(work_dir / "last.pth"))
        return 1.0

    monkeypatch.setattr(lives, "train", pretend)
    monkeypatch.setattr("infobatch_mm.cli.comparison.arms.find_metric", lambda *_: "mIoU")
    cfg = config(Path())
    cfg.model = dict(backbone=dict(init_cfg=dict(type="Pretrained", prefix="backbone.")))
    cfg.dump("tuning.py")
    request = Request(
        **dict(unpruned=Path(unpruned), pruned=[], policies=[], work_dir=Path("out"), seeds=[0], controls=[]),
        **dict(metric=None, margin=None, lower_is_better=None, cfg_options=[], then=Path("tuning.py"), then_options=[]),
    )

    def train_all() -> None:
        Arms(request, [], 0, Path("out"), Config.fromfile(unpruned)).train_pruned(Progress())

    train_all()
    train_all()
    assert trained == ["baseline", "baseline, fine-tuned"]
    shutil.rmtree("out/baseline")
    with pytest.raises(SystemExit, match=r"out/fine-tuned/baseline holds an arm with other settings \(start.sha256: "):
        train_all()
    shutil.rmtree("out/fine-tuned/baseline")
    train_all()
    assert trained[2:] == ["baseline", "baseline, fine-tuned"]
