"""What every score of the package promises, whatever its rule."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch

from infobatch_mm import InfoBatch, ScoreRule, register_score
from infobatch_mm.core import EpochSchedule, Pruner, ScoreStore, score_rule
from infobatch_mm.core.rng import generator
from infobatch_mm.core.score_rule import build_score, registered
from infobatch_mm.policies import InfoBatchPolicy

N = 20

#: Every score of the package, and arguments that make another one of it.
OURS = [name for name, each in sorted(registered().items()) if each.__module__.startswith("infobatch_mm.")]
SCORES: list[Any] = [
    *OURS,
    dict(type="ema", score_ema=0.5),
    dict(type="timestep", score_ema=0.0),
    dict(type="gradient", layer="head.fc"),
    dict(type="gradient", score_ema=0.5),
    dict(type="bls", score_ema=0.0),
    dict(type="ucb", score_ema=0.5, confidence=2.0),
    dict(type="second_difference", differences=1),
    dict(type="forgetting", learned_below=0.4),
]


@pytest.fixture(params=SCORES, ids=str)
def score(request: pytest.FixtureRequest) -> Any:
    return request.param


def visit(store: ScoreStore, seed: int, **changes: Any) -> None:
    """Record a batch of eight samples, one of them twice."""
    source = generator(seed)
    index = torch.cat([torch.randperm(N, generator=source)[:7], torch.tensor([3])])
    losses, log_snr = torch.rand(8, generator=source), torch.randn(8, generator=source)
    store.record(index, changes.get("losses", losses), changes.get("valid"), log_snr)


def same(one: ScoreStore, other: ScoreStore) -> bool:
    columns, others = one.rule.columns, other.rule.columns
    return (
        all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("values", "seen", "times_seen"))
        and columns.keys() == others.keys()
        and all(torch.equal(columns[name], others[name]) for name in columns)
    )


def test_a_pass_gives_finite_scores_to_what_it_visits_and_nothing_else(score: Any):
    store = ScoreStore(N, score=score)
    for seed in range(3):
        visit(store, seed)
    store.settle()
    assert 7 < int(store.seen.sum()) <= N and torch.isfinite(store.values).all()
    assert torch.equal(store.times_seen > 0, store.seen) and int(store.times_seen.sum()) == 24
    assert not store.values[~store.seen].any()
    assert all(each.shape == (N,) for each in store.rule.columns.values())


def test_what_is_unusable_is_counted_and_changes_nothing(score: Any):
    store, clean = ScoreStore(N, score=score), ScoreStore(N, score=score)
    for each in (store, clean):
        visit(each, 0)
        each.settle()
    visit(store, 1, losses=torch.full((8,), torch.nan))
    visit(store, 2, valid=torch.zeros(8, dtype=torch.bool))
    store.record(torch.tensor([-1]), torch.ones(1), None, torch.zeros(1))  # only fills a batch up
    store.settle()
    clean.settle()  # a pass of nothing
    assert (store.num_nonfinite, store.num_invalid) == (8, 8)
    assert same(store, clean)


def test_inputs_are_left_alone(score: Any):
    store = ScoreStore(N, score=score)
    index, losses, log_snr = torch.arange(4), torch.rand(4, requires_grad=True), torch.zeros(4)
    before = losses.detach().clone()
    store.record(index, losses, None, log_snr)
    index.fill_(7)
    log_snr.fill_(9)
    store.settle()
    assert store.seen.nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert torch.equal(losses.detach(), before)


@pytest.mark.parametrize("amid", [False, True], ids=["between passes", "in a pass"])
def test_a_resumed_store_goes_on_as_if_nothing_had_happened(score: Any, amid: bool):
    store = ScoreStore(N, score=score)
    visit(store, 0)
    store.settle()
    if amid:
        visit(store, 1)
    file = io.BytesIO()
    torch.save(store.state_dict(), file)
    file.seek(0)
    resumed = ScoreStore(N, score=score)
    visit(resumed, 9)  # which is forgotten
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for seed in (2, 3):
        for each in (store, resumed):
            visit(each, seed)
            each.settle()
        assert same(store, resumed)


def test_settings_make_the_same_score(score: Any):
    settings = ScoreStore(N, score=score).settings()
    name, score_ema, own = settings["score"], settings["score_ema"], dict(settings)
    del own["score"], own["score_ema"]
    assert build_score(dict(type=name, **own), score_ema).settings() == settings
    assert build_score(dict(type=name, score_ema=score_ema, **own)).settings() == settings
    assert build_score(eval(repr(ScoreStore(N, score=score).rule))).settings() == settings


def test_a_state_of_another_score_or_a_damaged_one_is_refused(score: Any):
    def pruner(score: Any) -> Pruner:
        return Pruner(EpochSchedule(N, 4, 2), InfoBatchPolicy(), score=score)

    state = pruner(score).state_dict()
    for other in SCORES:
        if build_score(other).settings() != build_score(score).settings():
            with pytest.raises(ValueError, match=r"the checkpoint was pruned with .*, this run has"):
                pruner(other).check_state(state)
    for key in ScoreStore(N, score=score).rule.state_dict():
        with pytest.raises(ValueError, match=f"damaged at '{key}'"):
            pruner(score).check_state({**state, key: None})


class Capped(ScoreRule):
    """A score of a user's, with an argument of its own: the last loss, or a bound."""

    name = "capped"

    def __init__(self, bound: float = 1.0, group: Any = None) -> None:
        super().__init__(group)
        self.bound = bound

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "bound": self.bound}

    def fold(self, columns: Any, where: Any, losses: Any) -> None:
        columns.values.numpy()[where] = losses.clip(max=self.bound)
        columns.seen.numpy()[where] = True
        np.add.at(columns.times_seen.numpy(), where, 1)


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_rule, "_RULES", dict(score_rule._RULES))


