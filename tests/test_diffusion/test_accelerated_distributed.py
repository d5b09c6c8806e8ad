"""``AcceleratedInfoBatch`` in two processes: accelerate's own shares of each pass, and one process's training.

``two_processes`` does it all in one launch; here its journals are judged.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("diffusers", reason="diffusers is not installed")

from launching import accelerate_launch, launched

from .toy import Run
from .two_processes import CUTS, LEFT_AT, PASSES, POLICIES, RESUMED, STEPS, TRAININGS

pytestmark = [pytest.mark.dist, pytest.mark.usefixtures("no_accelerator_of_another_test")]

#: Losses, scores and parameters of a training on two processes and on one.
TOLERANCE = 1e-5
#: What each of two processes sees of a full pass in the data set's order, step by step.
IN_ORDER: dict[tuple[str, int], tuple[list[list[int]], list[list[int]]]] = {
    ("default", 12): ([[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [10, 11]]),
    ("default", 9): ([[0, 1], [4, 5], [8, 0]], [[2, 3], [6, 7], [1, 2]]),
    ("default", 10): ([[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [0, 1]]),
    ("default", 11): ([[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [10, 0]]),
    ("split", 9): ([[0, 1], [4, 5], [8, 0]], [[2, 3], [6, 7], [1, 2]]),
    ("split", 10): ([[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [0, 1]]),
    ("dispatched", 9): ([[0, 1], [4, 5], [8]], [[2, 3], [6, 7], [0]]),
    ("dispatched", 10): ([[0, 1], [4, 5], [8]], [[2, 3], [6, 7], [9]]),
    ("dispatched", 11): ([[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [10, 0]]),
    ("dispatched, split", 11): ([[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [10, 0]]),
    ("uneven", 9): ([[0, 1], [4, 5], [8]], [[2, 3], [6, 7]]),
    ("uneven", 10): ([[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7]]),
    ("uneven", 11): ([[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [10]]),
    ("uneven, split", 10): ([[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7]]),
    ("uneven, split", 11): ([[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [10]]),
    ("drop_last", 11): ([[0, 1], [4, 5]], [[2, 3], [6, 7]]),
    ("drop_last, split", 10): ([[0, 1], [4, 5]], [[2, 3], [6, 7]]),
    ("drop_last, dispatched", 9): ([[0, 1], [4, 5]], [[2, 3], [6, 7]]),
}


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.slow)])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two processes left their journals and checkpoints."""
    folder = tmp_path_factory.mktemp("two")
    script = Path(__file__).with_name("two_processes.py")
    everything = ["--all"] if request.param == "all" else []
    launched(accelerate_launch(), script, folder, *everything, cwd=folder, CUDA_VISIBLE_DEVICES="")
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"seen.{rank}.json").read_text()) for rank in range(2)]


# ---- who sees what ----------------------------------------------------------------------------------------


def test_a_full_pass_in_order_is_shared_out_as_accelerate_does(ranks: list[dict[str, Any]]):
    for (cut, samples), expected in IN_ORDER.items():
        seen = [rank["shares"][f"{cut} {samples} False"] for rank in ranks]
        assert tuple(each["passes"][0] for each in seen) == expected
        assert tuple(each["passes"][-1] for each in seen) == expected
        assert tuple(each["alone"] for each in seen) == expected


@pytest.mark.parametrize("cut", list(CUTS))
def test_every_share_is_accelerates_own(ranks: list[dict[str, Any]], cut: str):
    looked_at = [key.rsplit(" ", 2) for key in ranks[0]["shares"]]
    own = [(int(samples), shuffle == "True") for name, samples, shuffle in looked_at if name == cut]
    assert {shuffle for _, shuffle in own} == {False, True}
    for samples, shuffle in own:
        check_share([rank["shares"][f"{cut} {samples} {shuffle}"] for rank in ranks], samples, shuffle)


