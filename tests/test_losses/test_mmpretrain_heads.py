"""Every classification head of mmpretrain in tiny models: every parameter's gradient against the untouched host's."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

pytest.importorskip("mmpretrain")
from mmpretrain.engine import SetAdaptiveMarginsHook
from mmpretrain.models import heads as host_heads
from mmpretrain.models.heads import ArcFaceClsHead, ClsHead, MultiLabelClsHead
from mmpretrain.structures import DataSample
from oracle_losses import only, passes, shown, weighted
from oracle_mmpretrain import (
    BATCH,
    CHANNELS,
    NUM_CLASSES,
    ONES,
    WEIGHTS,
    assert_same_gradients,
    assert_same_step,
    assert_scores,
    assert_shows,
    assert_shows_mean,
    build,
    classifier,
    cross_entropies,
    generator,
    labelled,
    linear_head,
    losses_alone,
    make_inputs,
    make_labels,
    make_scores,
    make_sets,
    oracle_step,
    relative_error,
    scored,
    take_step,
    with_tasks,
)

from infobatch_mm.losses import LossWeigher, attach_views


def sets():
    return labelled(make_sets())


def soft():
    return scored(make_scores())


def mixed():
    """Targets as batch augmentations leave them: soft, beside the sample's own label."""
    return scored(make_scores(), make_labels())


def values():
    return scored(torch.randn(BATCH, NUM_CLASSES, generator=generator(6)))


def head(name, **options):
    return dict(type=name, num_classes=NUM_CLASSES, in_channels=CHANNELS) | options


def arcface(margins=None, **options):
    def make(dtype):
        model = build(classifier(head("ArcFaceClsHead", scale=8.0, **options)), dtype)
        if margins is not None:
            model.head.set_margins(margins)
        return model

    return make


def adaptive_margins(dtype):
    """Margins as the host's hook sets them from the numbers of labels."""
    model = arcface()(dtype)

    class Dataset:
        @staticmethod
        def get_gt_labels():
            return np.array([0, 0, 0, 1, 2, 2, 3, 4, 4, 4, 4])

    class Runner:
        train_dataloader = type("Loader", (), dict(dataset=Dataset))

    Runner.model = model
    before = model.head.margins.clone()
    SetAdaptiveMarginsHook().before_train(Runner)
    assert len(model.head.margins.unique()) > 2 and not torch.equal(model.head.margins, before)
    return model


class OneOutput(ClsHead):
    """Predictions of shape ``(B,)`` for a regression of one value."""

    def pre_logits(self, feats):
        return feats[-1][:, 0]


@dataclass
class Case:
    """A tiny model around a head, its data samples, and what its samples contribute."""

    head: dict | Callable
    form: str = "vector"
    samples: Callable = lambda: labelled(make_labels())
    own_losses: Callable = losses_alone
    channels: int = CHANNELS
    options: dict = field(default_factory=dict)

    def model(self, dtype=torch.float32):
        if callable(self.head):
            return self.head(dtype)
        return build(classifier(self.head, self.channels, self.form, **self.options), dtype)


