"""Self-supervised models of mmpretrain: each image's loss has the weight of its image, or of its pair."""

import copy
import inspect
from itertools import combinations, permutations

import pytest
import torch
from torch import nn

pytest.importorskip("mmpretrain")
from copies import every_copy_and_average
from mmengine.logging import MessageHub
from mmengine.model import BaseModule
from mmpretrain.models import CrossEntropyLoss, LabelSmoothLoss
from mmpretrain.models.heads import (
    BEiTV1Head,
    ContrastiveHead,
    MAEPretrainHead,
    MixMIMPretrainHead,
    SparKPretrainHead,
)
from mmpretrain.models.selfsup import MAE, BEiT, SimSiam
from oracle_alone import Step, gradients_of, relative_error, seed, take_step
from oracle_losses import passes, shown, shown_by_own
from oracle_selfsup import (
    BATCH,
    CE,
    CLASSES,
    CONFIGS,
    COSINE,
    DIMS,
    L2,
    TWO_VIEWS,
    WEIGHTS,
    Head,
    Model,
    Predictions,
    build,
    generator,
    masked_tokens,
    mlp,
    number,
    oracle_step,
    relative_to,
    shown_mean,
    step,
    targets_of,
)

from infobatch_mm.core import Plan
from infobatch_mm.losses import LossWeigher, SampleLosses, attach_views, register_loss_view, registry
from infobatch_mm.losses.views import LossView

ADVICE = r"docs/losses\.md"


@pytest.fixture(autouse=True)
def length_of_the_run():
    """By which BYOL's moving average finds out how far it is."""
    hub = MessageHub.get_current_instance()
    hub.update_info("max_iters", 100)
    yield
    hub.pop_info("max_iters")


def attached(model):
    weigher = LossWeigher()
    return weigher, attach_views(model, weigher)


def assert_shows(ours, host, exact=True):
    """The loss and the log are the host's, to the bit."""
    assert list(ours.log) == list(host.log)
    if exact:
        assert ours.loss == host.loss and ours.log == host.log
    else:
        assert ours.loss == pytest.approx(host.loss, rel=1e-6)
        assert ours.log == pytest.approx(host.log, rel=1e-6)


def assert_shows_in(pruned, ours, host, expected, exact=True):
    """The host's loss and log in a full pass; in a pruned one the mean by weights."""
    if not pruned:
        assert_shows(ours, host, exact)
        return
    assert list(ours.log) == list(host.log)
    assert ours.loss == pytest.approx(expected.log["shown"], rel=1e-5)


def assert_same_step(ours, host, exact=True):
    """A step with weights of one."""
    assert_shows(ours, host, exact)
    assert relative_error(ours, host) <= 1e-6
    assert [each is None for each in ours.gradients.values()] == [each is None for each in host.gradients.values()]


