"""Arms of a comparison: as they are typed, refused, controlled, and trained once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

for needed in ("mmengine", "matplotlib", "rich", "scipy"):
    pytest.importorskip(needed)

from mmengine.config import Config

from infobatch_mm.cli.comparison.controls import policy_of, schedule_of, smaller, unweighted
from infobatch_mm.cli.comparison.settings import differing
from infobatch_mm.cli.comparison.sharing import assign
from infobatch_mm.cli.comparison.specs import check_names, check_spec, parse_spec
from infobatch_mm.cli.config import merged

from .comparing import config

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


# ---- as they are typed -------------------------------------------------------------------------------------------


def test_a_spec_is_a_policy_and_settings_of_the_hook() -> None:
    spec = parse_spec("variance:target_saving=0.4,score=gradient,norm=recalibrate,pi_min=0.2")
    assert spec.policy == dict(type="variance", target_saving=0.4, pi_min=0.2)
    assert spec.hook == dict(score="gradient", norm="recalibrate")
    assert parse_spec("random").policy == dict(type="random")
    odd = parse_spec("mine:classes=[0, 1,2],path=/a=b/c,d,flag=True,nothing=None,text='x'")
    assert odd.policy == dict(type="mine", classes=[0, 1, 2], path="/a=b/c,d", flag=True, nothing=None, text="x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("random:prune_ratio", "'prune_ratio' is no setting"),
        (":delta=1", "the name of a policy comes first"),
        ("random:type=ucb", "the name of a policy comes first"),
        ("random:delta=1,delta=0.5", "delta is set twice"),
        ("nonesuch", "unknown policy 'nonesuch'"),
        ("random:pruning=0.5", "takes no pruning"),
        ("random:prune_ratio=1.5", "prune_ratio=1.5"),
        ("random:score=nonesuch", "unknown score 'nonesuch'"),
        ("none", "prunes nothing"),
    ],
)
def test_a_spec_that_cannot_be_trained_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_spec(parse_spec(text))


def test_arms_of_one_folder_are_refused() -> None:
    check_names(["random", "random:delta=1"])
    for names in (["random", "random"], ["random:delta=1", "random delta 1"], ["baseline"]):
        with pytest.raises(ValueError, match="have one folder"):
            check_names(["ucb", *names])


# ---- their controls ----------------------------------------------------------------------------------------------


def summary(visits: int, delta: float | None = 0.875, **more: Any) -> dict[str, Any]:
    return dict(visits=visits, visits_full=10_000, delta=delta, num_samples=100, **more)


def test_controls_of_equal_visits_are_shared() -> None:
    arms = {"a": summary(6000), "b": summary(6050), "c": summary(6070), "d": summary(6000, delta=1.0)}
    family = assign(["shortened", "random", "unweighted"], arms, {("b", "unweighted"): "it takes no rescale"})
    assert [(each.name, each.owner) for each in family.controls] == [
        ("shortened", "a"),
        ("shortened for c", "c"),  # more than 1 % away
        ("random", "a"),
        ("random for c", "c"),
        ("random for d", "d"),  # which prunes to the end
        ("unweighted", "a"),
        ("unweighted for c", "c"),
        ("unweighted for d", "d"),
    ]
    assert family.opponents["b"] == dict(full="baseline", shortened="shortened", random="random")
    assert family.opponents["d"]["shortened"] == "shortened"
    assert family.left_out == ["no control 'unweighted' for b: it takes no rescale"]
    named = assign(["random"], {"random": summary(6000)}, {})
    assert named.opponents["random"]["random"] == "random for random"  # a pruned arm has the name


@pytest.mark.parametrize("policy", [None, "random", dict(type="variance", pi_min=0.2)])
def test_controls_change_the_hook_and_nothing_else(tmp_path: Path, policy: Any) -> None:
    hook = dict(type="InfoBatchHook", prune_ratio=0.4, delta=0.8, score="ema", norm="recalibrate")
    if policy is not None:
        hook["policy"] = policy
    cfg = config(tmp_path, custom_hooks=[dict(type="EMAHook"), hook])
    cfg.dump("pruned.py")

    def changed(options: list[str]) -> Config:
        found = merged(Path("pruned.py"), options)
        assert found.custom_hooks[0] == cfg.custom_hooks[0]
        assert {key: value for key, value in found.items() if key != "custom_hooks"} == {
            key: value for key, value in cfg.items() if key != "custom_hooks"
        }
        return found

    schedule = schedule_of(cfg, 100)
    found = changed(smaller(cfg, schedule, dict(visits=300, visits_full=400)))
    assert policy_of(found).settings() == dict(policy="random", target_saving=0.25, delta=1.0, keep="steps")
    assert found.custom_hooks[1].norm == "recalibrate" and found.custom_hooks[1].score is None
    own = policy_of(cfg)
    found = changed(unweighted(cfg))
    assert policy_of(found).settings() == {**own.settings(), "rescale": "none"}
    assert found.custom_hooks[1].score == "ema"
    with pytest.raises(ValueError, match="has no weights here"):
        unweighted(found)


def test_controls_that_cannot_be_are_refused_with_the_reason(tmp_path: Path) -> None:
    cfg = config(tmp_path, custom_hooks=[dict(type="InfoBatchHook", policy="kakurenbo")])
    with pytest.raises(ValueError, match="kakurenbo takes no rescale"):
        unweighted(cfg)
    with pytest.raises(ValueError, match="cannot be met"):
        smaller(cfg, schedule_of(cfg, 100), dict(visits=20, visits_full=400))
    cfg.train_dataloader.batch_size = 1
    with pytest.raises(ValueError, match="cannot be made smaller"):
        smaller(cfg, schedule_of(cfg, 100), dict(visits=300, visits_full=400))


def test_differences_are_named_by_dotted_names() -> None:
    one = dict(a=dict(b=[1, dict(c=2)]), same=(1, 2), only=0)
    other = dict(a=dict(b=[1, dict(c=3)]), same=[1, 2])
    assert differing(one, other, ("there", "here")) == "a.b.1.c: 2 there, 3 here; only: 0 there, None here"
    assert differing(one, dict(one), ("there", "here")) == ""
    many = {str(i): i for i in range(9)}
    assert differing(many, {}, ("x", "y")).endswith("and 3 more")
