"""The examples with a condition: text-to-image, its LoRA, and a class-conditional DiT by flow matching."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

for package in ("accelerate", "diffusers", "transformers", "peft", "datasets", "torchvision"):
    pytest.importorskip(package, reason=f"{package} is not installed")

import datasets
import numpy as np
from diffusers import (
    DDPMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from launching import accelerate_launch
from PIL import Image
from safetensors.torch import load_file
from torchvision import transforms
from torchvision.datasets import ImageFolder
from transformers import CLIPTokenizer

from infobatch_mm.core import read_scores
from infobatch_mm.demo.pipeline import build_pipeline, caption, caption_images, scale_latents

from .example_scripts import check_marks, launch, original, run, run_with_journal, source_of, steps_saved, told

TEXT, LORA, DIT = NAMES = ("train_text_to_image.py", "train_text_to_image_lora.py", "train_dit.py")
SAMPLES, EPOCHS = 22, 6
#: The first step at which a run may be killed.
KILL_FROM = 12
COMMON = [
    *("--train_batch_size", "2", "--num_train_epochs", str(EPOCHS), "--gradient_accumulation_steps", "2"),
    *("--lr_scheduler", "cosine", "--lr_warmup_steps", "3", "--learning_rate", "1e-3", "--checkpointing_steps", "4"),
    *("--resolution", "16"),
]
WEIGHTS = {
    TEXT: "unet/diffusion_pytorch_model.safetensors",
    LORA: "pytorch_lora_weights.safetensors",
    DIT: "transformer/diffusion_pytorch_model.safetensors",
}
TRANSFORMER = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "patch_size": 4}


@dataclass(frozen=True)
class Demo:
    """The folders that the examples are run with."""

    pipeline: Path
    images: Path
    config: Path

    def arguments(self, name: str, folder: Path) -> list[str]:
        where = ["--train_data_dir", str(self.images), "--output_dir", str(folder)]
        if name == DIT:
            return [*COMMON, *where, "--use_ema", "--model_config_name_or_path", str(self.config)]
        more = ["--use_ema", "--snr_gamma", "5"] if name == TEXT else []
        return [*COMMON, *where, *more, "--random_flip", "--pretrained_model_name_or_path", str(self.pipeline)]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what the datasets library writes beside the images, in these processes and in those that are started."""
    folder = str(tmp_path_factory.mktemp("cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", folder)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(folder))
        yield


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    root = tmp_path_factory.mktemp("demo")
    images = caption_images(root / "images", num_train=SAMPLES, size=20)
    pipeline = build_pipeline(width=8)
    scale_latents(pipeline.vae, images)
    pipeline.save_pretrained(root / "pipeline")
    (root / "config.json").write_text(json.dumps({"_class_name": "DiTTransformer2DModel", **TRANSFORMER}))
    return Demo(root / "pipeline", images, root / "config.json")