def seen(case, weights):
    """What the images of a batch are to be weighed by; the weight of a pair of different ones is their product here."""
    pairs = weights * weights.flip(0)
    if len(weights) % 2:
        pairs[len(weights) // 2] = weights[len(weights) // 2]
    return pairs if case.paired else weights


# ---------------------------------------------------------------- heads alone: their arguments

#: Masked tokens of each sample, of nine: many, none, some, all.
COUNTS = [5, 0, 2, 9]
IMAGE, PATCH, TOKENS = 12, 4, 9


def values(*shape, draws=0):
    return torch.randn(*shape, generator=generator(draws))


def mask_of(counts=COUNTS, dtype=torch.float32, tokens=TOKENS):
    mask = torch.zeros(len(counts), tokens, dtype=dtype)
    for i, count in enumerate(counts):
        mask[i, torch.randperm(tokens, generator=generator(i))[:count]] = 1
    return mask


def patches(mask):
    """Predictions of patches, and images."""
    return lambda: [values(BATCH, TOKENS, 3 * PATCH**2), values(BATCH, 3, IMAGE, IMAGE, draws=1), mask]


def tokens(*mask):
    return lambda: [values(BATCH, TOKENS, DIMS), values(BATCH, TOKENS, DIMS, draws=1), *mask]


def whole_images(dtype):
    mask = mask_of([5, 0, 2, 16], dtype, 16).view(BATCH, 4, 4)
    return lambda: [values(BATCH, 3, 8, 8), values(BATCH, 3, 8, 8, draws=1), mask]


def visible():
    visible = ~mask_of(dtype=torch.bool).view(BATCH, 1, 3, 3)
    return [values(BATCH, 3, IMAGE, IMAGE), values(BATCH, 3, IMAGE, IMAGE, draws=1), visible]


def beit_v1(dtype):
    mask = mask_of(dtype=dtype).view(BATCH, 3, 3)
    return lambda: [values(BATCH, 1 + TOKENS, 6), values(BATCH, CLASSES, 3, 3, draws=1), mask]


def beit_v2(dtype):
    labels = torch.randint(0, CLASSES, (BATCH, TOKENS), generator=generator(2))
    mask = mask_of(dtype=dtype).view(BATCH, 3, 3)
    return lambda: [values(BATCH, TOKENS, 6), values(BATCH, TOKENS, 6, draws=1), labels, mask]


def clip(dtype):
    mask = mask_of(dtype=dtype).view(BATCH, 3, 3)
    return lambda: [values(BATCH, TOKENS, 6), values(BATCH, TOKENS, DIMS, draws=1), mask]


def cae():
    masked = [values(BATCH, 4, 5, draws=i) for i in (1, 2)]
    logits = [values(4 * BATCH, CLASSES), values(BATCH, CLASSES, 3, 3, draws=3)]
    return [*logits, *masked, mask_of([4] * BATCH, torch.bool)]


def mixed(batch=BATCH):
    """Twice as many rows of predictions as images, and a mask that all share."""
    mask = mask_of([4])[..., None]
    return [values(2 * batch, TOKENS, 3 * PATCH**2), values(batch, 3, IMAGE, IMAGE, draws=1), mask]


def pixel(type="MAEPretrainHead", **options):
    return dict(type=type, loss=L2, patch_size=PATCH) | options


def beit(type="BEiTV1Head", **options):
    return dict(type=type, embed_dims=6, num_embed=CLASSES, loss=CE) | options


L1, L1_CHANNEL, L2_CHANNEL = dict(L2, criterion="L1"), dict(L2, criterion="L1", channel=3), dict(L2, channel=3)
SMOOTH = dict(type="LabelSmoothLoss", label_smooth_val=0.1, num_classes=CLASSES, mode="original")
MIM, MIM_COSINE = dict(type="MIMHead", loss=L2), dict(type="MIMHead", loss=COSINE)
CLIP = beit("iTPNClipHead", num_embed=DIMS, loss=dict(type="CosineSimilarityLoss"))
SHARED = mask_of([4])
HEADS = {
    "mae": Head(pixel(), patches(mask_of())),
    "mae_norm_pix": Head(pixel(norm_pix=True), patches(mask_of())),
    "mae_l1": Head(pixel(loss=L1), patches(mask_of())),
    "mae_channel": Head(pixel(loss=L2_CHANNEL, norm_pix=True), patches(mask_of())),
    "mae_bool": Head(pixel(), patches(mask_of(dtype=torch.bool))),
    "mae_int": Head(pixel(loss=L1_CHANNEL), patches(mask_of(dtype=torch.int64))),
    "mae_shared": Head(pixel(), patches(SHARED)),
    "mae_unmasked": Head(pixel(loss=L2_CHANNEL), patches(None)),
    "simmim": Head(dict(type="SimMIMHead", patch_size=2, loss=L1_CHANNEL), whole_images(torch.int64)),
    "simmim_no_channel": Head(dict(type="SimMIMHead", patch_size=2, loss=L2), whole_images(torch.bool)),
    "simmim_float": Head(dict(type="SimMIMHead", patch_size=2, loss=L2_CHANNEL), whole_images(torch.float32)),
    "mim": Head(MIM, tokens(mask_of(dtype=torch.bool))),
    "mim_unmasked": Head(MIM, tokens()),
    "mim_channel": Head(dict(MIM, loss=L1_CHANNEL), tokens(mask_of())),
    "mim_shared_bool": Head(MIM, tokens(SHARED.bool())),
    "cosine": Head(MIM_COSINE, tokens(mask_of())),
    "cosine_bool": Head(MIM_COSINE, tokens(mask_of(dtype=torch.bool))),
    "cosine_unmasked": Head(MIM_COSINE, tokens()),
    "cosine_shared": Head(MIM_COSINE, tokens(SHARED)),
    "cosine_plain": Head(dict(MIM, loss=dict(type="CosineSimilarityLoss")), tokens(mask_of(dtype=torch.int64))),
    "spark": Head(pixel("SparKPretrainHead"), visible),
    "spark_plain": Head(pixel("SparKPretrainHead", norm_pix=False, loss=L1_CHANNEL), visible),
    "beit_v1": Head(beit(), beit_v1(torch.int64)),
    "beit_v1_bool": Head(beit(loss=dict(CE, loss_weight=0.5)), beit_v1(torch.bool)),
    "beit_v1_smooth": Head(beit(loss=SMOOTH), beit_v1(torch.float32)),
    "beit_v2": Head(beit("BEiTV2Head"), beit_v2(torch.int64), predicted=(0, 1)),
    "beit_v2_bool": Head(beit("BEiTV2Head"), beit_v2(torch.bool), predicted=(0, 1)),
    "itpn_clip": Head(CLIP, clip(torch.int64)),
    "itpn_clip_pixels": Head(dict(CLIP, loss=L2), clip(torch.float32)),
    "cae": Head(dict(type="CAEHead", loss=dict(type="CAELoss", lambd=2)), cae, predicted=(0, 2)),
    "cae_lambda": Head(dict(type="CAEHead", loss=dict(type="CAELoss", lambd=0.3)), cae, predicted=(0, 2)),
    "latents": Head(
        dict(type="LatentPredictHead", predictor=mlp(DIMS, False), loss=COSINE),
        lambda: [values(BATCH, DIMS), values(BATCH, DIMS, draws=1)],
    ),
}
MODELS = {name: Model(name) for name in CONFIGS}
CASES = {f"head-{name}": case for name, case in HEADS.items()} | {
    f"model-{name}": case for name, case in MODELS.items()
}
every_case = pytest.mark.parametrize("name", CASES)
every_head = pytest.mark.parametrize("name", HEADS)
every_model = pytest.mark.parametrize("name", MODELS)


def exact(name):
    """CAE's two losses come from functions of torch whose sums round otherwise than a sum over samples."""
    return "cae" not in name


# ---------------------------------------------------------------- heads alone, and whole models


@passes
@every_case
def test_with_weights_of_one_a_step_is_the_hosts(name, pruned):
    case = CASES[name]
    model, host = case.build(), case.build()
    weigher, views = attached(model)
    ours = step(case, model, weigher, torch.ones(BATCH), pruned)
    assert_same_step(ours, step(case, host), exact(name))
    for (key, buffer), other in zip(model.named_buffers(), host.buffers(), strict=True):
        assert torch.equal(buffer, other), key
    assert views.vectorised and not views.not_separable


@passes
@every_head
def test_weighed_heads_optimise_what_the_samples_contribute(name, pruned):
    case, weights = HEADS[name], WEIGHTS[:BATCH]
    model, host = case.build(torch.float64), case.build(torch.float64)
    weigher, _ = attached(model)
    ours, expected = step(case, model, weigher, weights, pruned), oracle_step(case, weights, torch.float64)
    assert_shows_in(pruned, ours, step(case, host), expected, exact(name))
    assert relative_error(ours, expected) <= 1e-7, "weights are float32"
    assert relative_to(ours, expected.scores) <= 1e-6


@passes
@every_model
def test_weighed_models_optimise_what_the_samples_contribute(name, pruned):
    case, weights = MODELS[name], WEIGHTS[:BATCH]
    model, host = case.build(), case.build()
    weigher, _ = attached(model)
    ours, expected = step(case, model, weigher, weights, pruned), oracle_step(case, seen(case, weights))
    assert_shows_in(pruned, ours, step(case, host), expected, exact(name))
    assert relative_error(ours, expected) <= 1e-5
    assert relative_to(ours, expected.scores) <= 1e-5
    assert relative_error(ours, step(case, host)) > 1e-2, "these weights make a difference"


#: Heads whose samples have masks of their own.
MASKED = [name for name in HEADS if not any(word in name for word in ("unmasked", "shared", "cae", "latents"))]


@pytest.mark.parametrize("name", MASKED)
def test_a_sample_without_a_masked_token_is_not_scored_and_harms_nobody(name):
    case = HEADS[name]
    model = case.build()
    weigher, _ = attached(model)
    ours = step(case, model, weigher, WEIGHTS[:BATCH], True)
    assert ours.scored.tolist() == [True, False, True, True]
    assert ours.scores[ours.scored].isfinite().all()
    assert all(each.isfinite().all() for each in ours.gradients.values())


def half_step(case, model, *weighing):
    def losses():
        with torch.autocast("cpu", torch.bfloat16):
            return case.losses(model)

    return take_step(model, losses, *weighing)


@every_head
def test_under_autocast_values_are_the_hosts_and_scores_single_precision(name):
    case = HEADS[name]
    model, host = case.build(torch.bfloat16), case.build(torch.bfloat16)
    weigher, _ = attached(model)

    ours, theirs = half_step(case, model, weigher, torch.ones(BATCH), True), half_step(case, host)
    assert_shows(ours, theirs, exact(name))
    assert relative_error(ours, theirs) <= 1e-2
    # bfloat16 has eight bits; labels are the best of logits, which it makes equal.
    expected = oracle_step(case, torch.ones(BATCH)).scores
    assert relative_to(ours, expected) <= 0.1


@pytest.mark.parametrize("name", ["mae", "simmim", "beit_v2", "cae", "mixmim", "spark", "simsiam"])
def test_models_under_autocast_show_the_host(name):
    case = MODELS[name]
    model, host = case.build(), case.build()
    weigher, _ = attached(model)

    ours, theirs = half_step(case, model, weigher, torch.ones(BATCH), True), half_step(case, host)
    assert_shows(ours, theirs, exact(name))
    assert relative_error(ours, theirs) <= 1e-2
    assert ours.scores.dtype == torch.float32 and ours.scored.all()


# ---------------------------------------------------------------- batches of other sizes, one after another


def sizes_of(name):
    """BatchNorm over one vector is refused by torch."""
    return (2, 3) if name in ("byol", "simsiam") else (1, 2, 3)


@pytest.mark.parametrize(("name", "batch"), [(name, batch) for name in MODELS for batch in sizes_of(name)])
def test_small_batches_are_weighed(name, batch):
    """In one of two samples, the list of two views is as long as that of the data samples."""
    case, weights = MODELS[name], WEIGHTS[-batch:]
    model, host = case.build(), case.build()
    weigher, _ = attached(model)
    ours = step(case, model, weigher, weights, True, batch)
    expected = oracle_step(case, seen(case, weights), batch=batch)
    assert_shows_in(True, ours, step(case, host, batch=batch), expected, exact(name))
    assert relative_error(ours, expected) <= 1e-5
    assert relative_to(ours, expected.scores) <= 1e-5


@pytest.mark.parametrize("name", TWO_VIEWS)
def test_two_views_of_two_images_may_be_given_by_name_and_in_any_order(name):
    case, weights = MODELS[name], WEIGHTS[:2] + 1
    model = case.build()
    weigher, _ = attached(model)

    def losses():
        seed(3)
        return model.loss(data_samples=case.samples(2), inputs=case.inputs(2))

    ours = take_step(model, losses, weigher, weights, True)
    expected = oracle_step(case, weights, batch=2)
    assert relative_error(ours, expected) <= 1e-5
    assert relative_to(ours, expected.scores) <= 1e-5


@pytest.mark.parametrize("name", ["mae", "spark", "beit_v1", "beit_v2", "itpn_clip", "cae", "latents"])
def test_heads_may_be_called_by_name(name):
    case, weights = HEADS[name], WEIGHTS[:BATCH]
    model = case.build()
    weigher, _ = attached(model)
    method = model.head if name == "spark" else model.head.loss
    names = list(inspect.signature(type(model.head).forward if name == "spark" else type(model.head).loss).parameters)
    given = dict(zip(names[1:], model.given(), strict=True))

    def losses():
        result = method(**dict(reversed(given.items())))
        return dict(loss=sum(result) if isinstance(result, tuple) else result)

    ours, expected = take_step(model, losses, weigher, weights, True), oracle_step(case, weights)
    assert relative_error(ours, expected) <= 1e-5
    assert relative_to(ours, expected.scores) <= 1e-5


def test_two_views_without_data_samples():
    case = MODELS["simsiam"]
    model = case.build()
    weigher, _ = attached(model)
    ours = take_step(model, lambda: model.loss(case.inputs(2), None), weigher, WEIGHTS[-2:], True)
    assert relative_error(ours, oracle_step(case, WEIGHTS[-2:], batch=2)) <= 1e-5


@every_model
def test_a_batch_leaves_nothing_to_the_next(name):
    """Neither weights of pairs nor of tokens, nor scores; and without a batch in hand a model is the host's."""
    case = MODELS[name]
    model, host = case.build(), case.build()
    state = copy.deepcopy(model.state_dict())
    weigher, _ = attached(model)
    step(case, model, weigher, WEIGHTS[:3], True, 3)
    assert weigher.end() == (None, None)
    model.load_state_dict(state)
    ours = step(case, model, weigher, torch.ones(BATCH), True)
    model.load_state_dict(state)
    again = step(case, model)
    theirs = step(case, host)
    assert_same_step(ours, theirs, exact(name))
    assert relative_error(again, theirs) == 0 and again.loss == theirs.loss
    assert ours.scored.all()


def test_an_evaluation_between_two_steps_is_the_hosts():
    case = MODELS["mae"]
    model, host = case.build(), case.build()
    weigher, _ = attached(model)
    weigher.begin(WEIGHTS[:BATCH], True)
    model.eval(), host.eval()
    assert torch.equal(case.losses(model, 3)["loss"], case.losses(host, 3)["loss"])
    assert weigher.end() == (None, None)


@pytest.mark.parametrize("name", ["mixmim", "beit_v2"])
def test_a_forward_pass_that_is_repeated_counts_once(name):
    """The scores are those of the last, and pairs are not made of pairs."""
    case = MODELS[name]
    model, other = case.build(), case.build()

    def twice():
        case.losses(other)
        return case.losses(other)

    weigher, _ = attached(model)
    once = step(case, model, weigher, WEIGHTS[:BATCH], True)
    weigher, _ = attached(other)
    again = take_step(other, twice, weigher, WEIGHTS[:BATCH], True)
    assert relative_error(again, once) == 0 and torch.equal(again.scores, once.scores)


def test_recomputed_activations_carry_the_weights():
    case = Model("simmim")
    checkpointed = Model("simmim", dict(backbone=dict(case.config["backbone"], with_cp=True)))
    model = checkpointed.build()
    weigher, _ = attached(model)
    ours = step(checkpointed, model, weigher, WEIGHTS[:BATCH], True)
    assert relative_error(ours, oracle_step(case, WEIGHTS[:BATCH])) <= 1e-5


@pytest.mark.parametrize(
    "name",
    [
        "head-mae_channel",
        "model-mixmim",
        *(pytest.param(f"head-{name}", marks=pytest.mark.slow) for name in ("beit_v1", "beit_v2", "cae", "latents")),
    ],
)
def test_a_compiled_training_step_is_weighed(name):
    """With other weights than those of the first call, which is the one that is compiled."""
    torch.compiler.reset()
    case = CASES[name]
    model = case.build()
    weigher, _ = attached(model)
    state = copy.deepcopy(model.state_dict())
    compiled = torch.compile(model.loss, backend="eager")
    given = (case.inputs(), case.samples()) if name.startswith("model") else ()

    def losses():
        seed(3)
        return compiled(*given)

    for weights in (torch.ones(BATCH), WEIGHTS[:BATCH]):
        model.load_state_dict(state)
        ours, expected = take_step(model, losses, weigher, weights, True), oracle_step(case, seen(case, weights))
        assert relative_error(ours, expected) <= 1e-5
        assert relative_to(ours, expected.scores) <= 1e-5


# ---------------------------------------------------------------- given back, and copied


@every_case
def test_models_are_given_back_as_they_were(name):
    case = CASES[name]
    model, host = case.build(), case.build()
    step(case, model), step(case, host)  # what modules remember by themselves
    model.zero_grad(), host.zero_grad()
    before = [dict(vars(module)) for module in model.modules()]
    weigher, views = attached(model)
    assert list(model.state_dict()) == list(host.state_dict())
    assert any(isinstance(value, LossView) for module in model.head.modules() for value in vars(module).values())
    step(case, model, weigher, WEIGHTS[:BATCH], True), step(case, host)
    assert not views.renew()
    views.restore()
    for module, old in zip(model.modules(), before, strict=True):
        # Swin remembers relative positions, HOG its last images: tensors of their own.
        assert list(vars(module)) == list(old)
        changed = [key for key, value in old.items() if vars(module)[key] is not value]
        assert all(isinstance(vars(module)[key], torch.Tensor) for key in changed), changed
    weigher.begin(WEIGHTS[:BATCH], True)
    ours, theirs = step(case, model), step(case, host)
    assert relative_error(ours, theirs) == 0 and ours.log == theirs.log
    assert weigher.end() == (None, None)


@every_copy_and_average
@pytest.mark.parametrize("name", ["mae", "simmim", "beit_v1", "beit_v2", "cae", "mixmim", "spark", "itpn_clip", "byol"])
def test_copies_are_the_hosts_and_nobody_elses(name, duplicate):
    case = MODELS[name]
    model, host = case.build(), case.build()
    weigher, _ = attached(model)
    weigher.begin(WEIGHTS[:BATCH], True)
    other = duplicate(model)
    assert not any(isinstance(value, LossView) for module in other.modules() for value in vars(module).values())
    assert not {id(each) for each in other.modules()} & {id(each) for each in model.modules()}
    other.requires_grad_(), host.requires_grad_()  # a moving average has none
    ours, theirs = step(case, other), step(case, host)
    assert ours.log == theirs.log and relative_error(ours, theirs) == 0
    assert weigher.end() == (None, None), "the copy scored for the model"
    assert_same_step(step(case, model, weigher, torch.ones(BATCH)), step(case, case.build()), exact(name))


def test_two_runs_cannot_weigh_one_model():
    model = MODELS["mixmim"].build()
    attached(model)
    with pytest.raises(ValueError, match="weighed by another hook already"):
        attached(model)


def test_mff_shows_the_weights_of_its_fusion():
    case = MODELS["mff"]
    model = case.build()
    weigher, _ = attached(model)
    ours = step(case, model, weigher, WEIGHTS[:BATCH], True)
    assert list(ours.log) == ["loss", "weight_0", "weight_1"]
    assert ours.log["weight_0"] + ours.log["weight_1"] == pytest.approx(1)
    assert ours.gradients["backbone.proj_weights"].abs().sum() > 0


def test_a_mask_of_one_dimension_is_shared_too():
    """The host broadcasts it over the batch, whose size it may happen to have."""
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0])
    case = Head(MIM, lambda: [values(BATCH, 4, DIMS), values(BATCH, 4, DIMS, draws=1), mask])
    shared = Head(MIM, lambda: [*case.make()[:2], mask[None]])
    model = case.build()
    weigher, _ = attached(model)
    ours, expected = step(case, model, weigher, WEIGHTS[:BATCH], True), oracle_step(shared, WEIGHTS[:BATCH])
    assert relative_error(ours, expected) <= 1e-6
    assert relative_to(ours, expected.scores) <= 1e-5


