"""Latents that are encoded once: what they are, how they are shared out, and that no half of them is ever taken."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("torchvision")

from accelerate import Accelerator
from diffusers import AutoencoderKL, VQModel
from launching import forget_accelerators
from PIL import Image
from torch.utils.data import DataLoader

from infobatch_mm.diffusion import latents as module
from infobatch_mm.diffusion.first_stage import moments
from infobatch_mm.diffusion.image_checks import fingerprint_images
from infobatch_mm.diffusion.images import ImageFolder
from infobatch_mm.diffusion.latents import CachedLatents, cache_latents

IMAGES = 7


@pytest.fixture(autouse=True)
def no_accelerator_of_the_test_before() -> Iterator[None]:
    yield
    forget_accelerators()


def draw(folder: Path, count: int = IMAGES, width: int = 8, height: int = 8) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return draw(tmp_path / "images")


def first_stage(kind: type = VQModel, seed: int = 0) -> Any:
    """A tiny one, which halves images."""
    torch.manual_seed(seed)
    vae = kind(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=3,
        scaling_factor=0.5,
    )
    return vae.eval().requires_grad_(False)


def cache(images: ImageFolder, where: Path, vae: Any = None, **options: Any) -> CachedLatents:
    fingerprint = fingerprint_images(images)
    vae = first_stage() if vae is None else vae
    return cache_latents(images, fingerprint, vae, where, Accelerator(cpu=True), **{"batch_size": 3, **options})


# ---- what they are ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_latents_are_those_of_the_images(folder: Path, tmp_path: Path, workers: int) -> None:
    images = ImageFolder(folder, 8)
    vae = first_stage()
    cached = cache(images, tmp_path / "latents", vae, num_workers=workers)
    assert len(cached) == IMAGES and cached.names == images.names
    for i in range(IMAGES):
        latents = cached[i]["latents"]
        assert list(cached[i]) == ["latents"] and latents.dtype == torch.float32 and latents.shape == (3, 4, 4)
        expected, _ = moments(vae, images.fixed(i)[None])
        torch.testing.assert_close(latents, expected[0], atol=1e-5, rtol=1e-5)


def test_images_that_are_not_square_are_encoded_by_their_middle(tmp_path: Path) -> None:
    images = ImageFolder(draw(tmp_path / "images", 2, width=12), 8, center_crop=True)
    vae = first_stage()
    cached = cache(images, tmp_path / "latents", vae)
    expected, _ = moments(vae, images[1]["pixel_values"][None])
    torch.testing.assert_close(cached[1]["latents"], expected[0], atol=1e-5, rtol=1e-5)


def test_of_a_flipped_image_either_version_is_drawn_as_it_would_be_encoded(folder: Path, tmp_path: Path) -> None:
    images = ImageFolder(folder, 8, random_flip=True)
    vae = first_stage()
    cached = cache(images, tmp_path / "latents", vae)
    for i in range(IMAGES):
        plain, mirrored = moments(vae, torch.stack([images.fixed(i), images.fixed(i, flip=True)]))[0]
        # the encoder of a flipped image is not the flipped encoding: both versions must have been encoded
        assert not torch.allclose(mirrored, plain.flip(2), atol=1e-2)
        torch.manual_seed(i)
        drawn = [cached[i]["latents"] for _ in range(60)]
        first = sum(torch.allclose(each, plain, atol=1e-5) for each in drawn)
        second = sum(torch.allclose(each, mirrored, atol=1e-5) for each in drawn)
        assert first + second == 60 and 15 < first < 45


@pytest.mark.parametrize("flip", [False, True])
def test_samples_of_a_posterior_have_its_mean_and_spread(folder: Path, tmp_path: Path, flip: bool) -> None:
    images = ImageFolder(folder, 8, random_flip=flip)
    vae = first_stage(AutoencoderKL)
    cached = cache(images, tmp_path / "latents", vae)
    mean, spread = moments(vae, torch.stack([images.fixed(2, each) for each in (False, True)]))
    assert spread is not None
    torch.manual_seed(0)
    drawn = torch.stack([cached[2]["latents"] for _ in range(6000)])
    if flip:  # the mixture of both
        spread = ((spread**2 + mean**2).mean(0) - mean.mean(0) ** 2).sqrt()
        mean = mean.mean(0)
    else:
        mean, spread = mean[0], spread[0]
    # five standard errors
    torch.testing.assert_close(drawn.mean(0), mean, atol=5 * spread.max().item() / 6000**0.5, rtol=0)
    torch.testing.assert_close(drawn.std(0), spread, atol=0, rtol=0.07)
    assert not torch.equal(cached[2]["latents"], cached[2]["latents"])


def test_chance_is_torchs_and_encoding_draws_none(folder: Path, tmp_path: Path) -> None:
    images = ImageFolder(folder, 8, random_flip=True)
    vae = first_stage(AutoencoderKL)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    cached = cache(images, tmp_path / "latents", vae)
    assert torch.equal(torch.get_rng_state(), state)
    visits = []
    for _ in range(2):
        torch.manual_seed(4)
        visits.append(torch.stack([cached[i]["latents"] for i in range(IMAGES)]))
    assert torch.equal(*visits)


# ---- workers ----------------------------------------------------------------------------------------------


def test_workers_are_sent_no_copy_of_the_latents(tmp_path: Path) -> None:
    images = ImageFolder(draw(tmp_path / "images", 40), 8)
    cached = cache(images, tmp_path / "latents")
    before = cached[5]["latents"]
    sent = pickle.dumps(cached)
    stored = np.load(tmp_path / "latents/latents.npy", mmap_mode="r")
    assert len(sent) < stored.nbytes / 4
    assert torch.equal(pickle.loads(sent)[5]["latents"], before)


def test_two_workers_read_what_one_process_reads(folder: Path, tmp_path: Path) -> None:
    cached = cache(ImageFolder(folder, 8), tmp_path / "latents")
    expected = torch.stack([cached[i]["latents"] for i in range(IMAGES)])
    loader = DataLoader(cached, batch_size=2, num_workers=2)
    assert torch.equal(torch.cat([batch["latents"] for batch in loader]), expected)


# ---- a second run -----------------------------------------------------------------------------------------


def test_a_second_run_takes_up_the_first_ones(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = ImageFolder(folder, 8)
    first = cache(images, tmp_path / "latents")

    def encode(*_: Any) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(module, "moments", encode)
    second = cache(images, tmp_path / "latents")
    assert all(torch.equal(first[i]["latents"], second[i]["latents"]) for i in range(IMAGES))
    assert sorted(path.name for path in (tmp_path / "latents").iterdir()) == ["latents.json", "latents.npy"]


def _other_images(images: ImageFolder) -> tuple[ImageFolder, Any]:
    (images.root / "3.png").unlink()
    return ImageFolder(images.root, 8), first_stage()


@pytest.mark.parametrize(
    "change, name",
    [
        (_other_images, "images"),
        (_other_images, "num_images: 7 there, 6 here"),
        (lambda images: (images, first_stage(seed=1)), "first_stage"),
        (lambda images: (ImageFolder(images.root, 16), first_stage()), "resolution: 8 there, 16 here"),
        (
            lambda images: (ImageFolder(images.root, 8, random_flip=True), first_stage()),
            "random_flip: False there, True here",
        ),
    ],
    ids=["images", "number", "first stage", "resolution", "flip"],
)
def test_latents_of_something_else_are_refused_and_kept(folder: Path, tmp_path: Path, change: Any, name: str) -> None:
    where = tmp_path / "latents"
    images = ImageFolder(folder, 8)
    cache(images, where)
    before = (where / "latents.npy").read_bytes()
    other, vae = change(images)
    with pytest.raises(ValueError, match="holds the latents of something else") as caught:
        cache(other, where, vae)
    assert name in str(caught.value) and str(where) in str(caught.value)
    assert "delete it, or name another --latents_dir" in str(caught.value)
    assert (where / "latents.npy").read_bytes() == before


def test_latents_of_another_version_are_refused(folder: Path, tmp_path: Path) -> None:
    images = ImageFolder(folder, 8)
    cache(images, tmp_path / "latents")
    about = tmp_path / "latents/latents.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "version": 99}))
    with pytest.raises(ValueError, match="version: 99 there, 1 here"):
        cache(images, tmp_path / "latents")


def _shorten(where: Path) -> None:
    whole = (where / "latents.npy").read_bytes()
    (where / "latents.npy").write_bytes(whole[: len(whole) - 100])


def _remove(where: Path) -> None:
    (where / "latents.npy").unlink()


def _another_shape(where: Path) -> None:
    np.save(where / "latents.npy", np.zeros((IMAGES, 1, 3, 2, 2), np.float32))


def _half_a_description(where: Path) -> None:
    whole = (where / "latents.json").read_text()
    (where / "latents.json").write_text(whole[: len(whole) // 2])


def _empty(where: Path) -> None:
    (where / "latents.npy").write_bytes(b"")


def _no_latents(where: Path) -> None:
    np.savez(where / "latents", np.zeros(3))
    (where / "latents.npz").rename(where / "latents.npy")


def _no_description(where: Path) -> None:
    (where / "latents.json").write_text("null")


@pytest.mark.parametrize(
    "damage", [_shorten, _remove, _another_shape, _half_a_description, _empty, _no_latents, _no_description]
)
def test_damaged_latents_are_refused_by_name(folder: Path, tmp_path: Path, damage: Any) -> None:
    images = ImageFolder(folder, 8)
    cache(images, tmp_path / "latents")
    damage(tmp_path / "latents")
    with pytest.raises(ValueError, match=rf"latents\.(npy|json).*delete .*{tmp_path.name}"):
        cache(images, tmp_path / "latents")


def test_random_crops_are_refused_with_the_size_and_the_advice(tmp_path: Path) -> None:
    images = ImageFolder(draw(tmp_path / "images", 2, width=12), 8)
    with pytest.raises(ValueError, match=r"the images are 12x8: .*--center_crop"):
        cache(images, tmp_path / "latents")
    assert not (tmp_path / "latents").exists()


# ---- full disks and kills ---------------------------------------------------------------------------------


def test_a_full_disk_is_noticed_before_anything_is_encoded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ValueError, match=r"cannot write the latents, .* GiB, to .*No space left.*--latents_dir"):
        cache(ImageFolder(folder, 8), tmp_path / "latents")
    assert not list((tmp_path / "latents").iterdir())  # nothing of it stays in the way
    monkeypatch.undo()
    assert len(cache(ImageFolder(folder, 8), tmp_path / "latents")) == IMAGES


def test_one_run_at_a_time_encodes_into_a_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one would empty the file of the first, which would train on what is left."""
    images, where, fixed = ImageFolder(folder, 8), tmp_path / "latents", ImageFolder.fixed
    refused = []

    def fixed_while_another_begins(self: ImageFolder, index: int, flip: bool = False) -> torch.Tensor:
        if index == 4:
            with monkeypatch.context() as patched, pytest.raises(ValueError) as caught:
                patched.setattr(ImageFolder, "fixed", fixed)
                cache(images, where)
            refused.append(str(caught.value))
        return fixed(self, index, flip)

    vae = first_stage()
    monkeypatch.setattr(ImageFolder, "fixed", fixed_while_another_begins)
    cached = cache(images, where, vae)
    assert refused == [f"another run encodes into {where} now: wait until it has, or name another --latents_dir"]
    for i in (0, IMAGES - 1):
        torch.testing.assert_close(cached[i]["latents"], moments(vae, fixed(images, i)[None])[0][0])


