"""``examples/torch_ddp.py`` as users start it: on any number of processes it is one training, also across a kill.

Run as a script, this file is the example with a journal: every rank writes down what it visits.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from infobatch_mm import InfoBatch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest does; here for the processes
from launching import accelerate_launch, launched, torchrun

pytestmark = pytest.mark.dist

EXAMPLE = Path(__file__).parents[2] / "examples/torch_ddp.py"
EPOCHS = 8
#: 46 samples in global batches of 8: the last batch of a full pass divides by two processes, not by four.
ARGUMENTS = ["--samples", "46", "--batch-size", "8", "--epochs", str(EPOCHS), "--interval", "4"]
KILL_AT = 11  # in a pruned pass, three steps behind a checkpoint
STEPS_SAVED = 8
#: Parameters of the same training on other numbers of processes; measured at most 4.5e-07 apart.
TOLERANCE = 1e-5
PROCESSES_DIFFER = {"seed": {"seed": (4, 5)}, "size": {"num_samples": (10, 11)}, "batch": {"batch_size": (2, 4)}}

#: Position of a batch, as pass and visits before it, over all ranks: its samples with their weights.
Visits = dict[tuple[int, int], dict[int, float]]


# ---- what runs in the processes ---------------------------------------------------------------------------


def run_with_journal(folder: Path, kill_at: int, arguments: list[str]) -> None:
    """The example, killed before a step is done; it leaves journals, final parameters and the final state."""
    spec = importlib.util.spec_from_file_location("torch_ddp", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    sys.modules["torch_ddp"] = example
    spec.loader.exec_module(example)
    rank = int(os.environ.get("RANK", 0))
    journal = (folder / f"journal.{rank}").open("a", buffering=1)
    seen: list[InfoBatch] = []

    def on_step(infobatch: InfoBatch, index: torch.Tensor) -> None:
        pruner = infobatch._pruner
        infobatch._passes.locate()
        real = index[index >= 0]  # a negative one is padding
        entry = {
            "pass": pruner.pass_index,
            "visited": pruner.visited,
            "index": real.tolist(),
            "weights": pruner.weights(real).tolist(),
        }
        journal.write(json.dumps(entry) + "\n")
        if dist.is_initialized() and dist.get_world_size() == 2 and not seen:
            (folder / f"refused.{rank}").write_text(json.dumps({k: refusal(v) for k, v in PROCESSES_DIFFER.items()}))
        seen.append(infobatch)
        if len(seen) == kill_at:
            dist.barrier()  # torchrun ends the others at once
            os.kill(os.getpid(), signal.SIGKILL)

    net = example.main([*arguments, "--checkpoint", str(folder / "checkpoint.pt")], on_step)
    if rank == 0:
        torch.save({"model": net.state_dict(), "infobatch": seen[-1].state_dict()}, folder / "end.pt")
    journal.close()
    sys.stdout.flush()
    os._exit(0)  # torch's threads have been seen to abort a process that was done, when Python took it down


def refusal(differ: dict[str, Any]) -> str:
    """What this process is told where processes differ in an argument."""
    own = {name: values[dist.get_rank()] for name, values in differ.items()}
    try:
        InfoBatch(**{"num_samples": 10, "num_epochs": 2, "batch_size": 2, **own})
    except ValueError as error:
        return str(error)
    return ""


# ---- runs and what they leave behind ----------------------------------------------------------------------


@dataclass
class Done:
    """A run that is over."""

    folder: Path
    output: str

    def journal(self, rank: int) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / f"journal.{rank}").read_text().splitlines()]

    @property
    def visits(self) -> Visits:
        """What all ranks together visited; no sample twice in a batch."""
        visits: Visits = {}
        for path in sorted(self.folder.glob("journal.*")):
            for entry in map(json.loads, path.read_text().splitlines()):
                batch = visits.setdefault((entry["pass"], entry["visited"]), {})
                assert not batch.keys() & set(entry["index"])
                batch.update(zip(entry["index"], entry["weights"], strict=True))
        return visits

    @property
    def end(self) -> dict[str, Any]:
        return torch.load(self.folder / "end.pt", weights_only=True)

    @property
    def checkpoint(self) -> dict[str, Any]:
        return torch.load(self.folder / "checkpoint.pt", weights_only=True)


def launch(folder: Path, launcher: list[str], *more: str, kill_at: int = 0) -> Done:
    folder.mkdir(exist_ok=True)
    arguments = [folder, kill_at, *ARGUMENTS, *more]
    return Done(folder, launched(launcher, __file__, *arguments, cwd=folder, fails=kill_at > 0))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Done:
    return launch(tmp_path_factory.mktemp("python"), [])


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Two processes, each with a worker that reads ahead."""
    return launch(tmp_path_factory.mktemp("two"), torchrun(), "--workers", "1")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Done:
    done = launch(tmp_path_factory.mktemp("killed"), torchrun(), "--workers", "1", kill_at=KILL_AT)
    assert "SIGKILL" in done.output
    assert [len(done.journal(rank)) for rank in range(2)] == [KILL_AT] * 2
    assert not (done.folder / "end.pt").exists()
    return done


def resume(killed: Done, folder: Path, processes: int, *more: str) -> Done:
    (folder / "checkpoint.pt").write_bytes((killed.folder / "checkpoint.pt").read_bytes())
    return launch(folder, torchrun(processes), "--resume", *more)


