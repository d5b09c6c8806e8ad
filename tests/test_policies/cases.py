"""Random states of a training, for policies that are told in plain Python."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from infobatch_mm.core import Plan, Snapshot, build_policy
from infobatch_mm.core.rng import generator

SEEDS = range(15)


class Case:
    """A random state of a training, as lists; no two scores are equal."""

    def __init__(self, seed: int, scale: float = 1.0) -> None:
        source = random.Random(seed)
        self.size = source.randint(8, 70)
        self.seen = [source.random() < 0.9 for _ in range(self.size)]
        self.seen[0] = True
        drawn = torch.tensor([source.expovariate(1 / scale) + 1e-4 * i for i in range(self.size)])
        self.scores = [score if seen else 0.0 for score, seen in zip(drawn.tolist(), self.seen, strict=True)]
        self.times = [source.randint(1, 9) if seen else 0 for seen in self.seen]
        self.number = source.randint(1, 19)
        self.above = [seen and source.random() < 0.4 for seen in self.seen]
        self.passes = [source.randint(1, self.number) if seen else 0 for seen in self.seen]
        self.where = [i for i in range(self.size) if self.seen[i]]
        self.snapshot = Snapshot(
            torch.tensor(self.scores),
            torch.tensor(self.seen),
            torch.tensor(self.times, dtype=torch.int32),
            self.number / 20,
            self.number,
            1 / 20,
            columns={"above": torch.tensor(self.above), "passes": torch.tensor(self.passes)},
        )

    def ranked(self) -> list[int]:
        """Samples with a score, from the lowest on."""
        return sorted(self.where, key=lambda i: self.scores[i])

    def chances(self, policy: Any) -> list[float]:
        """What a policy gives each sample; all 1 in a full pass."""
        found = build_policy(policy).chances(self.snapshot)
        return [1.0] * self.size if found is None else found.by_sample().tolist()

    def drawn(self, policy: Any, seed: int = 0, multiple_of: int = 1) -> Plan | None:
        return build_policy(policy).plan(self.snapshot, generator(seed), multiple_of)


def close(found: list[float], expected: list[float]) -> bool:
    return found == pytest.approx(expected, abs=1e-8)
