"""What resuming an iteration-based run costs: the host alone, and with InfoBatchHook.

    OMP_NUM_THREADS=1 python benchmarks/resume.py [--iteration 220] [--pairs 3] [--json OUT]

Draws scenes into a temporary folder, trains a very small segmentor on them up to ITERATION, half of the run, once for
each sampler with the hook and without, and resumes from the checkpoints of these runs, with each number of workers.
Resumes of the host and of the hook alternate; medians are shown of:

- the items read, that is image files decoded in whatever process, before the first training step. Workers read ahead
  of the step: a few batches more than it needs, and how many depends on timing;
- the seconds from the hook point ``before_train`` to the first training step;
- the same from the call of ``Runner.train``, so that nothing is hidden in what comes before: the model is initialised,
  the checkpoint loaded, the hook wired.

A resumed run must be handed the very batch that the run which was not interrupted was handed there; otherwise this
ends with an error. The host's cost grows with the position: a few hundred iterations of small images, which are all in
the page cache, show but the slope. With DefaultSampler the host sleeps 2 s whenever the data set ends, in a replay too,
which is counted as it is. On upstream MMEngine the host's workers begin to read when its loop is built: before
``before_train``, and in vain where the hook then puts its own loop in place. Takes one to two minutes on two cores.
"""

from __future__ import annotations

import argparse
import gc
import io
import itertools
import json
import logging
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import mmengine
import torch
from mmcv.transforms import BaseTransform
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, TRANSFORMS, init_default_scope
from mmengine.runner import Runner

import infobatch_mm.engine  # noqa: F401
from infobatch_mm.demo.street import draw_dataset

SAMPLERS = ("InfiniteSampler", "DefaultSampler")
#: Custom hooks of the two kinds of runs.
HOOKS: dict[str, list[dict]] = {"host": [], "hook": [dict(type="InfoBatchHook", prune_ratio=0.5, delta=0.875)]}
#: What is measured -> its heading and format.
FIGURES = {
    "items": ("items read", ",.0f"),
    "loop_s": ("s from before_train", ".2f"),
    "train_s": ("s from train()", ".2f"),
}
CROP = 64
TIMED_ITEMS = 200

_COUNT = itertools.count()


@dataclass
class Arrival:
    """How a run came to the step after an iteration."""

    items: int
    loop_s: float
    train_s: float
    names: list[str]


class Arrived(Exception):
    """Ends a run where its next step would begin."""


@TRANSFORMS.register_module()
class CountReads(BaseTransform):
    """Makes a file one byte longer for each item, from whatever process.

    Args:
        file (str): The file.
    """

    def __init__(self, file: str) -> None:
        self.file = file

    def transform(self, results: dict) -> dict:
        descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, b".")
        os.close(descriptor)
        return results


class LoopStart(Hook):
    """Notes when the training loop starts, before another hook does anything there."""

    priority = "HIGHEST"
    time = math.nan

    def before_train(self, runner: Runner) -> None:
        self.time = time.perf_counter()


class StopBefore(Hook):
    """Ends a run when everything is ready for the step after an iteration.

    Args:
        iteration (int): The iteration.
    """

    priority = "LOWEST"
    time = math.nan
    names: Sequence[str] = ()

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter == self.iteration:
            self.time = time.perf_counter()
            self.names = [Path(sample.img_path).name for sample in data_batch["data_samples"]]
            raise Arrived