# ---------------------------------------------------------------- MixMIM: images in pairs


def pair(first, second):
    """A weight of pairs that is no product, to see that it is asked for."""
    return 0.5 * first * second + 0.1 * (first + second)


def paired_step(case, model, weigher, weights, batch, indices=None, pair=pair):
    weigher.begin(weights, True, indices, pair)
    loss, _ = model.parse_losses(case.losses(model, batch))
    model.zero_grad()
    loss.backward()
    return Step(float(loss.detach()), {}, gradients_of(model), *weigher.end())


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5])
def test_images_have_the_weight_of_their_pair_and_scores_of_their_own(batch):
    case, weights = MODELS["mixmim"], WEIGHTS[:batch]
    model = case.build()
    weigher, _ = attached(model)
    ours = paired_step(case, model, weigher, weights, batch, torch.arange(batch) + 7)
    images = pair(weights, weights.flip(0))
    if batch % 2:  # the image in the middle meets itself
        images[batch // 2] = weights[batch // 2]
    expected = oracle_step(case, images, batch=batch)
    assert ours.loss == pytest.approx(expected.log["shown"], rel=1e-5)
    assert relative_error(ours, expected) <= 1e-5
    assert relative_to(ours, expected.scores) <= 1e-5


def test_an_image_that_meets_a_repetition_of_itself_has_its_own_weight():
    case, weights = MODELS["mixmim"], torch.tensor([2.0, 0.5, 3.0, 2.0])
    model = case.build()
    weigher, _ = attached(model)
    ours = paired_step(case, model, weigher, weights, BATCH, torch.tensor([9, 4, 8, 9]))
    images = torch.tensor([2.0, pair(0.5, 3.0), pair(3.0, 0.5), 2.0])
    assert relative_error(ours, oracle_step(case, images)) <= 1e-5


def plans_of(num_samples, candidates, kept):
    """All plans that a draw of ``kept`` among the first ``candidates`` samples can give, but for their order."""
    others = range(candidates, num_samples)
    for drawn in combinations(range(candidates), kept):
        weights = [candidates / kept] * kept + [1.0] * len(others)
        yield Plan(torch.tensor([*drawn, *others]), torch.tensor(weights), pruned=kept < candidates)


class Pairs:
    """MixMIM's head on predictions of every image in every company, which are parameters."""

    def __init__(self, num_samples):
        self.predictions = torch.rand(num_samples, num_samples, generator=generator(5)).requires_grad_()
        self.images = values(num_samples, 3, 8, 8, draws=6)
        head = dict(pixel("MixMIMPretrainHead"), _scope_="mmpretrain")
        self.model = Predictions(head, [torch.zeros(1)], (0,))
        self.weigher = LossWeigher()
        attach_views(self.model, self.weigher)
        self.mask = torch.tensor([1.0, 0.0, 1.0, 0.0]).view(1, 4, 1)

    def gradient(self, plan, places, pair_weights):
        """Of one batch, shape (N, N)."""
        samples = plan.indices[places]
        decoded = self.predictions[samples, samples.flip(0)]
        # Tokens that an image gave away are decoded in its partner's place.
        decoded = torch.cat([decoded, decoded.flip(0)])[:, None, None].expand(-1, 4, 48)
        self.weigher.begin(plan.weights[places], plan.pruned, samples, pair_weights)
        loss = self.model.head.loss(decoded, self.images[samples], self.mask)
        self.weigher.end()
        return torch.autograd.grad(loss, self.predictions)[0].double()

    def over_all_orders(self, plans, batch_size, rule):
        """What all passes over all plans add up to in the mean, in every order of their visits."""
        passes = []
        for plan in plans:
            batches = {
                places: self.gradient(plan, torch.tensor(places), rule(plan))
                for places in permutations(range(len(plan)), batch_size)
            }
            for order in permutations(range(len(plan))):
                starts = range(0, len(plan), batch_size)
                passes.append(sum(batches[order[start : start + batch_size]] for start in starts))
        return torch.stack(passes)


#: Samples, candidates for pruning, how many of them are kept, batch size: even and odd ones.
SETTINGS = [(6, 4, 2, 2), (6, 5, 2, 3), (6, 6, 3, 3), (6, 4, 2, 4)]
every_setting = pytest.mark.parametrize("setting", SETTINGS, ids=str)


def expectations(setting, rule):
    num_samples, candidates, kept, batch_size = setting
    pairs = Pairs(num_samples)
    whole = Plan(torch.arange(num_samples), torch.ones(num_samples), pruned=False)
    if num_samples % batch_size:  # a full pass of batches as large as the pruned one's, and as many as it has visits
        batches = [
            pairs.gradient(whole, torch.tensor(places), whole.pair_weights)
            for places in permutations(range(num_samples), batch_size)
        ]
        full = torch.stack(batches).mean(0) * num_samples / batch_size
    else:
        full = pairs.over_all_orders([whole], batch_size, lambda plan: plan.pair_weights).mean(0)
    pruned = pairs.over_all_orders(plans_of(num_samples, candidates, kept), batch_size, rule)
    return full, pruned


@every_setting
def test_mixed_images_are_unbiased_over_all_plans_and_orders(setting):
    full, pruned = expectations(setting, lambda plan: plan.pair_weights)
    torch.testing.assert_close(pruned.mean(0), full, rtol=1e-5, atol=1e-9)
    meet = torch.ones_like(full) if setting[-1] % 2 else 1 - torch.eye(len(full))
    assert bool(((full != 0) == (meet != 0)).all())
    assert float((pruned - full).abs().max()) > 0.1 * float(full.abs().max()), "each pass is another one"


SIMPLER = dict(own=lambda first, second: first, mean=lambda first, second: (first + second) / 2, product=torch.mul)


@pytest.mark.parametrize("rule", SIMPLER)
@pytest.mark.parametrize("setting", [each for each in SETTINGS if each[0] > each[1]], ids=str)
def test_simpler_weights_are_biased(setting, rule):
    """With an image's own weight, say, as if its partner had been certain to be there."""
    weights = SIMPLER[rule]
    full, pruned = expectations(setting, lambda plan: weights)
    met = full != 0
    assert float((pruned.mean(0)[met] / full[met] - 1).abs().max()) > 0.1


# ---------------------------------------------------------------- third parties: heads that can be weighed


def of_class(name, cls, dtype=torch.float32):
    """A model whose head has become one of this class."""
    model = build(CONFIGS[name], dtype)
    model.head.__class__ = cls
    return model


class Smoothed(MAEPretrainHead):
    """Another target, and the ``loss`` of its parent."""

    def construct_target(self, target):
        return super().construct_target(target).tanh()


class SmoothedSpark(SparKPretrainHead):
    def construct_target(self, target):
        return super().construct_target(target).tanh()


class LogCosh(MAEPretrainHead):
    """A ``loss`` of its own, a mean over the masked patches."""

    def loss(self, pred, target, mask):
        elements = torch.log(torch.cosh(pred - self.construct_target(target))).mean(-1)
        return (elements * mask).sum() / mask.sum()


class Reconstruction(BaseModule):
    """Nobody's."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, DIMS))

    def loss(self, pred, target, mask):
        each = (pred * self.scale - target).abs().mean(-1)
        return (each * mask).sum() / mask.sum()


class ReconstructionForward(Reconstruction):
    """Without a ``loss``: called itself, as SparK's."""

    loss = None

    def forward(self, pred, target, mask):
        return Reconstruction.loss(self, pred, target, mask)


class Summed(Reconstruction):
    def loss(self, pred, target, mask):
        return dict(loss=((pred * self.scale - target).abs().mean(-1) * mask).sum(), shown=mask.sum())


class FromViews(Reconstruction):
    """Given the views as a list."""

    def loss(self, views, mask):
        return super().loss(*views, mask)


def own_head(head, counts=(3, 1, 2, 6), dtype=torch.float64):
    """A model of a head of one's own, and masks of these numbers."""
    mask = mask_of(list(counts), tokens=6).to(dtype)
    arguments = [values(len(counts), 6, DIMS).to(dtype), values(len(counts), 6, DIMS, draws=1).to(dtype), mask]
    model = Predictions(head().to(dtype), arguments, (0,)).train()
    if head is FromViews:
        model.loss = lambda inputs=None, data_samples=None: dict(
            loss=model.head.loss([model.predicted["argument0"], arguments[1]], mask)
        )
    return model


def losses_alone(model):
    """The head's loss on each sample alone."""
    pred, (_, target, mask) = model.predicted["argument0"], model.arguments
    rows = [slice(i, i + 1) for i in range(len(mask))]
    return [Reconstruction.loss(model.head, pred[row], target[row], mask[row]) for row in rows]


def reference_step(model, objective, losses):
    scores = [each if isinstance(each, float) else number(each) for each in losses]
    model.zero_grad()
    objective.backward()
    return Step(number(objective), {}, gradients_of(model), scores)


def weighted(losses, weights):
    return sum(weight * loss for weight, loss in zip(weights.double().tolist(), losses, strict=True))


@passes
@pytest.mark.parametrize(("name", "cls"), [("mae", Smoothed), ("spark", SmoothedSpark)])
def test_a_head_that_leaves_the_loss_alone_is_weighed_as_its_parent(name, cls, pruned):
    case, weights = MODELS[name], WEIGHTS[:BATCH]
    model, host = of_class(name, cls), of_class(name, cls)
    weigher, views = attached(model)
    assert views.vectorised and not views.not_separable
    ours = step(case, model, weigher, weights, pruned)
    theirs, calls = step(case, of_class(name, cls)), []
    (host.head.loss if name == "spark" else host.head.loss_module).register_forward_hook(
        lambda module, args, result: calls.append(args)
    )
    case.losses(host)
    parts = masked_tokens(L2, *calls[0])
    assert torch.allclose(calls[0][1], targets_of(case.head, case.inputs(), True).tanh(), atol=1e-5)
    expected = reference_step(host, weighted(parts.contributions, weights), parts.scores)
    assert_shows_in(pruned, ours, theirs, Step(0, dict(shown=shown_mean(parts, weights)), {}))
    assert relative_error(ours, expected) <= 1e-5
    assert relative_to(ours, parts.scores) <= 1e-5


@passes
def test_a_head_with_a_loss_of_its_own_goes_the_universal_way(pruned):
    """Every image has as many masked patches, so the samples' own losses are what they contribute."""
    case, weights = MODELS["mae"], WEIGHTS[:BATCH] if pruned else torch.ones(BATCH)
    model, host = of_class("mae", LogCosh), of_class("mae", LogCosh)
    weigher, views = attached(model)
    assert not views.vectorised and views.not_separable == ["head (LogCosh)"]
    for _ in range(2):  # the first step proves, the second does not
        ours = step(case, model, weigher, weights, pruned)
    theirs, latent = step(case, of_class("mae", LogCosh)), []
    host.neck.register_forward_hook(lambda module, args, result: latent.append(result))
    masks = []
    host.backbone.register_forward_hook(lambda module, args, result: masks.append(result[1]))
    case.losses(host)
    target = targets_of(case.head, case.inputs(), True)
    each = torch.log(torch.cosh(latent[0] - target)).mean(-1)
    own = [(each[i] * masks[0][i]).sum() / masks[0][i].sum() for i in range(BATCH)]
    expected = reference_step(host, weighted(own, weights) / BATCH, own)
    assert_shows_in(pruned, ours, theirs, Step(0, dict(shown=shown(own, weights) / BATCH), {}))
    assert relative_error(ours, expected) <= 1e-5
    assert relative_to(ours, expected.scores) <= 1e-5


@pytest.mark.parametrize("head", [Reconstruction, ReconstructionForward, FromViews])
def test_a_masked_head_that_nobody_knows_is_weighed_sample_by_sample(head):
    model, host = own_head(head), own_head(head)
    weigher, views = attached(model)
    assert views.not_separable == [f"head ({head.__name__})"]
    for _ in range(2):
        ours = take_step(model, model.loss, weigher, WEIGHTS[:BATCH], True)
        theirs = take_step(host, host.loss)
        own = losses_alone(host)
        assert ours.loss == pytest.approx(shown_by_own(torch.tensor(theirs.loss), own, WEIGHTS[:BATCH]), rel=1e-6)
        expected = reference_step(host, weighted(own, WEIGHTS[:BATCH]) / BATCH, own)
        assert relative_error(ours, expected) <= 1e-7
        assert relative_to(ours, expected.scores) <= 1e-6
    model = own_head(head)
    weigher, _ = attached(model)
    ours = take_step(model, model.loss, weigher, torch.ones(BATCH), False)
    assert_shows(ours, theirs)
    assert relative_error(ours, theirs) <= 1e-7
    assert relative_to(ours, expected.scores) <= 1e-6


def test_a_loss_that_is_a_sum_stays_one():
    model, host = own_head(Summed), own_head(Summed)
    weigher, _ = attached(model)

    def losses(model):
        return model.loss()["loss"]

    ours = take_step(model, lambda: losses(model), weigher, WEIGHTS[:BATCH], True)
    own = [count * loss for count, loss in zip((3, 1, 2, 6), losses_alone(host), strict=True)]
    expected = reference_step(host, weighted(own, WEIGHTS[:BATCH]), own)
    assert ours.loss == pytest.approx(shown(own, WEIGHTS[:BATCH]), rel=1e-6)
    assert relative_error(ours, expected) <= 1e-7
    assert relative_to(ours, expected.scores) <= 1e-6


@pytest.mark.parametrize("counts", [(3, 0, 2, 6), (0, 3, 2, 6)], ids=str)
def test_a_sample_without_a_masked_token_does_not_spoil_a_head_of_ones_own(counts):
    """Alone it is 0/0; the loss of the batch is sound."""
    model, host = own_head(Reconstruction, counts), own_head(Reconstruction, counts)
    weigher, _ = attached(model)
    ours = take_step(model, model.loss, weigher, WEIGHTS[:BATCH] + 1, True)
    losses = [loss if count else torch.zeros(()) for count, loss in zip(counts, losses_alone(host), strict=True)]
    whole = torch.tensor(take_step(host, host.loss).loss)
    assert ours.loss == pytest.approx(shown_by_own(whole, losses, WEIGHTS[:BATCH] + 1), rel=1e-6)
    assert all(each.isfinite().all() for each in ours.gradients.values())
    own = [number(loss) if count else None for count, loss in zip(counts, losses_alone(host), strict=True)]
    assert ours.scored[ours.scores.isfinite()].tolist() == [True] * 3
    assert relative_to(Step(0, {}, {}, ours.scores, ours.scores.isfinite()), own) <= 1e-6


@pytest.fixture
def clean_registries(monkeypatch):
    for name in ("_LOSSES", "_HEADS"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))


