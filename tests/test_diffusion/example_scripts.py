"""The example scripts: as they are, as they were before us, and in processes that are killed.

Run as a script, this file runs an example with a journal: every process writes down what it weighs.
"""

from __future__ import annotations

import ast
import itertools
import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from infobatch_mm.diffusion import AcceleratedInfoBatch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest does; here for the processes
from launching import launched

EXAMPLES = Path(__file__).parents[2] / "examples"
ADDED, REPLACED = "# (+)", "# (-) "


# ---- the script and the script without us -----------------------------------------------------------------


def source_of(name: str) -> str:
    return (EXAMPLES / name).read_text()


def original(source: str) -> str:
    """The script as it was before: without the added lines, with those that were replaced."""
    lines = [line for line in source.splitlines() if not line.endswith(ADDED)]
    return "\n".join(line.replace(REPLACED, "", 1) if line.lstrip().startswith(REPLACED) else line for line in lines)


def check_marks(source: str, fewer_than: int, left_out: str = "") -> None:
    """Few lines are ours beside the imports, and without them nothing is; ``left_out`` has no successor."""
    lines = source.splitlines()
    marked = [line.endswith(ADDED) for line in lines]
    assert sum(marked) - sum(line.startswith("from ") for line in lines if line.endswith(ADDED)) < fewer_than
    # What is replaced stands right above what replaces it; some lines are just left out.
    for number, line in enumerate(lines):
        if line.lstrip().startswith(REPLACED) and not lines[number + 1].lstrip().startswith(REPLACED):
            assert marked[number + 1] or (left_out and left_out in line)
    code = ast.unparse(ast.parse(original(source))).partition('"""\n')[2]  # after the docstring, without comments
    assert "infobatch" not in code.lower() and "accelerator.prepare(" in code and "skip_first_batches" in code


def forget_all() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run(source: str, *arguments: str) -> None:
    forget_all()
    namespace: dict[str, Any] = {"__name__": "example"}
    exec(compile(source, "example", "exec"), namespace)
    namespace["main"](arguments)


# ---- with a journal, killed -------------------------------------------------------------------------------


def run_with_journal(name: str, folder: Path, kill_from: int, arguments: list[str]) -> None:
    """The example; what it weighs is written down in ``folder``.

    From step ``kill_from`` on it is killed in the midst of a pruned pass, before the second step after a checkpoint of
    that pass is done; never if ``kill_from`` is 0.
    """
    folder.mkdir(exist_ok=True)
    written = (folder / f"journal.{os.environ.get('RANK', 0)}").open("a", buffering=1)
    step = 0
    saved: dict[int, int] = {}  # the step of the last checkpoint within each pruned pass
    weigh, log, save_state = AcceleratedInfoBatch.weigh, Accelerator.log, Accelerator.save_state

    def weigh_and_tell(self: AcceleratedInfoBatch, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal step
        step += 1
        batch, current = self._in_hand, self._pruner.pass_index
        weighted = weigh(self, *args, **kwargs)
        entry = {"index": batch.index.tolist(), "weights": batch.weights.tolist(), "loss": self.loss.item()}
        written.write(json.dumps(entry) + "\n")
        if kill_from and step >= max(kill_from, saved.get(current, math.inf) + 2):
            if dist.is_initialized():
                dist.barrier()
            os.kill(os.getpid(), signal.SIGKILL)
        return weighted

    def log_and_tell(self: Accelerator, values: dict[str, float], **kwargs: Any) -> None:
        written.write(json.dumps({"lr": values["lr"]}) + "\n")
        log(self, values, **kwargs)

    def save_and_tell(self: Accelerator, *args: Any, **kwargs: Any) -> str:
        (ours,) = (each for each in self._custom_objects if isinstance(each, AcceleratedInfoBatch))
        plan = ours._pruner.plan
        if ours._pruner.visited and not ours._walk.is_pass_over and plan is not None and plan.pruned:
            saved[ours._pruner.pass_index] = step
        return save_state(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AcceleratedInfoBatch, "weigh", weigh_and_tell)
        patch.setattr(Accelerator, "save_state", save_and_tell)
        patch.setattr(Accelerator, "log", log_and_tell)
        run(source_of(name), *arguments)
    written.close()


def told(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    """One entry per step."""
    lines = [json.loads(line) for line in (folder / f"journal.{rank}").read_text().splitlines()]
    return [{**step, **rate} for step, rate in itertools.zip_longest(lines[::2], lines[1::2], fillvalue={})]


def launch(name: str, folder: Path, *more: str, kill_from: int = 0, launcher: list[str] | None = None) -> None:
    """The same in processes of its own, which are expected to end by the kill if there is one."""
    arguments = [name, folder, kill_from, *more]
    launched(launcher or [], __file__, *arguments, fails=kill_from > 0, timeout=200, TQDM_DISABLE="1")


def steps_saved(folder: Path) -> tuple[int, int]:
    """Steps that are in the last checkpoint, and visits of its pass."""
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    states = [torch.load(path, weights_only=True) for path in last.glob("custom_checkpoint_*.pkl")]
    (ours,) = (state for state in states if "iterations" in state)
    return ours["iterations"], ours["visited"]


if __name__ == "__main__":
    run_with_journal(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
