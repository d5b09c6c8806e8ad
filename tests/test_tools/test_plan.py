"""The forecast of a training, from its command line, on small models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

for needed in ("mmseg", "mmpretrain", "scipy", "rich"):
    pytest.importorskip(needed)

from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from test_engine import toy, toy_classifier
from torch import nn

from infobatch_mm.cli import plan
from infobatch_mm.core import ScoreStore
from infobatch_mm.core.recalibration import batch_norms
from infobatch_mm.core.score_file import write_scores
from infobatch_mm.forecast.mmengine import ConfigSubject, own_policy


def kept(cfg: Config, folder: Path) -> tuple[str, str]:
    """A config's file, and a checkpoint of its model with random weights."""
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    checkpoint = folder / "weights.pth"
    torch.save({"state_dict": MODELS.build(cfg.model).state_dict()}, checkpoint)
    cfg.dump(folder / "config.py")
    return str(folder / "config.py"), str(checkpoint)


@pytest.fixture
def classifier(tmp_path: Path) -> tuple[str, str]:
    return kept(toy_classifier.config(tmp_path / "work"), tmp_path)


@pytest.fixture
def segmentor(scenes: Path, tmp_path: Path) -> tuple[Config, str, str]:
    cfg = toy.config(scenes, tmp_path / "work")
    return cfg, *kept(cfg, tmp_path)