class Squared(nn.Module):
    """A loss over a list of tokens."""

    def forward(self, pred, target):
        return self.per_token(pred, target).mean()

    def per_token(self, pred, target):
        return (pred.softmax(-1) - nn.functional.one_hot(target, CLASSES)).pow(2).sum(-1)


class SameCrossEntropy(CrossEntropyLoss):
    """Nothing of its own."""


def with_token_loss(loss, name="beit_v1"):
    model = MODELS[name].build()
    model.head.loss_module = loss
    return model


@pytest.mark.parametrize("name", ["beit_v1", "beit_v2"])
def test_a_registered_loss_of_ones_own_is_weighed_token_by_token(name, clean_registries):
    @register_loss_view(Squared)
    def squared(loss, pred, target):
        each = loss.per_token(pred, target)
        return SampleLosses(each, len(each), torch.ones_like(each))

    case, weights = MODELS[name], WEIGHTS[:BATCH]
    model, host = with_token_loss(Squared(), name), with_token_loss(Squared(), name)
    weigher, _ = attached(model)
    ours = step(case, model, weigher, weights, True)
    rows, lists = [int(sample.mask.sum()) for sample in case.samples()], []
    host.head.loss_module.register_forward_hook(
        lambda module, args, result: lists.append(module.per_token(*args).split(rows))
    )
    case.losses(host)
    parts = [sum(each[i].sum() for each in lists) / sum(rows) for i in range(BATCH)]
    scores = [sum(float(each[i].mean()) for each in lists) for i in range(BATCH)]
    expected = reference_step(host, weighted(parts, weights), scores)
    assert relative_error(ours, expected) <= 1e-5
    assert relative_to(ours, expected.scores) <= 1e-5


