"""The sampler of pruned training under its MMEngine registry name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from typing import Any

from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.dist import get_dist_info, sync_random_seed
from mmengine.registry import DATA_SAMPLERS
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from ..core import PlanSampler, Pruner, PruningPolicy, build_policy
from ..core.loader import check_indexable
from .loader import IndexedLoader
from .repeats import scored_units

#: Samplers that visit every sample once per pass, so that a plan can take their place.
_REPLACEABLE = (DefaultSampler, InfiniteSampler, RandomSampler, SequentialSampler)
#: MMPretrain's, by name: MMEngine alone must do.
_REPEAT_AUG = "mmpretrain.datasets.samplers.repeat_aug.RepeatAugSampler"


@DATA_SAMPLERS.register_module()
class InfoBatchSampler(PlanSampler):
    """Walks the pruned passes that ``InfoBatchHook`` plans.

    ``InfoBatchHook`` puts it in place of the host's sampler by itself; name it in a config to see it all.
    It needs the hook or one of the InfoBatch loops, which tell it the batch size and the schedule.

    Args:
        dataset (Sized): The data set.
        prune_ratio (float, optional): Chance r that a well-learned sample is skipped, in [0, 1). Defaults
            to what ``InfoBatchHook`` says, else 0.5.
        delta (float, optional): Share of the training after which pruning stops, in (0, 1]. Defaults to
            what ``InfoBatchHook`` says, else 0.875.
        policy (str | dict, optional): See ``InfoBatchHook``. Defaults to what it says, else ``'infobatch'``.
        shuffle (bool): Whether passes are in random order. Defaults to True.
        seed (int, optional): Seed of the draws. Defaults to the runner's.
        round_up (bool): Whether full passes of an epoch loop give every process the same number of
            samples by repeating some. Defaults to True.
        num_repeats (int): Repeated augmentation, as MMPretrain's ``RepeatAugSampler`` makes it: a pass has as
            many visits as without, of so many times fewer samples. Needs ``shuffle``. Defaults to 1.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        dataset: Sized,
        prune_ratio: float | None = None,
        delta: float | None = None,
        policy: str | Mapping[str, Any] | PruningPolicy | None = None,
        shuffle: bool = True,
        seed: int | None = None,
        round_up: bool = True,
        num_repeats: int = 1,
    ) -> None:
        if num_repeats < 1:
            raise ValueError(f"num_repeats={num_repeats}: a sample is visited at least once; use 1 for no repetition")
        if num_repeats > 1 and not shuffle:
            raise ValueError(
                f"num_repeats={num_repeats} with shuffle=False visits the same part of the data in every pass: use "
                "shuffle=True"
            )
        self.settings = given(prune_ratio=prune_ratio, delta=delta, policy=policy)
        build_policy(**self.settings)
        self.rank, self.world = get_dist_info()
        self.num_samples = len(dataset)
        self.shuffle = shuffle
        self.seed = sync_random_seed() if seed is None else seed
        self.round_up = round_up
        self.repeats = num_repeats
        self.pruner: Pruner | None = None  # type: ignore[assignment]
        self._goes_on = False

    def bind(self, pruner: Pruner) -> None:
        """Take the pruner whose plans to walk."""
        self.pruner = pruner

    def __iter__(self) -> Iterator[int]:
        """Walk the rest of the pass."""
        if self.pruner is None:
            raise ValueError(
                "InfoBatchSampler has no plan to walk: add dict(type='InfoBatchHook') to custom_hooks, or use "
                "InfoBatchIterLoop or InfoBatchEpochLoop as train_cfg"
            )
        return super().__iter__()

    def own_batch(self) -> int | None:
        """Samples of this process in a batch of the pass; None before training starts."""
        if self.pruner is None:
            return None
        self.pruner.begin_pass()
        return self.pruner.pass_batch // self.world

    def go_on(self) -> None:
        """Let the next walk, the loop's own, begin where the pass stands; another hook's walk sees all of the plan."""
        self._goes_on = True

    def _first_position(self) -> int:
        goes_on, self._goes_on = self._goes_on, False
        return super()._first_position() if goes_on else 0

    def __len__(self) -> int:
        """Visits of this process in the whole pass; before training starts, in a full one."""
        return self._share_of(self.num_samples) if self.pruner is None else super().__len__()


