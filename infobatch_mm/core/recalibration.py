"""Running statistics of batch normalisation, estimated once more on uniform batches.

A loss under batch statistics does not separate over samples. The batches of a pruned pass are a biased sample: hard
samples are more frequent in them than in the data, and weights on the losses cannot repair means and variances that
were taken over all alike. The running statistics, which evaluation normalises by, are of the batches then and not of
the data. Estimating them once more on batches that are drawn uniformly mends the evaluation, not the training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import rng
from .distributed import Group, all_gather_ragged, gather, rank, world_size

if TYPE_CHECKING:
    from .training import Training

#: What an option ``norm`` may say.
NORMS = ("recalibrate",)
#: Batches of all processes that statistics are estimated on: their noise is a quarter of one batch's.
BATCHES = 16
# Full batches after which running averages with the usual momentum of 0.1 hold less than 1 % of what was before.
_FORGOTTEN = 44
# Tells the draws of its batches from the plans' own.
_KEY = 0x6E6F726D


def check_norm(norm: str | None) -> None:
    """Refuse an option that is unknown.

    Raises:
        ValueError: With the ones that are known.
    """
    if norm is not None and norm not in NORMS:
        raise ValueError(
            f"norm={norm!r}: use 'recalibrate', which estimates the running statistics of batch normalisation on "
            "uniform batches before each evaluation, or leave it out"
        )


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The layers that normalise by batch statistics and keep running ones: ``BatchNorm`` and ``SyncBatchNorm``.

    Layers in evaluation mode, frozen ones, normalise by what they have and are left alone.
    """
    return [
        each
        for each in model.modules()
        if isinstance(each, _BatchNorm) and each.training and each.track_running_stats and each.running_mean is not None
    ]


def uniform_batches(num_samples: int, batch_size: int, key: tuple[int, ...], place: int, world: int) -> list[list[int]]:
    """Sample indices of this process's batches, drawn without replacement, the same for the same key.

    Args:
        num_samples (int): Size N of the data set.
        batch_size (int): Samples in a batch of one process.
        key (tuple[int, ...]): Non-negative numbers that the draw follows from, such as seed and pass.
        place (int): Rank of this process.
        world (int): Number of processes.

    Returns:
        list[list[int]]: ``BATCHES`` divided among the processes, fewer of a small data set; all of one size.
    """
    order = torch.randperm(num_samples, generator=rng.generator(*key), device="cpu")
    # As many batches, as large, on every process: synchronised layers wait for each other.
    batch_size = max(1, min(batch_size, num_samples // world))
    count = min(max(1, BATCHES // world), num_samples // (batch_size * world))
    own = order[place::world][: count * batch_size]
    return [batch.tolist() for batch in own.split(batch_size)]


class Recalibration:
    """Estimates the running statistics of a training's model, where they still hold some of a pruned pass.

    Args:
        training (Training): Counts the visits.
    """

    def __init__(self, training: Training) -> None:
        self._training = training

    def run(
        self,
        model: nn.Module,
        read: Callable[[list[list[int]]], Iterable[Any]],
        forward: Callable[[Any], object],
        batch_size: int,
    ) -> int:
        """Estimate them on uniform batches; every process must call it.

        Args:
            model (nn.Module): The model, in the mode that it is trained in.
            read (Callable): Gives the batches of some lists of sample indices.
            forward (Callable): Runs the model on such a batch.
            batch_size (int): Samples in a batch of this process.

        Returns:
            int: Number of layers; 0 where there are none, or the statistics are of full passes.
        """
        training = self._training
        # Agreed on: a process that stays behind would leave the others waiting.
        if not any(gather(self._is_biased, training.group)):
            return 0
        world = world_size(training.group)
        with estimating(model, training.group) as layers:
            if layers:
                key = (training.seed, training.pass_index, training.visits, _KEY)
                num_samples = training.schedule.num_samples
                batches = uniform_batches(num_samples, batch_size, key, rank(training.group), world)
                for batch in read(batches):
                    forward(batch)
                training.forward_visits += sum(map(len, batches)) * world
        return len(layers)

    @property
    def _is_biased(self) -> bool:
        """Whether the running statistics still hold some of a pruned pass."""
        training = self._training
        if training.last_pruned < 0:
            return False
        since = training.visited if training.pass_index > training.last_pruned else 0
        since += sum(entry["kept"] for entry in training.history if entry["pass"] > training.last_pruned)
        return since < _FORGOTTEN * training.schedule.batch_size


@contextmanager
def estimating(model: nn.Module, group: Group = None) -> Iterator[list[_BatchNorm]]:
    """Take the running statistics anew from the forward passes inside, which must be in training mode.

    Nothing else of the process is changed: random generators, momenta and counts of batches are put back. A layer that
    sees no batch keeps its statistics, as all do if an exception ends it. Means and variances are averages over batches
    and processes.

    Args:
        model (nn.Module): The model, on every process.
        group (ProcessGroup, optional): The processes that share the data. Defaults to all.

    Yields:
        list[_BatchNorm]: The layers; empty where there is nothing to do.
    """
    layers = batch_norms(model)
    before = [
        (each.momentum, _copy(each.num_batches_tracked), _copy(each.running_mean), _copy(each.running_var))
        for each in layers
    ]
    generators = rng.capture()
    for each in layers:
        each.momentum = None  # type: ignore[assignment] # a cumulative average
        each.reset_running_stats()
    is_done = False
    try:
        with torch.no_grad():
            yield layers
        _average([found for each in layers for found in (each.running_mean, each.running_var)], group)
        is_done = True
    finally:
        for each, (momentum, tracked, mean, variance) in zip(layers, before, strict=True):
            assert each.running_mean is not None and each.running_var is not None
            if not is_done or each.num_batches_tracked is None or not int(each.num_batches_tracked):
                each.running_mean.copy_(mean)
                each.running_var.copy_(variance)
            each.momentum = momentum
            if each.num_batches_tracked is not None:
                each.num_batches_tracked.copy_(tracked)
        rng.restore(generators)


def _average(tensors: list[Tensor | None], group: Group) -> None:
    """Put the mean over processes into each tensor; every process must call it, with as many of the same sizes."""
    known = [each for each in tensors if each is not None]
    if world_size(group) == 1 or not known:
        return
    everyones = all_gather_ragged(torch.cat([each.float().flatten().cpu() for each in known]), group)
    mean = torch.stack(everyones).mean(0)
    for each, part in zip(known, mean.split([each.numel() for each in known]), strict=True):
        each.copy_(part.view_as(each))


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()
