"""Runs whose models and hooks do what real ones do: leave a batch out, evaluate it twice, walk the loader in between.

At random, for both loops. A twin in dicts says what each batch must weigh and what the books must hold.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mmseg")
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmseg.models import EncoderDecoder
from mmseg.registry import MODELS
from reference import is_below, kept_count, mean_score

from .toy import EPOCHS, ONE_LINE, config

DEEDS = ["train", "train", "train", "skip", "twice", "evaluate", "nan"]


@MODELS.register_module(force=True)
class Clumsy(EncoderDecoder):
    """Does in each step what it was told to; its scores are written down."""

    script: random.Random
    deeds: list[str]

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, torch.Tensor]:
        deed = self.script.choice(DEEDS)
        self.deeds.append(deed)
        if deed == "skip":
            return {}
        if deed == "twice":  # as of optimisers that look at the loss once more
            with optim_wrapper.optim_context(self):
                self.parse_losses(self._run_forward(self.data_preprocessor(data, True), mode="loss"))
        if deed == "evaluate":
            self.eval()
            with torch.no_grad():
                self._run_forward(self.data_preprocessor(data, True), mode="loss")
            self.train()
        if deed == "nan":  # no step is made of it, as where gradients overflow
            bias = self.decode_head.conv_seg.bias
            healthy = bias.data.clone()
            bias.data.fill_(float("nan"))
            self.parse_losses(self._run_forward(self.data_preprocessor(data, True), mode="loss"))
            bias.data.copy_(healthy)
            return {}
        return super().train_step(data, optim_wrapper)


class Walker(Hook):
    """Walks the training data where others are in the midst of it."""

    priority = "VERY_HIGH"

    def __init__(self, script: random.Random) -> None:
        self.script = script

    def before_train_epoch(self, runner: Any) -> None:
        next(iter(runner.train_dataloader))

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if self.script.random() < 0.3:
            next(iter(runner.train_dataloader))

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.before_train_iter(runner, batch_idx)


class Journal(Hook):
    """What each step was made of, by the hook and by the files of the batch itself, and what it left behind."""

    priority = "LOWEST"

    def __init__(self) -> None:
        self.indices: list[list[int]] = []
        self.weights: list[list[float]] = []
        self.names: list[list[str]] = []
        self.states: list[tuple[list[float], list[bool], int]] = []

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        hook = self.hook(runner)
        self.indices.append(hook._run.batch.indices.tolist())
        self.weights.append(hook._weigher.weights_on(torch.device("cpu")).tolist())
        self.names.append([Path(sample.img_path).name for sample in data_batch["data_samples"]])

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        pruner = self.hook(runner)._pruner
        pruner.store.flush()
        self.states.append((pruner.store.values.tolist(), pruner.store.seen.tolist(), pruner.pass_index))

    @staticmethod
    def hook(runner: Any) -> Any:
        return next(hook for hook in runner.hooks if type(hook).__name__ == "InfoBatchHook")


def train(scenes: Path, folder: Path, number: int, **overrides: Any) -> tuple[Clumsy, Journal]:
    cfg = config(scenes, folder, custom_hooks=ONE_LINE, **overrides)
    cfg.model.type = "Clumsy"
    runner = Runner.from_cfg(cfg)
    model = runner.model
    model.script, model.deeds = random.Random(number), []
    journal = Journal()
    runner.register_hook(journal)
    runner.register_hook(Walker(random.Random(number + 1)))
    runner.train()
    return model, journal


@pytest.mark.parametrize("loop", ["iterations", "epochs"])
@pytest.mark.parametrize("number", [0, 1, *(pytest.param(each, marks=pytest.mark.slow) for each in (2, 3))])
def test_no_run_is_derailed(scenes: Path, tmp_path: Path, loop: str, number: int):
    overrides = {**EPOCHS, "train_dataloader.drop_last": True} if loop == "epochs" else {}
    model, journal = train(scenes, tmp_path, number, **overrides)
    states = journal.states
    names = {
        (i, name) for step in zip(journal.indices, journal.names, strict=True) for i, name in zip(*step, strict=True)
    }
    assert len(names) == 22, "an index is of one image"
    assert {"skip", "twice", "evaluate", "nan"} <= set(model.deeds)
    summary = json.loads((tmp_path / "infobatch_summary.json").read_text())
    before: tuple[list[float], list[bool], int] = ([0.0] * 22, [False] * 22, -1)
    at_begin = before
    kept, skipped = {}, {}
    for step, (deed, indices, weights, state) in enumerate(
        zip(model.deeds, journal.indices, journal.weights, states, strict=True)
    ):
        current = state[2]
        if step == 0 or current != states[step - 1][2]:
            at_begin = states[step - 1] if step else before
            handed: set[int] = set()
        assert not handed & set(indices), "a sample was visited twice"
        handed |= set(indices)
        # The weights are of the samples of this very batch, whatever was walked in between.
        scores = [score if seen else None for score, seen in zip(*at_begin[:2], strict=True)]
        assert weights == pytest.approx(expected_weights(scores, indices, weights), rel=1e-5)
        counts = skipped if deed == "skip" else kept
        counts[current] = counts.get(current, 0) + len(indices)
        last = states[step - 1] if step else before
        changed = {i for i in range(22) if state[0][i] != last[0][i] or state[1][i] != last[1][i]}
        assert changed <= set(indices)
        if deed in ("skip", "nan"):
            assert not changed
        else:
            assert all(state[1][i] for i in indices)
    for entry in summary["per_pass"]:
        assert entry["kept"] == kept.get(entry["pass"], 0)
        assert entry["skipped"] == skipped.get(entry["pass"], 0)
    assert summary["visits_skipped"] == sum(skipped.values()) > 0
    assert summary["passes_done"] == 6 and max(map(max, journal.weights)) > 1
    assert summary["nonfinite_losses"] == 4 * model.deeds.count("nan")


def expected_weights(scores: list[float | None], indices: list[int], weights: list[float]) -> list[float]:
    """By brute force; a pass that is not pruned weighs all alike."""
    mean = mean_score(scores)
    if mean is None or max(weights) == 1:
        return [1.0] * len(indices)
    well = {i for i, score in enumerate(scores) if score is not None and is_below(score, mean)}
    kept = kept_count(len(well), 22 - len(well), 0.5, 4)
    return [len(well) / kept if i in well else 1.0 for i in indices]


def test_a_model_that_trains_past_its_losses_is_refused(scenes: Path, tmp_path: Path):
    class PastIt(EncoderDecoder):
        def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, torch.Tensor]:
            loss = sum(parameter.square().sum() for parameter in self.parameters())
            optim_wrapper.update_params(loss)
            return {"loss": loss}

    MODELS.register_module(module=PastIt, force=True)
    cfg = config(scenes, tmp_path, custom_hooks=ONE_LINE)
    cfg.model.type = "PastIt"
    with pytest.raises(ValueError, match="PastIt computed no loss that InfoBatchHook has a view of"):
        Runner.from_cfg(cfg).train()
