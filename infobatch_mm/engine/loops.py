"""Training loops that go pass by pass over plans."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmengine.registry import HOOKS, LOOPS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from torch import nn
from torch.utils.data import DataLoader

from ..core import Pruner
from .loader import IndexedLoader
from .samplers import pass_loader, run_seed


class _PassLoop:
    """What both loops share: an indexed loader over an ``InfoBatchSampler``, and a hook that plans.

    Each pass calls the hook points ``before_pass`` and ``after_pass`` of every hook that has them.
    """

    pruner: Pruner
    dataloader: IndexedLoader
    by_iteration: bool

    def __init__(self, runner: Any, dataloader: DataLoader | dict, **kwargs: Any) -> None:
        # the host's loop comes next in the order of bases
        super().__init__(runner, self._indexed(runner, dataloader), **kwargs)  # type: ignore[call-arg]

    @classmethod
    def _indexed(cls, runner: Any, dataloader: DataLoader | dict) -> IndexedLoader:
        """The loader of a loop that is written out in a config, and the hook if it is not."""
        if isinstance(dataloader, dict):
            diff_rank_seed = runner._randomness_cfg.get("diff_rank_seed", False)
            dataloader = runner.build_dataloader(dataloader, seed=runner.seed, diff_rank_seed=diff_rank_seed)
        hook = HOOKS.get("InfoBatchHook")  # by name: its module imports this one
        if not any(isinstance(each, hook) for each in runner.hooks):
            runner.register_hook(hook())
        if isinstance(dataloader, IndexedLoader):
            return dataloader
        return pass_loader(dataloader, run_seed(runner), cls.by_iteration)

    def _before_pass(self) -> int:
        """Have the pass planned; returns the number of its batches that are done already."""
        runner = self.runner  # type: ignore[attr-defined]
        runner.call_hook("before_pass")
        self.dataloader.start_pass(self.pruner.pass_index)
        return self.pruner.batches_done

    def _rest_of_pass(self) -> Iterator[Any]:
        """The batches of the pass that are left; walks of hooks, also before the first of them, see all of the plan."""
        self.dataloader.sampler.go_on()  # type: ignore[attr-defined]
        yield from self.dataloader


@LOOPS.register_module()
class InfoBatchEpochLoop(_PassLoop, EpochBasedTrainLoop):
    """``EpochBasedTrainLoop`` whose epochs are pruned passes: ``max_epochs`` of them.

    Args:
        runner (Runner): The runner.
        dataloader (DataLoader or dict): The training data.
        kwargs: As for ``EpochBasedTrainLoop``: ``max_epochs, val_begin, val_interval, dynamic_intervals``.
    """

    by_iteration = False

    def run_epoch(self) -> None:
        """Walk one pass, or the rest of it after a resume."""
        done = self._before_pass()
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        for idx, data_batch in enumerate(self._rest_of_pass(), start=done):
            self.run_iter(idx, data_batch)
        self.runner.call_hook("after_pass")
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1


@LOOPS.register_module()
class InfoBatchIterLoop(_PassLoop, IterBasedTrainLoop):
    """``IterBasedTrainLoop`` that makes the progress of ``max_iters`` unpruned iterations in fewer.

    Args:
        runner (Runner): The runner.
        dataloader (DataLoader or dict): The training data.
        kwargs: As for ``IterBasedTrainLoop``: ``max_iters, val_begin, val_interval, dynamic_intervals``.
            ``max_iters`` counts the unpruned run's iterations; validation intervals count real iterations.
    """

    by_iteration = True

    def run(self) -> nn.Module:
        """Launch training. As in the host, the whole of it is one epoch to the hooks."""
        self.runner.call_hook("before_train")
        self.runner.call_hook("before_train_epoch")
        for data_batch in self._batches():
            self.runner.model.train()
            self.run_iter(data_batch)
            self._decide_current_val_interval()
            if self.runner.val_loop is not None and self._is_val_due():
                self.runner.val_loop.run()
            if self.stop_training:
                break
        self.runner.call_hook("after_train_epoch")
        self.runner.call_hook("after_train")
        return self.runner.model

    def _is_val_due(self) -> bool:
        if self._iter == self._max_iters:  # where the unpruned run would have reached val_begin
            return self.val_begin <= self.pruner.schedule.total_steps
        return self._iter >= self.val_begin and self._iter % self.val_interval == 0

    def _batches(self) -> Iterator[Any]:
        # The end of the schedule, not max_iters, ends the run: a resumed run learns its last iteration
        # only when its pass is planned.
        while not self.pruner.finished:
            self._before_pass()
            yield from self._rest_of_pass()
            self.runner.call_hook("after_pass")
