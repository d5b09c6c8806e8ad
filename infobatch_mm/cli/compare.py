"""Train a config with and without pruning, and set the runs side by side.

    infobatch-mm compare UNPRUNED [PRUNED ...] [--policies SPEC ...] [--seeds 0 1 2] [--controls [NAME ...]]
        [--margin M] [--metric NAME] [--lower-is-better | --higher-is-better] [--then CONFIG]
        [--then-options k=v ...] [--work-dir DIR] [--cfg-options k=v ...]

An arm is a pruned config, or a policy by its name and settings, ``variance:target_saving=0.4,score=gradient``, added to
the unpruned config. Leaves ``comparison.json`` and ``comparison.png`` in the work dir, with several seeds one of each
per seed, a ``comparison.json`` over all of them and ``verdicts.png``. Controls make about the visits of a pruned run:
``shortened`` is the unpruned config that ends earlier, its schedule complete; ``random`` prunes at random, with
weights; ``smaller`` makes as many steps on smaller batches; ``unweighted`` is the pruned run without weights. An arm
that is done is not trained again, and one that was interrupted goes on. A pre-training has no quality of its own:
``--then CONFIG`` fine-tunes from the last checkpoint of each run and, as a control, from random weights.
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
from ..report.seeds import Rows, means, unmeasured, write_numbers
from ..report.tables import comparison_table
from ..report.verdict_figures import verdict_figure
from ..report.verdict_tables import verdict_table
from .comparison.arms import Arms
from .comparison.checks import check
from .comparison.lives import settings_of
from .comparison.pruned_arms import PrunedArm, pruned_arms, write_config
from .comparison.record import seed_of
from .comparison.request import Request, add_statistics_arguments, take_controls
from .comparison.results import Question, account, judged, question, saved_by
from .comparison.sharing import Family
from .comparison.training import progress_on


def main(argv: Sequence[str] | None = None) -> None:
    """Compare as the command line says."""
    parser = _parser()
    args = parser.parse_intermixed_args(argv)
    request = Request(controls=take_controls(args), **vars(args))
    cfg = check(parser, request)

    # Whoever ends this process ends its training as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    comparison = _Comparison(request, cfg, Console())
    comparison.run()
    comparison.conclude(argv)


class _Comparison:
    """Trains all arms with all seeds, and tells what came of it.

    Args:
        request (Request): What the user asks for, checked.
        cfg (Config): The unpruned config with its overrides.
        console (Console): Where to tell.
    """

    def __init__(self, request: Request, cfg: Config, console: Console) -> None:
        self._request, self._console = request, console
        self._pruned: list[PrunedArm] = pruned_arms(request, request.work_dir / "configs")
        for arm in self._pruned:
            write_config(request.unpruned, arm)
        self._seeds = {seed: Arms(request, self._pruned, seed, self._work_dir(seed), cfg) for seed in request.seeds}
        for arms in self._seeds.values():
            arms.check_what_is_there()
        self._rows: dict[int, Rows] = {}
        self._family: Family
        self._asked: Question

    def run(self) -> None:
        """Train and show each seed; which control serves which arm is decided by the first."""
        for seed, arms in self._seeds.items():
            with progress_on(self._console) as progress:
                metric = arms.train_pruned(progress)
                if not self._rows:
                    self._family = arms.family()
                    self._asked = question(metric, self._request.margin, self._request.lower_is_better)
                    for words in self._family.left_out:
                        self._console.print(words, highlight=False, markup=False)
                arms.train_controls(self._family.controls, progress)
            for words in arms.left_out:
                self._family.left_out.append(words)
                self._console.print(words, highlight=False, markup=False)
            found = arms.read(metric)
            rows = {name: arm.row(metric) for name, arm in found.items()}
            # Every seed has the same arms: one that could not be trained was not measured.
            missing = [each.name for each in self._family.controls if each.name not in rows]
            self._rows[seed] = {**rows, **dict.fromkeys(missing, unmeasured(metric))}
            title = f"{self._request.unpruned.stem}, seed {seed}"
            place = self._report_dir(seed)
            picture = place / "comparison.png"
            comparison_figure(title, metric, found, picture)
            self._console.print(str(picture), highlight=False)
            self._console.print(comparison_table(title, metric, [self._rows[seed]], pruned=self._names))
            if len(self._seeds) > 1:
                self._keep(place / "comparison.json", self._of_one(seed))

    def conclude(self, argv: Sequence[str] | None) -> None:
        """Show and keep what all seeds say together."""
        request, metric = self._request, self._asked.metric
        rows = list(self._rows.values())
        numbers = means(metric, self._rows) if len(rows) > 1 else self._of_one(request.seeds[0])
        opponents, left_out = self._family.opponents, self._family.left_out
        found = judged(self._asked, self._rows, opponents)
        told = account(self._asked, self._rows, opponents, found, left_out, self._settings(), argv)
        self._keep(request.work_dir / "comparison.json", {**numbers, **told})
        lower = self._asked.lower_is_better
        if len(rows) > 1:
            title = f"{request.unpruned.stem}, mean ± standard deviation of {len(rows)} seeds"
            self._console.print(comparison_table(title, metric, rows, pruned=self._names))
            picture = request.work_dir / "verdicts.png"
            verdict_figure(f"{request.unpruned.stem}, {len(rows)} seeds", metric, found, lower, picture)
            self._console.print(str(picture), highlight=False)
        self._console.print(verdict_table(f"{request.unpruned.stem}, verdicts", metric, found, lower))

    @property
    def _names(self) -> list[str]:
        return [arm.name for arm in self._pruned]

    def _report_dir(self, seed: int) -> Path:
        """Where numbers and picture of one seed go."""
        root = self._request.work_dir
        place = root / f"seed{seed}" if len(self._request.seeds) > 1 else root
        place.mkdir(parents=True, exist_ok=True)
        return place

    def _work_dir(self, seed: int) -> Path:
        """Where the arms of a seed go: a folder of its own, or the work dir for the first that is trained alone.

        A seed that was begun stays where it is, however many seeds there are now.
        """
        root = self._request.work_dir
        own, there = root / f"seed{seed}", seed_of(root / "baseline")
        if there == seed and seed_of(own / "baseline") is None:
            return root
        alone = len(self._request.seeds) == 1 and there is None and seed_of(own / "baseline") is None
        return root if alone else own

    def _of_one(self, seed: int) -> dict[str, Any]:
        """The numbers of one seed."""
        saved = saved_by(self._names, self._rows[seed])
        first = saved[self._names[0]]
        more = {"saved_ratios": saved} if len(saved) > 1 else {}
        return {"metric": self._asked.metric, **self._rows[seed], "saved_ratio": first, **more}

    def _settings(self) -> dict[str, Any]:
        """Of each arm its config, its overrides by seed, and all settings with the first seed."""
        first = self._seeds[self._request.seeds[0]]
        return {
            name: {
                "config": str(trained.config),
                "options": {
                    str(seed): arms.trained[name].options for seed, arms in self._seeds.items() if name in arms.trained
                },
                "merged": settings_of(trained.config, trained.options),
            }
            for name, trained in first.trained.items()
        }

    def _keep(self, path: Path, content: dict[str, Any]) -> None:
        """Write numbers and say where."""
        write_numbers(path, content)
        self._console.print(str(path), highlight=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train a config, unpruned and pruned, and compare")
    parser.add_argument("unpruned", type=Path, help="config of the unpruned run")
    parser.add_argument("pruned", type=Path, nargs="*", help="the same config with the one line, an arm each")
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path("work_dirs/comparison"),
        help="where the arms and the results go (default: work_dirs/comparison)",
    )
    add_statistics_arguments(parser)
    parser.add_argument("--then", type=Path, help="config of a fine-tuning from each run's last checkpoint")
    parser.add_argument("--then-options", nargs="+", default=[], help="overrides for the fine-tunings")
    parser.add_argument("--metric", help="name in the log, e.g. mDice (default: mIoU or accuracy/top1)")
    better = parser.add_mutually_exclusive_group()
    better.add_argument(
        "--lower-is-better", action="store_true", default=None, help="as of metrics with the word 'loss' in their name"
    )
    better.add_argument(
        "--higher-is-better",
        dest="lower_is_better",
        action="store_false",
        default=None,
        help="also of metrics that have",
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        default=[],
        help="overrides for all arms, as in tools/train.py",
    )
    return parser
