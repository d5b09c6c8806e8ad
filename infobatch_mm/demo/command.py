"""The command line of the demo data sets."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from pathlib import Path


def run(draw_dataset: Callable[..., Path], description: str, example: str, items: str) -> None:
    """Draw a data set where the command line says; its options default to the function's.

    Args:
        draw_dataset (Callable): ``draw_dataset(root, num_train, num_val, size, seed)`` draws and returns the root.
        description (str): What is drawn, for the help.
        example (str): A folder to draw into, for the help.
        items (str): What the data set consists of, in the plural.
    """
    defaults = {name: each.default for name, each in inspect.signature(draw_dataset).parameters.items()}
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("root", help=f"folder to draw into, e.g. {example}")
    parser.add_argument("--num-train", type=int, default=defaults["num_train"])
    parser.add_argument("--num-val", type=int, default=defaults["num_val"])
    parser.add_argument("--size", type=int, default=defaults["size"], help="width and height in pixels")
    parser.add_argument("--seed", type=int, default=defaults["seed"])
    args = parser.parse_args()
    root = draw_dataset(args.root, args.num_train, args.num_val, args.size, args.seed)
    print(f"drew {args.num_train} training and {args.num_val} validation {items} into {root}")
