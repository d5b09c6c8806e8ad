"""The evaluation of latent-diffusion runs: distances, bands of timesteps, samples, and what it refuses."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("torch_fidelity")
pytest.importorskip("rich")
scipy_linalg = pytest.importorskip("scipy.linalg")

import torch_fidelity
from diffusers import AutoencoderKL, DDPMScheduler, LDMPipeline, UNet2DModel, VQModel
from launching import forget_accelerators
from PIL import Image
from safetensors.torch import load_file, save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchvision.transforms.functional import pil_to_tensor

from infobatch_mm.cli import eval_ldm, train_ldm
from infobatch_mm.core import rng
from infobatch_mm.demo.shapes import draw_dataset
from infobatch_mm.diffusion import evaluation, sampling
from infobatch_mm.diffusion.bands import loss_by_band
from infobatch_mm.diffusion.denoising import Denoising, draw, held_out_loss, losses_over_timesteps
from infobatch_mm.diffusion.distances import distances
from infobatch_mm.diffusion.first_stage import fingerprint, load_first_stage, moments
from infobatch_mm.diffusion.images import ImageFolder
from infobatch_mm.diffusion.pictures import save_extremes
from infobatch_mm.diffusion.pipelines import build_pipeline, load_pipeline
from infobatch_mm.diffusion.pixels import RealPixels, to_uint8

from .test_train_ldm import UNET

IMAGES, HELD_OUT = 24, 10


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)
    forget_accelerators()


def save_run(folder: Path, vae: torch.nn.Module, seed: int = 0, **unet: Any) -> Path:
    """A pipeline as train_ldm.py leaves it behind."""
    torch.manual_seed(seed)
    model = UNet2DModel(**{**UNET, **unet})
    # by name: diffusers takes what is given by position for defaults, and drops it where another scheduler is made
    schedule = dict(num_train_timesteps=50, beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear")
    scheduler = DDPMScheduler(**schedule, clip_sample=False)
    build_pipeline(vae, model, scheduler).save_pretrained(folder)
    return folder


def first_stage(seed: int = 0) -> VQModel:
    torch.manual_seed(seed)
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        norm_num_groups=4,
        num_vq_embeddings=16,
        scaling_factor=0.5,
    )


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``images/`` and ``val/``, 8 x 8 drawn pictures; ``arms/a`` and ``arms/b``, untrained runs."""
    root = tmp_path_factory.mktemp("eval")
    draw_dataset(root / "images", num_train=IMAGES, num_val=0, size=8)
    draw_dataset(root / "val", num_train=HELD_OUT, num_val=0, size=8, seed=1)
    for seed, name in enumerate("ab"):
        save_run(root / "arms" / name, first_stage(), seed)
    return root


def flags(material: Path, *runs: str | Path, **options: Any) -> list[str]:
    given = dict(
        train_data_dir=material / "images",
        num_samples=12,
        kid_subset_size=6,
        kid_subsets=3,
        ddpm_num_inference_steps=3,
        batch_size=5,
        grid=4,
    )
    result = ["--cpu", *(str(material / "arms" / run) for run in runs or "a")]
    for name, value in {**given, **options}.items():
        result += [] if value is None else [f"--{name}={value}"]
    return result


def real(material: Path, folder: str = "images") -> RealPixels:
    return RealPixels(ImageFolder(material / folder, 8))


def stacked(pixels: RealPixels) -> torch.Tensor:
    return torch.stack([pixels[index] for index in range(len(pixels))])


# ---- a whole evaluation ----------------------------------------------------------------------------------------


