"""What a comparison reads off its configs: their loop, their hook, their data, and in what they differ."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmengine.config import Config

#: Where a pruned config may differ from its twin: the hook, and what says nothing of the training.
_FREE = {"custom_imports", "custom_hooks", "work_dir", "launcher", "resume", "load_from"}

# What would be compared in place of the pruning, where two arms differ in it.
_OPTIMISER = ("optim_wrapper", "param_scheduler", "auto_scale_lr")


def is_by_epoch(cfg: Config) -> bool:
    """Whether a config trains by epochs, not by iterations."""
    return "max_epochs" in cfg.train_cfg


def hook_index(cfg: Config) -> int | None:
    """Which of the config's ``custom_hooks`` is InfoBatch's; None where it has none."""
    types = [str(hook.get("type")) for hook in cfg.get("custom_hooks") or []]
    return next((i for i, name in enumerate(types) if "InfoBatchHook" in name), None)


def missing_data(cfg: Config) -> Path | None:
    """What a config's training data sets name and is not there, by their own ``data_root`` and ``ann_file``."""
    for dataset in _datasets(cfg.train_dataloader.dataset):
        root, annotations = (str(dataset.get(key) or "") for key in ("data_root", "ann_file"))
        for path in (root, str(Path(root, annotations)) if annotations else ""):
            if "://" not in path and not Path(path).exists():  # the host knows of other places than disks
                return Path(path)
    return None


def _datasets(dataset: Any) -> Iterator[Any]:
    """The data sets below the wrappers of a config."""
    inner = dataset.get("dataset")
    parts = dataset.get("datasets") or ([inner] if isinstance(inner, dict) else [])
    if not parts:
        yield dataset
    for part in parts:
        yield from _datasets(part)


def untwinned(cfg: Config, pruned: Config) -> list[str]:
    """Settings in which two configs differ, apart from the hook and what it may be written out as."""
    one, other = ({key: each[key] for key in each if key not in _FREE} for each in (cfg.to_dict(), pruned.to_dict()))
    for each in (one, other):
        each["train_dataloader"] = {**each.get("train_dataloader", {}), "sampler": None}
        each["train_cfg"] = {**each.get("train_cfg", {}), "type": None, "by_epoch": None}
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))


def optimiser_settings(cfg: Config) -> dict[str, Any]:
    """Settings of a config by which each step changes the model: optimiser, schedules, batch size."""
    plain = cfg.to_dict()
    found = {key: plain[key] for key in _OPTIMISER if plain.get(key)}
    return {**found, "train_dataloader": {"batch_size": cfg.train_dataloader.get("batch_size")}}
