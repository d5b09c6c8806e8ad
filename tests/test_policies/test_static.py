"""One subset for all passes, by chance or by the scores that a run left."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infobatch_mm.core import Snapshot, build_policy
from infobatch_mm.core.rng import generator
from infobatch_mm.core.score_file import write_scores
from infobatch_mm.core.store import ScoreStore


def subset(policy: Any, size: int, number: int = 1) -> set[int]:
    ones = torch.ones(size, dtype=torch.bool)
    plan = build_policy(policy).plan(
        Snapshot(torch.zeros(size), ones, ones.to(torch.int32), 0.1, number), generator(number), 1
    )
    return set(range(size)) if plan is None else set(plan.indices.tolist())


def test_a_random_subset_is_the_same_in_every_pass_and_another_by_its_seed():
    policy = dict(type="static", prune_ratio=0.3)
    first = subset(policy, 50)
    assert len(first) == 35 and all(subset(policy, 50, number) == first for number in range(5))
    assert subset(dict(policy, subset=1), 50) != first


@pytest.mark.parametrize("kind", ["directory", "file", "npy"])
def test_static_subsets_by_the_scores_that_a_run_left(tmp_path: Path, kind: str):
    store = ScoreStore(20)
    scores = random.Random(0).sample([i / 7 for i in range(20)], 18)
    store.record(torch.arange(18), torch.tensor(scores))
    where = Path(write_scores(str(tmp_path), store))
    table = np.concatenate([np.array(scores), [np.nan, np.nan]])
    if kind == "npy":
        where = tmp_path / "scores.npy"
        np.save(where, table)
    elif kind == "directory":
        where = tmp_path
    ranked = sorted(range(18), key=lambda i: scores[i])
    for order, kept in (("hardest", ranked[8:]), ("easiest", ranked[:10])):
        policy = dict(type="static", prune_ratio=0.4, order=order, scores=str(where))
        assert subset(policy, 20) == {*kept, 18, 19}  # what has no score is kept
        assert build_policy(eval(repr(build_policy(policy)))).settings() == build_policy(policy).settings()
    with pytest.raises(ValueError, match=r"holds 20 scores, this data set has 21 samples"):
        subset(policy, 21)
