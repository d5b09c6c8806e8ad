"""Draws samples with unequal chances: exactly K of them, and each with exactly its chance.

Chances are whole multiples of 2**-30 here, so that sums are exact and weights are the inverse of what was drawn with.
"""

from __future__ import annotations

import numpy as np
import torch

#: Chances are counted in units of ``1 / ONE``: 2**33 samples add up within int64.
ONE = 1 << 30


def proportional(sizes: np.ndarray, total: float, lowest: float) -> np.ndarray:
    """Chances proportional to sizes, as far as bounds allow: ``clip(f * size, lowest, 1)``, of a given sum.

    With the root mean square norms of gradients as sizes these are the chances of the smallest variance (Neyman, 1934).

    Args:
        sizes (ndarray): Shape ``(n,)``, float64, none negative. The ones of size 0 have equal chances.
        total (float): Sum of the chances, from ``n * lowest`` to n.
        lowest (float): Smallest chance, in [0, 1].

    Returns:
        ndarray: Shape ``(n,)``, float64.
    """
    count = len(sizes)
    assert lowest * count <= total * (1 + 1e-9) and total <= count * (1 + 1e-9)
    largest = float(sizes.max(initial=0.0))
    if largest <= 0 or total >= count:
        return np.full(count, min(1.0, total / max(1, count)))
    positive = sizes > 0
    number = int(np.count_nonzero(positive))
    if total >= number + lowest * (count - number):  # what is left falls to the ones of size 0
        return np.where(positive, 1.0, (total - number) / max(1, count - number))
    scaled = sizes / largest
    below, above = 0.0, np.inf
    factor = total / float(scaled.sum())
    for _ in range(200):
        chances = np.clip(factor * scaled, lowest, 1.0)
        missing = total - float(chances.sum())
        if abs(missing) <= 1e-10 * total:
            break
        below, above = (factor, above) if missing > 0 else (below, factor)
        # Newton's step on a piecewise linear function; where it leaves the bracket, halve that.
        free = (chances > lowest) & (chances < 1.0)
        slope = float(scaled[free].sum())
        step = factor + missing / slope if slope > 0 else np.inf
        if not below < step < above:
            step = 2 * factor if np.isinf(above) else (below + above) / 2
        if step == factor or step > 1e300:
            break
        factor = step
    return chances


def in_units(chances: np.ndarray, total: int) -> np.ndarray:
    """Chances as whole units that add up to exactly ``total * ONE``.

    Args:
        chances (ndarray): Shape ``(n,)``, in (0, 1], whose sum is ``total`` but for rounding.
        total (int): Number of samples to draw, at most n.

    Returns:
        ndarray: Shape ``(n,)``, int64, in [1, ONE]. What rounding leaves over is spread in single units.
    """
    units = np.clip(np.rint(chances * ONE).astype(np.int64), 1, ONE)
    while rest := total * ONE - int(units.sum()):
        room = np.flatnonzero(units < ONE if rest > 0 else units > 1)
        assert len(room), "the chances do not add up to the number of samples to draw"
        # All the same where there is much to spread, as where the sum was only near.
        each = max(1, abs(rest) // len(room))
        if rest > 0:
            changed = room[: max(1, rest // each)]
            units[changed] = np.minimum(units[changed] + each, ONE)
        else:
            changed = room[: max(1, -rest // each)]
            units[changed] = np.maximum(units[changed] - each, 1)
    return units


def systematic(units: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """Draw by equal steps from a random start along the sum of the chances, in random order (Madow, 1949).

    A sample is drawn with exactly its chance, and the number of drawn samples is exactly the sum of the chances. With
    equal chances this is drawing without replacement: the order is random.

    Args:
        units (ndarray): Chances in units of ``1 / ONE``, shape ``(n,)``, int64, in [0, ONE], whose sum is a multiple of
            ONE.
        generator (torch.Generator): Source of the order and of the start.

    Returns:
        ndarray: Places that were drawn, shape ``(k,)``, int64, in the random order of the draw.
    """
    dtype = torch.int32 if len(units) < 2**31 else torch.int64
    order = torch.randperm(len(units), generator=generator, dtype=dtype, device="cpu").numpy()
    start = int(torch.randint(ONE, (), generator=generator, dtype=torch.int64, device="cpu"))
    # Points start, start + ONE, ... that lie below the end of each sample's stretch.
    ends = units[order]
    np.cumsum(ends, out=ends)
    ends += ONE - 1 - start
    ends >>= 30
    drawn = np.diff(ends, prepend=0).astype(bool)
    return order[drawn].astype(np.int64)
