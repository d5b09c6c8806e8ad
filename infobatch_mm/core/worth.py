"""What a pass that leaves samples out is worth, by the gradients of its samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from .checks import is_number

# Means over the data set are of so many samples at most.
_ENOUGH = 2**17

#: What is told of a pass, by name.
FIGURES = ("worth", "cost", "efficiency", "limit")


@dataclass(frozen=True)
class Worth:
    """What a pass costs and is worth, each as a share of a full one.

    Attributes:
        cost (float): Share of the visits that is paid, in (0, 1].
        worth (float, optional): Share of a full pass that its gradient noise equals, in (0, 1]; None where visits are
            not weighted, and sums over them estimate something else.
        limit (float): Largest efficiency of any unbiased pruning of these samples, at least 1.
    """

    cost: float
    worth: float | None
    limit: float

    @property
    def efficiency(self) -> float | None:
        """Worth over cost: 1 where pruning is training shorter."""
        return None if self.worth is None else self.worth / self.cost

    def paying(self, cost: float) -> Worth:
        """The same draws where another share of the visits was paid, as where it was brought to full batches."""
        efficiency = self.efficiency
        return Worth(cost, None if efficiency is None else min(1.0, efficiency * cost), self.limit)

    def plain(self) -> dict[str, float | None]:
        """The figures by name, for JSON."""
        return {name: getattr(self, name) for name in FIGURES}


def is_worth(found: object) -> bool:
    """Whether a state's entry is the attributes of a :class:`Worth`, by name."""
    if not isinstance(found, Mapping) or set(found) != {"cost", "worth", "limit"}:
        return False
    known = [each for name, each in found.items() if name != "worth" or each is not None]
    return all(is_number(each) and each > 0 for each in known)


def pass_worth(norms: np.ndarray, chances: np.ndarray | None = None, weighted: bool = True) -> Worth:
    """What a pass is worth by the gradients of its samples.

    Args:
        norms (ndarray): Root mean square norm h of each sample's gradient, shape ``(N,)``, none negative.
        chances (ndarray, optional): With which the pass visits each, shape ``(N,)``, in (0, 1]. Defaults to a full one.
        weighted (bool): Whether visits weigh the inverse of their chance. Defaults to True.
    """
    if chances is None:
        return Worth(1.0, 1.0, limit(norms))
    return Worth(cost(chances), worth(norms, chances) if weighted else None, limit(norms))


def equal_length(worth: Worth, noise: float) -> float:
    """Share of a full training, shortened, that is as good as one whose passes are worth this.

    S steps on batches of B advance like ``S / (1 + B_noise / B)`` steps without noise at a learning rate that suits B
    (McCandlish et al., 2018, eq. 2.11). A pruned batch is as noisy as a uniform one of e B samples, e the efficiency,
    so C of the steps are ``C (1 + n) / (1 + n / e)`` of all, n = B_noise / B. Where noise limits (n large) that is the
    worth; where it does not (n small) it is the cost, and pruning is training shorter whatever it draws. For batches of
    few samples the noise of a pruned one is a little less, by (1 - 1/e) / B of n.

    Args:
        worth (Worth): Of weighted passes.
        noise (float): Noise scale over batch size, at least 0; infinite for where noise alone limits.

    Returns:
        float: In (0, 1].
    """
    assert worth.efficiency is not None
    if np.isinf(noise):
        return min(1.0, worth.cost * worth.efficiency)
    return min(1.0, worth.cost * (1 + noise) / (1 + noise / worth.efficiency))


def noise_scale(mean_square: float, square_of_mean: float) -> float:
    """The noise scale ``tr(cov) / |mean|**2`` of gradients, in samples (McCandlish et al., 2018, eq. 2.9).

    Args:
        mean_square (float): Mean of the squared norms of single samples' gradients.
        square_of_mean (float): Squared norm of their mean over the data, estimated without bias: it may be negative by
            chance, which says that the sample is too small to see it.

    Returns:
        float: At least 0; infinite where the mean is not seen.
    """
    if square_of_mean <= 0:
        return float("inf")
    return max(0.0, mean_square - square_of_mean) / square_of_mean