def check_share(shares: list[dict[str, Any]], samples: int, shuffle: bool) -> None:
    """What both ranks saw of one data set, and of its resumed pass."""
    first, second = shares
    assert first["plans"] == second["plans"] and first["books"] == second["books"]
    assert (first["plans"][0] == list(range(samples))) != shuffle
    for each in (first, second):
        assert each["passes"][0] == each["alone"]
        assert each["books_after_break"][0]["kept"] == min(4, samples)
        assert len(each["books_after_break"]) == 2
        # Resumed after its first step, the pass goes on as it was begun.
        assert each["begun"] + each["rest_after_resume"] == each["alone"]
    pruned = 0
    for current in range(1, PASSES - 1):
        plan = first["plans"][current]
        if len(plan) < samples:  # full batches of two on both, one after the other
            pruned += 1
            for rank, each in enumerate((first, second)):
                assert each["passes"][current] == [plan[i : i + 2] for i in range(2 * rank, len(plan), 4)]
    assert pruned, "nothing was pruned: this test would say nothing"
    # The loss of a sample was its index: all ranks' scores, on both ranks.
    visited = {i for each in (first, second) for steps in each["passes"] for step in steps for i in step}
    assert first["scores"] == second["scores"] == [float(i) if i in visited else 0.0 for i in range(samples)]


def test_uneven_processes_train_on_under_join(ranks: list[dict[str, Any]]):
    first, second = (rank["joined"] for rank in ranks)
    assert first["books"] == second["books"] and len(first["books"]) == 4
    assert sum(map(len, first["steps"] + second["steps"])) == sum(entry["kept"] for entry in first["books"]) < 40
    assert len(first["steps"]) > len(second["steps"])


# ---- one training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(TRAININGS))
def test_two_processes_train_as_one_with_the_same_global_batch(ranks: list[dict[str, Any]], name: str):
    setup = TRAININGS[name]
    one = Run(type(setup)(**{**vars(setup), "batch_size": 4, "split": False, "dispatch": False, "workers": 0}))
    weights: list[list[float]] = []
    one.train(lambda step: weights.append(one.infobatch._in_hand.weights.tolist()))
    first, second = (rank["trainings"][name] for rank in ranks)
    steps = len(one.journal)
    assert len(first["journal"]) == len(second["journal"]) == first["iterations"] == steps < setup.epochs * 11
    for entry, gamma, a, b, gamma_a, gamma_b in zip(
        one.journal, weights, first["journal"], second["journal"], first["weights"], second["weights"], strict=True
    ):
        assert a["index"] + b["index"] == entry["index"]
        assert gamma_a + gamma_b == pytest.approx(gamma, rel=1e-5)  # chances follow the last digits of scores
        assert a["losses"] + b["losses"] == pytest.approx(entry["losses"], rel=TOLERANCE, abs=TOLERANCE)
        assert a["lr"] == b["lr"] == pytest.approx(entry["lr"], abs=1e-12)
        assert a["updated"] == entry["updated"]
    assert any(weight > 1 for gamma in weights for weight in gamma)
    for each in (first, second):
        assert each["parameters"] == pytest.approx(one.parameters, abs=TOLERANCE)
        assert each["scores"] == first["scores"]
        assert each["scores"] == pytest.approx(one.pruner.store.values.tolist(), rel=TOLERANCE, abs=TOLERANCE)
        assert [entry["kept"] for entry in each["books"]] == [e["kept"] for e in one.infobatch.summary()["per_pass"]]


def test_policy_none_is_accelerate_to_the_bit(ranks: list[dict[str, Any]]):
    for rank in ranks:
        alone, ours, alone_seedable, ours_seedable = rank["none"]
        assert ours == alone and ours_seedable == alone_seedable
    assert ranks[0]["none"][0] != ranks[1]["none"][0]


