"""One head, every option of its cross entropy: values, gradients and scores against two independent references."""

import copy

import pytest
import torch

pytest.importorskip("mmseg")
from oracle import (
    NUM_CLASSES,
    all_loss_modules,
    assert_close_gradients,
    assert_close_whole_gradient,
    assert_same_tensors,
    brute_force,
    build,
    ce,
    contributions,
    encoder_decoder,
    fcn,
    gradients,
    make_inputs,
    make_labels,
    make_samples,
    make_weights,
    total,
    weighted_sum,
)
from oracle_losses import shown

from infobatch_mm.losses import LossWeigher, attach_views

CLASS_WEIGHT = [0.5, 1.0, 2.5, 0.1, 1.7]


class Case:
    """A head and its labels."""

    def __init__(self, *losses, labels=None, **head):
        self.loss = list(losses) if len(losses) > 1 else losses[0]
        self.labels = dict(labels or {})
        self.head = head

    @property
    def ignore_index(self):
        return self.head.get("ignore_index", 255)

    @property
    def channels(self):
        return self.head.get("out_channels", NUM_CLASSES)

    def model(self, dtype=torch.float32):
        return build(encoder_decoder(fcn(loss=self.loss, **self.head)), dtype)

    def make_labels(self, **options):
        classes = self.head.get("num_classes", NUM_CLASSES)
        return make_labels(**{"num_classes": classes, "fill": self.ignore_index, **self.labels, **options})


BINARY = dict(num_classes=2, out_channels=1, threshold=0.5)
CLEAN = dict(holes=0.0)
BLANK = dict(blank=2)
OHEM_TOPK = dict(type="OHEMPixelSampler", min_kept=200)
OHEM_THRESH = dict(type="OHEMPixelSampler", thresh=0.22, min_kept=50)
# At 10x10 pixels for the loops over pixels.
SMALL_OHEM = {"OHEM_TOPK": dict(OHEM_TOPK, min_kept=30), "OHEM_THRESH": dict(OHEM_THRESH, min_kept=5)}

