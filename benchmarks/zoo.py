"""Every method folder of the installed MMSegmentation, weighed: how exact it is and what a step costs.

    python benchmarks/zoo.py [--json OUT] [--markdown OUT] [FOLDER ...]

One config of each folder (ADE20K's cheapest where there is one) is built on the CPU, without pretrained weights and
with BatchNorm for SyncBN, and takes training steps on random images and labels, as small as the model allows. Reported
are: the relative error of loss and gradients with all weights 1 against the untouched model; that of the gradients with
random weights against an oracle, which forms the weighted objective from the host's own losses; and the median ratio of
alternating steps with weighing and without. Exits with 1 if a folder that is weighed misses a tolerance.

Takes about ten minutes on two idle cores. On busy ones set OMP_WAIT_POLICY=passive, or threads burn them waiting for
each other.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import logging
import math
import random
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mmseg
import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import CheckpointLoader
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from paired import paired_steps
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from infobatch_mm.losses import AttachedViews, LossWeigher, attach_views

BATCH_SIZE, CLASSES_PER_IMAGE = 4, 8
IGNORED = 255
SIZES = (32, 64, 128, 256, 400, 512)
TOLERANCES = {"rel_err_ones": 1e-6, "rel_err_random": 1e-4}
#: Pairs of timed steps in a folder: at least and at most, and the seconds after which no more are begun.
MIN_PAIRS, MAX_PAIRS, TIME_BOX = 3, 11, 10.0

#: What the host says where something is not installed -> what that is.
NEEDS = {
    r"mmcv\._ext|mmcv\.ops|onedl-mmcv|mmcv-full": "mmcv with compiled operators",
    r"mmdet|BaseModule.__init__\(\) got an unexpected": "mmdet",  # BaseModule stands in for mmdet's heads
    r"VPD|ldm": "ldm, of latent-diffusion",
    r"mmpretrain": "mmpretrain",
    r"'(ftfy|regex)'": "ftfy and regex",
}


@dataclass
class Result:
    """What is reported of one folder; None for what does not apply."""

    config: str | None = None
    status: str = "not_built"
    path: str | None = None
    rel_err_ones: float | None = None
    rel_err_random: float | None = None
    step_ratio: float | None = None
    reason: str | None = None

    @property
    def failed(self) -> bool:
        """Whether views were attached and did not keep what they promise."""
        return self.path is not None and self.status != "ok"


# --- The host's models, small and on the CPU -------------------------------------------------------------------------


def config_root() -> Path:
    """Folder of the installed host's configs, in a wheel or in a source checkout."""
    package = Path(mmseg.__file__).parent
    wheel = package / ".mim" / "configs"
    return wheel if wheel.is_dir() else package.parent / "configs"


def method_folders(root: Path) -> list[str]:
    """Names of all folders that are not bases of others."""
    return sorted(folder.name for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("_"))


def cheapest_config(folder: Path) -> Path:
    """The config to build for a folder: ADE20K's if there is one, with the smallest backbone."""
    sizes = {r"r101|s101|hr48|large|[-_]l(?=[-_\d])|m48": 2, r"r18|tiny|slim|b0|s12|stdc1|[-_]t(?=[-_])": -2}
    sizes[r"small|mobile|[-_]s(?=[-_\d])"] = -1

    def cost(path: Path) -> tuple:
        name = path.stem
        size = sum(cost for pattern, cost in sizes.items() if re.search(pattern, name))
        usual = bool(re.search("cityscapes|coco-stuff164k", name))
        return "ade20k" not in name, not usual, size, "512x512" not in name, len(name), name

    return min(folder.glob("*.py"), key=cost)


def offline(node: Any) -> Any:
    """A copy of a model's config that downloads nothing and needs one process."""
    if isinstance(node, (list, tuple)):
        return type(node)(offline(item) for item in node if not _is_checkpoint(item))
    if not isinstance(node, dict):
        return "BN" if node in ("SyncBN", "MMSyncBN") else node
    kept = {key: offline(value) for key, value in node.items() if key != "checkpoint" and not _is_checkpoint(value)}
    return ConfigDict({**kept, **{key: None for key in kept if key == "pretrained"}})


def _is_checkpoint(node: Any) -> bool:
    return isinstance(node, dict) and str(node.get("type", "")).startswith("Pretrained")


