"""Train a latent-diffusion model without and with InfoBatch, and compare.

python tools/compare_ldm.py configs/ldm/FULL.yaml configs/ldm/PRUNED.yaml --work_dir DIR [--seeds 0 1] [--shortened]
    [--random] [--scores raw ema timestep] -- --train_data_dir DIR --vae DIR --eval_data_dir DIR ...

What stands after -- goes to every run of train_ldm.py. Each run is kept below DIR, and not trained again where it is
done; the encoded images are shared. DIR/comparison.json holds the numbers, DIR/samples.png the samples of all arms.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _arms import random_ratio, read_summary
from _ldm_options import parse_options
from _report import Rows, means, table
from PIL import Image, ImageDraw
from rich.console import Console

from infobatch_mm.core import EpochSchedule
from infobatch_mm.core.summary import differences
from infobatch_mm.scores import SCORES

METRIC = "held_out_loss"
#: An output folder for options that are only looked at.
_NOWHERE = ("--output_dir", ".")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    given = list(sys.argv[1:] if argv is None else argv)
    cut = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(description="Compare a pruned latent-diffusion training with its unpruned twin")
    parser.add_argument("full", help="recipe of the unpruned run")
    parser.add_argument("pruned", help="recipe of the pruned run")
    parser.add_argument("--work_dir", type=Path, required=True, help="where the runs go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run of each arm for each of them")
    parser.add_argument("--shortened", action="store_true", help="control: the unpruned run, as many visits as pruned")
    parser.add_argument("--random", action="store_true", help="control: pruned at random, as many visits as pruned")
    parser.add_argument("--scores", nargs="+", choices=SCORES, help="one pruned arm for each of these scores")
    args, options = parser.parse_args(given[:cut]), given[cut + 1 :]

    seeds: dict[int, Rows] = {}
    for seed in args.seeds:
        seeds[seed] = train_arms(args, seed, [*options, "--seed", str(seed)])
    console = Console()
    pruned = args.scores or ["infobatch"]
    console.print(table(f"{Path(args.full).stem}", METRIC, list(seeds.values()), decimals=5, pruned=pruned))
    result: dict[str, Any] = {str(seed): rows for seed, rows in seeds.items()}
    if len(seeds) > 1:
        result = {**means(METRIC, seeds), "by_seed": result}
    (args.work_dir / "comparison.json").write_text(json.dumps(result, indent=2) + "\n")
    shown = args.work_dir / "samples.png"
    if side_by_side(args.work_dir / f"seed-{args.seeds[0]}", list(seeds[args.seeds[0]]), shown):
        console.print(f"samples of all arms: {shown}")


def train_arms(args: argparse.Namespace, seed: int, options: list[str]) -> Rows:
    """Train every arm with one seed; the controls are made after the pruned run."""
    root = args.work_dir / f"seed-{seed}"
    shared = ["--latents_dir", str(args.work_dir / "latents")]
    rows = {}
    rows["baseline"] = run(root / "baseline", ["--config", args.full, *shared, *options])
    pruned = {score: ["--score", score] for score in args.scores or ()} or {"infobatch": []}
    for name, flags in pruned.items():
        rows[name] = run(root / name, ["--config", args.pruned, *shared, *options, *flags])
    summary = read_summary(root / next(iter(pruned)))  # the controls make as many visits as the first pruned arm
    assert summary is not None
    if args.shortened:
        flags = ["--config", args.full, *shared, *options]
        rows["shortened"] = run(root / "shortened", [*flags, *shortened(parse_options([*flags, *_NOWHERE]), summary)])
    if args.random:
        ratio = random_ratio(passes_of(summary), summary)
        flags = ["--config", args.pruned, *shared, *options, "--policy", "random", "--prune_ratio", f"{ratio:.6f}"]
        rows["random"] = run(root / "random", flags)
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
    """Train one arm, unless it is done; go on where it was interrupted."""
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
        subprocess.run([sys.executable, str(Path(__file__).with_name("train_ldm.py")), *flags], check=True)
    summary = read_summary(output_dir)
    assert summary is not None
    metrics = output_dir / "metrics.json"
    return {
        METRIC: json.loads(metrics.read_text())[METRIC] if metrics.is_file() else math.nan,
        "visits": summary["visits"],
        "iterations": summary["iterations"],
        "wall_time_s": summary["wall_time_s"],
    }


def side_by_side(root: Path, arms: Sequence[str], path: Path) -> bool:
    """The last samples of each arm, beside each other under their names; False where there are none."""
    last = {arm: sorted((root / arm / "samples").glob("*.png"))[-1:] for arm in arms}
    arms = [arm for arm in arms if last[arm]]
    if not arms:
        return False
    found = [Image.open(last[arm][0]) for arm in arms]
    zoom = max(1, round(480 / found[0].width))
    grids = [grid.resize((grid.width * zoom, grid.height * zoom), Image.Resampling.NEAREST) for grid in found]
    gap, head = 12, 20
    width, height = grids[0].size
    canvas = Image.new("RGB", (len(grids) * (width + gap) + gap, height + head + gap), "white")
    for i, (arm, grid) in enumerate(zip(arms, grids, strict=True)):
        left = gap + i * (width + gap)
        ImageDraw.Draw(canvas).text((left, 4), arm, fill="black")
        canvas.paste(grid, (left, head))
    canvas.save(path)
    return True


if __name__ == "__main__":
    main()
