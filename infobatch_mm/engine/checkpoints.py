"""Around the host's checkpoints: how one is written, and which one can be resumed."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.runner import find_latest_checkpoint

from ..core.state import damaged

_UNFINISHED = ".unfinished"
# Checkpoints of save_best hold no optimizer, published ones (their name ends in a hash) nothing but weights.
_NO_RESUME_POINT = re.compile(r"best_.*|.*-[0-9a-f]{8}\.pth")


class CheckpointGuard:
    """Wraps the saving of checkpoints of a run.

    ``CheckpointHook`` enters saving on every process and only the write is rank 0's: the one place where
    processes can exchange what the checkpoint shall hold. And it removes an outdated checkpoint before it
    writes the next, and writes some in place of themselves: killed in between, a run would have none. Here
    removal waits until the next one is written, and a file gets its name when it is whole.

    Args:
        runner (Runner): The runner; its own and its hooks' methods that save are wrapped.
        exchanged (Callable): Gives the context in which to save, entered on every process.
    """

    def __init__(self, runner: Any, exchanged: Callable[[], AbstractContextManager[None]]) -> None:
        self._exchanged = exchanged
        self._wrapped: list[tuple[Any, str]] = []
        self._wrap(runner, "save_checkpoint", _finished(runner.save_checkpoint))
        for hook in runner.hooks:
            if isinstance(hook, CheckpointHook):
                self._wrap(hook, "_save_checkpoint", self._guarded(hook, hook._save_checkpoint))
                if hook.save_best:
                    self._wrap(hook, "_save_best_checkpoint", self._guarded(hook, hook._save_best_checkpoint))

    def _wrap(self, owner: Any, name: str, wrapper: Callable[..., None]) -> None:
        setattr(owner, name, wrapper)
        self._wrapped.append((owner, name))

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
        """Give runner and hooks their own methods back."""
        for owner, name in self._wrapped:
            delattr(owner, name)


def _finished(save: Callable[..., None]) -> Callable[..., None]:
    """Save under another name, and rename what is on disk to its end."""

    def save_checkpoint(out_dir: str, filename: str, *args: Any, **kwargs: Any) -> None:
        if "://" in str(out_dir):  # not a folder
            return save(out_dir, filename, *args, **kwargs)
        unfinished = Path(out_dir, filename + _UNFINISHED)
        try:
            save(out_dir, filename + _UNFINISHED, *args, **kwargs)
        except BaseException:
            unfinished.unlink(missing_ok=True)  # half of a checkpoint only takes room
            raise
        if is_main_process():
            os.replace(unfinished, Path(out_dir, filename))

    return save_checkpoint


class _LateRemoval:
    """A file backend that keeps files until it is told which of them were written again."""

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

    Where the runner is to find the latest by itself and that one is missing or was cut short, it is pointed
    to the newest whole one. Rank 0 looks for all: files may appear late, or not at all, to the others.

    Raises:
        ValueError: On every process, for a named checkpoint that is missing or damaged, or if there is no
            whole one left.
    """
    if not runner._resume or runner._has_loaded:
        return
    found: list[tuple[str | None, str] | None] = [None]
    if is_main_process():
        try:
            found = [_resume_point(runner)]
        except OSError as error:  # the others wait to be told
            found = [(None, f"cannot resume: {runner._load_from or runner.work_dir} cannot be read: {error}")]
    broadcast_object_list(found)
    assert found[0] is not None
    path, message = found[0]
    if path is None and message:
        raise ValueError(message)
    if message:
        runner.logger.warning(message)
    runner._load_from = path


def _resume_point(runner: Any) -> tuple[str | None, str]:
    """What to resume, None for nothing, and what there is to say: a refusal where nothing was found."""
    named = runner._load_from
    path = named if named is not None else find_latest_checkpoint(runner.work_dir)
    if path is None or "://" in path or (path and is_whole(path)):
        return path, ""
    state = "is damaged or was cut short" if path and Path(path).exists() else "does not exist"
    folders = {Path(runner.work_dir), *([Path(path).parent] if path else [])}
    others = [
        other
        for folder in folders
        for other in folder.glob("*.pth")
        if not _NO_RESUME_POINT.fullmatch(other.name) and is_whole(other)
    ]
    newest = max(others, key=lambda other: other.stat().st_mtime_ns, default=None)
    if named is not None:
        hint = "use another checkpoint" if newest is None else f"{newest} is whole"
        return None, f"cannot resume: {path} {state}; {hint}"
    if newest is None:
        return None, (
            f"cannot resume: the latest checkpoint {path!r} {state}, and {runner.work_dir} has no other; remove its "
            "file last_checkpoint to begin anew"
        )
    return str(newest), f"InfoBatch: the latest checkpoint {path!r} {state}; resuming from {newest}"


def is_whole(path: str | Path) -> bool:
    """Whether a checkpoint file is there and was written to its end, which a zip file's directory tells."""
    try:
        with open(path, "rb") as file:
            # Files of torch's older format carry no directory: nothing can be said against them.
            return file.read(2) == b"\x80\x02" or zipfile.is_zipfile(file)
    except OSError:
        return False


def check_state(state: Any) -> None:
    """Refuse the damaged entry of a checkpoint, as far as the hook has written it itself.

    Raises:
        ValueError: With what is missing.
    """
    kinds = {
        "pruner": dict,
        "scheduler_steps": int,
        "wall_time_s": float,
        "rng": list,
        "buffers": list,
        "gradients": dict,
        "inner_counts": list,
    }
    for key, kind in kinds.items():
        if not isinstance(state, dict) or not isinstance(state.get(key), kind):
            raise damaged(key)
