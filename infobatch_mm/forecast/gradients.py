"""Gradients of single samples at a checkpoint: their norms, what they add up to, and the scores beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..core import rng

#: Every sample is visited so often: what two visits of it have in common is the sample's, the rest is chance.
VIEWS = 2
#: Samples of which nothing can be said: fewer have no interval.
FEWEST = 8

# Buckets of a sketch: products of gradients are known to 1/64 of the product of their norms.
_BUCKETS = 4096
_SIGNS, _CHOICE = 1, 2


class Look(NamedTuple):
    """What one visit of a sample shows beside its gradient.

    Attributes:
        loss (float): What the sample is scored by where scores are losses; NaN where it has none.
        last_layer (float): Norm of the gradient that it sends into the last layer, as ``score='gradient'`` has it; NaN
            where that is not known.
    """

    loss: float
    last_layer: float


class Subject(Protocol):
    """A model at a checkpoint and its training data, as a host has them.

    Attributes:
        model (nn.Module): Ready to be trained on single samples.
        num_samples (int): Size N of the data set.
        batch_size (int): Samples in an optimiser step of all processes.
        remarks (list[str]): What is to be said of how it is looked at.
    """

    model: nn.Module
    num_samples: int
    batch_size: int
    remarks: list[str]

    def look(self, index: int, key: tuple[int, ...]) -> Look:
        """Visit one sample: forward pass, and a backward pass that adds to ``grad`` of the model's parameters.

        Args:
            index (int): Which sample.
            key (tuple[int, ...]): Non-negative numbers from which all chance of the visit follows.
        """


@dataclass(frozen=True)
class Measured:
    """What was measured of n samples, two visits of each.

    Attributes:
        indices (ndarray): Which samples, shape ``(n,)``, int64.
        num_samples (int): Size N of the data set that they were drawn from.
        squares (ndarray): Squared norms of the whole gradients, shape ``(n, 2)``, float64.
        inner (ndarray): Inner product of a sample's two gradients, shape ``(n,)``, float64.
        square_of_sum (float): Squared norm of the sum of all gradients.
        own_squares (ndarray): Squared norm of the sum of a sample's two gradients, shape ``(n,)``, float64.
        sketches (ndarray): Of the sums of a sample's two gradients, shape ``(n, K)``, float32: their inner products are
            the sums' own, within a few per cent.
        scores (dict[str, ndarray]): Scores by name, shape ``(n, 2)`` each, float64; NaN where a visit has none.
        left_out (int): Samples whose loss or gradient was not finite.
    """

    indices: np.ndarray
    num_samples: int
    squares: np.ndarray
    inner: np.ndarray
    square_of_sum: float
    own_squares: np.ndarray
    sketches: np.ndarray
    scores: dict[str, np.ndarray]
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.indices)


def choose(num_samples: int, wanted: int, seed: int) -> np.ndarray:
    """Samples drawn uniformly without replacement, in the order of the draw; all where fewer are there.

    Raises:
        ValueError: If there are too few to say anything.
    """
    taken = min(wanted, num_samples)
    if taken < FEWEST:
        asked = f"--samples {wanted}" if wanted <= num_samples else f"a data set of {num_samples} samples"
        raise ValueError(f"{asked}: gradients of {FEWEST} samples are the fewest that tell anything; use 256")
    order = torch.randperm(num_samples, generator=rng.generator(seed, _CHOICE), device="cpu")
    return order[:taken].numpy()


def measure(
    subject: Subject, indices: Sequence[int] | np.ndarray, seed: int = 0, done: Callable[[], None] | None = None
) -> Measured:
    """Take the gradients of samples, each alone and twice.

    Args:
        subject (Subject): The model and its data. Gradients of its parameters are cleared.
        indices (Sequence[int]): Which samples.
        seed (int): Of the visits' chance, at least 0. Defaults to 0.
        done (Callable, optional): Called after each sample.

    Raises:
        ValueError: If fewer samples than are needed have a finite gradient.
    """
    parameters = [each for each in subject.model.parameters() if each.requires_grad]
    size = sum(each.numel() for each in parameters)
    signs = torch.randint(0, 2, (size,), generator=rng.generator(seed, _SIGNS), dtype=torch.int8, device="cpu") * 2 - 1
    signs = signs.to(parameters[0].device)
    total = torch.zeros(size, device=signs.device)
    kept, squares, inner, own_squares, sketches, looks = [], [], [], [], [], []
    for index in indices:
        seen, gradients = [], []
        for view in range(VIEWS):
            subject.model.zero_grad(set_to_none=True)
            seen.append(subject.look(int(index), (seed, int(index), view)))
            gradients.append(_flat(parameters))
        own = gradients[0] + gradients[1]
        if bool(own.isfinite().all()):
            total += own
            kept.append(int(index))
            squares.append([_square(each) for each in gradients])
            inner.append(float(torch.dot(*gradients)))
            own_squares.append(_square(own))
            sketches.append(_sketch(own, signs))
            looks.append(seen)
        if done is not None:
            done()
    subject.model.zero_grad(set_to_none=True)
    if len(kept) < FEWEST:
        raise ValueError(
            f"{len(kept)} of {len(indices)} samples have a finite gradient, and {FEWEST} are needed: the checkpoint is "
            "of a training that diverged, or of another model"
        )
    by_view = np.asarray(looks, dtype=np.float64)
    scores = {name: by_view[:, :, place] for place, name in enumerate(("loss", "gradient"))}
    return Measured(
        np.asarray(kept),
        subject.num_samples,
        np.asarray(squares),
        np.asarray(inner),
        _square(total),
        np.asarray(own_squares),
        np.stack(sketches),
        {name: each for name, each in scores.items() if np.isfinite(each).any()},
        len(indices) - len(kept),
    )


def _flat(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The gradient of all weights, shape ``(P,)``, float32."""
    parts = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
    return torch.cat([each.detach().flatten().float() for each in parts])


def _square(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector)) ** 2


def _sketch(vector: Tensor, signs: Tensor) -> np.ndarray:
    """Add up a vector, with random signs, in a number of buckets: inner products stay as they are in expectation."""
    signed = vector * signs
    buckets = min(_BUCKETS, len(signed))
    padded = torch.nn.functional.pad(signed, (0, -len(signed) % buckets))
    return padded.view(-1, buckets).sum(0).cpu().numpy()