BN = dict(own_losses=cross_entropies)
CASES = {
    "cls": Case(dict(type="ClsHead"), channels=NUM_CLASSES),
    "linear": Case(linear_head()),
    "linear_accuracy": Case(linear_head(cal_acc=True, topk=(1, 3))),
    "linear_soft": Case(linear_head(), samples=soft),
    "linear_smooth": Case(linear_head(dict(type="LabelSmoothLoss", label_smooth_val=0.1, loss_weight=0.5))),
    "linear_asymmetric": Case(linear_head(dict(type="AsymmetricLoss"))),
    "linear_with_neck": Case(linear_head(), "map", options=dict(neck=dict(type="GlobalAveragePooling"))),
    "stacked": Case(head("StackedLinearClsHead", mid_channels=[6, 7])),
    "stacked_batch_norm": Case(head("StackedLinearClsHead", mid_channels=[6], norm_cfg=dict(type="BN1d")), **BN),
    "vision_transformer": Case(head("VisionTransformerClsHead"), "tokens"),
    "vision_transformer_hidden": Case(head("VisionTransformerClsHead", hidden_dim=6), "tokens"),
    "conformer": Case(head("ConformerHead", in_channels=[CHANNELS, CHANNELS], cal_acc=True), "pair"),
    "conformer_soft": Case(head("ConformerHead", in_channels=[CHANNELS, CHANNELS]), "pair", soft),
    "deit": Case(head("DeiTClsHead"), "pair"),
    "deit_hidden": Case(head("DeiTClsHead", hidden_dim=6), "pair", soft),
    "efficientformer": Case(head("EfficientFormerClsHead", distillation=False)),
    "levit": Case(head("LeViTClsHead", distillation=False), **BN),
    "vig": Case(head("VigClsHead", hidden_dim=6), **BN),
    "arcface": Case(arcface()),
    "arcface_soft": Case(arcface(), samples=mixed),
    "arcface_sub_centers": Case(arcface(num_subcenters=3)),
    "arcface_easy_margin": Case(arcface(easy_margin=True)),
    "arcface_margins": Case(arcface(margins=[0.1, 0.5, 0.9, 0.3, 0.2], num_subcenters=2)),
    "arcface_adaptive_margins": Case(adaptive_margins),
    "multi_label": Case(dict(type="MultiLabelClsHead"), samples=sets, channels=NUM_CLASSES),
    "multi_label_linear": Case(head("MultiLabelLinearClsHead"), samples=sets),
    "multi_label_soft": Case(head("MultiLabelLinearClsHead"), samples=soft),
    "multi_label_focal": Case(
        head("MultiLabelLinearClsHead", loss=dict(type="FocalLoss", loss_weight=2.0)), samples=sets
    ),
    "csra": Case(head("CSRAClsHead", num_heads=2, lam=0.3), "map", sets),
    "csra_asymmetric": Case(head("CSRAClsHead", num_heads=4, lam=0.1, loss=dict(type="AsymmetricLoss")), "map", sets),
}
if hasattr(host_heads, "RegressionHead"):  # the fork has it, upstream has not
    L2 = dict(type="RegressionLoss", loss_type="L2Loss", loss_weight=0.5)
    CASES["regression"] = Case(dict(type="RegressionHead"), samples=values, channels=NUM_CLASSES)
    CASES["linear_regression"] = Case(head("LinearRegressionHead"), samples=values)
    CASES["linear_regression_l2"] = Case(head("LinearRegressionHead", loss=L2), samples=values)
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def attached(model):
    weigher = LossWeigher()
    return weigher, attach_views(model, weigher)


def our_step(case, weights, pruned, dtype=torch.float32):
    model = case.model(dtype)
    weigher, _ = attached(model)
    return take_step(model, lambda: model.loss(make_inputs(dtype=dtype), case.samples()), weigher, weights, pruned)


def host_step(case, dtype=torch.float32):
    model = case.model(dtype)
    return take_step(model, lambda: model.loss(make_inputs(dtype=dtype), case.samples()))


def oracle(case, weights, dtype=torch.float32):
    model = case.model(dtype)
    return oracle_step(model, case.own_losses(model, make_inputs(dtype=dtype), case.samples()), weights)


def test_every_head_of_the_hosts_classifiers_is_here():
    tested = {type(case.model().head) for case in CASES.values()} | {host_heads.MultiTaskHead}
    bases = (ClsHead, MultiLabelClsHead, host_heads.MultiTaskHead)
    shipped = [getattr(host_heads, name) for name in host_heads.__all__]
    # Heads of pre-training methods that inherit from a classifier's are none of its own.
    assert {each for each in shipped if issubclass(each, bases)} <= tested


# ---------------------------------------------------------------- values and gradients


@every_case
def test_contributions_of_the_reference_add_up_to_the_hosts_loss(case):
    ours, host = oracle(case, ONES, torch.float64), host_step(case, torch.float64)
    assert ours.loss == pytest.approx(host.loss, rel=1e-6)
    assert relative_error(ours, host) <= 1e-6


@passes
@every_case
def test_weights_of_one_are_the_hosts_step(case, pruned):
    ours = our_step(case, ONES, pruned)
    assert_same_step(ours, host_step(case))
    assert ours.scores is not None, "computed around our path"


@passes
@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_the_weighted_sum_is_optimised_and_a_pruned_pass_shows_the_mean_by_weights(case, dtype, pruned):
    ours, expected = our_step(case, WEIGHTS, pruned, dtype), oracle(case, WEIGHTS, dtype)
    if pruned:
        assert_shows_mean(ours, host_step(case, dtype), expected.loss, WEIGHTS)
    else:
        assert_shows(ours, host_step(case, dtype))
    assert_same_gradients(ours, expected, dtype)


@passes
@every_case
def test_scores_are_the_hosts_losses_of_samples_alone(case, pruned):
    assert_scores(our_step(case, WEIGHTS, pruned), oracle(case, WEIGHTS).scores)