def distance(ours: Done, theirs: Done) -> float:
    """Largest difference of any parameter."""
    parameters, others = ours.end["model"], theirs.end["model"]
    assert parameters.keys() == others.keys()
    return max(float((parameters[name] - others[name]).abs().max()) for name in parameters)


# ---- tests ------------------------------------------------------------------------------------------------


def test_the_example_alone_prunes_and_says_what_it_saved(alone: Done):
    summary_line = alone.output.strip().splitlines()[-1]
    saved = alone.end["infobatch"]
    full, seen = 46 * EPOCHS, int(saved["times_seen"].sum())
    assert f"kept {seen / full:.1%}, saved {1 - seen / full:.1%}, accuracy" in summary_line
    visits = alone.visits
    assert sum(map(len, visits.values())) == seen < 0.9 * full
    assert {position[0] for position in visits} == set(range(EPOCHS))
    assert any(weight > 1 for batch in visits.values() for weight in batch.values())


@pytest.mark.parametrize("processes", [2, *(pytest.param(each, marks=pytest.mark.slow) for each in (1, 4))])
def test_the_same_global_batches_and_parameters_on_any_number_of_processes(
    alone: Done, two: Done, tmp_path: Path, processes: int
):
    run = two if processes == 2 else launch(tmp_path, torchrun(processes))
    steps = [len(run.journal(rank)) for rank in range(processes)]
    assert steps == [len(alone.journal(0))] * processes
    assert run.visits == alone.visits
    assert torch.equal(run.end["infobatch"]["times_seen"], alone.end["infobatch"]["times_seen"])
    apart = distance(run, alone)
    print(f"{processes} processes: parameters {apart:.1e} from one process's")
    assert apart <= TOLERANCE


def test_killed_and_resumed_ends_with_the_same_bits(two: Done, killed: Done, tmp_path: Path):
    saved = killed.checkpoint
    assert saved["step"] == STEPS_SAVED and not saved["infobatch"]["unmerged"]
    plan = saved["infobatch"]["plan"]
    assert plan["pruned"] and 0 < saved["infobatch"]["visited"] < len(plan["indices"])  # mid-pass
    resumed = resume(killed, tmp_path, 2, "--workers", "1")
    for rank in range(2):
        assert resumed.journal(rank) == two.journal(rank)[STEPS_SAVED:]
    assert distance(resumed, two) == 0
    ours, theirs = resumed.end["infobatch"], two.end["infobatch"]
    assert torch.equal(ours["scores"], theirs["scores"]) and torch.equal(ours["times_seen"], theirs["times_seen"])
    assert ours["history"] == theirs["history"]


def test_resumed_on_more_processes_visits_the_very_same_rest(two: Done, killed: Done, tmp_path: Path):
    resumed = resume(killed, tmp_path, 4)
    saved = killed.checkpoint["infobatch"]
    assert next(iter(resumed.visits)) == (saved["pass_index"], saved["visited"])
    rest = {position: batch for position, batch in two.visits.items() if position in resumed.visits}
    assert resumed.visits == rest and len(rest) == len(two.journal(0)) - STEPS_SAVED
    apart = distance(resumed, two)
    print(f"resumed on 4 processes: parameters {apart:.1e} from the straight run's")
    assert apart <= TOLERANCE


def test_resumed_with_another_global_batch_keeps_scores_and_progress(killed: Done, tmp_path: Path):
    before = killed.checkpoint["infobatch"]
    resumed = resume(killed, tmp_path, 2, "--batch-size", "4")
    after, visits = resumed.end["infobatch"], resumed.visits
    passes = [position[0] for position in visits]
    assert passes == sorted(passes) and set(passes) == set(range(before["pass_index"], EPOCHS))
    assert after["pass_index"] == EPOCHS and len(after["history"]) == EPOCHS
    assert after["history"][: before["pass_index"]] == before["history"]
    # Drawn anew in the new batches from the scores that there were, and begun where the old pass stood.
    first = {index: weight for (p, _), batch in visits.items() if p == passes[0] for index, weight in batch.items()}
    assert all(len(batch) == 4 for (p, _), batch in visits.items() if p == passes[0])
    assert max(first.values()) > 1
    share = before["visited"] / len(before["plan"]["indices"])
    start = next(iter(visits))[1]
    assert start / (start + len(first)) == pytest.approx(share, abs=4 / (start + len(first)))
    counted = int(before["times_seen"].sum()) + sum(map(len, visits.values()))
    assert int(after["times_seen"].sum()) == counted


@pytest.mark.slow
def test_accelerate_launch_is_torchrun_to_the_bit(two: Done, tmp_path: Path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    run = launch(tmp_path, accelerate_launch())
    for rank in range(2):
        assert run.journal(rank) == two.journal(rank)
    assert distance(run, two) == 0


@pytest.mark.parametrize("what", list(PROCESSES_DIFFER))
def test_processes_that_disagree_are_all_told_both_values(two: Done, what: str):
    ((name, values),) = PROCESSES_DIFFER[what].items()
    for rank in range(2):
        message = json.loads((two.folder / f"refused.{rank}").read_text())[what]
        assert f"rank 0 has {name}={values[0]}, rank 1 has {name}={values[1]}" in message


if __name__ == "__main__":
    run_with_journal(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
