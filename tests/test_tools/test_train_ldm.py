"""Latent diffusion by tools/train_ldm.py: options, parity, many processes, kills, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("torchvision")

import torch.nn.functional as F
import yaml
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from diffusers import DDPMScheduler, LDMPipeline, UNet2DModel, VQModel
from diffusers.optimization import get_scheduler
from launching import accelerate_launch, forget_accelerators
from safetensors.torch import load_file

from infobatch_mm.cli import train_ldm
from infobatch_mm.core import read_scores
from infobatch_mm.diffusion import AcceleratedInfoBatch, training
from infobatch_mm.diffusion.checkpoints import checkpoints, find_checkpoint
from infobatch_mm.diffusion.denoising import Denoising, draw, log_snr, predictor
from infobatch_mm.diffusion.encoding import encoded
from infobatch_mm.diffusion.first_stage import load_first_stage, moments
from infobatch_mm.diffusion.images import ImageFolder
from infobatch_mm.diffusion.options import parse_options

ROOT = Path(__file__).parents[2]
IMAGES = 22
UNET = dict(
    sample_size=4,
    in_channels=3,
    out_channels=3,
    layers_per_block=1,
    block_out_channels=[8, 16],
    down_block_types=["DownBlock2D", "AttnDownBlock2D"],
    up_block_types=["AttnUpBlock2D", "UpBlock2D"],
    norm_num_groups=4,
    attention_head_dim=8,
)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """No accelerate state of the test before."""
    yield
    forget_accelerators()


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``images/``, 8 x 8 drawn pictures; ``vae/``, a first stage of 4 x 4 latents; ``recipe.yaml``."""
    from infobatch_mm.demo.shapes import draw_dataset

    root = tmp_path_factory.mktemp("ldm")
    draw_dataset(root / "images", num_train=IMAGES, num_val=0, size=8)
    torch.manual_seed(0)
    VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        num_vq_embeddings=16,
        scaling_factor=0.5,
    ).save_pretrained(root / "vae")
    recipe = dict(
        train_data_dir=str(root / "images"),
        vae=str(root / "vae"),
        unet_config=UNET,
        resolution=8,
        train_batch_size=4,
        num_epochs=5,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=3,
        checkpointing_steps=1000,
        save_images_epochs=0,
        eval_batch_size=2,
        ddpm_num_inference_steps=2,
        use_ema=True,
        logger="none",
        cpu=True,
    )
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


def flags(material: Path, output_dir: Path, **options: Any) -> list[str]:
    result = ["--config", str(material / "recipe.yaml"), "--output_dir", str(output_dir)]
    for name, value in options.items():
        result.append(f"--{name}={value}" if not isinstance(value, bool) else f"--{name}" if value else f"--no-{name}")
    return result