def refused(*arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        plan.main(arguments)
    return str(end.value.code)


def test_a_segmentor(segmentor: tuple[Config, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, config, checkpoint = segmentor
    found = tmp_path / "found.json"
    plan.main([config, "--checkpoint", checkpoint, "--samples", "9", "--savings", "0.4", "--json", str(found)])
    text = capsys.readouterr().out
    assert "9 of 22 samples" in text and "layers of batch normalisation are in evaluation mode" in text
    told = json.loads(found.read_text())
    assert told["batch_size"] == 4 and told["advice"] in " ".join(text.split())
    assert {row["way"] for row in told["rows"]} == {"norm", "gradient", "loss", "calibrated", "nothing"}
    assert told["settings"]["samples"] == 9
    assert not (tmp_path / "work").exists()  # nothing of a run was begun


def test_what_a_visit_tells_is_what_autograd_says(segmentor: tuple[Config, str, str]) -> None:
    cfg, _, checkpoint = segmentor
    subject = ConfigSubject(cfg, checkpoint)
    model: Any = subject.model
    assert model.training and not batch_norms(model) and subject.num_samples == 22
    statistics = {name: each.clone() for name, each in model.named_buffers()}
    for index in (0, 21):
        model.zero_grad()
        seen = subject.look(index, (0, index, 1))
        layer = torch.cat([each.grad.flatten() for each in model.decode_head.conv_seg.parameters()])
        assert seen.last_layer == pytest.approx(float(layer.norm()), rel=1e-3)
        assert seen == subject.look(index, (0, index, 1))  # all chance follows from the key
        assert seen != subject.look(index, (0, index, 2))
    assert all(torch.equal(each, statistics[name]) for name, each in model.named_buffers())


def test_a_classifier_with_the_scores_of_a_run(
    classifier: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, checkpoint = classifier
    store = ScoreStore(70)
    store.record(torch.arange(70), torch.rand(70))
    store.merge()
    write_scores(str(tmp_path), store)
    common = [config, "--checkpoint", checkpoint, "--samples", "12", "--num-processes", "3"]
    plan.main([*common, "--scores", str(tmp_path), "--json", str(tmp_path / "found.json")])
    told = json.loads((tmp_path / "found.json").read_text())
    assert told["batch_size"] == 24 and told["whole"]["num_scored"] == 70
    assert {row["way"] for row in told["whole"]["rows"]} == {"score", "calibrated", "nothing"}
    assert "all samples, by the scores of the run" in capsys.readouterr().out
    store = ScoreStore(71)
    write_scores(str(tmp_path), store)
    message = refused(*common, "--scores", str(tmp_path))
    assert "are of 71 samples, the training data of the config has 70" in message


def test_the_configs_own_policy_and_accumulated_steps(tmp_path: Path) -> None:
    hook = dict(type="infobatch_mm.engine.InfoBatchHook", policy=dict(type="variance", prune_ratio=0.7))
    cfg = toy_classifier.config(tmp_path, custom_hooks=[hook], **{"optim_wrapper.accumulative_counts": 2})
    policy = own_policy(cfg)
    assert policy is not None and policy.settings()["prune_ratio"] == 0.7
    assert own_policy(toy_classifier.config(tmp_path, custom_hooks=[])) is None
    _, checkpoint = kept(cfg, tmp_path)
    assert ConfigSubject(cfg, checkpoint).batch_size == 16


def test_mixing_is_said_to_be_missing(tmp_path: Path) -> None:
    cfg = toy_classifier.config(tmp_path, **{"model.train_cfg": toy_classifier.MIXING})
    _, checkpoint = kept(cfg, tmp_path)
    assert any("unmixed" in line for line in ConfigSubject(cfg, checkpoint).remarks)


def test_bad_input_is_refused_with_what_to_do(classifier: tuple[str, str], tmp_path: Path) -> None:
    config, checkpoint = classifier
    assert "there is no such file" in refused(config, "--checkpoint", str(tmp_path / "none.pth"))
    assert "--samples 1" in refused(config, "--checkpoint", checkpoint, "--samples", "1")
    assert "--samples 5: gradients of 8" in refused(config, "--checkpoint", checkpoint, "--samples", "5")
    assert "--savings 0.99" in refused(config, "--checkpoint", checkpoint, "--savings", "0.99")
    assert "give --cfg-options in place of --cpu" in refused(config, "--checkpoint", checkpoint, "--", "--cpu")
    recipe = tmp_path / "recipe.yaml"
    assert "give the flags of train-ldm after --" in refused(str(recipe), "--checkpoint", checkpoint)
    assert refused(config) == "2"  # argparse: --checkpoint is required
    torch.save({"state_dict": nn.Linear(2, 2).state_dict()}, tmp_path / "other.pth")
    assert "lacks" in refused(config, "--checkpoint", str(tmp_path / "other.pth"))
    other = toy_classifier.config(tmp_path, classes=5)
    folder = tmp_path / "five"
    folder.mkdir()
    message = refused(config, "--checkpoint", kept(other, folder)[1])
    assert "is of another model" in message and "head.fc" in message


@pytest.fixture
def recipe(tmp_path: Path) -> tuple[list[str], list[str]]:
    """A recipe and its checkpoint, and what stands after ``--``."""
    diffusers, image = pytest.importorskip("diffusers"), pytest.importorskip("PIL.Image")
    yaml = pytest.importorskip("yaml")
    blocks: dict[str, Any] = dict(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1)
    unet = dict(blocks, sample_size=4, in_channels=3, out_channels=3)
    unet |= dict(down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2)
    diffusers.UNet2DModel(**unet).save_pretrained(tmp_path / "unet")
    both = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    diffusers.VQModel(**blocks, **both, num_vq_embeddings=8).save_pretrained(tmp_path / "vae")
    (tmp_path / "images").mkdir()
    for number in range(10):
        image.new("RGB", (8, 8), (25 * number, 90, 200)).save(tmp_path / f"images/{number}.png")
    settings = dict(unet_config={**unet, "block_out_channels": [8, 8]}, resolution=8, train_batch_size=4)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**settings, "gradient_accumulation_steps": 3}))
    flags = ["--cpu", "--train_data_dir", str(tmp_path / "images"), "--vae", str(tmp_path / "vae")]
    return [str(tmp_path / "recipe.yaml"), "--checkpoint", str(tmp_path)], flags


def test_a_recipe_of_latent_diffusion(
    recipe: tuple[list[str], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    command, flags = recipe
    plan.main([*command, "--samples", "8", "--savings", "0.5", "--json", "found.json", "--", *flags])
    told = json.loads(Path("found.json").read_text())
    assert told["num_samples"] == 10 and told["batch_size"] == 12
    assert {row["way"] for row in told["rows"]} == {"norm", "gradient", "loss", "calibrated", "nothing"}
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "found.json"}
    assert "there are no weights of a UNet" in refused(*command[:2], str(tmp_path / "images"), "--", *flags)
    options = ["--cfg-options", "a=1"]
    assert "give options of" in refused(*command, *options, "--", *flags)


def test_a_unit_may_be_an_image_and_a_noise_level(recipe: tuple[list[str], list[str]], tmp_path: Path) -> None:
    from infobatch_mm.diffusion.options import parse_options
    from infobatch_mm.forecast.diffusion import RecipeSubject

    command, flags = recipe
    args = parse_options(["--config", command[0], "--output_dir", ".", *flags])
    whole, parts = RecipeSubject(args, command[2]), RecipeSubject(args, command[2], bands=4)
    assert (whole.num_samples, parts.num_samples) == (10, 40)
    seen: list[int] = []
    losses = parts._denoising.losses
    parts._denoising.losses = lambda *given: (seen.append(int(given[-1])), losses(*given))[1]  # type: ignore
    for unit in range(40):
        told = parts.look(unit, (0, unit, 0))
        # The layer's own gradient, which the backward pass has just left there.
        own = torch.cat([each.grad.flatten() for each in parts.model.conv_out.parameters()])  # type: ignore
        assert told.last_layer == pytest.approx(float(own.norm()), rel=1e-3)
        parts.model.zero_grad()
    assert [each // 250 for each in seen] == [0, 1, 2, 3] * 10