def test_an_image_that_breaks_meanwhile_leaves_nothing_whole(folder: Path, tmp_path: Path) -> None:
    images = ImageFolder(folder, 8)
    fingerprint = fingerprint_images(images)
    whole = (folder / "5.png").read_bytes()
    (folder / "5.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot read the image 5\.png"):
        cache_latents(images, fingerprint, first_stage(), tmp_path / "latents", Accelerator(cpu=True))
    assert not (tmp_path / "latents/latents.json").exists()
    (folder / "5.png").write_bytes(whole)
    assert cache(images, tmp_path / "latents")[5]["latents"].any()


def test_a_place_that_cannot_be_written_to_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "latents").write_text("a file")
    with pytest.raises(ValueError, match=r"latents.*--latents_dir"):
        cache(ImageFolder(folder, 8), tmp_path / "latents")


@pytest.mark.parametrize("at", ["first image", "last image", "renamed", "described"])
def test_a_kill_leaves_nothing_that_is_taken_for_whole(folder: Path, tmp_path: Path, at: str) -> None:
    images = ImageFolder(folder, 8)
    where = tmp_path / "latents"
    child = os.fork()
    if child == 0:
        _encode_until(at, images, where)
        os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert where.is_dir() and not (where / "latents.json").exists()

    vae = first_stage()
    cached = cache(images, where, vae)
    for i in range(IMAGES):
        expected, _ = moments(vae, images.fixed(i)[None])
        torch.testing.assert_close(cached[i]["latents"], expected[0], atol=1e-5, rtol=1e-5)
    assert sorted(path.name for path in where.iterdir()) == ["latents.json", "latents.npy"]


