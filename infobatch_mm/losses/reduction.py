"""Whether a host averages a loss over the samples of a batch or adds them up, where each is evaluated alone.

It decides what the losses of the samples alone are divided by in a pruned pass, so a guess would be wrong by a factor
of B. Whoever registers a head or loss may say it. Else it is found out on B copies of one sample: a mean gives the
sample's own loss, a sum gives B times it. A loss that gives neither is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .dissect.arguments import BatchedArguments
from .dissect.proof import in_full_precision
from .dissect.results import losses_in, written
from .refusals import cannot_be_weighed


def check_said(reduction: str | None) -> None:
    """Refuse anything but ``'mean'``, ``'sum'`` and None for what a user says about a loss."""
    if reduction not in ("mean", "sum", None):
        raise ValueError(
            f"reduction={reduction!r}: expected 'mean' or 'sum', or None to have it found out in the first step"
        )


class Reduction:
    """What is known of the losses of one head or loss module.

    Args:
        title (str): Its name, for messages.
        said (str, optional): What a user says: ``'mean'`` or ``'sum'``; None to find it out.
        how_to_say (str): What a user can do to say it, for messages.
        trusted (bool): Whether it is a host's own: a host that adds samples up does so exactly, so anything else is a
            mean over a number that the batch decides.

    Attributes:
        asked (bool): Whether :meth:`learn` was called yet.

    Raises:
        ValueError: If something else is said.
    """

    def __init__(self, title: str, said: str | None, how_to_say: str, trusted: bool) -> None:
        check_said(said)
        self._title, self._said, self._how_to_say, self._trusted = title, said, how_to_say, trusted
        self._known: dict[tuple, str] = {}
        self.asked = False

    def normaliser(self, path: tuple, size: int) -> int:
        """Divisor of the summed losses of ``size`` samples at a path; while nobody knows, as for a mean."""
        return 1 if self._known.get(path, self._said) == "sum" else size

    def unknown(self, losses: Mapping[tuple, Any]) -> list[tuple]:
        """Paths of losses of which nothing is known, and nobody has said anything."""
        return [] if self._said else [path for path in losses if path not in self._known]

    def learn(
        self,
        call: Callable[[Mapping[str, Any]], Any],
        batch: BatchedArguments,
        alone: Mapping[tuple, Tensor],
        valid: Tensor | None,
    ) -> None:
        """Find out what is not known yet; waits for the device.

        The first time three evaluations are made also where no sample can tell: on several processes a loss may wait
        for the others' in each.

        Args:
            call (Callable): Evaluates the host's loss on arguments.
            batch (BatchedArguments): The arguments of one call, of at least two samples.
            alone (Mapping): Path of each loss, and its values on the samples alone, shape ``(B,)``.
            valid (Tensor, optional): Which samples have something to be scored by, shape ``(B,)``, bool.

        Raises:
            ValueError: If a loss turns out to be neither a mean nor a sum, or another one than was said.
        """
        first, self.asked = not self.asked, True
        unknown = [path for path in alone if path not in self._known]
        if not unknown or (self._said and (self._trusted or batch.has_rows)):
            return
        place = _most_telling([alone[path] for path in unknown], valid)
        if place is None and not first:
            return
        one, again, copies = _evaluated(call, batch, place or 0)
        for path in unknown if place is not None else ():
            if path in one and path in again and path in copies:
                found = self._judged(path, one[path], again[path], copies[path], batch.batch_size)
                if found is not None:
                    self._known[path] = found

    def _judged(self, path: tuple, one: Tensor, again: Tensor, copies: Tensor, size: int) -> str | None:
        # Rounding: a hundred last places of single precision, whose last one hosts add to what they divide by; in half
        # precision a twentieth.
        tolerance = min(100 * max(torch.finfo(torch.float32).eps, torch.finfo(one.dtype).eps), 0.05)
        alone, repeated, together = (float(each.sum()) for each in (one, again, copies))
        if alone == 0:
            return None
        times = together / alone
        found = next((r for r, k in (("mean", 1), ("sum", size)) if abs(times - k) <= tolerance * k), None)
        if found is None:
            if self._trusted:
                return "mean"
            if self._said is not None:
                return self._said
            why = f"its loss on {size} copies of a sample is {times:.4g} times that on the sample"
            if abs(repeated - alone) > tolerance * abs(alone):
                why += ", and it draws random numbers"
            raise self._refused(path, f"{why}: neither a mean over samples, which is 1 times, nor a sum, {size} times")
        if self._said not in (None, found):
            why = f"it is registered with reduction={self._said!r}, but its loss on {size} copies of a sample is "
            raise self._refused(path, f"{why}{times:.4g} times that on the sample, which makes it a {found}")
        return found

    def _refused(self, path: tuple, why: str) -> ValueError:
        return cannot_be_weighed(f"{written(path)} of {self._title}", f"{why}; say which it is with {self._how_to_say}")


def _most_telling(losses: list[Tensor], valid: Tensor | None) -> int | None:
    """The sample with the largest losses, of those that are usable; None if all are 0."""
    totals = torch.stack([each.detach().abs() for each in losses]).sum(0).tolist()
    usable = [True] * len(totals) if valid is None else valid.tolist()
    sizes = [total if use and 0 < total < float("inf") else 0.0 for total, use in zip(totals, usable, strict=True)]
    largest = max(range(len(sizes)), key=sizes.__getitem__)
    return largest if sizes[largest] > 0 else None


def _evaluated(call: Callable[[Mapping[str, Any]], Any], batch: BatchedArguments, place: int) -> list[dict]:
    """The losses of one sample, twice, and of a batch of its copies, in single precision at least."""
    with torch.no_grad(), in_full_precision(batch) as batch:
        alone = batch.samples()[place]
        calls = (alone, batch.samples()[place], batch.reordered([place] * batch.batch_size))
        return [dict(losses_in(call(each))) for each in calls]
