"""Whole segmentors: every head is weighted, the main one is scored, and nothing else of the model changes."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("mmseg")
from copies import every_copy
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmseg.models.decode_heads import FCNHead
from mmseg.models.losses import CrossEntropyLoss
from mmseg.models.losses.cross_entropy_loss import binary_cross_entropy, cross_entropy, mask_cross_entropy
from mmseg.models.segmentors import CascadeEncoderDecoder, EncoderDecoder
from mmseg.registry import MODELS
from oracle import (
    BN,
    NUM_CLASSES,
    all_loss_modules,
    assert_close_gradients,
    assert_close_whole_gradient,
    assert_same_tensors,
    build,
    ce,
    contributions,
    encoder_decoder,
    fcn,
    gradients,
    heads,
    loss_modules,
    make_inputs,
    make_labels,
    make_samples,
    make_weights,
    total,
    weighted_sum,
)
from oracle_losses import shown
from torch import distributed

from infobatch_mm.losses import LossWeigher, attach_views


def cascade(*stages, **options):
    return encoder_decoder(list(stages), type="CascadeEncoderDecoder", num_stages=len(stages), **options)


def without_convs(head):
    return {key: value for key, value in head.items() if key not in ("num_convs", "concat_input")}


def ocr(loss=None):
    return without_convs(fcn(loss=loss, type="OCRHead", ocr_channels=4))


ALL_LEVELS = dict(in_index=[0, 1, 2, 3], in_channels=[4, 8, 16, 32])
AVG = ce(avg_non_ignore=True)
BCE_04 = ce(use_sigmoid=True, loss_weight=0.4)
MIT = dict(
    type="MixVisionTransformer",
    embed_dims=4,
    num_stages=4,
    num_layers=[1, 1, 1, 1],
    num_heads=[1, 2, 4, 8],
    drop_path_rate=0.0,
)
BISENET = dict(
    type="BiSeNetV2",
    detail_channels=(4, 4, 8),
    semantic_channels=(4, 4, 8, 8),
    semantic_expansion_ratio=2,
    bga_channels=8,
    out_indices=(0, 1, 2, 3, 4),
)

MODELS_UNDER_TEST = {
    "fcn": encoder_decoder(),
    "fcn_one_auxiliary": encoder_decoder(fcn(loss=AVG), fcn(2, 16, loss=ce(loss_weight=0.4))),
    "fcn_several_auxiliary": encoder_decoder(
        fcn(loss=[ce(), BCE_04]), [fcn(2, 16, loss=AVG), fcn(3, 32, loss=ce(loss_weight=0.4)), fcn(0, 4, loss=BCE_04)]
    ),
    "fcn_auxiliary_list_of_one": encoder_decoder(fcn(), [fcn(2, 16)]),
    "cascade_fcn_ocr": cascade(fcn(loss=ce(loss_weight=0.4)), ocr(AVG)),
    "cascade_three_stages_auxiliary": cascade(fcn(), ocr(), ocr(AVG), auxiliary_head=fcn(2, 16)),
    "segformer": encoder_decoder(without_convs(fcn(type="SegformerHead", **ALL_LEVELS)), backbone=MIT),
    "upernet": encoder_decoder(
        without_convs(fcn(type="UPerHead", pool_scales=(1, 2), **ALL_LEVELS)), fcn(2, 16, loss=ce(loss_weight=0.4))
    ),
    "bisenetv2": encoder_decoder(
        fcn(0, 8),
        [fcn(1, 4), fcn(2, 4), fcn(3, 8), fcn(4, 8)],
        backbone=BISENET,
    ),
    "ohem_auxiliary": encoder_decoder(
        fcn(sampler=dict(type="OHEMPixelSampler", min_kept=100)),
        fcn(2, 16, sampler=dict(type="OHEMPixelSampler", thresh=0.22, min_kept=50)),
    ),
}
FULL_DOUBLE = {name for name in MODELS_UNDER_TEST if name != "fcn_several_auxiliary"}  # the host's BCE is float32
every_model = pytest.mark.parametrize("name", MODELS_UNDER_TEST)


def twins(name_or_config, dtype=torch.float32):
    """The untouched host's model and its equal."""
    config = MODELS_UNDER_TEST[name_or_config] if isinstance(name_or_config, str) else name_or_config
    host = build(config, dtype)
    return host, copy.deepcopy(host)