@every_case
def test_losses_come_from_one_evaluation(case):
    _, views = attached(case.model())
    assert views.vectorised and not views.not_separable


@every_case
def test_nothing_is_exchanged_where_the_host_exchanged_nothing(case):
    model = case.model()
    weigher, views = attached(model)
    assert not views.renew()
    ours = take_step(model, lambda: model.loss(make_inputs(), case.samples()), weigher, WEIGHTS)
    assert not views.renew()
    assert relative_error(ours, our_step(case, WEIGHTS, False)) == 0


@every_case
def test_restored_models_are_the_hosts_to_the_byte(case):
    model, host = case.model(), case.model()
    model.loss(make_inputs(), case.samples())  # label smoothing learns the number of classes
    before, keys = [dict(vars(module)) for module in model.modules()], list(model.state_dict())
    weigher, views = attached(model)
    assert list(model.state_dict()) == keys
    take_step(model, lambda: model.loss(make_inputs(), case.samples()), weigher, WEIGHTS)
    model.zero_grad()
    views.restore()
    views.restore()
    assert list(model.state_dict()) == keys
    for module, old in zip(model.modules(), before, strict=True):
        assert list(vars(module)) == list(old)
        assert all(vars(module)[key] is value for key, value in old.items())
    model.load_state_dict(host.state_dict())  # running statistics of the step before
    weigher.begin(WEIGHTS)
    after = take_step(model, lambda: model.loss(make_inputs(), case.samples()))
    assert after.loss == host_step(case).loss and relative_error(after, host_step(case)) == 0
    assert weigher.end() == (None, None)


@pytest.mark.parametrize("name", ["EfficientFormerClsHead", "LeViTClsHead"])
def test_distillation_is_refused_by_the_host_in_its_own_words(name):
    model = build(classifier(head(name, distillation=True)))
    weigher, _ = attached(model)
    weigher.begin(WEIGHTS)
    with pytest.raises(NotImplementedError, match="distill"):
        model.loss(make_inputs(), labelled(make_labels()))


def test_a_sample_without_a_label_to_train_on_has_no_score():
    samples = labelled([3, -100, 0, 2])
    model, host = build(classifier(linear_head())), build(classifier(linear_head()))
    weigher, _ = attached(model)
    ours = take_step(model, lambda: model.loss(make_inputs(), samples), weigher, WEIGHTS, True)
    theirs = take_step(host, lambda: host.loss(make_inputs(), samples))
    expected = oracle_step(host, losses_alone(host, make_inputs(), samples), WEIGHTS)
    assert_shows_mean(ours, theirs, expected.loss, WEIGHTS)
    assert_scores(ours, expected.scores, [1, 0, 1, 1])


@pytest.mark.skipif("RegressionHead" not in host_heads.__all__, reason="the fork's")
def test_a_regression_of_one_value_is_weighed():
    """Predictions of shape (B,): with (B, 1) the host's loss compares each with every label of the batch."""
    targets = torch.randn(BATCH, 1, generator=generator(6))
    samples = [DataSample().set_gt_label(each) for each in targets]

    def make():
        model = build(classifier(dict(type="RegressionHead")))
        model.head.__class__ = type("OneOutputRegression", (OneOutput, host_heads.RegressionHead), {})
        return model

    model, host = make(), make()
    weigher, _ = attached(model)
    ours = take_step(model, lambda: model.loss(make_inputs(), samples), weigher, WEIGHTS, True)
    theirs = take_step(host, lambda: host.loss(make_inputs(), samples))
    expected = oracle_step(host, losses_alone(host, make_inputs(), samples), WEIGHTS)
    assert_shows_mean(ours, theirs, expected.loss, WEIGHTS)
    assert_same_gradients(ours, expected, torch.float32)
    assert_scores(ours, expected.scores)


# ---------------------------------------------------------------- multi-task heads


def two_tasks(**options):
    return dict(
        type="MultiTaskHead",
        task_heads=dict(
            shape=linear_head(dict(type="LabelSmoothLoss", label_smooth_val=0.1, loss_weight=0.5)),
            tags=head("MultiLabelLinearClsHead"),
        )
        | options,
    )


def nested():
    return two_tasks(
        inner=dict(
            type="MultiTaskHead",
            task_heads=dict(face=head("ArcFaceClsHead", scale=8.0), colour=linear_head(cal_acc=True)),
        )
    )


