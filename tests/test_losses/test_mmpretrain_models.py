"""Whole models of mmpretrain: timm's and Hugging Face's, retrievers, copies, half precision, exchanged recipes."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("mmpretrain")
from copies import every_copy_and_average
from mmpretrain.engine import SwitchRecipeHook
from mmpretrain.models import ImageToImageRetriever, RandomBatchAugment
from mmpretrain.models.classifiers import BaseClassifier, HuggingFaceClassifier, TimmClassifier
from mmpretrain.registry import MODELS
from oracle_alone import Step, gradients_of, seed
from oracle_losses import passes, shown_objective
from oracle_mmpretrain import (
    BATCH,
    CHANNELS,
    NUM_CLASSES,
    ONES,
    WEIGHTS,
    TinyBackbone,
    assert_same_gradients,
    assert_same_step,
    assert_scores,
    assert_shows,
    assert_shows_mean,
    build,
    classifier,
    cross_entropies,
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
)

from infobatch_mm.losses import LossWeigher, attach_views
from infobatch_mm.losses.views import LossView


def samples():
    return labelled(make_labels())


def attached(model):
    weigher = LossWeigher()
    return weigher, attach_views(model, weigher)


def step(model, weigher=None, weights=None, pruned=False, make_samples=samples, dtype=torch.float32):
    return take_step(model, lambda: model.loss(make_inputs(dtype=dtype), make_samples()), weigher, weights, pruned)


# ---------------------------------------------------------------- models of other libraries, and retrievers


class Network(nn.Module):
    """What stands for a model of timm."""

    def __init__(self):
        super().__init__()
        self.body, self.head = TinyBackbone(), nn.Linear(CHANNELS, NUM_CLASSES)

    def forward(self, inputs):
        return self.head(self.body(inputs)[0])


class HuggingFaceNetwork(Network):
    def forward(self, inputs):
        return SimpleNamespace(logits=super().forward(inputs))


class WithoutTimm(TimmClassifier):
    """The host's class as it is, but for the constructor, which imports timm."""

    network = Network

    def __init__(self, loss):
        BaseClassifier.__init__(self, data_preprocessor=dict(type="mmpretrain.ClsDataPreprocessor"))
        self.model, self.loss_module = self.network(), MODELS.build(loss)
        self._register_state_dict_hook(self._remove_state_dict_prefix)
        self._register_load_state_dict_pre_hook(self._add_state_dict_prefix)


class WithoutTransformers(HuggingFaceClassifier):
    network = HuggingFaceNetwork
    __init__ = WithoutTimm.__init__


def sets():
    scores = torch.zeros(BATCH, NUM_CLASSES)
    for row, classes in zip(scores, make_sets(), strict=True):
        row[classes] = 1
    return scored(scores)


def soft():
    return scored(make_scores())


def headless(cls, **loss):
    def make(dtype=torch.float32):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return cls(loss).to(dtype).train()

    return make


def retriever(dtype=torch.float32):
    head = dict(type="ArcFaceClsHead", num_classes=NUM_CLASSES, in_channels=CHANNELS, scale=8.0)
    encoder = dict(type="TinyBackbone")
    return build(dict(type="ImageToImageRetriever", image_encoder=[encoder], head=head, prototype=torch.eye(3)), dtype)


#: Model, samples, and what the host divides by.
CASES = {
    "timm": (headless(WithoutTimm, type="CrossEntropyLoss"), samples, BATCH),
    "timm_soft": (headless(WithoutTimm, type="CrossEntropyLoss", loss_weight=0.3), soft, BATCH),
    "timm_sum": (headless(WithoutTimm, type="CrossEntropyLoss", reduction="sum"), samples, 1),
    "timm_smooth": (headless(WithoutTimm, type="LabelSmoothLoss", label_smooth_val=0.1), samples, BATCH),
    "timm_sigmoid": (headless(WithoutTimm, type="CrossEntropyLoss", use_sigmoid=True), sets, BATCH),
    "timm_focal": (headless(WithoutTimm, type="FocalLoss", loss_weight=0.3), samples, BATCH),
    "hugging_face": (headless(WithoutTransformers, type="CrossEntropyLoss"), samples, BATCH),
    "hugging_face_sigmoid": (headless(WithoutTransformers, type="CrossEntropyLoss", use_sigmoid=True), sets, BATCH),
    "retriever": (retriever, samples, BATCH),
}
every_case = pytest.mark.parametrize(("make", "targets", "divisor"), CASES.values(), ids=CASES.keys())