def test_runs_are_measured_side_by_side(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    fetch = RealPixels.__getitem__
    monkeypatch.setattr(RealPixels, "__getitem__", lambda self, i: read.append(i) or fetch(self, i))
    options = dict(eval_data_dir=material / "val", timestep_bands=5, draws_per_image=10, output_dir=tmp_path)
    eval_ldm.main(flags(material, "a", "b", **options))
    a, b = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in "ab")
    assert (a["num_samples"], a["num_images"], a["held_out_images"], a["resolution"]) == (12, IMAGES, HELD_OUT, 8)
    assert a["first_stage"] == b["first_stage"] == fingerprint(load_first_stage(str(material / "arms" / "a")))
    for key in ("first_stage_fd", "first_stage_kd_mean", "held_out_loss"):
        assert np.isfinite(a[key]) and a[key] != b[key]
    assert not [key for key in a if "fid" in key or key.startswith("kid_m")]  # no Inception, no FID
    # torch-fidelity looks at the first item once more: the second run finds the features of the real images
    assert len(read) < 2 * IMAGES and set(read) == set(range(IMAGES))
    assert Image.open(tmp_path / "a" / "samples.png").size == (22, 22)  # 2 x 2, with gaps
    shown = capsys.readouterr().out
    for text in ("12 samples, 24 real images", f"{a['first_stage_fd']:.4g}", f"{b['held_out_loss']:.5f}", "0 to 9"):
        assert text in shown
    # what several runs share does not change what each has
    eval_ldm.main(flags(material, "b", **{**options, "output_dir": tmp_path / "alone"}))
    alone = json.loads((tmp_path / "alone" / "evaluation.json").read_text())
    assert {**alone, "wall_time_s": 0} == {**b, "wall_time_s": 0}


