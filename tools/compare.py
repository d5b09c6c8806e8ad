"""Train a pair of configs, unpruned and pruned, and set them side by side.

    python tools/compare.py UNPRUNED PRUNED [--seeds 0 1] [--shortened] [--random] [--metric NAME]
        [--then CONFIG] [--then-options k=v ...] [--work-dir DIR] [--cfg-options k=v ...]

Leaves ``comparison.json`` and ``comparison.png`` in the work dir, with several seeds one of each per seed and a
``comparison.json`` of their means and standard deviations. Two controls, each with the visits that the pruned
run made: ``--shortened`` is the unpruned config that ends earlier, its schedule shortened; ``--random`` prunes
at random, with the same rescaling and annealing. For configs by iterations and by epochs. A pre-training has no
quality of its own: ``--then`` names the config of a fine-tuning that starts from the last checkpoint of each run,
and, for comparison, from none.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _arms import Arm, find_metric, last_checkpoint, last_value, read_arm, read_summary
from _config import merge_options
from _controls import at_random, hook_index, is_by_epoch, missing_data, schedule_of, shortened
from _report import Rows, means, plot, table
from mmengine.config import Config, DictAction
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

ROOT = Path(__file__).parents[1]
# Lines of the training's log that are worth showing while it runs.
SHOWN = re.compile(r"((Iter|Epoch)\((train|val)\)|InfoBatch|Saving checkpoint)")
# How far a run is: its iteration of how many, or its epoch.
ITERATION = re.compile(r"Iter\(train\) +\[ *(\d+)/(\d+)\]")
EPOCH = re.compile(r"Epoch\(train\) +\[ *(\d+)\]")


def train(arm: str, config: Path, work_dir: Path, options: list[str], progress: Progress) -> float:
    """Train one arm in a process of its own, showing its log; returns its wall-clock in seconds."""
    max_epochs = merged(config, options).train_cfg.get("max_epochs")
    (work_dir / "last_checkpoint").unlink(missing_ok=True)  # of an earlier run
    command = [sys.executable, str(ROOT / "tools/train.py"), str(config), "--work-dir", str(work_dir)]
    command += ["--cfg-options", *options]
    task = progress.add_task(arm, total=None)
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        recent: list[str] = []
        try:
            for line in process.stdout:
                recent = [*recent[-40:], line]
                if SHOWN.search(line):
                    progress.console.print(line.rstrip(), highlight=False, markup=False, soft_wrap=True)
                if found := ITERATION.search(line):
                    progress.update(task, completed=int(found[1]), total=int(found[2]))
                elif found := EPOCH.search(line):
                    progress.update(task, completed=int(found[1]), total=max_epochs)
        except BaseException:  # nobody would read the training's log any more
            process.terminate()
            raise
    if process.returncode:
        raise SystemExit(f"the {arm} run failed:\n{''.join(recent)}")
    elapsed = time.perf_counter() - start
    done = progress.tasks[task].total or 1
    progress.update(task, completed=done, total=done)
    return elapsed


def merged(config: Path, options: list[str]) -> Config:
    """A config with the overrides of the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg-options", nargs="*", action=DictAction, default={})
    cfg = Config.fromfile(config)
    merge_options(cfg, parser.parse_args(["--cfg-options", *options]).cfg_options if options else None)
    return cfg