@pytest.mark.parametrize("loss", [SameCrossEntropy(), LabelSmoothLoss(0.1, CLASSES)], ids=["same", "smooth"])
def test_other_losses_of_the_host_are_weighed_token_by_token(loss):
    case = MODELS["beit_v1"]
    model, host = with_token_loss(loss), with_token_loss(copy.deepcopy(loss))
    weigher, views = attached(model)
    assert views.vectorised
    assert_same_step(step(case, model, weigher, torch.ones(BATCH), True), step(case, host))


# ---------------------------------------------------------------- third parties: what is refused


class Contrast(BaseModule):
    """InfoNCE in the batch: the other images are what an image is told from."""

    def loss(self, online, target):
        online, target = nn.functional.normalize(online), nn.functional.normalize(target)
        return nn.functional.cross_entropy(online @ target.t() / 0.2, torch.arange(len(online)))


class ContrastForward(Contrast):
    loss = None

    def forward(self, online, target):
        return Contrast.loss(self, online, target)


class Spread(BaseModule):
    """Each coordinate is to vary over the batch: of one sample there is no variance."""

    def loss(self, online, target):
        spread = torch.relu(1 - (online.var(0) + 1e-4).sqrt()).mean()
        return nn.functional.mse_loss(online, target) + spread


class Neighbours(BaseModule):
    """The next image of the batch is the one to keep away from."""

    def loss(self, online, target):
        near, far = (online - target).pow(2).sum(1), (online - target.roll(1, 0)).pow(2).sum(1)
        return torch.relu(1 + near - far).mean()


