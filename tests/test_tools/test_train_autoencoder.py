"""The first stage that tools/train_autoencoder.py trains: what it learns, measures and leaves behind."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("torchvision")

from accelerate import Accelerator
from diffusers import AutoencoderKL, VQModel
from launching import accelerate_launch, forget_accelerators
from PIL import Image

from infobatch_mm.cli import train_autoencoder
from infobatch_mm.diffusion.codebook import Codebook
from infobatch_mm.diffusion.first_stage import fingerprint, latent_shape, load_first_stage, moments
from infobatch_mm.diffusion.first_stage_training import Autoencoding, build_model
from infobatch_mm.diffusion.images import ImageFolder

ROOT = Path(__file__).parents[2]
IMAGES = 40
TINY = dict(
    resolution=16,
    block_out_channels=(8, 8),
    downsample_factor=2,
    num_vq_embeddings=32,
    train_batch_size=8,
    learning_rate=1e-2,
    lr_warmup_steps=5,
)


def forget() -> None:
    forget_accelerators()


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    generator = torch.get_rng_state()  # the tool seeds the process
    yield
    torch.set_rng_state(generator)
    forget()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 drawn pictures of 16 x 16."""
    from infobatch_mm.demo.shapes import draw_dataset

    return draw_dataset(tmp_path_factory.mktemp("pictures"), num_train=IMAGES, num_val=0, size=16)


def flags(pictures: Path | None, output_dir: Path, **options: Any) -> list[str]:
    options = {"train_data_dir": pictures, "output_dir": output_dir, **TINY, **options}
    result = []
    for name, value in options.items():
        if value is True:
            result.append(f"--{name}")
        elif value is not None:
            result += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return result


class Run(NamedTuple):
    kind: type
    folder: Path
    said: str


