"""Arms of a comparison of latent-diffusion trainings: as they are typed, and refused."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

for needed in ("diffusers", "matplotlib", "rich", "scipy"):
    pytest.importorskip(needed)

from infobatch_mm.cli import compare_ldm
from infobatch_mm.cli.comparison.ldm_arms import check_twins, control_flags, pruned_arms
from infobatch_mm.cli.comparison.sharing import Control
from infobatch_mm.diffusion.options import parse_options


def recipe(path: Path, **options: Any) -> str:
    given = dict(train_data_dir="images", vae="vae", unet_config="'{}'", learning_rate=0.001, policy="none", **options)
    path.write_text("".join(f"{key}: {value}\n" for key, value in given.items()))
    return str(path)


def arms(full: str, *pruned: str, policies: list[str] | None = None, scores: list[str] | None = None) -> dict[str, Any]:
    return pruned_arms(argparse.Namespace(full=full, pruned=pruned, policies=policies or [], scores=scores))


def test_arms_are_flags_of_the_training(tmp_path: Path) -> None:
    full, one, two = (recipe(tmp_path / f"{name}.yaml") for name in ("full", "one", "two"))
    assert arms(full, one) == {"infobatch": ["--config", one]}
    assert list(arms(full, one, two)) == ["one", "two"]
    assert arms(full, one, scores=["raw"]) == {"raw": ["--config", one, "--score", "raw"]}
    found = arms(full, policies=["infobatch:quantile=0.5,delta=1.0,score=raw"])
    (flags,) = found.values()
    options = parse_options([*flags, "--output_dir=."])
    assert (options.policy, options.prune_quantile, options.delta, options.score) == ("infobatch", 0.5, 1.0, "raw")
    assert options.learning_rate == 0.001
    with pytest.raises(ValueError, match="no option for target_saving"):
        arms(full, policies=["random:target_saving=0.3"])
    with pytest.raises(ValueError, match="there is no pruned arm"):
        arms(full)
    with pytest.raises(ValueError, match="of one pruned recipe, and there are 2"):
        arms(full, one, two, scores=["raw"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (dict(train_batch_size=8), "train_batch_size: 16 unpruned, 8 of infobatch"),
        (dict(lr_scheduler="cosine"), "lr_scheduler: 'constant' unpruned, 'cosine' of infobatch"),
        (dict(adam_beta2=0.9), "adam_beta2: 0.999 unpruned, 0.9 of infobatch"),
        (dict(snr_gamma=5.0), "snr_gamma: None unpruned, 5.0 of infobatch"),
        (dict(num_epochs=200), "num_epochs: 100 unpruned, 200 of infobatch"),
        (dict(mixed_precision="fp16"), "mixed_precision: 'no' unpruned, 'fp16' of infobatch"),
        (dict(prediction_type="v_prediction"), "prediction_type: 'epsilon' unpruned, 'v_prediction' of infobatch"),
        (dict(eval_data_dir="other"), "eval_data_dir: None unpruned, 'other' of infobatch"),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_an_arm_of_other_options_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: dict[str, Any], message: str
) -> None:
    full, pruned = recipe(tmp_path / "full.yaml"), recipe(tmp_path / "pruned.yaml", **option)
    with pytest.raises(SystemExit):
        compare_ldm.main([full, pruned, "--work_dir", str(tmp_path / "out")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    name, value = next(iter(option.items()))
    check_twins(full, arms(full, pruned), [f"--{name}", str(value)])  # which all runs then have


def test_pruning_and_output_may_differ(tmp_path: Path) -> None:
    free = dict(prune_ratio=0.3, delta=1.0, score="raw", save_images_epochs=3, checkpointing_steps=7, logger="none")
    full, pruned = recipe(tmp_path / "full.yaml"), recipe(tmp_path / "pruned.yaml", **free)
    check_twins(full, arms(full, pruned), [])
    averaged = recipe(tmp_path / "averaged.yaml", use_ema="true")
    with pytest.raises(ValueError, match="use_ema: False unpruned, True of infobatch"):
        check_twins(full, arms(full, averaged), [])


@pytest.mark.parametrize("measured", [True, False])
def test_without_held_out_images_it_is_said_that_there_are_no_verdicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], measured: bool
) -> None:
    def stop(*_: Any) -> None:
        raise SystemExit("to be trained")

    monkeypatch.setattr(compare_ldm, "train_arms", stop)
    more = dict(eval_data_dir="images") if measured else {}
    full, pruned = recipe(tmp_path / "full.yaml", **more), recipe(tmp_path / "pruned.yaml", **more)
    with pytest.raises(SystemExit, match="to be trained"):
        compare_ldm.main([full, pruned, "--work_dir", str(tmp_path / "out")])
    assert ("there will be no verdicts" in capsys.readouterr().err) is not measured


def test_a_control_prunes_as_long_as_its_arm(tmp_path: Path) -> None:
    full = recipe(tmp_path / "full.yaml", num_epochs=10)
    (pruned,) = arms(full, policies=["random:delta=1.0"]).values()
    summary = dict(visits=600, visits_full=1000, num_samples=100, passes_total=10, delta=1.0)
    flags = control_flags(Control("random", "random", "arm"), ["--config", full], pruned, summary)
    options = parse_options([*flags, "--output_dir=."])
    assert (options.policy, options.prune_ratio, options.delta) == ("random", 0.4, 1.0)
    control = Control("shortened", "shortened", "arm")
    flags = control_flags(control, ["--config", full], pruned, summary)
    assert parse_options([*flags, "--output_dir=."]).num_epochs == 6
    flags = control_flags(control, ["--config", full], pruned, {**summary, "visits": 610})
    assert parse_options([*flags, "--output_dir=."]).num_epochs == 7  # six would be 10 visits too few
