"""Around the host's checkpoints: what comes before one is written, and which one can be resumed."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from mmengine.hooks import CheckpointHook
from mmengine.runner import find_latest_checkpoint


class CheckpointGuard:
    """Wraps the ``CheckpointHook`` instances of a run.

    ``CheckpointHook`` enters saving on every process and only the write is rank 0's: the one place where
    processes can exchange what the checkpoint shall hold. And it removes an outdated checkpoint before it
    writes the next: killed in between, a run that keeps one would have none. Here removal waits until the
    next one is written.

    Args:
        runner (Runner): The runner, whose hooks are wrapped.
        exchanged (Callable): Gives the context in which to save, entered on every process.
    """

    def __init__(self, runner: Any, exchanged: Callable[[], AbstractContextManager[None]]) -> None:
        self._exchanged = exchanged
        self._hooks = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]
        for hook in self._hooks:
            for name in ("_save_checkpoint", "_save_best_checkpoint"):
                setattr(hook, name, self._guarded(hook, getattr(hook, name)))

    def _guarded(self, hook: Any, save: Callable[..., None]) -> Callable[..., None]:
        def exchange_save_and_remove(*args: Any, **kwargs: Any) -> None:
            backend = hook.file_backend
            hook.file_backend = late = _LateRemoval(backend)
            try:
                with self._exchanged():
                    save(*args, **kwargs)
            finally:
                hook.file_backend = backend
            late.remove_except({hook.last_ckpt, *_best_checkpoints(hook)})

        return exchange_save_and_remove

    def restore(self) -> None:
        """Give the hooks their own methods back."""
        for hook in self._hooks:
            del hook._save_checkpoint, hook._save_best_checkpoint


class _LateRemoval:
    """A file backend that keeps files until it is told which of them were written anew."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._outdated: list[tuple[Callable[[str], None], str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        self._outdated.append((self._backend.remove, path))

    def rmtree(self, path: str) -> None:
        self._outdated.append((self._backend.rmtree, path))

    def remove_except(self, kept: set[str]) -> None:
        for remove, path in self._outdated:
            if path not in kept:
                remove(path)


def _best_checkpoints(hook: Any) -> list[str]:
    paths = getattr(hook, "best_ckpt_path_dict", {})
    return [path for path in (getattr(hook, "best_ckpt_path", None), *paths.values()) if path]


def check_resume_point(runner: Any) -> None:
    """Look at the checkpoint that a runner is about to resume, before any time is spent.

    Where the runner is to find the latest by itself and that one is missing or was cut short by a kill, it
    is pointed to the newest whole one.

    Raises:
        ValueError: For a named checkpoint that is missing or damaged, or if there is no whole one left.
    """
    if not runner._resume or runner._has_loaded:
        return
    named = runner._load_from
    path = named if named is not None else find_latest_checkpoint(runner.work_dir)
    if path is None or "://" in path or (path and is_whole(path)):
        return
    # save_best writes checkpoints without an optimiser
    others = [p for p in Path(runner.work_dir).glob("*.pth") if not p.name.startswith("best_") and is_whole(p)]
    newest = max(others, key=lambda p: p.stat().st_mtime_ns, default=None)
    state = "is damaged or was cut short" if path and Path(path).exists() else "does not exist"
    if named is not None:
        hint = "use another checkpoint" if newest is None else f"{newest} is whole"
        raise ValueError(f"cannot resume: {path} {state}; {hint}")
    if newest is None:
        raise ValueError(
            f"cannot resume: the latest checkpoint {path!r} {state}, and {runner.work_dir} has no other; remove its "
            "file last_checkpoint to begin anew"
        )
    runner.logger.warning(f"InfoBatch: the latest checkpoint {path!r} {state}; resuming from {newest}")
    runner._load_from = str(newest)


def is_whole(path: str | Path) -> bool:
    """Whether a checkpoint file is there and was written to its end, which a zip file's directory tells."""
    try:
        with open(path, "rb") as file:
            # Files of torch's older format carry no directory: nothing can be said against them.
            start = file.read(2)
            return start not in (b"", b"PK") or zipfile.is_zipfile(file)
    except OSError:
        return False
