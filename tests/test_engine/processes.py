"""Runs of the toy segmentor in processes of their own: several ranks, each with a journal, to be killed at will."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

# A server that has imported everything forks the processes: they start in a moment.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("mmseg.models", "mmseg.datasets", "mmseg.evaluation", "infobatch_mm.engine"),
        *("matplotlib.pyplot", "matplotlib.backends.backend_agg", "torch._dynamo"),  # what they import late
    ]
)

#: Batch-independent normalisation: several ranks then compute what one would.
GROUP_NORM = {
    "model.backbone.norm_cfg": dict(_delete_=True, type="GN", num_groups=1),
    "model.decode_head.norm_cfg": dict(_delete_=True, type="GN", num_groups=1),
    "model.auxiliary_head.norm_cfg": dict(_delete_=True, type="GN", num_groups=1),
}


class Journal(Hook):
    """Writes one line for every iteration that was done, at once: a kill loses none."""

    priority = 80  # before CheckpointHook: an iteration that a checkpoint holds has its line

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._entry: dict[str, Any] = {}

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        hook = next(hook for hook in runner.hooks if type(hook).__name__ == "InfoBatchHook")
        indices = runner.train_dataloader.current.indices
        self._entry = {
            "iter": runner.iter,
            "pass": hook._pruner.pass_index,
            "indices": indices.tolist(),
            "weights": hook._pruner.weights(indices).tolist() if hook._pruner.plan else [],
            "pixels": sum(float(image.double().sum()) for image in data_batch["inputs"]),
            "lr": next(iter(runner.optim_wrapper.get_lr().values()))[0],
            "max_iters": runner.max_iters,
        }

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._entry["losses"] = {key: float(value.detach()) for key, value in outputs.items()}
        os.write(self._file, (json.dumps(self._entry) + "\n").encode())


class Run:
    """A training on ``ranks`` processes, begun at construction.

    Args:
        cfg (Config): As of :func:`.toy.config`; ``resume`` and all else as the user would set it.
        ranks (int): Number of processes; more than one meet over gloo. Defaults to 1.
        prepare (Callable, optional): Called in every process with (rank, runner) before training, to place
            hooks and faults; must be picklable. Defaults to None.
    """

    _lives = 0

    def __init__(self, cfg: Any, ranks: int = 1, prepare: Callable[[int, Any], None] | None = None) -> None:
        Run._lives += 1
        self.work_dir = Path(cfg.work_dir)
        self.work_dir.mkdir(parents=True, exist_ok=True)
        self._life = f"{os.getpid()}.{Run._lives}"
        meeting = f"{self.work_dir}/rendezvous.{self._life}"
        self.processes = []
        for rank in range(ranks):
            arguments = (cfg.to_dict(), rank, ranks, meeting, str(self._file("journal", rank)), prepare)
            self.processes.append(CONTEXT.Process(target=_train, args=(*arguments, str(self._file("output", rank)))))
            self.processes[-1].start()

    def _file(self, name: str, rank: int) -> Path:
        return self.work_dir / f"{name}.{self._life}.{rank}"

    def journal(self, rank: int = 0) -> list[dict[str, Any]]:
        """What a rank has done so far; a line that a kill has cut short is left out."""
        path = self._file("journal", rank)
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def output(self, rank: int = 0) -> str:
        """What a rank has printed, with its log."""
        path = self._file("output", rank)
        return path.read_text() if path.exists() else ""

    def reach(self, iterations: int) -> None:
        """Wait until rank 0 has done the run's iteration of that number, or ended."""
        while self.processes[0].is_alive() and not any(e["iter"] + 1 >= iterations for e in self.journal()[-1:]):
            time.sleep(0.002)

    def kill_after(self, iterations: int, delay: float = 0.0, how: int = signal.SIGKILL) -> list[int]:
        """Kill all ranks once rank 0 has done the run's iteration of that number, ``delay`` seconds later.

        Returns:
            list[int]: The exit codes, as of :meth:`wait`.
        """
        self.reach(iterations)
        time.sleep(delay)
        while any(process.is_alive() for process in self.processes):
            self.kill(how)
            for process in self.processes:
                process.join(10)  # Python drops an interrupt that meets it in a callback: the user asks again
        return self.wait()

    def kill(self, how: int = signal.SIGKILL, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.is_alive():
                os.kill(process.pid, how)

    def wait(self, timeout: float = 200) -> list[int]:
        """Wait for all ranks; returns their exit codes, negative for a signal.

        Raises:
            TimeoutError: If one has hung, with where each of its threads and workers stands.
        """
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
            if process.exitcode is None:
                self._signal_groups(signal.SIGUSR1)  # each writes down where it stands
                time.sleep(2)
                self._signal_groups(signal.SIGKILL)
                told = (f"rank {rank}:\n{self.output(rank)[-6000:]}" for rank in range(len(self.processes)))
                raise TimeoutError("\n".join(["a rank has hung", *told]))
        # A worker waits for ever where its rank was killed with a lock of theirs in hand.
        self._signal_groups(signal.SIGKILL)
        return [process.exitcode for process in self.processes]

    def _signal_groups(self, how: int) -> None:
        """Send a signal to all ranks and to their workers."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, how)

    def finish(self) -> Run:
        """Wait for a run that is to succeed."""
        codes = self.wait()
        assert not any(codes), "\n".join([str(codes), *(self.output(r)[-3000:] for r in range(len(codes)))])
        return self


def _train(
    cfg: dict[str, Any],
    rank: int,
    ranks: int,
    meeting: str,
    journal: str,
    prepare: Callable[[int, Any], None] | None,
    output: str,
) -> None:
    from mmengine.config import Config

    os.setpgid(0, 0)  # workers end with us: see Run.wait
    sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(sink, stream.fileno())
    faulthandler.register(signal.SIGUSR1)  # what hangs is asked where: see Run.wait
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, and so by us, in a shell's background jobs
    config = Config(cfg)
    if ranks > 1:
        os.environ.update(LOCAL_RANK=str(rank))
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
        )
        config.launcher = "pytorch"
        # as the host wraps by itself, but on the CPU
        config.model_wrapper_cfg = dict(device_ids=None, broadcast_buffers=False)
    runner = Runner.from_cfg(config)
    runner.register_hook(Journal(Path(journal)))
    if prepare is not None:
        prepare(rank, runner)
    runner.train()


def lived(*runs: Run, rank: int = 0) -> list[dict[str, Any]]:
    """The journal of a run that was killed and resumed: where a later life began, the earlier ones count no more."""
    entries: list[dict[str, Any]] = []
    for run in runs:
        journal = run.journal(rank)
        if journal:
            entries = [entry for entry in entries if entry["iter"] < journal[0]["iter"]] + journal
    return entries


def final_state(work_dir: Path) -> dict[str, Any]:
    """The last checkpoint."""
    path = (work_dir / "last_checkpoint").read_text().strip()
    return torch.load(path, map_location="cpu", weights_only=False)


def assert_equal_parameters(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Parameters and buffers of two checkpoints are equal to the bit."""
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    different = [key for key, value in ours["state_dict"].items() if not torch.equal(value, theirs["state_dict"][key])]
    assert not different
