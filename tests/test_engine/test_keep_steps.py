"""``keep="steps"`` in MMEngine: the host's iterations on smaller batches, at learning rates to match."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mmseg")

from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner

from .processes import GROUP_NORM, Run
from .toy import EPOCHS, KillAt, Killed, Recorder, config, train

N, B, ITERS = 22, 4, 33
KEEP = dict(type="infobatch", prune_ratio=0.8, delta=0.75, keep="steps")
#: By loop: iterations of a full pass, of which six make the training.
FULL = {"iterations": N // B, "epochs": math.ceil(N / B)}


class Inside(Hook):
    """Learning rates within the steps of a run's optimisers, one list for each iteration that made any."""

    priority = "LOWEST"

    def __init__(self) -> None:
        self.rates: list[list[float]] = []
        self.optimizers: list[Any] = []
        self.iterations: list[int] = []
        self._iter = -1

    def before_train(self, runner: Any) -> None:
        wrapper = runner.optim_wrapper
        wrappers = list(wrapper.values()) if isinstance(wrapper, OptimWrapperDict) else [wrapper]
        self.optimizers = [each.optimizer for each in wrappers]
        for optimizer in self.optimizers:
            optimizer.register_step_pre_hook(self._look)  # after ours, which the hook's wiring has put there

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self._iter = runner.iter

    def _look(self, optimizer: Any, *_: Any) -> None:
        if self._iter not in self.iterations:
            self.iterations.append(self._iter)
            self.rates.append([])
        self.rates[-1].append(float(optimizer.param_groups[0]["lr"]))


def overrides_of(loop: str, policy: dict[str, Any] = KEEP, **more: Any) -> dict[str, Any]:
    by_iteration = [dict(type="PolyLR", power=0.9, eta_min=1e-4, by_epoch=False, begin=0, end=6 * FULL["epochs"])]
    epochs = {**EPOCHS, "param_scheduler": by_iteration} if loop == "epochs" else {}
    return {**GROUP_NORM, **epochs, "custom_hooks": [dict(type="InfoBatchHook", policy=policy)], **more}


def trained(scenes: Path, work_dir: Path, loop: str, **more: Any) -> tuple[Runner, Recorder, Inside]:
    inside = Inside()
    runner, recorder = train(config(scenes, work_dir, **overrides_of(loop, **more)), inside)
    return runner, recorder, inside


def by_pass(runner: Runner, recorder: Recorder, loop: str) -> list[list[list[int]]]:
    """Batches of each pass: as many as a full one has; and as many visits as the summary states."""
    kept = [entry["kept"] for entry in summary(runner)["per_pass"]]
    whole = FULL[loop]
    passes = [recorder.indices[start : start + whole] for start in range(0, len(recorder.indices), whole)]
    assert [sum(map(len, batches)) for batches in passes] == kept
    return passes


def summary(runner: Runner) -> dict[str, Any]:
    return json.loads(Path(runner.work_dir, "infobatch_summary.json").read_text())


LOOPS = pytest.mark.parametrize("loop", ["iterations", "epochs"])


@LOOPS
@pytest.mark.parametrize("rule", ["sqrt", pytest.param("linear", marks=pytest.mark.slow)])
def test_pruned_passes_make_the_iterations_of_full_ones(scenes: Path, tmp_path: Path, loop: str, rule: str) -> None:
    policy = {**KEEP, "lr_rule": rule}
    workers = {"train_dataloader.num_workers": 2, "train_dataloader.persistent_workers": True}
    runner, recorder, inside = trained(
        scenes, tmp_path / "ours", loop, policy=policy, **(workers if rule == "sqrt" else {})
    )
    passes = by_pass(runner, recorder, loop)
    # The last pass of the iteration loop is partial: 33 iterations of 4 are six passes of 22.
    assert len(passes) == 6 and runner.iter == runner.max_iters == sum(map(len, passes))
    assert set(recorder.max_iters) == {runner.max_iters}  # known from the begin
    smaller = 0
    for number, batches in enumerate(passes):
        visited = sum(batches, [])
        assert len(set(visited)) == len(visited)
        sizes = {len(batch) for batch in batches}
        if number in (0, 5):
            assert len(visited) == (N if loop == "epochs" else N - N % B)
        else:
            assert len(sizes) == 1
            smaller += max(sizes) < B
    assert smaller >= 3
    power = {"sqrt": 0.5, "linear": 1.0}[rule]
    for place, ((within,), rate, batch) in enumerate(zip(inside.rates, recorder.lrs, recorder.indices, strict=True)):
        share = len(batch) / B if 0 < place // FULL[loop] < 5 else 1.0
        assert within == (rate * share**power if share < 1 else rate)

    full, unpruned, _ = trained(scenes, tmp_path / "full", loop, policy={**KEEP, "prune_ratio": 0.0})
    assert full.iter == runner.iter
    assert unpruned.lrs == recorder.lrs  # the host's own, at every iteration


