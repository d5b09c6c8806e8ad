"""Latents of a whole data set, encoded once: the first stage is frozen, so that they never change."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import VQModel
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..core.distributed import gather, raise_together
from ..core.summary import differences
from .first_stage import FirstStage, fingerprint, latent_shape, moments
from .images import Images

try:
    import fcntl
except ImportError:  # not on Unix
    fcntl = None  # type: ignore[assignment]

#: Version of the files.
_VERSION = 1
_LATENTS, _ABOUT = "latents.npy", "latents.json"
#: Seconds after which a file that another process has made counts as not to be seen.
_PATIENCE_S = 5.0


class CachedLatents(Dataset):
    """Latents in a memory-mapped file, as :func:`cache_latents` leaves them.

    Items have ``latents``, shape ``(C, h, w)``, float32, scaled: of the image or, at random, of its mirror image where
    the images are flipped; drawn from the posterior where the first stage has one. Chance is torch's, as it is in
    transforms of images.

    Args:
        cache_dir (str | Path): Where the files are.
        names (list[str]): Names of the images.

    Attributes:
        names (list[str]): Names of the images.
    """

    def __init__(self, cache_dir: str | Path, names: list[str]) -> None:
        self.names = names
        self._path = Path(cache_dir, _LATENTS)
        self._has_spread = bool(json.loads(Path(cache_dir, _ABOUT).read_text())["has_spread"])
        self._stored: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if self._stored is None:  # each worker process maps the file itself
            self._stored = np.load(self._path, mmap_mode="r")
        versions = self._stored.shape[1]
        # Also where a script has set another default dtype or device.
        flip = int(torch.rand((), dtype=torch.float32, device="cpu") < 0.5) if versions == 2 else 0
        stored = torch.from_numpy(self._stored[index, flip].copy())
        if not self._has_spread:
            return {"latents": stored}
        mean, std = stored.chunk(2)
        return {"latents": mean + std * torch.randn_like(std)}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stored": None}


def cache_latents(
    images: Images,
    images_fingerprint: str,
    vae: FirstStage,
    cache_dir: str | Path,
    accelerator: Accelerator,
    batch_size: int = 16,
    num_workers: int = 0,
) -> CachedLatents:
    """Encode a data set once, or take up what was encoded before; every process must call it, and encodes its share.

    The file is ``N * F * C * h * w * 4`` bytes, F being 2 where images are flipped, and twice that where the first
    stage has a posterior.

    Args:
        images (Images): The images; their flips are encoded too if they are flipped at random.
        images_fingerprint (str): As of :func:`.fingerprint_images`.
        vae (VQModel | AutoencoderKL): The first stage, on the accelerator's device.
        cache_dir (str | Path): Where the files are to be, seen by all processes.
        accelerator (Accelerator): The run's.
        batch_size (int): Images encoded at once. Defaults to 16.
        num_workers (int): Worker processes that read images. Defaults to 0.

    Returns:
        CachedLatents: The latents.

    Raises:
        ValueError: On every process: if the folder holds latents of other images, or of another first stage,
            resolution or flip; if another run encodes into it; if random parts of images are asked for, which no
            cache can hold; if the disk is full.
    """
    folder = Path(cache_dir)
    raise_together(_problem(lambda: _check_crops(images)))
    about = {
        "version": _VERSION,
        "images": images_fingerprint,
        "num_images": len(images),
        "first_stage": fingerprint(vae),
        "resolution": images.resolution,
        "random_flip": images.random_flip,
    }
    # The main process decides for all: where a shared disk shows processes different files, some would encode, and wait
    # for others that do not. What each sees itself is checked in the end.
    error, is_there = gather((_differs(folder, about), _is_whole(folder)))[0]
    raise_together(error)
    if not is_there:
        _encode(images, vae, folder, about, accelerator, batch_size, num_workers)
    is_seen = _appears(folder / _ABOUT)
    raise_together(_differs(folder, about) if is_seen else _unseen(folder, accelerator))
    return CachedLatents(folder, images.names)


def _problem(check: Callable[[], Any]) -> str | None:
    """The message of a check that fails on this process, to be raised on all of them; None if it passes."""
    try:
        check()
    except Exception as error:  # whatever it is, the other processes must not be left waiting
        return str(error)
    return None


def _appears(path: Path) -> bool:
    """Whether a file that another process has made is there: on shared disks it may take a moment."""
    end = time.monotonic() + _PATIENCE_S
    while not path.is_file():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _unseen(folder: Path, accelerator: Accelerator) -> str:
    return (
        f"process {accelerator.process_index} does not see the latents that process 0 has in {folder}: name a "
        "--latents_dir that all processes share"
    )


def _check_crops(images: Images) -> None:
    if images.center_crop:
        return
    width, height = images.picture(0).size  # all are of one size, or check_images has refused them
    if width != height:
        raise ValueError(
            f"the images are {width}x{height}: of each visit another part would be cropped, which a cache cannot hold; "
            "pass --center_crop, or do without --cache_latents"
        )


def _differs(folder: Path, about: Mapping[str, Any]) -> str | None:
    """Why a cache that is there cannot be used; None if it can, or if there is none."""
    try:
        found = dict(json.loads((folder / _ABOUT).read_text()))
    except FileNotFoundError:
        return None
    except (OSError, TypeError, ValueError) as error:
        return f"cannot read {folder / _ABOUT}: {error}; delete {folder}, or name another --latents_dir"
    if differ := differences(found, about):
        return f"{folder} holds the latents of something else ({differ}): delete it, or name another --latents_dir"
    if not _is_whole(folder):
        return f"{folder / _LATENTS} is not what {_ABOUT} beside it says: delete {folder}"
    return None


def _is_whole(folder: Path) -> bool:
    """Whether a cache is there and was finished: its description is written last."""
    try:
        shape = json.loads((folder / _ABOUT).read_text())["shape"]
        return list(np.lib.format.open_memmap(folder / _LATENTS, mode="r").shape) == shape
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _encode(
    images: Images,
    vae: FirstStage,
    folder: Path,
    about: dict[str, Any],
    accelerator: Accelerator,
    batch_size: int,
    num_workers: int,
) -> None:
    """Encode all images, each process its share, into a file that gets its name when it is whole."""
    partial = folder / f"{_LATENTS}.partial"
    channels, height, width = latent_shape(vae, images.resolution)
    has_spread = not isinstance(vae, VQModel)
    flips = (False, True) if images.random_flip else (False,)
    shape = (len(images), len(flips), channels * (1 + has_spread), height, width)
    lock, error = _allocated(partial, shape) if accelerator.is_main_process else (None, None)
    raise_together(error)
    raise_together(None if _appears(partial) else _unseen(folder, accelerator))
    unusable: list[str] = []

    def encode_own() -> None:
        stored = np.lib.format.open_memmap(partial, mode="r+")
        mine = range(accelerator.process_index, len(images), accelerator.num_processes)
        own = torch.Generator()  # reading them draws nothing from the global one
        loader = DataLoader(_Fixed(images, mine, flips), batch_size, num_workers=num_workers, generator=own)
        for indices, pixels in tqdm(loader, "encoding", disable=not accelerator.is_local_main_process):
            for version in range(len(flips)):
                mean, std = moments(vae, pixels[:, version].to(accelerator.device))
                encoded = mean if std is None else torch.cat([mean, std], dim=1)
                stored[indices.numpy(), version] = encoded.float().cpu().numpy()
                if not encoded.isfinite().all():
                    unusable.append(images.names[int(indices[~encoded.flatten(1).isfinite().all(1).cpu()][0])])
        stored.flush()

    error = _problem(encode_own)
    if unusable:
        error = f"the latents of {unusable[0]} are not finite: the first stage is damaged, or of too low a precision"
    raise_together(error)
    if accelerator.is_main_process:
        description = {**about, "has_spread": has_spread, "shape": shape}
        error = _problem(lambda: _publish(partial, folder, description))
    if lock is not None:
        lock.close()
    raise_together(error)


def _allocated(path: Path, shape: tuple[int, ...]) -> tuple[IO[bytes] | None, str | None]:
    """Make the file of latents, locked; or say why that cannot be done."""
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)  # before the file is emptied: another run may be writing into it
        _reserve(path, shape)
        return lock, None
    except BlockingIOError:
        return None, f"another run encodes into {folder} now: wait until it has, or name another --latents_dir"
    except OSError as problem:
        gib = np.prod(shape, dtype=float) * 4 / 2**30
        if folder.is_dir():
            path.unlink(missing_ok=True)  # the disk is full enough
        return None, f"cannot write the latents, {gib:.2f} GiB, to {folder}: {problem}; name another --latents_dir"


def _publish(partial: Path, folder: Path, description: dict[str, Any]) -> None:
    """Rename finished latents, and write their description last: a cache without one counts as half-written."""
    os.replace(partial, folder / _LATENTS)
    unnamed = folder / f"{_ABOUT}.partial"
    unnamed.write_text(json.dumps(description, indent=2) + "\n")
    os.replace(unnamed, folder / _ABOUT)


def _lock(path: Path) -> IO[bytes]:
    """Open the file, locked until it is closed or this process dies: another run would empty it while we write."""
    file = path.open("ab")
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def _reserve(path: Path, shape: tuple[int, ...]) -> None:
    """Allocate the whole file first: a memory-mapped write to a full disk kills the process."""
    np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape).flush()
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


class _Fixed(Dataset):
    """Indices, and images without chance: shape ``(F, 3, R, R)``, as they are and mirrored."""

    def __init__(self, images: Images, indices: range, flips: tuple[bool, ...]) -> None:
        self.images = images
        self.indices = indices
        self.flips = flips

    def __getitem__(self, position: int) -> tuple[int, Tensor]:
        index = self.indices[position]
        return index, torch.stack([self.images.fixed(index, flip) for flip in self.flips])

    def __len__(self) -> int:
        return len(self.indices)
