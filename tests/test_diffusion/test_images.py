"""Images as they are trained on, and what is found out about them before."""

from __future__ import annotations

import importlib.util
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("torchvision")

from PIL import Image

from infobatch_mm.core.distributed import gather, raise_together
from infobatch_mm.diffusion.image_checks import check_images, fingerprint_images
from infobatch_mm.diffusion.images import HubImages, ImageFolder, image_extensions


def draw(path: Path, width: int = 8, height: int = 8, seed: int = 0, mode: str = "RGB", **options: Any) -> Path:
    """A picture of noise, so that none looks like another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures of 8 x 8 at two depths."""
    for seed, name in enumerate(("b/1.png", "b/0.png", "a.PNG", "c/d/2.bmp", "z.webp")):
        draw(tmp_path / "images" / name, seed=seed, **({"lossless": True} if name.endswith("webp") else {}))
    (tmp_path / "images/notes.txt").write_text("no image")
    return tmp_path / "images"


# ---- what is read -----------------------------------------------------------------------------------------


def test_all_images_below_a_folder_come_in_the_order_of_their_names(folder: Path) -> None:
    assert ImageFolder(folder, 8).names == ["a.PNG", "b/0.png", "b/1.png", "c/d/2.bmp", "z.webp"]


def test_folders_that_are_linked_into_it_belong_to_a_folder(folder: Path, tmp_path: Path) -> None:
    draw(tmp_path / "elsewhere/1.png")
    (folder / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert ImageFolder(folder, 8).names[-2:] == ["linked/1.png", "z.webp"]


def test_an_item_holds_the_pixels_between_minus_one_and_one(folder: Path) -> None:
    item = ImageFolder(folder, 8)[1]
    pixels = np.asarray(Image.open(folder / "b/0.png"), dtype=np.float64)
    assert list(item) == ["pixel_values"]
    assert item["pixel_values"].dtype == torch.float32
    expected = torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)
    torch.testing.assert_close(item["pixel_values"].double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA"])
def test_images_of_any_kind_come_in_rgb(tmp_path: Path, mode: str) -> None:
    draw(tmp_path / "images/0.png", mode=mode)
    expected = np.asarray(Image.open(tmp_path / "images/0.png").convert("RGB")).transpose(2, 0, 1)
    pixels = ImageFolder(tmp_path / "images", 8)[0]["pixel_values"]
    assert np.array_equal(((pixels + 1) * 127.5).round().numpy(), expected)


def test_greys_of_sixteen_bits_keep_their_shades(tmp_path: Path) -> None:
    shades = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    (tmp_path / "images").mkdir()
    Image.fromarray(shades).save(tmp_path / "images/0.png")
    pixels = ImageFolder(tmp_path / "images", 8)[0]["pixel_values"]
    expected = torch.from_numpy(shades / 32767.5 - 1).float().expand(3, 8, 8)
    torch.testing.assert_close(pixels, expected, atol=1 / 127, rtol=0)


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    path = draw(tmp_path / "images/0.png", 8, 16, exif=exif)
    images = ImageFolder(tmp_path / "images", 8)
    assert images.picture(0).size == (16, 8)
    assert np.array_equal(np.asarray(images.picture(0)), np.rot90(np.asarray(Image.open(path)), -1))


def test_an_item_is_what_the_transforms_of_diffusers_examples_make_of_it(tmp_path: Path) -> None:
    from torchvision import transforms

    path = draw(tmp_path / "images/0.png", 50, 33)
    images = ImageFolder(tmp_path / "images", 16, random_flip=True)
    centered = ImageFolder(tmp_path / "images", 16, center_crop=True, random_flip=True)
    for data, crop in ((images, transforms.RandomCrop(16)), (centered, transforms.CenterCrop(16))):
        example = transforms.Compose(
            [
                transforms.Resize(16, interpolation=transforms.InterpolationMode.BILINEAR),
                crop,
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize([0.5], [0.5]),
            ]
        )
        for seed in range(6):
            torch.manual_seed(seed)
            expected = example(Image.open(path).convert("RGB"))
            torch.manual_seed(seed)
            torch.testing.assert_close(data[0]["pixel_values"], expected, atol=1e-6, rtol=0)


def test_random_crops_and_flips_differ_from_visit_to_visit(tmp_path: Path) -> None:
    draw(tmp_path / "images/0.png", 32, 8)

    def variety(**options: bool) -> int:
        images = ImageFolder(tmp_path / "images", 8, **options)
        return len({images[0]["pixel_values"].numpy().tobytes() for _ in range(40)})

    torch.manual_seed(0)
    assert variety() > 5
    assert variety(center_crop=True) == 1
    assert variety(center_crop=True, random_flip=True) == 2


def test_an_image_without_chance_is_the_middle_and_its_mirror_image(tmp_path: Path) -> None:
    draw(tmp_path / "images/0.png", 32, 8)
    images = ImageFolder(tmp_path / "images", 8, random_flip=True)
    state = torch.get_rng_state()
    plain = images.fixed(0)
    assert torch.equal(images.fixed(0), plain)
    assert torch.equal(plain, ImageFolder(tmp_path / "images", 8, center_crop=True)[0]["pixel_values"])
    assert torch.equal(images.fixed(0, flip=True), plain.flip(2))
    assert torch.equal(torch.get_rng_state(), state)


def test_images_can_be_sent_to_workers(folder: Path) -> None:
    for flip in (False, True):
        images = ImageFolder(folder, 8, center_crop=True, random_flip=flip)
        assert torch.equal(pickle.loads(pickle.dumps(images)).fixed(2), images.fixed(2))


# ---- what is refused --------------------------------------------------------------------------------------


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        ImageFolder(tmp_path / "nowhere", 8)


def test_a_folder_without_images_is_refused_with_the_endings_that_are_read(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"holds no images: .*\.jpg.*\.png"):
        ImageFolder(tmp_path, 8)
    assert {".jpg", ".jpeg", ".png", ".webp", ".bmp"} <= image_extensions()
    assert ".pdf" not in image_extensions()  # Pillow writes but cannot read it


def test_a_resolution_that_is_none_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="resolution=0"):
        ImageFolder(folder, 0)


