"""Policies of users: found by name or dict, and their plans checked when they are drawn."""

from __future__ import annotations

import doctest
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import infobatch_mm.core.policy_registry as module
from infobatch_mm import InfoBatch, InfoBatchPolicy, NoPruning, Plan, PruningPolicy, register_policy
from infobatch_mm.core import AnnealedPolicy, EpochSchedule, Pruner, build_policy, plan_check
from infobatch_mm.core.chances import kept_count
from infobatch_mm.policies import RandomPolicy


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "_POLICIES", dict(module._POLICIES))
    yield


class Half(PruningPolicy):
    """Every other sample, by chance."""

    name = "half"

    def __init__(self, prune_ratio: float = 0.5, sorted_by: str = "score", **more: Any) -> None:
        self.prune_ratio, self.sorted_by, self.more = prune_ratio, sorted_by, more

    def is_active(self, progress: float) -> bool:
        return True

    def draw(
        self, scores: torch.Tensor, seen: torch.Tensor, generator: torch.Generator, multiple_of: int
    ) -> Plan | None:
        kept = torch.randperm(len(scores), generator=generator)[: len(scores) // 2]
        return Plan(kept, torch.full((len(kept),), 2.0), pruned=True)

    def settings(self) -> dict[str, Any]:
        return {"policy": self.name, "prune_ratio": self.prune_ratio, "sorted_by": self.sorted_by}


class Strict(Half):
    name = "strict"

    def __init__(self, share: float) -> None:
        super().__init__(share)


class Handed(AnnealedPolicy):
    """Hands what it does not know on to its base."""

    name = "handed"

    def __init__(self, temperature: float = 1.0, **more: Any) -> None:
        super().__init__(**more)
        self.temperature = temperature

    def draw(self, *args: Any, **kwargs: Any) -> None:
        return None

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "temperature": self.temperature}


@dataclass
class Noted(PruningPolicy):
    share: Any = 0.5
    name = "noted"

    def is_active(self, progress: float) -> bool:
        return False

    def draw(self, *args: Any, **kwargs: Any) -> None:
        return None

    def settings(self) -> dict[str, Any]:
        return {"policy": self.name, "share": self.share}


class Nameless(Handed):
    name = None  # type: ignore[assignment]


# ---- found ------------------------------------------------------------------------------------------------


def test_a_registered_policy_is_found_by_name_and_by_dict():
    assert register_policy(Half) is Half
    assert isinstance(build_policy("half", 0.3), Half) and build_policy("half", 0.3).prune_ratio == 0.3
    built = build_policy({"type": "half", "prune_ratio": 0.7, "sorted_by": "name", "anything": 1}, 0.7)
    assert (built.prune_ratio, built.sorted_by, built.more) == (0.7, "name", {"anything": 1})
    infobatch = InfoBatch(8, 3, policy=dict(type="half", sorted_by="name"))
    assert infobatch.summary()["policy"] == "half"
    for _ in range(3):
        for index, _ in infobatch.loader(list(range(8)), 2):
            infobatch.weigh(index.float(), index)
    assert [entry["kept"] for entry in infobatch.summary()["per_pass"]] == [4] * 3


def test_a_training_on_accelerate_takes_a_dict_too():
    accelerate = pytest.importorskip("accelerate")
    from infobatch_mm.diffusion import AcceleratedInfoBatch

    loader = DataLoader(list(range(8)), 2, shuffle=True)
    infobatch = AcceleratedInfoBatch(
        accelerate.Accelerator(cpu=True), loader, 3, 0.3, policy=dict(type="infobatch", quantile=0.76)
    )
    summary = infobatch.summary()
    assert (summary["policy"], summary["prune_ratio"], summary["quantile"]) == ("infobatch", 0.3, 0.76)