def shrunk(cfg: ConfigDict, size: int) -> ConfigDict:
    """A copy of a model's config for images of this size, and with one prompt for each class name."""
    cfg = ConfigDict(cfg.to_dict())
    for encoder in filter(None, (cfg.get("backbone"), cfg.get("image_encoder"))):
        for key in ("img_size", "pad_shape"):
            if encoder.get(key):
                encoder[key] = (size, size)
    if "text_encoder" in cfg:
        cfg.text_encoder.templates = ["a photo of a {}."]
    return cfg


def build(cfg: ConfigDict) -> nn.Module:
    """A model in training mode, every parameter of which is initialised."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # uninitialised memory becomes NaN
    try:
        with patch.object(CheckpointLoader, "load_checkpoint", return_value=torch.randn(8, 768)):
            model = MODELS.build(cfg)  # VPD loads embeddings of its classes
        with suppress(AttributeError):  # heads that know their weights from checkpoints only (SAN's)
            model.init_weights()
    finally:
        torch.use_deterministic_algorithms(False)
    for parameter in model.parameters():  # what only a checkpoint would have filled
        if not parameter.isfinite().all():
            nn.init.normal_(parameter, std=0.02)
    return model.train()


def random_batch(num_classes: int, size: int) -> tuple[Tensor, list[SegDataSample]]:
    """Random images and labels, a different share of which is ignored in each sample."""
    samples = []
    for i in range(BATCH_SIZE):
        shape = (size, size)
        ignored = torch.rand(1, *shape) < (i + 0.5) / (BATCH_SIZE + 1)
        meta = dict(img_shape=shape, ori_shape=shape, pad_shape=shape, batch_input_shape=shape)
        present = torch.randint(0, num_classes, (CLASSES_PER_IMAGE,))
        labels = present[torch.randint(0, CLASSES_PER_IMAGE, (1, *shape))].masked_fill(ignored, IGNORED)
        sample = SegDataSample(metainfo=meta)
        sample.gt_sem_seg = PixelData(data=labels)
        sample.gt_edge_map = PixelData(data=torch.randint(0, 2, (1, *shape)))
        sample.gt_depth_map = PixelData(data=(1 + 9 * torch.rand(1, *shape)).masked_fill(ignored, 0))
        samples.append(sample)
    return torch.randn(BATCH_SIZE, 3, size, size), samples


def build_smallest(cfg: ConfigDict) -> tuple[Case, float, list[Tensor]]:
    """The model on the smallest images with which it trains, and the loss and gradients there."""
    built: ConfigDict | None = None
    error: Exception | None = None
    for size in SIZES:
        seed()
        if (wanted := shrunk(cfg, size)) != built:
            case, built = Case(build(wanted)), wanted
        case.images, case.samples = random_batch(case.model.num_classes, size)
        try:
            loss, grads = case.run()
            if math.isfinite(loss) and 0 < norm(grads) < math.inf:
                return case, loss, grads
            error = FloatingPointError(f"loss {loss:.3g}, gradients {norm(grads):.3g}")
        except Exception as this:
            error = this
    raise RuntimeError(f"trains at no size up to {SIZES[-1]}: {one_line(error)}")


# --- Steps that can be repeated --------------------------------------------------------------------------------------


def seed() -> None:
    """The same random numbers from here on: dropout, sampled points."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def norm(grads: list[Tensor]) -> float:
    """Norm over all parameters."""
    return torch.stack([torch.linalg.vector_norm(grad) for grad in grads]).double().norm().item()


def relative_error(grads: list[Tensor], expected: list[Tensor]) -> float:
    """Norm of the difference over the norm of what is expected."""
    return norm([a - b for a, b in zip(grads, expected, strict=True)]) / norm(expected)


class Case:
    """A model with its batch.

    Args:
        model (nn.Module): The host's model. Buffers are restored before each run, so that all runs are the same.
    """

    images: Tensor
    samples: list[SegDataSample]

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def loss(self) -> Tensor:
        """The total loss of a training step."""
        return self.model.parse_losses(self.model.loss(self.images, self.samples))[0]

    def run(self) -> tuple[float, list[Tensor]]:
        """Loss and gradients from the same state and random numbers each time."""
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(self.buffers[name])
        self.model.zero_grad(set_to_none=True)
        seed()
        loss = self.loss()
        loss.backward()
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        self.model.zero_grad(set_to_none=True)
        return loss.item(), grads


# --- The oracle: sum of weight times contribution, by brute force, from the host's own losses ------------------------