@passes
@every_case
def test_weights_of_one_are_the_hosts_step(make, targets, divisor, pruned):
    model, host = make(), make()
    weigher, views = attached(model)
    assert views.vectorised
    ours = step(model, weigher, ONES, pruned, targets)
    assert_same_step(ours, step(host, make_samples=targets))
    assert ours.scores is not None


@passes
@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_the_weighted_sum_is_optimised_and_samples_are_scored(make, targets, divisor, dtype, pruned):
    model, host = make(dtype), make(dtype)
    weigher, _ = attached(model)
    ours = step(model, weigher, WEIGHTS, pruned, targets, dtype)
    theirs = step(host, make_samples=targets, dtype=dtype)
    expected = oracle_step(host, losses_alone(host, make_inputs(dtype=dtype), targets()), WEIGHTS, divisor)
    if pruned:
        assert_shows_mean(ours, theirs, expected.loss, WEIGHTS)
    else:
        assert_shows(ours, theirs)
    assert_same_gradients(ours, expected, dtype)
    assert_scores(ours, expected.scores)


@every_case
def test_checkpoints_keep_their_keys_and_models_are_given_back(make, targets, divisor):
    model, host = make(), make()
    step(model, make_samples=targets)  # label smoothing learns the number of classes
    model.zero_grad()
    before = [dict(vars(module)) for module in model.modules()]
    weigher, views = attached(model)
    assert list(model.state_dict()) == list(host.state_dict())
    model.load_state_dict(host.state_dict())
    assert not views.renew()
    views.restore()
    for module, old in zip(model.modules(), before, strict=True):
        assert list(vars(module)) == list(old)
        assert all(vars(module)[key] is value for key, value in old.items())
    weigher.begin(WEIGHTS)
    assert relative_error(step(model, make_samples=targets), step(host, make_samples=targets)) == 0


# ---------------------------------------------------------------- what is refused by name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build(classifier(None)), "ImageClassifier has no head and no loss_module: nothing to weigh"),
        (lambda: without_head(retriever()), "ImageToImageRetriever has no head and no loss_module"),
        (
            lambda: build(dict(type="SimCLR", backbone=dict(type="TinyBackbone"), head=None)),
            "SimCLR has no head: nothing to weigh",
        ),
    ],
    ids=["classifier", "retriever", "self_supervised"],
)
def test_models_without_a_classification_loss_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        attached(make())


def without_head(model):
    assert isinstance(model, ImageToImageRetriever)
    model.head = None
    return model


# ---------------------------------------------------------------- copies

LOSSES = {
    "ce": dict(type="CrossEntropyLoss"),
    "soft": dict(type="CrossEntropyLoss", use_soft=True),
    "smooth": dict(type="LabelSmoothLoss", label_smooth_val=0.1, num_classes=NUM_CLASSES),
    "focal": dict(type="FocalLoss"),
    "seesaw": dict(type="SeesawLoss", num_classes=NUM_CLASSES),
}
AUGMENT = dict(augments=dict(type="Mixup", alpha=0.8))


def with_loss(name, **options):
    return build(classifier(linear_head(LOSSES[name]), **options))


@every_copy_and_average
@pytest.mark.parametrize("name", ["ce", "smooth", "focal", "seesaw"])
def test_copies_are_the_hosts_and_nobody_elses(name, duplicate):
    model, host = with_loss(name, train_cfg=AUGMENT), with_loss(name, train_cfg=AUGMENT)
    weigher, _ = attached(model)
    weigher.begin(WEIGHTS, pruned=True)
    other = duplicate(model)
    assert not any(isinstance(value, LossView) for module in other.modules() for value in vars(module).values())
    assert not {id(each) for each in other.modules()} & {id(each) for each in model.modules()}
    other.requires_grad_()  # a moving average has none
    assert_same_step(step(other), step(host))
    assert weigher.end() == (None, None), "the copy scored for the model"
    host = with_loss(name, train_cfg=AUGMENT)
    assert_same_step(step(model, weigher, ONES), step(host))


