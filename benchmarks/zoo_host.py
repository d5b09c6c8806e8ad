"""What the zoo walks of all hosts share: models that train on the CPU, and steps of them that can be repeated."""

from __future__ import annotations

import math
import random
import re
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from infobatch_mm.zoo import config_roots

BATCH_SIZE = 4


class OutOfScopeError(Exception):
    """A folder has no config of the kind that is weighed here."""


class Host(ABC):
    """What is particular to the configs, models and losses of one host."""

    #: The host's package, which is its registry scope too.
    package: str
    #: Image sizes to try.
    sizes: tuple[int, ...]
    #: What the host says where something is not installed -> what that is.
    needs: dict[str, str]
    #: Status of folders that are out of scope.
    out_of_scope: str = "out_of_scope"

    def root(self) -> Path:
        """Folder of the installed host's configs, in a wheel or in a source checkout."""
        wheel, checkout = config_roots(self.package)
        return wheel if wheel.is_dir() else checkout

    def folders(self) -> list[str]:
        """Names of all method folders: those that are not bases of others."""
        return sorted(each.name for each in self.root().iterdir() if each.is_dir() and not each.name.startswith("_"))

    @abstractmethod
    def cheapest_config(self, folder: Path) -> Path:
        """The config to build for a folder; raises :class:`OutOfScopeError` if it has none."""

    def model_config(self, path: Path) -> ConfigDict:
        """The model of a config, which downloads nothing and needs one process."""
        return offline(Config.fromfile(path).model)

    @abstractmethod
    def shrink(self, cfg: ConfigDict, size: int) -> None:
        """Change a model's config for images of this size."""

    def build(self, cfg: ConfigDict) -> nn.Module:
        """A model in training mode, every parameter of which is initialised."""
        torch.use_deterministic_algorithms(True, warn_only=True)  # uninitialised memory becomes NaN
        try:
            with patch.object(CheckpointLoader, "load_checkpoint", return_value=torch.randn(8, 768)):
                model = MODELS.build(cfg)  # VPD loads embeddings of its classes
            with suppress(AttributeError):  # heads that know their weights from checkpoints only (SAN's)
                model.init_weights()
        finally:
            torch.use_deterministic_algorithms(False)
        for parameter in model.parameters():  # what only a checkpoint would have filled
            if not parameter.isfinite().all():
                nn.init.normal_(parameter, std=0.02)
        return model.train()

    @abstractmethod
    def random_batch(self, model: nn.Module, size: int) -> Any:
        """Random images and labels of ``BATCH_SIZE`` samples."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Any) -> dict:
        """What the model returns as losses in a training step on a batch, which stays as it is."""

    @abstractmethod
    def oracle(self, model: nn.Module, weights: Tensor) -> AbstractContextManager[None]:
        """Make an untouched model return the weighted objective of a pruned pass as its loss."""

    def mixing(self, model: nn.Module) -> list[str]:
        """Names of what can mix the images of a batch."""
        return []

    def targets(self, cfg: ConfigDict) -> str | None:
        """What makes the targets of a model, where that is not what the host would download for it."""
        return None

    def seeds(self, model: nn.Module) -> range:
        """Seeds from which exactness is measured."""
        return range(1)


def offline(node: Any) -> Any:
    """A copy of a model's config that downloads nothing and needs one process."""
    if isinstance(node, (list, tuple)):
        return type(node)(offline(item) for item in node if not _is_checkpoint(item))
    if not isinstance(node, dict):
        return "BN" if node in ("SyncBN", "MMSyncBN") else node
    kept = {key: offline(value) for key, value in node.items() if key != "checkpoint" and not _is_checkpoint(value)}
    return ConfigDict({**kept, **{key: None for key in kept if key == "pretrained"}})


def _is_checkpoint(node: Any) -> bool:
    return isinstance(node, dict) and str(node.get("type", "")).startswith("Pretrained")


def build_smallest(host: Host, cfg: ConfigDict) -> Case:
    """The model on the smallest images with which it trains."""
    built: ConfigDict | None = None
    error: Exception | None = None
    for size in host.sizes:
        seed()
        wanted = ConfigDict(cfg.to_dict())
        host.shrink(wanted, size)
        try:
            if wanted != built:
                case, built = Case(host, host.build(ConfigDict(wanted.to_dict()))), wanted
            case.batch = host.random_batch(case.model, size)
            loss, grads = case.run()
            if math.isfinite(loss) and 0 < norm(grads) < math.inf:
                return case
            error = FloatingPointError(f"loss {loss:.3g}, gradients {norm(grads):.3g}")
        except Exception as this:
            error = this
    raise RuntimeError(f"trains at no size up to {host.sizes[-1]}: {one_line(error)}") from error


# --- Steps that can be repeated --------------------------------------------------------------------------------------


def seed(number: int = 0) -> None:
    """The same random numbers from here on: dropout, sampled points, mixed images."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def norm(grads: list[Tensor]) -> float:
    """Norm over all parameters."""
    return torch.stack([torch.linalg.vector_norm(grad) for grad in grads]).double().norm().item()


def relative_error(grads: list[Tensor], expected: list[Tensor]) -> float:
    """Norm of the difference over the norm of what is expected."""
    return norm([a - b for a, b in zip(grads, expected, strict=True)]) / norm(expected)


class Case:
    """A model with its batch.

    Args:
        host (Host): Whose model it is.
        model (nn.Module): Its buffers are restored before each run, so that all runs are the same.
    """

    batch: Any

    def __init__(self, host: Host, model: nn.Module) -> None:
        self.host = host
        self.model = model
        self.buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def loss(self) -> Tensor:
        """The total loss of a training step."""
        return self.model.parse_losses(self.host.losses(self.model, self.batch))[0]

    def run(self, number: int = 0) -> tuple[float, list[Tensor]]:
        """Loss and gradients from the same state and random numbers each time."""
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(self.buffers[name])
        self.model.zero_grad(set_to_none=True)
        seed(number)
        loss = self.loss()
        loss.backward()
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        self.model.zero_grad(set_to_none=True)
        return loss.item(), grads


def loss_alone(module: nn.Module, args: tuple, kwargs: dict, i: int) -> Tensor:
    """A host's loss of one sample alone, from the arguments with which it was called for all."""
    only = [sample_of(arg, i) for arg in args]
    return module.forward(*only, **{key: sample_of(value, i) for key, value in kwargs.items()})


def sample_of(value: Any, i: int) -> Any:
    """One sample of a batched argument; what is not batched as it is."""
    return value[i : i + 1] if isinstance(value, Tensor) and value.dim() else value


# --- What went wrong -------------------------------------------------------------------------------------------------


def one_line(error: BaseException | None) -> str:
    """Type and first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def missing(needs: dict[str, str], error: BaseException) -> str:
    """What to install, where that is why a model cannot be built."""
    chain: list[BaseException] = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    for pattern, package in needs.items():
        if any(re.search(pattern, str(link)) for link in chain):
            return f"needs {package}"
    return one_line(error)
