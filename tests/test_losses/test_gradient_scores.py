"""Scores that are norms of gradients: against gradients that autograd takes of each sample's contribution."""

import copy

import pytest
import torch

pytest.importorskip("mmseg")
pytest.importorskip("mmpretrain")

import oracle
import oracle_mmpretrain
from mmengine.registry import DefaultScope

from infobatch_mm.losses import LossWeigher, attach_views

WEIGHTS = torch.tensor([1.0, 4.0, 0.5, 2.5])
AVG = dict(type="CrossEntropyLoss", avg_non_ignore=True)
DICE = dict(type="DiceLoss", use_sigmoid=False)

SEGMENTORS = {
    "cross-entropy": oracle.encoder_decoder(),
    "average over valid": oracle.encoder_decoder(oracle.fcn(loss=AVG)),
    "auxiliary": oracle.encoder_decoder(auxiliary_head=oracle.fcn(2, 16)),
    "two losses": oracle.encoder_decoder(
        oracle.fcn(
            loss=[dict(type="CrossEntropyLoss"), dict(type="CrossEntropyLoss", use_sigmoid=True, loss_weight=0.5)]
        )
    ),
}


def scored(model, run, weights, pruned=True, scale=1.0, last_layer=None):
    """Scores of one step of a model whose losses are weighed, and what they are of."""
    weigher = LossWeigher()
    weigher.takes_norms = True
    views = attach_views(model, weigher, last_layer=last_layer)
    weigher.begin(weights, pruned)
    losses = run(model)
    (oracle.total(losses) * scale).backward()
    scores, valid = weigher.end()
    views.restore()
    return scores, valid, weigher.norms_of


def segment(labels):
    samples = oracle.make_samples(labels)
    return lambda model: model.loss(oracle.make_inputs(), samples)


def true_norms(host, parts, layer):
    """Norm of the gradient of each contribution in a layer, times the batch size."""
    found = []
    for part in parts:
        gradients = torch.autograd.grad(part, list(layer(host).parameters()), retain_graph=True)
        found.append(len(parts) * torch.stack([each.square().sum() for each in gradients]).sum().sqrt())
    return torch.stack(found)


@pytest.mark.parametrize("pruned", [False, True], ids=["full", "pruned"])
@pytest.mark.parametrize("name", SEGMENTORS)
def test_a_segmentors_scores_are_norms_of_the_gradients_of_its_last_layer(name, pruned):
    DefaultScope.get_instance("norms", scope_name="mmseg")
    labels = oracle.make_labels()
    model = oracle.build(SEGMENTORS[name])
    host, parts = oracle.contributions(model, lambda each, samples: each.loss(oracle.make_inputs(), samples), labels)
    expected = true_norms(host, parts, lambda each: each.decode_head.conv_seg)
    weights = WEIGHTS if pruned else torch.ones(4)
    for scale in (1.0, 2.0**16 / 3):  # a loss scale, and the share of an accumulated step
        scores, valid, source = scored(copy.deepcopy(model), segment(labels), weights, pruned, scale)
        assert source == "layer" and valid.all()
        torch.testing.assert_close(scores, expected, rtol=2e-4, atol=1e-6)


def test_the_step_is_the_same_with_and_without_norms():
    labels = oracle.make_labels()
    ours, plain = (oracle.build(SEGMENTORS["auxiliary"]) for _ in range(2))
    scored(ours, segment(labels), WEIGHTS)
    weigher = LossWeigher()
    views = attach_views(plain, weigher)
    weigher.begin(WEIGHTS)
    oracle.total(segment(labels)(plain)).backward()
    weigher.end()
    views.restore()
    oracle.assert_same_tensors(oracle.gradients(ours), oracle.gradients(plain))
    assert "forward" not in vars(ours.decode_head.conv_seg)


def test_a_loss_evaluated_sample_by_sample_has_norms_of_its_layer_too():
    labels = oracle.make_labels(holes=0.0)
    model = oracle.build(oracle.encoder_decoder(oracle.fcn(loss=DICE)))
    scores, valid, source = scored(copy.deepcopy(model), segment(labels), WEIGHTS)
    assert source == "layer" and valid.all() and (scores > 0).all()
    again, _, _ = scored(copy.deepcopy(model), segment(labels), torch.ones(4))
    # The gradient of a sample does not depend on its weight: it was divided out.
    torch.testing.assert_close(scores, again, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["layer", "outputs"])
def test_a_classifiers_scores(name):
    head = oracle_mmpretrain.linear_head()
    model = oracle_mmpretrain.build(oracle_mmpretrain.classifier(head))
    inputs, labels = oracle_mmpretrain.make_inputs(), oracle_mmpretrain.make_labels()
    samples = oracle_mmpretrain.labelled(labels)
    size = len(inputs)
    weights = torch.rand(size, generator=torch.Generator().manual_seed(1)) + 0.5
    logits = model.head(model.extract_feat(inputs))
    losses = torch.nn.functional.cross_entropy(logits, torch.cat([each.gt_label for each in samples]), reduction="none")
    if name == "layer":
        expected = true_norms(model, [each / size for each in losses], lambda each: each.head.fc)
    else:
        model.head.fc = torch.nn.Sequential(model.head.fc)  # which hides it
        gradients = torch.autograd.grad(losses.sum(), logits)[0]
        expected = gradients.norm(dim=1)
    scores, valid, source = scored(model, lambda each: each.loss(inputs, samples), weights)
    assert source == name and valid.all()
    torch.testing.assert_close(scores, expected.detach(), rtol=1e-4, atol=1e-6)


def test_a_layer_of_the_users_is_watched_and_a_wrong_one_is_refused():
    labels = oracle.make_labels()
    model = oracle.build(SEGMENTORS["cross-entropy"])
    named, _, source = scored(copy.deepcopy(model), segment(labels), WEIGHTS, last_layer="decode_head.conv_seg")
    found, _, _ = scored(copy.deepcopy(model), segment(labels), WEIGHTS)
    assert source == "layer" and torch.equal(named, found)
    for place, message in (
        ("decode_head.none", "EncoderDecoder has nothing there"),
        ("decode_head", "has a FCNHead there, expected an nn.Linear"),
    ):
        with pytest.raises(ValueError, match=rf"layer='{place}'.*{message}"):
            scored(copy.deepcopy(model), segment(labels), WEIGHTS, last_layer=place)


def test_a_step_without_a_backward_pass_leaves_no_norms():
    weigher = LossWeigher()
    weigher.takes_norms = True
    model = oracle.build(SEGMENTORS["cross-entropy"])
    views = attach_views(model, weigher)
    weigher.begin(WEIGHTS)
    segment(oracle.make_labels())(model)
    scores, _ = weigher.end()
    views.restore()
    assert scores.tolist() == [-1.0] * 4


def test_a_loss_that_is_nan_gives_no_norm():
    labels = oracle.make_labels()
    inputs = oracle.make_inputs()
    inputs[2] = float("nan")
    backbone = dict(oracle.resnet(), norm_cfg=dict(type="GN", num_groups=1, requires_grad=True))
    head = oracle.fcn(norm_cfg=dict(type="GN", num_groups=1, requires_grad=True))
    model = oracle.build(oracle.encoder_decoder(head, backbone=backbone))
    samples = oracle.make_samples(labels)
    scores, _, _ = scored(model, lambda each: each.loss(inputs, samples), WEIGHTS)
    assert scores.isnan().tolist() == [False, False, True, False]
