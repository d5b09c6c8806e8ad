"""MMPretrain in the zoo walk: the configs that train a classifier, batches, and the oracle of their losses."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import yaml
from mmengine.config import Config, ConfigDict
from mmpretrain.models.heads import MultiLabelClsHead
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import Tensor, nn
from zoo_host import BATCH_SIZE, Host, OutOfScopeError, loss_alone, offline

CLASSES = 20
LABELS_PER_IMAGE = 3
CLASSIFIERS = ("ImageClassifier", "ImageToImageRetriever", "TimmClassifier", "HuggingFaceClassifier")

#: What the host says where something is not installed -> what that is.
NEEDS = {
    r"mmcv\._ext|mmcv\.ops|onedl-mmcv|mmcv-full": "mmcv with compiled operators",
    r"mmdet": "mmdet",
    "requires timm": "timm",
    "requires transformers": "transformers",
}


class MMPretrain(Host):
    """The cheapest config of each folder that trains a classifier: ImageNet-1k's where there is one.

    Batches go through the data preprocessor in each step, and with it through Mixup and CutMix.
    """

    package = "mmpretrain"
    sizes: tuple[int, ...] = (32, 64, 128, 192, 224, 256, 384)
    needs = NEEDS
    out_of_scope = "not_classification"
    #: What is weighed here, and where its configs are; self-supervised methods are evaluated by classification.
    wanted = "classifier"
    patterns: tuple[str, ...] = ("*.py", "benchmarks/*.py")

    def is_wanted(self, model: dict) -> bool:
        """Whether a model's config is one of those; models in deploy/ do not train."""
        return model["type"] in CLASSIFIERS and bool(model.get("head") or "head" not in model)

    def cheapest_config(self, folder: Path) -> Path:
        """Of the configs that are wanted the one with the fewest operations, as the host's metafile has it."""
        models = []
        if (metafile := folder / "metafile.yml").is_file():
            models = yaml.safe_load(metafile.read_text(encoding="utf-8"))["Models"]
        flops = {Path(each["Config"]).name: each["Metadata"].get("FLOPs") for each in models}

        def cost(path: Path) -> tuple:
            name = path.stem
            return "in1k" not in name, "linear" in name, flops.get(path.name) or math.inf, len(name), name

        paths = sorted([path for pattern in self.patterns for path in folder.glob(pattern)], key=cost)
        found = set()
        for path in paths:
            with suppress(ModuleNotFoundError, KeyError):  # detection, and configs that the host ships broken
                model = self.read(path)["model"]
                if self.is_wanted(model):
                    return path
                found.add(f"{model['type']} without a head" if model["type"] in CLASSIFIERS else model["type"])
        raise OutOfScopeError(f"trains no {self.wanted}, but {', '.join(sorted(found))}")

    def read(self, path: Path) -> Config:
        """The whole of a config."""
        return Config.fromfile(path, lazy_import=False)  # RepLKNet's are taken for lazy ones

    def model_config(self, path: Path) -> ConfigDict:
        """The model with its data preprocessor and with few classes."""
        config = self.read(path)
        model = offline(config.model)
        model.setdefault("data_preprocessor", offline(config.get("data_preprocessor", ConfigDict())))
        for part in _parts(model):
            if "num_classes" in part:
                part.num_classes = min(part.num_classes, CLASSES)
            if part.get("distillation") is not False and "distillation" in _options(part):
                part.distillation = False  # the host cannot train with it
        if model.type == "ImageToImageRetriever":
            model.prototype = "not needed in training"
        return model

    def shrink(self, cfg: ConfigDict, size: int) -> None:
        """Images of this size for all parts that know theirs, and windows that may be larger than a map."""
        for part in _parts(cfg):
            options = _options(part)
            if "img_size" in part or "img_size" in options:
                part.img_size = (size, size) if isinstance(part.get("img_size"), (list, tuple)) else size
            if "pad_small_map" in options:
                part.pad_small_map = True

    def build(self, cfg: ConfigDict) -> nn.Module:
        """No weights that are zero: behind a classifier that starts with them nothing gets a gradient."""
        model = super().build(cfg)
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        return model

    def random_batch(self, model: nn.Module, size: int) -> tuple[Tensor, list[Tensor]]:
        """Images as a loader gives them, and the labels of each."""
        holders = (getattr(model, "head", None), getattr(model, "backbone", None), model.data_preprocessor)
        classes = next(filter(None, (getattr(each, "num_classes", None) for each in holders)))
        channels = len(getattr(model.data_preprocessor, "mean", range(3)))
        if isinstance(getattr(model, "head", None), MultiLabelClsHead):
            labels = [torch.randperm(classes)[: 1 + i % LABELS_PER_IMAGE] for i in range(BATCH_SIZE)]
        else:
            labels = list(torch.randint(0, classes, (BATCH_SIZE, 1)))
        return torch.randint(0, 256, (BATCH_SIZE, channels, size, size), dtype=torch.uint8), labels

    def losses(self, model: nn.Module, batch: tuple[Tensor, list[Tensor]]) -> dict:
        images, labels = batch
        samples = [DataSample().set_gt_label(each.clone()) for each in labels]  # mixed targets are written to them
        return model.loss(**model.data_preprocessor(dict(inputs=images, data_samples=samples), training=True))

    @contextmanager
    def oracle(self, model: nn.Module, weights: Tensor) -> Iterator[None]:
        """The sum of weight times the host's loss of each image alone; a mixed one's weight is the product of both."""
        of_images = weights.clone()
        augment = model.data_preprocessor.batch_augments
        mixed = augment and partial(weighed_mixing, weights, of_images, augment)
        with weighed_losses(model, of_images), patch.object(model.data_preprocessor, "batch_augments", mixed):
            yield

    def mixing(self, model: nn.Module) -> list[str]:
        augment = model.data_preprocessor.batch_augments
        return [type(each).__name__ for each in augment.augments] if augment else []

    def seeds(self, model: nn.Module) -> range:
        return range(len(self.mixing(model)) or 1)  # of two batch augmentations these draw one each