def test_ours_are_found_by_dict_with_arguments_beside_it_as_defaults():
    built = build_policy(dict(type="infobatch", quantile=0.76, delta=0.6), 0.3)
    assert built.settings() == {"policy": "infobatch", "prune_ratio": 0.3, "delta": 0.6, "quantile": 0.76}
    assert isinstance(build_policy(dict(type="random", prune_ratio=0.2)), RandomPolicy)
    assert isinstance(build_policy(dict(type="none")), NoPruning)
    given = dict(type="infobatch", quantile=0.5)
    build_policy(given)
    assert given == dict(type="infobatch", quantile=0.5)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("half", "unknown policy 'half': choose one of .*register_policy"),
        (dict(type="half"), "unknown policy 'half'"),
        (dict(prune_ratio=0.5), r"is no policy: use a name"),
        (
            dict(type="infobatch", quantil=0.5),
            r"policy 'infobatch' takes no quantil: its arguments are \['prune_ratio'",
        ),
        (dict(type="infobatch", prune_ratio=2), r"prune_ratio=2 is outside \[0, 1\)"),
        (dict(type=7), "unknown policy 7"),
        (Half, "policy=Half is a class: make an instance"),
        (None, "policy=None is no policy"),
        (3, "policy=3 is no policy"),
    ],
    ids=str,
)
def test_what_is_no_policy_is_refused(policy: Any, message: str):
    with pytest.raises(ValueError, match=message):
        build_policy(policy)


def test_a_policy_without_a_needed_argument_is_refused_by_its_name():
    register_policy(Strict)
    assert build_policy(dict(type="strict", share=0.2)).prune_ratio == 0.2
    with pytest.raises(ValueError, match="policy 'strict' needs share"):
        build_policy("strict")


def test_arguments_that_a_policy_hands_on_to_its_base_are_its_own():
    register_policy(Handed)
    assert build_policy("handed", 0.3, 0.6).settings() == {
        "policy": "handed", "prune_ratio": 0.3, "delta": 0.6, "temperature": 1.0
    }  # fmt: skip
    assert build_policy(dict(type="handed", delta=0.7, temperature=2), 0.3).delta == 0.7
    with pytest.raises(ValueError, match=r"'handed' takes no tau: its arguments are \['temperature', 'prune_ratio'"):
        build_policy(dict(type="handed", tau=1))


def test_a_constructor_that_fails_is_refused_with_what_it_was_given():
    class Twice(Handed):
        name = "twice"

        def __init__(self, **more: Any) -> None:
            super().__init__(prune_ratio=0.1, **more)

    register_policy(Twice)
    with pytest.raises(ValueError, match=r"policy 'twice' .*\(prune_ratio=0\.3\).*multiple values"):
        build_policy("twice", 0.3)


def test_a_policy_is_found_where_it_lies_as_a_config_with_imports_writes_it_down():
    place = dict(type="infobatch_mm.InfoBatchPolicy", quantile=0.7)
    assert build_policy(place).settings() == InfoBatchPolicy(quantile=0.7).settings()
    for nowhere in ("infobatch_mm.InfoBatch", "infobatch_mm.Nothing", "no_such_module.Policy", "infobatch_mm.", "."):
        with pytest.raises(ValueError, match=f"unknown policy '{nowhere}'"):
            build_policy(nowhere)


def test_what_cannot_be_named_or_written_down_is_refused():
    with pytest.raises(ValueError, match="Nameless has name=None"):
        build_policy(Nameless())
    with pytest.raises(ValueError, match=r"'noted' \(.*Noted\).* settings\(\).*share.*tensor\(0\.5"):
        build_policy(Noted(torch.tensor(0.5)))
    with pytest.raises(ValueError, match="AnnealedPolicy is abstract: it lacks chances_at, chances, or draw"):
        register_policy(AnnealedPolicy)
    with pytest.raises(ValueError, match=r"policy 'AnnealedPolicy' .*abstract"):
        build_policy(dict(type=AnnealedPolicy))
    with pytest.raises(ValueError, match=r"'noted' \(.*Noted\).* settings\(\).*array"):
        build_policy(dict(type=Noted, share=np.ones(2)))


def test_registering_is_refused_for_what_has_no_name_or_anothers():
    register_policy(Half)
    register_policy(Half)  # a cell of a notebook that is run again
    register_policy(type("Half", (Half,), {"__module__": Half.__module__, "__qualname__": "Half"}))

    class Other(Half):
        pass

    with pytest.raises(ValueError, match=r"the name 'half' of .*Other is taken by .*Half"):
        register_policy(Other)
    Other.name = ""
    with pytest.raises(ValueError, match="has name=''"):
        register_policy(Other)
    with pytest.raises(ValueError, match="takes a subclass of PruningPolicy"):
        register_policy(Half())  # type: ignore[arg-type]


def test_a_policy_is_written_as_what_builds_it():
    register_policy(Half)
    for policy in (InfoBatchPolicy(0.3, 0.6, 0.7), RandomPolicy(0.2), NoPruning(), Half(0.4, "name")):
        assert build_policy(eval(repr(policy))).settings() == policy.settings()


