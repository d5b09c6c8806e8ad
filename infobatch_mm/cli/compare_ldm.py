"""Train a latent-diffusion model without and with InfoBatch, and compare.

infobatch-mm compare-ldm configs/ldm/FULL.yaml configs/ldm/PRUNED.yaml --work_dir DIR [--seeds 0 1] [--shortened]
    [--random] [--scores raw ema timestep] -- --train_data_dir DIR --vae DIR --eval_data_dir DIR ...

What stands after -- goes to every run of train-ldm. Each run is kept below DIR, and not trained again where it is
done; the encoded images are shared. DIR/comparison.json holds the numbers, DIR/samples.png the samples of all arms.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..core import EpochSchedule
from ..core.summary import differences
from ..diffusion.options import parse_options
from ..report.diffusion_runs import METRIC, read_row, side_by_side
from ..report.seeds import Rows, means, write_numbers
from ..report.summaries import read_summary
from ..report.tables import comparison_table
from ..scores import SCORES
from .comparison.controls import random_ratio
from .subcommands import command

#: An output folder for options that are only looked at.
_NOWHERE = ("--output_dir", ".")


def main(argv: Sequence[str] | None = None) -> None:
    """Compare as the command line says."""
    given = list(sys.argv[1:] if argv is None else argv)
    cut = given.index("--") if "--" in given else len(given)
    args, options = _parser().parse_args(given[:cut]), given[cut + 1 :]

    seeds: dict[int, Rows] = {}
    for seed in args.seeds:
        seeds[seed] = train_arms(args, seed, [*options, "--seed", str(seed)])
    console = Console()
    pruned = args.scores or ["infobatch"]
    console.print(comparison_table(Path(args.full).stem, METRIC, list(seeds.values()), decimals=5, pruned=pruned))
    result: dict[str, Any] = {str(seed): rows for seed, rows in seeds.items()}
    if len(seeds) > 1:
        result = {**means(METRIC, seeds), "by_seed": result}
    write_numbers(args.work_dir / "comparison.json", result)
    shown = args.work_dir / "samples.png"
    if side_by_side(args.work_dir / f"seed-{args.seeds[0]}", list(seeds[args.seeds[0]]), shown):
        console.print(f"samples of all arms: {shown}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare a pruned latent-diffusion training with its unpruned twin")
    parser.add_argument("full", help="recipe of the unpruned run")
    parser.add_argument("pruned", help="recipe of the pruned run")
    parser.add_argument("--work_dir", type=Path, required=True, help="where the runs go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run of each arm for each of them")
    parser.add_argument("--shortened", action="store_true", help="control: the unpruned run, as many visits as pruned")
    parser.add_argument("--random", action="store_true", help="control: pruned at random, as many visits as pruned")
    parser.add_argument("--scores", nargs="+", choices=SCORES, help="one pruned arm for each of these scores")
    return parser


def train_arms(args: argparse.Namespace, seed: int, options: list[str]) -> Rows:
    """Train every arm with one seed; the controls are made after the pruned run."""
    root = args.work_dir / f"seed-{seed}"
    common = ["--latents_dir", str(args.work_dir / "latents"), *options]
    full, pruned = (["--config", recipe, *common] for recipe in (args.full, args.pruned))
    rows = {"baseline": run(root / "baseline", full)}
    arms = {score: ["--score", score] for score in args.scores or ()} or {"infobatch": []}
    for name, flags in arms.items():
        rows[name] = run(root / name, [*pruned, *flags])
    summary = read_summary(root / next(iter(arms)))  # the controls make as many visits as the first pruned arm
    assert summary is not None
    if args.shortened:
        length = shortened(parse_options([*full, *_NOWHERE]), summary)
        rows["shortened"] = run(root / "shortened", [*full, *length])
    if args.random:
        ratio = random_ratio(passes_of(summary), summary)
        rows["random"] = run(root / "random", [*pruned, "--policy", "random", "--prune_ratio", f"{ratio:.6f}"])
    return rows


def shortened(args: argparse.Namespace, summary: dict[str, Any]) -> list[str]:
    """Flags of an unpruned run that makes about as many visits as a pruned one made: in whole epochs, or in steps."""
    if args.max_train_steps is not None:
        return [
            "--max_train_steps",
            str(max(1, round(args.max_train_steps * summary["visits"] / summary["visits_full"]))),
        ]
    return ["--num_epochs", str(max(1, round(summary["visits"] / summary["num_samples"])))]


def passes_of(summary: dict[str, Any]) -> EpochSchedule:
    """The passes of a run, whose last one may be partial, visit by visit."""
    visits = round(summary["passes_total"] * summary["num_samples"])
    return EpochSchedule(summary["num_samples"], None, batch_size=1, max_steps=visits)


def run(output_dir: Path, flags: list[str]) -> dict[str, float]:
    """Train one arm, unless it is done; go on where it was interrupted.

    Args:
        output_dir (Path): Where to.
        flags (list[str]): For ``train-ldm``, without the output folder.

    Returns:
        dict: Its row, see :func:`.read_row`.

    Raises:
        SystemExit: If the folder holds a training with other options.
    """
    flags = [*flags, "--output_dir", str(output_dir), "--resume_from_checkpoint", "latest"]
    options = json.loads(json.dumps(vars(parse_options(flags))))  # refuses what is wrong before an arm is trained
    kept = output_dir / "options.json"
    if kept.is_file() and (before := json.loads(kept.read_text())) != options:
        differ = differences(before, options)
        sys.exit(f"{output_dir} was trained with other options ({differ}): delete it, or use another --work_dir")
    output_dir.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(options, indent=2) + "\n")
    if not (output_dir / "model_index.json").is_file():
        print(f"== {output_dir}", flush=True)
        subprocess.run([*command("infobatch_mm.cli", "train-ldm"), *flags], check=True)
    return read_row(output_dir)
