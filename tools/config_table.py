"""Write ``configs/README.md``: every pruned config beside its unpruned twin."""

from __future__ import annotations

import argparse
from itertools import groupby
from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs"
_HEAD = """# Configs

Every pruned config beside its unpruned twin. A pruned one adds the line to its twin and changes nothing else. Names are
`{model}_{components}_{GPUs}xb{batch of one}-{schedule}_{data}`. `python tools/config_table.py` writes this page.

ADE20K is expected at `data/ade/ADEChallengeData2016`, ImageNet at `data/imagenet`, CIFAR at `data/cifar10` and
`data/cifar100`, as in the hosts. The small CIFAR-10 config reads the file that `CIFAR10_NPZ` names, with arrays
`train_x, train_y, test_x, test_y` (and `classes`); CamVid, the nuclei and their cells are found by
`CAMVID_ROOT`, `NUCLEI_ROOT` and `NUCLEI_CELLS_ROOT`.
The fine-tunings of `mae/` start from a checkpoint of the pruned pre-training, or from the one that you name. Recipes
(`.yaml`) are for `tools/train_ldm.py`.

We have trained the small models only (`tiny` in their names). The ADE20K configs are known to run; what pruning does to
the quality of the large models is not measured yet.
"""


def pairs() -> list[tuple[Path, Path]]:
    """Unpruned and pruned configs, by folder and name."""
    pruned = sorted(path for kind in ("py", "yaml") for path in CONFIGS.glob(f"[!_]*/*-infobatch*.{kind}"))
    return [(twin_of(path), path) for path in pruned]


def twin_of(pruned: Path) -> Path:
    """The config without the line."""
    for mark in ("-infobatch-quantile", "-infobatch"):
        twin = pruned.with_name(pruned.name.replace(mark, ""))
        if twin != pruned and twin.is_file():
            return twin
    raise SystemExit(f"{pruned} has no unpruned twin beside it")


def page() -> str:
    """The text of ``configs/README.md``."""
    parts = [_HEAD]
    for folder, group in groupby(pairs(), key=lambda pair: pair[1].parent.name):
        rows = [f"## {folder}\n", "| data | unpruned | pruned |", "|---|---|---|"]
        for unpruned, pruned in group:
            there, here = (f"[{path.stem}]({folder}/{path.name})" for path in (unpruned, pruned))
            rows.append(f"| {pruned.stem.rsplit('_', 1)[1]} | {there} | {here} |")
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    Path(CONFIGS, "README.md").write_text(page())
