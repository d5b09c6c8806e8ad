"""MMSegmentation in the zoo walk: its configs, batches, and the oracle of its losses."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.config import ConfigDict
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import Tensor, nn
from zoo_host import BATCH_SIZE, Host, loss_alone

CLASSES_PER_IMAGE = 8
IGNORED = 255

#: Heads that match queries to masks: each sample's loss is theirs on that sample alone.
MATCHING_HEADS = ("MaskFormerHead", "Mask2FormerHead", "SideAdapterCLIPHead")

#: What the host says where something is not installed -> what that is.
NEEDS = {
    r"mmcv\._ext|mmcv\.ops|onedl-mmcv|mmcv-full": "mmcv with compiled operators",
    r"mmdet|BaseModule.__init__\(\) got an unexpected": "mmdet",  # BaseModule stands in for mmdet's heads
    r"VPD|ldm": "ldm, of latent-diffusion",
    r"mmpretrain": "mmpretrain",
    r"'(ftfy|regex)'": "ftfy and regex",
}


class MMSegmentation(Host):
    """The cheapest config of ADE20K in each folder, where there is one."""

    package = "mmseg"
    sizes = (32, 64, 128, 256, 400, 512)
    needs = NEEDS

    def cheapest_config(self, folder: Path) -> Path:
        """The config to build for a folder: ADE20K's if there is one, with the smallest backbone."""
        sizes = {r"r101|s101|hr48|large|[-_]l(?=[-_\d])|m48": 2, r"r18|tiny|slim|b0|s12|stdc1|[-_]t(?=[-_])": -2}
        sizes[r"small|mobile|[-_]s(?=[-_\d])"] = -1

        def cost(path: Path) -> tuple:
            name = path.stem
            size = sum(cost for pattern, cost in sizes.items() if re.search(pattern, name))
            usual = bool(re.search("cityscapes|coco-stuff164k", name))
            return "ade20k" not in name, not usual, size, "512x512" not in name, len(name), name

        return min(folder.glob("*.py"), key=cost)

    def shrink(self, cfg: ConfigDict, size: int) -> None:
        """Images of this size, and one prompt for each class name."""
        for encoder in filter(None, (cfg.get("backbone"), cfg.get("image_encoder"))):
            for key in ("img_size", "pad_shape"):
                if encoder.get(key):
                    encoder[key] = (size, size)
        if "text_encoder" in cfg:
            cfg.text_encoder.templates = ["a photo of a {}."]

    def random_batch(self, model: nn.Module, size: int) -> tuple[Tensor, list[SegDataSample]]:
        """Random images and labels, a different share of which is ignored in each sample."""
        samples = []
        for i in range(BATCH_SIZE):
            shape = (size, size)
            ignored = torch.rand(1, *shape) < (i + 0.5) / (BATCH_SIZE + 1)
            meta = dict(img_shape=shape, ori_shape=shape, pad_shape=shape, batch_input_shape=shape)
            present = torch.randint(0, model.num_classes, (CLASSES_PER_IMAGE,))
            labels = present[torch.randint(0, CLASSES_PER_IMAGE, (1, *shape))].masked_fill(ignored, IGNORED)
            sample = SegDataSample(metainfo=meta)
            sample.gt_sem_seg = PixelData(data=labels)
            sample.gt_edge_map = PixelData(data=torch.randint(0, 2, (1, *shape)))
            sample.gt_depth_map = PixelData(data=(1 + 9 * torch.rand(1, *shape)).masked_fill(ignored, 0))
            samples.append(sample)
        return torch.randn(BATCH_SIZE, 3, size, size), samples

    def losses(self, model: nn.Module, batch: tuple[Tensor, list[SegDataSample]]) -> dict:
        return model.loss(*batch)

    @contextmanager
    def oracle(self, model: nn.Module, weights: Tensor) -> Iterator[None]:
        """The sum of weight times contribution, by brute force, from the host's own losses."""
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


HOST = MMSegmentation()


def weighed_call(weights: Tensor, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
    """The weighted objective in the place of a loss module's output."""
    if not output.requires_grad:
        return output  # without a valid pixel, or what a pixel sampler chooses pixels by
    contributions = CONTRIBUTIONS.get(type(module).__name__, alone_contributions)
    return sum(weight * part for weight, part in zip(weights, contributions(module, args, kwargs), strict=True))


def alone_contributions(module: nn.Module, args: tuple, kwargs: dict) -> list[Tensor]:
    """Means over samples, and losses that do not separate: the host's loss of each sample alone, over B."""
    return [loss_alone(module, args, kwargs, i).mean() / BATCH_SIZE for i in range(BATCH_SIZE)]


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


def sample_of_layers(value: Any, i: int) -> Any:
    """One sample of predictions (a tensor or a list over layers) or of a list over samples."""
    if isinstance(value, Tensor):
        return value[:, i : i + 1]
    return [layer[i : i + 1] for layer in value] if isinstance(value[0], Tensor) else value[i : i + 1]