def test_a_policy_is_written_as_what_builds_it_also_where_it_has_a_repr_of_its_own_or_numbers_of_numpy():
    assert repr(Noted()) == "Noted(share=0.5)"  # a dataclass
    assert str(Noted(np.float64(0.4))) == "dict(type='noted', share=0.4)"
    assert repr(Half(np.float32(0.5))) == "dict(type='half', prune_ratio=0.5, sorted_by='score')"


def test_docstring_example_runs():
    tests = [test for test in doctest.DocTestFinder().find(register_policy, globs=vars(module)) if test.examples]
    assert tests
    for test in tests:
        test.globs["torch"] = torch
        assert doctest.DocTestRunner().run(test).failed == 0


# ---- checked ----------------------------------------------------------------------------------------------


ONES = torch.ones(4)
FAULTS: dict[str, tuple[Any, str]] = {
    "no plan": ([1, 2], "returned a list, expected a Plan or None"),
    "int32": (Plan(torch.arange(4, dtype=torch.int32), ONES, True), "expected int64 .* got torch.int32"),
    "2-D": (Plan(torch.arange(4).view(2, 2), ONES, True), r"of shape \(2, 2\)"),
    "empty": (Plan(torch.arange(0), torch.ones(0), True), "at least one"),
    "list": (Plan([1, 2], ONES, True), "got list"),  # type: ignore[arg-type]
    "double weights": (Plan(torch.arange(4), ONES.double(), True), "float32 weights .* got torch.float64"),
    "other weights": (Plan(torch.arange(4), torch.ones(3), True), r"weights of shape \(4,\), got .* \(3,\)"),
    "range": (Plan(torch.tensor([0, 1, 2, 8]), ONES, True), "sample index 8 is outside the data set of 8 samples"),
    "negative": (Plan(torch.tensor([0, 1, 2, -1]), ONES, True), "sample index -1 is outside"),
    "twice": (Plan(torch.tensor([0, 1, 2, 1]), ONES, True), "sample 1 is visited 2 times"),
    "nan": (Plan(torch.arange(4), torch.tensor([1, 1, torch.nan, 1]), True), "sample 2 weighs nan"),
    "infinite": (Plan(torch.arange(4), torch.tensor([1, torch.inf, 1, 1]), True), "sample 1 weighs inf"),
    "zero": (Plan(torch.arange(4), torch.tensor([0.0, 1, 1, 1]), True), "sample 0 weighs 0.0"),
    "ragged": (Plan(torch.arange(3), torch.ones(3), True), "3 visits do not make full batches of 2"),
    "pruned": (Plan(torch.arange(4), ONES, 1), "pruned=1, expected True or False"),  # type: ignore[arg-type]
    "full but short": (Plan(torch.arange(4), ONES, False), "4 of 8 samples are visited, but pruned=False"),
    "full but weighs": (
        Plan(torch.arange(8), torch.tensor([1.0, 1, 1, 2, 1, 1, 1, 1]), False),
        "sample 3 weighs 2.0 in a plan with pruned=False",
    ),
    "other device": (Plan(torch.arange(4, device="meta"), ONES, True), "on the CPU, .*on meta"),
    "gradient": (Plan(torch.arange(4), ONES.clone().requires_grad_(), True), "without a gradient"),
    "threshold": (Plan(torch.arange(4), ONES, True, torch.tensor(0.5)), r"threshold=tensor\(0.5000\)"),  # type: ignore[arg-type]
    "nan threshold": (Plan(torch.arange(4), ONES, True, float("nan")), "threshold=nan"),
}


@pytest.mark.parametrize(("drawn", "message"), FAULTS.values(), ids=list(FAULTS))
def test_a_plan_that_cannot_be_walked_is_refused_when_it_is_drawn(drawn: Any, message: str):
    class Faulty(Half):
        def draw(self, *args: Any, **kwargs: Any) -> Any:
            return drawn

    pruner = Pruner(EpochSchedule(8, 3, 2), Faulty())
    with pytest.raises(ValueError, match=rf"policy 'half' \(.*Faulty\) drew a plan that cannot be walked: .*{message}"):
        pruner.begin_pass()