def task_samples(present):
    """Multi-task samples, each with the tasks of a name; ``'inner.face'`` is one of a nested head."""
    drawn = zip(make_labels(), make_sets(), make_labels(seed=11), make_labels(seed=12), strict=True)
    samples = []
    for names, (shape, tags, face, colour) in zip(present, drawn, strict=True):
        tasks = dict(shape=shape, tags=tags)
        tasks = {name: labelled([label])[0] for name, label in tasks.items() if name in names}
        inner = {name: labelled([label])[0] for name, label in dict(face=face, colour=colour).items() if name in names}
        samples.append(with_tasks(tasks | (dict(inner=inner) if "inner" in names else {})))
    return samples


BOTH = ["shape", "tags"]
FULL = ["shape", "tags", "inner", "face", "colour"]
#: Head, and which tasks each sample has.
TASKS = {
    "all": (two_tasks, [BOTH] * BATCH),
    "some_missing": (two_tasks, [BOTH, ["tags"], BOTH, ["shape"]]),
    "one_sample_with_a_task": (two_tasks, [["tags"], ["tags"], BOTH, ["tags"]]),
    "a_task_without_samples": (two_tasks, [["tags"]] * BATCH),
    "a_sample_without_tasks": (two_tasks, [BOTH, ["shape"], [], ["tags"]]),
    "nested": (nested, [FULL] * BATCH),
    "nested_some_missing": (
        nested,
        [["inner", "face"], ["shape", "inner", "colour"], ["tags"], ["shape", "inner", "face", "colour"]],
    ),
    "nested_inner_missing": (nested, [BOTH, ["shape"], ["tags"], BOTH]),
    "nested_inner_empty": (nested, [["inner"], ["shape", "inner"], ["tags"], BOTH]),
}
every_task = pytest.mark.parametrize("name", TASKS)


def task_losses(model, task_head, feats, samples):
    """Each task's losses of its samples alone, and those samples' places; a task head's own class computes them."""
    for name, each in task_head.task_heads.items():
        places = [i for i, sample in enumerate(samples) if name in sample]
        if isinstance(each, host_heads.MultiTaskHead):
            inner = [samples[i].get(name) for i in places]
            for rows, losses in task_losses(model, each, tuple(feat[places] for feat in feats), inner):
                yield [places[row] for row in rows], losses
            continue
        losses = []
        for i in places:
            result = type(each).loss(each, tuple(only(feat, i) for feat in feats), [samples[i].get(name)])
            losses.append(result["loss"])
        yield places, losses


def task_oracle(name, weights, dtype):
    make, present = TASKS[name]
    model, samples = build(classifier(make()), dtype), task_samples(present)
    objective, own, seen = 0.0, torch.zeros(BATCH, dtype=torch.float64), 0.0
    for places, losses in task_losses(model, model.head, model.extract_feat(make_inputs(dtype=dtype)), samples):
        if places:
            objective = objective + weighted(losses, weights[places]) / len(places)
            own[places] += torch.stack(losses).detach().double()
            seen += shown(losses, weights[places]) / len(places)  # each task by the weights of those that have it
    step = take_step(model, lambda: dict(loss=objective))
    step.scores, step.log = own, dict(shown=seen)
    return step


def task_step(name, weigher=None, weights=None, pruned=False, dtype=torch.float32):
    make, present = TASKS[name]
    model = build(classifier(make()), dtype)
    if weigher is not None:
        attach_views(model, weigher)
    return take_step(
        model, lambda: model.loss(make_inputs(dtype=dtype), task_samples(present)), weigher, weights, pruned
    )


@passes
@every_task
def test_tasks_with_weights_of_one_are_the_hosts_step(name, pruned):
    ours = task_step(name, LossWeigher(), ONES, pruned)
    assert_same_step(ours, task_step(name))
    assert ours.scores is not None


@passes
@every_task
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_each_task_is_weighed_over_the_samples_that_have_it(name, dtype, pruned):
    ours, expected = task_step(name, LossWeigher(), WEIGHTS, pruned, dtype), task_oracle(name, WEIGHTS, dtype)
    if pruned:
        assert ours.loss == pytest.approx(expected.log["shown"], rel=2e-6)
        assert list(ours.log) == list(task_step(name).log)
    else:
        assert_shows(ours, task_step(name, dtype=dtype))
    assert_same_gradients(ours, expected, dtype)


@passes
@every_task
def test_the_score_is_the_sum_over_the_tasks_of_a_sample(name, pruned):
    ours, expected = task_step(name, LossWeigher(), WEIGHTS, pruned), task_oracle(name, ONES, torch.float32)
    assert_scores(ours, expected.scores, [bool({*names} - {"inner"}) for names in TASKS[name][1]])