def test_a_copy_has_an_augmentation_of_its_own():
    """As the host's copy has: one that counts its calls, say, must not count those of another model."""
    model = with_loss("ce", train_cfg=AUGMENT)
    attached(model)
    other = copy.deepcopy(model)
    assert type(other.data_preprocessor.batch_augments) is RandomBatchAugment
    assert other.data_preprocessor.batch_augments is not model.data_preprocessor.batch_augments.host


# ---------------------------------------------------------------- precision, recomputation, compilation


@passes
@pytest.mark.parametrize("name", ["ce", "smooth", "focal", "seesaw"])
def test_under_autocast_values_are_the_hosts(name, pruned):
    def once(model, weigher=None, weights=None):
        def losses():
            with torch.autocast("cpu", torch.bfloat16):
                return model.loss(make_inputs(), samples())

        return take_step(model, losses, weigher, weights, pruned)

    model, host = with_loss(name), with_loss(name)
    weigher, _ = attached(model)
    ours, theirs = once(model, weigher, ONES), once(host)
    assert_shows(ours, theirs)
    assert relative_error(ours, theirs) <= 1e-2
    assert ours.scores.dtype == torch.float32
    assert float(ours.scores.mean()) == pytest.approx(theirs.loss, rel=1e-2)
    model, host = with_loss(name), with_loss(name)
    weigher, _ = attached(model)
    ours, exact = once(model, weigher, WEIGHTS), with_loss(name)
    weigher, _ = attached(exact)
    if not pruned:
        assert_shows(ours, once(host))
    assert relative_error(ours, step(exact, weigher, WEIGHTS, pruned)) <= 2e-2


def resnet(dtype=torch.float32, with_cp=True):
    backbone = dict(type="ResNet", depth=18, stem_channels=4, base_channels=4, with_cp=with_cp, norm_eval=True)
    head = dict(linear_head(), in_channels=32)
    return build(
        dict(type="ImageClassifier", backbone=backbone, neck=dict(type="GlobalAveragePooling"), head=head), dtype
    )


@passes
def test_recomputed_activations_carry_the_weights(pruned):
    """``with_cp`` recomputes the forward pass within the backward one."""
    inputs = make_inputs(dtype=torch.float64).repeat(1, 1, 4, 4).requires_grad_()
    model, host = resnet(torch.float64), resnet(torch.float64, with_cp=False)
    weigher, _ = attached(model)
    ours = take_step(model, lambda: model.loss(inputs, samples()), weigher, WEIGHTS, pruned)
    expected = oracle_step(host, cross_entropies(host, inputs, samples()), WEIGHTS)
    assert_same_gradients(ours, expected, torch.float64)
    assert_scores(ours, expected.scores)


def compiled_steps(pruned, compile):
    """Steps with other weights than those of the first call, which is the one that is compiled."""
    torch.compiler.reset()
    model, host = with_loss("ce"), with_loss("ce")
    weigher, _ = attached(model)
    loss_of = compile(model)
    for weights in (ONES, WEIGHTS, torch.tensor([0.5, 2.0, 0.0, 1.0])):
        weigher.begin(weights, pruned)
        model.zero_grad()
        loss = loss_of(make_inputs(), samples())
        loss.backward()
        ours = Step(float(loss.detach()), {}, gradients_of(model), *weigher.end())
        expected = oracle_step(host, losses_alone(host, make_inputs(), samples()), weights)
        mean = shown_objective(expected.loss, weights)
        assert ours.loss == pytest.approx(mean if pruned else step(host).loss, rel=1e-6 if pruned else 0)
        assert_same_gradients(ours, expected, torch.float32)
        assert_scores(ours, expected.scores)