def attached(model, **options):
    weigher = LossWeigher()
    return weigher, attach_views(model, weigher, **options).restore


def step(model, inputs, labels):
    losses = model.loss(inputs, make_samples(labels))
    total(losses).backward()
    return losses, gradients(model)


def assert_same_step(ours, theirs):
    assert_same_tensors(ours[0], theirs[0])
    assert_same_tensors(ours[1], theirs[1])


def criteria(model):
    return [getattr(module, "cls_criterion", None) for module in all_loss_modules(model)]


def loss_inputs(model, inputs, labels):
    """What each loss module of an untouched model is called with in a step: ``(logits, labels, weight)``."""
    seen = {}

    def watch(key):
        def record(module, args, kwargs):
            if kwargs.get("reduction_override") is None:
                seen[key] = args[0].detach(), args[1], kwargs.get("weight")

        return record

    handles = [
        module.register_forward_pre_hook(watch((prefix, i)), with_kwargs=True)
        for prefix, head in heads(model).items()
        for i, module in enumerate(loss_modules(head))
    ]
    model.loss(inputs, make_samples(labels))
    for handle in handles:
        handle.remove()
    return seen


def expected_scores(model, inputs, labels, prefixes):
    """Mean over each sample's valid pixels of the losses of some heads, by the definition, NaN without a pixel."""
    scores = torch.zeros(len(labels), dtype=torch.float64)
    seen = loss_inputs(model, inputs, labels)
    for prefix in prefixes:
        for i, module in enumerate(loss_modules(heads(model)[prefix])):
            logits, targets, chosen = seen[prefix, i]
            for sample in range(len(labels)):
                kept = targets[sample] != 255
                pixels, classes = logits[sample][:, kept].T.double(), targets[sample][kept]
                if module.use_sigmoid:
                    onehot = nn.functional.one_hot(classes, NUM_CLASSES).double()
                    loss = nn.functional.binary_cross_entropy_with_logits(pixels, onehot, reduction="none").mean(1)
                else:
                    loss = nn.functional.cross_entropy(pixels, classes, reduction="none")
                if chosen is not None:
                    loss = loss * chosen[sample][kept]
                scores[sample] += module.loss_weight * loss.mean()
    return scores


# ---------------------------------------------------------------- values and gradients


@every_model
def test_weights_of_one_give_losses_and_gradients_of_the_host_to_the_bit(name):
    host, model = twins(name)
    weigher, _ = attached(model)
    weigher.begin(torch.ones(4))
    inputs, labels = make_inputs(), make_labels(blank=2)
    assert_same_step(step(model, inputs, labels), step(host, inputs, labels))
    assert weigher.end()[0] is not None, "computed around our path"


@every_model
def test_values_are_of_the_host_in_a_full_pass(name):
    host, model = twins(name)
    weigher, _ = attached(model)
    weigher.begin(make_weights(), pruned=False)
    inputs, labels = make_inputs(), make_labels()
    assert_same_tensors(model.loss(inputs, make_samples(labels)), host.loss(inputs, make_samples(labels)))


@every_model
def test_a_pruned_pass_shows_the_mean_by_weights_and_has_the_gradient_of_the_weighted_contributions(name):
    host, model = twins(name, torch.float64)
    inputs, labels, weights = make_inputs(dtype=torch.float64), make_labels(blank=3), make_weights()
    reference, parts = contributions(host, lambda each, samples: each.loss(inputs, samples), labels)
    weighted_sum(parts, weights).backward()
    weigher, _ = attached(model)
    weigher.begin(weights)
    losses, _ = step(model, inputs, labels)
    assert float(total(losses).detach()) == pytest.approx(shown(parts, weights), rel=1e-5)
    tolerance = 1e-9 if name in FULL_DOUBLE else 1e-5
    assert_close_gradients(gradients(model), gradients(reference), tolerance)


