"""What policies share that prune until a share of the training is done: how much, how long, and how visits weigh."""

from __future__ import annotations

import math
from typing import Any

from .chances import Chances, Thinning
from .checks import is_number, plain, what_is_wrong
from .lr_factor import LR_RULES
from .policy import PruningPolicy, Snapshot
from .worth import worth

#: Smallest chance of a visit where nothing else is said: no sample stands for more than ten.
PI_MIN = 0.1


class AnnealedPolicy(PruningPolicy):
    """Prunes until the share δ of the training is done: by a ratio, or by what is to be saved, or to be worth.

    A policy writes :meth:`chances_at`, the chances for one ratio.

    Args:
        prune_ratio (float): Chance r that a candidate is skipped, in [0, 1). Defaults to 0.5.
        delta (float): Share of the training after which pruning stops, in (0, 1]. Defaults to 0.875.
        target_saving (float, optional): Share of the whole training's visits to save, in (0, 1); takes the place of
            ``prune_ratio``. Each pass saves what is left of it, shared out evenly, as far as the policy can.
        min_worth (float, optional): Share of a full pass, in (0, 1), that a pass is to be worth by the scores at least
            (see :func:`.worth`); takes the place of ``prune_ratio``: a pass saves as many visits as that allows.
        rescale (str, optional): ``'unbiased'``, weights of 1/pi: a pruned pass moves the weights as far as a full one,
            in fewer and larger steps. ``'step'``, the same divided by their mean over the plan: the step stays as large
            as the host's, in the unbiased direction. Under Adam they are nearly one; under SGD the first multiplies the
            learning rate by the inverse of the share C of visits. Defaults to ``'unbiased'``, as in the paper; with
            ``keep='steps'`` to ``'step'``, as the steps are as many then: ``'unbiased'`` would make each 1/C as large.
        keep (str): What a pruned pass keeps of a full one. ``'batch'``, the batches, and it makes fewer steps;
            ``'steps'``, the optimiser steps, and each is on a smaller batch, the share C of a full one. Every process
            gets as many samples of it, so that C is coarse: where a process has 4 samples in a full batch, a pass
            visits 1/4, 1/2 or 3/4. ``target_saving`` makes up for that over the passes. Defaults to ``'batch'``.
        lr_rule (str, optional): With ``keep='steps'``, what the learning rate of a step of a pruned pass is multiplied
            by: ``'none'``, 1; ``'sqrt'``, the root of C, the usual rule for Adam; ``'linear'``, C, the usual one for
            SGD. The host's schedule does not see it. Defaults to ``'sqrt'``: most models that are pruned here are
            trained with Adam; under SGD try ``'linear'``.

    Raises:
        ValueError: If an argument is out of its range, two of them say how much, or ``lr_rule`` is given without
            ``keep='steps'``.
    """

    def __init__(
        self,
        prune_ratio: float = 0.5,
        delta: float = 0.875,
        *,
        target_saving: float | None = None,
        min_worth: float | None = None,
        rescale: str | None = None,
        keep: str = "batch",
        lr_rule: str | None = None,
    ) -> None:
        check_ratio(prune_ratio)
        check_delta(delta)
        _check_share("target_saving", target_saving, "the share of the whole training's visits to save")
        _check_share("min_worth", min_worth, "the share of a full pass that a pruned one is worth at least")
        given = {"target_saving": target_saving, "min_worth": min_worth}
        said = [f"{key}={value!r}" for key, value in given.items() if value is not None]
        if len(said) > 1:
            raise ValueError(f"{' and '.join(said)}: both say how much to prune; give one of them")
        if said and prune_ratio != 0.5:
            raise ValueError(f"prune_ratio={prune_ratio!r} and {said[0]}: both say how much to prune; give one of them")
        if rescale not in (None, "unbiased", "step", "none"):
            raise ValueError(
                f"rescale={rescale!r}: use 'unbiased', weights of 1/pi, 'step', divided by their mean, or 'none', "
                "weights of one, which is biased"
            )
        check_keep(keep, lr_rule)
        self.prune_ratio = float(prune_ratio)
        self.delta = float(delta)
        self.target_saving = None if target_saving is None else float(target_saving)
        self.min_worth = None if min_worth is None else float(min_worth)
        self.rescale = rescale or self._usual_rescale(keep)
        self.keep = keep
        self.lr_rule = lr_rule or ("sqrt" if keep == "steps" else "none")

    def chances_at(self, snapshot: Snapshot, ratio: float) -> Chances | Thinning | None:
        """With which chance a pass visits each sample.

        Args:
            snapshot (Snapshot): What is known of them.
            ratio (float): How much to prune, in (0, 1): a chance to be skipped, or the share of visits to save.

        Returns:
            Chances | Thinning | None: None for a full pass.
        """
        raise NotImplementedError

    def ratio_for(self, snapshot: Snapshot, saving: float) -> float:
        """The ratio by which a pass saves a share of its visits, in (0, 1); any number above the largest means that."""
        return saving

    @property
    def needs_norms(self) -> bool:
        return self.min_worth is not None

    @property
    def largest_ratio(self) -> float:
        """Ratio beyond which a sample would stand for too many."""
        return 1 - PI_MIN

    def chances(self, snapshot: Snapshot) -> Chances | Thinning | None:
        ratio = self.prune_ratio
        if self.target_saving is not None:
            ratio = self.ratio_for(snapshot, self._saving(snapshot))
        if self.min_worth is not None:
            ratio = self._ratio_worth(snapshot, self.min_worth)
        # A ratio that a user gives is the user's; one that was worked out is bounded.
        if ratio is not self.prune_ratio:
            ratio = min(ratio, self.largest_ratio)
        return self.chances_at(snapshot, ratio) if ratio > 0 else None

    def is_active(self, progress: float) -> bool:
        # The tolerance keeps 0.7 * 10 passes at seven: binary fractions must not add a pruned pass.
        return self.prune_ratio > 0 and progress < self.delta - 1e-9

    def settings(self) -> dict[str, Any]:
        how_much: dict[str, Any] = {"prune_ratio": self.prune_ratio}
        for key in ("target_saving", "min_worth"):
            if getattr(self, key) is not None:
                how_much = {key: getattr(self, key)}
        step = {} if self.rescale == self._usual_rescale(self.keep) else {"rescale": self.rescale}
        if self.keep == "steps":
            step["keep"] = self.keep
            if self.lr_rule != "sqrt":
                step["lr_rule"] = self.lr_rule
        return {"policy": self.name, **how_much, "delta": self.delta, **step}

    def check_length(self, pass_share: float, batch_share: float) -> None:
        """Refuse a training that has too few passes for what it is to save.

        Args:
            pass_share (float): Share of the training that a whole pass is, in (0, 1].
            batch_share (float): Share of a pass that a global batch is; with ``keep='steps'``, the share that all its
                steps visit at least.

        Raises:
            ValueError: With both values.
        """
        if self.target_saving is None:
            return
        first = pass_share if self.needs_scores else 0.0
        spans = min(1.0, math.ceil((self.delta - 1e-9) / pass_share) * pass_share) - first
        # What a pass visits at least is full batches.
        least = math.ceil((1 - self.largest_ratio) / batch_share - 1e-9) * batch_share
        most = max(0.0, spans) * (1 - max(least, batch_share))
        if self.target_saving > most + 1e-9:
            raise ValueError(
                f"target_saving={self.target_saving} cannot be met: at most {most:.3f} of the visits can be saved in "
                f"{1 / pass_share:.3g} passes with delta={self.delta}"
                + (", of which the first gives the scores" if first else "")
                + "; lower it, raise delta, or train for more passes"
            )

    @staticmethod
    def _usual_rescale(keep: str) -> str:
        return "step" if keep == "steps" else "unbiased"

    def _saving(self, snapshot: Snapshot) -> float:
        """Share of its visits that a pass saves, so that what is left to save is shared out evenly."""
        assert self.target_saving is not None
        here = min(snapshot.pass_share, 1 - snapshot.progress)
        to_come = math.ceil((self.delta - 1e-9 - snapshot.progress) / snapshot.pass_share)
        span = max(here, min(to_come * snapshot.pass_share, 1 - snapshot.progress))
        return min(1.0, max(0.0, self.target_saving - snapshot.saved) / span)

    def _ratio_worth(self, snapshot: Snapshot, least: float) -> float:
        """The largest ratio whose pass is worth enough, by halving: worth falls where the ratio grows."""
        some = snapshot.some()
        if (norms := some.norms()) is None:
            return 0.0
        low, high = 0.0, self.largest_ratio
        for _ in range(24):
            middle = (low + high) / 2
            found = self.chances_at(some, middle)
            is_enough = found is None or worth(norms, found.by_sample()) >= least
            low, high = (middle, high) if is_enough else (low, middle)
        return low


