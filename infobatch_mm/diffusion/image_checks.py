"""Look at all images before a training: whether each can be read, and a fingerprint of the whole set."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import TypeVar

from ..core.distributed import gather, raise_together, rank, world_size
from .images import Images

T = TypeVar("T")

#: Bytes of each of the three parts of a file that its fingerprint looks at.
_BLOCK = 4096
#: An error lists at most so many names.
_NAMED = 3


def check_images(images: Images) -> None:
    """Decode every image once, before training; every process must call it, and takes its share.

    Raises:
        ValueError: On every process: if images cannot be read, or if they differ in size although a random part of
            each would be cropped.
    """
    mine = range(rank(), len(images), world_size())
    sizes: dict[tuple[int, int], int] = {}  # and the first image of each
    broken: list[tuple[int, str]] = []
    for index, found in zip(mine, _in_threads(lambda index: _size(images, index), mine), strict=True):
        if isinstance(found, str):
            broken.append((index, found))
        else:
            sizes.setdefault(found, index)
    # Refuse after the gathering, in the order of the images: a process that raised alone would leave the others waiting
    # for it, and each would name other images.
    everyones = gather((sizes, broken))
    broken = sorted(entry for _, part in everyones for entry in part)
    if broken:
        raise ValueError(
            f"{len(broken)} of {len(images)} images cannot be read: "
            + "; ".join(message for _, message in broken[:_NAMED])
            + ("; ..." if len(broken) > _NAMED else "")
            + "; remove or replace them"
        )
    if not images.center_crop:
        firsts = sorted((index, size) for part, _ in everyones for size, index in part.items())
        (one, size), *others = firsts
        for other, another in others:
            if another != size:
                raise ValueError(
                    f"the images differ in size: {images.names[one]} is {size[0]}x{size[1]}, {images.names[other]} is "
                    f"{another[0]}x{another[1]}: pass --center_crop to train on the middle of each, or bring them to "
                    "one size"
                )


def fingerprint_images(images: Images) -> str:
    """Identify a set of images by names, sizes in bytes, and three blocks of each file.

    Every process must call it, and reads its share.

    Returns:
        str: 32 hexadecimal digits, the same on every process.

    Raises:
        ValueError: If a file cannot be read.
    """
    mine = range(rank(), len(images), world_size())
    digests: dict[int, bytes] = {}
    error = None
    try:
        digests = dict(zip(mine, _in_threads(lambda index: _digest(images, index), mine), strict=True))
    except Exception as problem:  # whatever it is, the other processes must not be left waiting
        error = f"cannot read the images: {problem}"
    raise_together(error)
    for part in gather(digests):
        digests.update(part)
    whole = blake2b(digest_size=16)
    for index, name in enumerate(images.names):
        whole.update(name.encode(errors="surrogateescape") + b"\0" + digests[index])
    return whole.hexdigest()


def _in_threads(function: Callable[[int], T], indices: Iterable[int]) -> Iterator[T]:
    """Map in threads: reading waits for the disk, and Pillow decodes without holding Python's lock."""
    with ThreadPoolExecutor() as pool:
        yield from pool.map(function, indices)


def _size(images: Images, index: int) -> tuple[int, int] | str:
    """Width and height of an image, or what is wrong with it."""
    try:
        return images.picture(index).size
    except ValueError as error:
        return f"{images.names[index]} ({error.__cause__})"


def _digest(images: Images, index: int) -> bytes:
    with images.open(index) as file:
        size = file.seek(0, io.SEEK_END)
        digest = blake2b(str(size).encode(), digest_size=16)
        for start in (0, (size - _BLOCK) // 2, size - _BLOCK):
            file.seek(max(0, start))
            digest.update(file.read(_BLOCK))
    return digest.digest()