# BiSeNetV2's own gradient is 1e-3 from its float64 one here (BatchNorm on 1x1 maps), the reference's noise is 1e-5.
@pytest.mark.parametrize("name", [name for name in MODELS_UNDER_TEST if name != "bisenetv2"])
def test_gradient_in_float32_is_that_of_the_weighted_contributions(name):
    host, model = twins(name)
    inputs, labels, weights = make_inputs(), make_labels(), make_weights()
    reference, parts = contributions(host, lambda each, samples: each.loss(inputs, samples), labels)
    weighted_sum(parts, weights).backward()
    weigher, _ = attached(model)
    weigher.begin(weights)
    step(model, inputs, labels)
    assert_close_whole_gradient(gradients(model), gradients(reference), 1e-5)


def test_every_head_is_weighted():
    _, model = twins("fcn_several_auxiliary")
    weigher, _ = attached(model)
    weigher.begin(torch.zeros(4))
    _, ours = step(model, make_inputs(), make_labels())
    assert all(not gradient.any() for gradient in ours.values() if gradient is not None)


def test_gradients_accumulate_over_batches_of_their_own_weights():
    host, model = twins("fcn_one_auxiliary", torch.float64)
    weigher, _ = attached(model)
    expected = None
    for i in range(3):
        inputs, labels = make_inputs(dtype=torch.float64, seed=10 + i), make_labels(seed=20 + i)
        weights = make_weights(seed=30 + i)
        reference, parts = contributions(host, lambda each, samples, inputs=inputs: each.loss(inputs, samples), labels)
        (weighted_sum(parts, weights) / 3).backward()
        expected = {
            name: None if gradient is None else gradient + (0 if expected is None else expected[name])
            for name, gradient in gradients(reference).items()
        }
        weigher.begin(weights)
        (total(model.loss(inputs, make_samples(labels))) / 3).backward()
        weigher.end()
    assert_close_gradients(gradients(model), expected, 1e-9)


def test_an_accumulating_optimiser_takes_the_host_steps_at_weights_of_one():
    host, model = twins("fcn_one_auxiliary")
    weigher, _ = attached(model)
    wrappers = []
    for each in (model, host):
        wrapper = OptimWrapper(torch.optim.SGD(each.parameters(), lr=0.1), accumulative_counts=2)
        wrapper.initialize_count_status(each, 0, 4)
        wrappers.append(wrapper)
    for i in range(4):
        weigher.begin(torch.ones(4))
        logs = []
        for each, wrapper in zip((model, host), wrappers, strict=True):
            with wrapper.optim_context(each):
                losses = each.loss(make_inputs(seed=40 + i), make_samples(make_labels(seed=50 + i)))
            parsed, log = each.parse_losses(losses)
            wrapper.update_params(parsed)
            logs.append(log)
        weigher.end()
        assert_same_tensors(logs[0], logs[1])
    assert_same_tensors(model.state_dict(), host.state_dict())


@pytest.mark.parametrize("name", ["fcn_several_auxiliary", "cascade_fcn_ocr", "segformer", "upernet"])
def test_under_autocast_values_and_gradients_stay_of_the_host(name):
    host, model = twins(name)
    weigher, _ = attached(model)
    weigher.begin(torch.ones(4))
    results = []
    for each in (model, host):
        with torch.autocast("cpu", torch.bfloat16):
            losses = each.loss(make_inputs(), make_samples(make_labels()))
        total(losses).backward()
        results.append((losses, gradients(each)))
    assert_same_step(*results)
    scores, valid = weigher.end()
    assert scores.dtype == torch.float32 and valid.all() and scores.isfinite().all()


