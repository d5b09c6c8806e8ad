"""Train the demo pair, unpruned and pruned, and set them side by side.

    python tools/demo.py [--work-dir work_dirs/demo] [--seed 0]

Leaves ``comparison.json`` and ``comparison.png`` in the work dir. Needs the scenes that
``python -m infobatch_mm.demo.street data/demo`` draws.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from mmengine.config import Config
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

ROOT = Path(__file__).parents[1]
CONFIGS = {
    "baseline": ROOT / "configs/demo/fcn_r18-tiny_1xb8-1k_demo-96x96.py",
    "infobatch": ROOT / "configs/demo/fcn_r18-tiny_1xb8-infobatch-1k_demo-96x96.py",
}
COLOURS = {"baseline": "#555555", "infobatch": "#d1495b"}


def train(arm: str, work_dir: Path, seed: int, progress: Progress) -> float:
    """Train one arm in a process of its own, showing its log; returns its wall-clock in seconds."""
    command = [sys.executable, str(ROOT / "tools/train.py"), str(CONFIGS[arm]), "--work-dir", str(work_dir)]
    command += ["--cfg-options", f"randomness.seed={seed}"]
    task = progress.add_task(arm, total=None)
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        recent: list[str] = []
        for line in process.stdout:
            recent = [*recent[-40:], line]
            if re.search(r"(Iter\((train|val)\)|InfoBatch|Saving checkpoint)", line):
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


def plot(curves: dict[str, tuple[list[int], list[float]]], per_pass: list[dict[str, Any]], path: Path) -> None:
    """mIoU over visits for both runs, and the share of samples kept in each pass."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), width_ratios=(3, 2), layout="constrained")
    for arm, (visits, miou) in curves.items():
        left.plot(visits, miou, marker="o", markersize=4, color=COLOURS[arm], label=arm)
        left.annotate(f"{miou[-1]:.1f}", (visits[-1], miou[-1]), textcoords="offset points", xytext=(0, 7), ha="center")
    left.set(xlabel="sample visits", ylabel="mIoU (%)", title="Quality over visits")
    left.set_xlim(left=0)
    left.margins(y=0.15)
    left.grid(alpha=0.3)
    left.legend(loc="lower right")
    right.bar(
        [entry["pass"] + 1 for entry in per_pass],
        [100 * entry["kept_ratio"] for entry in per_pass],
        color=COLOURS["infobatch"],
    )
    right.axhline(100, color=COLOURS["baseline"], linewidth=1)
    right.set(xlabel="pass", ylabel="samples kept (%)", title="Kept per pass", ylim=(0, 108))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def print_table(comparison: dict[str, Any], console: Console) -> None:
    """The comparison side by side."""
    baseline, infobatch = comparison["baseline"], comparison["infobatch"]
    table = Table(title="The same model, seed and schedule, without and with the one line")
    for column in ("", "mIoU (%)", "sample visits", "iterations", "wall-clock (s)"):
        table.add_column(column, justify="right" if column else "left")
    for arm, row in (("baseline", baseline), ("infobatch", infobatch)):
        table.add_row(
            arm, f"{row['mIoU']:.2f}", f"{row['visits']:,}", f"{row['iterations']:,}", f"{row['wall_time_s']:.0f}"
        )
    table.add_row(
        "saved",
        f"{infobatch['mIoU'] - baseline['mIoU']:+.2f}",
        *(f"{1 - infobatch[key] / baseline[key]:.1%}" for key in ("visits", "iterations", "wall_time_s")),
    )
    console.print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the demo pair and compare")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/demo"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    cfg = Config.fromfile(CONFIGS["baseline"])
    data_root = Path(cfg.train_dataloader.dataset.data_root)
    if not data_root.is_dir():
        parser.error(f"{data_root} is not there: draw it with `make demo-data`")

    # Plain lines where the output is kept in a file, a live bar on a terminal.
    console = Console()
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    arms: dict[str, dict[str, Any]] = {}
    curves = {}
    with Progress(*columns, console=console) as progress:
        for arm in CONFIGS:
            work_dir = args.work_dir / arm
            elapsed = train(arm, work_dir, args.seed, progress)
            visits, miou = curves[arm] = read_curve(work_dir, cfg.train_dataloader.batch_size)
            arms[arm] = dict(
                mIoU=miou[-1],
                visits=visits[-1],
                iterations=visits[-1] // cfg.train_dataloader.batch_size,
                wall_time_s=round(elapsed, 1),
            )
    summary = json.loads((args.work_dir / "infobatch/infobatch_summary.json").read_text())
    comparison = {**arms, "saved_ratio": 1 - arms["infobatch"]["visits"] / arms["baseline"]["visits"]}
    (args.work_dir / "comparison.json").write_text(json.dumps(comparison, indent=2) + "\n")
    plot(curves, summary["per_pass"], args.work_dir / "comparison.png")
    print_table(comparison, console)
    console.print(f"{args.work_dir / 'comparison.json'}, {args.work_dir / 'comparison.png'}", highlight=False)


if __name__ == "__main__":
    main()
