"""Train a pair of configs, unpruned and pruned, and set them side by side.

    python tools/compare.py UNPRUNED PRUNED [--seeds 0 1] [--shortened] [--work-dir DIR] [--cfg-options k=v ...]

Leaves ``comparison.json`` and ``comparison.png`` in the work dir, one of each per seed. ``--shortened`` adds
the control that matters: the unpruned config with only as many iterations as the pruned run made, its
schedule shortened to them. For iteration-based configs that validate by mIoU.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator
from mmengine.config import Config, DictAction
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

ROOT = Path(__file__).parents[1]
COLOURS = {"baseline": "#555555", "infobatch": "#d1495b", "shortened": "#3d7ea6"}
# Lines of the training's log that are worth showing while it runs.
SHOWN = re.compile(r"(Iter\((train|val)\)|InfoBatch|Saving checkpoint)")


def train(arm: str, config: Path, work_dir: Path, options: list[str], progress: Progress) -> float:
    """Train one arm in a process of its own, showing its log; returns its wall-clock in seconds."""
    command = [sys.executable, str(ROOT / "tools/train.py"), str(config), "--work-dir", str(work_dir)]
    command += ["--cfg-options", *options]
    task = progress.add_task(arm, total=None)
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        recent: list[str] = []
        for line in process.stdout:
            recent = [*recent[-40:], line]
            if SHOWN.search(line):
                progress.console.print(line.rstrip(), highlight=False, markup=False, soft_wrap=True)
            if found := re.search(r"Iter\(train\) +\[ *(\d+)/(\d+)\]", line):
                progress.update(task, completed=int(found[1]), total=int(found[2]))
    if process.returncode:
        raise SystemExit(f"the {arm} run failed:\n{''.join(recent)}")
    elapsed = time.perf_counter() - start
    done = progress.tasks[task].total or 1
    progress.update(task, completed=done, total=done)
    return elapsed


def read_curve(work_dir: Path, batch_size: int) -> tuple[list[int], list[float]]:
    """Sample visits and mIoU in percent at each validation; every batch of an iteration loop is full."""
    # each run logs into a folder named by its time
    scalars = sorted(work_dir.glob("*/vis_data/scalars.json"))[-1]
    lines = [json.loads(line) for line in scalars.read_text().splitlines()]
    points = [(line["step"] * batch_size, line["mIoU"]) for line in lines if "mIoU" in line]
    return [visits for visits, _ in points], [miou for _, miou in points]


def plot(
    title: str, curves: dict[str, tuple[list[int], list[float]]], per_pass: list[dict[str, Any]], path: Path
) -> None:
    """mIoU over visits for both runs, and the share of samples kept in each pass."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=(3, 2), layout="constrained")
    figure.suptitle(title)
    for arm, (visits, miou) in curves.items():
        left.plot(visits, miou, marker="o", markersize=4, color=COLOURS[arm], label=arm)
        left.annotate(f"{miou[-1]:.1f}", (visits[-1], miou[-1]), textcoords="offset points", xytext=(0, 7), ha="center")
    left.set(xlabel="sample visits", ylabel="mIoU (%)", title="Quality over visits")
    left.margins(x=0.06, y=0.15)
    left.grid(alpha=0.3)
    left.legend(loc="best")
    right.bar(
        [entry["pass"] + 1 for entry in per_pass],
        [100 * entry["kept_ratio"] for entry in per_pass],
        color=COLOURS["infobatch"],
    )
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.axhline(100, color=COLOURS["baseline"], linewidth=1)
    right.set(xlabel="pass", ylabel="samples kept (%)", title="Kept per pass", ylim=(0, 108))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def print_table(title: str, rows: dict[str, dict[str, float]], console: Console) -> None:
    """The arms side by side, and what the pruned one saved."""
    table = Table(title=title)
    for column in ("", "mIoU (%)", "sample visits", "iterations", "wall-clock (s)"):
        table.add_column(column, justify="right" if column else "left")
    for arm, row in rows.items():
        counts = (f"{row[key]:,.0f}" for key in ("visits", "iterations", "wall_time_s"))
        table.add_row(arm, f"{row['mIoU']:.2f}", *counts)
    baseline, infobatch = rows["baseline"], rows["infobatch"]
    table.add_row(
        "saved",
        f"({infobatch['mIoU'] - baseline['mIoU']:+.2f})",
        *(f"{1 - infobatch[key] / baseline[key]:.1%}" for key in ("visits", "iterations", "wall_time_s")),
    )
    console.print(table)


