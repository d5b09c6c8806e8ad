"""Several processes train as one would: the same samples, weights, learning rates and parameters."""

from __future__ import annotations

import json
import math
import os
import runpy
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mmseg")

from launching import launched, torchrun
from mmengine.config import Config
from mmengine.hooks import Hook

from infobatch_mm.demo.street import draw_dataset

from .processes import CONTEXT, GROUP_NORM, Journal, Run, assert_equal_parameters, final_state
from .toy import EPOCHS, config

# A hang in a collective ends by itself after a minute.
pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
#: Parameters after the same training on other numbers of ranks; measured at most 2.3e-06 apart.
TOLERANCE = 1e-5
#: Global batches: of 22 samples, of 44 samples with four left over that drop_last drops.
GLOBAL_BATCH = {"iterations": 4, "epochs": 8}
OVERRIDES: dict[str, Any] = {
    **GROUP_NORM,
    "model.decode_head.dropout_ratio": 0,
    "model.auxiliary_head.dropout_ratio": 0,
    "train_dataloader.dataset.serialize_data": False,  # what it collects costs each process half a second
    "custom_hooks.0.item_seed": True,  # augmentations are then those of a position, on whatever rank
    "default_hooks.checkpoint.save_last": True,
    "custom_imports": dict(imports=["infobatch_mm.engine"], allow_failed_imports=False),
    **dict.fromkeys(("val_dataloader", "val_cfg", "val_evaluator")),
}

MakeConfig = Callable[..., Config]
#: By iteration, over all ranks: samples with their weights.
Visits = dict[int, dict[int, float]]