CASES = {
    "softmax_no_ignored": Case(ce(), labels=CLEAN),
    "softmax": Case(ce()),
    "softmax_blank_sample": Case(ce(), labels=BLANK),
    "softmax_avg_non_ignore_no_ignored": Case(ce(avg_non_ignore=True), labels=CLEAN),
    "softmax_avg_non_ignore": Case(ce(avg_non_ignore=True)),
    "softmax_avg_non_ignore_blank_sample": Case(ce(avg_non_ignore=True), labels=BLANK),
    "softmax_ignore_index_0": Case(ce(avg_non_ignore=True), ignore_index=0),
    "softmax_loss_weight": Case(ce(loss_weight=0.4)),
    "softmax_sum": Case(ce(reduction="sum"), labels=BLANK),
    "class_weight": Case(ce(class_weight=CLASS_WEIGHT)),
    "class_weight_no_ignored": Case(ce(class_weight=CLASS_WEIGHT), labels=CLEAN),
    "class_weight_blank_sample": Case(ce(class_weight=CLASS_WEIGHT, loss_weight=0.4), labels=BLANK),
    "class_weight_ignore_index_0": Case(ce(class_weight=CLASS_WEIGHT), ignore_index=0),
    "class_weight_sum": Case(ce(class_weight=CLASS_WEIGHT, reduction="sum")),
    "class_weight_avg_non_ignore": Case(ce(class_weight=CLASS_WEIGHT, avg_non_ignore=True)),
    "sigmoid_no_ignored": Case(ce(use_sigmoid=True), labels=CLEAN),
    "sigmoid": Case(ce(use_sigmoid=True)),
    "sigmoid_blank_sample": Case(ce(use_sigmoid=True), labels=BLANK),
    "sigmoid_avg_non_ignore": Case(ce(use_sigmoid=True, avg_non_ignore=True)),
    "sigmoid_avg_non_ignore_blank_sample": Case(ce(use_sigmoid=True, avg_non_ignore=True), labels=BLANK),
    "sigmoid_negative_labels": Case(ce(use_sigmoid=True, avg_non_ignore=True), labels=dict(fill=-1)),
    "sigmoid_sum": Case(ce(use_sigmoid=True, reduction="sum", loss_weight=0.4)),
    "binary": Case(ce(use_sigmoid=True), **BINARY),
    "binary_avg_non_ignore": Case(ce(use_sigmoid=True, avg_non_ignore=True), labels=BLANK, **BINARY),
    "binary_class_weight": Case(ce(use_sigmoid=True, class_weight=[2.5]), **BINARY),
    "binary_sum": Case(ce(use_sigmoid=True, reduction="sum"), labels=BLANK, **BINARY),
    "several": Case(ce(), ce(use_sigmoid=True, loss_weight=0.4, loss_name="loss_bce"), labels=BLANK),
    "several_of_one_name": Case(ce(), ce(avg_non_ignore=True, loss_weight=0.4), labels=BLANK),
    "three_of_two_names": Case(
        ce(class_weight=CLASS_WEIGHT), ce(use_sigmoid=True, loss_weight=3.0), ce(loss_name="loss_other")
    ),
    "ohem_topk": Case(ce(), sampler=OHEM_TOPK),
    "ohem_topk_avg_non_ignore": Case(ce(avg_non_ignore=True), labels=BLANK, sampler=OHEM_TOPK),
    "ohem_topk_class_weight": Case(ce(class_weight=CLASS_WEIGHT), sampler=OHEM_TOPK),
    "ohem_topk_several": Case(ce(), ce(avg_non_ignore=True, loss_weight=0.4), sampler=OHEM_TOPK),
    "ohem_topk_binary": Case(ce(use_sigmoid=True), sampler=OHEM_TOPK, **BINARY),
    "ohem_thresh": Case(ce(), sampler=OHEM_THRESH),
    "ohem_thresh_avg_non_ignore": Case(ce(avg_non_ignore=True), labels=BLANK, sampler=OHEM_THRESH),
    "ohem_thresh_sigmoid": Case(ce(use_sigmoid=True), sampler=OHEM_THRESH),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def skip_what_the_host_cannot_run(case):
    """In the fork ``class_weight`` with ``avg_non_ignore`` indexes the kept labels with the mask of all."""
    losses = case.loss if isinstance(case.loss, list) else [case.loss]
    if any(loss.get("class_weight") and loss.get("avg_non_ignore") and not loss.get("use_sigmoid") for loss in losses):
        try:
            logits = torch.zeros(4, case.channels, 32, 32)
            case.model().decode_head.loss_by_feat(logits, make_samples(case.make_labels()))
        except IndexError as error:
            pytest.skip(f"the host itself cannot run class_weight with avg_non_ignore=True: {error}")


def attached(model, weights, pruned=True, **options):
    weigher = LossWeigher()
    attach_views(model, weigher, **options)
    weigher.begin(weights, pruned=pruned)
    return weigher


def double_precision(case):
    """Relative error that float64 allows: the host's binary cross entropy is float32 even for float64 logits."""
    losses = case.loss if isinstance(case.loss, list) else [case.loss]
    return 1e-5 if any(loss.get("use_sigmoid") for loss in losses) else 1e-9


def weighted_gradients(case, dtype):
    """Gradients of all parameters, ours and those of the reference."""
    model, labels, weights = case.model(dtype), case.make_labels(), make_weights()
    inputs = make_inputs(dtype=dtype)
    host, parts = contributions(model, lambda host, samples: host.loss(inputs, samples), labels)
    weighted_sum(parts, weights).backward()
    attached(model, weights)
    total(model.loss(inputs, make_samples(labels))).backward()
    return gradients(model), gradients(host)


def head_batch(case, size=(10, 10), dtype=torch.float32, spread=2.0, **options):
    """Logits at the size of the labels, and the labels."""
    labels = case.make_labels(size=size, **options)
    generator = torch.Generator().manual_seed(7)
    logits = spread * torch.randn(len(labels), case.channels, *size, generator=generator)
    return logits.to(dtype).requires_grad_(), labels


def small_ohem(case):
    """The case with its pixel sampler cut down to 10x10 pixels."""
    if "sampler" not in case.head:
        return case
    small = copy.copy(case)
    small.head = {
        **case.head,
        "sampler": SMALL_OHEM["OHEM_TOPK" if case.head["sampler"] is OHEM_TOPK else "OHEM_THRESH"],
    }
    return small


# ---------------------------------------------------------------- the references agree with the host


@every_case
def test_contributions_of_the_reference_add_up_to_the_host_loss(case):
    skip_what_the_host_cannot_run(case)
    model, labels = case.model(torch.float64), case.make_labels()
    inputs = make_inputs(dtype=torch.float64)
    with torch.no_grad():
        host_loss = total(model.loss(inputs, make_samples(labels)))
        _, parts = contributions(model, lambda host, samples: host.loss(inputs, samples), labels)
    torch.testing.assert_close(sum(parts), host_loss, rtol=double_precision(case), atol=0)


# ---------------------------------------------------------------- parity at weight 1


@every_case
def test_weights_of_one_give_losses_and_gradients_of_the_host_to_the_bit(case):
    skip_what_the_host_cannot_run(case)
    host = case.model()
    model = copy.deepcopy(host)
    weigher = attached(model, torch.ones(4))
    inputs, labels = make_inputs(), case.make_labels()
    results = []
    for each in (model, host):
        losses = each.loss(inputs, make_samples(labels))
        total(losses).backward()
        results.append((losses, gradients(each)))
    assert_same_tensors(results[0][0], results[1][0])
    assert_same_tensors(results[0][1], results[1][1])
    assert weigher.end()[0] is not None, "computed around our path"


@every_case
def test_values_are_of_the_host_in_a_full_pass(case):
    skip_what_the_host_cannot_run(case)
    host = case.model()
    model = copy.deepcopy(host)
    attached(model, make_weights(), pruned=False)
    inputs, labels = make_inputs(), case.make_labels()
    ours, theirs = model.loss(inputs, make_samples(labels)), host.loss(inputs, make_samples(labels))
    assert_same_tensors(ours, theirs)


@every_case
def test_values_are_means_by_weights_in_a_pruned_pass(case):
    skip_what_the_host_cannot_run(case)
    host, weights = case.model(torch.float64), make_weights()
    model = copy.deepcopy(host)
    attached(model, weights)
    inputs, labels = make_inputs(dtype=torch.float64), case.make_labels()
    with torch.no_grad():
        value = total(model.loss(inputs, make_samples(labels)))
        _, parts = contributions(host, lambda each, samples: each.loss(inputs, samples), labels)
    assert float(value) == pytest.approx(shown(parts, weights), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@every_case
def test_values_of_other_float_types_are_of_the_host_in_a_full_pass(case, dtype):
    skip_what_the_host_cannot_run(case)
    logits, labels = head_batch(case, dtype=dtype)
    host = small_ohem(case).model()
    model = copy.deepcopy(host)
    attached(model, make_weights(), pruned=False)
    ours = model.decode_head.loss_by_feat(logits, make_samples(labels))
    theirs = host.decode_head.loss_by_feat(logits, make_samples(labels))
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype, key
        tolerance = 1e-6 if dtype == torch.float64 else 0
        torch.testing.assert_close(ours[key], value, rtol=tolerance, atol=0)


# ---------------------------------------------------------------- random weights


@every_case
def test_gradient_of_every_parameter_is_that_of_the_weighted_contributions(case):
    skip_what_the_host_cannot_run(case)
    ours, theirs = weighted_gradients(case, torch.float64)
    assert_close_gradients(ours, theirs, double_precision(case))


@every_case
def test_gradient_in_float32_is_that_of_the_weighted_contributions(case):
    skip_what_the_host_cannot_run(case)
    ours, theirs = weighted_gradients(case, torch.float32)
    assert_close_whole_gradient(ours, theirs, 1e-5)


@every_case
def test_gradient_and_scores_are_those_of_loops_over_pixels(case):
    skip_what_the_host_cannot_run(case)
    case = small_ohem(case)
    logits, labels = head_batch(case, dtype=torch.float64)
    weights = make_weights()
    model = case.model(torch.float64)
    chosen = None
    if model.decode_head.sampler is not None:
        chosen = model.decode_head.sampler.sample(logits, labels[:, None])
    twin = logits.detach().clone().requires_grad_()
    modules = all_loss_modules(model)
    objective, expected = brute_force(modules, twin, labels, case.ignore_index, weights, chosen)
    objective.backward()

    weigher = attached(model, weights)
    total(model.decode_head.loss_by_feat(logits, make_samples(labels))).backward()
    scores, valid = weigher.end()
    assert_close_gradients({"logits": logits.grad}, {"logits": twin.grad}, double_precision(case))
    assert scores.dtype == torch.float32 and scores.shape == (4,)
    assert valid.dtype == torch.bool and valid.tolist() == [each is not None for each in expected]
    for i, each in enumerate(expected):
        if each is not None:
            assert float(scores[i]) == pytest.approx(each, rel=1e-6), i


def test_a_sample_of_weight_zero_gives_no_gradient():
    case = CASES["softmax_avg_non_ignore"]
    logits, labels = head_batch(case)
    model = case.model()
    attached(model, torch.tensor([1.0, 0.0, 2.0, 0.0]))
    total(model.decode_head.loss_by_feat(logits, make_samples(labels))).backward()
    assert [bool(each.any()) for each in logits.grad] == [True, False, True, False]


@pytest.mark.parametrize("name", ["softmax", "sigmoid_avg_non_ignore", "class_weight"])
def test_a_batch_of_one_is_weighed(name):
    case = CASES[name]
    logits, labels = head_batch(case, batch=1)
    host, twin = case.model(), logits.detach().clone().requires_grad_()
    model = copy.deepcopy(host)
    weigher = attached(model, torch.tensor([2.5]))
    ours = model.decode_head.loss_by_feat(logits, make_samples(labels))
    theirs = host.decode_head.loss_by_feat(twin, make_samples(labels))
    assert_same_tensors(ours, theirs)
    total(ours).backward()
    total(theirs).backward()
    torch.testing.assert_close(logits.grad, 2.5 * twin.grad, rtol=1e-5, atol=1e-9)
    assert weigher.end()[0].shape == (1,)


@pytest.mark.parametrize(
    "name", ["softmax", "softmax_avg_non_ignore", "softmax_sum", "class_weight", "sigmoid", "sigmoid_avg_non_ignore"]
)
def test_a_batch_without_a_valid_pixel_is_the_hosts_and_has_no_valid_score(name):
    case = CASES[name]
    logits, labels = head_batch(case)
    labels[:] = 255
    host, twin = case.model(), logits.detach().clone().requires_grad_()
    model = copy.deepcopy(host)
    weigher = attached(model, make_weights())
    ours = model.decode_head.loss_by_feat(logits, make_samples(labels))
    theirs = host.decode_head.loss_by_feat(twin, make_samples(labels))
    assert_same_tensors(ours, theirs)
    total(ours).backward()
    assert not logits.grad.any()
    assert not weigher.end()[1].any()


# ---------------------------------------------------------------- scores


@every_case
def test_scores_do_not_depend_on_the_weights(case):
    skip_what_the_host_cannot_run(case)
    case = small_ohem(case)
    logits, labels = head_batch(case)
    results = []
    for weights in (torch.ones(4), make_weights()):
        model = case.model()
        weigher = attached(model, weights)
        model.decode_head.loss_by_feat(logits, make_samples(labels))
        results.append(weigher.end())
    (ones, valid_ones), (uneven, valid_uneven) = results
    assert torch.equal(valid_ones, valid_uneven)
    assert torch.equal(ones[valid_ones], uneven[valid_ones])


def test_scores_average_to_the_host_loss_where_no_pixel_is_ignored():
    for name in ("softmax_no_ignored", "sigmoid_no_ignored"):
        case = CASES[name]
        logits, labels = head_batch(case)
        model = case.model()
        weigher = attached(model, torch.ones(4))
        losses = model.decode_head.loss_by_feat(logits, make_samples(labels))
        scores, valid = weigher.end()
        assert valid.all()
        torch.testing.assert_close(scores.mean(), losses["loss_ce"].detach(), rtol=1e-6, atol=0)


def test_score_of_a_sample_rests_on_its_own_valid_pixels():
    case = CASES["softmax"]
    logits, labels = head_batch(case)
    alone = []
    for rest in (labels, torch.where(torch.arange(4)[:, None, None] == 0, labels, 255)):
        model = case.model()
        weigher = attached(model, make_weights())
        model.decode_head.loss_by_feat(logits, make_samples(rest))
        alone.append(weigher.end()[0][0])
    assert torch.equal(alone[0], alone[1])


@pytest.mark.parametrize("name", ["softmax", "softmax_avg_non_ignore", "sigmoid", "binary", "class_weight"])
def test_nan_logits_give_a_nan_score_that_is_valid_and_leave_the_other_scores(name):
    case = CASES[name]
    logits, labels = head_batch(case)
    broken = logits.detach().clone()
    broken[3] = float("nan")
    results = []
    for each in (logits, broken):
        model = case.model()
        weigher = attached(model, torch.ones(4))
        model.decode_head.loss_by_feat(each, make_samples(labels))
        results.append(weigher.end())
    (clean, _), (scores, valid) = results
    assert valid.all()
    assert scores[3].isnan()
    assert torch.equal(scores[:3], clean[:3])


@pytest.mark.parametrize("weights", [torch.ones(4), make_weights()], ids=["ones", "uneven"])
@pytest.mark.parametrize("bad", ["nan", "inf", "overflow"])
def test_a_loss_that_is_not_finite_is_shown_as_the_host_shows_it(bad, weights):
    case = CASES["softmax_no_ignored"]
    logits, labels = head_batch(case)
    logits = logits.detach().clone()
    if bad == "nan":
        logits[3] = float("nan")
    else:  # one infinite loss, or several whose sum is beyond float32
        logits[3].scatter_(0, labels[3][None], float("-inf") if bad == "inf" else -1e38)
    host = case.model()
    model = copy.deepcopy(host)
    attached(model, weights)
    ours = model.decode_head.loss_decode(logits, labels, ignore_index=255)
    theirs = host.decode_head.loss_decode(logits, labels, ignore_index=255)
    assert str(float(ours)) == str(float(theirs)) == ("nan" if bad == "nan" else "inf")


@pytest.mark.parametrize("name", ["softmax", "softmax_avg_non_ignore", "class_weight", "sigmoid", "binary"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_half_precision_logits_are_means_taken_in_float32(name, dtype):
    case = CASES[name]
    logits, labels = head_batch(case, dtype=dtype)
    model = case.model()
    call = dict(ignore_index=255, reduction_override="none")
    elementwise = model.decode_head.loss_decode(logits, labels, **call).detach().float()
    kept = labels != 255
    expected = torch.stack(
        [each.reshape(-1, *mask.shape)[:, mask].mean() for each, mask in zip(elementwise, kept, strict=True)]
    )
    weigher = attached(model, make_weights())
    model.decode_head.loss_decode(logits, labels, ignore_index=255)
    scores, _ = weigher.end()
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=0)


def test_a_loss_that_is_only_shown_does_not_count_in_the_score():
    """A name without 'loss' keeps a term out of the host's total (``parse_losses``): it is no part of the main loss."""
    scores = []
    for case in (Case(ce()), Case(ce(), ce(use_sigmoid=True, loss_name="bce_shown"))):
        logits, labels = head_batch(case)
        model = case.model()
        weigher = attached(model, torch.ones(4))
        model.decode_head.loss_by_feat(logits, make_samples(labels))
        scores.append(weigher.end()[0])
    assert torch.equal(*scores)


# ---------------------------------------------------------------- autocast


@every_case
def test_under_autocast_values_gradients_and_scores_stay_of_the_host(case):
    skip_what_the_host_cannot_run(case)
    host = case.model()
    model = copy.deepcopy(host)
    weigher = attached(model, torch.ones(4))
    inputs, labels = make_inputs(), case.make_labels()
    results = []
    for each in (model, host):
        with torch.autocast("cpu", torch.bfloat16):
            losses = each.loss(inputs, make_samples(labels))
        total(losses).backward()
        results.append((losses, gradients(each)))
    assert_same_tensors(results[0][0], results[1][0])
    assert_same_tensors(results[0][1], results[1][1])
    scores, valid = weigher.end()
    assert scores.dtype == torch.float32
    assert scores[valid].isfinite().all()


@pytest.mark.parametrize("name", ["softmax", "softmax_avg_non_ignore", "sigmoid", "class_weight", "several"])
def test_under_autocast_the_gradient_is_weighted(name):
    case = CASES[name]
    logits, labels = head_batch(case)
    weights = make_weights()
    twin = logits.detach().double().requires_grad_()
    model = case.model()
    objective, _ = brute_force(all_loss_modules(model), twin, labels, case.ignore_index, weights)
    objective.backward()
    attached(model, weights)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.decode_head.loss_by_feat(logits, make_samples(labels))
    total(losses).backward()
    assert_close_gradients({"logits": logits.grad.double()}, {"logits": twin.grad}, 1e-5)


# ---------------------------------------------------------------- the loss module itself


@pytest.mark.parametrize("name", ["softmax", "softmax_avg_non_ignore", "class_weight", "sigmoid", "binary"])
def test_an_explicit_avg_factor_is_the_normaliser(name):
    case = CASES[name]
    logits, labels = head_batch(case)
    host, twin = case.model(), logits.detach().clone().requires_grad_()
    model = copy.deepcopy(host)
    attached(model, torch.full((4,), 2.0))
    call = dict(ignore_index=255, avg_factor=37)
    ours = model.decode_head.loss_decode(logits, labels, **call)
    theirs = host.decode_head.loss_decode(twin, labels, **call)
    assert torch.equal(ours, theirs)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(logits.grad, 2 * twin.grad, rtol=1e-6, atol=1e-9)


def test_elementwise_losses_are_of_the_host():
    case = CASES["softmax_loss_weight"]
    logits, labels = head_batch(case)
    host = case.model()
    model = copy.deepcopy(host)
    weigher = attached(model, make_weights())
    call = dict(ignore_index=255, reduction_override="none")
    ours = model.decode_head.loss_decode(logits, labels, **call)
    assert torch.equal(ours, host.decode_head.loss_decode(logits, labels, **call))
    assert weigher.end() == (None, None)


def test_a_batch_of_another_size_than_its_weights_is_refused():
    case = CASES["softmax"]
    logits, labels = head_batch(case)
    model = case.model()
    attached(model, torch.ones(3))
    with pytest.raises(ValueError, match=r"4 samples.*batch has 3"):
        model.decode_head.loss_by_feat(logits, make_samples(labels))