def test_under_autocast_losses_are_weighed():
    host, model = twins("fcn_one_auxiliary")
    weigher, _ = attached(model)
    inputs, labels, weights = make_inputs(), make_labels(), make_weights()

    def run(each, samples):
        with torch.autocast("cpu", torch.bfloat16):
            return each.loss(inputs, samples)

    reference, parts = contributions(host, run, labels)
    weighted_sum(parts, weights).backward()
    weigher.begin(weights)
    losses = run(model, make_samples(labels))
    assert float(total(losses).detach()) == pytest.approx(shown(parts, weights), rel=1e-2)
    total(losses).backward()
    assert_close_whole_gradient(gradients(model), gradients(reference), 3e-2)


# ---------------------------------------------------------------- scores

MAIN = {"cascade_fcn_ocr": "decode_1", "cascade_three_stages_auxiliary": "decode_2"}


@pytest.mark.parametrize("auxiliary", [False, True], ids=["main", "with_auxiliary"])
@every_model
def test_scores_are_means_over_the_samples_own_valid_pixels(name, auxiliary):
    host, model = twins(name)
    weigher, _ = attached(model, score_auxiliary=auxiliary)
    inputs, labels = make_inputs(), make_labels(blank=1)
    weigher.begin(make_weights())
    model.loss(inputs, make_samples(labels))
    scores, valid = weigher.end()
    prefixes = list(heads(host)) if auxiliary else [MAIN.get(name, "decode")]
    expected = expected_scores(host, inputs, labels, prefixes)
    assert scores.dtype == torch.float32 and scores.shape == (4,) and not scores.requires_grad
    assert valid.dtype == torch.bool and valid.tolist() == [True, False, True, True]
    torch.testing.assert_close(scores[valid].double(), expected[valid], rtol=2e-6, atol=0)


def test_scores_of_a_broken_batch_do_not_reach_the_next():
    _, model = twins("fcn")
    weigher, _ = attached(model)
    weigher.begin(torch.ones(4))
    model.loss(make_inputs(), make_samples(make_labels()))
    weigher.begin(torch.ones(4))
    model.loss(make_inputs(seed=5), make_samples(make_labels()))
    after, _ = weigher.end()
    weigher.begin(torch.ones(4))
    model.loss(make_inputs(seed=5), make_samples(make_labels()))
    alone, _ = weigher.end()
    assert torch.equal(after, alone)


@every_model
def test_nan_logits_give_nan_scores_that_are_valid(name):
    _, model = twins(name)
    weigher, _ = attached(model)
    weigher.begin(torch.ones(4))
    with torch.no_grad():
        for each in heads(model).values():
            each.conv_seg.bias.fill_(float("nan"))
    model.loss(make_inputs(), make_samples(make_labels()))
    scores, valid = weigher.end()
    assert scores.isnan().all() and valid.all()


# ---------------------------------------------------------------- hygiene


@every_model
def test_parameter_names_and_state_dict_are_unchanged(name):
    host, model = twins(name)
    attached(model)
    assert [key for key, _ in model.named_parameters()] == [key for key, _ in host.named_parameters()]
    assert [key for key, _ in model.named_modules()] == [key for key, _ in host.named_modules()]
    assert_same_tensors(model.state_dict(), host.state_dict())
    model.load_state_dict(host.state_dict())


@every_model
def test_restore_gives_the_criteria_back(name):
    _, model = twins(name)
    before = criteria(model)
    state = [sorted(vars(module)) for module in model.modules()]
    _, restore = attached(model)
    assert all(ours is not theirs for ours, theirs in zip(criteria(model), before, strict=True))
    restore()
    assert all(ours is theirs for ours, theirs in zip(criteria(model), before, strict=True))
    assert [sorted(vars(module)) for module in model.modules()] == state