def test_whole_images_of_one_size_pass_the_check(folder: Path) -> None:
    check_images(ImageFolder(folder, 8))


def test_damaged_images_are_counted_and_the_first_named(folder: Path) -> None:
    for i in range(3):
        whole = draw(folder / f"broken/{i}.png", 64, 64, seed=i).read_bytes()
        (folder / f"broken/{i}.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match=r"5 of 10 images cannot be read: .*") as caught:
        check_images(ImageFolder(folder, 8))
    message = str(caught.value)
    assert all(f"broken/{i}.png (" in message for i in range(3))
    assert "empty.jpg" not in message and "; ...; remove or replace them" in message


def test_all_damaged_images_are_named_where_they_are_few(folder: Path) -> None:
    (folder / "text.jpg").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match=r"1 of 6 images cannot be read: text.jpg \(cannot identify") as caught:
        check_images(ImageFolder(folder, 8))
    assert "..." not in str(caught.value)


def test_an_image_that_breaks_while_it_is_trained_on_is_named(folder: Path) -> None:
    images = ImageFolder(folder, 8)
    (folder / "b/0.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot read the image b/0\.png"):
        images[1]


def test_mixed_sizes_are_refused_with_both_unless_the_middle_is_taken(folder: Path) -> None:
    draw(folder / "b/wide.png", 9, 8)
    with pytest.raises(ValueError, match=r"a.PNG is 8x8, b/wide.png is 9x8: pass --center_crop"):
        check_images(ImageFolder(folder, 8))
    check_images(ImageFolder(folder, 8, center_crop=True))


# ---- fingerprints -----------------------------------------------------------------------------------------