@LOOPS
def test_the_run_gives_the_optimizer_and_the_loaders_batches_back(scenes: Path, tmp_path: Path, loop: str) -> None:
    lengths: list[tuple[int, int]] = []

    class Length(Hook):
        def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
            lengths.append((len(runner.train_dataloader), runner.train_dataloader.batch_size))

    inside = Inside()
    policy = {**KEEP, "delta": 1.0}
    recorder = train(config(scenes, tmp_path, **overrides_of(loop, policy)), inside, Length())[1]
    assert set(lengths) <= {(FULL[loop], B), (math.ceil(N / B), B)}
    assert len(recorder.indices[-1]) < B  # the last pass is one of smaller batches
    (optimizer,) = inside.optimizers
    hooks = [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]
    assert hooks == [inside._look]


@pytest.mark.parametrize("accumulated", [2, 4])
def test_accumulated_gradients_make_as_many_updates(scenes: Path, tmp_path: Path, accumulated: int) -> None:
    more = {"optim_wrapper.accumulative_counts": accumulated}
    _, recorder, inside = trained(scenes, tmp_path / "ours", "iterations", **more)
    *_, unpruned = trained(scenes, tmp_path / "full", "iterations", policy={**KEEP, "prune_ratio": 0.0}, **more)
    assert inside.iterations == unpruned.iterations  # the last one for a remainder of iterations
    for (within,), (full,), place in zip(inside.rates, unpruned.rates, inside.iterations, strict=True):
        share = len(recorder.indices[place]) / B
        assert within == (full * math.sqrt(share) if share < 1 else full)


def test_every_wrapper_of_a_dict_has_the_factor(scenes: Path, tmp_path: Path) -> None:
    from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIMIZERS
    from mmseg.models import EncoderDecoder
    from mmseg.registry import MODELS

    @OPTIM_WRAPPER_CONSTRUCTORS.register_module(name="TwoPartsOfIt", force=True)
    class TwoPartsOfIt:
        def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: Any = None) -> None:
            self.optimizer = optim_wrapper_cfg["optimizer"]

        def __call__(self, model: Any) -> OptimWrapperDict:
            parts = {"backbone": (model.backbone, 0.1), "head": (model.decode_head, 0.5)}
            return OptimWrapperDict(
                **{
                    name: OptimWrapper(
                        OPTIMIZERS.build({**self.optimizer, "lr": lr, "params": list(part.parameters())})
                    )
                    for name, (part, lr) in parts.items()
                }
            )

    @MODELS.register_module(name="TwoStepped", force=True)
    class TwoStepped(EncoderDecoder):
        def train_step(self, data: Any, optim_wrapper: Any) -> dict:
            data = self.data_preprocessor(data, True)
            loss, log = self.parse_losses(self._run_forward(data, mode="loss"))
            for i, wrapper in enumerate(optim_wrapper.values()):
                wrapper.backward(wrapper.scale_loss(loss), retain_graph=i == 0)
            for wrapper in optim_wrapper.values():
                wrapper.step()
                wrapper.zero_grad()
            return log

    cfg = config(scenes, tmp_path, **overrides_of("iterations", **{"model.type": "TwoStepped"}))
    cfg.optim_wrapper = dict(constructor="TwoPartsOfIt", optimizer=dict(type="SGD", lr=0.1))
    cfg.param_scheduler = None
    inside = Inside()
    _, recorder = train(cfg, inside)
    assert any(len(batch) < B for batch in recorder.indices)
    for rates, batch in zip(inside.rates, recorder.indices, strict=True):
        assert rates == pytest.approx([0.1 * math.sqrt(len(batch) / B), 0.5 * math.sqrt(len(batch) / B)])