def host_sampler(loader: DataLoader) -> Any:
    """The sampler that a loader takes its samples from, also under a configured plain ``BatchSampler``."""
    return getattr(loader.batch_sampler, "sampler", loader.sampler)


def run_seed(runner: Any) -> int:
    """The runner's seed, the same on every process also where the host seeds them differently."""
    return runner.seed - (runner.rank if runner._randomness_cfg.get("diff_rank_seed", False) else 0)


def given(**settings: Any) -> dict[str, Any]:
    """The settings that the user has set; the others take their defaults where the policy is built.

    Raises:
        ValueError: If one of them and the policy, a dict or an instance, differ.
    """
    for key, value in as_dict(settings.get("policy")).items():
        if settings.get(key) not in (None, value):
            raise ValueError(f"{key}={settings[key]!r} and policy=dict({key}={value!r}, ...): set it in one of them")
    return {key: value for key, value in settings.items() if value is not None}


def as_dict(policy: str | Mapping[str, Any] | PruningPolicy | None) -> dict[str, Any]:
    """A policy as ``dict(type=name, ...)``, in whichever form it is given; empty for none."""
    if isinstance(policy, PruningPolicy):
        arguments = {key: value for key, value in policy.settings().items() if key != "policy"}
        return {"type": policy.name, **arguments}
    if isinstance(policy, Mapping):
        kind = policy.get("type")
        return {**policy, "type": getattr(kind, "name", kind)}
    return {} if policy is None else {"type": policy}


def pass_loader(loader: DataLoader, seed: int, by_iteration: bool = False) -> IndexedLoader:
    """The loader of a pruned run: the host's, with an ``InfoBatchSampler`` in place of its sampler.

    Args:
        loader (DataLoader): The host's loader.
        seed (int): Seed of the run.
        by_iteration (bool): Whether its loop counts iterations, and so looks through repeats. Defaults to False.

    Returns:
        IndexedLoader: Over the same data set, or over the one that it repeats; see :func:`.scored_units`.

    Raises:
        ValueError: If the loader chooses its samples in a way that a plan cannot follow.
    """
    if loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler:
        raise ValueError(
            f"the train_dataloader uses the batch sampler {type(loader.batch_sampler).__name__}, which decides by "
            "itself what a batch holds: a plan cannot follow it; remove it, or use policy='none'"
        )
    check_indexable(loader)
    sampler, world = host_sampler(loader), get_dist_info()[1]
    units = scored_units(loader.dataset, loader.batch_sampler.batch_size * world, by_iteration)
    if isinstance(sampler, InfoBatchSampler):
        sampler.num_samples = len(units.dataset)
    else:
        repeated = f"{type(sampler).__module__}.{type(sampler).__qualname__}" == _REPEAT_AUG
        if not (repeated or type(sampler) in _REPLACEABLE) or getattr(sampler, "replacement", False):
            raise ValueError(
                f"the train_dataloader uses {type(sampler).__name__}, which does not visit every sample once per "
                "pass: a plan cannot take its place; use DefaultSampler or InfiniteSampler, or policy='none'"
            )
        shuffle = getattr(sampler, "shuffle", not isinstance(sampler, SequentialSampler))
        sampler = InfoBatchSampler(
            units.dataset,
            shuffle=shuffle,
            seed=seed,
            round_up=getattr(sampler, "round_up", True),
            num_repeats=sampler.num_repeats if repeated else 1,
        )
    if not sampler.round_up and sampler.num_samples % sampler.world:
        raise ValueError(
            f"round_up=False gives {sampler.num_samples} samples to {sampler.world} processes unevenly: some would "
            "wait for a step that others never make; use round_up=True"
        )
    return IndexedLoader(loader, sampler, own_seed=seed, units=units, own_batch=sampler.own_batch)