def contrasting(head, batch=BATCH, draws=0):
    return Predictions(head(), [values(batch, DIMS, draws=draws), values(batch, DIMS, draws=draws + 50)], (0, 1))


@passes
@pytest.mark.parametrize("batch", [2, 4])
@pytest.mark.parametrize("head", [Contrast, ContrastForward, Spread, Neighbours])
def test_a_contrastive_head_is_refused_in_the_first_step(head, batch, pruned):
    model = contrasting(head, batch)
    weigher, _ = attached(model)
    why = "in another order" if head is Neighbours else "compares the samples of a batch with one another"
    message = rf"head \({head.__name__}\) cannot be weighed: .*{why}.*{ADVICE}"
    with pytest.raises(ValueError, match=message):
        take_step(model, model.loss, weigher, torch.ones(batch), pruned)


def test_a_contrastive_head_is_refused_where_the_first_batch_is_of_one():
    """One image has nobody to be compared with."""
    head = Contrast()
    model = Predictions(head, [values(1, DIMS), values(1, DIMS, draws=1)], (0, 1))
    weigher, _ = attached(model)
    take_step(model, model.loss, weigher, torch.ones(1), True)
    weigher.begin(torch.ones(BATCH), True)
    with pytest.raises(ValueError, match="compares the samples of a batch with one another"):
        model.head.loss(values(BATCH, DIMS).requires_grad_(), values(BATCH, DIMS, draws=1))


