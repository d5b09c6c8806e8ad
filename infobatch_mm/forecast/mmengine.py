"""Trainings of MMEngine: a config's model and data, one sample at a time."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.device import get_device
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import CheckpointLoader, Runner
from torch import Tensor, nn

from ..core import PruningPolicy, build_policy, rng
from ..core.recalibration import batch_norms
from ..engine.repeats import scored_units
from ..losses import LossWeigher, attach_views
from .gradients import Look


class ConfigSubject:
    """The model of a config at a checkpoint, and its training data. Nothing is written, no runner is built.

    Args:
        cfg (Config): Of MMSegmentation or MMPretrain, with or without the hook.
        checkpoint (str): File of a checkpoint of its training.
        num_processes (int): Processes that share a step. Defaults to 1.

    Attributes:
        model (nn.Module): In training mode, its batch normalisation in evaluation mode.
        num_samples (int): Samples that have a score of their own.
        batch_size (int): Samples in an optimiser step.
        remarks (list[str]): What is to be said of how it is looked at.

    Raises:
        ValueError: If there is no checkpoint, it is of another model, or the config cannot be trained on.
    """

    def __init__(self, cfg: Config, checkpoint: str, num_processes: int = 1) -> None:
        if cfg.get("train_dataloader") is None:
            raise ValueError("the config has no train_dataloader: there is no training to look at")
        init_default_scope(cfg.get("default_scope", "mmengine"))
        state = _weights_of(checkpoint)
        settings = copy.deepcopy(cfg.model)
        if cfg.get("data_preprocessor") is not None:
            settings.setdefault("data_preprocessor", cfg.data_preprocessor)
        self.model = MODELS.build(settings)
        _load(self.model, state, checkpoint)
        self.model.to(get_device()).train()
        norms = batch_norms(self.model)
        for layer in norms:
            layer.eval()
        options = {**copy.deepcopy(cfg.train_dataloader), "num_workers": 0, "persistent_workers": False}
        for name in ("prefetch_factor", "multiprocessing_context"):  # which ask for workers
            options.pop(name, None)
        loader = Runner.build_dataloader(options, seed=0)
        own = getattr(loader.batch_sampler, "batch_size", None) or cfg.train_dataloader.get("batch_size")
        if not own:
            raise ValueError("the train_dataloader does not say how many samples a batch holds: set batch_size")
        self.batch_size = own * num_processes * cfg.get("optim_wrapper", {}).get("accumulative_counts", 1)
        self._dataset = scored_units(loader.dataset, own * num_processes, _by_iteration(cfg)).dataset
        self.num_samples = len(self._dataset)
        self._collate = loader.collate_fn or pseudo_collate
        self._weigher = LossWeigher()
        self._weigher.takes_norms = True
        self._views = attach_views(self.model, self._weigher, last_layer=None)
        self.remarks = _remarks(self.model, len(norms), self._views.not_separable)

    def look(self, index: int, key: tuple[int, ...]) -> Look:
        """Visit one sample; see :class:`.Subject`."""
        weigher, model = self._weigher, self.model
        with rng.seeded(key):
            data = model.data_preprocessor(self._collate([self._dataset[index]]), True)
            weigher.begin(torch.ones(1), pruned=False)
            losses = model(**data, mode="loss") if isinstance(data, dict) else model(*data, mode="loss")
            total = model.parse_losses(losses)[0]
            scored = weigher.batch.rows.tally.result()
            if total.requires_grad:
                total.backward()
        norms, valid = weigher.end()
        is_valid = valid is not None and bool(valid[0])
        knows_layer = is_valid and weigher.norms_of != "losses"
        return Look(_first(scored[0] if scored and is_valid else None), _first(norms if knows_layer else None))


def own_policy(cfg: Config) -> PruningPolicy | None:
    """The policy that a config's ``InfoBatchHook`` names; None without one."""
    hooks = [*cfg.get("custom_hooks", []), *cfg.get("default_hooks", {}).values()]
    for hook in hooks:
        if isinstance(hook, dict) and str(hook.get("type")).rpartition(".")[2] == "InfoBatchHook":
            given = (hook.get("policy", "infobatch"), hook.get("prune_ratio"), hook.get("delta"), hook.get("quantile"))
            return build_policy(*given)
    return None


def _first(values: Tensor | None) -> float:
    return float("nan") if values is None or float(values[0]) < 0 else float(values[0])


def _by_iteration(cfg: Config) -> bool:
    loop = cfg.get("train_cfg") or {}
    return not loop["by_epoch"] if "by_epoch" in loop else "Epoch" not in str(loop.get("type", "Iter"))


def _weights_of(checkpoint: str) -> dict[str, Tensor]:
    if not Path(checkpoint).is_file():
        raise ValueError(f"--checkpoint {checkpoint}: there is no such file; give a checkpoint of a training")
    found: Any = CheckpointLoader.load_checkpoint(checkpoint, map_location="cpu")
    state = found.get("state_dict", found)
    return {name.removeprefix("module."): each for name, each in state.items()}


def _load(model: nn.Module, state: dict[str, Tensor], checkpoint: str) -> None:
    try:
        missing = model.load_state_dict(state, strict=False).missing_keys
    except RuntimeError as error:  # shapes
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"--checkpoint {checkpoint} is of another model: {reason}") from None
    if missing:
        raise ValueError(
            f"--checkpoint {checkpoint} lacks {len(missing)} weights of the {type(model).__name__}, such as "
            f"{missing[0]}: it is of another model"
        )


def _remarks(model: nn.Module, num_norms: int, not_separable: list[str]) -> list[str]:
    said = []
    if num_norms:
        said.append(
            f"{num_norms} layers of batch normalisation are in evaluation mode, as a batch of one sample has no "
            "statistics: in the training samples share theirs, which this forecast does not see"
        )
    if not_separable:
        said.append(f"losses that do not separate over samples are each sample's own: {', '.join(not_separable)}")
    if getattr(model.data_preprocessor, "batch_augments", None) is not None:
        said.append("batch augmentations find no partner to mix a lone sample with: images are looked at unmixed")
    return said