def _encode_until(at: str, images: ImageFolder, where: Path) -> None:
    """In a process of its own: encode, and be killed."""

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    fixed, replace = ImageFolder.fixed, os.replace

    def fixed_until(self: ImageFolder, index: int, flip: bool = False) -> torch.Tensor:
        if index == {"first image": 0, "last image": IMAGES - 1}.get(at):
            kill()
        return fixed(self, index, flip)

    def replace_until(source: Any, target: Any) -> None:
        if at == "described" and str(target).endswith("latents.json"):
            kill()
        replace(source, target)
        if at == "renamed":
            kill()

    ImageFolder.fixed = fixed_until  # type: ignore[method-assign]
    os.replace = replace_until  # type: ignore[assignment]
    cache(images, where)


# ---- several processes ------------------------------------------------------------------------------------


def _one_of_two(rank: int, folder: Path, where: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{where.parent / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # asked for by accelerate, the group is there
    images = ImageFolder(folder, 8, random_flip=True)
    cached = cache(images, where)
    read = [cached[i]["latents"].shape for i in range(IMAGES)]
    try:
        cache(images, where, first_stage(seed=1))
        error = None
    except ValueError as refusal:
        error = str(refusal)
    (where.parent / f"found.{rank}").write_bytes(pickle.dumps((read, error)))
    torch.distributed.destroy_process_group()


@pytest.mark.dist
def test_two_processes_encode_what_one_encodes_and_refuse_the_same(folder: Path, tmp_path: Path) -> None:
    arguments = (folder, tmp_path / "latents")
    torch.multiprocessing.start_processes(_one_of_two, arguments, nprocs=2, start_method="fork")
    found = [pickle.loads((tmp_path / f"found.{rank}").read_bytes()) for rank in range(2)]
    assert found[0] == found[1]
    assert found[0][0] == [(3, 4, 4)] * IMAGES and "first_stage" in found[0][1]
    cache(ImageFolder(folder, 8, random_flip=True), tmp_path / "alone")
    both, alone = (np.load(tmp_path / name / "latents.npy") for name in ("latents", "alone"))
    np.testing.assert_allclose(both, alone, atol=1e-5, rtol=1e-5)  # batches of other images


def _with_a_folder_of_its_own(rank: int, folder: Path, root: Path, has_cache: int) -> None:
    """One of two processes, each of which sees another folder by the name that both are given."""
    torch.set_num_threads(1)
    images = ImageFolder(folder, 8)
    own = root / f"disk.{rank}"
    if rank == has_cache:
        cache(images, own)
        forget_accelerators()
    torch.distributed.init_process_group("gloo", init_method=f"file://{root / 'store'}", rank=rank, world_size=2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    module._PATIENCE_S = 0.2
    if has_cache == 2 and rank == 1:

        def breaks(self: ImageFolder, index: int, flip: bool = False) -> torch.Tensor:
            raise OSError("the disk of process 1 is gone")

        ImageFolder.fixed = breaks  # type: ignore[method-assign]
    try:
        told = str(len(cache(images, root / "disk.0" if has_cache == 2 else own)))
    except ValueError as error:
        told = str(error)
    # Whatever it was, both go on to the next collective together.
    torch.distributed.barrier()
    (root / f"told.{rank}").write_text(told)
    torch.distributed.destroy_process_group()


@pytest.mark.dist
@pytest.mark.parametrize(
    ("has_cache", "message"),
    [
        (0, "process 1 does not see the latents that process 0 has in"),
        (1, "process 1 does not see the latents that process 0 has in"),
        (2, "the disk of process 1 is gone"),  # neither has one, and one of them fails to encode
    ],
)
def test_what_one_process_sees_alone_is_refused_on_both(
    folder: Path, tmp_path: Path, has_cache: int, message: str
) -> None:
    root = tmp_path / "disks"
    root.mkdir()
    context = torch.multiprocessing.start_processes(
        _with_a_folder_of_its_own, (folder, root, has_cache), nprocs=2, start_method="fork", join=False
    )
    try:
        end = time.monotonic() + 60
        while not context.join(timeout=1):  # which tells of one process after the other
            assert time.monotonic() < end, "the processes wait for each other"
    finally:
        for process in context.processes:
            process.terminate()
    told = [(root / f"told.{rank}").read_text() for rank in range(2)]
    assert told[0] == told[1] and message in told[0]


def test_a_first_stage_that_gives_nan_is_refused(folder: Path, tmp_path: Path) -> None:
    vae = first_stage()
    vae.quant_conv.bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"the latents of 0\.png are not finite"):
        cache(ImageFolder(folder, 8), tmp_path / "latents", vae)
    assert not (tmp_path / "latents" / "latents.json").exists()
