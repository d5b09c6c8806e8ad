"""Batch augmentations that mix the images of a batch and their targets: Mixup, CutMix and their like."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core import rng
from .view import LossView
from .weigher import LossWeigher

_OTHER_RESULT = "it gives other images or targets when there are more classes, or draws from a generator of its own"
#: What is found out about a mixture of a batch, as whole numbers: why it is refused, above which number.
_WHY = (
    _OTHER_RESULT,
    "it makes an image of {} samples, expected one or two",
    "a sample has a negative share in an image",
    "the shares of the samples in an image do not add up to 1",
    "it makes an image of two other samples, expected its own and at most one other",
)
_MOST = (0, 2, 0, 0, 1)


class MixingView(LossView):
    """Stands in for a model's batch augmentation and learns what each mixed image is made of.

    The augmentation is given one more column of target scores for each sample, which names the sample. It mixes
    these columns like the others, so they come back as the shares of the samples in each image. Nothing else needs
    to be known about it; it draws the random numbers, and gives the images and targets, that it would alone.

    Args:
        owner (nn.Module): The data preprocessor.
        attribute (str): Where it has its augmentation: called with images, shape ``(B, C, H, W)``, and target
            scores, shape ``(B, classes)``, it returns both mixed.
        weigher (LossWeigher): Weights and scores of the batch.
        trusted (bool): Whether the augmentation is known to treat columns of scores alike, and to mix each
            sample with at most one other. Others are put to the proof, by running the augmentation twice in
            every step; on a device they are refused some steps after the one that shows it.
    """

    def __init__(self, owner: nn.Module, attribute: str, weigher: LossWeigher, *, trusted: bool) -> None:
        super().__init__(owner, attribute, weigher, scored=False)
        named = owner if isinstance(owner, nn.Module) and attribute == "forward" else self.host
        self.title = f"the batch augmentation {getattr(named, '__name__', type(named).__name__)}"
        self._trusted = trusted
        self._found: Tensor | None = None
        self._seen: Tensor | None = None

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
        if any(one.shape != other.shape for one, other in zip(alone, result, strict=True)):
            raise self._refused(_OTHER_RESULT)
        if shares.shape[0] != shares.shape[1]:
            raise self._refused(f"it makes {shares.shape[0]} images of {shares.shape[1]} samples")
        found = _findings(alone, result, shares)
        if found.device.type == "cpu":
            self._judge(found)
            return
        # A look at the device would make the step wait. What was found once stays, and comes over while steps go on.
        if self._found is None or self._seen is None:
            self._found = torch.zeros_like(found)
            self._seen = _written_meanwhile(found)
        self._judge(self._seen)
        self._found = torch.maximum(found, self._found)
        self._seen.copy_(self._found, non_blocking=True)

    def _judge(self, found: Tensor) -> None:
        for value, most, why in zip(found.tolist(), _MOST, _WHY, strict=True):
            if value > most:
                raise self._refused(why.format(value))

    def _refused(self, why: str) -> ValueError:
        return ValueError(f"{self.title} cannot be followed: {why}; remove it, or train without InfoBatchHook")


def _written_meanwhile(found: Tensor) -> Tensor:
    """Zeros on the CPU, into which a device can write while steps go on: in pinned memory, if there is such a thing."""
    zeros = torch.zeros(found.shape, dtype=found.dtype, device="cpu")
    try:
        return zeros.pin_memory()
    except (RuntimeError, NotImplementedError):  # of this device torch knows no pinned memory
        return zeros


def _findings(alone: tuple[Tensor, Tensor], result: tuple[Tensor, Tensor], shares: Tensor) -> Tensor:
    """The numbers of :data:`_WHY`, shape ``(5,)``, int64, on the device of the shares."""
    others = shares - shares.diagonal().diag()
    whole = shares.sum(1)
    return torch.stack(
        [
            torch.stack([(one != other).any() for one, other in zip(alone, result, strict=True)]).sum(),
            torch.count_nonzero(shares, dim=1).max(),
            (shares < 0).sum(),
            (~torch.isclose(whole, torch.ones_like(whole), atol=1e-3)).sum(),
            torch.count_nonzero(others, dim=1).max(),
        ]
    )