HOST = MMPretrain()


def _parts(node: Any) -> Iterator[ConfigDict]:
    """A config and all configs inside it."""
    if isinstance(node, ConfigDict):
        yield node
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for each in node:
            yield from _parts(each)


def _options(cfg: ConfigDict) -> set[str]:
    """Names of what the class of a config can be given."""
    cls = MODELS.get(cfg.type) if isinstance(cfg.get("type"), str) else None
    return set(inspect.signature(cls.__init__).parameters) if inspect.isclass(cls) else set()


@contextmanager
def weighed_losses(model: nn.Module, weights: Tensor) -> Iterator[None]:
    """The heads' loss modules return the weighted objective; weights may change until they are called."""
    modules = {module.loss_module for module in model.modules() if hasattr(module, "loss_module")}
    handles = [module.register_forward_hook(partial(weighed_call, weights), with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def weighed_call(weights: Tensor, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
    """The weighted objective in the place of a loss module's output."""
    over = 1 if kwargs.get("avg_factor") else BATCH_SIZE  # a head that gives it has divided by B
    return sum(weights[i] * loss_alone(module, args, kwargs, i) / over for i in range(BATCH_SIZE))


def weighed_mixing(
    weights: Tensor, of_images: Tensor, augment: Any, images: Tensor, scores: Tensor
) -> tuple[Tensor, Tensor]:
    """Mix a batch, and find the weights of its images.

    Who is in which image is seen by first mixing others with the same random numbers: each lights up a channel
    of its own.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    names = torch.eye(BATCH_SIZE)[:, :, None, None].expand(-1, -1, *images.shape[2:]).clone()
    seen, _ = augment(names, scores.clone())
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    for i, image in enumerate(seen):
        of_images[i] = weights[image.flatten(1).any(dim=1)].prod()
    return augment(images, scores)