def merged(config: Path, options: list[str]) -> Config:
    """A config with the overrides of the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg-options", nargs="*", action=DictAction, default={})
    cfg = Config.fromfile(config)
    cfg.merge_from_dict(parser.parse_args(["--cfg-options", *options]).cfg_options if options else {})
    return cfg


def schedule_ends(cfg: Config) -> list[int]:
    """Which of the config's parameter schedulers end with the training."""
    schedulers = cfg.get("param_scheduler") or []
    return [i for i, scheduler in enumerate(schedulers) if scheduler.get("end") == cfg.train_cfg.max_iters]


def compare(
    args: argparse.Namespace, seed: int, work_dir: Path, cfg: Config, console: Console
) -> dict[str, dict[str, float]]:
    """Train all arms with one seed; returns mIoU, visits, iterations and wall-clock of each."""
    # Plain lines where the output is kept in a file, a live bar on a terminal.
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    rows: dict[str, dict[str, float]] = {}
    curves: dict[str, tuple[list[int], list[float]]] = {}
    batch_size = cfg.train_dataloader.batch_size

    def run(arm: str, config: Path, *extra: str) -> None:
        options = [*args.cfg_options, f"randomness.seed={seed}", *extra]
        elapsed = train(arm, config, work_dir / arm, options, progress)
        visits, miou = curves[arm] = read_curve(work_dir / arm, batch_size)
        iterations = visits[-1] // batch_size
        rows[arm] = dict(mIoU=miou[-1], visits=visits[-1], iterations=iterations, wall_time_s=round(elapsed, 1))

    with Progress(*columns, console=console) as progress:
        run("baseline", args.unpruned)
        run("infobatch", args.pruned)
        if args.shortened:
            short = int(rows["infobatch"]["iterations"])
            ends = [f"param_scheduler.{i}.end={short}" for i in schedule_ends(cfg)]
            run("shortened", args.unpruned, f"train_cfg.max_iters={short}", *ends)
    summary = json.loads((work_dir / "infobatch/infobatch_summary.json").read_text())
    comparison = {**rows, "saved_ratio": 1 - rows["infobatch"]["visits"] / rows["baseline"]["visits"]}
    (work_dir / "comparison.json").write_text(json.dumps(comparison, indent=2) + "\n")
    plot(f"{args.unpruned.stem}, seed {seed}", curves, summary["per_pass"], work_dir / "comparison.png")
    console.print(f"{work_dir / 'comparison.json'}, {work_dir / 'comparison.png'}", highlight=False)
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train a pair of configs, unpruned and pruned, and compare")
    parser.add_argument("unpruned", type=Path, help="config of the unpruned run")
    parser.add_argument("pruned", type=Path, help="the same config with the one line")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/comparison"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--shortened", action="store_true", help="also train unpruned at the pruned run's budget")
    parser.add_argument("--cfg-options", nargs="+", default=[], help="overrides for all arms, as in tools/train.py")
    args = parser.parse_args()
    for config in (args.unpruned, args.pruned):
        if not config.is_file():
            parser.error(f"there is no config {config}")
    cfg = merged(args.unpruned, args.cfg_options)
    if "max_iters" not in cfg.train_cfg:
        parser.error(f"{args.unpruned} is not iteration-based: visits are counted by iterations")
    if not any("InfoBatch" in hook.get("type", "") for hook in merged(args.pruned, []).get("custom_hooks", [])):
        parser.error(f"{args.pruned} has no InfoBatchHook among its custom_hooks: give the unpruned config first")
    if args.shortened and not schedule_ends(cfg):
        parser.error(f"--shortened needs a param_scheduler that ends at max_iters={cfg.train_cfg.max_iters}")
    data_root = Path(cfg.get("data_root") or cfg.train_dataloader.dataset.data_root)
    if not data_root.is_dir():
        parser.error(f"the data set {data_root} is not there: draw it (make demo-data) or name it with data_root=")

    console = Console()
    results = []
    for seed in args.seeds:
        work_dir = args.work_dir / f"seed{seed}" if len(args.seeds) > 1 else args.work_dir
        results.append(compare(args, seed, work_dir, cfg, console))
        print_table(f"{args.unpruned.stem}, seed {seed}", results[-1], console)
    if len(results) > 1:
        means = {
            arm: {key: statistics.mean(result[arm][key] for result in results) for key in results[0][arm]}
            for arm in results[0]
        }
        print_table(f"{args.unpruned.stem}, mean of {len(results)} seeds", means, console)


if __name__ == "__main__":
    main()
