"""Train a pair of configs, unpruned and pruned, and set them side by side.

    infobatch-mm compare UNPRUNED PRUNED [--seeds 0 1] [--shortened] [--random] [--metric NAME]
        [--then CONFIG] [--then-options k=v ...] [--work-dir DIR] [--cfg-options k=v ...]

Leaves ``comparison.json`` and ``comparison.png`` in the work dir, with several seeds one of each per seed and a
``comparison.json`` of their means and standard deviations. Two controls, each with the visits that the pruned
run made: ``--shortened`` is the unpruned config that ends earlier, its schedule shortened; ``--random`` prunes
at random, with the same rescaling and annealing. For configs by iterations and by epochs. A pre-training has no
quality of its own: ``--then CONFIG`` fine-tunes from the last checkpoint of each run and, as a control, from random
weights.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from rich.console import Console

from ..report.figures import comparison_figure
from ..report.seeds import Rows, means, write_numbers
from ..report.tables import comparison_table
from .comparison.arms import Comparison
from .comparison.checks import check
from .comparison.request import Request
from .comparison.training import progress_on


def main(argv: Sequence[str] | None = None) -> None:
    """Compare as the command line says."""
    parser = _parser()
    request = Request(**vars(parser.parse_args(argv)))
    cfg = check(parser, request)

    # Whoever ends this process ends its training as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    console = Console()
    results: dict[int, Rows] = {}
    for seed in request.seeds:
        work_dir = request.work_dir / f"seed{seed}" if len(request.seeds) > 1 else request.work_dir
        metric, results[seed] = compare(request, seed, work_dir, cfg, console)
        console.print(comparison_table(f"{request.unpruned.stem}, seed {seed}", metric, [results[seed]]))
    if len(results) > 1:
        title = f"{request.unpruned.stem}, mean ± standard deviation of {len(results)} seeds"
        console.print(comparison_table(title, metric, list(results.values())))
        _keep(request.work_dir / "comparison.json", means(metric, results), console)


def compare(request: Request, seed: int, work_dir: Path, cfg: Config, console: Console) -> tuple[str, Rows]:
    """Train all arms with one seed, and keep their numbers and figures in its work dir.

    Returns:
        tuple: The metric, and of each arm its value, visits, iterations, wall-clock.
    """
    with progress_on(console) as progress:
        metric, arms = Comparison(request, seed, work_dir, cfg, progress).run()
    rows = {name: arm.row(metric) for name, arm in arms.items()}
    saved = 1 - rows["infobatch"]["visits"] / rows["baseline"]["visits"]
    _keep(work_dir / "comparison.json", {"metric": metric, **rows, "saved_ratio": saved}, console)
    comparison_figure(f"{request.unpruned.stem}, seed {seed}", metric, arms, work_dir / "comparison.png")
    console.print(str(work_dir / "comparison.png"), highlight=False)
    return metric, rows


def _keep(path: Path, content: dict[str, Any], console: Console) -> None:
    """Write numbers and say where."""
    write_numbers(path, content)
    console.print(str(path), highlight=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train a pair of configs, unpruned and pruned, and compare")
    parser.add_argument("unpruned", type=Path, help="config of the unpruned run")
    parser.add_argument("pruned", type=Path, help="the same config with the one line")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/comparison"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--shortened", action="store_true", help="also train unpruned at the pruned run's budget")
    parser.add_argument("--random", action="store_true", help="also prune at random, as much as the pruned run did")
    parser.add_argument("--then", type=Path, help="config of a fine-tuning from each run's last checkpoint")
    parser.add_argument("--then-options", nargs="+", default=[], help="overrides for the fine-tunings")
    parser.add_argument("--metric", help="name in the log, e.g. mDice (default: mIoU or accuracy/top1)")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        default=[],
        help="overrides for all arms of UNPRUNED and PRUNED, as in tools/train.py",
    )
    return parser