def test_the_images_with_the_lowest_and_the_highest_scores_are_shown(material: Path, tmp_path: Path) -> None:
    images = ImageFolder(material / "images", 8, center_crop=True)
    order = np.random.default_rng(0).permutation(IMAGES)
    scores = np.empty(IMAGES, dtype=np.float32)
    scores[order] = np.arange(IMAGES)
    scores[order[0]] = np.nan  # never seen
    names = [images.names[i] for i in reversed(range(IMAGES))]
    columns = dict(index=np.arange(IMAGES), times_seen=np.ones(IMAGES, dtype=np.int32))
    np.savez(tmp_path / "infobatch_scores.npz", score=scores[::-1], name=np.array([*names]), **columns)
    save_extremes(tmp_path, images, 4, tmp_path / "scores.png")
    shown = pil_to_tensor(Image.open(tmp_path / "scores.png"))
    assert shown.shape == (3, 2 * 10 + 2, 4 * 10 + 2)
    for place, i in enumerate([*order[1:5], *order[-4:]]):
        top, left = 2 + 10 * (place // 4), 2 + 10 * (place % 4)
        assert torch.equal(shown[:, top : top + 8, left : left + 8], to_uint8(images.fixed(i)))
    save_extremes(material, images, 4, tmp_path / "none.png")  # no scores there
    np.savez(tmp_path / "infobatch_scores.npz", score=scores, name=np.array(["other"] * IMAGES), **columns)
    save_extremes(tmp_path, images, 4, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_results_go_to_the_run_and_say_if_they_cannot_be_compared(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    one = save_run(tmp_path / "one" / "arm", first_stage())
    other = save_run(tmp_path / "two" / "arm", first_stage(seed=1))
    eval_ldm.main(flags(material, one, other, grid=0))
    assert "first stages differ: first_stage_*" in " ".join(capsys.readouterr().out.split())
    results = [json.loads((run / "evaluation.json").read_text()) for run in (one, other)]
    assert results[0]["first_stage"] != results[1]["first_stage"]
    assert "held_out_loss" not in results[0]
    assert not (one / "samples.png").exists()
    assert list(evaluation.named([str(one), str(other)])) == ["one/arm", "two/arm"]
    assert list(evaluation.named([str(one)])) == ["arm"]
    eval_ldm.main(flags(material, "a", "b", output_dir=tmp_path / "out"))
    assert "first stages differ" not in " ".join(capsys.readouterr().out.split())


# ---- distances -------------------------------------------------------------------------------------------------


def features_by_hand(run: Path, images: torch.Tensor) -> np.ndarray:
    """The encoder's layers one by one, and the average over each quarter."""
    encoder = load_first_stage(str(run)).encoder
    with torch.no_grad():
        x = encoder.conv_in(images.float() / 255 * 2 - 1)
        for block in encoder.down_blocks:
            x = block(x)
        x = encoder.mid_block(x).double()
    top, bottom = x.chunk(2, dim=2)
    quarters = [quarter.mean((2, 3)) for half in (top, bottom) for quarter in half.chunk(2, dim=3)]
    return torch.stack(quarters, dim=2).flatten(1).numpy()


def test_the_frechet_distance_is_the_formula(material: Path) -> None:
    run = material / "arms" / "a"
    samples = stacked(real(material, "val"))
    found = distances(samples, real(material), first_stage=run, subset_size=5, batch_size=7)
    x, y = features_by_hand(run, samples), features_by_hand(run, stacked(real(material)))
    # |m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2)), Heusel et al., equation 6
    difference = x.mean(0) - y.mean(0)
    one, two = np.cov(x.T), np.cov(y.T)
    half = scipy_linalg.sqrtm(one)
    root = scipy_linalg.sqrtm(half @ two @ half)
    by_hand = difference @ difference + np.trace(one) + np.trace(two) - 2 * np.trace(root).real
    assert found["frechet"] == pytest.approx(by_hand, rel=1e-4)
    assert by_hand > 0


def test_the_kernel_distance_is_the_formula(material: Path) -> None:
    run = material / "arms" / "a"
    samples = stacked(real(material))
    mirrored = samples.flip(2)
    # subsets of all images: whichever order they come in
    found = distances(mirrored, real(material), first_stage=run, subset_size=IMAGES, subsets=2)
    x, y = features_by_hand(run, mirrored), features_by_hand(run, samples)

    def kernel(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return (left @ right.T / left.shape[1] + 1) ** 3

    same = sum(k.sum() - np.trace(k) for k in (kernel(x, x), kernel(y, y))) / (IMAGES * (IMAGES - 1))
    assert found["kernel_mean"] == pytest.approx(same - 2 * kernel(x, y).mean(), rel=1e-4)
    assert found["kernel_std"] == pytest.approx(0, abs=1e-9)


def test_what_is_closer_to_the_images_has_the_smaller_distance(material: Path) -> None:
    torch.manual_seed(0)
    samples = stacked(real(material))

    def frechet(changed: torch.Tensor) -> float:
        run = material / "arms" / "a"
        return distances(changed, real(material), first_stage=run, subset_size=5)["frechet"]

    noise = torch.randn(samples.shape)
    noised = [(samples + std * noise).round().clamp(0, 255).to(torch.uint8) for std in (0, 10, 60)]
    found = [frechet(each) for each in noised]
    assert abs(found[0]) < 1e-6 < found[1] < found[2]
    assert frechet(samples.flip(2)) > 1e-4  # upside down


def test_another_first_stage_is_not_given_the_features_of_this_one(material: Path, tmp_path: Path) -> None:
    other = save_run(tmp_path / "other", first_stage(seed=1))
    samples = stacked(real(material, "val"))
    cache = dict(cache_dir=tmp_path / "cache", real_name="real", subset_size=5)
    distances(samples, real(material), first_stage=material / "arms" / "a", **cache)
    found = distances(samples, real(material), first_stage=other, **cache)
    assert found == distances(samples, real(material), first_stage=other, subset_size=5)


def test_a_first_stage_with_a_posterior_has_features_too(material: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        norm_num_groups=4,
        latent_channels=3,
    )
    run = save_run(tmp_path / "run", vae)
    eval_ldm.main(flags(material, run, eval_data_dir=material / "val", timestep_bands=2, draws_per_image=4))
    result = json.loads((run / "evaluation.json").read_text())
    assert np.isfinite(result["first_stage_fd"]) and np.isfinite(result["held_out_loss"])


def test_images_are_compared_as_they_are_stored(material: Path, tmp_path: Path) -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    pixels = torch.stack([levels, levels.flip(0), levels.roll(77)]).reshape(3, 16, 16)
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "images" / "all.png")
    read = RealPixels(ImageFolder(tmp_path / "images", 16))[0]
    assert read.dtype == torch.uint8 and torch.equal(read, pixels)


@pytest.mark.slow
def test_fid_is_torch_fidelitys_on_folders_of_the_same_pictures(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "inception.pth"
    random_inception(weights)
    run = material / "arms" / "a"
    drawn: list[torch.Tensor] = []
    sample = sampling.sample
    monkeypatch.setattr(evaluation, "sample", lambda *given, **named: drawn.append(sample(*given, **named)) or drawn[0])
    few = dict(num_samples=6, kid_subset_size=4, output_dir=tmp_path, train_data_dir=material / "val")
    eval_ldm.main(flags(material, run, inception=weights, **few))
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert result["inception_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()

    for folder, pictures in (("samples", drawn[0]), ("real", stacked(real(material, "val")))):
        (tmp_path / folder).mkdir()
        for index, picture in enumerate(pictures):
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / folder / f"{index:02d}.png")
    by_hand = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "samples"),
        input2=str(tmp_path / "real"),
        feature_extractor_weights_path=str(weights),
        fid=True,
        kid=True,
        kid_subset_size=4,
        kid_subsets=3,
        batch_size=5,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    assert result["fid"] == by_hand["frechet_inception_distance"]
    assert result["kid_mean"] == by_hand["kernel_inception_distance_mean"]
    assert result["kid_std"] == by_hand["kernel_inception_distance_std"]
    assert result["fid"] > 1e-3 and result["kid_std"] > 1e-6  # of features that tell images apart


def random_inception(path: Path) -> None:
    """Weights of torch-fidelity's own model, untrained, in the format of its releases."""

    class Stop(Exception):
        pass

    def refuse(self: torch.nn.Module, *_: Any) -> None:
        for module in self.modules():
            if isinstance(module, torch.nn.Conv2d):  # as torch makes them, all features would be next to nothing
                torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        torch.save(self.state_dict(), path, _use_new_zipfile_serialization=False)
        raise Stop

    torch.manual_seed(0)
    torch.save({}, path)
    with pytest.MonkeyPatch.context() as patched, pytest.raises(Stop):
        patched.setattr(FeatureExtractorInceptionV3, "load_state_dict", refuse)
        FeatureExtractorInceptionV3("random", ["2048"], feature_extractor_weights_path=str(path))


# ---- samples ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samples_do_not_depend_on_the_batch(material: Path, eta: float) -> None:
    pipeline = load_pipeline(material / "arms" / "a")
    step = pipeline.scheduler.step
    alone, few, all_at_once = (sampling.sample(pipeline, 5, 4, eta, 0, batch_size) for batch_size in (1, 2, 5))
    for other in (alone, few):
        assert (other.int() - all_at_once.int()).abs().max() <= 1
    assert torch.equal(sampling.sample(pipeline, 3, 4, eta, 0, 5), all_at_once[:3])
    assert not torch.equal(sampling.sample(pipeline, 5, 4, eta, 1, 5), all_at_once)
    assert len({bytes(each.numpy()) for each in all_at_once}) == 5
    assert pipeline.scheduler.step == step  # the caller's pipeline is as it was


def test_eta_is_the_pipelines(material: Path) -> None:
    pipeline = load_pipeline(material / "arms" / "a")
    still, stirred = (sampling.sample(pipeline, 4, 4, eta) for eta in (0.0, 1.0))
    assert not torch.equal(still, stirred)


def test_samples_are_what_the_pipeline_saves(material: Path) -> None:
    saved = LDMPipeline.from_pretrained(material / "arms" / "a")
    saved.set_progress_bar_config(disable=True)
    key = (3, sampling._SAMPLES)
    generators = [rng.generator(*key, index) for index in range(4)]
    pictures = torch.stack([pil_to_tensor(each) for each in saved(4, generators, num_inference_steps=5).images])
    pipeline = load_pipeline(material / "arms" / "a")
    assert torch.equal(sampling.sample(pipeline, 4, 5, seed=3), pictures)


# ---- bands of timesteps ----------------------------------------------------------------------------------------


def test_bands_are_those_of_a_loop(material: Path, tmp_path: Path) -> None:
    eval_ldm.main(
        flags(material, eval_data_dir=material / "val", timestep_bands=4, draws_per_image=8, output_dir=tmp_path)
    )
    result = json.loads((tmp_path / "evaluation.json").read_text())
    pipeline = load_pipeline(material / "arms" / "a")
    alphas = pipeline.scheduler.alphas_cumprod.double()
    images = ImageFolder(material / "val", 8)
    latents = torch.cat([moments(pipeline.vqvae, images.fixed(index)[None])[0] for index in range(HELD_OUT)])
    losses: list[list[float]] = [[], [], [], []]
    for repeat in range(8):
        for index, latent in enumerate(latents):
            drawn = draw([index], latent.shape, 50, 0, 2**31, repeat)
            t = (drawn.timesteps + repeat * 50) // 8
            noisy = alphas[t].sqrt() * latent + (1 - alphas[t]).sqrt() * drawn.noise
            with torch.no_grad():
                predicted = pipeline.unet(noisy.float(), t).sample
            losses[repeat // 2].append(float((predicted - drawn.noise).square().mean()))
    rows = result["held_out_loss_by_timestep"]
    assert [row["loss"] for row in rows] == pytest.approx([np.mean(band) for band in losses], rel=1e-5)
    assert result["held_out_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    # 50 timesteps do not divide by 8: the one between two bands is drawn in both
    assert [(row["first_timestep"], row["last_timestep"]) for row in rows] == [(0, 12), (12, 24), (25, 37), (37, 49)]
    log_snr = (alphas / (1 - alphas)).log()
    assert [row["log_snr"] for row in rows] == pytest.approx(
        [float(log_snr[row["first_timestep"] : row["last_timestep"] + 1].mean()) for row in rows], rel=1e-5
    )


def test_the_overall_loss_is_the_one_the_training_measures(material: Path, tmp_path: Path) -> None:
    recipe = dict(train_data_dir=material / "images", eval_data_dir=material / "val", vae=material / "arms" / "a")
    recipe |= dict(unet_config=json.dumps(UNET), resolution=8, num_epochs=1, ddpm_num_steps=50, logger="none")
    recipe |= dict(ddpm_num_inference_steps=2, save_images_epochs=0, prediction_type="v_prediction", snr_gamma=5)
    run = tmp_path / "run"
    train_ldm.main([f"--{name}={value}" for name, value in recipe.items()] + ["--cpu", f"--output_dir={run}"])
    eval_ldm.main(flags(material, run, eval_data_dir=material / "val", timestep_bands=2, draws_per_image=8))
    trained = json.loads((run / "metrics.json").read_text())["held_out_loss"]
    result = json.loads((run / "evaluation.json").read_text())
    assert result["held_out_loss"] == pytest.approx(trained, rel=1e-5)
    bands = [row["loss"] for row in result["held_out_loss_by_timestep"]]
    assert np.mean(bands) == pytest.approx(result["held_out_loss"], rel=1e-9)


def test_timesteps_of_bands_are_those_that_are_drawn() -> None:
    seen: list[torch.Tensor] = []

    def model(noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        seen.append(timesteps)
        return noisy

    items = [{"latents": torch.zeros(1, 1, 1)}] * 400
    for num_timesteps, bands, per_band in ((50, 4, 2), (20, 5, 1), (30, 1, 7)):
        denoising = Denoising(DDPMScheduler(num_timesteps))
        seen.clear()
        losses = losses_over_timesteps(denoising, model, items, torch.device("cpu"), 400, bands * per_band)
        rows = loss_by_band(losses, denoising.scheduler, bands)
        for band, row in enumerate(rows):
            drawn = torch.cat(seen[band * per_band : (band + 1) * per_band])
            assert (int(drawn.min()), int(drawn.max())) == (row["first_timestep"], row["last_timestep"])
        overall = held_out_loss(denoising, model, items, torch.device("cpu"), 400, bands * per_band)
        assert np.mean([row["loss"] for row in rows]) == pytest.approx(overall)


# ---- what is refused -------------------------------------------------------------------------------------------


def refusal(monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> str:
    """The message of a refusal, before anything is sampled."""

    def sample(*_: Any, **__: Any) -> None:
        raise AssertionError("sampled before it was refused")

    monkeypatch.setattr(evaluation, "sample", sample)
    with pytest.raises(SystemExit) as caught:
        eval_ldm.main(argv)
    return str(caught.value)


def test_runs_that_cannot_be_used_are_refused(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(run: Path, *more: str, **options: Any) -> str:
        return refusal(monkeypatch, flags(material, run, *more, **options))

    assert "holds no finished training" in refused(tmp_path / "nowhere")
    # the last of several is looked at before the first is sampled
    assert "holds no finished training" in refused("a", str(tmp_path / "nowhere"))
    assert "named twice" in refused("a", "a")
    run = save_run(tmp_path / "run", first_stage())
    weights = run / "unet" / "diffusion_pytorch_model.safetensors"
    whole = load_file(weights)
    save_file({name: weight for name, weight in whole.items() if "conv_in" not in name}, weights)
    assert "2 weights of the UNet are not in its file, such as conv_in" in refused(run)
    save_file({**whole, "conv_in.bias": whole["conv_in.bias"] * torch.nan}, weights)
    assert "1 weights of the UNet2DModel are not finite, such as conv_in.bias" in refused(run)
    weights.write_bytes(weights.read_bytes()[:1000])
    assert f"cannot load the pipeline {run}" in refused(run)
    (run / "vqvae" / "config.json").unlink()
    assert "cannot load a first stage" in refused(run)
    unfit = save_run(tmp_path / "unfit", first_stage(), in_channels=4, out_channels=4)
    assert "in_channels=4, the latents of the first stage have 3" in refused(unfit)


def test_images_that_do_not_fit_are_refused(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*runs: str, **options: Any) -> str:
        return refusal(monkeypatch, flags(material, *runs, **options))

    assert "have 8 pixels in width and height, not 16" in refused(resolution=16)
    larger = save_run(tmp_path / "larger", first_stage(), sample_size=8)
    assert "have 16 pixels in width and height, not 8" in refused("a", str(larger))
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refused(train_data_dir=tmp_path / "empty")
    assert "holds no images" in refused(eval_data_dir=tmp_path / "empty")
    (tmp_path / "empty" / "bad.png").write_bytes(b"no picture")
    assert "1 of 1 images cannot be read: bad.png" in refused(train_data_dir=tmp_path / "empty")
    assert "1 of 1 images cannot be read: bad.png" in refused(eval_data_dir=tmp_path / "empty")
    too_few = "compares 6 samples with as many real images, at least 2, but there are 5 samples and 24 real images"
    assert too_few in refused(num_samples=5)
    assert "12 samples and 24 real images" in refused(kid_subset_size=13)
    assert "100 samples and 24 real images" in refused(num_samples=100, kid_subset_size=30)
    assert "--draws_per_image 40 does not divide by --timestep_bands 7" in refused(timestep_bands=7)
    assert "--draws_per_image 60: " in refused(draws_per_image=60)
    assert "fewer steps than the 50" in refused(ddpm_num_inference_steps=50)
    (tmp_path / "file").write_text("")
    assert "cannot write to --output_dir" in refused(output_dir=tmp_path / "file")


def test_inception_weights_that_are_none_are_refused(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path) -> str:
        return refusal(monkeypatch, flags(material, inception=path))

    path = tmp_path / "inception.pth"
    assert f"cannot use the Inception weights {path} ([Errno 2] No such file" in refused(path)
    path.write_bytes(b"no weights")
    assert f"cannot use the Inception weights {path}" in refused(path)
    torch.save({"fc.weight": torch.zeros(2)}, path)
    assert "Missing key(s) in state_dict" in refused(path)
    torch.save(Path("a pickled object"), path)  # which would be run by torch-fidelity's own reading
    assert "Weights only load failed" in refused(path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num_samples=1"], "--num_samples 1: it must be at least 2"),
        (["--batch_size=0"], "--batch_size 0: it must be at least 1"),
        (["--eta=-0.5"], "--eta -0.5: it must be at least 0"),
        (["--eta=nan"], "--eta nan: it must be at least 0"),
        (["--dataset_name=x"], "either --train_data_dir or --dataset_name"),
    ],
)
def test_a_wrong_option_is_named(capsys: pytest.CaptureFixture, more: list[str], message: str) -> None:
    with pytest.raises(SystemExit):
        eval_ldm.parse_args(["run", "--train_data_dir=x", *more])
    assert message in capsys.readouterr().err


def test_both_spaces_or_none_are_refused(material: Path) -> None:
    samples = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="name either"):
        distances(samples, real(material), subset_size=2)


def test_without_torch_fidelity_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    found = importlib.util.find_spec("infobatch_mm.diffusion.features")
    assert found is not None and found.loader is not None
    with pytest.raises(ImportError, match=r"needs torch-fidelity: pip install 'infobatch_mm\[diffusers\]'"):
        found.loader.exec_module(importlib.util.module_from_spec(found))