@pytest.fixture(scope="module")
def make_config(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeConfig:
    """A function of loop, ranks and global batch."""
    more = draw_dataset(tmp_path_factory.mktemp("more"), num_train=44, num_val=1, size=32)

    def make(work_dir: Path, loop: str, ranks: int, batch: int | None = None, **overrides: Any) -> Config:
        # Rates by iteration here as well: 6 epochs of 5 batches.
        by_iteration = [dict(type="PolyLR", power=0.9, eta_min=1e-4, by_epoch=False, begin=0, end=30)]
        whole = {**EPOCHS, "train_dataloader.drop_last": True, "param_scheduler": by_iteration}
        epochs = whole if loop == "epochs" else {}
        cfg = config(more if epochs else scenes, work_dir, **{**OVERRIDES, **epochs, **overrides})
        cfg.train_dataloader.batch_size = (batch or GLOBAL_BATCH[loop]) // ranks
        return cfg

    return make


@pytest.fixture(scope="module")
def straight(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Run]:
    """Runs from begin to end, each made once; those on two ranks have workers."""
    runs: dict[tuple[str, int], Run] = {}

    def run(loop: str, ranks: int) -> Run:
        if (loop, ranks) not in runs:
            cfg = make_config(tmp_path_factory.mktemp(f"{loop}{ranks}"), loop, ranks, **workers(ranks))
            runs[loop, ranks] = Run(cfg, ranks).finish()
        return runs[loop, ranks]

    return run


def workers(ranks: int) -> dict[str, Any]:
    return {"train_dataloader.num_workers": 2 if ranks == 2 else 0}


@pytest.fixture(scope="module")
def killed(request: Any, make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The loop, and the checkpoint of a run on two ranks that was killed later on in the same pass."""
    loop, work_dir = request.param, tmp_path_factory.mktemp("killed")
    cfg = make_config(work_dir, loop, 2, **workers(2))
    cfg.default_hooks.checkpoint.update(interval=7, by_epoch=False, save_last=False)
    run = Run(cfg, 2)
    assert run.kill_after(8) == [-9, -9]
    return loop, work_dir / "iter_7.pth"


def visits(run: Run) -> Visits:
    """What all ranks together visited; no sample twice in a batch."""
    journals = [run.journal(rank) for rank in range(len(run.processes))]
    steps: Visits = {}
    for entries in zip(*journals, strict=True):
        pairs = [p for e in entries for p in zip(e["indices"], e["weights"], strict=True)]
        assert len({entry["iter"] for entry in entries}) == 1
        steps[entries[0]["iter"]] = dict(pairs)
        assert len(steps[entries[0]["iter"]]) == len(pairs)
    return steps


def rates(run: Run, rank: int = 0) -> dict[int, tuple[float, int]]:
    """By iteration: learning rate and the number of iterations that the host was told."""
    return {entry["iter"]: (entry["lr"], entry["max_iters"]) for entry in run.journal(rank)}


def distance(ours: Run, theirs: Run) -> float:
    """Largest difference of any parameter or buffer at the end."""
    states = [final_state(run.work_dir)["state_dict"] for run in (ours, theirs)]
    assert states[0].keys() == states[1].keys()
    return max(float((value - states[1][name]).abs().max()) for name, value in states[0].items())


def summary(run: Run) -> dict[str, Any]:
    return json.loads((run.work_dir / "infobatch_summary.json").read_text())


# ---- the same training on any number of ranks -------------------------------------------------------------


@pytest.mark.parametrize(
    ("loop", "ranks"),
    [("iterations", 2), ("epochs", 2), ("iterations", 4), pytest.param("epochs", 4, marks=pytest.mark.slow)],
)
def test_ranks_together_train_as_one(straight: Callable[[str, int], Run], loop: str, ranks: int) -> None:
    one, many = straight(loop, 1), straight(loop, ranks)
    alone = one.journal()
    assert any(weight > 1 for entry in alone for weight in entry["weights"])
    assert all(len(batch) == GLOBAL_BATCH[loop] for batch in visits(one).values())
    assert visits(many) == visits(one)
    for rank in range(ranks):
        assert rates(many, rank) == rates(one)
        assert [entry["pass"] for entry in many.journal(rank)] == [entry["pass"] for entry in alone]
    # A rank's log shows the mean by the weights of its own samples, which is a part of the whole only where all are 1.
    full = [place for place, entry in enumerate(alone) if set(entry["weights"]) == {1.0}]
    assert 6 < len(full) < len(alone)
    for key in ("loss", "decode.loss_ce", "aux.loss_ce"):
        logged = [[entry["losses"][key] for entry in many.journal(rank)] for rank in range(ranks)]
        means = [sum(losses) / ranks for losses in zip(*logged, strict=True)]
        assert [means[i] for i in full] == pytest.approx([alone[i]["losses"][key] for i in full], rel=1e-6)
    apart = distance(many, one)
    print(f"{loop} on {ranks} ranks: parameters {apart:.1e} from one process's")
    assert apart <= TOLERANCE


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("loop", ["iterations", "epochs"])
def test_summaries_are_equal(straight: Callable[[str, int], Run], loop: str, ranks: int) -> None:
    ours, theirs = summary(straight(loop, ranks)), summary(straight(loop, 1))
    for book in (ours, theirs):
        del book["wall_time_s"]
    for entry, other in zip(ours.pop("per_pass"), theirs.pop("per_pass"), strict=True):
        assert (entry.pop("threshold") or 0) == pytest.approx(other.pop("threshold") or 0, rel=1e-6)
        for name in ("score_mean", "worth", "efficiency", "limit"):
            assert (entry.pop(name) or 0) == pytest.approx(other.pop(name) or 0, rel=1e-6)
        assert entry == other
    assert ours == theirs
    assert ours["saved_ratio"] > 0


# ---- without us -------------------------------------------------------------------------------------------


class Losses(Hook):
    """Names and losses of every iteration, also of a run without our hook."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[Any] = []

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        names = [Path(sample.img_path).name for sample in data_batch["data_samples"]]
        self.entries.append((names, {key: float(value.detach()) for key, value in outputs.items()}))

    def after_run(self, runner: Any) -> None:
        self.path.write_text(json.dumps(self.entries))


def note_losses(rank: int, runner: Any) -> None:
    """Takes the place of the journal, which asks our hook."""
    runner._hooks[:] = [hook for hook in runner.hooks if not isinstance(hook, Journal)]
    runner.register_hook(Losses(Path(runner.work_dir, f"losses.{rank}")))


@pytest.mark.parametrize(
    ("loop", "num_workers"), [pytest.param("iterations", 0, marks=pytest.mark.slow), ("epochs", 2)]
)
def test_policy_none_is_the_host_to_the_bit(scenes: Path, tmp_path: Path, loop: str, num_workers: int) -> None:
    def run(name: str, hooks: list[dict[str, Any]]) -> Run:
        # Buffers and dropout of the toy as it is: nothing here compares different numbers of ranks.
        toys_own = {key: value for key, value in OVERRIDES.items() if not key.startswith(("model.", "custom_hooks"))}
        length = EPOCHS if loop == "epochs" else {"train_cfg.max_iters": 14}
        cfg = config(scenes, tmp_path / name, **toys_own, **length, custom_hooks=hooks)
        cfg.train_dataloader.update(batch_size=GLOBAL_BATCH[loop] // 2, num_workers=num_workers)
        return Run(cfg, 2, note_losses).finish()

    host = run("host", [])
    ours = run("ours", [dict(type="InfoBatchHook", policy="none")])
    for rank in range(2):
        theirs = json.loads((host.work_dir / f"losses.{rank}").read_text())
        assert json.loads((ours.work_dir / f"losses.{rank}").read_text()) == theirs
        assert len(theirs) >= 14
    assert_equal_parameters(final_state(ours.work_dir), final_state(host.work_dir))


def without_round_up(rank: int, runner: Any) -> None:
    runner._train_dataloader["sampler"]["round_up"] = False
    without_journal(rank, runner)


def without_journal(rank: int, runner: Any) -> None:
    runner._hooks[:] = [hook for hook in runner.hooks if not isinstance(hook, Journal)]


def test_policy_none_ends_its_passes_together_where_tails_differ(make_config: MakeConfig, tmp_path: Path) -> None:
    """21 of 22 samples on two ranks: tails of three and of two, in the same number of batches."""
    cfg = make_config(tmp_path, "epochs", 2)
    cfg.train_dataloader.update(drop_last=False)
    cfg.train_dataloader.dataset.indices = 21
    cfg.custom_hooks = [dict(type="InfoBatchHook", policy="none")]
    Run(cfg, 2, without_round_up).finish()
    books = json.loads((tmp_path / "infobatch_summary.json").read_text())
    assert [entry["kept"] for entry in books["per_pass"]] == [21] * 6


# ---- killed, and resumed on another number of ranks -------------------------------------------------------


@pytest.mark.parametrize(
    ("killed", "ranks"),
    [
        ("iterations", 1),
        ("epochs", 4),
        pytest.param("iterations", 4, marks=pytest.mark.slow),
        pytest.param("epochs", 1, marks=pytest.mark.slow),
    ],
    indirect=["killed"],
)
def test_resumed_on_other_ranks_visits_the_rest_of_the_plan(
    killed: tuple[str, Path],
    straight: Callable[[str, int], Run],
    make_config: MakeConfig,
    tmp_path: Path,
    ranks: int,
) -> None:
    loop, checkpoint = killed
    state = torch.load(checkpoint, weights_only=False)["infobatch"]["pruner"]
    plan, visited = state["plan"], state["visited"]
    assert plan["pruned"] and 0 < visited < len(plan["indices"])  # in the middle of a pass
    assert not state["unmerged"] and int(state["times_seen"].sum()) == 7 * GLOBAL_BATCH[loop]
    cfg = make_config(tmp_path, loop, ranks, resume=True, load_from=str(checkpoint))
    resumed, whole = Run(cfg, ranks).finish(), straight(loop, 2)
    in_flight = [
        pair
        for entries in zip(*(resumed.journal(rank) for rank in range(ranks)), strict=True)
        for entry in entries
        for pair in zip(entry["indices"], entry["weights"], strict=True)
        if entry["pass"] == state["pass_index"]
    ]
    rest = zip(plan["indices"][visited:].tolist(), plan["weights"][visited:].tolist(), strict=True)
    assert sorted(in_flight) == sorted(rest)
    assert visits(resumed) == {step: batch for step, batch in visits(whole).items() if step >= 7}
    for rank in range(ranks):
        assert rates(resumed, rank) == {step: rate for step, rate in rates(whole).items() if step >= 7}
    apart = distance(resumed, whole)
    print(f"{loop} resumed on {ranks} ranks: parameters {apart:.1e} from the straight run's")
    assert apart <= TOLERANCE


@pytest.mark.parametrize("killed", ["iterations", pytest.param("epochs", marks=pytest.mark.slow)], indirect=True)
def test_resumed_with_half_the_global_batch_goes_on(
    killed: tuple[str, Path], straight: Callable[[str, int], Run], make_config: MakeConfig, tmp_path: Path
) -> None:
    loop, checkpoint = killed
    half, before = GLOBAL_BATCH[loop] // 2, torch.load(checkpoint, weights_only=False)["infobatch"]["pruner"]
    run = Run(make_config(tmp_path, loop, 2, half, resume=True, load_from=str(checkpoint)), 2).finish()
    assert f"global batch of {2 * half}" in run.output() and "the scores are kept" in run.output()
    journal = run.journal()
    assert journal[-1]["iter"] + 1 == journal[-1]["max_iters"]
    lrs = [entry["lr"] for entry in journal]
    undisturbed = [rate for rate, _ in rates(straight(loop, 2)).values()]
    assert lrs[0] == undisturbed[7]
    # It never jumps, neither up nor down.
    steepest = max(earlier - later for earlier, later in pairwise(undisturbed))
    assert all(0 <= earlier - later < 1.5 * steepest for earlier, later in pairwise(lrs))
    steps, book = visits(run).values(), summary(run)
    assert all(len(batch) == half for batch in steps)
    after = final_state(tmp_path)["infobatch"]["pruner"]
    made = torch.bincount(torch.tensor([index for batch in steps for index in batch]), minlength=len(after["seen"]))
    assert torch.equal(after["times_seen"] - before["times_seen"], made)
    assert book["visits"] == 7 * GLOBAL_BATCH[loop] + int(made.sum())
    # The pass that was drawn anew was drawn from the scores that there were.
    drawn_anew = next(entry for entry in book["per_pass"] if entry["pass"] == journal[0]["pass"])
    assert drawn_anew["threshold"] == pytest.approx(float(before["scores"][before["seen"]].mean()), rel=1e-6)
    # Of the host's iterations, half as long now, the same number is made up for.
    assert book["passes_done"] == math.ceil(book["passes_total"]) == {"iterations": 3, "epochs": 6}[loop]


# ---- launchers --------------------------------------------------------------------------------------------


def environments(launcher: str) -> list[dict[str, str]]:
    """What a launcher sets for two processes."""
    names = {
        "mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
        "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    }[launcher]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return [{**meeting, **dict(zip(names, (str(rank), "2", str(rank)), strict=True))} for rank in range(2)]


def tool(variables: dict[str, str], arguments: list[str], output: str) -> None:
    """``tools/train.py`` in this process, which a launcher has started with these variables."""
    sink = os.open(output, os.O_WRONLY | os.O_CREAT)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(sink, stream.fileno())
    os.environ.update(variables)
    torch.set_num_threads(1)
    script = ROOT / "tools/train.py"
    sys.path.insert(0, str(script.parent))
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("launcher", ["mpi", pytest.param("slurm", marks=pytest.mark.slow)])
def test_train_runs_on_two_processes_of_a_cluster(
    straight: Callable[[str, int], Run], make_config: MakeConfig, tmp_path: Path, launcher: str
) -> None:
    make_config(tmp_path / "run", "iterations", 2, **workers(2)).dump(tmp_path / "config.py")
    arguments = [str(tmp_path / "config.py"), "--launcher", launcher]
    processes, outputs = [], [tmp_path / f"output.{rank}" for rank in range(2)]
    for variables, output in zip(environments(launcher), outputs, strict=True):
        processes.append(CONTEXT.Process(target=tool, args=(variables, arguments, str(output))))
        processes[-1].start()
    for process in processes:
        process.join(100)
        process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.exitcode == 0, output.read_text()[-3000:]
    assert_equal_parameters(final_state(tmp_path / "run"), final_state(straight("iterations", 2).work_dir))


@pytest.mark.slow
def test_train_runs_under_torchrun(
    straight: Callable[[str, int], Run], make_config: MakeConfig, tmp_path: Path
) -> None:
    make_config(tmp_path / "run", "iterations", 2, **workers(2)).dump(tmp_path / "config.py")
    launched(torchrun(), ROOT / "tools/train.py", tmp_path / "config.py", "--launcher", "pytorch", cwd=tmp_path)
    assert_equal_parameters(final_state(tmp_path / "run"), final_state(straight("iterations", 2).work_dir))


# ---- processes that disagree ------------------------------------------------------------------------------


def with_other_data(rank: int, runner: Any, root: str) -> None:
    if rank == 1:
        runner._train_dataloader["dataset"]["data_root"] = root


def with_fewer_samples(rank: int, runner: Any) -> None:
    runner._train_dataloader["dataset"]["indices"] = 22 - rank


def with_own_seed(rank: int, runner: Any) -> None:
    next(hook for hook in runner.hooks if type(hook).__name__ == "InfoBatchHook")._seed = 40 + rank


@pytest.mark.parametrize(
    "what", ["fingerprint", *(pytest.param(each, marks=pytest.mark.slow) for each in ("num_samples", "seed"))]
)
def test_ranks_that_disagree_are_all_refused(make_config: MakeConfig, tmp_path: Path, what: str) -> None:
    prepare: Any = {"num_samples": with_fewer_samples, "seed": with_own_seed}.get(what)
    if what == "fingerprint":
        renamed = draw_dataset(tmp_path / "renamed", num_train=22, num_val=1, size=32)
        for file in [*renamed.rglob("training/*.jpg"), *renamed.rglob("training/*.png")]:
            file.rename(file.with_name("x" + file.name))
        prepare = partial(with_other_data, root=str(renamed))
    run = Run(make_config(tmp_path / "run", "iterations", 2), 2, prepare)
    codes = run.wait(timeout=60)
    messages = [
        next(line for line in run.output(rank).splitlines() if "ValueError: the processes differ" in line)
        for rank in range(2)
    ]
    assert all(code > 0 for code in codes) and messages[0] == messages[1]
    first, second = (part.split(",")[0].split(";")[0] for part in messages[0].split(f" has {what}=")[1:])
    assert first != second and "rank 0 has" in messages[0] and "rank 1 has" in messages[0]
    assert (first, second) == {"num_samples": ("22", "21"), "seed": ("40", "41")}.get(what, (first, second))
    assert not run.journal()


def with_no_samples(rank: int, runner: Any) -> None:
    """The files are missing on the second machine."""
    build = runner.build_train_loop

    def empty(loop: Any) -> Any:
        built = build(loop)
        dataset = built.dataloader.dataset
        dataset.__class__ = type("Empty", (type(dataset),), {"__len__": lambda self: 0})
        return built

    if rank == 1:
        runner.build_train_loop = empty


def with_summary_out_of_sight(rank: int, runner: Any) -> None:
    """Rank 0 sees the summary of another run, the others not yet, as on a network's file system."""
    if rank == 0:
        Path(runner.work_dir, "infobatch_summary.json").write_text(json.dumps({"prune_ratio": 0.3}))
    else:
        runner._work_dir = str(Path(runner.work_dir, "elsewhere"))


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (with_no_samples, "the training data set is empty"),
        (with_summary_out_of_sight, "belongs to a run with prune_ratio=0.3"),
    ],
    ids=["no samples on rank 1", "a summary that rank 0 alone sees"],
)
def test_what_one_rank_alone_refuses_ends_all_at_once(
    make_config: MakeConfig, tmp_path: Path, prepare: Any, message: str
) -> None:
    resumes = prepare is with_summary_out_of_sight
    if resumes:
        Run(make_config(tmp_path, "iterations", 2, **{"train_cfg.max_iters": 8}), 2).finish()
    run = Run(make_config(tmp_path, "iterations", 2, resume=resumes), 2, prepare)
    codes = run.wait(timeout=45)  # a collective that waits for another gives up after a minute
    assert all(code > 0 for code in codes)
    for rank in range(2):
        assert message in run.output(rank).split("ValueError:")[-1]
    assert not run.journal()


# ---- what each rank has of its own --------------------------------------------------------------------------


class KeepBuffers(Hook):
    """Writes down the buffers of this rank at the end, and kills it where it is told to."""

    def __init__(self, path: Path, kill: int | None) -> None:
        self.path, self.kill = path, kill

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if runner.iter == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)

    def after_train(self, runner: Any) -> None:
        torch.save(dict(runner.model.module.named_buffers()), self.path)


def keep_buffers(rank: int, runner: Any, kill: int | None = None) -> None:
    runner.register_hook(KeepBuffers(Path(runner.work_dir, f"buffers.{rank}"), kill))


def blind(rank: int, runner: Any) -> None:
    """To rank 1 the newest checkpoint is not there yet, as on a network's file system."""
    from infobatch_mm.engine import checkpoints

    if rank == 1:
        checkpoints.is_whole = lambda path: "iter_8" not in str(path)  # this process is the test's own


def test_buffers_of_every_rank_and_the_choice_of_rank_0_are_resumed(make_config: MakeConfig, tmp_path: Path) -> None:
    def run(name: str, prepare: Any, **overrides: Any) -> Run:
        cfg = make_config(tmp_path / name, "iterations", 2, **overrides)
        norm = dict(type="BN", requires_grad=True)  # each rank keeps statistics of its own
        for part in (cfg.model.backbone, cfg.model.decode_head, cfg.model.auxiliary_head):
            part.norm_cfg = norm
        cfg.default_hooks.checkpoint.interval = 4
        return Run(cfg, 2, prepare)

    run("straight", keep_buffers).finish()
    run("killed", partial(keep_buffers, kill=10)).wait()
    resumed = run("killed", blind_and_keeping, resume=True).finish()
    assert resumed.journal(0)[0]["iter"] == resumed.journal(1)[0]["iter"] == 8
    kept = [[torch.load(tmp_path / name / f"buffers.{rank}") for rank in range(2)] for name in ("straight", "killed")]
    assert any(not torch.equal(kept[0][0][name], kept[0][1][name]) for name in kept[0][0])
    for straight, resumed_buffers in zip(*kept, strict=True):
        assert all(torch.equal(straight[name], resumed_buffers[name]) for name in straight)


def blind_and_keeping(rank: int, runner: Any) -> None:
    blind(rank, runner)
    keep_buffers(rank, runner)
