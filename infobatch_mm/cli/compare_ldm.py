"""Train a latent-diffusion model without and with pruning, and compare.

infobatch-mm compare-ldm configs/ldm/FULL.yaml [configs/ldm/PRUNED.yaml ...] --work_dir DIR [--policies SPEC ...]
    [--seeds 0 1] [--controls [NAME ...]] [--margin M] [--scores raw ema timestep] -- --train_data_dir DIR --vae DIR
    --eval_data_dir DIR ...

What stands after -- goes to every run of train-ldm. Each run is kept below DIR, and not trained again where it is
done; the encoded images are shared. DIR/comparison.json holds numbers and verdicts, DIR/samples.png the samples of all
arms, DIR/verdicts.png the differences over several seeds.
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

from ..core.summary import differences
from ..diffusion.options import parse_options
from ..report.diffusion_runs import METRIC, read_row, side_by_side
from ..report.seeds import Rows, means, write_numbers
from ..report.summaries import read_summary
from ..report.tables import comparison_table
from ..report.verdict_figures import verdict_figure
from ..report.verdict_tables import verdict_table
from ..scores import SCORES
from .comparison.ldm_arms import LEFT_OUT, check_twins, control_flags, passes_of, pruned_arms, shortened
from .comparison.request import add_statistics_arguments, take_controls
from .comparison.results import account, judged, question
from .comparison.sharing import Family, assign
from .comparison.specs import folder_of
from .subcommands import command

__all__ = ["main", "passes_of", "shortened"]


def main(argv: Sequence[str] | None = None) -> None:
    """Compare as the command line says."""
    given = list(sys.argv[1:] if argv is None else argv)
    cut = given.index("--") if "--" in given else len(given)
    parser = _parser()
    args, options = parser.parse_intermixed_args(given[:cut]), given[cut + 1 :]
    controls = take_controls(args)
    common = ["--latents_dir", str(args.work_dir / "latents"), *options]
    try:
        arms = pruned_arms(args)
        check_twins(args.full, arms, common)
    except ValueError as error:
        parser.error(str(error))

    if parse_options(["--config", args.full, *common, "--output_dir", "."]).eval_data_dir is None:
        print(
            "no --eval_data_dir: the held-out loss is not measured, so there will be no verdicts, only visits and time",
            file=sys.stderr,
        )
    seeds: dict[int, Rows] = {}
    family: Family | None = None
    for seed in args.seeds:
        flags = [*common, "--seed", str(seed)]
        seeds[seed], family = train_arms(args, controls, arms, seed, flags, family)
    assert family is not None
    _conclude(args, seeds, family, given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare pruned latent-diffusion trainings with their unpruned twin")
    parser.add_argument("full", help="recipe of the unpruned run")
    parser.add_argument("pruned", nargs="*", help="recipes of pruned runs, an arm each")
    parser.add_argument("--work_dir", type=Path, required=True, help="where the runs go")
    add_statistics_arguments(parser)
    parser.add_argument("--scores", nargs="+", choices=SCORES, help="one pruned arm for each of these scores")
    return parser


def train_arms(
    args: argparse.Namespace,
    controls: Sequence[str],
    arms: dict[str, list[str]],
    seed: int,
    options: list[str],
    family: Family | None,
) -> tuple[Rows, Family]:
    """Train every arm with one seed; the controls are made after the pruned runs.

    Args:
        args (Namespace): The command line.
        controls (Sequence[str]): Wanted kinds of controls.
        arms (dict): Flags of each pruned arm.
        seed (int): Of all arms.
        options (list[str]): Flags of all runs.
        family (Family, optional): Which control serves which arm; None where this seed is to decide it.

    Returns:
        tuple: The rows by arm, and the family.
    """
    root = args.work_dir / f"seed-{seed}"
    full = ["--config", args.full, *options]
    # What stands on the command line wins over the flags of an arm, but for those that make it the arm it is.
    pruned = {name: [*flags[:2], *options, *flags[2:]] for name, flags in arms.items()}
    rows = {"baseline": run(root / "baseline", full)}
    for name, flags in pruned.items():
        rows[name] = run(root / folder_of(name), flags)
    found = {name: read_summary(root / folder_of(name)) for name in pruned}
    summaries = {name: summary for name, summary in found.items() if summary is not None}
    if family is None:
        reasons = {(name, kind): reason for name in pruned for kind, reason in LEFT_OUT.items()}
        family = assign(controls, summaries, reasons)
        print(*family.left_out, sep="\n", end="\n" if family.left_out else "")
    for control in family.controls:
        flags = control_flags(control, full, pruned[control.owner], summaries[control.owner])
        rows[control.name] = run(root / folder_of(control.name), flags)
    return rows, family


def _conclude(args: argparse.Namespace, seeds: dict[int, Rows], family: Family, argv: Sequence[str]) -> None:
    """Show and keep what all seeds say together."""
    console, title = Console(), Path(args.full).stem
    asked = question(METRIC, args.margin)
    pruned = list(family.opponents)
    console.print(comparison_table(title, METRIC, list(seeds.values()), decimals=5, pruned=pruned))
    first = args.work_dir / f"seed-{args.seeds[0]}"
    names = {name: folder_of(name) for name in seeds[args.seeds[0]]}
    settings = {name: json.loads((first / folder / "options.json").read_text()) for name, folder in names.items()}
    found = judged(asked, seeds, family.opponents)
    told = account(asked, seeds, family.opponents, found, family.left_out, settings, argv)
    result: dict[str, Any] = {str(seed): rows for seed, rows in seeds.items()}
    if len(seeds) > 1:
        result = {**means(METRIC, seeds), "by_seed": result}
        picture = args.work_dir / "verdicts.png"
        verdict_figure(f"{title}, {len(seeds)} seeds", METRIC, found, asked.lower_is_better, picture)
        console.print(str(picture), highlight=False)
    write_numbers(args.work_dir / "comparison.json", {"metric": METRIC, **result, **told})
    console.print(verdict_table(f"{title}, verdicts", METRIC, found, asked.lower_is_better, decimals=5))
    shown = args.work_dir / "samples.png"
    if side_by_side(first, list(names.values()), shown):
        console.print(f"samples of all arms: {shown}")


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
