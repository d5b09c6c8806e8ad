"""Dynamic data pruning for any PyTorch loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset, Sampler

from ..core.checks import checked_index, checked_length, whole_number
from ..core.devices import moved
from ..core.distributed import Group, rank, require_equal, world_size
from ..core.last_layer import norms_to_come
from ..core.loader import IndexedItems
from ..core.meeting import PATIENCE_S
from ..core.policy import PruningPolicy
from ..core.policy_registry import build_policy
from ..core.pruner import Pruner
from ..core.schedule import EpochSchedule
from ..core.score_rule import ScoreRule
from ..core.short_runs import short_run_line
from ..core.weights import weighted_mean
from .loader import PassLoader, check_dataset
from .model import LoopModel
from .passes import Passes
from .sampler import WalkSampler
from .scheduler import ProgressScheduler
from .sizes import Sizes, checked_batch
from .standing import LoopStanding


class InfoBatch(LoopStanding, LoopModel):
    """InfoBatch for a training loop of your own.

    Skips a share of the samples that the model already knows in each pass and rescales the loss of the others so that
    the gradient stays unbiased (Qin et al., ICLR 2024, arXiv 2303.04947).

    Args:
        num_samples (int): Size of the data set, at least 1.
        num_epochs (int, optional): Passes over the data in the whole training, at least 1.
        prune_ratio (float, optional): Chance r that a well-learned sample is skipped, in [0, 1). Defaults to the
            policy's own, 0.5 for most.
        delta (float, optional): Share of the training after which every sample is visited, in (0, 1]. Defaults to the
            policy's own, 0.875 for most.
        policy (str | dict | PruningPolicy): ``'infobatch'``, ``'random'``, ``'none'``, a registered policy of your own
            by its name or as ``dict(type=name, ...)`` with its arguments, or an instance. Defaults to ``'infobatch'``.
        seed (int): Seed of the draws, the same on every process. Defaults to 0.
        batch_size (int, optional): Global batch size, over all processes; pruned passes then consist of
            full batches only. Defaults to the one of :meth:`loader`. With a ``DataLoader`` of your own and without it,
            the ``DataLoader`` decides the size of the last batch.
        shuffle (bool): Whether passes are in random order. Defaults to True.
        item_seed (bool): Whether the items are read under a seed of their own, made of seed, pass and position in the
            pass, so that augmentations repeat after a resume. Defaults to False.
        score (str | dict | ScoreRule, optional): What samples are ranked by, with any policy: ``'raw'``, their last
            loss, as in the paper; ``'ema'``, the average over their visits, for losses that depend on a random mask,
            crop or timestep; ``'timestep'``, the average of losses over the mean loss at their noise level, for
            diffusion models, which needs the ``log_snr`` of :meth:`weigh`; ``'gradient'``, the norm of their gradient
            in the last layer, see :meth:`observe`, or at the ``outputs`` of :meth:`weigh`; a registered score of your
            own by its name or as ``dict(type=name, ...)``; or an instance. Defaults to ``'raw'``, or ``'ema'`` where
            ``score_ema`` is given.
        score_ema (float, optional): Decay of the average, in [0, 1). Defaults to 0.9 for scores that are averages.
        fingerprint (str): Identifies the data set beyond its length; compared on resume. Defaults to ''.
        max_train_steps (int, optional): Batches of the unpruned training, at least 1, where that is how it is counted;
            takes the place of ``num_epochs``, and needs the ``batch_size``. The last pass may then be partial.
        process_group (ProcessGroup, optional): The processes that share the data, where others see the same samples
            (tensor or pipeline parallelism). Defaults to all.

    Where ``torch.distributed`` is initialised, every process makes one with equal arguments, and takes its share.

    Raises:
        ValueError: If an argument is out of its range, or not the same on every process.

    Example:
        >>> infobatch = InfoBatch(4, num_epochs=2, seed=0)
        >>> loader = infobatch.loader(["a", "b", "c", "d"], batch_size=2)
        >>> for epoch in range(2):
        ...     for index, letters in loader:
        ...         loss = infobatch.weigh(torch.ones(len(index)), index)
        >>> infobatch.passes_done
        2
    """

    def __init__(
        self,
        num_samples: int,
        num_epochs: int | None = None,
        prune_ratio: float | None = None,
        delta: float | None = None,
        *,
        policy: str | Mapping[str, Any] | PruningPolicy = "infobatch",
        seed: int = 0,
        batch_size: int | None = None,
        shuffle: bool = True,
        item_seed: bool = False,
        score: str | Mapping[str, Any] | ScoreRule | None = None,
        score_ema: float | None = None,
        fingerprint: str = "",
        max_train_steps: int | None = None,
        process_group: Group = None,
    ) -> None:
        num_samples = whole_number("num_samples", num_samples, 1, "the data set is empty")
        num_epochs, max_train_steps = checked_length(num_epochs, max_train_steps)
        seed = whole_number("seed", seed, 0, "use 0 or a positive number")
        world = world_size(process_group)
        if batch_size is not None:
            batch_size = checked_batch(batch_size, num_samples, world)
        elif max_train_steps is not None:
            raise ValueError(f"max_train_steps={max_train_steps} counts global batches: give their batch_size as well")
        chosen = build_policy(policy, prune_ratio, delta)
        # Without a batch size the kept count need only divide among the processes.
        schedule = EpochSchedule(num_samples, num_epochs, batch_size or world, max_steps=max_train_steps)
        self._pruner = Pruner(schedule, chosen, seed, shuffle, fingerprint, item_seed, score_ema, score, process_group)
        length = {"num_epochs": num_epochs, "max_train_steps": max_train_steps}
        self._identity = {**length, "seed": seed, "shuffle": bool(shuffle), "item_seed": bool(item_seed)}
        require_equal(process_group, **{**self._pruner.identity(), **self._identity, "batch_size": batch_size})
        self._passes = Passes(self._pruner, Sizes(self._pruner, batch_size))
        self._sampler = WalkSampler(self._passes.begin, self._passes.share, self._passes.seeds)
        self._begin_model(self._pruner)
        self._last: tuple[Tensor | None, Tensor] | None = None  # weights and losses of the batch weighed last
        # A compiled step breaks its graph once here, not at each look at an index.
        self.weigh = torch.compiler.disable(self.weigh)  # type: ignore[method-assign]
        if rank(process_group) == 0 and (line := short_run_line(self._pruner)):
            warnings.warn(line, stacklevel=2)

    # ---- loaders ------------------------------------------------------------------------------------

    def loader(
        self,
        dataset: Any,
        batch_size: int | None = None,
        *,
        drop_last: bool = False,
        collate_fn: Callable[[list], Any] | None = None,
        **options: Any,
    ) -> PassLoader:
        """A loader of ``(index, batch)``, of which each walk is one pass.

        Give ``index`` to :meth:`weigh` as it comes, on the CPU. After a ``break`` the next walk is a new pass.

        Args:
            dataset: A map-style data set of ``num_samples`` samples.
            batch_size (int, optional): Samples in a batch of this process. Defaults to this process's share of the
                global batch size, or to 1.
            drop_last (bool): Whether a last batch that is not full is left out of full passes. Defaults to False.
            collate_fn (Callable, optional): Makes a batch of a list of bare items. It must keep their order, which is
                verified; it may drop items. Defaults to torch's.
            options: As for ``torch.utils.data.DataLoader``, but sampler, shuffle and batch_sampler.

        Raises:
            ValueError: If the data set has another length or no index, the batch size does not fit the global one, or
                an option chooses the samples.
        """
        batch_size = (self._passes.sizes.batch_size or 1) if batch_size is None else batch_size
        batch_size = whole_number("batch_size", batch_size, 1, "it is the number of samples in a batch of this process")
        return PassLoader(self._passes, dataset, batch_size, drop_last, collate_fn, options)

    def attach(self, dataset: Any) -> Dataset:
        """Wrap a map-style data set so that its items come as ``(index, item)``, for a ``DataLoader`` of your own.

        Its collate function gets a list of such pairs. Give it :attr:`sampler` as well, of which each ``iter`` begins a
        pass, unless nothing was weighed since the last one; the first after a resume goes on where the state stood.

        Raises:
            ValueError: If its length is not ``num_samples``, or if it is an iterable data set.
        """
        check_dataset(dataset, self._pruner.schedule.num_samples)
        return IndexedItems(dataset)

    @property
    def sampler(self) -> Sampler[int]:
        """The sampler to give to a ``DataLoader`` over :meth:`attach`."""
        return self._sampler

    def schedule(
        self, scheduler: LRScheduler, interval: str = "step", every: int = 1, partial: bool = True
    ) -> ProgressScheduler:
        """Step a learning-rate schedule of torch by progress: a pruned pass takes it as far as a full one.

        Args:
            scheduler (LRScheduler): Made for the unpruned training, e.g. ``OneCycleLR(optimizer, max_lr,
                total_steps=num_epochs * len(loader))``, where ``len(loader)`` is taken before the first walk.
            interval (str): ``'step'``, if its ``step()`` is called after every optimiser step; ``'epoch'``, if it is
                called after every epoch. Defaults to ``'step'``.
            every (int): Batches to an optimiser step, where gradients are accumulated. Defaults to 1.
            partial (bool): Whether fewer batches at the end of a pass make a step as well. Defaults to True.

        Returns:
            ProgressScheduler: Call its ``step()`` in the scheduler's place; everything else is the scheduler's own.

        Raises:
            ValueError: If the schedule cannot follow the progress, or an argument is none of these.
        """
        return ProgressScheduler(self._passes, scheduler, interval, every, partial)

    def follow(self, optimizer: Optimizer) -> None:
        """Name an optimiser whose learning rate smaller batches get a share of, with a policy of ``keep='steps'``.

        The one of a scheduler that :meth:`schedule` was given is known. With any other policy it does nothing.

        Args:
            optimizer (Optimizer): Each of its steps is made at the learning rate times the factor of ``lr_rule``, after
                which the very rate is put back.

        Raises:
            ValueError: If its parameter groups have no learning rate.
        """
        self._passes.rates.follow(optimizer)

    # ---- a step -------------------------------------------------------------------------------------

    def weigh(
        self,
        losses: Tensor,
        index: Tensor | np.ndarray | Sequence[int],
        log_snr: Tensor | None = None,
        outputs: Tensor | None = None,
    ) -> Tensor:
        """Weigh the losses of a batch, or of a part of it, and record them as scores.

        Waits neither for a device nor for other processes. Of two views of a batch the mean is scored; the losses of a
        later call in the same pass are weighed only.

        Args:
            losses (Tensor): Per-sample losses, shape ``(B,)``, any float dtype, on any device; e.g. from a
                criterion with ``reduction='none'``. Left untouched.
            index (Tensor | ndarray | Sequence[int]): Their sample indices, shape ``(B,)``, as the loader delivered
                them: on the CPU they are looked at right away, on a device at the pass's end at the latest.
            log_snr (Tensor, optional): Natural logarithm of the signal-to-noise ratio of each sample's noise level,
                shape ``(B,)``; needed for ``score='timestep'``, not looked at otherwise.
            outputs (Tensor, optional): What the losses were computed from, such as logits, shape ``(B, ...)``, for
                ``score='gradient'``, which goes by the gradient there unless :meth:`observe` was given a layer; not
                looked at otherwise.

        Returns:
            Tensor: Scalar ``mean(weight * loss)``, to call ``backward()`` on. NaN and infinite losses are no scores.

        Raises:
            ValueError: If the shapes do not fit, an index is not part of the current pass, ``log_snr`` is needed and
                missing, or norms of gradients come from elsewhere than before.
        """
        index = checked_index(losses, index)
        walk = self._passes.walk_of(index)
        rule = self._pruner.store.rule
        level = rule.evidence(losses, log_snr) if rule.defers else None
        norms = norms_to_come(rule, self._layer, losses, outputs) if rule.takes_norms else None
        weights = moved(walk.weights(index), losses.device)
        scale = walk.tail_scale(index)
        self._passes.sizes.look(walk, index)
        kept = losses
        if isinstance(scale, Tensor):
            scale = moved(scale, losses.device)
            kept = torch.where(weights == 0, 0.0, losses)  # a weight of 0 would keep a NaN
        weighted = (weights * kept).mean() * scale
        taken = losses.detach().to(torch.float32, copy=True)
        self._last = weights if walk.plan.pruned or isinstance(scale, Tensor) else None, taken
        if rule.takes_norms:  # a loss that stands in for a norm is none below 0
            factors = weights * scale / len(losses)
            taken = taken.clamp(min=0) if norms is None else norms.expect(losses, factors, weighted)
        self._passes.add(walk, index.clone(), taken, level, norms)
        return weighted

    @property
    def loss(self) -> Tensor:
        """Mean loss of the batch weighed last on this process, ``sum(w * l) / sum(w)``, for the log: a scalar, float32.

        An estimate of what the unpruned run would log: the plain mean is over the samples that were kept, which are
        harder. Without pruning it is the plain mean.

        Raises:
            ValueError: If no batch was weighed yet.
        """
        if self._last is None:
            raise ValueError("no batch was weighed yet: infobatch.loss is the mean loss of the last one")
        return weighted_mean(*self._last)

    def merge(self, timeout_s: float = PATIENCE_S) -> None:
        """Exchange the scores of this pass among processes, before a checkpoint; every process must call it.

        At the end of a pass it happens by itself. It may be called at any step; in one process it does nothing.

        Args:
            timeout_s (float): Seconds to wait for the other processes. Defaults to 60.

        Raises:
            ValueError: If they have not come by then.
        """
        self._passes.merge(timeout_s)
