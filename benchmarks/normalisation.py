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
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from normalisation_remedies import Draw, batch_norms, deal, freeze, recalibrate
from normalisation_tasks import ACTIVATIONS, Task, build, load_task
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train, and what it is expected to do."""

    why: str
    policy: str = "variance"
    norm: str = "none"
    balanced: bool = False
    pi_min: float = 0.1
    bound: float = 4.0
    rescale: str = "unbiased"
    frozen: str = ""
    uniform_last: int = 0
    momentum: float = 0.1


ARMS = {
    "full": Arm("BatchNorm, all visits: what there is to lose", policy="full"),
    "shortened": Arm("BatchNorm, full data, equal visits: what pruning has to beat", policy="shortened"),
    "none": Arm("BatchNorm as it is: biased batches, biased statistics, so worse than shortened"),
    "weighted": Arm("batch statistics weighted, weights up to 4: less bias, more noise", norm="weighted"),
    "weighted-10": Arm("the same, weights as they are: no bias, most noise", norm="weighted", bound=10.0),
    "renorm": Arm("weighted running averages, normalised by them: no bias, and noise averaged away", norm="renorm"),
    "frozen": Arm("recalibrated, then frozen at half of training: no bias from there, if they age well", frozen="half"),
    "refrozen": Arm("recalibrated and frozen at each pruned pass: no bias, young statistics", frozen="pass"),
    "balanced": Arm("every batch has its share of each weight: less noise, the bias stays", balanced=True),
    "balanced-weighted": Arm("both: weighted statistics whose noise is dealt away", norm="weighted", balanced=True),
    "balanced-weighted-10": Arm("the same, unbounded", norm="weighted", balanced=True, bound=10.0),
    "balanced-renorm": Arm("both: running averages of even batches", norm="renorm", balanced=True),
    "renorm-slow": Arm("the same over a longer window: less noise, older statistics", norm="renorm", momentum=0.03),
    "renorm-weighted": Arm(
        "all three, slow: gradients through weighted statistics", norm="renorm-weighted", balanced=True, momentum=0.03
    ),
    "mild": Arm("chances of 0.25 at least: batches less biased, less gain to be had", pi_min=0.25),
    "mild-balanced-weighted": Arm(
        "all three: no bias, weights of 4 at most, their noise dealt away",
        norm="weighted",
        balanced=True,
        pi_min=0.25,
        bound=10.0,
    ),
    "mild-renorm": Arm("both: smaller shifts for renorm to bridge", norm="renorm", pi_min=0.25),
    "uniform-last": Arm("equal chances in the last pass, as many visits: its statistics are unbiased", uniform_last=1),
    "uniform-last-2": Arm("the same in the last two: more time to settle, less gain", uniform_last=2),
    "weighted-uniform-last": Arm("both: weighted first, unbiased at the end", norm="weighted", uniform_last=1),
    "mild-uniform-last": Arm("both: batches less biased, unbiased at the end", pi_min=0.25, uniform_last=1),
    "group-full": Arm("GroupNorm, all visits", policy="full", norm="group"),
    "group-shortened": Arm("GroupNorm, equal visits", policy="shortened", norm="group"),
    "group": Arm("GroupNorm: the loss separates over samples, so pruning pays", norm="group"),
}
# Weights divided by their mean over the plan: one with 1 / chance under Adam, another learning rate under SGD.
ARMS |= {
    f"{name}-step": dataclasses.replace(ARMS[name], rescale="step", why=f"{name}, the host's step size kept")
    for name in ("none", "renorm", "balanced-weighted-10", "mild-balanced-weighted", "mild", "group")
}


def chances(scores: np.ndarray, total: int, pi_min: float) -> np.ndarray:
    """Clip ``c * scores`` to ``[pi_min, 1]``, c such that the chances sum to ``total``."""
    low, high = 0.0, 1.0 / max(float(scores[scores > 0].min()), 1e-12)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(middle * scores, pi_min, 1).sum() < total else (low, middle)
    return np.clip(high * scores, pi_min, 1)


def systematic(pi: np.ndarray, total: int, rng: np.random.Generator) -> np.ndarray:
    """Draw exactly ``total`` indices, index i with chance ``pi[i]``, over a random order."""
    order = rng.permutation(len(pi))
    reach = np.cumsum(pi[order])
    ticks = np.floor(reach * (total / reach[-1]) + rng.random())
    return order[np.diff(ticks, prepend=0.0) > 0][:total]


def batches(
    arm: Arm, n: int, scores: np.ndarray, args: argparse.Namespace, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray, float, float, bool]]:
    """Yield indices, weights, their mean over the plan, progress in [0, 1), and whether a pruned pass begins."""
    size, full = args.batch_size, n // args.batch_size
    steps = full * args.passes
    equal = round((1 - args.saving) * steps)
    if arm.policy != "variance":
        steps = steps if arm.policy == "full" else equal
        for step in range(steps):
            if step % full == 0:
                order = rng.permutation(n)
            yield order[step % full * size :][:size], np.ones(size), 1.0, step / steps, False
        return
    cuts = np.diff(np.linspace(0, equal - full, args.passes).round()).astype(int)
    for pass_index, kept in enumerate([full, *cuts]):
        if pass_index == 0:
            picked, weights = rng.permutation(n)[: kept * size], np.ones(kept * size)
        else:
            equal_chances = pass_index >= args.passes - arm.uniform_last
            pi = chances(np.ones(n) if equal_chances else scores, kept * size, arm.pi_min)
            picked = rng.permutation(systematic(pi, kept * size, rng))
            if arm.balanced:
                picked = picked[deal(1 / pi[picked], size, rng)]
            weights = 1 / pi[picked]
        for b in range(kept):
            part = slice(b * size, (b + 1) * size)
            progress = (pass_index + b / kept) / args.passes
            yield picked[part], weights[part], float(weights.mean()), progress, pass_index > 0 and b == 0


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


def train(task: Task, arm: Arm, seed: int, args: argparse.Namespace) -> dict[str, object]:
    """Train one arm and test it."""
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
    scores, visits, forward_only, frozen = np.zeros(n), 0, 0, False

    def inputs(count: int, shares: np.ndarray | None = None) -> Iterator[Tensor]:
        for _ in range(count):
            yield task.batch(extra.choice(n, args.batch_size, replace=False, p=shares), extra)[0]

    model.train()
    start = time.perf_counter()
    for indices, weights, mean, progress, begins in batches(arm, n, scores, args, draws):
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
        warm = min((progress + 1e-3) / 0.05, 1.0)
        decay = 0.5 * (1 + math.cos(math.pi * max(progress - 0.05, 0) / 0.95))
        optimizer.param_groups[0]["lr"] = args.lr * warm * decay
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
    return result


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
            row = {**key, "command": command, **dataclasses.asdict(ARMS[name]), **train(task, ARMS[name], seed, args)}
            done = json.loads(args.json.read_text()) if args.json.exists() else []
            part = args.json.with_suffix(".part")
            part.write_text(json.dumps([*done, row], indent=1) + "\n")
            part.replace(args.json)
            print(name, seed, row["test"], row.get("recalibrated"), row["seconds"], file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