@passes
def test_a_compiled_training_step_is_weighed(pruned):
    """As mmengine's runner compiles a model: ``train_step``, with what turns the losses into one."""

    def compile(model):
        def train_step(inputs, data_samples):
            return model.parse_losses(model(inputs, data_samples, mode="loss"))[0]

        return torch.compile(train_step, backend="eager")

    compiled_steps(pruned, compile)


def test_a_compiled_forward_pass_is_weighed():
    """In a loop of one's own: the losses are parsed outside, where there is no graph to look at either."""

    def compile(model):
        forward = torch.compile(model.forward, backend="eager")
        return lambda inputs, data_samples: model.parse_losses(forward(inputs, data_samples, mode="loss"))[0]

    compiled_steps(True, compile)


# ---------------------------------------------------------------- another recipe in the middle of a run


def switch(model, **recipe):
    """What mmpretrain's hook does between two epochs."""
    runner = SimpleNamespace(model=model)
    if "loss" in recipe:
        SwitchRecipeHook._switch_loss(runner, recipe["loss"])
    if "train_augments" in recipe:
        SwitchRecipeHook._switch_batch_augments(runner, recipe["train_augments"])


def mixing_data():
    # A fresh set each time: the preprocessor writes into data samples.
    return dict(inputs=list(make_inputs()), data_samples=samples())


def train_step(model, weigher=None, weights=None, pruned=False):
    """A step with the data preprocessor's part in it, from the same random numbers each time."""

    def losses():
        seed(3)
        return model.loss(**model.data_preprocessor(mixing_data(), True))

    return take_step(model, losses, weigher, weights, pruned)


def mixing_model(loss="soft", augment=None):
    # Soft, as the host cannot take one-hot labels, which are integers, for targets of its plain cross entropy.
    model = with_loss(loss, data_preprocessor=dict(to_onehot=True, num_classes=NUM_CLASSES))
    model.data_preprocessor.batch_augments = augment
    return model


def mixup():
    return RandomBatchAugment(dict(type="Mixup", alpha=0.8))


def cutmix():
    return RandomBatchAugment([dict(type="CutMix", alpha=1.0), dict(type="Mixup", alpha=0.2)], probs=[0.5, 0.4])


RECIPES = {
    "another_loss": ("soft", None, lambda: dict(loss=MODELS.build(LOSSES["smooth"]))),
    "the_same_loss_anew": ("soft", None, lambda: dict(loss=MODELS.build(LOSSES["soft"]))),
    "an_augmentation": ("soft", None, lambda: dict(train_augments=mixup())),
    "another_augmentation": ("smooth", mixup, lambda: dict(train_augments=cutmix())),
    "no_augmentation": ("smooth", mixup, lambda: dict(train_augments=None)),
    "both": ("smooth", cutmix, lambda: dict(loss=MODELS.build(LOSSES["focal"]), train_augments=None)),
}
every_recipe = pytest.mark.parametrize(("loss", "augment", "recipe"), RECIPES.values(), ids=RECIPES.keys())


def twin(model, loss, augment, recipe):
    """An untouched host after the exchange, with the model's weights."""
    host = mixing_model(loss, augment and augment())
    switch(host, **recipe)
    host.load_state_dict(model.state_dict())
    return host


@passes
@every_recipe
def test_after_renewal_the_new_recipe_is_the_hosts(loss, augment, recipe, pruned):
    model = mixing_model(loss, augment and augment())
    weigher, views = attached(model)
    train_step(model, weigher, WEIGHTS, pruned)
    assert not views.renew()
    new = recipe()
    switch(model, **new)
    assert views.renew() and not views.renew()
    host = twin(model, loss, augment, recipe())
    ours = train_step(model, weigher, ONES, pruned)
    assert_same_step(ours, train_step(host))
    assert ours.scores is not None
    # Weighed: without mixing by the samples' own weights, with it at least not as the host.
    ours = train_step(model, weigher, WEIGHTS, pruned)
    if not pruned:
        assert_shows(ours, train_step(host))
    if host.data_preprocessor.batch_augments is None:
        seed(3)
        batch = host.data_preprocessor(mixing_data(), True)
        expected = oracle_step(host, losses_alone(host, **named(batch)), WEIGHTS)
        assert_same_gradients(ours, expected, torch.float32)
        if "loss" in new:  # a smoothed one stays above its entropy, as it was while images were mixed
            assert_scores(ours, expected.scores)
    else:
        assert relative_error(ours, train_step(host)) > 1e-2