def test_a_restored_model_can_be_attached_again():
    host, model = twins("fcn_one_auxiliary")
    _, restore = attached(model)
    restore()
    weigher, _ = attached(model)
    weigher.begin(torch.ones(4))
    assert_same_step(step(model, make_inputs(), make_labels()), step(host, make_inputs(), make_labels()))
    assert weigher.end()[0] is not None


@pytest.mark.parametrize("when", ["idle", "in_a_batch"])
@every_copy
def test_copies_have_the_hosts_criteria_and_leave_the_model_attached(duplicate, when):
    host, model = twins("fcn_several_auxiliary")
    weigher, _ = attached(model)
    if when == "in_a_batch":
        weigher.begin(make_weights())
    other = duplicate(model)
    assert criteria(other) == criteria(host)
    assert set(criteria(other)) == {cross_entropy, binary_cross_entropy}
    assert all(each not in (cross_entropy, binary_cross_entropy) for each in criteria(model))
    assert_same_step(step(other, make_inputs(), make_labels()), step(host, make_inputs(), make_labels()))
    assert weigher.end() == (None, None), "the copy scored for the model"
    weigher.begin(torch.ones(4))
    step(model, make_inputs(), make_labels())
    assert weigher.end()[0] is not None


def test_a_copy_can_be_attached_to_a_weigher_of_its_own():
    host, model = twins("fcn")
    first, _ = attached(model)
    other = copy.deepcopy(model)
    second, _ = attached(other)
    first.begin(make_weights())
    second.begin(torch.ones(4))
    assert_same_step(step(other, make_inputs(), make_labels()), step(host, make_inputs(), make_labels()))
    assert second.end()[0] is not None
    assert first.end() == (None, None)


@every_model
def test_loss_outside_a_batch_is_the_hosts(name):
    host, model = twins(name)
    weigher, _ = attached(model)
    assert_same_step(step(model, make_inputs(), make_labels()), step(host, make_inputs(), make_labels()))
    weigher.begin(make_weights())
    weigher.end()
    model.zero_grad()
    host.zero_grad()
    assert_same_step(step(model, make_inputs(), make_labels()), step(host, make_inputs(), make_labels()))
    assert weigher.end() == (None, None)


def test_loss_without_gradient_is_the_hosts_and_scores():
    host, model = twins("fcn_one_auxiliary")
    weigher, _ = attached(model)
    weigher.begin(make_weights(), pruned=False)
    with torch.no_grad():
        ours = model.loss(make_inputs(), make_samples(make_labels()))
        assert_same_tensors(ours, host.loss(make_inputs(), make_samples(make_labels())))
    assert weigher.end()[0].isfinite().all()


@pytest.mark.parametrize("name", ["fcn_one_auxiliary", "cascade_fcn_ocr", "segformer"])
def test_prediction_is_the_hosts(name):
    host, model = twins(name)
    weigher, _ = attached(model)
    weigher.begin(make_weights())
    weigher.end()
    results = []
    for each in (model.eval(), host.eval()):
        with torch.no_grad():
            samples = each.predict(make_inputs(), make_samples(make_labels()))
        results.append({str(i): sample.seg_logits.data for i, sample in enumerate(samples)})
    assert_same_tensors(*results)
    assert weigher.end() == (None, None)


def test_a_batch_of_another_size_than_its_weights_is_refused():
    _, model = twins("fcn")
    weigher, _ = attached(model)
    weigher.begin(torch.ones(3))
    with pytest.raises(ValueError, match=r"4 samples.*batch has 3"):
        model.loss(make_inputs(), make_samples(make_labels()))


