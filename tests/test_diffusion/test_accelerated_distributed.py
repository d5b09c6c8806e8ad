"""``AcceleratedInfoBatch`` in two processes: accelerate's own shares of each pass, and one process's training.

``two_processes`` does it all in one launch; here its journals are judged.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("diffusers", reason="diffusers is not installed")

from launching import accelerate_launch

from .toy import SCHEDULERS, Run
from .two_processes import CUTS, LEFT_AT, PASSES, POLICIES, RESUMED, SAVED_AT, SIZES, STEPS, TRAININGS

pytestmark = [pytest.mark.dist, pytest.mark.usefixtures("no_accelerator_of_another_test")]

#: Losses, scores and parameters of a training on two processes and on one.
TOLERANCE = 1e-5
LAUNCH = accelerate_launch()
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two processes left their journals and checkpoints."""
    folder = tmp_path_factory.mktemp("two")
    process = subprocess.Popen(
        [sys.executable, *LAUNCH, str(Path(__file__).with_name("two_processes.py")), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output = process.communicate(timeout=400)[0]
    finally:
        process.terminate()  # the launcher passes it on to its own
    assert process.returncode == 0, output[-4000:]
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"seen.{rank}.json").read_text()) for rank in range(2)]


# ---- who sees what ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cut", "samples"), list(IN_ORDER))
def test_a_full_pass_in_order_is_shared_out_as_accelerate_does(ranks: list[dict[str, Any]], cut: str, samples: int):
    seen = [rank["shares"][f"{cut} {samples} False"] for rank in ranks]
    assert tuple(each["passes"][0] for each in seen) == IN_ORDER[cut, samples]
    assert tuple(each["passes"][-1] for each in seen) == IN_ORDER[cut, samples]
    assert tuple(each["alone"] for each in seen) == IN_ORDER[cut, samples]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("samples", SIZES)
@pytest.mark.parametrize("cut", list(CUTS))
def test_every_share_is_accelerates_own(ranks: list[dict[str, Any]], cut: str, samples: int, shuffle: bool):
    first, second = (rank["shares"][f"{cut} {samples} {shuffle}"] for rank in ranks)
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
        assert gamma_a + gamma_b == gamma
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


@pytest.mark.parametrize("cut", ["default", "split"])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_pruned_run_is_at_every_pass_boundary_where_the_unpruned_one_is(
    ranks: list[dict[str, Any]], kind: str, accumulate: int, cut: str
):
    for rank in ranks:
        alone, ours = rank["rates"][f"{kind} {accumulate} {cut}"]
        assert ours == alone
        assert (len(set(alone)) > 1) == (kind != "constant")


def test_updates_are_counted_over_all_processes_alike(ranks: list[dict[str, Any]]):
    for rank in ranks:
        made, expected, updated = (rank["updates"][key] for key in ("made", "expected", "updated"))
        total = sum(updated)
        assert [count for count, now in zip(made, updated, strict=True) if now] == list(range(1, total + 1))
        assert expected[-1] == made[-1] == total and all(e >= m for e, m in zip(expected, made, strict=True))


# ---- checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", SAVED_AT)
def test_resumed_on_two_processes_it_is_the_same_training_to_the_bit(ranks: list[dict[str, Any]], step: int):
    for rank in ranks:
        journal, parameters = rank["resumed"]["straight"]
        rest, again = rank["resumed"]["resumed"][str(step)]
        assert rest == journal[step:] and rest
        assert again == parameters


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
