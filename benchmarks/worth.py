"""What draws by gradients are worth, and what scores know of them: true gradients at three moments of small trainings.

Each training is one of this repository's configs, shortened. At an eighth, at half and at the end of it the gradients
of ``--samples`` samples are taken as ``infobatch-mm plan`` takes them. Trainings and moments that are in the JSON file
already are left out, and so is a training whose data no environment variable names.

    export NUCLEI_CELLS_ROOT=... CIFAR10_NPZ=... NUCLEI_ROOT=... CAMVID_ROOT=... FACES_ROOT=... FACES_VAE=...
    python benchmarks/worth.py --work-dir work_dirs/worth --json benchmarks/results/worth.json
    python benchmarks/worth.py --table --json benchmarks/results/worth.json

Cells of nuclei are cut by `nuclei_cells.py`, the ones of CamVid here, into ``CAMVID_CELLS_ROOT``. Faces and their first
stage are made as docs/results.md says.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from mmengine.config import Config
from worth_table import markdown
from worth_tasks import MOMENTS, TASKS, Found, Task, cut_cells

from infobatch_mm.cli.config import merged
from infobatch_mm.cli.subcommands import command
from infobatch_mm.forecast.advice import advice
from infobatch_mm.forecast.forecast import forecast
from infobatch_mm.forecast.gradients import Subject

ROOT = Path(__file__).parents[1]


def expanded(options: tuple[str, ...] | list[str]) -> list[str]:
    """Options with their environment variables put in."""
    return [os.path.expandvars(each) for each in options]


def train(task: Task, work_dir: Path) -> None:
    """Train, unless the last checkpoint is there."""
    if task.path(work_dir, task.moments()[-1]).exists():
        return
    name = "--output_dir" if task.is_recipe else "--work-dir"
    flags = expanded(task.train())
    subprocess.run([*command("infobatch_mm.cli"), *flags, name, str(work_dir)], cwd=ROOT, check=True)


def subject_of(task: Task, checkpoint: Path) -> Subject:
    """The training at a checkpoint."""
    path = ROOT / "configs" / task.config
    if task.is_recipe:
        from infobatch_mm.diffusion.options import parse_options
        from infobatch_mm.forecast.diffusion import RecipeSubject

        options = parse_options(["--config", str(path), "--output_dir", ".", *expanded(task.data)])
        return RecipeSubject(options, str(checkpoint), bands=task.bands)
    from infobatch_mm.forecast.mmengine import ConfigSubject

    cfg: Config = merged(path, expanded(task.data))
    return ConfigSubject(cfg, str(checkpoint))


def write(path: Path, rows: list[dict]) -> None:
    """Write rows, a line each, in one step."""
    part = path.with_suffix(".part")
    part.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    part.replace(path)


def look(name: str, task: Task, args: argparse.Namespace) -> None:
    """Train a task and measure its moments, as far as they are missing."""
    # The two tasks on faces share a training.
    work_dir = args.work_dir / Path(task.config).stem / "-".join(task.needs).lower()
    for share, moment in zip(MOMENTS, task.moments(), strict=True):
        key = {"task": name, "moment": share, "samples": args.samples, "seed": args.seed, "savings": args.savings}
        found = Found(json.loads(args.json.read_text()) if args.json.exists() else [])
        if found.has(key):
            continue
        train(task, work_dir)
        start = time.perf_counter()
        checkpoint = task.path(work_dir, moment)
        result = forecast(subject_of(task, checkpoint), args.samples, args.savings, args.seed)
        row = {
            **key,
            "command": f"python benchmarks/worth.py --tasks '{name}' --samples {args.samples} --seed {args.seed}",
            "training": " ".join(["infobatch-mm", *task.train()]),
            "checkpoint": checkpoint.name,
            "bands": task.bands,
            "seconds": round(time.perf_counter() - start, 1),
            "advice": advice(result),
            **result.plain(),
        }
        write(args.json, [*found.rows, row])
        print(name, moment, row["advice"], row["seconds"], file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> None:
    """Measure what is missing from the JSON file, or print it as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--savings", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/worth"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/worth.json"))
    parser.add_argument("--table", action="store_true", help="print the file's rows as Markdown, and measure nothing")
    args = parser.parse_args(argv)
    if args.table:
        print(markdown(json.loads(args.json.read_text())))
        return
    for name in args.tasks:
        task = TASKS[name]
        if missing := [each for each in task.needs if each not in os.environ]:
            print(f"{name}: left out, {' and '.join(missing)} not set", file=sys.stderr)
            continue
        if name == "CamVid cells" and "CAMVID_ROOT" in os.environ:
            cut_cells(Path(os.environ["CAMVID_ROOT"]), Path(os.environ["CAMVID_CELLS_ROOT"]))
        look(name, task, args)


if __name__ == "__main__":
    main()