COMPILED = {
    "several": encoder_decoder(fcn(loss=[ce(), BCE_04]), fcn(2, 16, loss=AVG)),
    "class_weight": encoder_decoder(fcn(loss=ce(class_weight=[0.5, 1.0, 2.5, 0.1, 1.7]))),
    "ohem": encoder_decoder(fcn(sampler=dict(type="OHEMPixelSampler", min_kept=100))),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "ohem" else pytest.mark.slow) for name in COMPILED]
)
def test_a_compiled_loss_weighs_and_scores_alike(name):
    if not torch._dynamo.is_dynamo_supported():
        pytest.skip("torch.compile does not run here")
    torch._dynamo.reset()
    eager, model = twins(COMPILED[name])
    eager_weigher, _ = attached(eager)
    weigher, _ = attached(model)
    compiled = torch.compile(model.loss, backend="eager")
    # Each batch has weights of its own, and one lies outside begin and end: none may be baked in.
    for i, weights in enumerate((torch.ones(4), make_weights(), None, make_weights(seed=9))):
        inputs, samples = make_inputs(seed=60 + i), make_samples(make_labels(seed=70 + i))
        results = []
        for each, loss, its_weigher in ((model, compiled, weigher), (eager, eager.loss, eager_weigher)):
            if weights is not None:
                its_weigher.begin(weights)
            each.zero_grad()
            losses = loss(inputs, samples)
            total(losses).backward()
            scores, valid = its_weigher.end()
            results.append((losses, gradients(each), {"scores": scores, "valid": valid}))
        for ours, theirs in zip(*results, strict=True):
            assert_same_tensors(ours, theirs)
    torch._dynamo.reset()


@pytest.fixture
def one_process_group(tmp_path):
    if distributed.is_initialized():
        pytest.skip("a process group exists already")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("order", ["attach_then_wrap", "wrap_then_attach"])
def test_a_model_wrapped_for_many_processes_is_weighed(one_process_group, order):
    host, model = twins("fcn_several_auxiliary")
    inputs, labels, weights = make_inputs(), make_labels(), make_weights()
    plain_weigher, _ = attached(host)
    plain_weigher.begin(weights)
    expected = step(host, inputs, labels)
    if order == "attach_then_wrap":
        weigher, _ = attached(model)
        wrapped = MMDistributedDataParallel(model)
    else:
        wrapped = MMDistributedDataParallel(model)
        weigher, _ = attached(wrapped.module)
    weigher.begin(weights)
    losses = wrapped(inputs, make_samples(labels), mode="loss")
    total(losses).backward()
    assert_same_step((losses, gradients(model)), expected)
    for ours, theirs in zip(weigher.end(), plain_weigher.end(), strict=True):
        assert torch.equal(ours, theirs)


# ---------------------------------------------------------------- subclasses


class OwnCrossEntropy(CrossEntropyLoss):
    pass


class OwnForwardCrossEntropy(CrossEntropyLoss):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class OwnFeatHead(FCNHead):
    def loss_by_feat(self, seg_logits, batch_data_samples):
        return super().loss_by_feat(seg_logits, batch_data_samples)


class OwnLossHead(FCNHead):
    def loss(self, inputs, batch_data_samples, train_cfg):
        return super().loss(inputs, batch_data_samples, train_cfg)


class OwnLossSegmentor(EncoderDecoder):
    def loss(self, inputs, data_samples):
        return super().loss(inputs, data_samples)


class OwnDecodeSegmentor(EncoderDecoder):
    def _decode_head_forward_train(self, inputs, data_samples):
        return super()._decode_head_forward_train(inputs, data_samples)


class OwnAuxiliarySegmentor(EncoderDecoder):
    def _auxiliary_head_forward_train(self, inputs, data_samples):
        return super()._auxiliary_head_forward_train(inputs, data_samples)


class OwnCascadeSegmentor(CascadeEncoderDecoder):
    def _decode_head_forward_train(self, inputs, data_samples):
        return super()._decode_head_forward_train(inputs, data_samples)


class OwnFeaturesSegmentor(EncoderDecoder):
    def extract_feat(self, inputs):
        return super().extract_feat(inputs)


def own_criterion(model):
    model.decode_head.loss_decode.cls_criterion = lambda *args, **kwargs: cross_entropy(*args, **kwargs)


