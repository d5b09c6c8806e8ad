"""Every method folder of an installed host, weighed: how exact it is and what a step costs.

    python benchmarks/zoo.py [--host mmseg|mmpretrain|mmpretrain_selfsup] [--json OUT] [--markdown OUT] [FOLDER ...]

One config of each folder (the cheapest; ADE20K's in MMSegmentation and in MMPretrain ImageNet-1k's where there is one)
is built on the CPU, without pretrained weights and with BatchNorm for SyncBN, and takes training steps on random images
and labels, as small as the model allows. Reported are: the relative error of loss and gradients with all weights 1
against the untouched model; the relative error of the gradients with random weights against an oracle, which
forms the weighted objective from the host's own losses; and the median ratio of alternating steps with weighing and
without. Exits with 1 if a folder that is weighed misses a tolerance.

Of MMPretrain the classifiers are weighed, those by which self-supervised methods are evaluated among them; the steps
include the data preprocessor, and with it Mixup and CutMix. mmpretrain_selfsup weighs what trains without labels, at
the sizes of its configs and on batches of their own pipelines.

Takes about ten minutes on two idle cores. On busy ones set OMP_WAIT_POLICY=passive, or threads burn them waiting for
each other.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import io
import json
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from mmengine.registry import init_default_scope
from paired import steps_in_turn
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from zoo_host import BATCH_SIZE, Case, Host, OutOfScopeError, build_smallest, missing, one_line, relative_error

from infobatch_mm.losses import AttachedViews, LossWeigher, attach_views

HOSTS = ("mmseg", "mmpretrain", "mmpretrain_selfsup")
TOLERANCES = {"rel_err_ones": 1e-6, "rel_err_random": 1e-4}
#: Pairs of timed steps in a folder: at least and at most, and the seconds after which no more are begun.
MIN_PAIRS, MAX_PAIRS, TIME_BOX = 3, 11, 10.0


@dataclass
class Result:
    """What is reported of one folder; None for what does not apply."""

    config: str | None = None
    status: str = "not_built"
    path: str | None = None
    mixing: str | None = None
    targets: str | None = None
    rel_err_ones: float | None = None
    rel_err_random: float | None = None
    step_ratio: float | None = None
    reason: str | None = None

    @property
    def failed(self) -> bool:
        """Whether views were attached and did not keep what they promise."""
        return self.path is not None and self.status != "ok"


# --- Measuring -------------------------------------------------------------------------------------------------------


@contextmanager
def attached(model: nn.Module) -> Iterator[tuple[LossWeigher, AttachedViews]]:
    """Our loss side wired to a model."""
    weigher = LossWeigher()
    views = attach_views(model, weigher)
    try:
        yield weigher, views
    finally:
        views.restore()


def measure(case: Case, result: Result) -> None:
    """Fill in the figures of a folder."""
    weights = 0.5 + torch.rand(BATCH_SIZE)
    result.mixing = ", ".join(case.host.mixing(case.model)) or None
    errors = [errors_from(case, weights, result, seed) for seed in case.host.seeds(case.model)]
    result.rel_err_ones, result.rel_err_random = (max(each) for each in zip(*errors, strict=True))
    result.step_ratio = step_ratio(case, weights)
    for name, tolerance in TOLERANCES.items():
        if not getattr(result, name) <= tolerance:
            raise ValueError(f"{name} {getattr(result, name):.1e} above {tolerance:.0e}")


def errors_from(case: Case, weights: Tensor, result: Result, seed: int) -> tuple[float, float]:
    """Relative errors with all weights 1 and with these weights, from one state of the random generators."""
    with attached(case.model) as (weigher, views):
        result.path = "fast" if views.vectorised else "universal"
        weigher.begin(torch.ones(BATCH_SIZE), pruned=False)
        loss, grads = case.run(seed)
        weigher.end()
    host_loss, expected = case.run(seed)
    error_ones = max(abs(loss - host_loss) / abs(host_loss), relative_error(grads, expected))
    del grads, expected
    with attached(case.model) as (weigher, _):
        weigher.begin(weights, pruned=True)
        _, grads = case.run(seed)
        weigher.end()
    with case.host.oracle(case.model, weights):
        _, expected = case.run(seed)
    return error_ones, relative_error(grads, expected)


def step_ratio(case: Case, weights: Tensor) -> float:
    """Median of the ratios of steps in turn, with weighing over without."""
    rounds = steps_in_turn(case.model, case.loss, weights, lr=1e-6, most=MAX_PAIRS, least=MIN_PAIRS, seconds=TIME_BOX)
    return statistics.median(each["raw"] / each["host"] for each in rounds)


def check_folder(host: Host, folder: Path) -> Result:
    """Build one config of a folder and measure it; whatever happens ends up in the result."""
    result = Result()
    try:
        path = host.cheapest_config(folder)
        result.config = path.relative_to(folder.parent).as_posix()
        model = host.model_config(path)
        result.targets = host.targets(model)
        case = build_smallest(host, model)
    except OutOfScopeError as error:
        result.status, result.reason = host.out_of_scope, str(error)
        return result
    except Exception as error:
        result.reason = missing(host.needs, error)
        return result
    try:
        measure(case, result)
        result.status = "ok"
    except Exception as error:  # one folder does not end the run
        result.status = "refused"
        result.reason = str(error) if isinstance(error, ValueError) else one_line(error)
    return result


# --- Reporting -------------------------------------------------------------------------------------------------------


def markdown(host: Host, results: dict[str, Result]) -> str:
    """The results as a table, and below it what is out of scope."""

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    shown = {name: r for name, r in results.items() if r.status != host.out_of_scope}
    extra = [name for name in ("mixing", "targets") if any(getattr(r, name) for r in shown.values())]
    columns = ["folder", "config", "path", *extra, "weights 1", "random weights", "step", "reason"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, r in shown.items():
        config = (r.config or "").partition("/")[2].removesuffix(".py")
        figures = (cell(r.rel_err_ones, ".1e"), cell(r.rel_err_random, ".1e"), cell(r.step_ratio, ".2f"))
        reason = "" if r.status == "ok" else f"{r.status}: {r.reason}".replace("|", "\\|").replace("\n", " ")
        cells = (name, config, r.path or "", *(getattr(r, each) or "" for each in extra), *figures, reason)
        lines.append(f"| {' | '.join(cells)} |")
    if out := sorted(results.keys() - shown.keys()):
        lines += ["", f"{host.out_of_scope.replace('_', ' ').capitalize()} ({len(out)}): {', '.join(out)}."]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="weigh every method of an installed host")
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="default: all")
    parser.add_argument("--host", choices=HOSTS, default=HOSTS[0])
    parser.add_argument("--json", metavar="OUT")
    parser.add_argument("--markdown", metavar="OUT")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    host: Host = importlib.import_module(f"zoo_{args.host}").HOST
    root, names = host.root(), host.folders()
    unknown = sorted(set(args.folders) - set(names))
    if unknown:
        parser.error(f"{root} has no folder {', '.join(unknown)}")
    for path in (args.markdown, args.json):
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)  # before any time is spent

    init_default_scope(host.package)
    results = {}
    console = Console(stderr=True)
    for name in track(args.folders or names, description="zoo", console=console):
        start = time.perf_counter()
        with redirect_stdout(io.StringIO()):
            result = results[name] = check_folder(host, root / name)
        gc.collect()
        seconds = time.perf_counter() - start
        console.print(f"{name}: {result.reason or result.path} ({seconds:.1f} s)", markup=False, highlight=False)
    table = markdown(host, results)
    print(table)
    if args.markdown:
        Path(args.markdown).write_text(table + "\n")
    if args.json:
        folders = {name: asdict(result) for name, result in results.items()}
        Path(args.json).write_text(json.dumps({"host": host.package, "folders": folders}, indent=2) + "\n")
    sys.exit(any(result.failed for result in results.values()))


if __name__ == "__main__":
    main()
