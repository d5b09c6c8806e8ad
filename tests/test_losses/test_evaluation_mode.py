"""A model that a hook leaves in evaluation mode: the user is told so, by the model's name."""

import pytest
import torch

pytest.importorskip("mmseg")
from oracle import assert_same_tensors, make_inputs, make_labels, make_samples, make_weights
from oracle_losses import passes, tiny_model

from infobatch_mm.losses import LossWeigher, attach_views


def batch(size=4):
    return make_inputs(size, (32, 32)), make_samples(make_labels(size, (8, 8)))


def train_step(model, given):
    """As mmengine's models do it."""
    losses = model.forward(*given, mode="loss")
    return model.parse_losses(losses)[0]


@passes
def test_a_training_step_in_evaluation_mode_is_refused_by_the_models_name(pruned):
    model, weigher = tiny_model(), LossWeigher()
    attach_views(model, weigher)
    weigher.begin(make_weights(), pruned)
    model.eval()
    train_step(model, batch()).backward()
    message = r"EncoderDecoder was in evaluation mode in a training step.*call its train\(\).*eval\(\) on the parts"
    with pytest.raises(ValueError, match=message):
        weigher.end()
    assert not weigher.active
    weigher.begin(make_weights(), pruned)
    model.train()
    train_step(model, batch()).backward()
    assert weigher.end()[1].all(), "and it can go on"


@passes
@pytest.mark.parametrize("size", [4, 2])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_evaluation_beside_the_step_is_the_hosts(size, when, pruned):
    """Somebody may look at the loss of another batch, and parse it, within a step."""
    model, host, weigher = tiny_model(), tiny_model(), LossWeigher()
    attach_views(model, weigher)
    host.eval()
    expected = train_step(host, batch(size))

    def evaluate():
        model.eval()
        value = train_step(model, batch(size))
        model.train()
        assert torch.equal(value, expected)

    weigher.begin(make_weights(), pruned)
    if when == "before":
        evaluate()
    train_step(model, batch())
    if when == "after":
        evaluate()
    assert weigher.end()[1].all()


def test_a_step_that_was_left_out_is_none_in_evaluation_mode():
    """Without a gradient nothing was trained on."""
    model, weigher = tiny_model(), LossWeigher()
    attach_views(model, weigher)
    weigher.begin(make_weights())
    model.eval()
    with torch.no_grad():
        train_step(model, batch())
    assert weigher.end() == (None, None)


def test_parts_may_be_frozen_in_evaluation_mode():
    model, host, weigher = tiny_model(), tiny_model(), LossWeigher()
    attach_views(model, weigher)
    results = []
    for each in (model, host):
        each.backbone.eval()
        weigher.begin(torch.ones(4), False)
        results.append(each.loss(*batch()))
    assert weigher.end()[0] is None, "the host has no views"
    assert_same_tensors(*results)