def turned(attribute, cls):
    """Makes a part of a model one of this class."""

    def turn(model):
        part = model.get_submodule(attribute) if attribute else model
        part.__class__ = cls

    return turn


LOSS, HEAD = "decode_head.loss_decode", "decode_head"
# Which model, what is of the user's own in it, and what is evaluated sample by sample because of that.
OWN = {
    "loss": ("fcn", turned(LOSS, OwnCrossEntropy), None),
    "loss_forward": ("fcn", turned(LOSS, OwnForwardCrossEntropy), f"{LOSS} (OwnForwardCrossEntropy of FCNHead)"),
    "criterion": ("fcn", own_criterion, f"{LOSS} (CrossEntropyLoss of FCNHead)"),
    "head_loss": ("fcn", turned(HEAD, OwnLossHead), None),
    "head_loss_by_feat": ("fcn", turned(HEAD, OwnFeatHead), f"{HEAD} (OwnFeatHead)"),
    "auxiliary_loss_by_feat": (
        "fcn_one_auxiliary",
        turned("auxiliary_head", OwnFeatHead),
        "auxiliary_head (OwnFeatHead)",
    ),
    "segmentor_loss": ("fcn_one_auxiliary", turned("", OwnLossSegmentor), None),
    "segmentor_decode": ("fcn_one_auxiliary", turned("", OwnDecodeSegmentor), None),
    "segmentor_auxiliary": ("fcn_one_auxiliary", turned("", OwnAuxiliarySegmentor), None),
    "segmentor_cascade": ("cascade_fcn_ocr", turned("", OwnCascadeSegmentor), None),
    "segmentor_features": ("fcn", turned("", OwnFeaturesSegmentor), None),
}


@pytest.mark.parametrize("name", OWN)
def test_subclasses_are_weighed_as_what_they_are(name):
    config, make_own, sample_by_sample = OWN[name]
    host, model = twins(config)
    make_own(host)
    make_own(model)
    weigher = LossWeigher()
    views = attach_views(model, weigher)
    assert views.not_separable == ([sample_by_sample] if sample_by_sample else [])
    assert views.vectorised == (sample_by_sample is None)
    weigher.begin(torch.ones(4), pruned=False)
    assert_same_step(step(model, make_inputs(), make_labels()), step(host, make_inputs(), make_labels()))
    assert weigher.end()[0] is not None
    weigher.begin(torch.zeros(4))
    model.zero_grad()
    _, ours = step(model, make_inputs(), make_labels())
    assert all(not gradient.any() for gradient in ours.values() if gradient is not None)


def test_mask_cross_entropy_is_evaluated_sample_by_sample():
    model = build(encoder_decoder(fcn(loss=ce(use_mask=True))))
    assert criteria(model) == [mask_cross_entropy]
    title = "decode_head.loss_decode (CrossEntropyLoss of FCNHead)"
    assert attach_views(model, LossWeigher()).not_separable == [title]


# ---------------------------------------------------------------- refusals


def assert_refused(model, *patterns):
    """Refused in words that match every pattern, and not a thing of the model changed."""
    before = [dict(vars(module)) for module in model.modules()]
    weigher = LossWeigher()
    with pytest.raises(ValueError) as refusal:
        attach_views(model, weigher)
    for pattern in patterns:
        refusal.match(rf"(?s){pattern}")
    after = [dict(vars(module)) for module in model.modules()]
    assert len(after) == len(before)
    for ours, theirs in zip(after, before, strict=True):
        assert list(ours) == list(theirs)
        assert all(ours[key] is theirs[key] for key in theirs)
    assert not weigher.active


