"""Gradients that are made up, so that what they say is known."""

from __future__ import annotations

import numpy as np

from infobatch_mm.forecast.gradients import Measured


def measured(
    gradients: np.ndarray, scores: dict[str, np.ndarray] | None = None, num_samples: int | None = None
) -> Measured:
    """What is measured of gradients of the shape ``(n, 2, P)``; of all samples there are, unless there are more."""
    sums = gradients.sum(1)
    return Measured(
        np.arange(len(gradients)),
        num_samples or len(gradients),
        (gradients**2).sum(2),
        (gradients[:, 0] * gradients[:, 1]).sum(1),
        float((sums.sum(0) ** 2).sum()),
        (sums**2).sum(1),
        sums.astype(np.float32),
        scores or {},
    )


def of_norms(
    norms: np.ndarray, scores: dict[str, np.ndarray] | None = None, num_samples: int | None = None
) -> Measured:
    """The same of gradients with the given norms, shape ``(n, 2)``, in random directions."""
    directions = np.random.default_rng(5).normal(size=(len(norms), 2, 40))
    directions /= np.linalg.norm(directions, axis=2, keepdims=True)
    return measured(directions * norms[:, :, None], scores, num_samples)