class Centred(BaseModule):
    """DINO without its memory: targets are centred by the batch."""

    def loss(self, online, target):
        target = ((target - target.mean(0)) / 0.5).softmax(1)
        return -(target * (online / 0.5).log_softmax(1)).sum(1).mean()


class Repelled(BaseModule):
    """A little away from all images of the batch."""

    def loss(self, online, target):
        online, target = nn.functional.normalize(online), nn.functional.normalize(target)
        return 0.1 * (online @ target.t()).mean() - (online * target).sum(1).mean()


@pytest.mark.parametrize("draws", range(4))
@pytest.mark.parametrize("head", [Centred, Repelled])
def test_a_contrastive_head_is_refused_whose_loss_lies_between_those_of_its_samples(head, draws):
    """That it is no mean of them shows in its gradients: those of a sample alone point elsewhere."""
    model = contrasting(head, draws=draws)
    weigher, _ = attached(model)
    with pytest.raises(ValueError, match=rf"head \({head.__name__}\) cannot be weighed"):
        take_step(model, model.loss, weigher, torch.ones(BATCH), True)


class OwnCrossEntropy(CrossEntropyLoss):
    def forward(self, cls_score, label, **kwargs):
        return super().forward(cls_score / 2, label, **kwargs)


@pytest.mark.parametrize("name", ["beit_v1", "beit_v2"])
@pytest.mark.parametrize("loss", [Squared, OwnCrossEntropy, nn.CrossEntropyLoss])
def test_a_token_head_with_a_loss_that_nobody_registered_is_refused(loss, name):
    model = with_token_loss(loss(), name)
    before = [dict(vars(module)) for module in model.modules()]
    title = rf"head\.loss_module \({loss.__name__} of {type(model.head).__name__}\)"
    with pytest.raises(ValueError, match=rf"{title} cannot be weighed: .*masked tokens of all samples.*{ADVICE}"):
        attached(model)
    assert [list(vars(module)) for module in model.modules()] == [list(each) for each in before]


TINY = dict(type="ResNet", depth=18, stem_channels=4, base_channels=4)
INFO_NCE = dict(type="ContrastiveHead", loss=CE)
CONTRASTIVE = {
    "MoCo": (dict(queue_len=8, feat_dim=DIMS, neck=mlp(32, True), head=INFO_NCE), "of its batch or of a queue"),
    "SimCLR": (dict(neck=mlp(32, True), head=INFO_NCE), "it compares each image with other images"),
    "DenseCL": (
        dict(
            queue_len=8,
            feat_dim=DIMS,
            neck=dict(type="DenseCLNeck", in_channels=32, hid_channels=12, out_channels=DIMS, num_grid=None),
            head=INFO_NCE,
        ),
        "of its batch or of a queue",
    ),
    "MoCoV3": (
        dict(neck=mlp(32, True), head=dict(type="MoCoV3Head", predictor=mlp(DIMS, False), loss=CE)),
        "it compares each image with the other images of its batch",
    ),
    "SwAV": (
        dict(
            neck=dict(type="SwAVNeck", in_channels=32, hid_channels=12, out_channels=DIMS, with_avg_pool=True),
            head=dict(type="SwAVHead", loss=dict(type="SwAVLoss", feat_dim=DIMS, num_prototypes=6)),
        ),
        "prototypes in equal shares",
    ),
    "BarlowTwins": (
        dict(
            neck=mlp(32, True),
            head=dict(type="LatentCrossCorrelationHead", in_channels=DIMS, loss=dict(type="CrossCorrelationLoss")),
        ),
        "correlations over the batch",
    ),
}