def recorded(monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> list[dict[str, Any]]:
    """Train in this process; what each batch was and what it gave."""
    steps: list[dict[str, Any]] = []

    class Recording(AcceleratedInfoBatch):
        def weigh(self, losses: torch.Tensor, scores: torch.Tensor | None = None, **more: Any) -> torch.Tensor:
            weights = self._in_hand.weights
            entry = dict(pass_index=self.passes_done, index=self.index.tolist())
            weighted = super().weigh(losses, scores, **more)
            entry |= dict(weights=None if weights is None else weights.tolist(), loss=self.loss.item())
            steps.append({**entry, "weighted": weighted.item()})
            return weighted

    with monkeypatch.context() as patched:
        patched.setattr(training, "AcceleratedInfoBatch", Recording)
        train_ldm.main(argv)
    return steps


def unet_weights(output_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(output_dir / "unet" / "diffusion_pytorch_model.safetensors")


def summary_of(output_dir: Path) -> dict[str, Any]:
    found = json.loads((output_dir / "infobatch_summary.json").read_text())
    found.pop("wall_time_s")
    return found


# ---- a run -----------------------------------------------------------------------------------------------------


def test_a_pruned_run_leaves_a_pipeline_samples_and_its_books(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    options = dict(save_images_epochs=2, checkpointing_steps=4, checkpoints_total_limit=2, logger="tensorboard")
    pytest.importorskip("tensorboard")
    train_ldm.main(flags(material, out, eval_data_dir=material / "images", **options))
    summary = summary_of(out)
    assert summary["passes_done"] == 5
    assert summary["visits"] < summary["visits_full"] == 5 * IMAGES
    assert summary["iterations"] == sum(math.ceil(entry["kept"] / 4) for entry in summary["per_pass"])
    assert sorted(path.name for path in (out / "samples").iterdir()) == ["0002.png", "0004.png", "0005.png"]
    assert [path.name for path in checkpoints(out)] == [f"checkpoint-{n}" for n in (16, 20)]
    assert not list(out.glob("*.partial"))
    assert math.isfinite(json.loads((out / "metrics.json").read_text())["held_out_loss"])
    assert list(out.rglob("events.out.tfevents.*"))
    assert f"saved {summary['saved_ratio']:.1%}" in capsys.readouterr().out
    pipeline = LDMPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(2, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 8, 8, 3)
    assert not pipeline.scheduler.config.clip_sample  # latents are no pixels


@pytest.mark.parametrize("cached", [True, False])
def test_scores_and_plans_are_those_of_the_images(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    steps = recorded(monkeypatch, flags(material, tmp_path, cache_latents=cached))
    by_pass: dict[int, list[int]] = {}
    for step in steps:
        by_pass.setdefault(step["pass_index"], []).extend(step["index"])
    assert sorted(by_pass[0]) == list(range(IMAGES))  # nothing has a score yet
    assert all(len(set(seen)) == len(seen) for seen in by_pass.values())
    assert len(by_pass[1]) < IMAGES
    assert any(weight > 1 for step in steps for weight in step["weights"])


def test_cached_latents_are_trained_on_as_encoded_ones(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = recorded(monkeypatch, flags(material, tmp_path / "direct"))
    cached = recorded(monkeypatch, flags(material, tmp_path / "cached", cache_latents=True))
    assert [step["index"] for step in cached] == [step["index"] for step in direct]
    assert [step["loss"] for step in cached] == pytest.approx([step["loss"] for step in direct], rel=1e-5)


def test_weights_of_one_give_the_losses_of_a_loop_without_us(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = recorded(monkeypatch, flags(material, tmp_path, policy="none"))
    # the same training by hand: accelerate's order, the batch mean
    forget_accelerators()
    config = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0)
    accelerator = Accelerator(cpu=True, dataloader_config=config)
    args = parse_options(flags(material, tmp_path / "unused"))
    vae = load_first_stage(args.vae)
    images = ImageFolder(args.train_data_dir, 8)
    latents = torch.stack([moments(vae, images.fixed(i)[None])[0][0] for i in range(IMAGES)])
    loader = torch.utils.data.DataLoader(range(IMAGES), 4, shuffle=True)
    set_seed(0)
    unet = UNet2DModel.from_config(UNET)
    optimizer = torch.optim.AdamW(unet.parameters(), 1e-3)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=3, num_training_steps=5 * 6)
    unet, optimizer, loader, schedule = accelerator.prepare(unet, optimizer, loader, schedule)
    noise_scheduler = DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195, clip_sample=False
    )
    expected, order = [], []
    for epoch in range(5):
        for index in loader:
            drawn = draw(index.tolist(), (3, 4, 4), 1000, 0, epoch)
            noisy = noise_scheduler.add_noise(latents[index], drawn.noise, drawn.timesteps)
            loss = F.mse_loss(unet(noisy, drawn.timesteps).sample, drawn.noise)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            expected.append(loss.item())
            order.append(index.tolist())
    assert [step["index"] for step in steps] == order
    for key in ("loss", "weighted"):
        assert [step[key] for step in steps] == pytest.approx(expected, rel=1e-6)


def test_min_snr_weights_the_loss_and_not_the_score(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    first, scores = {}, {}
    for name, options in (("plain", {}), ("clipped", {"snr_gamma": 0.5})):
        out = tmp_path / name
        first[name] = recorded(monkeypatch, flags(material, out, num_epochs=1, learning_rate=0, **options))
        scores[name] = read_scores(out)["score"]
    assert sum(step["loss"] for step in first["clipped"]) < sum(step["loss"] for step in first["plain"])
    assert scores["clipped"] == pytest.approx(scores["plain"], rel=1e-6)


@pytest.mark.parametrize("score", ["raw", "ema", "timestep"])
def test_scores_are_what_they_say_of_the_losses_of_all_visits(material: Path, tmp_path: Path, score: str) -> None:
    import numpy as np
    from test_core.test_noise_levels import twin

    passes, options = 3, {"policy": "none", "learning_rate": 0, "score": score, "snr_gamma": 5}
    train_ldm.main(flags(material, tmp_path, num_epochs=passes, **options))
    pipeline = LDMPipeline.from_pretrained(tmp_path)
    images = ImageFolder(material / "images", 8)
    latents = encoded(pipeline.vqvae, images, range(IMAGES))
    visits = []
    for number in range(passes):
        drawn = draw(range(IMAGES), latents.shape[1:], 1000, 0, number)
        model = predictor(pipeline.unet)
        with torch.no_grad():
            _, losses = Denoising(pipeline.scheduler).losses(model, latents, drawn.noise, drawn.timesteps)
        levels = log_snr(pipeline.scheduler, drawn.timesteps)
        visits.append(list(zip(range(IMAGES), losses.tolist(), levels.tolist(), strict=True)))
    if score == "timestep":
        expected = twin(visits, 0.9)
    else:
        decays = {"raw": [0, 0, 1], "ema": [0.81, 0.9, 1]}[score]
        columns = [[loss for _, loss, _ in each] for each in visits]
        expected = dict(enumerate(np.average(columns, axis=0, weights=decays)))
    scores = read_scores(tmp_path)["score"]
    assert scores.tolist() == pytest.approx([expected[i] for i in range(IMAGES)], rel=1e-4)
    assert summary_of(tmp_path)["score"] == score


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_training_in_steps_ends_with_its_schedule(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    """22 images are 6 batches: 27 of them are 4.5 epochs, whatever --num_epochs says."""
    out, steps = tmp_path / "out", 27 // accumulate + (accumulate > 1) * 2  # 15 updates of 3 to an epoch
    options = dict(max_train_steps=steps, num_epochs=100, gradient_accumulation_steps=accumulate, save_images_epochs=4)
    rates: list[float] = []
    with monkeypatch.context() as patched:
        patched.setattr(
            Accelerator, "log", lambda self, values, step: rates.append(values.get("lr", rates and rates[-1]))
        )
        done = recorded(monkeypatch, flags(material, out, checkpointing_steps=7, **options))
    summary = summary_of(out)
    assert summary["passes_done"] == 5 and summary["passes_total"] == (4.5 if accumulate == 1 else 5)
    assert summary["iterations_full"] == (27 if accumulate == 1 else 30)
    assert summary["saved_ratio"] > 0 and [rate for rate in rates if rate is not None][-1] == 0
    assert len(done) == summary["iterations"] < summary["iterations_full"]
    assert sorted(path.name for path in (out / "samples").iterdir()) == ["0004.png", "0005.png"]
    for checkpoint in checkpoints(out)[1:]:
        shutil.rmtree(checkpoint)
    options["resume_from_checkpoint"] = "latest"
    more = {**options, "max_train_steps": steps + 1}
    assert re.search(rf"of a training of {steps} .*this one has {steps + 1}", refusal(flags(material, out, **more)))
    forget_accelerators()
    rest = recorded(monkeypatch, flags(material, out, **options))
    assert rest == done[len(done) - len(rest) :] and 0 < len(rest) < len(done)


def test_batches_of_another_size_take_other_steps_for_the_same_training(material: Path, tmp_path: Path) -> None:
    train_ldm.main(flags(material, tmp_path, max_train_steps=27, checkpointing_steps=7))
    for checkpoint in checkpoints(tmp_path)[1:]:
        shutil.rmtree(checkpoint)
    options = dict(resume_from_checkpoint="latest", train_batch_size=2)
    message = refusal(flags(material, tmp_path, max_train_steps=27, **options))
    assert "of a training of 27 steps, 6 to an epoch, this one has 27, 11 to an epoch" in message
    assert "use max_train_steps=50" in message
    forget_accelerators()
    train_ldm.main(flags(material, tmp_path, max_train_steps=50, **options))
    assert summary_of(tmp_path)["passes_done"] == 5


# ---- kills and processes ---------------------------------------------------------------------------------------


def start(argv: list[str], **environment: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "tools" / "train_ldm.py"), *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["infobatch", "none"])
def test_a_killed_run_goes_on_to_the_same_weights(material: Path, tmp_path: Path, policy: str) -> None:
    options = dict(policy=policy, checkpointing_steps=3, num_epochs=40, cache_latents=True, random_flip=True)
    options |= dict(center_crop=True, latents_dir=tmp_path / "latents")
    whole = start(flags(material, tmp_path / "whole", **options))
    assert whole.wait() == 0, whole.stdout and whole.stdout.read()
    killed = start(flags(material, tmp_path / "killed", **options))
    reached = tmp_path / "killed" / "checkpoint-21"
    while not reached.is_dir():
        assert killed.poll() is None, killed.stdout and killed.stdout.read()
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    again = start(flags(material, tmp_path / "killed", resume_from_checkpoint="latest", **options))
    assert again.wait() == 0, again.stdout and again.stdout.read()
    assert summary_of(tmp_path / "killed") == summary_of(tmp_path / "whole")
    before, after = unet_weights(tmp_path / "whole"), unet_weights(tmp_path / "killed")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("at", [1, 5, 6, 7, 10])
def test_every_position_is_one_to_resume_from(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """The first batch of a pass, its last one, the first of a pruned one: the rest is the same to the bit."""
    whole = recorded(monkeypatch, flags(material, tmp_path, checkpointing_steps=at))
    weights = unet_weights(tmp_path)
    for checkpoint in checkpoints(tmp_path)[1:]:
        shutil.rmtree(checkpoint)
    forget_accelerators()
    rest = recorded(monkeypatch, flags(material, tmp_path, checkpointing_steps=1000, resume_from_checkpoint="latest"))
    assert rest == whole[at:]
    assert all(torch.equal(value, weights[name]) for name, value in unet_weights(tmp_path).items())


def test_with_larger_batches_a_resumed_run_keeps_its_own_checkpoints(material: Path, tmp_path: Path) -> None:
    options = dict(checkpoints_total_limit=1, num_epochs=5)
    train_ldm.main(flags(material, tmp_path, checkpointing_steps=9, **options))
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-18"]
    options |= dict(train_batch_size=8, resume_from_checkpoint="latest")
    train_ldm.main(flags(material, tmp_path, checkpointing_steps=1, **options))
    (left,) = checkpoints(tmp_path)
    assert int(left.name.split("-")[1]) > 18


def test_what_an_earlier_checkpoint_is_resumed_into_sets_later_ones_aside(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = recorded(monkeypatch, flags(material, tmp_path, checkpointing_steps=6))
    assert len(checkpoints(tmp_path)) == 3
    options = dict(checkpointing_steps=7, checkpoints_total_limit=2, resume_from_checkpoint="checkpoint-6")
    rest = recorded(monkeypatch, flags(material, tmp_path, **options))
    assert rest == whole[6:]
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-14", "checkpoint-21"]
    superseded = sorted(path.name for path in tmp_path.glob("*.superseded"))
    assert superseded == ["checkpoint-12.superseded", "checkpoint-18.superseded"]


def test_the_factor_of_the_latents_can_be_set_and_is_kept(material: Path, tmp_path: Path) -> None:
    train_ldm.main(flags(material, tmp_path, vae_scaling_factor=2.0, num_epochs=1))
    assert LDMPipeline.from_pretrained(tmp_path).vqvae.config.scaling_factor == 2.0


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    "options", [{}, pytest.param({"gradient_accumulation_steps": 2, "policy": "none"}, marks=pytest.mark.slow)]
)
def test_two_processes_train_as_one_with_the_same_global_batch(
    material: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    # 24 images: no tail, which accelerate fills up on two processes
    images = tmp_path / "images"
    shutil.copytree(material / "images", images)
    for i, path in enumerate(sorted(images.rglob("*.png"))[:2]):
        shutil.copy(path, images / f"more-{i}.png")
    options = {
        "adam_epsilon": 1e-3,  # with the usual one, Adam makes a full step of a gradient that is mere rounding
        "train_data_dir": images,
        "eval_data_dir": images,
        "random_flip": True,
        "cache_latents": True,
        "center_crop": True,
        **options,
    }
    one = start(flags(material, tmp_path / "one", train_batch_size=4, **options))
    two = subprocess.run(
        [
            sys.executable,
            *accelerate_launch(),
            str(ROOT / "tools/train_ldm.py"),
            *flags(material, tmp_path / "two", train_batch_size=2, **options),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert two.returncode == 0, two.stderr[-3000:]
    assert one.wait() == 0, one.stdout and one.stdout.read()
    left, right = summary_of(tmp_path / "one"), summary_of(tmp_path / "two")
    for ours, theirs in zip(left.pop("per_pass"), right.pop("per_pass"), strict=True):
        unknown = {name for name, value in ours.items() if value is None}  # to which approx() is no help
        assert unknown == {name for name, value in theirs.items() if value is None}
        assert {name: ours[name] for name in ours.keys() - unknown} == pytest.approx(
            {name: theirs[name] for name in theirs.keys() - unknown}, rel=1e-5
        )
    assert left == right
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text())["held_out_loss"] for name in ("one", "two")]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5)
    before, after = unet_weights(tmp_path / "one"), unet_weights(tmp_path / "two")
    assert max(float((before[name] - after[name]).abs().max()) for name in before) <= 1e-5


# ---- options and recipes ---------------------------------------------------------------------------------------


def test_a_recipe_is_built_on_another_and_the_command_line_wins(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "resolution: 64\nuse_ema: true\nlearning_rate: 1e-5\nunet_config: {a: [1, 2]}\n"
    )
    (tmp_path / "top.yaml").write_text("_base_: base.yaml\nresolution: 32\npolicy: none\n")
    common = ["--config", str(tmp_path / "top.yaml"), "--train_data_dir=x", "--vae=x", "--output_dir=x"]
    args = parse_options(common)
    assert (args.resolution, args.use_ema, args.learning_rate, args.policy) == (32, True, 1e-5, "none")
    assert args.unet_config == {"a": [1, 2]}
    args = parse_options([*common, "--no-use_ema", "--resolution", "16"])
    assert (args.resolution, args.use_ema, args.policy) == (16, False, "none")


@pytest.mark.parametrize(
    ("recipe", "more", "message"),
    [
        ("resolutoin: 64", [], "sets what is no option: --resolutoin=64"),
        ("resolution: many", [], "invalid int value: 'many'"),
        ("[1, 2]", [], "must be a mapping of options"),
        ("_base_: none.yaml", [], "cannot read the recipe"),
        ("resolution: 0", [], "--resolution 0: it must be at least 1"),
        ("unet_config: nowhere.json", [], "nowhere.json"),
        ("policy: none", ["--dataset_name=y"], "either --train_data_dir or --dataset_name"),
        ("prediction_type: flow", [], "invalid choice: 'flow'"),
        ("ddpm_num_steps: 50", [], "--ddpm_num_inference_steps 100: sampling takes fewer steps than the 50"),
        ("lr_scheduler: piecewise_constant", [], "invalid choice: 'piecewise_constant'"),
        ("ddpm_beta_schedule: cosine", [], "invalid choice: 'cosine'"),
        ("vae_scaling_factor: 0", [], "--vae_scaling_factor 0.0: it must be positive"),
    ],
)
def test_a_wrong_option_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture, recipe: str, more: list[str], message: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe + "\n")
    common = ["--config", str(path), "--train_data_dir=x", "--vae=x", "--output_dir=x"]
    with pytest.raises(SystemExit):
        parse_options([*common, *([] if "unet" in recipe else ["--unet_config={}"]), *more])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["vae", "unet_config", "output_dir"])
def test_what_is_needed_is_asked_for(capsys: pytest.CaptureFixture, missing: str) -> None:
    given = {"vae": "x", "unet_config": "{}", "output_dir": "x", "train_data_dir": "x"}
    with pytest.raises(SystemExit):
        parse_options([f"--{name}={value}" for name, value in given.items() if name != missing])
    assert f"--{missing} is needed" in capsys.readouterr().err


# ---- what is refused -------------------------------------------------------------------------------------------


def refusal(argv: list[str]) -> str:
    forget_accelerators()
    with pytest.raises(ValueError) as caught:
        training.train(parse_options(argv))
    return str(caught.value)


def test_settings_out_of_range_are_refused_first(material: Path, tmp_path: Path) -> None:
    assert "prune_ratio=1.5 is outside [0, 1)" in refusal(flags(material, tmp_path, prune_ratio=1.5))
    assert "unknown policy 'best'" in refusal(flags(material, tmp_path, policy="best"))
    assert "snr_gamma=-1.0 is not positive" in refusal(flags(material, tmp_path, snr_gamma=-1))
    assert "score_ema=1.0 is outside [0, 1)" in refusal(flags(material, tmp_path, score_ema=1))
    assert "contradict" in refusal(flags(material, tmp_path, score="raw", score_ema=0.5))
    assert "quantile=0.0 is outside (0, 1]" in refusal(flags(material, tmp_path, prune_quantile=0))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("program", ["tools/train_ldm.py", "infobatch-mm train-ldm"])
def test_a_refusal_begins_with_the_name_of_the_program(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    monkeypatch.setattr(sys, "argv", [program])
    with pytest.raises(SystemExit, match=rf"^{Path(program).name}: prune_ratio=1.5 is outside"):
        train_ldm.main(flags(material, tmp_path, prune_ratio=1.5))


def test_what_makes_no_training_is_refused_before_the_images_are_encoded(material: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    big = flags(material, out, cache_latents=True, train_batch_size=IMAGES + 1)
    assert f"holds {IMAGES + 1} images but there are only {IMAGES}" in refusal(big)
    unet = tmp_path / "unet.json"
    unet.write_text(json.dumps({**UNET, "layer_per_block": 2}))
    assert "no setting 'layer_per_block'" in refusal(flags(material, out, unet_config=unet))
    assert not list(out.iterdir())
    (tmp_path / "file").write_text("")
    assert "cannot write to --output_dir" in refusal(flags(material, tmp_path / "file"))


def test_a_first_stage_that_does_not_fit_is_refused(material: Path, tmp_path: Path) -> None:
    for name, value in (("in_channels", 4), ("sample_size", 8)):
        unet = tmp_path / "unet.json"
        unet.write_text(json.dumps({**UNET, name: value}))
        message = refusal(flags(material, tmp_path / "out", unet_config=unet))
        assert str(value) in message and str(UNET[name]) in message


def test_images_that_cannot_be_trained_on_are_refused(material: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no images" in refusal(flags(material, tmp_path / "out", train_data_dir=tmp_path / "empty"))
    broken = tmp_path / "broken"
    shutil.copytree(material / "images", broken)
    (broken / "bad.png").write_bytes(b"no picture")
    assert "bad.png" in refusal(flags(material, tmp_path / "out", train_data_dir=broken))


def test_another_runs_checkpoints_are_left_alone(material: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train_ldm.main(flags(material, out, checkpointing_steps=5, num_epochs=1))
    assert "holds checkpoints of another run, the last one checkpoint-5" in refusal(flags(material, out))
    resume = dict(resume_from_checkpoint="latest", num_epochs=1)
    message = refusal(flags(material, out, **{**resume, "prediction_type": "v_prediction"}))
    assert "prediction_type: 'epsilon' there, 'v_prediction' here" in message
    assert "num_epochs: 1 there, 2 here" in refusal(flags(material, out, **{**resume, "num_epochs": 2}))
    assert "prune_ratio: 0.5 there, 0.3 here" in refusal(flags(material, out, **resume, prune_ratio=0.3))
    assert "there is no checkpoint checkpoint-7" in refusal(flags(material, out, resume_from_checkpoint="checkpoint-7"))
    torch.manual_seed(1)
    other = VQModel.from_config(VQModel.load_config(material / "vae"))
    other.save_pretrained(tmp_path / "other")
    assert "first_stage" in refusal(flags(material, out, **resume, vae=tmp_path / "other"))
    images = tmp_path / "images"
    shutil.copytree(material / "images", images)
    first, second = sorted(images.rglob("*.png"))[:2]
    shutil.copy(first, second)
    assert "fingerprint" in refusal(flags(material, out, **resume, train_data_dir=images))


def test_a_checkpoint_that_was_cut_short_is_none(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-12.partial", "checkpoint-x"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-10"
    assert find_checkpoint(tmp_path / "new", "latest") is None
    assert "holds no checkpoint: a new training begins" in capsys.readouterr().out


def test_a_finished_training_is_left_alone(material: Path, tmp_path: Path) -> None:
    train_ldm.main(flags(material, tmp_path, num_epochs=1))
    assert "holds a finished training" in refusal(flags(material, tmp_path))


def test_controls_of_a_training_in_steps_are_as_long() -> None:
    pytest.importorskip("rich")
    from infobatch_mm.cli import compare_ldm
    from infobatch_mm.cli.comparison.controls import random_ratio

    summary = dict(num_samples=22, passes_total=4.5, visits=70, visits_full=99, prune_ratio=0.5, delta=0.875)
    args = compare_ldm.parse_options(
        ["--train_data_dir=x", "--vae=x", "--output_dir=x", "--unet_config={}", "--max_train_steps=27"]
    )
    assert compare_ldm.shortened(args, summary) == ["--max_train_steps", "19"]
    args.max_train_steps = None
    assert compare_ldm.shortened(args, summary) == ["--num_epochs", "4"]
    schedule = compare_ldm.passes_of(summary)
    assert schedule.num_passes == 5 and schedule.full_visits(4) == 11
    assert random_ratio(schedule, summary) == pytest.approx(29 / 88)  # the last pass starts after delta
    assert compare_ldm.passes_of({**summary, "passes_total": 5}).full_visits(4) == 22


# ---- the comparison ----------------------------------------------------------------------------------------------


def after_the_name(command: list[str]) -> list[str]:
    """The options in a command that starts a training."""
    return command[command.index("train-ldm") + 1 :]


def test_the_comparison_trains_twins_and_controls(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("rich")
    from infobatch_mm.cli import compare_ldm

    calls: list[list[str]] = []

    def in_this_process(command: list[str], check: bool) -> None:
        forget_accelerators()
        calls.append(after_the_name(command))
        train_ldm.main(calls[-1])

    monkeypatch.setattr(compare_ldm.subprocess, "run", in_this_process)
    full = tmp_path / "full.yaml"
    full.write_text(f"_base_: {material / 'recipe.yaml'}\npolicy: none\nsave_images_epochs: 5\n")
    pruned = tmp_path / "pruned.yaml"
    pruned.write_text(f"_base_: {full}\npolicy: infobatch\nprune_ratio: 0.5\n")
    work_dir = tmp_path / "work"
    argv = [str(full), str(pruned), "--work_dir", str(work_dir), "--seeds", "0", "1", "--shortened", "--random"]
    argv += ["--", "--cache_latents", f"--eval_data_dir={material / 'images'}"]
    compare_ldm.main(argv)
    result = json.loads((work_dir / "comparison.json").read_text())
    rows = result["by_seed"]["0"]
    assert list(rows) == ["baseline", "infobatch", "shortened", "random"]
    assert rows["baseline"]["visits"] == 5 * IMAGES > rows["infobatch"]["visits"]
    assert rows["shortened"]["visits"] % IMAGES == 0
    # Rounded up, so that the control is no easier to beat.
    assert 0 <= rows["shortened"]["visits"] - rows["infobatch"]["visits"] <= IMAGES
    assert abs(rows["random"]["visits"] - rows["infobatch"]["visits"]) <= 4 * 5  # batches are full
    assert (work_dir / "samples.png").is_file()
    assert "held_out_loss" in capsys.readouterr().out
    trained = len(calls)
    compare_ldm.main(argv)  # done runs are not trained again
    assert len(calls) == trained == 8
    with pytest.raises(SystemExit, match=r"trained with other options \(learning_rate: 0.001 there, 1.0 here"):
        compare_ldm.main([*argv, "--learning_rate", "1.0"])


def test_a_comparison_without_samples_has_its_numbers(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    from infobatch_mm.cli import compare_ldm

    monkeypatch.setattr(compare_ldm.subprocess, "run", lambda command, check: train_ldm.main(after_the_name(command)))
    argv = [str(material / "recipe.yaml")] * 2 + ["--work_dir", str(tmp_path)]
    compare_ldm.main([*argv, "--", "--num_epochs", "2"])
    assert "infobatch" in json.loads((tmp_path / "comparison.json").read_text())["0"]
    assert not (tmp_path / "samples.png").exists()


def test_scores_are_compared_at_equal_saving(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    from infobatch_mm.cli import compare_ldm

    def in_this_process(command: list[str], check: bool) -> None:
        forget_accelerators()
        train_ldm.main(after_the_name(command))

    monkeypatch.setattr(compare_ldm.subprocess, "run", in_this_process)
    argv = [str(material / "recipe.yaml")] * 2 + [
        "--work_dir",
        str(tmp_path),
        "--random",
        "--scores",
        "raw",
        "timestep",
    ]
    compare_ldm.main([*argv, "--", "--prune_quantile", "0.75"])
    rows = json.loads((tmp_path / "comparison.json").read_text())["0"]
    assert list(rows) == ["baseline", "raw", "timestep", "random"]
    assert rows["raw"]["visits"] == rows["timestep"]["visits"] < 5 * IMAGES
    assert abs(rows["random"]["visits"] - rows["raw"]["visits"]) <= 4 * 5
    for score in ("raw", "timestep"):
        found = summary_of(tmp_path / "seed-0" / score)
        assert (found["score"], found["quantile"]) == (score, 0.75)
