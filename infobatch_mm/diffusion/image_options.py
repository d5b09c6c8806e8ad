"""Options that name images, the same for every command of latent diffusion, and the images that they name."""

from __future__ import annotations

import argparse
from typing import Any

from .image_checks import check_images
from .images import HubImages, ImageFolder, Images


def add_data_arguments(parser: argparse.ArgumentParser, resolution: int | None) -> Any:
    """Add the options that name images to a parser.

    Args:
        parser (argparse.ArgumentParser): The parser; changed in place.
        resolution (int | None): Default of ``--resolution`` in pixels.

    Returns:
        argparse._ArgumentGroup: The group of these options, to add others to.
    """
    data = parser.add_argument_group("data")
    data.add_argument("--train_data_dir", help="folder of images, at any depth")
    data.add_argument("--dataset_name", help="instead: a data set of the hub, or a folder that `datasets` loads")
    data.add_argument("--dataset_config_name", help="configuration of the data set of the hub")
    data.add_argument("--cache_dir", help="where downloads of `datasets` are kept")
    data.add_argument("--resolution", type=int, default=resolution, help="width and height of the images in pixels")
    yes_or_no = argparse.BooleanOptionalAction
    data.add_argument(
        "--center_crop", action=yes_or_no, default=False, help="take the middle of each image, not a random part"
    )
    data.add_argument("--random_flip", action=yes_or_no, default=False, help="mirror half of the visits")
    data.add_argument("--dataloader_num_workers", type=int, default=0, help="worker processes that read images")
    return data


def open_images(args: argparse.Namespace) -> Images:
    """Open the images that the options name.

    Args:
        args (argparse.Namespace): Options of :func:`add_data_arguments`.

    Returns:
        Images: To train on, cropped and flipped as the options say.

    Raises:
        ValueError: If the folder or the data set is not there or holds no images.
    """
    how = (args.resolution, args.center_crop, args.random_flip)
    if args.train_data_dir is not None:
        return ImageFolder(args.train_data_dir, *how)
    return HubImages(args.dataset_name, *how, config=args.dataset_config_name, cache_dir=args.cache_dir)


def open_held_out(args: argparse.Namespace) -> Images | None:
    """Open the held-out images, the middle of each; every process must call it.

    Args:
        args (argparse.Namespace): Options of :func:`add_data_arguments`, and ``eval_data_dir``.

    Returns:
        Images | None: The images below ``--eval_data_dir``; None where it is not given.

    Raises:
        ValueError: If the folder is not there or holds no images, or if some cannot be read.
    """
    if args.eval_data_dir is None:
        return None
    images = ImageFolder(args.eval_data_dir, args.resolution, center_crop=True)
    check_images(images)
    return images
