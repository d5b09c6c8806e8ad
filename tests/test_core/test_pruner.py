"""The pruner: one pass after the other, its books and its state."""

from __future__ import annotations

import io
import json
import random
from typing import Any

import numpy as np
import pytest
import torch

from infobatch_mm.core import EpochSchedule, IterSchedule, Plan, Pruner, PruningPolicy, Watcher
from infobatch_mm.policies import InfoBatchPolicy, NoPruning

N = 37


def make(
    num_samples: int = N,
    passes: int = 6,
    batch_size: int = 4,
    policy: PruningPolicy | None = None,
    seed: int = 0,
    fingerprint: str = "",
    shuffle: bool = True,
    score_ema: float = 0.0,
) -> Pruner:
    policy = policy or InfoBatchPolicy(0.5, 0.8)
    schedule = EpochSchedule(num_samples, passes, batch_size)
    return Pruner(schedule, policy, seed, shuffle, fingerprint, score_ema=score_ema)


def losses_of(indices: torch.Tensor, pass_index: int) -> torch.Tensor:
    """A loss that depends on the sample and the pass alone, not on the order of the visits."""
    return ((indices * 7919 + pass_index * 104729 + 13) % 1009).float() / 1009


def walk(pruner: Pruner, batches: int | None = None, batch_size: int = 4) -> list[tuple[int, float]]:
    """Visit up to so many batches of the pass in flight, from its first unvisited position on."""
    visits = []
    rest = pruner.begin_pass().indices[pruner.visited :]
    for indices in list(rest.split(batch_size))[:batches]:
        weights = pruner.weights(indices)
        pruner.record(indices, losses_of(indices, pruner.pass_index))
        pruner.advance(len(indices))
        visits += list(zip(indices.tolist(), weights.tolist(), strict=True))
    if pruner.pass_done:
        pruner.finish_pass()
    return visits


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """As a checkpoint travels."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# ---- plans of a run -------------------------------------------------------------------------------------


def test_first_pass_is_full_as_nothing_is_seen():
    plan = make().begin_pass()
    assert sorted(plan.indices.tolist()) == list(range(N))
    assert not plan.pruned


def test_passes_are_pruned_until_delta_and_then_full():
    pruner = make(passes=10, policy=InfoBatchPolicy(0.5, 0.7))
    pruned = []
    while not pruner.finished:
        pruned.append(pruner.begin_pass().pruned)
        walk(pruner)
    assert pruned == [False] + [True] * 6 + [False] * 3


def test_begin_pass_keeps_the_plan_in_flight():
    pruner = make()
    walk(pruner)
    plan = pruner.begin_pass()
    pruner.record(torch.arange(N), torch.rand(N))
    assert pruner.begin_pass() is plan


def test_weights_stay_those_of_the_plan_while_scores_change():
    pruner = make()
    walk(pruner)
    plan = pruner.begin_pass()
    pruner.record(torch.arange(N), torch.zeros(N))
    pruner.store.flush()
    assert torch.equal(pruner.weights(plan.indices), plan.weights)


def test_ratio_zero_visits_everything_in_every_pass():
    pruner = make(num_samples=10, policy=InfoBatchPolicy(0.0, 1.0))
    while not pruner.finished:
        assert sorted(walk(pruner)) == [(i, 1.0) for i in range(10)]
    assert pruner.saved_ratio == 0


def test_plans_are_determined_by_seed_and_pass():
    first, second, other = make(seed=3), make(seed=3), make(seed=4)
    orders = []
    for _ in range(4):
        plan = first.begin_pass()
        orders.append(tuple(plan.indices.tolist()))
        assert torch.equal(plan.indices, second.begin_pass().indices)
        assert not torch.equal(plan.indices, other.begin_pass().indices)
        for pruner in (first, second, other):
            walk(pruner)
    assert len(set(orders)) == 4


def test_seed_and_pass_do_not_add_up():
    # seed + pass would give run 1 the order that run 0 has one pass later.
    later, other = make(seed=0, policy=NoPruning()), make(seed=1, policy=NoPruning())
    before = later.begin_pass().indices
    walk(later)
    assert not torch.equal(later.begin_pass().indices, before)  # each pass has an order of its own
    assert not torch.equal(later.begin_pass().indices, other.begin_pass().indices)


def test_without_shuffle_every_pass_is_sorted():
    pruner = make(shuffle=False)
    while not pruner.finished:
        visited = [index for index, _ in walk(pruner)]
        assert visited == sorted(visited)


def test_planning_leaves_the_global_random_states_alone():
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    pruner = make()
    while not pruner.finished:
        walk(pruner)
    pruner.load_state_dict(through_a_file(pruner.state_dict()))
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_plans_ignore_the_global_random_states():
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    first = make().begin_pass()
    torch.manual_seed(2), np.random.seed(2), random.seed(2)
    assert torch.equal(first.indices, make().begin_pass().indices)


def test_pruned_passes_consist_of_full_batches():
    pruner = make(batch_size=8)
    pruned = 0
    while not pruner.finished:
        plan = pruner.begin_pass()
        if plan.pruned:
            pruned += 1
            assert len(plan) % 8 == 0
            assert pruner.batches == len(plan) // 8
        else:
            assert pruner.batches == 5  # ceil(37 / 8)
        walk(pruner, batch_size=8)
    assert pruned == 4


# ---- weights() refuses ------------------------------------------------------------------------------------


def test_weights_without_a_pass_are_refused():
    with pytest.raises(ValueError, match="no pass"):
        make().weights(torch.tensor([0]))
    pruner = make()
    walk(pruner)
    with pytest.raises(ValueError, match="no pass"):
        pruner.weights(torch.tensor([0]))


@pytest.mark.parametrize("index", [N, N + 100, -1, -N])
def test_weights_of_an_index_out_of_range_are_refused_with_both_numbers(index: int):
    pruner = make()
    pruner.begin_pass()
    with pytest.raises(ValueError) as refused:
        pruner.weights(torch.tensor([0, index, 1]))
    assert str(index) in str(refused.value) and str(N) in str(refused.value)


def test_weights_of_a_sample_left_out_are_refused_with_index_and_pass():
    pruner = make()
    walk(pruner)
    plan = pruner.begin_pass()
    left_out = min(set(range(N)) - set(plan.indices.tolist()))
    with pytest.raises(ValueError) as refused:
        pruner.weights(torch.tensor([int(plan.indices[0]), left_out]))
    assert str(left_out) in str(refused.value) and "pass 2" in str(refused.value)


# ---- books --------------------------------------------------------------------------------------------------


def test_books_add_up():
    pruner, kept = make(), []
    while not pruner.finished:
        kept.append(len(walk(pruner)))
    summary = pruner.summary()
    assert [entry["kept"] for entry in summary["per_pass"]] == kept
    assert [entry["pass"] for entry in summary["per_pass"]] == list(range(6))
    assert [entry["kept_ratio"] for entry in summary["per_pass"]] == [k / N for k in kept]
    assert summary["visits"] == sum(kept) < summary["visits_full"] == 6 * N
    assert summary["saved_ratio"] == pytest.approx(1 - sum(kept) / (6 * N))
    assert int(pruner.store.times_seen.sum()) == sum(kept)


def test_history_tells_threshold_and_mean_score():
    pruner = make()
    walk(pruner)
    mean = float(losses_of(torch.arange(N), 0).double().mean())
    plan = pruner.begin_pass()
    walk(pruner)
    assert pruner.history[0]["threshold"] is None
    assert pruner.history[0]["score_mean"] == pytest.approx(mean)
    assert pruner.history[1]["threshold"] == plan.threshold == pytest.approx(mean)
    assert make().score_mean is None


def test_books_within_a_pass_count_full_data_in_proportion():
    pruner = make(num_samples=40)
    walk(pruner)
    assert len(pruner.begin_pass()) < 40
    walk(pruner, batches=2)
    assert pruner.visits == 48
    assert pruner.visits_full == 40 + 40 * 8 // len(pruner.begin_pass())


def test_partial_last_pass_is_booked_by_its_span():
    pruner = Pruner(IterSchedule(20, 13, 5), NoPruning())  # 65 samples: 20 + 20 + 20 + 5
    while not pruner.finished:
        walk(pruner, batch_size=5)
    summary = pruner.summary()
    assert [entry["kept"] for entry in summary["per_pass"]] == [20, 20, 20, 5]
    assert [entry["kept_ratio"] for entry in summary["per_pass"]] == [1.0] * 4
    assert summary["passes_total"] == 3.25
    assert (summary["visits_full"], summary["saved_ratio"]) == (65, 0)


def test_observed_visits_are_booked_pass_by_pass():
    pruner = Watcher(EpochSchedule(10, 3, 4), NoPruning())
    for _ in range(6):
        pruner.observe(4)
    assert (pruner.pass_index, pruner.visited) == (2, 4)
    assert pruner.visits == pruner.visits_full == 24
    pruner.observe(6)
    assert pruner.finished and pruner.visits == 30 and pruner.saved_ratio == 0


def test_summary_is_plain_json_with_the_keys_of_the_contract():
    pruner = make()
    walk(pruner)
    walk(pruner, batches=1)
    summary = pruner.summary()
    keys = "policy prune_ratio delta num_samples passes_done passes_total visits visits_full saved_ratio seed"
    assert set(keys.split()) | {"per_pass"} <= set(summary)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    worth = {"worth", "cost", "efficiency", "limit"}
    assert set(summary["per_pass"][0]) == {"pass", "kept", "skipped", "kept_ratio", "threshold", "score_mean"} | worth
    assert (summary["policy"], summary["prune_ratio"], summary["delta"]) == ("infobatch", 0.5, 0.8)


def test_summary_counts_losses_that_were_not_recorded():
    pruner = make()
    pruner.begin_pass()
    nan = float("nan")
    pruner.record(torch.arange(4), torch.tensor([nan, 1, 1, 1]), torch.tensor([True, True, False, False]))
    pruner.store.flush()
    assert (pruner.summary()["nonfinite_losses"], pruner.summary()["unusable_visits"]) == (1, 2)


# ---- state --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches_before", [0, 1, 3, 10, 11, 15, 17, 25])
def test_resumed_run_continues_with_the_very_same_visits_and_weights(batches_before: int):
    straight, resumed = make(seed=9), make(seed=123)  # the checkpoint's seed wins
    for _ in range(batches_before):
        walk(straight, batches=1)
    resumed.load_state_dict(through_a_file(straight.state_dict()))
    assert resumed.visited == straight.visited
    while not straight.finished:
        assert walk(resumed) == walk(straight)
    assert resumed.finished
    assert resumed.summary() == straight.summary()
    for name in ("values", "seen", "times_seen"):
        assert torch.equal(getattr(resumed.store, name), getattr(straight.store, name))


def test_mid_pass_state_repeats_and_loses_no_visit():
    straight = make()
    walk(straight)
    plan = straight.begin_pass()
    before = walk(straight, batches=2)
    resumed = make()
    resumed.load_state_dict(through_a_file(straight.state_dict()))
    after = walk(resumed)
    assert [i for i, _ in before + after] == plan.indices.tolist()
    assert [w for _, w in before + after] == plan.weights.tolist()


def test_state_is_a_copy():
    pruner = make()
    walk(pruner)
    state = pruner.state_dict()
    scores, history = state["scores"].clone(), list(state["history"])
    while not pruner.finished:
        walk(pruner)
    assert torch.equal(state["scores"], scores)
    assert state["history"] == history


def test_loaded_state_is_not_written_to():
    saved = make()
    walk(saved)
    state = saved.state_dict()
    scores = state["scores"].clone()
    resumed = make()
    resumed.load_state_dict(state)
    while not resumed.finished:
        walk(resumed)
    assert torch.equal(state["scores"], scores)
    assert len(state["history"]) == 1


def test_state_includes_records_that_are_still_pending():
    pruner = make()
    pruner.begin_pass()
    pruner.record(torch.tensor([5]), torch.tensor([2.5]))
    state = pruner.state_dict()
    assert state["scores"][5] == 2.5 and state["seen"][5] and state["times_seen"][5] == 1


def test_rolling_back_forgets_the_records_that_came_after_the_state():
    pruner = make()
    walk(pruner)
    state = through_a_file(pruner.state_dict())
    pruner.begin_pass()
    pruner.record(torch.arange(8), torch.full((8,), 99.0))  # pending when the old state is loaded
    pruner.load_state_dict(state)
    pruner.store.flush()
    assert torch.equal(pruner.store.values, state["scores"])
    assert torch.equal(pruner.store.times_seen, state["times_seen"])


def refusal(pruner: Pruner, state: dict[str, Any]) -> str:
    before = pruner.state_dict()
    with pytest.raises(ValueError, match="cannot resume") as refused:
        pruner.load_state_dict(state)
    after = pruner.state_dict()
    for key, value in before.items():  # a refused state changes nothing
        assert torch.equal(value, after[key]) if isinstance(value, torch.Tensor) else value == after[key]
    return str(refused.value)


def test_other_number_of_samples_is_refused_with_both_numbers():
    message = refusal(make(num_samples=2000), make(num_samples=20210).state_dict())
    assert "20210" in message and "2000" in message


def test_other_fingerprint_is_refused_with_both():
    message = refusal(make(fingerprint="beef"), make(fingerprint="cafe").state_dict())
    assert "beef" in message and "cafe" in message


@pytest.mark.parametrize(
    ("theirs", "ours", "named"),
    [
        (InfoBatchPolicy(0.5, 0.8), InfoBatchPolicy(0.3, 0.8), ("0.5", "0.3")),
        (InfoBatchPolicy(0.5, 0.8), InfoBatchPolicy(0.5, 0.875), ("0.8", "0.875")),
        (InfoBatchPolicy(0.5, 0.8), NoPruning(), ("infobatch", "none")),
    ],
    ids=["prune_ratio", "delta", "policy"],
)
def test_other_settings_are_refused_with_both(theirs: PruningPolicy, ours: PruningPolicy, named: tuple[str, str]):
    message = refusal(make(policy=ours), make(policy=theirs).state_dict())
    assert all(value in message for value in named)


@pytest.mark.parametrize("version", [5, 99, None, "1"])
def test_newer_or_unknown_version_is_refused_with_both(version: object):
    message = refusal(make(), {**make().state_dict(), "version": version})
    assert repr(version) in message and "up to 4" in message


@pytest.mark.parametrize("key", ["scores", "seen", "times_seen"])
@pytest.mark.parametrize("damage", ["shape", "dtype", "missing", "no tensor"])
def test_damaged_tensor_is_refused_with_its_name(key: str, damage: str):
    state = make().state_dict()
    if damage == "missing":
        del state[key]
    else:
        state[key] = {"shape": state[key][:-1], "dtype": state[key].double(), "no tensor": [0] * N}[damage]
    assert key in refusal(make(), state)


@pytest.mark.parametrize(
    "key", ["num_samples", "fingerprint", "settings", "seed", "pass_index", "visited", "plan", "history"]
)
def test_state_with_a_missing_entry_is_refused(key: str):
    # check_state: "ValueError ... if the state is damaged".
    state = make().state_dict()
    del state[key]
    refusal(make(), state)


@pytest.mark.parametrize("damage", ["short weights", "index out of range"])
def test_damaged_plan_is_refused(damage: str):
    pruner = make()
    walk(pruner)
    pruner.begin_pass()
    state = pruner.state_dict()
    plan = dict(state["plan"])
    if damage == "short weights":
        plan["weights"] = plan["weights"][:-1]
    else:
        plan["indices"] = plan["indices"] + N
    refusal(make(), {**state, "plan": plan})


def test_own_policy_takes_part_in_a_run():
    class OddOnes(PruningPolicy):
        name = "odd"

        def is_active(self, progress: float) -> bool:
            return True

        def draw(self, scores, seen, generator, multiple_of) -> Plan | None:
            odd = torch.arange(1, len(scores), 2)[: len(scores) // 2 // multiple_of * multiple_of]
            return Plan(odd, torch.full((len(odd),), 2.0), pruned=True)

    pruner = make(policy=OddOnes())
    assert walk(pruner) == [(i, 2.0) for i in range(1, 33, 2)]
    assert pruner.summary()["policy"] == "odd"
    refusal(make(), pruner.state_dict())


def test_checking_a_state_looks_for_every_entry_of_one():
    state = make().state_dict()
    later = ("score", "score_ema", "score_settings", "skipped", "forward_visits", "last_pruned", "unusable")
    for key in later:  # which earlier versions did not write
        del state[key]
    for key in state:
        with pytest.raises(ValueError, match=r"damaged|version"):
            make().check_state({k: v for k, v in state.items() if k != key})


def test_state_of_another_average_is_refused_and_one_of_none_is_that_of_earlier_versions():
    plain, averaged = make().state_dict(), make(score_ema=0.8).state_dict()
    with pytest.raises(ValueError, match=r"'score_ema': 0\.8.*'score_ema': 0\.0"):
        make().check_state(averaged)
    with pytest.raises(ValueError, match=r"'score_ema': 0\.0.*'score_ema': 0\.8"):
        make(score_ema=0.8).check_state(plain)
    del plain["score_settings"]  # as the version before wrote it
    assert make(score_ema=0.8).check_state(make(score_ema=0.8).state_dict()).settings["score_ema"] == 0.8
    make().check_state(plain)
    del plain["score"], plain["score_ema"]  # as the first one did
    with pytest.raises(ValueError, match=r"'score_ema': 0\.0.*'score_ema': 0\.8"):
        make(score_ema=0.8).check_state(plain)
    make().check_state(plain)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("skipped", None),
        ("skipped", -3),
        ("visits_before", None),
        ("full_before", "many"),
        ("score", ["ema"]),
        ("history", [None]),
        ("history", [{}]),
    ],
)
def test_values_that_make_no_sense_are_damage(key: str, value: object):
    state = {**make().state_dict(), "pass_index": 1, key: value}
    with pytest.raises(ValueError, match=f"damaged at '{key}'"):
        make().check_state(state)


@pytest.mark.parametrize("blanks", [None, (1,), (-5, 3), (3, 40)])
def test_blanks_of_a_plan_that_make_no_sense_are_damage(blanks: object):
    pruner = make()
    pruner.begin_pass()
    state = pruner.state_dict()
    with pytest.raises(ValueError, match="damaged at 'plan'"):
        make().check_state({**state, "plan": {**state["plan"], "blanks": blanks}})