def config(args: argparse.Namespace, root: Path, work_dir: Path, sampler: str, workers: int, kind: str) -> Config:
    """A run of twice as many iterations as are trained, which saves a checkpoint after these."""
    total = 2 * args.iteration
    norm = dict(type="BN", requires_grad=True)
    pipeline = [
        dict(type="LoadImageFromFile"),
        dict(type="CountReads", file=str(root / "reads")),
        dict(type="LoadAnnotations", reduce_zero_label=True),
        dict(type="RandomResize", scale=(2 * args.size, args.size), ratio_range=(0.5, 2.0), keep_ratio=True),
        dict(type="RandomCrop", crop_size=(CROP, CROP), cat_max_ratio=0.75),
        dict(type="RandomFlip", prob=0.5),
        dict(type="PhotoMetricDistortion"),
        dict(type="PackSegInputs"),
    ]
    return Config(
        dict(
            default_scope="mmseg",
            work_dir=str(work_dir),
            experiment_name=f"resume{next(_COUNT)}",
            model=dict(
                type="EncoderDecoder",
                data_preprocessor=dict(
                    type="SegDataPreProcessor", size=(CROP, CROP), mean=[120.0] * 3, std=[60.0] * 3, seg_pad_val=255
                ),
                backbone=dict(type="ResNetV1c", depth=18, stem_channels=4, base_channels=4, norm_cfg=norm),
                decode_head=dict(
                    type="FCNHead",
                    in_channels=32,
                    in_index=3,
                    channels=4,
                    num_convs=1,
                    concat_input=False,
                    num_classes=30,
                    norm_cfg=norm,
                ),
                train_cfg=dict(),
                test_cfg=dict(mode="whole"),
            ),
            train_dataloader=dict(
                batch_size=args.batch_size,
                num_workers=workers,
                sampler=dict(type=sampler, shuffle=True),
                dataset=dict(
                    type="ADE20KDataset",
                    data_root=str(root),
                    data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
                    pipeline=pipeline,
                ),
            ),
            train_cfg=dict(type="IterBasedTrainLoop", max_iters=total),
            optim_wrapper=dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.05, momentum=0.9)),
            param_scheduler=[dict(type="PolyLR", power=0.9, eta_min=1e-4, by_epoch=False, begin=0, end=total)],
            default_hooks=dict(
                checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=args.iteration, save_last=False)
            ),
            custom_hooks=HOOKS[kind],
            log_processor=dict(by_epoch=False),
            log_level="ERROR",
            randomness=dict(seed=0),
        )
    )


def run(cfg: Config, iteration: int, reads: Path) -> Arrival:
    """Train, from the start or from a checkpoint, until the step after an iteration would begin."""
    reads.write_bytes(b"")
    start, stop = LoopStart(), StopBefore(iteration)
    runner = Runner.from_cfg(cfg)
    runner.register_hook(start)
    runner.register_hook(stop)
    called = time.perf_counter()
    try:
        runner.train()
    except Arrived:
        items = reads.stat().st_size
    else:
        raise RuntimeError(f"the run ended before iteration {iteration}")
    finally:
        # None of the workers may read while the next run is timed. The host's, left to the garbage collector, take
        # seconds to end.
        iterator = getattr(getattr(runner._train_loop, "dataloader_iterator", None), "_iterator", None)
        if iterator is not None and hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()
        del runner, iterator
        gc.collect()
    return Arrival(items, stop.time - start.time, stop.time - called, list(stop.names))


def measure(args: argparse.Namespace, root: Path) -> list[dict[str, Any]]:
    """All resumes, as one row for each sampler and number of workers."""
    reads = root / "reads"
    rows = []
    for sampler in SAMPLERS:
        expected = {}
        for kind in HOOKS:
            start = time.perf_counter()
            expected[kind] = run(
                config(args, root, root / sampler / kind, sampler, 0, kind), args.iteration, reads
            ).names
            progress(f"{sampler}, {kind}: {args.iteration} iterations trained in {time.perf_counter() - start:.1f} s")
        for workers in args.workers:
            arrivals: dict[str, list[Arrival]] = {kind: [] for kind in HOOKS}
            for pair in range(args.pairs):
                for kind in list(HOOKS)[:: -1 if pair % 2 else 1]:
                    cfg = config(args, root, root / sampler / kind, sampler, workers, kind)
                    cfg.resume = True
                    arrival = run(cfg, args.iteration, reads)
                    if arrival.names != expected[kind]:
                        name = f"{sampler}, {workers} workers, {kind}"
                        raise RuntimeError(f"{name}: resumed at {arrival.names} instead of {expected[kind]}")
                    arrivals[kind].append(arrival)
            rows.append(dict(sampler=sampler, workers=workers, **{k: summary(v) for k, v in arrivals.items()}))
            progress(f"{sampler}, {workers} workers: {args.pairs} pairs of resumes")
    return rows


