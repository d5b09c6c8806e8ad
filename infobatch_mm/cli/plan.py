"""Forecast what pruning is worth on a training, from single samples' gradients at a checkpoint. Trains nothing.

infobatch-mm plan CONFIG --checkpoint CKPT [--samples 256] [--scores WORK_DIR] [--savings 0.3 0.5]
    [--num-processes 1] [--seed 0] [--json FILE] [--cfg-options k=v ...]
infobatch-mm plan RECIPE.yaml --checkpoint CKPT ... -- --train_data_dir DIR --vae DIR ...

CONFIG is of MMSegmentation or MMPretrain, with or without the hook. What stands after -- goes with a recipe of
train-ldm.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from ..core import PruningPolicy
from ..forecast.advice import advice
from ..forecast.forecast import Forecast, forecast
from ..forecast.gradients import Subject
from ..forecast.lines import show
from ..forecast.whole import scores_of_run
from ..report.seeds import write_numbers

#: An output folder for options that are only looked at.
_NOWHERE = ("--output_dir", ".")


def main(argv: Sequence[str] | None = None) -> None:
    """Forecast as the command line says."""
    given = list(sys.argv[1:] if argv is None else argv)
    cut = given.index("--") if "--" in given else len(given)
    args, flags = _parser().parse_args(given[:cut]), given[cut + 1 :]
    if args.samples < 2 or args.num_processes < 1 or args.seed < 0:
        numbers = f"--samples {args.samples} --num-processes {args.num_processes} --seed {args.seed}"
        sys.exit(f"plan: {numbers}: expected at least 2 samples (use 256), 1 process, a seed of 0 or more")
    own: PruningPolicy | None
    try:
        if Path(args.config).suffix in (".yaml", ".yml"):
            if cut == len(given):
                raise ValueError(
                    f"{args.config} is a recipe: give the flags of train-ldm after --, at least "
                    "-- --train_data_dir DIR --vae DIR"
                )
            if args.cfg_options:
                raise ValueError(f"--cfg-options is for configs of MMEngine: give options of {args.config} after --")
            subject, own = _of_recipe(args, flags)
        else:
            if flags:
                raise ValueError(f"{args.config} is a config of MMEngine: give --cfg-options in place of {flags[0]}")
            subject, own = _of_config(args)
        found = _forecast(args, subject, own)
    except ValueError as error:
        sys.exit(f"plan: {error}")
    # Elsewhere than on a terminal nobody says how wide a line is.
    show(found, Console(width=None if sys.stdout.isatty() else 120))
    if args.json is not None:
        asked = {name: str(each) if isinstance(each, Path) else each for name, each in vars(args).items()}
        settings = {**asked, "json": None, "flags": flags}
        write_numbers(args.json, {"settings": settings, "advice": advice(found), **found.plain()})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Forecast what pruning is worth on a training, before it is paid for")
    parser.add_argument("config", help="config of MMSegmentation or MMPretrain, or recipe of train-ldm")
    parser.add_argument("--checkpoint", required=True, help="of the training; for a recipe, a folder of train-ldm")
    parser.add_argument("--samples", type=int, default=256, help="how many samples' gradients are taken, twice each")
    parser.add_argument("--scores", help="work dir of a run with scores: forecast for all samples")
    parser.add_argument(
        "--savings", type=float, nargs="+", default=[0.3, 0.5], help="shares of a pass's visits to save"
    )
    parser.add_argument("--num-processes", type=int, default=1, help="processes that share an optimiser step")
    parser.add_argument("--seed", type=int, default=0, help="of which samples, and of their augmentation")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--cfg-options", nargs="+", default=[], help="override settings of the config, as in train")
    return parser


def _of_config(args: argparse.Namespace) -> tuple[Subject, PruningPolicy | None]:
    # Needed for configs only, as what is below is for recipes: few installations have both hosts.
    from ..forecast.mmengine import ConfigSubject, own_policy
    from .config import merged

    cfg = merged(Path(args.config), args.cfg_options)
    return ConfigSubject(cfg, args.checkpoint, args.num_processes), own_policy(cfg)


def _of_recipe(args: argparse.Namespace, flags: list[str]) -> tuple[Subject, PruningPolicy]:
    from ..diffusion.options import parse_options
    from ..forecast.diffusion import RecipeSubject, own_policy

    options = parse_options(["--config", args.config, *_NOWHERE, *flags])
    return RecipeSubject(options, args.checkpoint, args.num_processes), own_policy(options)


def _forecast(args: argparse.Namespace, subject: Subject, own: PruningPolicy | None) -> Forecast:
    scores = None if args.scores is None else scores_of_run(args.scores, subject.num_samples)
    # On standard error: what is printed may be kept.
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("gradients", total=min(args.samples, subject.num_samples))
        return forecast(subject, args.samples, args.savings, args.seed, scores, own, lambda: progress.advance(task))