@pytest.fixture(scope="module", params=["vq", "kl"])
def run(request: pytest.FixtureRequest, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A short training of 12 epochs, 60 steps."""
    folder = tmp_path_factory.mktemp(request.param)
    with contextlib.redirect_stdout(open(folder / "said.txt", "w")) as said:
        train_autoencoder.main(flags(pictures, folder, model_type=request.param, num_epochs=12, save_images_epochs=8))
        said.close()
    last = (folder / "said.txt").read_text().splitlines()[-1]
    return Run({"vq": VQModel, "kl": AutoencoderKL}[request.param], folder, last)


def pixels_of(pictures: Path) -> torch.Tensor:
    images = ImageFolder(pictures, 16)
    return torch.stack([images.fixed(i) for i in range(len(images))])


def psnr(pixels: torch.Tensor, made: torch.Tensor) -> float:
    """Mean over the images, of values in [0, 1]."""
    errors = ((made - pixels) / 2).double().square().mean((1, 2, 3))
    return float((-10 * errors.log10()).mean())


def reconstructed(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        encoded = vae.encode(pixels)
        latents = encoded.latents if isinstance(vae, VQModel) else encoded.latent_dist.mode()
        return vae.decode(latents).sample.clamp(-1, 1)


# ---- a run -------------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_first_stage_that_reconstructs(run: Run, pictures: Path) -> None:
    vae = load_first_stage(str(run.folder))
    assert type(vae) is run.kind
    assert latent_shape(vae, 16) == (3 if run.kind is VQModel else 4, 8, 8)
    pixels = pixels_of(pictures)
    one_colour_each_image_the_same = pixels.mean((0, 2, 3), keepdim=True).expand_as(pixels)
    assert psnr(pixels, reconstructed(vae, pixels)) > psnr(pixels, one_colour_each_image_the_same) + 0.3


def test_its_last_line_says_what_came_of_it(run: Run, pictures: Path) -> None:
    vae = load_first_stage(str(run.folder))
    pixels = pixels_of(pictures)
    found = re.fullmatch(
        rf"saved to {run.folder}: latents (\d)x8x8, scaling_factor ([\d.]+)(, (\d+) of 32 codes in use)?; "
        rf"trained for \d+ s; PSNR ([\d.]+) dB on {IMAGES} of the training images",
        run.said,
    )
    assert found is not None, run.said
    assert float(found[2]) == pytest.approx(vae.config.scaling_factor, abs=1e-4)
    # of a posterior the tool decodes a sample, we the mean
    tolerance = 0.01 if run.kind is VQModel else 0.5
    assert float(found[5]) == pytest.approx(psnr(pixels, reconstructed(vae, pixels)), abs=tolerance)
    if run.kind is VQModel:
        codes = vae.quantize(vae.encode(pixels).latents)[2][2].unique()
        assert int(found[4]) == len(codes) > 16
    else:
        assert found[3] is None


def test_its_scaled_latents_have_a_standard_deviation_of_one(run: Run, pictures: Path) -> None:
    mean, spread = moments(load_first_stage(str(run.folder)), pixels_of(pictures))
    variance = mean.var() + (0 if spread is None else spread.square().mean())
    assert float(variance**0.5) == pytest.approx(1, abs=0.01)


def test_its_pictures_show_images_above_their_reconstructions(run: Run, pictures: Path) -> None:
    assert sorted(path.name for path in run.folder.glob("*.png")) == ["reconstructions.png", "reconstructions_0008.png"]
    picture = np.asarray(Image.open(run.folder / "reconstructions.png"), dtype=np.float64)
    assert picture.shape == (2 * (4 * 18 + 2), 2 * (8 * 18 + 2), 3)
    pixels = pixels_of(pictures)
    made = reconstructed(load_first_stage(str(run.folder)), pixels)
    for shown, (row, column) in {0: (0, 0), 9: (2, 1)}.items():  # sixteen of forty, in two pairs of rows of eight
        left = 4 + 36 * column
        for below, source in enumerate((pixels, made)):
            top = 4 + 36 * (row + below)
            seen = picture[top : top + 32 : 2, left : left + 32 : 2]
            expected = ((source[shown * IMAGES // 16] + 1) * 127.5).permute(1, 2, 0).numpy()
            assert np.abs(seen - expected).max() < 1


def test_equal_seeds_train_equal_models(pictures: Path, tmp_path: Path) -> None:
    prints = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        train_autoencoder.main(flags(pictures, tmp_path / name, seed=seed, random_flip=True, max_train_steps=6))
        forget()
        prints.append(fingerprint(load_first_stage(str(tmp_path / name))))
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_half_precision_is_of_the_steps_alone(pictures: Path, tmp_path: Path, kind: str) -> None:
    options = dict(mixed_precision="bf16", model_type=kind, max_train_steps=4)
    train_autoencoder.main(flags(pictures, tmp_path, **options))
    vae = load_first_stage(str(tmp_path))
    assert vae.dtype == torch.float32 and all(weight.isfinite().all() for weight in vae.parameters())


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_run_draws_its_codes_all_the_same(pictures: Path, tmp_path: Path, steps: int) -> None:
    train_autoencoder.main(flags(pictures, tmp_path, max_train_steps=steps))
    vae = load_first_stage(str(tmp_path))
    latents = vae.encode(pixels_of(pictures)).latents
    spread = latents.std((0, 2, 3))
    # a fresh codebook lies within 1/32 of zero
    away = (vae.quantize.embedding.weight - latents.mean((0, 2, 3))).abs().mean(0)
    assert len(vae.quantize(latents)[2][2].unique()) > 8, (away, spread)


# ---- the codebook ------------------------------------------------------------------------------------------------


def test_codes_are_brought_into_use_and_used_ones_left_alone() -> None:
    torch.manual_seed(0)
    vae = VQModel(num_vq_embeddings=16, block_out_channels=(8,), norm_num_groups=4)
    codes = vae.quantize.embedding.weight.data
    codebook = Codebook(vae, Accelerator(cpu=True), steps=100, seed=0)
    latents = torch.randn(4, 3, 8, 8) + 20
    flat = latents.movedim(1, -1).reshape(-1, 3)

    def used() -> int:
        return len(torch.cdist(flat, codes).argmin(1).unique())

    assert used() < 4
    generator = torch.get_rng_state()
    for step in range(10):
        assert not codebook.used_at(step)
        codebook.after_step(step, latents)
    assert codebook.used_at(10) and used() >= 12
    codes[3:] = 1e4
    kept = codes[:3].clone()
    for step in range(10, 14):
        codebook.after_step(step, latents)
    assert used() >= 12 and torch.equal(codes[:3], kept)
    assert torch.equal(torch.get_rng_state(), generator)  # processes draw the same, whatever they drew before
    codes[3:] = 1e4
    for step in range(50, 60):  # in the second half nothing is disturbed
        codebook.after_step(step, latents)
    assert used() <= 3


def test_without_its_codebook_the_model_is_a_plain_autoencoder() -> None:
    torch.manual_seed(0)
    vae = VQModel(num_vq_embeddings=16, block_out_channels=(8,), norm_num_groups=4)
    step = Autoencoding(vae)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    made, commitment, _ = step(images, quantise=False)
    torch.testing.assert_close(made, vae.decode(vae.encode(images).latents, force_not_quantize=True).sample)
    assert commitment == 0
    commitment.backward()  # the codes take part, as DistributedDataParallel wants it
    assert vae.quantize.embedding.weight.grad is not None and not vae.quantize.embedding.weight.grad.any()
    quantised, commitment, latents = step(images)
    torch.testing.assert_close(quantised, vae(images).sample)
    assert commitment > 0 and not latents.requires_grad


def test_the_regulariser_of_a_kl_model_is_its_divergence_per_value() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    images = torch.rand(5, 3, 8, 8) * 2 - 1
    _, divergence, mean = Autoencoding(vae)(images)
    posterior = vae.encode(images).latent_dist
    normal = torch.distributions.Normal(posterior.mean, posterior.std)
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(divergence, expected)
    torch.testing.assert_close(mean, posterior.mean)


# ---- the command line --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(train_data_dir=None), "name one of --train_data_dir and --dataset_name"),
        (dict(dataset_name="b"), "name one of --train_data_dir and --dataset_name"),
        (dict(downsample_factor=3), "--downsample_factor 3: it must be a power of two that divides --resolution 16"),
        (dict(resolution=15), "--downsample_factor 2: it must be a power of two that divides --resolution 15"),
        (dict(downsample_factor=0), "--downsample_factor is 0"),
        (dict(block_out_channels=(8,)), "--block_out_channels has 1 widths; --downsample_factor 2 needs 2"),
        (dict(block_out_channels=(8, 0)), r"--block_out_channels is \[8, 0\]"),
        (dict(latent_channels=0), "--latent_channels is 0"),
        (dict(layers_per_block=0), "--layers_per_block is 0"),
        (dict(train_batch_size=0), "--train_batch_size is 0"),
        (dict(max_train_steps=0), "--max_train_steps is 0, and must be at least 1"),
        (dict(model_type="gan"), "invalid choice: 'gan'"),
    ],
)
def test_a_wrong_option_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SystemExit):
        train_autoencoder.main(flags(tmp_path, tmp_path / "out", **options))
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("factor", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_the_default_widths_make_a_model_of_any_factor(factor: int, kind: str) -> None:
    options = ["--train_data_dir", "a", "--downsample_factor", str(factor), "--model_type", kind]
    vae = build_model(train_autoencoder.parse_args(options))
    assert latent_shape(vae, 64)[1:] == (64 // factor, 64 // factor)


def test_images_that_cannot_be_trained_on_are_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="error: there is no folder"):
        train_autoencoder.main(flags(tmp_path / "nowhere", tmp_path / "out"))
    (tmp_path / "images").mkdir()
    (tmp_path / "images/0.png").write_bytes(b"")
    forget()
    with pytest.raises(SystemExit, match=r"error: 1 of 1 images cannot be read: 0.png"):
        train_autoencoder.main(flags(tmp_path / "images", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# ---- several processes -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_train_one_model(pictures: Path, tmp_path: Path) -> None:
    """Their replicas stay equal, whatever codes are drawn: each leaves the fingerprint of its weights."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from infobatch_mm.cli import train_autoencoder\n"
        "from infobatch_mm.diffusion import first_stage_training as training\n"
        "from infobatch_mm.diffusion.first_stage import fingerprint\n"
        "models, build = [], training.build_model\n"
        "training.build_model = lambda args: models.append(build(args)) or models[-1]\n"
        "train_autoencoder.main(sys.argv[1:])\n"
        "models[0].register_to_config(scaling_factor=1.0)\n"
        f"open({str(tmp_path)!r} + '/weights.' + os.environ['RANK'], 'w').write(fingerprint(models[0]))\n"
    )
    argv = [*flags(pictures, tmp_path / "vae", train_batch_size=4, max_train_steps=24), "--cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *accelerate_launch(), str(script), *argv],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    saved = load_first_stage(str(tmp_path / "vae"))
    assert saved.config.scaling_factor != 1.0
    saved.register_to_config(scaling_factor=1.0)
    assert {(tmp_path / f"weights.{rank}").read_text() for rank in range(2)} == {fingerprint(saved)}
    assert len(re.findall(r"^saved to ", done.stdout, re.MULTILINE)) == 1