def item_seconds(cfg: Config) -> float:
    """What it takes to read one item, in this process."""
    init_default_scope("mmseg")
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    dataset.full_init()
    times = []
    for i in range(min(len(dataset), TIMED_ITEMS)):
        start = time.perf_counter()
        dataset[i]
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def summary(arrivals: list[Arrival]) -> dict[str, Any]:
    """Medians, and what they are medians of."""
    medians = {name: statistics.median(getattr(arrival, name) for arrival in arrivals) for name in FIGURES}
    return {**medians, "resumes": [{name: getattr(arrival, name) for name in FIGURES} for arrival in arrivals]}


def table(rows: list[dict[str, Any]]) -> str:
    """The medians as Markdown."""
    columns = [(name, kind) for name in FIGURES for kind in HOOKS]
    head = ["sampler", "workers", *(f"{FIGURES[name][0]}, {kind}" for name, kind in columns)]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        figures = (format(row[kind][name], FIGURES[name][1]) for name, kind in columns)
        lines.append([row["sampler"], str(row["workers"]), *figures])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def progress(line: str) -> None:
    """Say what is done, beside the result."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="cost of resuming an iteration-based run")
    parser.add_argument("--iteration", type=int, default=220, help="where to resume; the run is twice as long")
    parser.add_argument("--pairs", type=int, default=3, help="resumes of each kind for every row")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="numbers of data loader workers")
    parser.add_argument("--scenes", type=int, default=320, help="size of the data set")
    parser.add_argument("--size", type=int, default=256, help="width and height of a scene in pixels")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--json", metavar="OUT")
    args = parser.parse_args()
    if min(args.iteration, args.pairs, args.batch_size) < 1 or args.scenes < args.batch_size or args.size < CROP:
        parser.error(f"counts must be positive, scenes at least a batch, and of at least {CROP} pixels")
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)  # before any time is spent

    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    # Upstream cannot read its own checkpoints otherwise; these are our own.
    os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with tempfile.TemporaryDirectory(prefix="infobatch_resume_") as folder:
        root = draw_dataset(folder, args.scenes, num_val=0, size=args.size)
        progress(f"{args.scenes} scenes drawn")
        with redirect_stdout(io.StringIO()):
            rows = measure(args, root)
        item_s = item_seconds(config(args, root, root, SAMPLERS[0], 0, "host"))

    setting = dict(
        mmengine=f"{packages_distributions()['mmengine'][0]} {mmengine.__version__}",
        torch=torch.__version__,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        threads=torch.get_num_threads(),
        iteration=args.iteration,
        batch_size=args.batch_size,
        scenes=args.scenes,
        size=args.size,
        passes_ended=args.iteration // math.ceil(args.scenes / args.batch_size),
        item_s=item_s,
        pairs=args.pairs,
    )
    print(
        f"{setting['mmengine']}, torch {setting['torch']}, {setting['cores']} cores, {setting['threads']} threads\n"
        f"resumed at iteration {args.iteration}, after {args.iteration * args.batch_size:,} items that each take "
        f"{item_s * 1e3:.1f} ms to read;\n{args.scenes} scenes of {args.size} x {args.size} pixels, batches of "
        f"{args.batch_size}: the host has met the end of the data set {setting['passes_ended']} times;\n"
        f"medians of {args.pairs} pairs of resumes\n"
    )
    print(table(rows))
    if args.json:
        Path(args.json).write_text(json.dumps({**setting, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