def test_a_batch_in_which_nobody_has_a_task_trains_nothing_and_scores_nobody():
    model, host = build(classifier(two_tasks())), build(classifier(two_tasks()))
    weigher, _ = attached(model)
    samples = task_samples([[]] * BATCH)
    ours = take_step(model, lambda: model.loss(make_inputs(), samples), weigher, WEIGHTS, True)
    theirs = take_step(host, lambda: host.loss(make_inputs(), samples))
    assert_shows(ours, theirs)
    assert all(not each.any() for each in ours.gradients.values() if each is not None)
    # The hook takes (None, None) for a model without views and ends the training.
    assert ours.scored is not None and not ours.scored.any()


def test_tasks_may_change_from_batch_to_batch():
    """A task's first batch may have none of its samples, or a single one."""
    model, weigher = build(classifier(two_tasks())), LossWeigher()
    attach_views(model, weigher)
    for name in ("a_task_without_samples", "one_sample_with_a_task", "all", "some_missing"):
        ours = take_step(
            model, lambda name=name: model.loss(make_inputs(), task_samples(TASKS[name][1])), weigher, WEIGHTS, True
        )
        assert_same_gradients(ours, task_oracle(name, WEIGHTS, torch.float32), torch.float32)


def test_a_task_that_sees_its_samples_in_another_order_is_refused():
    model = build(classifier(two_tasks()))
    task = model.head.task_heads["shape"]
    host = task.loss
    task.loss = lambda feats, data_samples: host(tuple(feat.flip(0) for feat in feats), data_samples[::-1])
    weigher, _ = attached(model)
    weigher.begin(WEIGHTS)
    with pytest.raises(ValueError, match=r"head\.task_heads\.shape \(LinearClsHead\).*in another order"):
        model.loss(make_inputs(), task_samples(TASKS["some_missing"][1]))


def test_tasks_may_share_a_loss_module():
    def make():
        model = build(classifier(two_tasks(other=linear_head())))
        model.head.task_heads["other"].loss_module = model.head.task_heads["shape"].loss_module
        return model

    def samples():
        each = task_samples([["shape"], [*BOTH], ["tags"], ["shape"]])
        for sample, label in zip(each[1:], make_labels(seed=13), strict=False):
            sample.set_field(labelled([label])[0], "other")
        return each

    model, host = make(), make()
    weigher, views = attached(model)
    ours = take_step(model, lambda: model.loss(make_inputs(), samples()), weigher, WEIGHTS, True)
    objective = seen = 0.0
    host.zero_grad()
    for places, losses in task_losses(host, host.head, host.extract_feat(make_inputs()), samples()):
        objective = objective + weighted(losses, WEIGHTS[places]) / len(places)
        seen += shown(losses, WEIGHTS[places]) / len(places)
    assert ours.loss == pytest.approx(seen, rel=2e-6)
    assert_same_gradients(ours, take_step(host, lambda: dict(loss=objective)), torch.float32)
    assert not views.renew()


def test_restored_multi_task_heads_are_the_hosts():
    model, samples = build(classifier(nested())), task_samples(TASKS["nested_some_missing"][1])
    model.loss(make_inputs(), samples)  # label smoothing learns the number of classes
    before = [dict(vars(module)) for module in model.modules()]
    weigher, views = attached(model)
    take_step(model, lambda: model.loss(make_inputs(), samples), weigher, WEIGHTS)
    assert not views.renew()
    views.restore()
    for module, old in zip(model.modules(), before, strict=True):
        assert list(vars(module)) == list(old)
        assert all(vars(module)[key] is value for key, value in old.items())


def test_a_copy_of_a_multi_task_model_is_the_hosts_copy():
    model, host = build(classifier(two_tasks())), build(classifier(two_tasks()))
    weigher, _ = attached(model)
    weigher.begin(WEIGHTS)
    ours, theirs = copy.deepcopy(model), copy.deepcopy(host)
    ours.eval(), theirs.eval()
    with torch.no_grad():
        for one, other in zip(ours(make_inputs()).values(), theirs(make_inputs()).values(), strict=True):
            assert torch.equal(one, other)
    assert weigher.end() == (None, None)


def test_an_arcface_head_is_no_other_in_a_task():
    assert isinstance(build(classifier(nested())).head.task_heads["inner"].task_heads["face"], ArcFaceClsHead)
