"""What a comparison reads off its configs: their loop, their hook, their data, and in what they differ."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmengine.config import Config

#: Where a pruned config may differ from its twin: what says nothing of the training. Hooks are compared one by one.
_FREE = {"custom_imports", "custom_hooks", "work_dir", "launcher"}

# What would be compared in place of the pruning, where two arms differ in it.
_OPTIMISER = ("optim_wrapper", "param_scheduler", "auto_scale_lr")


def is_by_epoch(cfg: Config) -> bool:
    """Whether a config trains by epochs, not by iterations."""
    return "max_epochs" in cfg.train_cfg


def hook_index(cfg: Config) -> int | None:
    """Which of the config's ``custom_hooks`` is InfoBatch's; None where it has none."""
    return next((i for i, hook in enumerate(cfg.get("custom_hooks") or []) if _is_ours(hook)), None)


def _is_ours(part: Any) -> bool:
    """Whether a part of a config, a hook or a sampler, is one of InfoBatch's."""
    return isinstance(part, dict) and "InfoBatch" in str(part.get("type"))


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
    ours = _is_ours(other.get("train_dataloader", {}).get("sampler"))
    for each in (one, other):
        if ours:
            each["train_dataloader"] = {**each.get("train_dataloader", {}), "sampler": None}
        each["train_cfg"] = {**each.get("train_cfg", {}), "type": None, "by_epoch": None}
    found = sorted(key for key in one.keys() | other.keys() if (one.get(key) or None) != (other.get(key) or None))
    return found + _other_hooks(cfg, pruned)


def _other_hooks(cfg: Config, pruned: Config) -> list[str]:
    """Hooks beside InfoBatch's that one of two configs lacks, or has with other settings."""
    one, other = ([hook for hook in each.get("custom_hooks") or [] if not _is_ours(hook)] for each in (cfg, pruned))
    lone = [hook for hook in one if hook not in other] + [hook for hook in other if hook not in one]
    names = [str(hook.get("type") if isinstance(hook, dict) else type(hook).__name__) for hook in lone]
    return [f"custom_hooks ({name})" for name in dict.fromkeys(names)]


def length_of(cfg: Config) -> dict[str, Any]:
    """How long a config trains: its epochs, or its iterations."""
    return {key: cfg.train_cfg[key] for key in ("max_epochs", "max_iters") if key in cfg.train_cfg}


def optimiser_settings(cfg: Config) -> dict[str, Any]:
    """Settings of a config by which each step changes the model: optimiser, schedules, batch size."""
    plain = cfg.to_dict()
    found = {key: plain[key] for key in _OPTIMISER if plain.get(key)}
    return {**found, "train_dataloader": {"batch_size": cfg.train_dataloader.get("batch_size")}}