def compare(args: argparse.Namespace, seed: int, work_dir: Path, cfg: Config, console: Console) -> tuple[str, Rows]:
    """Train all arms with one seed; returns the metric, and of each arm its value, visits, iterations, wall-clock."""
    # Plain lines where the output is kept in a file, a live bar on a terminal.
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    elapsed: dict[str, float] = {}
    lengths: dict[str, int] = {}
    common = [*args.cfg_options, f"randomness.seed={seed}"]
    if "logger" in cfg.get("default_hooks", {}):  # validations are found in the log by the loop's own count
        common.append(f"default_hooks.logger.log_metric_by_epoch={is_by_epoch(cfg)}")

    def run(arm: str, config: Path, *extra: str) -> None:
        elapsed[arm] = train(arm, config, work_dir / arm, [*common, *extra], progress)
        cfg = merged(config, [*common, *extra]).train_cfg
        lengths[arm] = cfg.get("max_epochs") or cfg.max_iters
        if args.then is not None:
            fine_tune(arm, f".checkpoint={last_checkpoint(work_dir / arm)}")

    def fine_tune(arm: str, start: str) -> None:
        options = [*args.then_options, f"randomness.seed={seed}", f"model.backbone.init_cfg{start}"]
        train(f"{arm}, fine-tuned", args.then, tuned / arm, options, progress)

    tuned = work_dir / "fine-tuned"
    with Progress(*columns, console=console) as progress:
        run("baseline", args.unpruned)
        metric = find_metric(work_dir / "baseline" if args.then is None else tuned / "baseline", args.metric)
        run("infobatch", args.pruned)
        summary = read_summary(work_dir / "infobatch")
        assert summary is not None
        schedule = schedule_of(cfg, summary["num_samples"])
        if args.shortened:
            run("shortened", args.unpruned, *shortened(cfg, schedule, summary["visits"]))
        if args.random:
            run("random", args.pruned, *at_random(merged(args.pruned, args.cfg_options), schedule, summary))
        if args.then is not None:
            fine_tune("scratch", "=None")
    arms = {
        arm: read_arm(work_dir / arm, metric, schedule, seconds, args.then and tuned / arm, lengths[arm])
        for arm, seconds in elapsed.items()
    }
    if args.then is not None:
        arms["scratch"] = Arm([0], [last_value(tuned / "scratch", metric)], 0, 0.0, [])
    rows = {name: arm.row(metric) for name, arm in arms.items()}
    saved = 1 - rows["infobatch"]["visits"] / rows["baseline"]["visits"]
    write(work_dir / "comparison.json", {"metric": metric, **rows, "saved_ratio": saved}, console)
    plot(f"{args.unpruned.stem}, seed {seed}", metric, arms, work_dir / "comparison.png")
    console.print(str(work_dir / "comparison.png"), highlight=False)
    return metric, rows


def write(path: Path, content: dict[str, Any], console: Console) -> None:
    """Write numbers and say where."""
    path.write_text(json.dumps(content, indent=2) + "\n")
    console.print(str(path), highlight=False)


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Config:
    """Refuse before anything is trained what would fail afterwards; returns the unpruned config."""
    for config in (args.unpruned, args.pruned):
        if not config.is_file():
            parser.error(f"there is no config {config}")
    cfg = merged(args.unpruned, args.cfg_options)
    pruned = merged(args.pruned, args.cfg_options)
    if hook_index(pruned) is None:
        parser.error(
            f"{args.pruned} has no InfoBatchHook among its custom_hooks: give the unpruned config first, then the one "
            "with the hook"
        )
    if pruned.train_dataloader.dataset != cfg.train_dataloader.dataset:
        parser.error(f"{args.pruned} trains on other data than {args.unpruned}: give a config and its pruned twin")
    if missing := missing_data(cfg):
        parser.error(
            f"the data set {missing} is not there: draw it (make demo-data, make demo-shapes), or say where it is "
            "with data_root="
        )
    if args.then is not None:
        check_then(parser, args, cfg)
    else:
        for config, each in ((args.unpruned, cfg), (args.pruned, pruned)):
            if not each.get("val_evaluator"):
                parser.error(f"{config} has no val_evaluator: there would be nothing to compare by")
    if differing := untwinned(cfg, pruned):
        print(
            f"{args.pruned} is no twin of {args.unpruned}: they differ in {', '.join(differing)} beside the hook, and "
            "so will their results",
            file=sys.stderr,
        )
    if args.shortened:
        try:
            shortened(cfg, schedule_of(cfg, cfg.train_dataloader.batch_size), 1)
        except ValueError as error:
            parser.error(f"--shortened: {error}")
    check_built(parser, {args.unpruned: args.cfg_options, args.pruned: args.cfg_options})
    if args.then is not None:
        check_built(parser, {args.then: args.then_options})
    return cfg


