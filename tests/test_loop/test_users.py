"""What users of plain loops ran into."""

from __future__ import annotations

import io
import logging
import math
import warnings
from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

from infobatch_mm import InfoBatch

N, B = 40, 4


def loss_of(index: torch.Tensor) -> torch.Tensor:
    return ((index * 7919) % 101).float() / 101 + 0.01


def train(infobatch: InfoBatch, loader: Any, passes: int, scheduler: Any = None, stop: int | None = None) -> list:
    """Visits with their weights."""
    visits: list[tuple[int, float]] = []
    for _ in range(infobatch.passes_done, passes):
        for index, _ in loader:
            losses = loss_of(index).requires_grad_()
            (weights,) = torch.autograd.grad(infobatch.weigh(losses, index), losses)
            visits += zip(index.tolist(), (weights * len(index)).tolist(), strict=True)
            if scheduler is not None:
                scheduler.optimizer.step()
                scheduler.step()
            if stop is not None and len(visits) >= stop:
                return visits
    return visits


# ---- a training that is counted in steps ---------------------------------------------------------------


@pytest.mark.parametrize("max_train_steps", [1, 9, 10, 11, 55, 60, 64])
@pytest.mark.parametrize("policy", ["infobatch", "random", "none"])
def test_a_training_of_steps_ends_at_its_end(max_train_steps: int, policy: str):
    passes = math.ceil(max_train_steps / (N // B))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        infobatch = InfoBatch(N, max_train_steps=max_train_steps, batch_size=B, policy=policy, delta=0.6)
    loader = infobatch.loader(list(range(N)))
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    host = OneCycleLR(SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1), 0.1, total_steps=max_train_steps + 1)
    scheduler = infobatch.schedule(OneCycleLR(optimizer, 0.1, total_steps=max_train_steps + 1))
    visits = train(infobatch, loader, passes, scheduler)
    for _ in range(max_train_steps):
        host.optimizer.step()
        host.step()
    assert scheduler.last_epoch == max_train_steps and scheduler.get_last_lr() == host.get_last_lr()
    summary = infobatch.summary()
    assert (summary["passes_done"], summary["passes_total"]) == (passes, max_train_steps * B / N)
    assert (summary["visits"], summary["visits_full"]) == (len(visits), max_train_steps * B)
    assert len(visits) % B == 0 and len(visits) <= max_train_steps * B
    if policy == "none":
        assert len(visits) == max_train_steps * B and {weight for _, weight in visits} == {1.0}
    elif max_train_steps >= 55:
        assert len(visits) < 0.95 * max_train_steps * B
        # Annealing: of the steps from 0.6 on none is pruned.
        starts = [p for p in range(passes) if p * N / (max_train_steps * B) >= 0.6]
        assert all(each["kept"] in (N, summary["visits_full"] % N) for each in summary["per_pass"][starts[0] :])


def test_a_training_of_steps_resumes_in_its_last_pass():
    def fresh() -> tuple[InfoBatch, Any]:
        infobatch = InfoBatch(N, max_train_steps=26, batch_size=B, delta=1.0, seed=3)
        return infobatch, infobatch.loader(list(range(N)))

    infobatch, loader = fresh()
    whole = train(infobatch, loader, 3)
    assert infobatch.summary()["visits_full"] == 26 * B
    last = infobatch.summary()["per_pass"][-1]["kept"]
    assert 2 * B <= last < 6 * B
    infobatch, loader = fresh()
    stop = len(whole) - last + B
    begun = train(infobatch, loader, 3, stop=stop)
    file = io.BytesIO()
    torch.save(infobatch.state_dict(), file)
    file.seek(0)
    infobatch, loader = fresh()
    infobatch.load_state_dict(torch.load(file, weights_only=True))
    assert begun + train(infobatch, loader, 3) == whole
    other = InfoBatch(N, max_train_steps=30, batch_size=B, delta=1.0, seed=3)
    with pytest.raises(ValueError, match="max_train_steps=26, this run has max_train_steps=30"):
        other.load_state_dict(infobatch.state_dict())


def test_a_training_needs_a_length():
    with pytest.raises(ValueError, match="give num_epochs, its passes over the data, or max_train_steps"):
        InfoBatch(N)
    with pytest.raises(ValueError, match="max_train_steps=5 counts global batches: give their batch_size as well"):
        InfoBatch(N, max_train_steps=5)
    with pytest.raises(ValueError, match="max_train_steps=0 is below 1"):
        InfoBatch(N, max_train_steps=0, batch_size=B)
    # As in scripts, where steps override epochs.
    assert InfoBatch(N, 100, max_train_steps=20, batch_size=B).summary()["passes_total"] == 2


# ---- the log -------------------------------------------------------------------------------------------


def test_the_loss_of_a_pruned_pass_is_comparable():
    infobatch = InfoBatch(N, 20, 0.5, 1.0, batch_size=B)
    loader = infobatch.loader(list(range(N)))
    with pytest.raises(ValueError, match="no batch was weighed yet"):
        infobatch.loss  # noqa: B018
    logged: list[float] = []
    plain: list[float] = []
    for _ in range(20):
        for index, _ in loader:
            losses = loss_of(index)
            weights = B * torch.autograd.grad(infobatch.weigh(losses.requires_grad_(), index), losses)[0]
            mean = (weights * losses).sum() / weights.sum()
            assert infobatch.loss.item() == pytest.approx(mean.item(), rel=1e-6)
            assert not infobatch.loss.requires_grad
            if infobatch.summary()["passes_done"] == 0:
                assert torch.equal(infobatch.loss, losses.mean().detach())
            logged.append(infobatch.loss.item())
            plain.append(losses.mean().item())
    unpruned = loss_of(torch.arange(N)).mean().item()
    kept = sum(plain[N // B :]) / len(plain[N // B :])
    assert kept > 1.1 * unpruned  # what users saw in the log
    mean = sum(logged[N // B :]) / len(logged[N // B :])
    # A quotient of two sums over so few samples is not exact.
    assert abs(mean - unpruned) < 0.5 * (kept - unpruned)


def test_each_pass_and_the_end_are_said_once(capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture):
    infobatch = InfoBatch(N, 4, 0.5, batch_size=B)
    with caplog.at_level(logging.INFO, logger="infobatch_mm"):
        train(infobatch, infobatch.loader(list(range(N))), 4)
    lines = [each.getMessage() for each in caplog.records if each.name == "infobatch_mm"]
    summary = infobatch.summary()
    assert len(lines) == 5 and lines[0] == "InfoBatch pass 1 of 4 done: kept 100.0%, saved so far 0.0%"
    second = summary["per_pass"][1]
    kept, saved = second["kept_ratio"], 1 - (N + second["kept"]) / (2 * N)
    assert lines[1] == (
        f"InfoBatch pass 2 of 4 done: kept {kept:.1%}, saved so far {saved:.1%}, worth {second['worth']:.1%} of a full "
        f"pass (efficiency {second['efficiency']:.2f}, limit {second['limit']:.2f})"
    )
    assert lines[-1] == (
        f"InfoBatch: {summary['visits']} visits in place of {4 * N}, {summary['saved_ratio']:.1%} saved, in 4 passes"
    )


def test_the_console_is_not_silent_where_logging_is_not_set_up(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    from infobatch_mm.core import console

    monkeypatch.setattr(console.logger, "hasHandlers", lambda: False)
    console.say("a line")
    assert capsys.readouterr().err == "a line\n"
    monkeypatch.setattr(console.logger, "level", logging.WARNING)
    console.say("a line")
    assert capsys.readouterr().err == ""


def test_samples_that_never_have_a_score_are_told_of_once():
    infobatch = InfoBatch(N, 5, batch_size=B)
    loader = infobatch.loader(list(range(N)))
    with pytest.warns(UserWarning) as found:
        for _ in range(5):
            for index, _ in loader:
                infobatch.weigh(torch.where(index < 32, torch.nan, loss_of(index)), index)
    lines = [str(each.message) for each in found if "have no score" in str(each.message)]
    assert len(lines) == 1 and "32 of 40 samples have no score and are never pruned" in lines[0]
    assert infobatch.summary()["unscored_samples"] == 32 and infobatch.summary()["nonfinite_losses"] == 5 * 32


def test_a_training_of_one_pass_is_told_what_it_gets():
    with pytest.warns(
        UserWarning, match=r"prunes nothing: it is 1 pass over 40 samples.*use 2 epochs or more \(now 1\)"
    ):
        InfoBatch(N, 1)
    with pytest.warns(UserWarning, match=r"no pass starts after delta=0.875 of 4 passes.*use delta=0.75"):
        InfoBatch(N, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        InfoBatch(N, 1, policy="random", delta=1)
        InfoBatch(N, 1, policy="none")
        InfoBatch(N, 4, delta=0.75)
        InfoBatch(N, 8)


# ---- hosts and defaults --------------------------------------------------------------------------------


def test_a_compiled_step_breaks_its_graph_once():
    from torch._dynamo.utils import counters

    infobatch = InfoBatch(N, 4, batch_size=B, delta=1.0)
    model = torch.nn.Linear(1, 1)

    def step(index: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        losses = (model(x[:, None].float()) - 1).square().flatten()
        return infobatch.weigh(losses, index) * 1.0

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(step, backend="eager")
    for _ in range(4):
        for index, x in infobatch.loader(list(range(N))):
            compiled(index, x).backward()
    assert sum(counters["graph_break"].values()) == 1
    assert counters["stats"]["unique_graphs"] == 2  # before weigh() and after it, never again
    assert infobatch.passes_done == 4 and infobatch.summary()["saved_ratio"] > 0
    torch._dynamo.reset()


@pytest.fixture
def default_dtype(request: pytest.FixtureRequest):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def visits_and_state() -> tuple[list, dict]:
    infobatch = InfoBatch(N, 4, 0.3, 1.0, batch_size=B, seed=5, score="timestep")
    visits = []
    for _ in range(3):
        for index, _ in infobatch.loader(list(range(N))):
            losses = loss_of(index).to(torch.float32).requires_grad_()
            weighted = infobatch.weigh(losses, index, torch.zeros(len(index), dtype=torch.float32))
            (weights,) = torch.autograd.grad(weighted, losses)
            visits += zip(index.tolist(), weights.tolist(), strict=True)
    return visits, infobatch.state_dict()


EXPECTED = visits_and_state()


@pytest.mark.parametrize("default_dtype", [torch.bfloat16, torch.float16, torch.float64], indirect=True, ids=str)
def test_weights_and_states_are_float32_whatever_the_default_is(default_dtype: torch.dtype):
    visits, state = visits_and_state()
    assert visits == EXPECTED[0] and len({weight for _, weight in visits}) > 1
    dtypes = {key: each.dtype for key, each in state.items() if isinstance(each, torch.Tensor)}
    assert dtypes == {key: each.dtype for key, each in EXPECTED[1].items() if isinstance(each, torch.Tensor)}
    assert torch.equal(state["scores"], EXPECTED[1]["scores"])
    InfoBatch(N, 4, 0.3, 1.0, batch_size=B, seed=5, score="timestep").load_state_dict(EXPECTED[1])


def test_a_default_device_moves_nothing_of_ours():
    """Nothing of the plan, the scores or the state is made on it; ``meta`` would forget every value."""
    with torch.device("meta"):
        infobatch = InfoBatch(N, 4, 0.3, 1.0, batch_size=B, seed=5, score="timestep")
        visits = []
        for _ in range(3):
            walk = list(infobatch.sampler)  # because a DataLoader draws its seed on the default device
            for start in range(0, len(walk), B):
                index = torch.tensor(walk[start : start + B], device="cpu")
                losses = loss_of(index).requires_grad_()
                weighted = infobatch.weigh(losses, index.tolist(), torch.zeros(len(index), device="cpu"))
                (weights,) = torch.autograd.grad(weighted, losses)
                visits += zip(index.tolist(), weights.tolist(), strict=True)
        state = infobatch.state_dict()
    assert visits == EXPECTED[0]
    assert torch.equal(state["scores"], EXPECTED[1]["scores"])


class Padded:
    """As Hugging Face's data sets under ``set_transform``: a transform of whole batches, which pads to the longest."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
        width = max(indices) + 1
        return [{"x": torch.nn.functional.pad(torch.full((i + 1,), i), (0, width - i - 1))} for i in indices]


@pytest.mark.parametrize("policy", ["infobatch", "none"])
@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_transforms_that_pad_whole_batches(policy: str, ours: bool, workers: int):
    infobatch = InfoBatch(N, 2, batch_size=B, policy=policy)
    if ours:
        loader: Any = infobatch.loader(Padded(), num_workers=workers)
    else:
        loader = DataLoader(infobatch.attach(Padded()), B, sampler=infobatch.sampler, num_workers=workers)
    for _ in range(2):
        for index, batch in loader:
            assert batch["x"].shape == (B, int(index.max()) + 1)
            assert batch["x"][:, 0].tolist() == index.tolist()
            infobatch.weigh(loss_of(index), index)
    assert infobatch.passes_done == 2


def test_attach_with_a_collate_function_as_documented():
    def collate(items: list[dict]) -> dict:
        return {"boxes": [each["boxes"] for each in items], "x": torch.stack([each["x"] for each in items])}

    data = [{"x": torch.tensor([i]), "boxes": torch.zeros(i % 3, 4)} for i in range(N)]
    infobatch = InfoBatch(N, 2, batch_size=B)

    def indexed(pairs: list[tuple[int, dict]]) -> tuple[torch.Tensor, dict]:
        index, items = zip(*pairs, strict=True)
        return torch.tensor(index), collate(list(items))

    theirs = DataLoader(infobatch.attach(data), B, sampler=infobatch.sampler, collate_fn=indexed)
    ours = InfoBatch(N, 2, batch_size=B).loader(data, collate_fn=collate)
    for loader in (theirs, ours):
        for index, batch in loader:
            assert batch["x"].flatten().tolist() == index.tolist()
            assert [len(each) for each in batch["boxes"]] == [i % 3 for i in index.tolist()]


# ---- messages ------------------------------------------------------------------------------------------


def test_a_loader_that_shuffles_by_itself_is_told_of_the_sampler():
    infobatch = InfoBatch(N, 2, batch_size=B)
    index, _ = next(iter(DataLoader(infobatch.attach(list(range(N))), B, shuffle=True)))
    with pytest.raises(ValueError, match=r"sampler=infobatch.sampler in the place of shuffle=True"):
        infobatch.weigh(loss_of(index), index)


@pytest.mark.parametrize("name", ["prune_ratio", "delta", "score_ema", "num_epochs", "batch_size", "seed"])
def test_quotes_are_named(name: str):
    value = "4" if name in ("num_epochs", "batch_size", "seed") else "0.5"
    settings: dict[str, Any] = {"num_epochs": 2, name: value}
    with pytest.raises(ValueError, match=f"{name}='{value}' .*leave out the quotes"):
        InfoBatch(N, **settings)
    with pytest.raises(ValueError, match=f"{name}='half' is (text, not a number|not a whole number)"):
        InfoBatch(N, **{**settings, name: "half"})


# ---- what a new user found -----------------------------------------------------------------------------


def test_the_length_of_the_training_is_known_and_going_beyond_it_is_said_once():
    infobatch = InfoBatch(N, max_train_steps=25, batch_size=B, delta=0.5)
    loader = infobatch.loader(list(range(N)))
    assert infobatch.num_passes == 3
    train(infobatch, loader, infobatch.num_passes)
    with pytest.warns(UserWarning) as found:
        for _ in range(2):
            for index, _ in loader:
                infobatch.weigh(loss_of(index), index)
    lines = [str(each.message) for each in found if "which is done" in str(each.message)]
    assert len(lines) == 1 and "pass 4 of a training of 3" in lines[0] and "infobatch.num_passes" in lines[0]


@pytest.mark.parametrize("length", [20, 80])
def test_a_scheduler_of_another_length_is_said_with_both_numbers(length: int):
    infobatch = InfoBatch(N, 4, batch_size=B, delta=0.5)
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.warns(UserWarning, match=f"made for {length} steps, this training makes 40"):
        infobatch.schedule(OneCycleLR(optimizer, 0.1, total_steps=length))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        infobatch.schedule(OneCycleLR(optimizer, 0.1, total_steps=40))
        infobatch.schedule(OneCycleLR(optimizer, 0.1, total_steps=4), interval="epoch")
        infobatch.schedule(OneCycleLR(optimizer, 0.1, total_steps=20), every=2)


def test_skipped_visits_are_in_the_last_line(caplog: pytest.LogCaptureFixture):
    infobatch = InfoBatch(N, 2, batch_size=B, delta=0.5)
    with caplog.at_level(logging.INFO, logger="infobatch_mm"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            for number, (index, _) in enumerate(infobatch.loader(list(range(N)))):
                if number:
                    infobatch.weigh(loss_of(index), index)
    last = caplog.records[-1].getMessage()
    assert last == "InfoBatch: 72 visits and 8 skipped in place of 80, 0.0% saved, in 2 passes"


def test_a_run_is_written(tmp_path: Any):
    from infobatch_mm.core import read_scores

    infobatch = InfoBatch(N, 2, batch_size=B, delta=0.5)
    train(infobatch, infobatch.loader(list(range(N))), 2)
    infobatch.write(tmp_path / "new", [f"{i}.png" for i in range(N)])
    assert read_scores(tmp_path / "new")["name"][3] == "3.png"
    assert (tmp_path / "new/infobatch_summary.json").is_file()


def test_what_is_given_in_the_place_of_a_number_is_named():
    with pytest.raises(ValueError, match=r"num_samples=list\(\.\.\.\) is not a whole number: give its length"):
        InfoBatch([1, 2, 3], 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"num_epochs=10\.0 is not a whole number but a float, write 10"):
        InfoBatch(N, 10.0)  # type: ignore[arg-type]
    infobatch = InfoBatch(N, 2, batch_size=B, delta=0.5)
    index, _ = next(iter(infobatch.loader(list(range(N)))))
    with pytest.raises(ValueError, match=r"8 losses but 4 sample indices.*prior preservation.*weigh\(losses\[:4\]"):
        infobatch.weigh(torch.ones(8), index)
