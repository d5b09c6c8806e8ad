"""BatchNorm under a biased sample: which remedy lets unequal draws pay, against training shorter to equal visits.

Trains a small network of its own on cells of nuclei images (AdamW) or on CIFAR-10 (SGD with momentum). The policy is
``variance``: a first full pass, then the chance of a visit in proportion to the norm of the gradient that the sample
sends into the last layer's weights, clipped, exactly K by systematic sampling, weight 1 / chance, no annealing. Every
BatchNorm arm is tested as it stands, and again after its running statistics were recalibrated: on a few uniform
batches, on four times as many, and on as many of the last pass's own kind.

    NUCLEI_ROOT=... python benchmarks/normalisation.py --task nuclei --seeds 0 1 2 --json FILE
    CIFAR10_NPZ=... python benchmarks/normalisation.py --task cifar --seeds 0 1 2 --json FILE

Results are added to FILE arm by arm; an arm that is in it already, with equal settings, is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from normalisation_arms import ARMS, Arm, batches, chances, rate
from normalisation_remedies import Draw, batch_norms, freeze, recalibrate
from normalisation_tasks import ACTIVATIONS, Task, build, load_task
from torch import Tensor


@torch.no_grad()
def test(model: torch.nn.Module, task: Task) -> dict[str, float]:
    """Mean cross-entropy, and mIoU (accuracy for a classifier), on the test set."""
    model.eval()
    loss, confusion = 0.0, torch.zeros(task.classes, task.classes)
    for start in range(0, len(task.test_x), 100):
        x, y = task.whole(start, start + 100)
        logits = model(x)[1]
        loss += float(F.cross_entropy(logits, y)) * len(x)
        pairs = (y * task.classes + logits.argmax(1)).flatten()
        confusion += torch.bincount(pairs, minlength=task.classes**2).view_as(confusion)
    hits = confusion.diagonal()
    iou = hits / (confusion.sum(0) + confusion.sum(1) - hits)
    dense = task.test_y.ndim > 1
    figure = {"miou": 100 * float(iou.mean())} if dense else {"accuracy": 100 * float(hits.sum() / confusion.sum())}
    return {"loss": loss / len(task.test_x), **figure}


def _points(x: Tensor) -> Tensor:
    """Bring ``(B, C)`` and ``(B, C, H, W)`` to ``(B, C, points)``."""
    return x.reshape(*x.shape[:2], -1)


def train(
    task: Task, arm: Arm, seed: int, args: argparse.Namespace, first_only: bool = False
) -> tuple[dict[str, object], np.ndarray]:
    """Train one arm and test it.

    Args:
        task (Task): Data.
        arm (Arm): How to train.
        seed (int): Of the network and all draws.
        args (Namespace): Of the command line.
        first_only (bool): Whether to stop, untested, after the first pass. Defaults to False.

    Returns:
        tuple: What is written down, and the score of every sample, shape ``(N,)``.
    """
    torch.manual_seed(seed)
    draws, views, extra = (np.random.default_rng([seed, stream]) for stream in range(3))
    draw = Draw()
    model = build(args.task, args.width, task.classes, arm.norm, draw, arm.bound, args.activation)
    if args.task == "nuclei":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for layer in batch_norms(model):
        layer.momentum = arm.momentum
    n = len(task.train_x)
    visits, forward_only, frozen = 0, 0, False
    scores = np.zeros(n)
    if arm.first == "predicted":
        scores = train(task, dataclasses.replace(arm, first="full"), seed + 100, args, first_only=True)[1]

    def inputs(count: int, shares: np.ndarray | None = None) -> Iterator[Tensor]:
        for _ in range(count):
            yield task.batch(extra.choice(n, args.batch_size, replace=False, p=shares), extra)[0]

    model.train()
    start = time.perf_counter()
    for indices, weights, mean, progress, begins in batches(arm, n, scores, args, draws):
        if first_only and begins:
            return {}, scores
        if (arm.frozen == "pass" and begins) or (arm.frozen == "half" and progress >= 0.5 and not frozen):
            recalibrate(model, draw, inputs(args.recalibration))
            forward_only += args.recalibration * args.batch_size
            freeze(model)
            frozen = True
        x, y = task.batch(indices, views)
        gamma = torch.from_numpy(weights).float()
        draw.weights, draw.mean_weight = (gamma if arm.policy == "variance" and mean > 1 else None), mean
        if arm.rescale == "step":
            gamma = gamma / mean
        optimizer.param_groups[0]["lr"] = args.lr * rate(progress)
        features, logits = model(x)
        logits.retain_grad()
        losses = F.cross_entropy(logits, y, reduction="none").reshape(len(x), -1).mean(1)
        optimizer.zero_grad()
        (gamma * losses).mean().backward()
        if arm.policy == "variance":
            sent = torch.einsum("bkp,bcp->bkc", _points(logits.grad), _points(features.detach()))
            scores[indices] = (sent.flatten(1).norm(dim=1) * len(x) / gamma).numpy()
        optimizer.step()
        visits += len(indices)
    result: dict[str, object] = {
        "visits": visits,
        "saved": round(1 - visits / (n // args.batch_size * args.batch_size * args.passes), 4),
        "forward_only_visits": forward_only,
        "seconds": round(time.perf_counter() - start, 1),
        "test": test(model, task),
    }
    ways: dict[str, tuple[int, np.ndarray | None]] = {"recalibrated": (1, None), "recalibrated_more": (4, None)}
    if arm.policy == "variance":  # on batches like the last pass's own, for which the network was trained
        pi = chances(scores, round(n * (1 - args.saving)), arm.pi_min)
        ways["recalibrated_own"] = 4, pi / pi.sum()
    for name, (times, shares) in ways.items():
        if batch_norms(model):
            shift = recalibrate(model, draw, inputs(times * args.recalibration, shares))
            cost = {"forward_only_visits": times * args.recalibration * args.batch_size, "shift": shift}
            result[name] = {**test(model, task), **cost}
    if arm.policy == "variance":
        result["score_cv2"] = float(scores.var() / scores.mean() ** 2)
    return result, scores


def main(argv: list[str] | None = None) -> None:
    """Run the arms that are missing from the JSON file."""
    epilog = "arms:\n" + "\n".join(f"  {name:24}{arm.why}" for name, arm in ARMS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=("nuclei", "cifar"), default="nuclei")
    parser.add_argument("--data-root", default=os.environ.get("NUCLEI_ROOT"), help="default: $NUCLEI_ROOT")
    parser.add_argument("--cifar", default=os.environ.get("CIFAR10_NPZ"), help="npz file; default: $CIFAR10_NPZ")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--passes", type=int, help="default: 8 for nuclei, 12 for cifar")
    parser.add_argument("--saving", type=float, help="share of all visits; default: 0.61 for nuclei, 0.35 for cifar")
    parser.add_argument("--batch-size", type=int, help="default: 16 for nuclei, 64 for cifar")
    parser.add_argument("--width", type=int, help="of the first layers; default: 8 for both")
    parser.add_argument("--lr", type=float, help="default: 2e-3 for nuclei (AdamW), 0.1 for cifar (SGD)")
    parser.add_argument("--recalibration", type=int, default=16, help="uniform batches; default: 16")
    parser.add_argument("--activation", choices=ACTIVATIONS, default="relu", help="of the nuclei's UNet; default: relu")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/normalisation.json"))
    args = parser.parse_args(argv)
    usual = dict(passes=(8, 12), saving=(0.61, 0.35), batch_size=(16, 64), width=(8, 8), lr=(2e-3, 0.1))
    for name, pair in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, pair[args.task == "cifar"])
    torch.set_num_threads(1)
    task = load_task(args.task, args.cifar if args.task == "cifar" else args.data_root)
    settings = {name: getattr(args, name) for name in ("task", *usual, "recalibration", "activation")}
    for seed in args.seeds:
        for name in args.arms:
            key = {"arm": name, "seed": seed, **settings}
            done = json.loads(args.json.read_text()) if args.json.exists() else []
            if any({field: row.get(field, "relu") for field in key} == key for row in done):
                continue
            words = [f"--{field.replace('_', '-')} {shlex.quote(str(value))}" for field, value in settings.items()]
            command = f"python benchmarks/normalisation.py {' '.join(words)} --arms {name} --seeds {seed}"
            result, _ = train(task, ARMS[name], seed, args)
            row = {**key, "command": command, **dataclasses.asdict(ARMS[name]), **result}
            done = json.loads(args.json.read_text()) if args.json.exists() else []
            part = args.json.with_suffix(".part")
            part.write_text(json.dumps([*done, row], indent=1) + "\n")
            part.replace(args.json)
            print(name, seed, row["test"], row.get("recalibrated"), row["seconds"], file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