def as_norms(scores: np.ndarray) -> np.ndarray:
    """Scores that are norms, or in proportion to them."""
    return scores.clip(min=0.0)


def filled_norms(
    scores: np.ndarray, seen: np.ndarray, norms_of: Callable[[np.ndarray], np.ndarray | None]
) -> np.ndarray | None:
    """Norms of gradients from scores; a sample that nobody has seen is as large as the others are in the mean.

    Args:
        scores (ndarray): Shape ``(N,)``, float32.
        seen (ndarray): Which samples have one, shape ``(N,)``, bool.
        norms_of (Callable): See :meth:`.ScoreRule.norms`.

    Returns:
        ndarray: Shape ``(N,)``, float; None where scores say nothing of norms, or no sample has one.

    Raises:
        ValueError: If what a score of the user's gives are no norms.
    """
    norms = norms_of(scores) if seen.any() else None
    if norms is None:
        return None
    if not isinstance(norms, np.ndarray) or norms.shape != scores.shape:
        shape = getattr(norms, "shape", None)
        raise ValueError(
            f"norms() of the score gave a {type(norms).__name__} of shape {shape} for scores of shape {scores.shape}: "
            "return a numpy array with a norm for each, or None"
        )
    if not (norms[seen] >= 0).all() or not np.isfinite(norms[seen]).all():
        wrong = norms[seen][~((norms[seen] >= 0) & np.isfinite(norms[seen]))][0]
        raise ValueError(f"norms() of the score gave {wrong}: norms of gradients are finite, and none is negative")
    return np.where(seen, norms, norms.mean(where=seen, dtype=np.float64))


def sampled_norms(
    scores: np.ndarray, seen: np.ndarray, norms_of: Callable[[np.ndarray], np.ndarray | None]
) -> np.ndarray | None:
    """:func:`filled_norms` of enough samples for a mean, the ones of :func:`enough`."""
    where = enough(len(seen))
    return filled_norms(scores[where], seen[where], norms_of)


def enough(length: int) -> slice | np.ndarray:
    """Enough of so many samples for a mean: all, or random ones, the same each time and on every process.

    Not every so many: data sets are periodic, as where each image was cut into four.
    """
    if length <= _ENOUGH:
        return slice(None)
    return np.sort(np.random.default_rng(length).integers(0, length, _ENOUGH))


def cost(chances: np.ndarray) -> float:
    """Share of a full pass's visits that is paid, ``mean(pi)``."""
    return float(np.mean(chances, dtype=np.float64))


def worth(norms: np.ndarray, chances: np.ndarray) -> float:
    """Share of a full pass that the noise of a pass's gradient equals, ``sum(h**2) / sum(h**2 / pi)``.

    A sum over N samples that are each drawn with chance pi and weighed by 1/pi is as noisy as one over so many of them
    drawn uniformly. Random pruning has a worth of its cost: it is training shorter.

    Args:
        norms (ndarray): Root mean square norm h of each sample's gradient, shape ``(N,)``, none negative.
        chances (ndarray): With which the pass visits each, shape ``(N,)``, in (0, 1].

    Returns:
        float: In (0, 1]; the cost where all norms are 0.
    """
    squares = np.square(norms, dtype=np.float64)
    if not squares.any():
        return cost(chances)
    return float(squares.sum() / (squares / chances).sum())


def limit(norms: np.ndarray) -> float:
    """Largest efficiency, worth over cost, of any unbiased pruning: ``1 + cv(h)**2``, where few are drawn.

    Args:
        norms (ndarray): As :func:`worth` takes them.

    Returns:
        float: At least 1.
    """
    largest = float(np.max(norms, initial=0.0))
    if largest <= 0:
        return 1.0
    shares = np.asarray(norms, dtype=np.float64) / largest  # whose squares neither vanish nor overflow
    return float(np.mean(np.square(shares))) / float(np.mean(shares)) ** 2