@pytest.mark.parametrize(("name", "options", "why"), [(name, *each) for name, each in CONTRASTIVE.items()])
def test_contrastive_models_are_refused_by_name(name, options, why):
    model = build(dict(type=name, backbone=TINY, **options))
    before = [list(vars(module)) for module in model.modules()]
    title = rf"^{name} cannot be pruned \({options['head']['type']}\): "
    with pytest.raises(ValueError, match=rf"{title}.*{why}.*no sample has a loss of its own.*without InfoBatchHook"):
        attached(model)
    assert [list(vars(module)) for module in model.modules()] == before


def test_so_are_heads_that_inherit_theirs():
    class Cooler(ContrastiveHead):
        def loss(self, pos, neg):
            return super().loss(pos / 2, neg / 2)

    model = build(dict(type="SimCLR", backbone=TINY, neck=mlp(32, True), head=INFO_NCE))
    model.head.__class__ = Cooler
    with pytest.raises(ValueError, match=r"SimCLR cannot be pruned \(Cooler\)"):
        attached(model)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="MAE has no head: nothing to weigh; train it without InfoBatchHook"):
        attached(build(CONFIGS["mae"] | dict(head=None)))


class RegularisedMAE(MAE):
    """A term that no head knows of."""

    def loss(self, inputs, data_samples, **kwargs):
        losses = super().loss(inputs, data_samples, **kwargs)
        return losses | dict(loss_reg=0.1 * self.neck.mask_token.pow(2).sum())


class SidewaysBEiT(BEiT):
    """A term past the head, from the features."""

    def loss(self, inputs, data_samples, **kwargs):
        losses = super().loss(inputs, data_samples, **kwargs)
        return losses | dict(loss_size=self.backbone(inputs[0], None)[0].pow(2).mean())


class UniformSimSiam(SimSiam):
    """A contrastive term past the head."""

    def loss(self, inputs, data_samples, **kwargs):
        losses = super().loss(inputs, data_samples, **kwargs)
        features = self.neck(self.backbone(inputs[0]))[0]
        return dict(loss=losses["loss"] + torch.pdist(features).neg().exp().mean())


class OneOfBoth(MixMIMPretrainHead):
    """A ``loss`` of its own, by what is decoded in an image's own place."""

    def loss(self, x_rec, target, mask):
        return self.loss_module(x_rec[: len(target)], self.construct_target(target))


@passes
def test_a_head_of_mixed_images_with_a_loss_of_its_own_is_refused(pruned):
    """Whose row of twice as many is whose nobody knows."""
    case, model = MODELS["mixmim"], of_class("mixmim", OneOfBoth)
    weigher, _ = attached(model)
    message = r"head \(OneOfBoth\) cannot be weighed: x_rec is a prediction of shape \(8, 4, 3072\), expected 4 rows"
    with pytest.raises(ValueError, match=f"{message}.*{ADVICE}"):
        step(case, model, weigher, torch.ones(BATCH), pruned)


class StackedSimSiam(SimSiam):
    """Both views in one call of the head: twice as many rows as images."""

    def loss(self, inputs, data_samples, **kwargs):
        one, other = (self.neck(self.backbone(view))[0] for view in inputs)
        return dict(loss=self.head.loss(torch.cat([one, other]), torch.cat([other, one])))


@passes
def test_a_head_that_is_given_more_rows_than_the_batch_has_images_is_refused(pruned):
    case, model = MODELS["simsiam"], MODELS["simsiam"].build()
    model.__class__ = StackedSimSiam
    weigher, _ = attached(model)
    title = r"head\.loss_module \(CosineSimilarityLoss of LatentPredictHead\)"
    with pytest.raises(ValueError, match=f"{title} was computed over 8 samples, but the batch has 4.*{ADVICE}"):
        step(case, model, weigher, torch.ones(BATCH), pruned)


@passes
@pytest.mark.parametrize(
    ("name", "cls", "key"),
    [
        ("mae", RegularisedMAE, "loss_reg trains neck.mask_token"),
        ("beit_v1", SidewaysBEiT, "loss_size trains backbone"),
        ("simsiam", UniformSimSiam, "loss trains"),
    ],
)
def test_a_model_with_a_term_past_its_head_is_refused(name, cls, key, pruned):
    case, model = MODELS[name], MODELS[name].build()
    model.__class__ = cls
    weigher, _ = attached(model)
    with pytest.raises(ValueError, match=f"{cls.__name__} has a loss that no view weighs: {key}.*{ADVICE}"):
        step(case, model, weigher, torch.ones(BATCH), pruned)


def test_a_token_head_that_computes_its_loss_itself_is_weighed_image_by_image():
    class Focal(BEiTV1Head):
        def loss(self, feats, target, mask):
            mask = mask.flatten(1).bool()
            labels = target.argmax(1).flatten(1)[mask]
            losses = nn.functional.cross_entropy(self.cls_head(feats[:, 1:][mask]), labels, reduction="none")
            return ((1 - (-losses).exp()) * losses).mean()

    case = MODELS["beit_v1"]
    model, host = of_class("beit_v1", Focal), of_class("beit_v1", Focal)
    weigher, views = attached(model)
    assert views.not_separable == ["head (Focal)"]
    ours, whole = step(case, model, weigher, WEIGHTS[:BATCH], True), step(case, of_class("beit_v1", Focal)).loss
    calls, loss = [], host.head.loss
    host.head.loss = lambda *args: calls.append(args) or loss(*args)
    case.losses(host)
    own = [loss(*(each[i : i + 1] for each in calls[0])) for i in range(BATCH)]
    assert ours.loss == pytest.approx(shown_by_own(torch.tensor(whole), own, WEIGHTS[:BATCH]), rel=1e-5)
    expected = reference_step(host, weighted(own, WEIGHTS[:BATCH]) / BATCH, own)
    assert relative_error(ours, expected) <= 1e-5
    assert relative_to(ours, expected.scores) <= 1e-5
