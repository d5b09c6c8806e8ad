"""The universal path in steps that follow each other: what is learned of a loss in the first, and what it remembers."""

import pytest
import torch
from torch import nn

pytest.importorskip("mmseg")
from mmseg.models.decode_heads import FCNHead
from mmseg.models.losses import CrossEntropyLoss
from mmseg.registry import MODELS
from oracle import (
    assert_close_gradients,
    assert_same_tensors,
    fcn,
    gradients,
    make_inputs,
    make_labels,
    make_samples,
    make_weights,
    total,
)
from oracle_losses import (
    labels_of,
    losses_alone,
    passes,
    shown,
    shown_by_own,
    tiny_model,
    weighted,
    weighted_mean,
    with_head,
)

from infobatch_mm.losses import LossWeigher, SampleLosses, attach_views, register_loss_view, registry

SIZE = (8, 8)


def make_batch(batch=4, seed=0, dtype=torch.float64, blank=None):
    labels = make_labels(batch, SIZE, seed=30 + seed, blank=blank)
    return make_inputs(batch, (32, 32), dtype, seed=20 + seed), make_samples(labels)


def with_loss(loss, auxiliary=False):
    """The tiny model with this loss module, in its auxiliary head if that is asked for."""
    model = tiny_model(auxiliary_head=fcn(0, 4, num_convs=0) if auxiliary else None, dtype=torch.float64)
    (model.auxiliary_head if auxiliary else model.decode_head).loss_decode = loss
    return model.double()


def attached(model):
    weigher = LossWeigher()
    attach_views(model, weigher)
    return weigher


def step(model, batch, weigher=None, weights=None, pruned=True):
    """Losses, gradients and scores."""
    if weigher is not None:
        weigher.begin(torch.ones(len(batch[1])) if weights is None else weights, pruned=pruned)
    model.zero_grad()
    losses = model.loss(*batch)
    total(losses).backward()
    return losses, gradients(model), weigher.end() if weigher else None


def objective(model, batch, weights, form):
    """Gradients of the weighted objective, from the untouched head's loss on each sample alone."""
    logits = model.decode_head(model.extract_feat(batch[0]))
    alone = losses_alone(lambda *given: total(model.decode_head.loss_by_feat(*given)), len(logits), logits, batch[1])
    form(alone, weights).backward()
    return gradients(model), [float(each.detach()) for each in alone]


# ---------------------------------------------------------------- losses that are summed over the batch


class SummedLoss(nn.Module):
    """Nobody knows it, and that the loss inside it is a sum over all pixels."""

    loss_name = "loss_summed"

    def __init__(self):
        super().__init__()
        self.inner = CrossEntropyLoss(reduction="sum")

    def forward(self, pred, label, weight=None, ignore_index=255):
        return self.inner(pred, label, weight, ignore_index=ignore_index)


@pytest.mark.parametrize("batches", [[4], [4, 2, 3], [2, 4], [1, 4]], ids=str)
def test_a_loss_that_is_summed_over_the_batch_stays_a_sum(batches):
    """In the first step and in later ones, of whatever size."""
    model, host = with_loss(SummedLoss()), with_loss(SummedLoss())
    weigher = attached(model)
    for seed, size in enumerate(batches):
        batch = make_batch(size, seed)
        ours, theirs = step(model, batch, weigher), step(host, batch)
        torch.testing.assert_close(total(ours[0]), total(theirs[0]), rtol=1e-9, atol=0)
        assert_close_gradients(ours[1], theirs[1], 1e-8)


@pytest.mark.parametrize("weights", [make_weights(), torch.zeros(4)], ids=["uneven", "zero"])
def test_a_summed_loss_is_weighed(weights):
    model, host, batch = with_loss(SummedLoss()), with_loss(SummedLoss()), make_batch()
    losses, ours, (scores, _) = step(model, batch, attached(model), weights)
    expected, alone = objective(host, batch, weights, weighted)
    mean = shown([torch.tensor(each) for each in alone], weights)
    assert float(total(losses).detach()) == pytest.approx(mean, rel=1e-6)
    assert scores.tolist() == pytest.approx(alone, rel=1e-6)
    if weights.any():
        assert_close_gradients(ours, expected, 1e-8)
    else:
        assert all(not gradient.any() for gradient in ours.values())


def test_that_a_loss_is_summed_is_learned_from_a_sample_with_labels():
    model, host = with_loss(SummedLoss()), with_loss(SummedLoss())
    weigher = attached(model)
    for batch in (make_batch(blank=0), make_batch(seed=1)):
        assert_close_gradients(step(model, batch, weigher)[1], step(host, batch)[1], 1e-8)


class UnevenMean(nn.Module):
    loss_name = "loss_mean"

    def forward(self, pred, label, weight=None, ignore_index=255):
        return nn.functional.cross_entropy(pred, label, ignore_index=ignore_index)


