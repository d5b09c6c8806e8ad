"""MMPretrain's self-supervised models in the zoo walk: batches of their own pipelines, the oracle of their heads."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.dataset import Compose, default_collate
from mmengine.logging import MessageHub
from mmpretrain.models import BaseSelfSupervisor
from mmpretrain.models.heads import LatentPredictHead, MixMIMPretrainHead
from mmpretrain.registry import MODELS
from torch import Tensor, nn
from zoo_host import BATCH_SIZE
from zoo_mmpretrain import MMPretrain, weighed_losses

#: Side of the random images that the pipelines crop and resize.
IMAGE_SIZE = 256
#: Generators of targets, whose weights would have to be downloaded -> what the table says of them.
UNTRAINED = {"RandomCLIP": "random, for CLIP's", "DALL-E": "DALL-E's, untrained", "VQKD": "VQ-KD's, untrained"}


class MMPretrainSelfSup(MMPretrain):
    """The cheapest config of each folder that trains without labels.

    Models are as large as they come, for their necks, masks and targets know the size of their images. Batches are
    what the config's own pipeline makes of random images: views, crops and masks.
    """

    sizes = (224,)
    out_of_scope = "not_self_supervised"
    wanted = "self-supervised model"
    patterns = ("*.py",)

    def is_wanted(self, model: dict) -> bool:
        cls = MODELS.get(model["type"])
        return inspect.isclass(cls) and issubclass(cls, BaseSelfSupervisor)

    def model_config(self, path: Path) -> ConfigDict:
        """The model with targets that need no download; batches come from the pipeline of the config last read."""
        self.pipeline = self.read(path).train_dataloader.dataset.pipeline[1:]  # the first loads a file
        model = super().model_config(path)
        if model.get("target_generator", {}).get("type") == "CLIPGenerator":
            model.target_generator = ConfigDict(type="RandomCLIP")
        if model.type == "MILAN":
            model.neck.embed_dim = 768  # the host's config leaves out how wide its encoder is
        return model

    def shrink(self, cfg: ConfigDict, size: int) -> None:
        """Nothing: see above."""

    def build(self, cfg: ConfigDict) -> nn.Module:
        MessageHub.get_current_instance().update_info("max_iters", 100)  # moving averages ask how long the run is
        return super().build(cfg)

    def random_batch(self, model: nn.Module, size: int) -> Any:
        pipeline = Compose(copy.deepcopy(self.pipeline))
        shape = (IMAGE_SIZE, IMAGE_SIZE)
        images = np.random.randint(0, 256, (BATCH_SIZE, *shape, 3), dtype=np.uint8)
        return default_collate([pipeline(dict(img=image, img_shape=shape, ori_shape=shape)) for image in images])

    def losses(self, model: nn.Module, batch: Any) -> dict:
        return model.loss(**model.data_preprocessor(batch, training=True))

    @contextmanager
    def oracle(self, model: nn.Module, weights: Tensor) -> Iterator[None]:
        """The sum of weight times the host's loss of each image alone, times its share of what is masked."""
        head = model.head
        if isinstance(head, LatentPredictHead):  # it normalises over the batch before the loss
            with weighed_losses(head, weights):
                yield
            return
        if isinstance(head, MixMIMPretrainHead):
            weights = weights * weights.flip(0)  # the first image is mixed with the last, and so on
        name = "loss" if callable(getattr(type(head), "loss", None)) else "forward"
        with patch.object(head, name, partial(weighed_head, weights, getattr(head, name))):
            yield

    def mixing(self, model: nn.Module) -> list[str]:
        return ["pairs"] if isinstance(model.head, MixMIMPretrainHead) else []

    def targets(self, cfg: ConfigDict) -> str | None:
        return UNTRAINED.get(cfg.get("target_generator", {}).get("type"))


HOST = MMPretrainSelfSup()


@MODELS.register_module()
class RandomCLIP(nn.Module):
    """In the place of CLIP: features of the class token and of 14 x 14 patches, and attention between them."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, 512, 16, stride=16)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        patches = self.project(images).flatten(2).transpose(1, 2)
        features = torch.cat([patches.mean(dim=1, keepdim=True), patches], dim=1)
        return features, (features @ features.transpose(1, 2)).softmax(dim=2)


def weighed_head(weights: Tensor, loss: Callable[..., Any], *args: Any) -> Any:
    """The weighted objective in the place of what a head's loss returns."""
    mask = inspect.signature(loss).bind(*args).arguments.get("mask")
    masked = torch.ones(BATCH_SIZE, dtype=torch.long)
    if isinstance(mask, Tensor) and len(mask) == BATCH_SIZE:
        masked = mask.flatten(1).sum(dim=1).long()
    shares = weights * masked / masked.sum()
    alone = [loss(*(part_of(arg, i, masked) for arg in args)) for i in range(BATCH_SIZE)]
    if isinstance(alone[0], tuple):
        return tuple(shares @ torch.stack(parts) for parts in zip(*alone, strict=True))
    return shares @ torch.stack(alone)


def part_of(value: Any, i: int, masked: Tensor) -> Any:
    """What belongs to one image: a row, the two rows of a mixed one, or its tokens of a list of all masked ones."""
    if len(value) == BATCH_SIZE:
        return value[i : i + 1]
    if len(value) == 2 * BATCH_SIZE:
        return value[[i, -1 - i]]
    return value.split(masked.tolist())[i] if len(value) == masked.sum() else value