#: Heads that match queries to masks: each sample's loss is theirs on that sample alone.
MATCHING_HEADS = ("MaskFormerHead", "Mask2FormerHead", "SideAdapterCLIPHead")


@contextmanager
def oracle(model: nn.Module, weights: Tensor) -> Iterator[None]:
    """Make an untouched model return the weighted objective of a pruned pass as its loss."""
    heads = [module for module in model.modules() if type(module).__name__ in MATCHING_HEADS]
    inside = {module for head in heads for module in head.modules()}
    handles = []
    for module in model.modules():
        if type(module).__module__.startswith("mmseg.models.losses") and module not in inside:
            handles.append(module.register_forward_hook(partial(weighed_call, weights), with_kwargs=True))
    for head in heads:
        head.loss_by_feat = partial(weighed_matching, weights, head.loss_by_feat)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for head in heads:
            del head.loss_by_feat


def weighed_call(weights: Tensor, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
    """The weighted objective in the place of a loss module's output."""
    if not output.requires_grad:
        return output  # without a valid pixel, or what a pixel sampler chooses pixels by
    contributions = CONTRIBUTIONS.get(type(module).__name__, alone_contributions)
    return sum(weight * part for weight, part in zip(weights, contributions(module, args, kwargs), strict=True))


def alone_contributions(module: nn.Module, args: tuple, kwargs: dict) -> list[Tensor]:
    """Means over samples, and losses that do not separate: the host's loss of each sample alone, over B."""
    parts = []
    for i in range(BATCH_SIZE):
        only = [sample_of(arg, i) for arg in args]
        parts.append(module.forward(*only, **{key: sample_of(value, i) for key, value in kwargs.items()}).mean())
    return [part / BATCH_SIZE for part in parts]


def pixel_contributions(module: nn.Module, args: tuple, kwargs: dict) -> list[Tensor]:
    """Losses that sum over pixels: the host's sum with all other samples ignored, over the host's own normaliser."""
    pred, label, *rest = args
    kwargs = dict(kwargs, ignore_index=kwargs.get("ignore_index", -100))
    total = module.forward(pred, label, *rest, **dict(kwargs, reduction_override="sum"))
    normaliser = (total / module.forward(pred, label, *rest, **kwargs)).detach()
    parts = []
    for i in range(BATCH_SIZE):
        only = torch.full_like(label, kwargs["ignore_index"])
        only[i] = label[i]
        parts.append(module.forward(pred, only, *rest, **dict(kwargs, reduction_override="sum")) / normaliser)
    return parts


def ohem_contributions(module: nn.Module, args: tuple, kwargs: dict) -> list[Tensor]:
    """The hardest pixels' mean: which pixels the host kept shows in the gradient, and they stay chosen."""
    score, target = args
    leaf = score.detach().requires_grad_()
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(module.forward(leaf, target), leaf)
    kept = (grad != 0).any(dim=1)
    class_weight = None if module.class_weight is None else score.new_tensor(module.class_weight)
    losses = F.cross_entropy(score, target, class_weight, ignore_index=module.ignore_label, reduction="none")
    return [module.loss_weight * losses[i][kept[i]].sum() / kept.sum() for i in range(BATCH_SIZE)]


CONTRIBUTIONS = {
    "CrossEntropyLoss": pixel_contributions,
    "FocalLoss": pixel_contributions,
    "OhemCrossEntropy": ohem_contributions,
}


def weighed_matching(weights: Tensor, loss_by_feat: Callable[..., dict], *feats: Any) -> dict[str, Tensor]:
    """Mean of weight times loss of each sample alone; points are drawn from where the host's own form drew them."""
    before = torch.get_rng_state()
    loss_by_feat(*feats)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    alone = [loss_by_feat(*(sample_of_layers(feat, i) for feat in feats)) for i in range(BATCH_SIZE)]
    torch.set_rng_state(after)
    return {key: sum(weights[i] * alone[i][key] for i in range(BATCH_SIZE)) / BATCH_SIZE for key in alone[0]}


def sample_of(value: Any, i: int) -> Any:
    """One sample of a batched argument; what is not batched as it is."""
    return value[i : i + 1] if isinstance(value, Tensor) and value.dim() else value


def sample_of_layers(value: Any, i: int) -> Any:
    """One sample of predictions (a tensor or a list over layers) or of a list over samples."""
    if isinstance(value, Tensor):
        return value[:, i : i + 1]
    return [layer[i : i + 1] for layer in value] if isinstance(value[0], Tensor) else value[i : i + 1]


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


def measure(case: Case, host_loss: float, host_grads: list[Tensor], result: Result) -> None:
    """Fill in the figures of a folder."""
    weights = 0.5 + torch.rand(BATCH_SIZE)
    with attached(case.model) as (weigher, views):
        result.path = "fast" if views.vectorised else "universal"
        weigher.begin(torch.ones(BATCH_SIZE), pruned=False)
        loss, grads = case.run()
        loss_error = abs(loss - host_loss) / abs(host_loss)
        result.rel_err_ones = max(loss_error, relative_error(grads, host_grads))
        del grads
        host_grads.clear()
        weigher.end()
        weigher.begin(weights, pruned=True)
        _, grads = case.run()
        weigher.end()
    with oracle(case.model, weights):
        _, expected = case.run()
    result.rel_err_random = relative_error(grads, expected)
    del grads, expected
    result.step_ratio = step_ratio(case, weights)
    for name, tolerance in TOLERANCES.items():
        if not getattr(result, name) <= tolerance:
            raise ValueError(f"{name} {getattr(result, name):.1e} above {tolerance:.0e}")


def step_ratio(case: Case, weights: Tensor) -> float:
    """Median of the ratios of alternating steps, with weighing over without."""
    pairs = paired_steps(case.model, case.loss, weights, lr=1e-6, most=MAX_PAIRS, least=MIN_PAIRS, seconds=TIME_BOX)
    return statistics.median(on / off for on, off in pairs)


def check_folder(folder: Path) -> Result:
    """Build one config of a folder and measure it; whatever happens ends up in the result."""
    result = Result()
    try:
        path = cheapest_config(folder)
        result.config = f"{folder.name}/{path.name}"
        small = build_smallest(offline(Config.fromfile(path).model))
    except Exception as error:
        result.reason = missing(error)
        return result
    try:
        measure(*small, result)
        result.status = "ok"
    except Exception as error:  # one folder does not end the run
        result.status = "refused"
        result.reason = str(error) if isinstance(error, ValueError) else one_line(error)
    return result


def one_line(error: BaseException | None) -> str:
    """Type and first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def missing(error: BaseException) -> str:
    """What to install, where that is why a model cannot be built."""
    chain: list[BaseException] = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    for pattern, package in NEEDS.items():
        if any(re.search(pattern, str(link)) for link in chain):
            return f"needs {package}"
    return one_line(error)


# --- Reporting -------------------------------------------------------------------------------------------------------


def markdown(results: dict[str, Result]) -> str:
    """The results as a table."""

    def cell(value: float | str | None, form: str) -> str:
        return "" if value is None else format(value, form)

    lines = [
        "| folder | config | path | weights 1 | random weights | step | reason |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        config = (r.config or "").partition("/")[2].removesuffix(".py")
        figures = (cell(r.rel_err_ones, ".1e"), cell(r.rel_err_random, ".1e"), cell(r.step_ratio, ".2f"))
        reason = "" if r.status == "ok" else f"{r.status}: {r.reason}".replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {' | '.join((name, config, r.path or '', *figures, reason))} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    root = config_root()
    names = method_folders(root)
    parser = argparse.ArgumentParser(description="weigh every method of the installed MMSegmentation")
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="default: all")
    parser.add_argument("--json", metavar="OUT")
    parser.add_argument("--markdown", metavar="OUT")
    args = parser.parse_args()
    unknown = sorted(set(args.folders) - set(names))
    if unknown:
        parser.error(f"{root} has no folder {', '.join(unknown)}")
    for path in (args.markdown, args.json):
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)  # before any time is spent

    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    init_default_scope("mmseg")
    results = {}
    console = Console(stderr=True)
    for name in track(args.folders or names, description="zoo", console=console):
        start = time.perf_counter()
        with redirect_stdout(io.StringIO()):
            result = results[name] = check_folder(root / name)
        gc.collect()
        seconds = time.perf_counter() - start
        console.print(f"{name}: {result.reason or result.path} ({seconds:.1f} s)", markup=False, highlight=False)
    table = markdown(results)
    print(table)
    if args.markdown:
        Path(args.markdown).write_text(table + "\n")
    if args.json:
        folders = {name: asdict(result) for name, result in results.items()}
        Path(args.json).write_text(json.dumps({"folders": folders}, indent=2) + "\n")
    sys.exit(any(result.failed for result in results.values()))


if __name__ == "__main__":
    main()