@pytest.mark.parametrize("threshold", [None, 0.5, 2])
def test_a_plan_that_can_be_walked_is_taken(threshold: float | None):
    class Sound(Half):
        def draw(self, *args: Any, **kwargs: Any) -> Plan:
            return Plan(torch.tensor([7, 0, 3, 1]), torch.tensor([2.0, 1e-3, 1e6, 1]), True, threshold)

    assert Pruner(EpochSchedule(8, 3, 2), Sound()).begin_pass().indices.tolist() == [7, 0, 3, 1]


def test_a_full_plan_of_a_users_policy_need_not_divide():
    class Whole(Half):
        def draw(self, scores: torch.Tensor, *args: Any, **kwargs: Any) -> Plan:
            return Plan(torch.arange(len(scores)), torch.ones(len(scores)), pruned=False)

    assert len(Pruner(EpochSchedule(7, 3, 2), Whole()).begin_pass()) == 7


def test_our_own_policies_pay_nothing_for_the_check(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan_check, "_fault", lambda *args: "looked")
    pruner = Pruner(EpochSchedule(8, 3, 2), RandomPolicy())
    assert pruner.begin_pass().pruned


# ---- bounded ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prune_ratio", [0.01, 0.1, 0.25, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99, 0.999])
def test_no_weight_exceeds_twice_the_nominal_one(prune_ratio: float):
    bounded = 0
    for num_candidates in [*range(1, 70), 100, 333, 1000, 4097]:
        for num_others in [0, 1, 2, 7, 31, 500]:
            for multiple_of in [1, 2, 3, 8, 31, 64, 500, 1000]:
                kept = kept_count(num_candidates, num_others, prune_ratio, multiple_of)
                assert 1 <= kept <= num_candidates
                if kept < num_candidates:
                    assert (num_others + kept) % multiple_of == 0
                    assert num_candidates / kept <= 2 / (1 - prune_ratio) * (1 + 1e-9)
                else:
                    # A full pass only where nothing near enough divides.
                    target = num_candidates * (1 - prune_ratio)
                    nearest = [k for k in range(1, num_candidates) if (num_others + k) % multiple_of == 0]
                    assert not [k for k in nearest if target / 2 <= k and abs(k - target) < num_candidates - target]
                    bounded += bool(nearest)
    assert bounded or prune_ratio not in (0.3, 0.5, 0.7)


def test_one_of_a_thousand_is_not_made_to_stand_for_all():
    assert kept_count(1000, 1023, 0.5, 1024) == 1000  # one would divide
    assert kept_count(1000, 524, 0.5, 1024) == 500


# ---- nothing that was said is lost --------------------------------------------------------------------------


def test_a_ratio_beside_a_policy_that_says_otherwise_or_takes_none_is_refused():
    with pytest.raises(ValueError, match=r"prune_ratio=0.3 and policy=dict\(prune_ratio=0.4, ...\): set it in one"):
        build_policy(dict(type="infobatch", prune_ratio=0.4), 0.3)
    with pytest.raises(ValueError, match=r"delta=0.9 and policy=dict\(delta=0.6, ...\): set it in one"):
        build_policy(dict(type="infobatch", delta=0.6), 0.5, 0.9)
    register_policy(Strict)
    with pytest.raises(ValueError, match="policy 'strict' takes no delta: its arguments are"):
        build_policy(dict(type="strict", share=0.2), 0.5, 0.3)
    assert isinstance(build_policy("none", 0.3, 0.6), NoPruning)


def test_a_policy_with_arguments_tells_them():
    class Silent(PruningPolicy):
        name = "silent"

        def __init__(self, share: float = 0.5) -> None:
            self.share = share

        is_active, draw = Half.is_active, Half.draw

    with pytest.raises(ValueError, match=r"'silent' .* has arguments \['share'\] and no settings\(\) of its own"):
        build_policy(Silent())


def test_a_policy_may_write_into_what_it_is_given():
    class Writes(Half):
        name = "writes"

        def draw(self, scores: torch.Tensor, seen: torch.Tensor, *args: Any) -> Plan | None:
            scores[~seen] = torch.inf
            scores /= 3
            seen[:] = True
            return super().draw(scores, seen, *args)

    pruner = Pruner(EpochSchedule(8, 3, 2), Writes())
    pruner.record(torch.arange(4), torch.arange(4.0))
    pruner.begin_pass()
    assert pruner.store.values.tolist() == [0, 1, 2, 3, 0, 0, 0, 0]
    assert pruner.store.seen.tolist() == [True] * 4 + [False] * 4
