"""What a pass that leaves samples out is worth, by the gradients of its samples."""

from __future__ import annotations

import numpy as np


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
    mean = float(np.mean(norms, dtype=np.float64))
    return 1.0 if mean <= 0 else float(np.mean(np.square(norms, dtype=np.float64))) / mean**2