SHORT_KILLS = [
    ("iterations", 13, 4),
    pytest.param("iterations", 9, 8, marks=pytest.mark.slow),
    pytest.param("epochs", 17, 8, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("loop", "kill", "interval"), SHORT_KILLS)
def test_a_killed_run_goes_on_with_the_same_samples_weights_and_rates(
    scenes: Path, tmp_path: Path, loop: str, kill: int, interval: int
) -> None:
    """To the bit, with images read under seeds of their own."""
    hooks = [dict(type="InfoBatchHook", policy=KEEP, item_seed=True)]

    def cfg(name: str, **more: Any) -> Any:
        made = config(scenes, tmp_path / name, **overrides_of(loop, **{"custom_hooks": hooks, **more}))
        made.default_hooks.checkpoint.update(interval=interval, by_epoch=False)
        return made

    straight_inside, resumed_inside = Inside(), Inside()
    _, straight = train(cfg("straight"), straight_inside)
    with pytest.raises(Killed):
        train(cfg("killed"), KillAt(kill))
    _, resumed = train(cfg("killed", resume=True), resumed_inside)
    start = kill // interval * interval
    assert resumed.indices == straight.indices[start:] and len(straight.indices[start]) < B
    assert resumed.weights == straight.weights[start:]
    assert resumed.lrs == straight.lrs[start:]
    assert resumed_inside.rates == straight_inside.rates[start:]
    assert resumed.losses == straight.losses[start:]


def test_a_batch_of_one_image_for_each_process_is_refused_before_training(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the global batch_size=1 is the smallest: give each process 2 samples"):
        train(config(scenes, tmp_path, **overrides_of("iterations", **{"train_dataloader.batch_size": 1})))


# ---- two ranks ------------------------------------------------------------------------------------------


def write_rates_within(rank: int, runner: Runner) -> None:
    """Have a rank write down the rate within each of its steps."""

    class Within(Inside):
        def after_train(self, runner: Any) -> None:
            Path(runner.work_dir, f"within.{rank}.json").write_text(json.dumps(self.rates))

    runner.register_hook(Within())


@pytest.mark.dist
@pytest.mark.timeout(300)
@LOOPS
def test_ranks_make_as_many_iterations_on_equal_shares(scenes: Path, tmp_path: Path, loop: str) -> None:
    off = dict.fromkeys(("val_dataloader", "val_cfg", "val_evaluator"))
    cfg = config(scenes, tmp_path, **overrides_of(loop, **{"train_dataloader.batch_size": 4, **off}))
    run = Run(cfg, 2, write_rates_within).finish()
    journals = [run.journal(rank) for rank in range(2)]
    within = [json.loads((tmp_path / f"within.{rank}.json").read_text()) for rank in range(2)]
    whole = {"iterations": N // 8, "epochs": math.ceil(N / 8)}[loop]
    smaller = 0
    for number in range(1, 4):
        both = [[entry for entry in journal if entry["pass"] == number] for journal in journals]
        assert [len(entries) for entries in both] == [whole, whole]
        sizes = {len(entry["indices"]) for entries in both for entry in entries}
        assert len(sizes) == 1
        smaller += max(sizes) < 4
        visited = [i for entries in both for entry in entries for i in entry["indices"]]
        assert len(set(visited)) == len(visited)
    assert smaller >= 1
    assert within[0] == within[1]
    for entry, (rate,) in zip(journals[0], within[0], strict=True):
        share = len(entry["indices"]) / 4 if any(weight != 1 for weight in entry["weights"]) else 1.0
        assert rate == pytest.approx(entry["lr"] * math.sqrt(share), rel=1e-12)