NONE = dict(reduction="none")
WITHOUT_REDUCTION = {
    "CrossEntropyLoss": ce(**NONE),
    "CrossEntropyLoss_sigmoid": ce(use_sigmoid=True, **NONE),
    "DiceLoss": dict(type="DiceLoss", **NONE),
    "FocalLoss": dict(type="FocalLoss", **NONE),
    "LovaszLoss": dict(type="LovaszLoss", per_image=True, **NONE),
    "SiLogLoss": dict(type="SiLogLoss", **NONE),
}
REDUCE = r"reduction='none'.*use reduction='mean'"


@pytest.mark.parametrize("name", WITHOUT_REDUCTION)
def test_losses_that_give_no_scalar_are_refused(name):
    model = build(encoder_decoder(fcn(loss=WITHOUT_REDUCTION[name])))
    assert_refused(model, rf"decode_head\.loss_decode \({name.split('_')[0]} of FCNHead\)", REDUCE)


@pytest.mark.parametrize(
    ("config", "title"),
    [
        (encoder_decoder(fcn(), fcn(2, 16, loss=ce(**NONE))), r"auxiliary_head\.loss_decode \("),
        (encoder_decoder(fcn(), [fcn(2, 16), fcn(3, 32, loss=ce(**NONE))]), r"auxiliary_head\.1\.loss_decode \("),
        (encoder_decoder(fcn(loss=[ce(), ce(**NONE)])), r"decode_head\.loss_decode\.1 \(CrossEntropyLoss of FCNHead"),
        (cascade(fcn(), ocr(loss=ce(**NONE))), r"decode_head\.1\.loss_decode \(CrossEntropyLoss of OCRHead"),
    ],
    ids=["auxiliary", "one_of_two_auxiliary", "second_of_two", "cascade"],
)
def test_one_refused_loss_is_named_and_leaves_all_heads_untouched(config, title):
    model = build(config)
    assert_refused(model, title, REDUCE)
    assert criteria(model)[0] is cross_entropy


@pytest.mark.parametrize(
    "config",
    [fcn(), dict(type="ResNetV1c", depth=18, base_channels=4, norm_cfg=BN)],
    ids=lambda config: config["type"],
)
def test_mmseg_models_without_a_decode_head_are_refused(config):
    assert_refused(MODELS.build(copy.deepcopy(config)), config["type"], r"(no|without a) decode_head")


def test_a_main_head_without_a_loss_to_score_by_is_refused():
    model = build(encoder_decoder(fcn(loss=ce(loss_name="ce_shown")), fcn(2, 16)))
    assert_refused(model, "decode_head of EncoderDecoder has no loss to score by", "loss_name")


@pytest.mark.parametrize("model", [nn.Conv2d(3, 5, 1), nn.Sequential(nn.Conv2d(3, 5, 1))], ids=["conv", "sequential"])
def test_plain_modules_are_refused(model):
    assert_refused(model, type(model).__name__, r"infobatch_mm\.InfoBatch")


def test_a_wrapped_model_is_refused(one_process_group):
    assert_refused(MMDistributedDataParallel(build(encoder_decoder())), "MMDistributedDataParallel")


@pytest.mark.parametrize(
    ("name", "make_own", "title"),
    [
        ("fcn_one_auxiliary", None, r"decode_head \(FCNHead\)"),
        ("fcn", turned(HEAD, OwnFeatHead), r"decode_head \(OwnFeatHead\)"),
        (
            "fcn",
            turned(LOSS, OwnForwardCrossEntropy),
            r"decode_head \(FCNHead\)",
        ),
    ],
    ids=["vectorised", "own_head", "own_loss"],
)
def test_attaching_twice_is_refused_and_leaves_the_first_in_place(name, make_own, title):
    host, model = twins(name)
    if make_own is not None:
        make_own(host)
        make_own(model)
    first, restore = attached(model)
    assert_refused(model, title, "weighed by another hook", "keep one InfoBatchHook per model")
    first.begin(torch.ones(4), pruned=False)
    assert_same_step(step(model, make_inputs(), make_labels()), step(host, make_inputs(), make_labels()))
    assert first.end()[0] is not None
    restore()
    assert criteria(model) == criteria(host)