def test_every_host_takes_a_users_score_in_three_forms(own_registry: None):
    register_score(Capped)
    for form in (dict(type="capped", bound=0.5), Capped(0.5)):
        infobatch = InfoBatch(4, num_epochs=3, batch_size=2, score=form)
        for index, _ in infobatch.loader(list("abcd")):
            infobatch.weigh(index.float(), index)
        infobatch._pruner.store.flush()
        assert infobatch._pruner.store.values.tolist() == [0.0, 0.5, 0.5, 0.5]
        assert (infobatch.summary()["score"], infobatch.summary()["bound"]) == ("capped", 0.5)
    assert InfoBatch(4, num_epochs=3, score="capped").summary()["bound"] == 1.0


def test_its_arguments_are_compared_on_resume_and_written_down(own_registry: None):
    register_score(Capped)

    def pruner(bound: float) -> Pruner:
        return Pruner(EpochSchedule(N, 4, 2), InfoBatchPolicy(), score=Capped(bound))

    state = pruner(0.5).state_dict()
    assert not pruner(0.5).check_state(state).unmerged
    with pytest.raises(ValueError, match=r"'bound': 0.5.*, this run has .*'bound': 0.7"):
        pruner(0.7).check_state(state)
    assert build_score(eval(repr(Capped(0.5)))).settings() == Capped(0.5).settings()


def test_an_instance_is_a_pattern_of_which_each_training_has_a_copy():
    pattern = build_score("timestep")
    one, other = ScoreStore(N, score=pattern), ScoreStore(N, score=pattern)
    visit(one, 0)
    one.settle()
    other.settle()
    assert one.seen.any() and not other.seen.any() and one.rule is not pattern
    with pytest.raises(ValueError, match=r"score_ema=0.5 and a score with score_ema=0.9: set it in one of them"):
        ScoreStore(N, 0.5, pattern)


def test_a_score_that_cannot_be_told_from_others_is_refused(own_registry: None):
    class Nameless(Capped):
        name = ""

    class Untold(Capped):
        name = "untold"

        def settings(self) -> dict[str, Any]:
            return {"bound": self.bound}

    class Unwritable(Capped):
        name = "unwritable"

        def settings(self) -> dict[str, Any]:
            return {**super().settings(), "bound": torch.ones(1)}

    with pytest.raises(ValueError, match="Nameless has name=''"):
        register_score(Nameless)
    with pytest.raises(ValueError, match="takes a subclass of ScoreRule"):
        register_score(N)  # type: ignore[type-var]

    class Forgetful(Capped):
        name = "forgetful"

        def settings(self) -> dict[str, Any]:
            return ScoreRule.settings(self)

    class Numpy(Capped):
        name = "numpy"

        def state_dict(self) -> dict[str, Any]:
            return {"sums": np.zeros(2)}

    class Masking(Capped):
        name = "masking"

        def settings(self) -> dict[str, Any]:
            return {**super().settings(), "seed": 3}

    class Overwriting(Capped):
        name = "overwriting"

        def state_dict(self) -> dict[str, Any]:
            return {"scores": torch.ones(N)}

    class Raw(Capped):
        name = "raw"

    cases: list[tuple[Any, str]] = [
        (Untold(), "return its name under 'score'"),
        (Unwritable(), r"has settings\(\) that cannot be written down and read again"),
        (Capped(float("nan")), r"has settings\(\) that cannot be written down and read again"),
        (Numpy(), r"has state_dict\(\) that cannot be written down and read again"),
        (Forgetful(), r"has an argument 'bound' that its settings\(\) leave out"),
        (Masking(), r"has settings\(\) with 'seed', a name of InfoBatch's own"),
        (Overwriting(), r"has state_dict\(\) with 'scores', a name of InfoBatch's own"),
        (Raw(), "score 'raw' is RawScore: give .*Raw, which has its name, another"),
        (Capped, "score=Capped is a class: make an instance of it"),
    ]
    for score, message in cases:
        with pytest.raises(ValueError, match=message):
            Pruner(EpochSchedule(N, 4, 2), InfoBatchPolicy(), score=score)


def test_a_dict_that_contradicts_itself_or_asks_for_too_much_is_refused():
    with pytest.raises(ValueError, match=r"score_ema=0.5 and score=dict\(score_ema=0.8, ...\): set it in one of them"):
        build_score(dict(type="ema", score_ema=0.8), 0.5)
    with pytest.raises(ValueError, match=r"score 'ema' cannot be made with .*decay"):
        build_score(dict(type="ema", decay=0.8))
    with pytest.raises(ValueError, match="unknown score 'loss': choose one of"):
        build_score(dict(type="loss"))
