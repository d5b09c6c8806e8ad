"""Arguments of the published policies that are out of their range."""

from __future__ import annotations

from typing import Any

import pytest

from infobatch_mm.core import build_policy

BAD: list[tuple[dict[str, Any], str]] = [
    (dict(type="epsilon_greedy", epsilon=1.5), r"epsilon=1.5 is outside \[0, 1\]"),
    (dict(type="epsilon_greedy", min_worth=0.5), "'epsilon_greedy' takes no min_worth"),
    (dict(type="ucb", prune_ratio=0.3, target_saving=0.3), "both say how much to prune"),
    (dict(type="seta", num_groups=0), "num_groups=0 is below 1"),
    (dict(type="seta", window=0), r"window=0 is outside \(0, 1\]"),
    (dict(type="seta", prune_ratio=1), r"prune_ratio=1 is outside \[0, 1\)"),
    (dict(type="kakurenbo", tau=0.4), "tau=0.4 is below 0.5"),
    (dict(type="kakurenbo", tau="high"), r"tau='high' is text, not a number in \(0, 1\)"),
    (dict(type="kakurenbo", rescore_every=1), "rescore_every=1 is below 2"),
    (dict(type="ies", tolerance=0), "tolerance=0 is no number above 0"),
    (dict(type="ies", min_visits=0.5), "min_visits=0.5 is not a whole number"),
    (dict(type="repb", weights="none"), "weights='none': use 'counts'"),
    (dict(type="orderdp", pool=0), r"pool=0 is outside \(0, 1\]"),
    (dict(type="orderdp", prune_ratio=0.3), r"prune_ratio=0.3 is outside \[0.5, 1\)"),
    (dict(type="orderdp", prune_ratio=0.6, top=0.5), "both say how much"),
    (dict(type="scan", prune_ratio=0.6), "prune_ratio=0.6 is above 0.5"),
    (dict(type="scan", cycle=0), "cycle=0 is below 1"),
    (dict(type="scan", warmup=-1), "warmup=-1 is below 0"),
    (dict(type="progressive_dropout", mode="smrd"), "mode='smrd': use 'dbpd'"),
    (dict(type="progressive_dropout", decay=1.0), r"decay=1.0 is outside \(0, 1\)"),
    (dict(type="progressive_dropout", revision=1.5), "revision=1.5 is not a whole number"),
    (dict(type="class_budgets"), "policy 'class_budgets' needs classes"),
    (dict(type="class_budgets", classes=[0.5, 1.0]), r"classes holds float64 of shape \(2,\)"),
    (dict(type="class_budgets", classes="nowhere.npy"), "classes='nowhere.npy' is no .npy file"),
    (dict(type="class_budgets", classes=[0, 1], prune_ratio=0.95), "prune_ratio=0.95 would visit a share of 0.05"),
    (dict(type="class_budgets", classes=[0, 1], pi_min=0), r"pi_min=0 is outside \(0, 1\]"),
    (dict(type="class_budgets", classes=[0, 1], min_worth=0.9), "min_worth=0.9 and policy='class_budgets'"),
    (dict(type="static", order="middle"), "order='middle': use 'random'"),
    (dict(type="static", order="hardest"), "order='hardest' and scores=None: this order needs scores"),
    (dict(type="static", scores="run"), "order='random' and scores='run': this order takes no scores"),
    (dict(type="static", order="easiest", scores="nowhere"), "scores='nowhere' is neither a .npy file nor"),
    (dict(type="static", subset=-1), "subset=-1 is below 0"),
]


@pytest.mark.parametrize(("policy", "message"), BAD, ids=[str(place) for place in range(len(BAD))])
def test_an_argument_out_of_its_range_is_refused(policy: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        build_policy(policy)
