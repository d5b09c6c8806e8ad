"""What can be done for BatchNorm where the visited samples are drawn with unequal chances."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

KINDS = ("none", "weighted", "renorm", "renorm-weighted", "group")


@dataclass
class Draw:
    """The batch that is trained on, as all normalisation layers of a model see it.

    Args:
        weights (Tensor, optional): Shape ``(B,)``, 1 / chance. ``None`` in full passes: layers are the host's then.
        mean_weight (float): Mean weight over the whole plan. Defaults to 1.
    """

    weights: Tensor | None = None
    mean_weight: float = 1.0


class WeightedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose batch statistics weigh each sample, with a bound on the weights.

    Unbounded, the statistics estimate the statistics of a uniform batch; a large weight makes them noisy.

    Args:
        width (int): Channels.
        draw (Draw): The batch in hand, shared by all layers.
        bound (float): Larger weights count as this one.
    """

    def __init__(self, width: int, draw: Draw, bound: float) -> None:
        super().__init__(width)
        self.draw, self.bound = draw, bound

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.draw.weights is None:
            return super().forward(x)
        weights = self.draw.weights.clamp(max=self.bound)
        share = weights / weights.sum()
        mean = share @ x.mean((2, 3))
        centred = x - mean[:, None, None]
        var = share @ centred.square().mean((2, 3))
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var, self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return centred * scale[:, None, None] + self.bias[:, None, None]


class BatchRenorm2d(nn.BatchNorm2d):
    """Batch renormalisation (Ioffe, NeurIPS 2017) with weighted running averages.

    The forward pass normalises by running statistics of the uniform distribution, as evaluation does; gradients flow
    through the statistics of the batch. ``r`` and ``d`` are bounded by 3 and 5, as in the paper. Full passes are
    BatchNorm's own: they are the warm-up.

    Args:
        width (int): Channels.
        draw (Draw): The batch in hand, shared by all layers.
        weighted (bool): Whether gradients flow through weighted statistics of the batch. Defaults to False.
        r_max (float): Bound of the ratio of deviations, at least 1. Defaults to 3.
        d_max (float): Bound of the shift of means, in running deviations. Defaults to 5.
    """

    def __init__(self, width: int, draw: Draw, weighted: bool = False, r_max: float = 3.0, d_max: float = 5.0) -> None:
        super().__init__(width)
        self.draw, self.weighted, self.r_max, self.d_max = draw, weighted, r_max, d_max

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.draw.weights is None:
            return super().forward(x)
        weights = self.draw.weights if self.weighted else torch.ones_like(self.draw.weights)
        share = weights / weights.sum()
        means = x.mean((2, 3))
        mean = share @ means
        centred = x - mean[:, None, None]
        spreads = centred.square().mean((2, 3))
        var = share @ spreads
        with torch.no_grad():
            self._track(means, spreads + 2 * mean * means - mean.square())
            running = torch.sqrt(self.running_var + self.eps)
            r = (torch.sqrt(var + self.eps) / running).clamp(1 / self.r_max, self.r_max)
            d = ((mean - self.running_mean) / running).clamp(-self.d_max, self.d_max)
        scale = self.weight * r * torch.rsqrt(var + self.eps)
        return centred * scale[:, None, None] + (self.weight * d + self.bias)[:, None, None]

    def _track(self, means: Tensor, squares: Tensor) -> None:
        """Move the running moments towards each sample's, as far as its weight says: their fixed point is unbiased.

        Args:
            means (Tensor): Shape ``(B, C)``, mean of each sample.
            squares (Tensor): Shape ``(B, C)``, mean square of each sample.
        """
        assert self.draw.weights is not None
        step = self.momentum * self.draw.weights / (len(means) * self.draw.mean_weight)
        second = self.running_var + self.running_mean.square()
        second += step @ (squares - second)
        self.running_mean += step @ (means - self.running_mean)
        self.running_var.copy_((second - self.running_mean.square()).clamp(min=0))


def make_norm(kind: str, width: int, draw: Draw, bound: float) -> nn.Module:
    """Make a normalisation layer.

    Args:
        kind (str): ``"none"`` (BatchNorm as it is), ``"weighted"``, ``"renorm"``, ``"renorm-weighted"`` or ``"group"``
            (GroupNorm).
        width (int): Channels, a multiple of 4.
        draw (Draw): The batch in hand.
        bound (float): Bound on the weights of ``"weighted"``.
    """
    if kind == "group":
        return nn.GroupNorm(4, width)
    if kind == "weighted":
        return WeightedBatchNorm2d(width, draw, bound)
    if kind in ("renorm", "renorm-weighted"):
        return BatchRenorm2d(width, draw, weighted=kind == "renorm-weighted")
    if kind == "none":
        return nn.BatchNorm2d(width)
    raise ValueError(f"no normalisation is called {kind!r}; choose from {', '.join(KINDS)}")


def batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    """List the BatchNorm layers of a model."""
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


@torch.no_grad()
def recalibrate(model: nn.Module, draw: Draw, batches: Iterable[Tensor]) -> float:
    """Estimate running statistics again as their plain mean over uniform batches, forward only.

    Args:
        model (nn.Module): A model with BatchNorm; is left in training mode.
        draw (Draw): The batch in hand; its weights are taken away meanwhile.
        batches (Iterable): Inputs, shape ``(B, 3, H, W)``, drawn uniformly.

    Returns:
        float: How far the running means were off, in deviations, mean over channels and layers.
    """
    layers = batch_norms(model)
    before = [layer.running_mean.clone() for layer in layers]
    momenta = [layer.momentum for layer in layers]
    weights, draw.weights = draw.weights, None
    model.train()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
    for x in batches:
        model(x)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    draw.weights = weights
    shifts = [
        ((old - layer.running_mean).abs() / torch.sqrt(layer.running_var + layer.eps)).mean()
        for old, layer in zip(before, layers, strict=True)
    ]
    return float(torch.stack(shifts).mean())


def freeze(model: nn.Module) -> None:
    """Normalise by running statistics from here on, until the next ``model.train()``."""
    for layer in batch_norms(model):
        layer.eval()


def deal(weights: np.ndarray, batch: int, rng: np.random.Generator) -> np.ndarray:
    """Order visits such that each batch holds its share of every stratum of weights.

    Visits are sorted by weight and cut into ``batch`` strata of equal size; each batch takes one visit of each.

    Args:
        weights (ndarray): Shape ``(K,)``, K a multiple of ``batch``.
        batch (int): Samples in a batch.
        rng (Generator): Breaks ties, and deals.

    Returns:
        ndarray: Shape ``(K,)``, positions in ``weights``, batch after batch.
    """
    shuffled = rng.permutation(len(weights))
    strata = shuffled[np.argsort(weights[shuffled], kind="stable")].reshape(batch, -1)
    return rng.permuted(strata, axis=1).T.reshape(-1)
