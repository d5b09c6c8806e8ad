"""``norm='recalibrate'`` in runs of MMEngine: before each validation and each checkpoint."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from mmengine.hooks import EMAHook
from torch import nn
from torch.utils.data import DataLoader

from ..core.recalibration import Recalibration, batch_norms
from .loader import IndexedLoader
from .process_state import bare_model


def recalibrate(recalibration: Recalibration, model: nn.Module, loader: IndexedLoader) -> None:
    """Estimate the running statistics of a model; every process must call it.

    The model is run as it is, on training items, so augmentation is the training's; random generators are put back.

    Args:
        recalibration (Recalibration): Of the run.
        model (nn.Module): Its model, not wrapped, in training mode.
        loader (IndexedLoader): Its training data.
    """
    batch_size = loader.batch_size or 1
    recalibration.run(model, partial(_read, loader), partial(_forward, model), batch_size)


def models_of(runner: Any) -> list[nn.Module]:
    """The model of a run, not wrapped, and the averages that ``EMAHook`` keeps of it, in the modes of the model."""
    model = bare_model(runner)
    averages = [hook.ema_model.module for hook in runner.hooks if isinstance(hook, EMAHook)]
    for average in averages:
        for each, twin in zip(average.modules(), model.modules(), strict=True):
            each.training = twin.training
    return [model, *averages]


def _read(loader: IndexedLoader, batches: list[list[int]]) -> DataLoader:
    return DataLoader(
        loader.units.dataset,
        batch_sampler=batches,
        collate_fn=loader.host_collate_fn,
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
        generator=torch.Generator("cpu").manual_seed(0),  # the global one is put back, but must not be asked
    )


def _forward(model: Any, batch: Any) -> None:
    data = model.data_preprocessor(batch, True)
    # In the mode that computes no losses: queues and moving averages of self-supervised models stay as they are.
    if isinstance(data, dict):
        model(**data, mode="tensor")
    else:
        model(*data, mode="tensor")


def norm_line(model: nn.Module, norm: str | None) -> str | None:
    """What the log says of a model whose layers normalise by batch statistics; None where there are none."""
    number = len(batch_norms(model))
    if not number:
        return None
    count = f"InfoBatch: {number} layer{'s' if number > 1 else ''} of batch normalisation"
    if norm == "recalibrate":
        return (
            f"{count}: running statistics are estimated on uniform batches before each validation and checkpoint; in "
            "training pruned batches stay a biased sample, which weights cannot repair"
        )
    return (
        f"{count}: the batches of a pruned pass are a biased sample, and so are their means and variances, which "
        "weights cannot repair; normalise per sample (GroupNorm, LayerNorm) where you can, or try norm='recalibrate'"
    )
