"""Cut nuclei tiles into quarters of which most are empty, laid out like ADE20K: a data set where pruning can pay.

    python benchmarks/nuclei_cells.py NUCLEI_ROOT data/nuclei-cells [--empty 3200] [--others 800] [--test 1600]

The quarters of 64 x 64 of each training tile of 128 x 128 whose labels are all 0 are the empty ones. Of them and of the
others as many as asked for are drawn with ``--seed``, and of the test tiles' quarters, which keep their own share of
empty ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 64


def main(argv: Sequence[str] | None = None) -> None:
    """Write the cells as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with images/ and annotations/, each of training and test")
    parser.add_argument("target", type=Path, help="folder to write to")
    parser.add_argument("--empty", type=int, default=3200, help="training cells without a nucleus")
    parser.add_argument("--others", type=int, default=800, help="training cells with one")
    parser.add_argument("--test", type=int, default=1600, help="test cells")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    args = parser.parse_args(argv)
    source = np.random.default_rng(args.seed)
    cells = _quarters(args.source, "training")
    is_empty = np.array([not labels.any() for _, _, labels in cells])
    for kind, wanted in ((True, args.empty), (False, args.others)):
        found = np.flatnonzero(is_empty == kind)
        if len(found) < wanted:
            raise SystemExit(f"{args.source} has {len(found)} {'empty' if kind else 'other'} cells, not {wanted}")
        for place in source.choice(found, wanted, replace=False):
            _write(args.target, "training", *cells[place])
    tested = _quarters(args.source, "test")
    for place in source.choice(len(tested), min(args.test, len(tested)), replace=False):
        _write(args.target, "test", *tested[place])


def _quarters(root: Path, split: str) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Name, image and labels of every quarter of the tiles of a split."""
    found = []
    for path in sorted((root / "images" / split).glob("*.jpg")):
        image = np.asarray(Image.open(path).convert("RGB"))
        labels = np.asarray(Image.open(root / "annotations" / split / f"{path.stem}.png"))
        for row in range(0, image.shape[0], SIDE):
            for column in range(0, image.shape[1], SIDE):
                part = slice(row, row + SIDE), slice(column, column + SIDE)
                found.append((f"{path.stem}-{row}-{column}", image[part], labels[part]))
    if not found:
        raise SystemExit(f"{root / 'images' / split} holds no .jpg file")
    return found


def _write(target: Path, split: str, name: str, image: np.ndarray, labels: np.ndarray) -> None:
    # As PNG: a second JPEG would change the pixels once more. Hosts look for .jpg, so the config says .png.
    for kind, content in (("images", image), ("annotations", labels)):
        folder = target / kind / split
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(content).save(folder / f"{name}.png")


if __name__ == "__main__":
    main()