def _changes(folder: Path) -> dict[str, Any]:
    big = draw(folder / "big.bmp", 64, 64)  # 12 KiB: its blocks do not touch
    size = big.stat().st_size

    def overwrite(at: int) -> None:
        with big.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)
            file.seek(at)
            file.write(bytes([byte[0] ^ 1]))

    return {
        "start": lambda: overwrite(60),
        "middle": lambda: overwrite(size // 2),
        "end": lambda: overwrite(size - 1),
        "longer": lambda: big.open("ab").write(b"\0"),
        "renamed": lambda: big.rename(folder / "b/big.bmp"),
        "one more": lambda: draw(folder / "y.png"),
        "one less": lambda: (folder / "a.PNG").unlink(),
        "swapped": lambda: _swap(folder / "b/0.png", folder / "b/1.png"),
    }


def _swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


@pytest.mark.parametrize("change", ["start", "middle", "end", "longer", "renamed", "one more", "one less", "swapped"])
def test_a_fingerprint_tells_when_images_changed(folder: Path, change: str) -> None:
    changes = _changes(folder)
    before = fingerprint_images(ImageFolder(folder, 8))
    assert fingerprint_images(ImageFolder(folder, 16, True, True)) == before  # of the files, however they are read
    assert len(before) == 32 and int(before, 16) >= 0
    changes[change]()
    assert fingerprint_images(ImageFolder(folder, 8)) != before


def test_a_fingerprint_tells_when_a_file_has_another_size_alone(folder: Path) -> None:
    prints = set()
    for size in (20000, 20001):
        (folder / "black.bmp").write_bytes(bytes(size))  # it is equal wherever it is looked at
        prints.add(fingerprint_images(ImageFolder(folder, 8)))
    assert len(prints) == 2


def test_a_fingerprint_does_not_depend_on_where_the_folder_is(folder: Path, tmp_path: Path) -> None:
    before = fingerprint_images(ImageFolder(folder, 8))
    folder.rename(tmp_path / "elsewhere")
    assert fingerprint_images(ImageFolder(tmp_path / "elsewhere", 8)) == before


def test_a_file_that_vanished_is_no_fingerprint(folder: Path) -> None:
    images = ImageFolder(folder, 8)
    (folder / "a.PNG").unlink()
    with pytest.raises(ValueError, match=r"cannot read the images: .*a.PNG"):
        fingerprint_images(images)


# ---- data sets of the hub ---------------------------------------------------------------------------------


def test_a_data_set_of_the_hub_gives_what_a_folder_gives(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (folder / "notes.txt").unlink()
    hub = HubImages(str(folder), 8, random_flip=True, cache_dir=str(tmp_path / "cache"))
    local = ImageFolder(folder, 8, random_flip=True)
    assert len(hub) == len(local) and hub.names == [str(i) for i in range(5)]
    check_images(hub)
    assert fingerprint_images(hub) == fingerprint_images(pickle.loads(pickle.dumps(hub)))

    def contents(images: Any) -> set[bytes]:
        return {images.fixed(i, flip=True).numpy().tobytes() for i in range(len(images))}

    assert contents(hub) == contents(local)
    torch.manual_seed(0)
    assert hub[0]["pixel_values"].shape == (3, 8, 8)


def test_what_the_hub_does_not_have_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cache = str(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"cannot load the split 'train' of the data set '.*nowhere'.*local directory"):
        HubImages(str(tmp_path / "nowhere"), 8, cache_dir=cache)
    with pytest.raises(ValueError, match="cannot load the split 'test'"):
        HubImages(str(folder), 8, split="test", cache_dir=cache)
    with pytest.raises(ValueError, match=r"meant by 'photo': its columns are .*image"):
        HubImages(str(folder), 8, column="photo", cache_dir=cache)


def test_the_one_column_of_images_is_found_and_one_of_two_is_asked_for(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    paths = [str(draw(tmp_path / f"{seed}.png", seed=seed)) for seed in range(2)]
    kinds = datasets.Features({"number": datasets.Value("int64"), "one": datasets.Image(), "two": datasets.Image()})
    table = {"number": [0], "one": [paths[0]], "two": [paths[1]]}
    for name, columns in (("single", ["number", "two"]), ("double", ["number", "one", "two"])):
        (tmp_path / name).mkdir()
        features = datasets.Features({column: kinds[column] for column in columns})
        data = datasets.Dataset.from_dict({column: table[column] for column in columns}, features=features)
        data.to_parquet(tmp_path / name / "train.parquet")
    cache = str(tmp_path / "cache")
    expected = ImageFolder(tmp_path, 8)
    assert torch.equal(HubImages(str(tmp_path / "single"), 8, cache_dir=cache).fixed(0), expected.fixed(1))
    assert torch.equal(
        HubImages(str(tmp_path / "double"), 8, column="one", cache_dir=cache).fixed(0), expected.fixed(0)
    )
    with pytest.raises(ValueError, match="meant by None: its columns are number, one, two, those of images one, two"):
        HubImages(str(tmp_path / "double"), 8, cache_dir=cache)


def test_a_row_without_an_image_is_refused(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image()})
    data = datasets.Dataset.from_dict({"image": [str(draw(tmp_path / "0.png")), None]}, features=features)
    (tmp_path / "data").mkdir()
    data.to_parquet(tmp_path / "data/train.parquet")
    images = HubImages(str(tmp_path / "data"), 8, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="1 of 2 images cannot be read: 1 "):
        check_images(images)
    with pytest.raises(ValueError, match="cannot read the images"):
        fingerprint_images(images)


def test_a_hub_out_of_reach_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    begun = time.monotonic()
    with pytest.raises(ValueError, match=r"'nobody/nothing'.*must be reachable or in the cache already"):
        HubImages("nobody/nothing", 8, cache_dir=str(tmp_path))
    assert time.monotonic() - begun < 5


def test_without_datasets_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'infobatch_mm\[diffusers\]'"):
        HubImages(str(folder), 8)


def test_without_torchvision_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    found = importlib.util.find_spec("infobatch_mm.diffusion.images")
    assert found is not None and found.loader is not None
    with pytest.raises(ImportError, match=r"pip install 'infobatch_mm\[diffusers\]'"):
        found.loader.exec_module(importlib.util.module_from_spec(found))


# ---- several processes ------------------------------------------------------------------------------------


def _one_of_two(rank: int, folder: Path) -> None:
    """What a process finds, written down beside the folder: never are the processes left waiting for each other."""
    torch.set_num_threads(1)
    store = f"file://{folder.parent / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    found: list[Any] = [gather(rank)]
    images = ImageFolder(folder, 8)
    check_images(images)
    found.append(fingerprint_images(images))
    torch.distributed.barrier()
    if rank == 0:  # the fourth in the order of names: the other process's share
        draw(folder / "b/2.png", 16, 8)
    torch.distributed.barrier()
    found.append(_error(lambda: check_images(ImageFolder(folder, 8))))
    torch.distributed.barrier()
    if rank == 0:
        (folder / "b/2.png").write_bytes(b"")
    torch.distributed.barrier()
    found.append(_error(lambda: check_images(ImageFolder(folder, 8))))
    found.append(_error(lambda: raise_together(f"process {rank}" if rank == 1 else None)))
    (folder.parent / f"found.{rank}").write_bytes(pickle.dumps(found))
    torch.distributed.destroy_process_group()


def _error(function: Any) -> str | None:
    try:
        function()
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.dist
def test_two_processes_share_the_check_and_raise_the_same(folder: Path, tmp_path: Path) -> None:
    alone = fingerprint_images(ImageFolder(folder, 8))
    torch.multiprocessing.start_processes(_one_of_two, (folder,), nprocs=2, start_method="fork")
    one, other = (pickle.loads((tmp_path / f"found.{rank}").read_bytes()) for rank in range(2))
    assert one == other
    ranks, both, sizes, damage, raised = one
    assert ranks == [0, 1] and both == alone and raised == "process 1"
    assert sizes is not None and "a.PNG is 8x8, b/2.png is 16x8" in sizes
    assert damage is not None and damage.startswith("1 of 6 images cannot be read: b/2.png (")