def test_a_mean_over_uneven_samples_stays_a_mean():
    model, host, batch, weights = with_loss(UnevenMean()), with_loss(UnevenMean()), make_batch(), make_weights()
    ours = step(model, batch, attached(model), weights)[1]
    assert_close_gradients(ours, objective(host, batch, weights, weighted_mean)[0], 1e-8)


# ---------------------------------------------------------------- losses that remember


class Remembering(nn.Module):
    """Divides by a moving average of its own values, and counts its calls."""

    loss_name = "loss_remembering"

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.ones((), dtype=torch.float64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, pred, label, weight=None, ignore_index=255):
        loss = nn.functional.cross_entropy(pred, label, ignore_index=ignore_index, reduction="none").mean()
        self.remember(loss.detach())
        return loss / self.average

    def remember(self, value):
        self.calls += 1
        self.average.mul_(0.5).add_(0.5 * value)


class Reassigning(Remembering):
    def remember(self, value):
        self.calls = self.calls + 1
        self.average = 0.5 * self.average + 0.5 * value


class OnlyOfLabels(Remembering):
    """Remembers nothing of a batch that has no label."""

    def remember(self, value):
        if float(value) > 0:
            super().remember(value)


@passes
@pytest.mark.parametrize("auxiliary", [False, True], ids=["scored", "unscored"])
@pytest.mark.parametrize("loss", [Remembering, Reassigning])
def test_what_a_loss_remembers_is_the_hosts(loss, auxiliary, pruned):
    model, host = with_loss(loss(), auxiliary), with_loss(loss(), auxiliary)
    weigher = attached(model)
    for seed in range(3):
        batch = make_batch(seed=seed)
        ours, theirs = step(model, batch, weigher, make_weights() if pruned else None, pruned), step(host, batch)
        assert_same_tensors(dict(model.named_buffers()), dict(host.named_buffers()))
        assert list(ours[0]) == list(theirs[0])
        if not pruned:
            for key, value in theirs[0].items():
                torch.testing.assert_close(ours[0][key], value, rtol=1e-6 if auxiliary else 1e-12, atol=0)
            assert_close_gradients(ours[1], theirs[1], 1e-8)
    head = host.auxiliary_head if auxiliary else host.decode_head
    assert head.loss_decode.calls == 3 and head.loss_decode.average != 1


@passes
@pytest.mark.parametrize("loss", [Remembering, Reassigning])
def test_the_score_of_a_sample_does_not_depend_on_its_place(loss, pruned):
    """Each is evaluated with what the loss remembered before the step."""
    inputs, samples = make_batch()
    order, scores = [2, 0, 3, 1], []
    for places in (range(4), order):
        model = with_loss(loss())
        batch = inputs[list(places)], [samples[i] for i in places]
        scores.append(step(model, batch, attached(model), pruned=pruned)[2][0])
    torch.testing.assert_close(scores[1], scores[0][order], rtol=1e-6, atol=0)


@passes
def test_what_a_loss_remembers_of_some_samples_only_is_the_hosts(pruned):
    model, host = with_loss(OnlyOfLabels()), with_loss(OnlyOfLabels())
    weigher = attached(model)
    for batch in (make_batch(blank=0), make_batch(seed=1)):
        step(model, batch, weigher, pruned=pruned), step(host, batch)
        assert_same_tensors(dict(model.named_buffers()), dict(host.named_buffers()))


def remembering_view(loss, pred, label, weight=None, ignore_index=255):
    """Calls the host, which remembers, and takes its value apart."""
    value = loss(pred, label, weight, ignore_index)
    pixels = nn.functional.cross_entropy(pred, label, ignore_index=ignore_index, reduction="none").flatten(1)
    counts = (label != ignore_index).flatten(1).sum(1)
    return SampleLosses(pixels.sum(1), label.numel() * loss.average, counts, value)


@passes
@pytest.mark.parametrize("loss", [Remembering, Reassigning])
def test_the_comparison_of_a_registered_function_leaves_no_trace(loss, pruned, monkeypatch):
    monkeypatch.setattr(registry, "_LOSSES", dict(registry._LOSSES))
    register_loss_view(loss)(remembering_view)
    model, host = with_loss(loss()), with_loss(loss())
    weigher = attached(model)
    for seed in range(2):
        batch = make_batch(seed=seed)
        ours, theirs = step(model, batch, weigher, pruned=pruned), step(host, batch)
        assert_same_tensors(dict(model.named_buffers()), dict(host.named_buffers()))
        assert_close_gradients(ours[1], theirs[1], 1e-8)


# ---------------------------------------------------------------- another batch between begin and end


class OwnHead(FCNHead):
    def loss_by_feat(self, seg_logits, batch_data_samples):
        return dict(loss_own=nn.functional.cross_entropy(seg_logits, labels_of(batch_data_samples), ignore_index=255))


