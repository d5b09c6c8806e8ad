"""Views leave no trace: not in the random generators, nor in copies of the model, nor after a run."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("mmseg")
from copies import every_copy
from mmengine.model import ExponentialMovingAverage
from mmseg.models.decode_heads import FCNHead
from mmseg.registry import MODELS
from oracle import (
    assert_same_tensors,
    fcn,
    gradients,
    make_inputs,
    make_labels,
    make_samples,
    make_weights,
    total,
)
from oracle_losses import labels_of, passes, tiny_model, with_head

import infobatch_mm.losses.hosts.mmseg  # noqa: F401 - registers for good what a test must not register for itself
from infobatch_mm.losses import LossWeigher, attach_views, register_head_rule, register_samplewise_loss, registry

SIZE = (8, 8)


def make_batch(seed=0):
    return make_inputs(size=(32, 32), seed=20 + seed), make_samples(make_labels(size=SIZE, seed=30 + seed))


class OwnHead(FCNHead):
    def loss_by_feat(self, seg_logits, batch_data_samples):
        return dict(loss_own=nn.functional.cross_entropy(seg_logits, labels_of(batch_data_samples), ignore_index=255))


class DrawingHead(FCNHead):
    """Draws from every generator there is, as often as it has samples."""

    def loss_by_feat(self, seg_logits, batch_data_samples):
        labels = labels_of(batch_data_samples)
        for _ in batch_data_samples:
            labels = torch.where(torch.rand(labels.shape) < 0.2, 255, labels)
        factor = 1 + np.random.rand() + sum(random.random() for _ in batch_data_samples)
        return dict(loss_own=factor * nn.functional.cross_entropy(seg_logits, labels, ignore_index=255))


class DrawingLoss(nn.Module):
    loss_name = "loss_drawing"

    def forward(self, pred, label, weight=None, ignore_index=255):
        noise = 0.1 * torch.randn(pred.shape) + np.random.rand() + random.random()
        return nn.functional.cross_entropy(pred + noise, label, ignore_index=ignore_index)


class CountingHead(OwnHead):
    """Remembers how often it was called with a whole batch in a step, and what it saw last."""

    def loss_by_feat(self, seg_logits, batch_data_samples):
        self.seen = seg_logits.detach().clone()
        return super().loss_by_feat(seg_logits, batch_data_samples)


def with_losses(*losses, head=FCNHead):
    model = with_head(head)
    model.decode_head.loss_decode = nn.ModuleList(MODELS.build(dict(type=each)) for each in losses)
    return model


def drawing_loss():
    model = with_head(FCNHead)
    model.decode_head.loss_decode = DrawingLoss()
    return model


#: Each kind of view: those of loss modules, those of heads, and both in one model.
MODELS_UNDER_TEST = {
    "vectorised": lambda: with_losses("CrossEntropyLoss", "DiceLoss"),
    "samplewise": lambda: with_losses("TverskyLoss", "HuasdorffDisstanceLoss"),
    "own_head": lambda: with_head(OwnHead),
    "auxiliary": lambda: tiny_model(auxiliary_head=fcn(0, 4, num_convs=0, loss=dict(type="TverskyLoss"))),
}
every_model = pytest.mark.parametrize("make", MODELS_UNDER_TEST.values(), ids=MODELS_UNDER_TEST.keys())


def attached(model):
    weigher = LossWeigher()
    return weigher, attach_views(model, weigher)


def step(model, batch=None):
    model.zero_grad()
    losses = model.loss(*(batch or make_batch()))
    total(losses).backward()
    return losses, gradients(model)


def assert_same_step(ours, theirs):
    assert_same_tensors(ours[0], theirs[0])
    assert_same_tensors(ours[1], theirs[1])


# ---------------------------------------------------------------- random generators


@pytest.fixture
def registered_as_means(monkeypatch):
    """Of random losses somebody has to say it."""
    for name in ("_LOSSES", "_HEADS"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))
    register_head_rule(DrawingHead, reduction="mean")
    register_samplewise_loss(DrawingLoss, reduction="mean")


def seed_all(seed=5):
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def next_draws():
    return [float(torch.rand(())), float(np.random.rand()), random.random(), float(np.random.randn())]


@passes
@pytest.mark.parametrize("make", [lambda: with_head(DrawingHead), drawing_loss], ids=["head", "loss"])
def test_generators_are_left_where_the_host_leaves_them(make, pruned, registered_as_means):
    host, model = make(), make()
    weigher, _ = attached(model)
    draws, values = [], []
    for each in (host, model):
        seed_all()
        for i in range(3):
            weigher.begin(torch.ones(4), pruned=pruned)  # which show the host's value
            losses = each.loss(*make_batch(i))
            draws.append(next_draws())
            values.append(float(total(losses).detach()))
            weigher.end()
    assert draws[:3] == draws[3:]
    assert values[:3] == values[3:], "the host's loss is that of the host's draws"
    assert len(set(values)) == 3


def test_a_full_pass_has_the_gradients_of_the_hosts_draws(registered_as_means):
    host, model = with_head(DrawingHead), with_head(DrawingHead)
    weigher, _ = attached(model)
    results = []
    for each in (model, host):
        seed_all()
        weigher.begin(torch.ones(4), pruned=False)
        results.append(step(each))
    assert_same_step(*results)


@passes
def test_a_loss_that_draws_nothing_touches_no_generator(pruned):
    model = with_head(OwnHead)
    weigher, _ = attached(model)
    seed_all()
    expected = next_draws()
    seed_all()
    weigher.begin(make_weights(), pruned=pruned)
    step(model)
    assert next_draws() == expected


@passes
def test_what_a_head_remembers_is_of_the_whole_batch(pruned):
    host, model = with_head(CountingHead), with_head(CountingHead)
    weigher, _ = attached(model)
    for i in range(2):
        weigher.begin(make_weights(), pruned=pruned)
        step(model, make_batch(i)), step(host, make_batch(i))
        assert torch.equal(model.decode_head.seen, host.decode_head.seen)


# ---------------------------------------------------------------- copies


def methods(model):
    """Everything a view may stand in for."""
    yield model, "loss"
    for module in model.modules():
        for name in ("forward", "loss_by_feat"):
            if hasattr(type(module), name):
                yield module, name


@every_model
@pytest.mark.parametrize("when", ["idle", "in_a_batch"])
@every_copy
def test_copies_have_the_hosts_methods_bound_to_themselves(make, duplicate, when):
    model, host = make(), make()
    weigher, _ = attached(model)
    if when == "in_a_batch":
        weigher.begin(make_weights(), pruned=True)
    other = duplicate(model)
    for module, name in methods(other):
        method = getattr(module, name)
        assert method.__self__ is module and method.__func__ is getattr(type(module), name)
    assert not {id(each) for each in other.modules()} & {id(each) for each in model.modules()}
    assert_same_step(step(other), step(host))
    assert weigher.end() == (None, None), "the copy scored for the model"
    weigher.begin(torch.ones(4), pruned=False)
    assert_same_step(step(model), step(host))
    assert weigher.end()[0] is not None


@every_model
def test_a_copy_can_be_attached_and_given_back(make):
    model, host = make(), make()
    first, _ = attached(model)
    other = copy.deepcopy(model)
    second, views = attached(other)
    first.begin(make_weights(), pruned=True)
    second.begin(torch.ones(4), pruned=False)
    assert_same_step(step(other), step(host))
    assert second.end()[0] is not None and first.end() == (None, None)
    views.restore()
    second.begin(torch.ones(4), pruned=False)
    assert_same_step(step(other), step(host))
    assert second.end() == (None, None)


@every_model
def test_a_moving_average_of_the_model_is_the_hosts(make):
    model, host = make(), make()
    weigher, _ = attached(model)
    average = ExponentialMovingAverage(model)
    weigher.begin(make_weights(), pruned=True)
    average.update_parameters(model)
    assert_same_tensors(average.module.loss(*make_batch()), host.loss(*make_batch()))
    assert weigher.end() == (None, None)
    weigher.begin(torch.ones(4), pruned=False)
    assert_same_step(step(model), step(host))
    assert weigher.end()[0] is not None


# ---------------------------------------------------------------- restoring


@every_model
def test_restore_leaves_every_module_as_it_was(make):
    model = make()
    before = [dict(vars(module)) for module in model.modules()]
    keys = list(model.state_dict())
    weigher, views = attached(model)
    assert list(model.state_dict()) == keys
    weigher.begin(make_weights(), pruned=True)
    step(model)
    views.restore()
    views.restore()
    for module, old in zip(model.modules(), before, strict=True):
        assert list(vars(module)) == list(old)
        assert all(vars(module)[key] is value for key, value in old.items())


def test_restore_gives_back_what_others_put_there():
    model = with_head(OwnHead)
    calls = []

    def watched(*args):
        calls.append(len(args))
        return OwnHead.loss_by_feat(model.decode_head, *args)

    model.decode_head.loss_by_feat = watched
    weigher, views = attached(model)
    weigher.begin(torch.ones(4), pruned=False)
    step(model)
    assert calls
    views.restore()
    assert model.decode_head.loss_by_feat is watched


@pytest.mark.parametrize("loss", ["CrossEntropyLoss", "TverskyLoss"])
def test_a_loss_module_that_two_heads_share_is_weighed_and_given_back(loss):
    def make():
        model = tiny_model(auxiliary_head=fcn(0, 4, num_convs=0))
        model.decode_head.loss_decode = model.auxiliary_head.loss_decode = MODELS.build(dict(type=loss))
        return model

    model, host = make(), make()
    before = [list(vars(module)) for module in model.modules()]
    weigher, views = attached(model)
    weigher.begin(torch.ones(4), pruned=False)
    assert_same_step(step(model), step(host))
    weigher.begin(torch.tensor([0.0, 0, 0, 0]), pruned=True)
    assert all(not gradient.any() for gradient in step(model)[1].values() if gradient is not None)
    views.restore()
    assert [list(vars(module)) for module in model.modules()] == before


def test_a_pixel_sampler_may_ask_a_loss_of_ones_own_for_its_elements():
    """``OHEMPixelSampler`` calls the loss with ``reduction_override='none'``, to choose pixels by."""

    def make():
        model = tiny_model(fcn(0, 4, num_convs=0, channels=4, sampler=dict(type="OHEMPixelSampler", min_kept=20)))
        model.decode_head.loss_decode = PowerLoss()
        return model

    model, host = make(), make()
    weigher, _ = attached(model)
    weigher.begin(torch.ones(4), pruned=False)
    assert_same_step(step(model), step(host))


class PowerLoss(nn.Module):
    loss_name = "loss_power"

    def forward(self, pred, label, weight=None, ignore_index=255, reduction_override=None):
        losses = nn.functional.cross_entropy(pred, label, ignore_index=ignore_index, reduction="none") ** 2
        if weight is not None:
            losses = losses * weight
        return losses if reduction_override == "none" else losses.mean()


# ---------------------------------------------------------------- which form


@every_model
def test_a_full_pass_has_the_hosts_gradients_to_the_bit(make):
    model, host = make(), make()
    weigher, _ = attached(model)
    for i in range(2):
        weigher.begin(torch.ones(4), pruned=False)
        ours, theirs = step(model, make_batch(i)), step(host, make_batch(i))
        assert weigher.end()[0] is not None
        assert_same_tensors(ours[1], theirs[1])
        for key, value in theirs[0].items():
            torch.testing.assert_close(ours[0][key], value, rtol=1e-6, atol=0)


def test_a_pass_may_follow_another_kind_of_pass():
    """The form is of the pass in hand: full, pruned, full again."""
    model, host = with_head(OwnHead), with_head(OwnHead)
    weigher, _ = attached(model)
    _, theirs = step(host)
    same = []
    for pruned in (False, True, False, True):
        weigher.begin(torch.ones(4), pruned=pruned)
        _, ours = step(model)
        weigher.end()
        key = "decode_head.conv_seg.weight"
        same.append(torch.equal(ours[key], theirs[key]))
    assert same == [True, False, True, False]


@passes
@every_model
def test_scores_are_the_same_in_both_forms_and_for_all_weights(make, pruned):
    scores = []
    for weights, kind in ((torch.ones(4), False), (make_weights(), pruned), (torch.zeros(4), pruned)):
        model = make()
        weigher, _ = attached(model)
        weigher.begin(weights, pruned=kind)
        step(model)
        scores.append(weigher.end()[0])
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(scores[0], scores[2], rtol=1e-6, atol=0)


@passes
@every_model
def test_without_gradients_a_batch_is_scored_and_shows_the_hosts_values(make, pruned):
    model, host = make(), make()
    weigher, _ = attached(model)
    weigher.begin(torch.ones(4), pruned=pruned)
    with torch.no_grad():
        ours, theirs = model.loss(*make_batch()), host.loss(*make_batch())
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-6, atol=0)
    assert weigher.end()[0].isfinite().all()


@passes
@every_model
def test_under_autocast_values_stay_the_hosts(make, pruned):
    model, host = make(), make()
    weigher, _ = attached(model)
    weigher.begin(torch.ones(4), pruned=pruned)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = model.loss(*make_batch()), host.loss(*make_batch())
    total(ours).backward()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-2, atol=0)
    scores, _ = weigher.end()
    assert scores.dtype == torch.float32 and scores.isfinite().all()
