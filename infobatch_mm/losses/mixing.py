"""Batch augmentations that mix the images of a batch and their targets: Mixup, CutMix and their like."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core import rng
from .views import LossView
from .weigher import LossWeigher


class MixingView(LossView):
    """Stands in for a model's batch augmentation and learns what each mixed image is made of.

    The augmentation is given one more column of target scores for each sample, which name it: mixed like the
    others, they come back as the shares of the samples in each image. Nothing else of it needs to be known,
    and what it draws and gives is what it would draw and give alone.

    Args:
        owner (nn.Module): The data preprocessor.
        attribute (str): Where it has its augmentation: called with images, shape ``(B, C, H, W)``, and target
            scores, shape ``(B, classes)``, it returns both mixed.
        weigher (LossWeigher): Weights and scores of the batch.
        trusted (bool): Whether the augmentation is known to treat columns of scores alike, and to mix each
            sample with at most one other. Others are put to the proof, whose cost is that of the
            augmentation, in every step.
    """

    def __init__(self, owner: nn.Module, attribute: str, weigher: LossWeigher, *, trusted: bool) -> None:
        super().__init__(owner, attribute, weigher, scored=False)
        named = owner if isinstance(owner, nn.Module) and attribute == "forward" else self.host
        self.title = f"the batch augmentation {getattr(named, '__name__', type(named).__name__)}"
        self._trusted = trusted

    def attach(self) -> None:
        super().attach()
        self.weigher.mixes = True

    def weighed(self, images: Tensor, scores: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        alone = None if self._trusted else self._alone(images, scores, *args, **kwargs)
        size, classes = scores.shape
        names = torch.eye(size, dtype=scores.dtype, device=scores.device)
        images, mixed = self.host(images, torch.cat([scores, names], dim=1), *args, **kwargs)
        scores, shares = mixed[:, :classes].contiguous(), mixed[:, classes:].float()
        if alone is not None:
            self._check(alone, (images, scores), shares)
        self.weigher.mix(shares)
        return images, scores

    def _alone(self, images: Tensor, scores: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        generators = rng.capture()
        result = self.host(images.clone(), scores.clone(), *args, **kwargs)
        rng.restore(generators)
        return result

    def _check(self, alone: tuple[Tensor, Tensor], result: tuple[Tensor, Tensor], shares: Tensor) -> None:
        same = all(
            one.shape == other.shape and torch.equal(one, other) for one, other in zip(alone, result, strict=True)
        )
        if not same:
            raise self._refused(
                "it gives other images or targets when there are more classes, or draws from a generator of its own"
            )
        if shares.shape[0] != shares.shape[1]:
            raise self._refused(f"it makes {shares.shape[0]} images of {shares.shape[1]} samples")
        most = int(torch.count_nonzero(shares, dim=1).max())
        if most > 2:
            raise self._refused(f"it makes an image of {most} samples, expected one or two")
        whole = shares.sum(1)
        if bool((shares < 0).any()):
            raise self._refused("a sample has a negative share in an image")
        if not torch.allclose(whole, torch.ones_like(whole), atol=1e-3):
            raise self._refused("the shares of the samples in an image do not add up to 1")
        others = shares - shares.diagonal().diag()
        if bool((torch.count_nonzero(others, dim=1) > 1).any()):
            raise self._refused("it makes an image of two other samples, expected its own and at most one other")

    def _refused(self, why: str) -> ValueError:
        return ValueError(f"{self.title} cannot be followed: {why}; remove it, or train without InfoBatchHook")