MODELS_UNDER_TEST = {
    "vectorised": tiny_model,
    "universal": lambda: with_head(OwnHead),
    "samplewise": lambda: with_head(FCNHead, loss_decode=MODELS.build(dict(type="TverskyLoss"))),
}
every_model = pytest.mark.parametrize("make", MODELS_UNDER_TEST.values(), ids=MODELS_UNDER_TEST.keys())


@passes
@every_model
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("size", [4, 2, 1])
def test_a_batch_that_is_evaluated_between_is_the_hosts_and_leaves_scores_alone(make, size, when, pruned):
    model, host = make(), make()
    weigher, batch, other = attached(model), make_batch(dtype=torch.float32), make_batch(size, 9, torch.float32)
    weights = make_weights() if pruned else torch.ones(4)
    expected_gradients, expected = step(model, batch, weigher, weights, pruned)[1:]
    evaluated = []

    def evaluate():
        for each in (model, host):
            each.eval()
            evaluated.append(each.loss(*other))
            each.train()

    weigher.begin(weights, pruned=pruned)
    model.zero_grad()
    if when == "before":
        evaluate()
    losses = model.loss(*batch)
    if when == "after":
        evaluate()
    total(losses).backward()
    scores, valid = weigher.end()
    assert_same_tensors(evaluated[0], evaluated[1])
    assert torch.equal(scores, expected[0]) and torch.equal(valid, expected[1])
    assert_same_tensors(gradients(model), expected_gradients)


# ---------------------------------------------------------------- settings beside predictions


class LevelsHead(FCNHead):
    """As many levels, and weights of levels, as the batch has samples."""

    def forward(self, inputs):
        logits = super().forward(inputs)
        return [logits * k for k in (1, 2, 3, 4)], [1, 0.5, 0.25, 0.125]

    def loss(self, inputs, batch_data_samples, train_cfg):
        return self.loss_by_feat(*self.forward(inputs), batch_data_samples)

    def loss_by_feat(self, levels, level_weights, batch_data_samples):
        labels = labels_of(batch_data_samples)
        losses = [
            weight * nn.functional.cross_entropy(level, labels, ignore_index=255)
            for level, weight in zip(levels, level_weights, strict=True)
        ]
        return dict(loss_levels=sum(losses))


@passes
@pytest.mark.parametrize("batch_size", [2, 4])
def test_weights_of_levels_are_no_samples(batch_size, pruned):
    model, host = with_head(LevelsHead, torch.float64), with_head(LevelsHead, torch.float64)
    batch, weights = make_batch(batch_size), make_weights(batch_size) if pruned else torch.ones(batch_size)
    losses, ours, (scores, _) = step(model, batch, attached(model), weights, pruned)
    levels, level_weights = host.decode_head(host.extract_feat(batch[0]))
    alone = [
        total(host.decode_head.loss_by_feat([each[i : i + 1] for each in levels], level_weights, batch[1][i : i + 1]))
        for i in range(batch_size)
    ]
    assert scores.tolist() == pytest.approx([float(each.detach()) for each in alone], rel=1e-6)
    value = total(host.loss(*batch))
    assert float(total(losses).detach()) == pytest.approx(shown_by_own(value, alone, weights), rel=1e-6)
    if pruned:
        weighted_mean(alone, weights).backward()
    else:
        total(host.loss(*batch)).backward()
    assert_close_gradients(ours, gradients(host), 1e-8)


# ---------------------------------------------------------------- settings that change in a run


class SettableLoss(UnevenMean):
    loss_weight = 1.0

    def forward(self, *args, **kwargs):
        return self.loss_weight * super().forward(*args, **kwargs)


LOSSES = {
    "cross_entropy": CrossEntropyLoss,
    "binary": lambda: CrossEntropyLoss(use_sigmoid=True),
    "dice": lambda: MODELS.build(dict(type="DiceLoss")),
    "tversky": lambda: MODELS.build(dict(type="TverskyLoss")),
    "lovasz": lambda: MODELS.build(dict(type="LovaszLoss", reduction="none")),
    "unknown": SettableLoss,
}


@passes
@pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES.keys())
def test_a_loss_weight_that_changes_in_a_run_changes_scores_and_gradients_alike(make, pruned):
    model = with_loss(make()).float()
    batch, weights = make_batch(dtype=torch.float32), make_weights() if pruned else torch.ones(4)
    weigher, results = attached(model), []
    for loss_weight in (1.0, 0.25):
        model.decode_head.loss_decode.loss_weight = loss_weight
        results.append(step(model, batch, weigher, weights, pruned))
    (_, before, (scores, _)), (_, after, (changed, _)) = results
    torch.testing.assert_close(changed, scores / 4, rtol=1e-6, atol=0)
    assert_close_gradients(after, {name: gradient / 4 for name, gradient in before.items()}, 1e-4)