@pytest.mark.parametrize("cut", list(CUTS))
def test_a_training_in_steps_ends_alike_on_both(ranks: list[dict[str, Any]], cut: str):
    whole = 2 if CUTS[cut].get("drop_last") else 3
    for policy in POLICIES[1:]:
        first, second = (rank["in steps"][f"{cut} {policy}"] for rank in ranks)
        alone = [rank["in steps"][f"{cut} None"] for rank in ranks]
        assert {**first["books"], "wall_time_s": 0, "iterations": 0} == {
            **second["books"],
            "wall_time_s": 0,
            "iterations": 0,
        }
        assert first["books"]["passes_done"] == first["books"]["num_passes"] == -(-STEPS // whole)
        assert first["lr"] == second["lr"] == alone[0]["lr"] == [0]
        assert len(first["journal"]) <= STEPS
        if policy == "none":
            assert [first["journal"], second["journal"]] == [each["journal"] for each in alone]


# ---- learning rates ---------------------------------------------------------------------------------------


def test_a_pruned_run_is_at_every_pass_boundary_where_the_unpruned_one_is(ranks: list[dict[str, Any]]):
    assert len(ranks[0]["rates"]) >= 12
    for rank in ranks:
        for setup, (alone, ours) in rank["rates"].items():
            assert ours == alone, setup
            assert (len(set(alone)) > 1) == (not setup.startswith("constant ")), setup


def test_updates_are_counted_over_all_processes_alike(ranks: list[dict[str, Any]]):
    for rank in ranks:
        made, expected, updated = (rank["updates"][key] for key in ("made", "expected", "updated"))
        total = sum(updated)
        assert [count for count, now in zip(made, updated, strict=True) if now] == list(range(1, total + 1))
        assert expected[-1] == made[-1] == total and all(e >= m for e, m in zip(expected, made, strict=True))


# ---- checkpoints ------------------------------------------------------------------------------------------


def test_resumed_on_two_processes_it_is_the_same_training_to_the_bit(ranks: list[dict[str, Any]]):
    for rank in ranks:
        journal, parameters = rank["resumed"]["straight"]
        assert len(rank["resumed"]["resumed"]) >= 3
        for step, (rest, again) in rank["resumed"]["resumed"].items():
            assert rest == journal[int(step) :] and rest, step
            assert again == parameters, step


def test_resumed_on_one_process_scores_progress_and_the_pass_go_on(ranks: list[dict[str, Any]], folder: Path):
    (first, _), (second, _) = (rank["resumed"]["straight"] for rank in ranks)
    done = first[:LEFT_AT] + second[:LEFT_AT]
    alone = Run(type(RESUMED)(**{**vars(RESUMED), "batch_size": 4})).load(folder / str(LEFT_AT))
    filled_up = 2  # by the last batch of the first pass, 46 samples in batches of 4
    assert alone.infobatch.summary()["visits"] == sum(len(entry["index"]) for entry in done) - filled_up
    for index, times in enumerate(alone.pruner.store.times_seen.tolist()):
        assert times == sum(entry["index"].count(index) for entry in done)
    alone.train()
    together = [a["index"] + b["index"] for a, b in zip(first, second, strict=True)]
    current = first[LEFT_AT]["pass"]
    rest = [entry["index"] for entry in alone.journal if entry["pass"] == current]
    assert rest == [t for t, entry in zip(together, first, strict=True) if entry["pass"] == current][-len(rest) :]
    assert rest and alone.infobatch.passes_done == RESUMED.epochs
    assert alone.at_pass_end[-1] == pytest.approx(first[-1]["lr"], abs=1e-12)


def test_a_checkpoint_without_the_others_scores_says_so(ranks: list[dict[str, Any]]):
    for told in (rank["unmerged"] for rank in ranks):
        assert any("call infobatch.merge() on every process" in message for message in told["saved"])
        assert any("saved before the scores of all processes were merged" in message for message in told["loaded"])


# ---- what is refused --------------------------------------------------------------------------------------


def test_a_cpu_that_was_not_asked_for_is_named(ranks: list[dict[str, Any]]):
    for told in (rank["not on the CPU"] for rank in ranks):
        assert "among 1 processes" in told and "2:" in told and "make Accelerator(cpu=True)" in told


def test_a_merge_on_the_main_process_alone_ends_in_seconds_with_its_name(ranks: list[dict[str, Any]]):
    (told, seconds), (nothing, _) = (rank["merged alone"] for rank in ranks)
    assert "infobatch.merge() was called on process 0, but not within 2 s on every other" in told
    assert "is_main_process" in told and 1.5 < seconds < 30
    assert nothing == ""


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("seed", "rank 0 has seed=4, rank 1 has seed=5"),
        ("fingerprint", "rank 0 has fingerprint='a', rank 1 has fingerprint='b'"),
        ("samples", "rank 0 has num_samples=40, rank 1 has num_samples=41"),
        ("odd", "shares a batch of 3 among 2 processes"),
        ("large", "one global batch holds 8 samples but the data set only 7"),
    ],
)
def test_what_does_not_fit_is_told_to_every_process(ranks: list[dict[str, Any]], what: str, message: str):
    assert all(message in rank["refusals"][what] for rank in ranks)