def named(batch):
    return dict(inputs=batch["inputs"], samples=batch["data_samples"])


@every_recipe
def test_giving_back_leaves_the_hosts_new_objects(loss, augment, recipe):
    model = mixing_model(loss, old_augment := augment and augment())
    old_loss = model.head.loss_module
    weigher, views = attached(model)
    train_step(model, weigher, WEIGHTS)
    new = recipe()
    switch(model, **new)
    views.renew()
    train_step(model, weigher, WEIGHTS)
    views.restore()
    assert model.head.loss_module is new.get("loss", old_loss)
    assert model.data_preprocessor.batch_augments is new.get("train_augments", old_augment)
    for module in (*model.modules(), *old_loss.modules()):
        assert not any(isinstance(value, LossView) for value in vars(module).values())
    weigher.begin(WEIGHTS)
    host = twin(model, loss, augment, recipe())
    assert relative_error(train_step(model), train_step(host)) == 0
    assert weigher.end() == (None, None)


@every_recipe
def test_giving_back_before_renewal_leaves_them_too(loss, augment, recipe):
    model = mixing_model(loss, old_augment := augment and augment())
    old_loss = model.head.loss_module
    _, views = attached(model)
    new = recipe()
    switch(model, **new)
    views.restore()
    assert model.head.loss_module is new.get("loss", old_loss)
    assert model.data_preprocessor.batch_augments is new.get("train_augments", old_augment)
    for module in (*model.modules(), *old_loss.modules()):
        assert not any(isinstance(value, LossView) for value in vars(module).values())


def test_the_loss_of_a_model_without_a_head_is_exchanged_too():
    make, _, _ = CASES["timm"]
    model, host = make(), make()
    weigher, views = attached(model)
    for each in (model, host):
        switch(each, loss=MODELS.build(LOSSES["smooth"]))
    assert views.renew() and not views.renew()
    ours = step(model, weigher, WEIGHTS, True)
    assert_same_gradients(ours, oracle_step(host, losses_alone(host, make_inputs(), samples()), WEIGHTS), torch.float32)


def test_a_new_loss_that_cannot_be_weighed_is_refused_at_renewal():
    model = mixing_model()
    _, views = attached(model)
    switch(model, loss=MODELS.build(dict(type="CrossEntropyLoss", reduction="none")))
    with pytest.raises(ValueError, match="reduction='none'"):
        views.renew()


def test_two_runs_cannot_weigh_one_model_and_the_first_stays_exact():
    model, host = mixing_model("soft", mixup()), mixing_model("soft", mixup())
    weigher, views = attached(model)
    with pytest.raises(ValueError, match="weighed by another hook already"):
        attached(model)
    assert not views.renew()
    assert_same_step(train_step(model, weigher, ONES), train_step(host))


@pytest.mark.parametrize("attribute", ["cls_criterion", "forward"])
def test_what_wraps_a_view_outlives_it_without_weighing_twice(attribute):
    """A profiler, say: our views are attached anew above it, and the one inside it hands everything to the host."""
    model, host = build(classifier(linear_head())), build(classifier(linear_head()))
    weigher = LossWeigher()
    views = attach_views(model, weigher)
    module = model.head.loss_module
    inner = getattr(module, attribute)
    setattr(module, attribute, lambda *args, **kwargs: inner(*args, **kwargs))
    views.renew()
    ours = take_step(model, lambda: model.loss(make_inputs(), labelled(make_labels())), weigher, WEIGHTS, True)
    expected = oracle_step(host, losses_alone(host, make_inputs(), labelled(make_labels())), WEIGHTS)
    assert_same_gradients(ours, expected, torch.float32)
    assert_scores(ours, expected.scores)