def check_ratio(prune_ratio: Any) -> None:
    """Refuse a prune ratio that is outside [0, 1)."""
    if not is_number(prune_ratio) or not 0 <= prune_ratio < 1:
        raise ValueError(
            f"prune_ratio={prune_ratio!r} {what_is_wrong(prune_ratio, '[0, 1)')}: it is the chance that a well-learned "
            "sample is skipped; use 0.5 as in the paper, or 0 for full passes"
        )


def check_delta(delta: Any) -> None:
    """Refuse a share of the training that is outside (0, 1]."""
    if not is_number(delta) or not 0 < delta <= 1:
        raise ValueError(
            f"delta={delta!r} {what_is_wrong(delta, '(0, 1]')}: it is the share of the training after which pruning "
            "stops; use 0.875 as in the paper, or 1 to prune to the end"
        )


def check_keep(keep: Any, lr_rule: Any) -> None:
    """Refuse what is not known to be kept of a full pass, and a rule for learning rates that nothing would follow."""
    if keep not in ("batch", "steps"):
        raise ValueError(
            f"keep={keep!r}: use 'batch', fewer steps on full batches, or 'steps', as many on smaller ones"
        )
    if lr_rule is not None and lr_rule not in LR_RULES:
        raise ValueError(f"lr_rule={lr_rule!r}: use one of {list(LR_RULES)}")
    if lr_rule is not None and keep != "steps":
        raise ValueError(
            f"lr_rule={lr_rule!r} is for the smaller batches of keep='steps', and keep={keep!r}: leave it out"
        )


def _check_share(name: str, value: Any, meaning: str) -> None:
    if value is not None and (not is_number(value) or not 0 < plain(value) < 1):
        raise ValueError(f"{name}={value!r} {what_is_wrong(value, '(0, 1)')}: it is {meaning}")