@pytest.fixture(scope="module")
def pruned(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What a whole pruned run of each example leaves, on one process."""
    folders = {name: tmp_path_factory.mktemp("pruned") for name in NAMES}
    for name, folder in folders.items():
        run_with_journal(name, folder, 0, demo.arguments(name, folder))
    return folders


def weights(name: str, folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS[name])


# ---- the scripts and the scripts without us ---------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_ten_lines_are_ours(name: str):
    check_marks(source_of(name), fewer_than=11)


@pytest.mark.parametrize("name", [TEXT, DIT, pytest.param(LORA, marks=pytest.mark.slow)])
def test_without_pruning_it_is_the_original_script(
    name: str, demo: Demo, tmp_path: Path, journal: list[dict[str, float]]
):
    run(original(source_of(name)), *demo.arguments(name, tmp_path / "original"))
    alone, steps = journal.copy(), len(journal)
    journal.clear()
    ours = source_of(name).replace('"item_seed": True', '"item_seed": False')
    assert ours != source_of(name)  # which has pictures flipped by other draws
    run(ours, *demo.arguments(name, tmp_path / "ours"), "--policy", "none")
    assert len(journal) == steps == EPOCHS * SAMPLES / 2
    for mine, theirs in zip(journal, alone, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
        assert mine["lr"] == theirs["lr"]
    assert len({entry["loss"] for entry in alone}) == steps and alone[-1]["lr"] == 0
    mine, theirs = weights(name, tmp_path / "ours"), weights(name, tmp_path / "original")
    assert mine.keys() == theirs.keys()
    assert max(float((mine[key] - theirs[key]).abs().max()) for key in theirs) <= 1e-6


# ---- pruned -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_it_prunes_by_the_score_that_knows_noise_levels(name: str, pruned: dict[str, Path]):
    summary = json.loads((pruned[name] / "infobatch_summary.json").read_text())
    assert summary["saved_ratio"] > 0 and summary["passes_done"] == EPOCHS and summary["score"] == "timestep"
    steps = told(pruned[name])
    assert len(steps) == summary["iterations"] < EPOCHS * SAMPLES / 2
    assert max(gamma for step in steps for gamma in step["weights"]) > 1
    assert steps[-1]["lr"] == 0  # at its end in spite of fewer updates
    scores = read_scores(pruned[name])
    names = scores["name"].tolist()
    assert len(set(names)) == SAMPLES
    assert all(Path(each).is_file() and Path(each).parent.parent.name == "images" for each in names)


def test_the_pipeline_it_saved_draws(demo: Demo, pruned: dict[str, Path]):
    pipeline = StableDiffusionPipeline.from_pretrained(pruned[TEXT])
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a drawing of a star", height=16, width=16, num_inference_steps=2).images[0]
    assert picture.size == (16, 16)
    for part, is_trained in (("unet", True), ("vae", False), ("text_encoder", False)):
        (file,) = (demo.pipeline / part).glob("*.safetensors")
        before, after = load_file(file), load_file(pruned[TEXT] / part / file.name)
        assert all(torch.equal(before[key], after[key]) for key in before) != is_trained


def test_lora_trains_the_adapter_alone(demo: Demo, pruned: dict[str, Path]):
    before = load_file(demo.pipeline / "unet/diffusion_pytorch_model.safetensors")
    state = load_file(next(pruned[LORA].glob("checkpoint-*/model.safetensors")))
    after = {key.replace(".base_layer", ""): value for key, value in state.items()}
    added = after.keys() - before.keys()
    assert added and all(".lora_A." in key or ".lora_B." in key for key in added)
    assert all(torch.equal(before[key], after[key]) for key in before)
    grown = [key for key in added if ".lora_B." in key]  # they begin as zeros
    assert all(after[key].abs().max() > 0 for key in grown) and len(grown) == len(added) / 2
    assert len(weights(LORA, pruned[LORA])) == len(added)


def test_the_adapter_it_saved_is_loaded_into_the_pipeline(demo: Demo, pruned: dict[str, Path]):
    pipeline = StableDiffusionPipeline.from_pretrained(demo.pipeline)
    noisy, words = torch.ones(1, 4, 8, 8), torch.ones(1, 5, pipeline.unet.config.cross_attention_dim)
    with torch.no_grad():
        before = pipeline.unet(noisy, 500, words).sample
        pipeline.load_lora_weights(pruned[LORA])
        assert not torch.allclose(pipeline.unet(noisy, 500, words).sample, before, atol=1e-4)


def test_the_transformer_it_saved_knows_its_classes(pruned: dict[str, Path]):
    folder = pruned[DIT]
    model = DiTTransformer2DModel.from_pretrained(folder / "transformer").eval()
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    classes = json.loads((folder / "classes.json").read_text())
    assert model.config.num_embeds_ada_norm == len(classes) == 10 and scheduler.config.num_train_timesteps == 1000
    assert {key: model.config[key] for key in TRANSFORMER} == TRANSFORMER
    noisy = torch.ones(11, 3, 16, 16)
    with torch.no_grad():  # the last of the labels is that of no class
        velocity = model(noisy, torch.full((11,), 500.0), torch.arange(11)).sample
    assert velocity.shape == noisy.shape and len(velocity.flatten(1).unique(dim=0)) == 11
    with Image.open(folder / "samples.png") as grid:  # four classes of eight pictures, and two pixels between them
        assert grid.size == (8 * 18 + 2, 4 * 18 + 2)


# ---- what they train on -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scripts() -> dict[str, dict[str, Any]]:
    """The functions of the scripts."""
    spaces: dict[str, dict[str, Any]] = {name: {"__name__": "example"} for name in NAMES}
    for name, space in spaces.items():
        exec(compile(source_of(name), name, "exec"), space)
    return spaces


@pytest.mark.parametrize("name", [TEXT, LORA])
def test_min_snr_weights_are_those_of_the_paper(name: str, scripts: dict[str, dict[str, Any]]):
    """The loss of the image itself is weighed by min(SNR, gamma), in terms of what is predicted."""
    weigh, timesteps = scripts[name]["min_snr_weights"], torch.arange(1000)
    noise = DDPMScheduler()
    snr = noise.alphas_cumprod / (1 - noise.alphas_cumprod)
    assert torch.equal(weigh(noise, timesteps, None), torch.ones(1000))
    torch.testing.assert_close(weigh(noise, timesteps, 5.0) * snr, snr.minimum(torch.tensor(5.0)))
    velocity = DDPMScheduler(prediction_type="v_prediction")
    torch.testing.assert_close(weigh(velocity, timesteps, 5.0) * (snr + 1), snr.minimum(torch.tensor(5.0)))
    with pytest.raises(ValueError, match="prediction_type='sample': use epsilon or v_prediction"):
        scripts[name]["target_of"](DDPMScheduler(prediction_type="sample"), None, None, None)


@pytest.mark.parametrize("name", [TEXT, LORA])
def test_pictures_come_with_the_words_of_their_captions(name: str, demo: Demo, scripts: dict[str, dict[str, Any]]):
    tokenizer = CLIPTokenizer.from_pretrained(demo.pipeline, subfolder="tokenizer")
    args = scripts[name]["parse_args"]([*demo.arguments(name, demo.images), "--center_crop"])
    args.random_flip = False
    opened = scripts[name]["open_pictures"](args, tokenizer)
    paths = [Path(row["path"]) for row in opened.data.to_pydict()["image"]]
    assert len(opened) == SAMPLES and len({path.parent for path in paths}) == 10
    for item, path in zip(opened, paths, strict=True):
        words = tokenizer.decode(item["input_ids"], skip_special_tokens=True)
        assert words.strip() == caption(path.parent.name)
        with Image.open(path) as image:
            pixels = torch.tensor(np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR))).movedim(2, 0)
        torch.testing.assert_close(item["pixel_values"], pixels / 127.5 - 1)


def test_the_transformer_is_trained_on_the_way_from_its_picture_to_noise(
    demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What it is given, less sigma of what it is to predict, is a picture of the class it is told, or of none."""
    seen: list[tuple[torch.Tensor, ...]] = []
    forward, mse_loss = DiTTransformer2DModel.forward, F.mse_loss

    def given(self: DiTTransformer2DModel, noisy: torch.Tensor, timesteps: torch.Tensor, classes: torch.Tensor):
        if self.training:
            seen.append((noisy, timesteps, classes))
        return forward(self, noisy, timesteps, classes)

    def compared(predicted: torch.Tensor, target: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        seen[-1] += (target,)
        return mse_loss(predicted, target, **kwargs)

    monkeypatch.setattr(DiTTransformer2DModel, "forward", given)
    monkeypatch.setattr(F, "mse_loss", compared)
    run(source_of(DIT), *demo.arguments(DIT, tmp_path), "--class_dropout", "0.5")
    steps = [transforms.Resize(16), transforms.ToTensor(), transforms.Normalize([0.5], [0.5])]
    pictures = ImageFolder(str(demo.images), transforms.Compose(steps))
    clean, labels = torch.stack([image for image, _ in pictures]), torch.tensor([label for _, label in pictures])
    either = torch.stack([clean, clean.flip(3)], 1)
    dropped = []
    for noisy, timesteps, classes, target in seen:
        assert ((timesteps > 0) & (timesteps <= 1000)).all()
        found = noisy - (timesteps / 1000).view(-1, 1, 1, 1) * target
        nearest = (found[:, None, None] - either).abs().amax((3, 4, 5)).amin(2).min(1)
        assert nearest.values.max() < 1e-5
        dropped += (classes == 10).tolist()
        assert ((classes == 10) | (classes == labels[nearest.indices])).all()
    assert 0.3 < sum(dropped) / len(dropped) < 0.7


def test_euler_steps_along_the_velocity_end_at_the_picture(scripts: dict[str, dict[str, Any]]):
    """A model that has learned noise - picture is led to the picture, by the script's own sampling."""
    sample, picture = scripts[DIT]["sample"], torch.rand(3, 16, 16)

    class Learned(torch.nn.Module):
        config = SimpleNamespace(in_channels=3, sample_size=16, num_embeds_ada_norm=10)

        def forward(self, x: torch.Tensor, timestep: torch.Tensor, classes: torch.Tensor):
            assert timestep.shape == classes.shape and classes.tolist() == [3, 4, 10, 10]
            sigma = (timestep / 1000).view(-1, 1, 1, 1)
            return SimpleNamespace(sample=(x - picture) / sigma)

    drawn = sample(Learned(), FlowMatchEulerDiscreteScheduler(), torch.tensor([3, 4]), 2.0)
    torch.testing.assert_close(drawn, picture.expand(2, 3, 16, 16), atol=1e-4, rtol=0)


def test_the_transformer_begins_as_the_identity_and_drops_no_classes_itself(scripts: dict[str, dict[str, Any]]):
    model = scripts[DIT]["build_model"](None, 10, 3, 16, 4).train()
    noisy, timesteps, classes = torch.randn(64, 3, 16, 16), torch.full((64,), 500.0), torch.arange(64) % 10
    tokens = model.pos_embed(noisy)
    assert torch.equal(model.transformer_blocks[0](tokens, timestep=timesteps, class_labels=classes), tokens)
    torch.nn.init.normal_(model.proj_out_2.weight)
    assert torch.equal(model(noisy, timesteps, classes).sample, model(noisy, timesteps, classes).sample)
    with pytest.raises(ValueError, match="patches of 4 do not fill 18 x 18"):
        scripts[DIT]["build_model"](None, 10, 3, 18, 4)


def test_images_without_captions_are_refused(scripts: dict[str, dict[str, Any]], tmp_path: Path):
    (tmp_path / "images/some").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(tmp_path / "images/some/a.png")
    (tmp_path / "images/metadata.jsonl").write_text('{"file_name": "some/a.png", "caption": "a"}\n')
    args = SimpleNamespace(train_data_dir=str(tmp_path / "images"), caption_column="text")
    for name in (TEXT, LORA):
        with pytest.raises(ValueError, match=r"metadata\.jsonl gives no 'text'"):
            scripts[name]["open_pictures"](args, None)


# ---- killed and resumed -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_in_a_pass_and_resumed_it_ends_with_the_same_bits(demo: Demo, pruned: dict[str, Path], tmp_path: Path):
    arguments, whole = demo.arguments(TEXT, tmp_path), told(pruned[TEXT])
    launch(TEXT, tmp_path, *arguments, kill_from=KILL_FROM)
    begun = told(tmp_path)
    assert [{**step, "lr": 0} for step in begun] == [{**step, "lr": 0} for step in whole[: len(begun)]]
    (tmp_path / "journal.0").unlink()
    saved, visited = steps_saved(tmp_path)
    assert saved < len(begun) < len(whole) and visited  # in the midst of a pass
    assert max(gamma for step in whole[saved:] for gamma in step["weights"]) > 1
    run_with_journal(TEXT, tmp_path, 0, [*arguments, "--resume_from_checkpoint"])
    assert told(tmp_path) == whole[saved:]
    mine, theirs = weights(TEXT, tmp_path), weights(TEXT, pruned[TEXT])
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    books, others = (json.loads((f / "infobatch_summary.json").read_text()) for f in (tmp_path, pruned[TEXT]))
    assert {**books, "wall_time_s": 0} == {**others, "wall_time_s": 0}


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_killed_and_resumed_end_with_the_same_bits(demo: Demo, tmp_path: Path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    often = ["--checkpointing_steps", "1"]
    launch(DIT, straight, *demo.arguments(DIT, straight), *often, launcher=accelerate_launch())
    launch(DIT, killed, *demo.arguments(DIT, killed), *often, kill_from=KILL_FROM, launcher=accelerate_launch())
    whole, begun = ([told(folder, rank) for rank in range(2)] for folder in (straight, killed))
    saved, visited = steps_saved(killed)
    assert visited and max(gamma for steps in whole for step in steps[saved:] for gamma in step["weights"]) > 1
    for rank in range(2):
        assert len(begun[rank]) == saved + 2 < len(whole[rank])
        (killed / f"journal.{rank}").unlink()
    launch(DIT, killed, *demo.arguments(DIT, killed), *often, "--resume_from_checkpoint", launcher=accelerate_launch())
    assert [told(killed, rank) for rank in range(2)] == [steps[saved:] for steps in whole]
    mine, theirs = weights(DIT, killed), weights(DIT, straight)
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