def untwinned(cfg: Config, pruned: Config) -> list[str]:
    """Settings in which two configs differ, apart from the hook and what it may be written out as."""
    names = {"custom_imports", "custom_hooks", "work_dir", "launcher", "resume", "load_from"}
    one, other = ({key: each[key] for key in each if key not in names} for each in (cfg.to_dict(), pruned.to_dict()))
    for each in (one, other):
        each["train_dataloader"] = {**each.get("train_dataloader", {}), "sampler": None}
        each["train_cfg"] = {**each.get("train_cfg", {}), "type": None, "by_epoch": None}
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))


def check_built(parser: argparse.ArgumentParser, configs: dict[Path, list[str]]) -> None:
    """Refuse a config of which not all can be built: a typo in the second is not to be found when the first is trained.

    Args:
        parser (ArgumentParser): Tells the user.
        configs (dict[Path, list[str]]): Overrides of each config. Each is built in a process of its own, at once.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = {}
        for number, (config, options) in enumerate(configs.items()):
            command = [
                sys.executable,
                str(ROOT / "tools/_preflight.py"),
                str(config),
                "--work-dir",
                f"{folder}/{number}",
            ]
            command += ["--cfg-options", *options] if options else []
            processes[config] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        outputs = {config: process.communicate()[0] for config, process in processes.items()}
    for config, process in processes.items():
        if process.returncode:
            print("".join(outputs[config].splitlines(keepends=True)[-25:]), file=sys.stderr)
            parser.error(f"{config} cannot be trained, for the reason above; nothing was trained")


def check_then(parser: argparse.ArgumentParser, args: argparse.Namespace, pretrained: Config) -> None:
    """Refuse a fine-tuning that could not start from a checkpoint, or would measure nothing."""
    if not args.then.is_file():
        parser.error(f"there is no config {args.then}")
    if "checkpoint" not in pretrained.get("default_hooks", {}):
        parser.error(f"--then: {args.unpruned} has no default_hooks.checkpoint: there would be nothing to go on from")
    cfg = merged(args.then, args.then_options)
    start = cfg.model.backbone.get("init_cfg")
    # Without the prefix not one name would match, and the host would go on from random weights.
    if not isinstance(start, dict) or start.get("type") != "Pretrained" or not start.get("prefix"):
        parser.error(
            f"--then: the backbone of {args.then} starts from no checkpoint: give it init_cfg=dict(type='Pretrained', "
            "checkpoint='', prefix='backbone.')"
        )
    if not cfg.get("val_evaluator"):
        parser.error(f"--then: {args.then} has no val_evaluator: there would be nothing to compare by")
    if missing := missing_data(cfg):
        parser.error(f"--then: the data set {missing} of {args.then} is not there: draw it, or say where it is")


def main() -> None:
    """Command line."""
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
    args = parser.parse_args()
    cfg = check(parser, args)

    # Whoever ends this process ends its training as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    console = Console()
    results: dict[int, Rows] = {}
    for seed in args.seeds:
        work_dir = args.work_dir / f"seed{seed}" if len(args.seeds) > 1 else args.work_dir
        metric, results[seed] = compare(args, seed, work_dir, cfg, console)
        console.print(table(f"{args.unpruned.stem}, seed {seed}", metric, [results[seed]]))
    if len(results) > 1:
        title = f"{args.unpruned.stem}, mean ± standard deviation of {len(results)} seeds"
        console.print(table(title, metric, list(results.values())))
        write(args.work_dir / "comparison.json", means(metric, results), console)


if __name__ == "__main__":
    main()
