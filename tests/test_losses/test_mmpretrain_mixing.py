"""Mixed images: the host draws and gives what it does without us, and each image has the weight of its pair."""

import copy
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("mmpretrain")
from mmpretrain.models import CutMix, Mixup, RandomBatchAugment, ResizeMix
from oracle_alone import seed
from oracle_losses import passes
from oracle_mmpretrain import (
    CHANNELS,
    NUM_CLASSES,
    SIZE,
    assert_same_gradients,
    assert_same_step,
    assert_shows,
    assert_shows_mean,
    build,
    classifier,
    labelled,
    linear_head,
    losses_alone,
    make_inputs,
    make_labels,
    make_sets,
    oracle_step,
    relative_error,
    scored,
    take_step,
)

from infobatch_mm.losses import LossWeigher, attach_views

BATCH = 6
ONES = torch.ones(BATCH)
WEIGHTS = torch.tensor([1.7, 0.0, 0.3, 12.5, 1.0, 2.0])
INDICES = torch.tensor([11, 5, 7, 3, 2, 13])
#: By these seeds the augmentations leave samples to themselves, and let some batches be.
SEEDS = range(6)


def pair(first, second):
    """A weight of pairs that is no product, to see that it is asked for."""
    return 0.5 * first * second + 0.1 * (first + second)


# ---------------------------------------------------------------- models, data, and the host's draws

CUTMIX = dict(type="CutMix", alpha=1.0)
MIXUP = dict(type="Mixup", alpha=0.8)
AUGMENTS = {
    "mixup": dict(augments=MIXUP),
    "cutmix": dict(augments=CUTMIX),
    "cutmix_minmax": dict(augments=dict(CUTMIX, cutmix_minmax=[0.2, 0.8])),
    "cutmix_uncorrected": dict(augments=dict(CUTMIX, correct_lam=False)),
    "resizemix": dict(augments=dict(type="ResizeMix", alpha=1.0)),
    "several": dict(augments=[MIXUP, CUTMIX, dict(type="ResizeMix", alpha=1.0)]),
    "sometimes": dict(augments=[MIXUP, CUTMIX], probs=[0.4, 0.3]),
    "seldom": dict(augments=MIXUP, probs=0.2),
}
every_augment = pytest.mark.parametrize("augment", AUGMENTS)

SMOOTH = dict(type="LabelSmoothLoss", label_smooth_val=0.1, num_classes=NUM_CLASSES)
MULTI_LABEL = dict(type="MultiLabelLinearClsHead", num_classes=NUM_CLASSES, in_channels=CHANNELS)
ARCFACE = dict(type="ArcFaceClsHead", num_classes=NUM_CLASSES, in_channels=CHANNELS, scale=8.0)
HEADS = {
    "ce": linear_head(),
    "ce_soft": linear_head(dict(type="CrossEntropyLoss", use_soft=True, loss_weight=0.5)),
    "ce_class_weight": linear_head(dict(type="CrossEntropyLoss", class_weight=[0.5, 1.0, 2.5, 0.1, 1.7])),
    "smooth": linear_head(SMOOTH | dict(loss_weight=0.5)),
    "smooth_classy_vision": linear_head(SMOOTH | dict(mode="classy_vision")),
    "focal": linear_head(dict(type="FocalLoss")),
    "conformer": dict(type="ConformerHead", num_classes=NUM_CLASSES, in_channels=[CHANNELS, CHANNELS]),
    "arcface": ARCFACE,
    "multi_label": MULTI_LABEL,
    "multi_label_pos_weight": MULTI_LABEL
    | dict(loss=dict(type="CrossEntropyLoss", use_sigmoid=True, pos_weight=[2.0, 0.5, 1.0, 3.0, 0.1])),
    "multi_label_smooth": MULTI_LABEL | dict(loss=SMOOTH | dict(mode="multi_label", use_sigmoid=True)),
    "multi_label_asymmetric": MULTI_LABEL | dict(loss=dict(type="AsymmetricLoss")),
}
every_head = pytest.mark.parametrize("head", HEADS)


def make_model(head="ce", augment="mixup", dtype=torch.float32):
    form = "pair" if head == "conformer" else "vector"
    preprocessor = dict(num_classes=NUM_CLASSES, batch_augments=copy.deepcopy(AUGMENTS.get(augment)))
    model = build(classifier(HEADS[head], form=form, data_preprocessor=preprocessor), dtype)
    if augment is not None and augment not in AUGMENTS:
        model.data_preprocessor.to_onehot, model.data_preprocessor.batch_augments = True, augment
    return model


def make_data(head="ce", seed=1):
    """A fresh batch: the preprocessor writes into the data samples."""
    labels = make_sets(BATCH, seed) if "multi_label" in head else make_labels(BATCH, seed)
    return dict(inputs=list(make_inputs(BATCH, seed=seed + 1)), data_samples=labelled(labels))


def preprocessed(model, head="ce"):
    batch = model.data_preprocessor(make_data(head), True)
    return batch["inputs"], batch["data_samples"]


def targets_of(samples):
    return torch.stack([sample.gt_score for sample in samples])


def attached(model):
    weigher = LossWeigher()
    return weigher, attach_views(model, weigher)


def begin(weigher, weights=WEIGHTS, pruned=True, indices=INDICES):
    weigher.begin(weights, pruned, indices, pair)


def step(model, head="ce", weigher=None, weights=None, pruned=True, draws=0):
    """A step from the data on, with the random numbers of a seed."""
    seed(draws)
    if weigher is not None:
        begin(weigher, weights, pruned)
    inputs, samples = preprocessed(model, head)
    loss, log = model.parse_losses(model.loss(inputs, samples))
    ours = take_step(model, lambda: dict(loss=loss))
    ours.log = {key: float(value.detach()) for key, value in log.items()}
    if weigher is not None:
        ours.scores, ours.scored = weigher.end()
    return ours


def replay(augment, draws, batch=BATCH):
    """Partners and shares that the host draws from a seed: of image i, lam is of sample i, the rest of its partner."""
    seed(draws)
    part = augment.augments[np.random.choice(len(augment.augments), p=augment.probs)]
    if part is None:
        return torch.arange(batch), 1.0
    lam = np.random.beta(part.alpha, part.alpha)
    if isinstance(part, ResizeMix):
        lam = lam * (part.lam_max - part.lam_min) + part.lam_min
    partners = torch.randperm(batch)
    if isinstance(part, CutMix):
        _, lam = part.cutmix_bbox_and_lam(SIZE, lam)
    return partners, float(lam)


def weights_of_images(partners, lam, weights=WEIGHTS, indices=INDICES):
    expected = []
    for i, j in enumerate(partners.tolist()):
        if indices[i] == indices[j] or lam == 1:
            expected.append(float(weights[i]))
        else:
            expected.append(float(weights[j]) if lam == 0 else float(pair(weights[i], weights[j])))
    return torch.tensor(expected)


def floor_of(head, target):
    """The smallest loss there is for a target: its entropy, where it has one."""
    config = HEADS[head].get("loss") or dict(type="CrossEntropyLoss", use_sigmoid="multi_label" in head)
    if config["type"] not in ("CrossEntropyLoss", "LabelSmoothLoss") or {"class_weight", "pos_weight"} & set(config):
        return 0.0
    target = target.double()
    if config.get("mode") == "multi_label":
        target = torch.where(target > 0, 0.9, 0.1).double()
    elif config["type"] == "LabelSmoothLoss":
        eps = 0.1 / 1.1 if "mode" in config else 0.1
        target = target * (1 - eps) + eps / NUM_CLASSES
    terms = [target, 1 - target] if config.get("use_sigmoid") else [target]
    entropy = -sum(float(p * p.log()) for each in terms for p in each if p > 0)
    return config.get("loss_weight", 1.0) * entropy * (2 if head == "conformer" else 1)


# ---------------------------------------------------------------- what the host draws and gives


def next_draws():
    return [np.random.rand(), np.random.randn(), float(torch.rand(())), random.random()]


@every_augment
def test_images_targets_and_random_streams_are_the_hosts(augment):
    model, host = make_model(augment=augment), make_model(augment=augment)
    weigher, _ = attached(model)
    seen = []
    for each in (model, host):
        seed(0)
        for _ in range(8):
            begin(weigher)
            inputs, samples = preprocessed(each)
            weigher.end()
            labels = torch.cat([sample.gt_label for sample in samples])
            seen.append((inputs, targets_of(samples), labels, torch.tensor(next_draws())))
    for ours, theirs in zip(seen[:8], seen[8:], strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other) and one.dtype == other.dtype and one.stride() == other.stride()
    assert not all(torch.equal(one[1], other[1]) for one, other in pairwise(seen[:8]))


@every_augment
def test_multi_label_targets_are_the_hosts_too(augment):
    model, host = make_model("multi_label", augment), make_model("multi_label", augment)
    weigher, _ = attached(model)
    for draws in SEEDS:
        begin(weigher)
        seed(draws)
        ours = preprocessed(model, "multi_label")
        seed(draws)
        theirs = preprocessed(host, "multi_label")
        assert torch.equal(ours[0], theirs[0]) and torch.equal(targets_of(ours[1]), targets_of(theirs[1]))


def test_targets_lie_in_memory_as_the_hosts_do():
    """Other code may look at them as one row, or keep those of one sample."""
    model, host = make_model(), make_model()
    weigher, _ = attached(model)
    begin(weigher)
    targets = [each.data_preprocessor.batch_augments(make_inputs(BATCH), torch.eye(BATCH)) for each in (model, host)]
    ours, theirs = (scores for _, scores in targets)
    assert ours.stride() == theirs.stride() and ours.untyped_storage().nbytes() == theirs.untyped_storage().nbytes()


def test_outside_a_batch_and_in_validation_nothing_is_followed():
    model, host = make_model(), make_model()
    weigher, _ = attached(model)
    for training in (True, False):
        seed(0)
        ours = model.data_preprocessor(make_data(), training)["inputs"]
        seed(0)
        assert torch.equal(ours, host.data_preprocessor(make_data(), training)["inputs"])
    begin(weigher)
    model.data_preprocessor(make_data(), False)
    assert torch.equal(weigher.weights_on(torch.device("cpu")), WEIGHTS)


# ---------------------------------------------------------------- weights


def test_the_replay_finds_what_the_host_drew():
    one_hot = nn.functional.one_hot(torch.tensor(make_labels(BATCH, 1)), NUM_CLASSES).float()
    alone = apart = untouched = 0
    for augment in AUGMENTS:
        host = make_model(augment=augment)
        for draws in SEEDS:
            partners, lam = replay(host.data_preprocessor.batch_augments, draws)
            seed(draws)
            targets = targets_of(preprocessed(host)[1])
            torch.testing.assert_close(targets, lam * one_hot + (1 - lam) * one_hot[partners])
            same = int((partners == torch.arange(BATCH)).sum())
            alone, apart, untouched = alone + same, apart + BATCH - same, untouched + (lam == 1)
    assert min(alone, apart, untouched) > 5, "no test without self-pairs, pairs, and batches that are let be"


@every_augment
def test_an_image_has_the_weight_of_its_pair(augment):
    model = make_model(augment=augment)
    drawn = model.data_preprocessor.batch_augments
    weigher, _ = attached(model)
    for draws in SEEDS:
        expected = weights_of_images(*replay(drawn, draws))
        seed(draws)
        begin(weigher)
        preprocessed(model)
        torch.testing.assert_close(weigher.weights_on(torch.device("cpu")), expected, rtol=1e-6, atol=0)


@every_augment
def test_repeated_samples_mixed_with_each_other_have_their_own_weight(augment):
    model = make_model(augment=augment)
    drawn = model.data_preprocessor.batch_augments
    weigher, _ = attached(model)
    indices, weights = torch.tensor([4, 9, 4, 9, 4, 1]), torch.tensor([1.5, 3.0, 1.5, 3.0, 1.5, 1.0])
    met = 0
    for draws in range(12):
        partners, lam = replay(drawn, draws)
        met += int(((indices[partners] == indices) & (partners != torch.arange(BATCH))).sum())
        seed(draws)
        begin(weigher, weights, indices=indices)
        preprocessed(model)
        expected = weights_of_images(partners, lam, weights, indices)
        torch.testing.assert_close(weigher.weights_on(torch.device("cpu")), expected, rtol=1e-6, atol=0)
    assert met > 0


@pytest.mark.parametrize("lam", [0.0, 1e-30, 0.3, 1.0])
def test_an_image_of_one_sample_has_that_samples_weight(lam):
    """A share of zero or one is none: lambda may come out so, and a patch of CutMix may be empty."""

    class Fixed(Mixup):
        def mix(self, images, scores):
            partners = torch.arange(BATCH).roll(1)
            return lam * images + (1 - lam) * images[partners], lam * scores + (1 - lam) * scores[partners]

    model = make_model(augment=Fixed(alpha=1.0))
    weigher, _ = attached(model)
    begin(weigher)
    preprocessed(model)
    # In single precision 1 - 1e-30 is 1, but there still is a share, as small as it is.
    expected = weights_of_images(torch.arange(BATCH).roll(1), lam)
    torch.testing.assert_close(weigher.weights_on(torch.device("cpu")), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("pruned", [False, True], ids=["full", "pruned"])
def test_weights_of_one_stay_so(pruned):
    """With the weights of pairs that a full plan gives."""
    model = make_model()
    weigher, _ = attached(model)
    seed(0)
    weigher.begin(ONES, pruned, INDICES)
    preprocessed(model)
    assert torch.equal(weigher.weights_on(torch.device("cpu")), ONES)


@pytest.mark.parametrize("given_up", [False, True], ids=["done", "given_up"])
def test_the_next_batch_knows_nothing_of_this_one(given_up):
    model, host = make_model(), make_model()
    weigher, _ = attached(model)
    seed(0)
    begin(weigher)
    preprocessed(model)
    if not given_up:  # by an exception in the forward pass, say
        weigher.end()
    begin(weigher)
    assert torch.equal(weigher.weights_on(torch.device("cpu")), WEIGHTS)
    inputs, targets = make_inputs(BATCH), torch.rand(BATCH, NUM_CLASSES).softmax(1)
    ours = take_step(model, lambda: model.loss(inputs, scored(targets)))
    expected = oracle_step(host, losses_alone(host, inputs, scored(targets)), WEIGHTS)
    assert_same_gradients(ours, expected, torch.float32)
    scores, _ = weigher.end()
    # Where images were mixed, scores are above the entropy of their target from then on.
    entropy = torch.special.entr(targets).sum(1)
    torch.testing.assert_close(scores.double(), expected.scores - entropy, rtol=1e-5, atol=1e-6)


def test_a_batch_that_is_mixed_anew_has_the_weights_of_the_last_mixing():
    """A step may be repeated, as after an overflow: the weights are those of samples each time."""
    model = make_model()
    drawn = model.data_preprocessor.batch_augments
    weigher, _ = attached(model)
    begin(weigher)
    for draws in SEEDS:
        expected = weights_of_images(*replay(drawn, draws))
        seed(draws)
        preprocessed(model)
        torch.testing.assert_close(weigher.weights_on(torch.device("cpu")), expected, rtol=1e-6, atol=0)


# ---------------------------------------------------------------- steps

#: All heads with one augmentation, and one head with all.
STEPS = [(head, "mixup") for head in HEADS] + [("ce", augment) for augment in AUGMENTS if augment != "mixup"]
every_step = pytest.mark.parametrize(("head", "augment"), STEPS, ids=["-".join(step) for step in STEPS])


@passes
@every_step
def test_weights_of_one_are_the_hosts_step(head, augment, pruned):
    model, host = make_model(head, augment), make_model(head, augment)
    weigher, _ = attached(model)
    for draws in (0, 4):
        seed(draws)
        weigher.begin(ONES, pruned, INDICES)
        ours = take_step(model, lambda: model.loss(*preprocessed(model, head)))
        assert weigher.end()[0] is not None
        assert_same_step(ours, step(host, head, draws=draws))


@passes
@every_step
def test_the_weighted_sum_over_images_is_optimised_and_a_pruned_pass_shows_their_mean(head, augment, pruned):
    model, host = make_model(head, augment), make_model(head, augment)
    drawn = host.data_preprocessor.batch_augments
    weigher, _ = attached(model)
    for draws in (0, 3, 4):
        weights = weights_of_images(*replay(drawn, draws))
        ours = step(model, head, weigher, WEIGHTS, pruned, draws)
        theirs = step(host, head, draws=draws)
        seed(draws)
        expected = oracle_step(host, losses_alone(host, *preprocessed(host, head)), weights)
        if pruned:
            assert_shows_mean(ours, theirs, expected.loss, weights)
        else:
            assert_shows(ours, theirs)
        assert_same_gradients(ours, expected, torch.float32)


@passes
@every_step
def test_an_images_loss_above_its_floor_is_divided_by_shares(head, augment, pruned):
    model, host = make_model(head, augment), make_model(head, augment)
    drawn = host.data_preprocessor.batch_augments
    weigher, _ = attached(model)
    for draws in (0, 3, 4):
        ours = step(model, head, weigher, WEIGHTS, pruned, draws)
        partners, lam = replay(drawn, draws)
        seed(draws)
        inputs, samples = preprocessed(host, head)
        above = [
            float(loss.detach()) - floor_of(head, sample.gt_score)
            for loss, sample in zip(losses_alone(host, inputs, samples), samples, strict=True)
        ]
        expected = []
        for sample in range(BATCH):
            shares = [lam * (row == sample) + (1 - lam) * (partners[row] == sample).item() for row in range(BATCH)]
            parts = [share * loss for share, loss in zip(shares, above, strict=True)]
            expected.append(sum(parts) / sum(shares))
        assert ours.scored.all() and ours.scores.dtype == torch.float32
        torch.testing.assert_close(ours.scores, torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("avg_factor", [BATCH, None], ids=["by_samples", "by_elements"])
@pytest.mark.parametrize("head", ["ce", "ce_soft", "smooth", "multi_label"])
def test_the_floor_is_reached(head, avg_factor, precision):
    """A model that predicts the mixed targets themselves has scores of zero: there is nothing more to learn."""
    model = make_model(head)
    weigher, _ = attached(model)
    seed(0)
    begin(weigher)
    _, samples = preprocessed(model, head)
    target = targets_of(samples)
    if head == "smooth":
        target = 0.9 * target + 0.1 / NUM_CLASSES
    odds = target.clamp(1e-7, 1 - 1e-7)
    logits = odds.logit() if head == "multi_label" else odds.log()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        model.head.loss_module(logits.to(precision), targets_of(samples), avg_factor=avg_factor)
    scores, _ = weigher.end()
    # On the CPU autocast leaves the host's log-softmax in half precision.
    assert float(scores.abs().max()) < (1e-5 if precision == torch.float32 else 5e-3)


def test_scores_keep_their_scale_where_mixing_ends():
    """Label smoothing alone has a floor too: it stays off, or every visited sample would look harder than before."""
    model, host = make_model("smooth"), make_model("smooth", None)
    weigher, views = attached(model)
    step(model, "smooth", weigher, ONES)
    model.data_preprocessor.batch_augments = None
    assert views.renew()
    weigher.begin(ONES, True, INDICES)
    inputs, samples = preprocessed(model, "smooth")
    model.loss(inputs, samples)
    scores, _ = weigher.end()
    alone = torch.stack(losses_alone(host, inputs, samples)).detach()
    smoothed = torch.tensor([1 - 0.1 + 0.1 / NUM_CLASSES] + [0.1 / NUM_CLASSES] * (NUM_CLASSES - 1))
    entropy = HEADS["smooth"]["loss"]["loss_weight"] * -(smoothed * smoothed.log()).sum()
    torch.testing.assert_close(scores, alone - entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [3, 12])
def test_a_batch_that_is_mixed_in_part_or_grows_is_refused(rows):
    model = make_model()
    weigher, _ = attached(model)
    begin(weigher)
    with pytest.raises(ValueError, match=rf"{rows} images were mixed of {rows} samples in a batch of 6"):
        model.data_preprocessor.batch_augments(torch.rand(rows, 3, *SIZE), torch.eye(rows))


class NanOfOne(nn.Module):
    """Its loss of a sample without finite predictions is not a number."""

    def forward(self, pred, target, avg_factor=None):
        return -(target * pred.log_softmax(1)).sum(1).mean()


def test_an_image_that_is_not_a_number_spoils_the_scores_of_its_samples_only():
    model = make_model()
    drawn = model.data_preprocessor.batch_augments
    weigher, _ = attached(model)
    partners, lam = replay(drawn, 0)
    assert 0 < lam < 1
    begin(weigher)
    seed(0)
    _, samples = preprocessed(model)
    logits = torch.randn(BATCH, NUM_CLASSES)
    logits[2] = torch.nan
    model.head.loss_module(logits, targets_of(samples), avg_factor=BATCH)
    scores, _ = weigher.end()
    assert scores.isnan().nonzero().flatten().tolist() == sorted({2, int(partners[2])})


def test_a_loss_of_ones_own_is_weighed_by_images():
    model, host = make_model(), make_model()
    drawn = host.data_preprocessor.batch_augments
    model.head.loss_module, host.head.loss_module = NanOfOne(), NanOfOne()
    weigher, views = attached(model)
    assert not views.vectorised
    for draws in (0, 3):
        ours = step(model, "ce", weigher, WEIGHTS, True, draws)
        seed(draws)
        weights = weights_of_images(*replay(drawn, draws))
        seed(draws)
        losses = losses_alone(host, *preprocessed(host))
        assert_same_gradients(ours, oracle_step(host, losses, weights), torch.float32)


# ---------------------------------------------------------------- augmentations of third parties


class OwnMixup(Mixup):
    """Nothing of its own, but of a class that the host does not ship."""


def each_its_own(images, scores):
    """A lambda for each image, drawn from torch's generator."""
    lam = torch.rand(len(images))
    partners = torch.randperm(len(images))
    rows = lam[:, None]
    mixed = rows[..., None, None] * images + (1 - rows[..., None, None]) * images[partners]
    return mixed, rows * scores + (1 - rows) * scores[partners]


def shuffled(images, scores):
    order = torch.tensor([3, 1, 0, 2, 5, 4])
    return images[order], scores[order].float()


def in_place(images, scores):
    """Pastes half of another image, and mixes the targets, in place."""
    order, scores = torch.tensor(np.random.permutation(len(images))), scores.float()
    images[:, :, :4] = images[order][:, :, :4]
    return images, scores.mul_(0.5).add_(scores[order])


def partners_in_pairs(images, scores):
    """The first half is mixed, the other is let be."""
    partners = torch.tensor([3, 4, 5, 3, 4, 5])
    lam = 0.25 + 0.5 * random.random()
    return lam * images + (1 - lam) * images[partners], lam * scores + (1 - lam) * scores[partners]


LINEAR = {
    "subclass": OwnMixup(alpha=0.8),
    "each_its_own": each_its_own,
    "shuffled": shuffled,
    "in_place": in_place,
    "pairs": partners_in_pairs,
    "wrapped": RandomBatchAugment([each_its_own, Mixup(alpha=0.8)], probs=[0.5, 0.3]),
}


@pytest.mark.parametrize("augment", LINEAR.values(), ids=LINEAR.keys())
def test_linear_mixtures_of_two_are_followed(augment):
    model, host = make_model(augment=augment), make_model(augment=augment)
    weigher, _ = attached(model)
    labels = torch.arange(BATCH)  # of a class each, so that the targets tell who is in an image
    host.data_preprocessor.num_classes = model.data_preprocessor.num_classes = BATCH

    def batch(each):
        data = dict(inputs=list(make_inputs(BATCH)), data_samples=labelled(labels.tolist()))
        result = each.data_preprocessor(data, True)
        return result["inputs"], targets_of(result["data_samples"])

    for draws in range(4):
        begin(weigher)
        seed(draws)
        ours, ours_next = batch(model), next_draws()
        seed(draws)
        theirs, theirs_next = batch(host), next_draws()
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1]) and ours_next == theirs_next
        expected = []
        for i, shares in enumerate(theirs[1].tolist()):
            present = [j for j, share in enumerate(shares) if share > 0]
            others = [j for j in present if j != i]
            if len(present) == 1:
                expected.append(float(WEIGHTS[present[0]]))
            else:
                expected.append(float(pair(WEIGHTS[i], WEIGHTS[others[0]])))
        torch.testing.assert_close(weigher.weights_on(torch.device("cpu")), torch.tensor(expected))
        weigher.score(torch.arange(1.0, 7.0))
        expected = (theirs[1].T @ torch.arange(1.0, 7.0)) / theirs[1].sum(0)
        present = theirs[1].sum(0) > 0
        scores, valid = weigher.end()
        assert valid.tolist() == present.tolist()
        torch.testing.assert_close(scores[present], expected[present])


def of_three(images, scores):
    return sum(images.roll(k, 0) for k in range(3)) / 3, sum(scores.roll(k, 0) for k in range(3)) / 3


def of_two_others(images, scores):
    return sum(images.roll(k, 0) for k in (1, 2)) / 2, sum(scores.roll(k, 0) for k in (1, 2)) / 2


def smoothing(images, scores):
    """What other libraries' mixup does beside: the value for the wrong classes depends on how many there are."""
    scores = 0.9 * scores + 0.1 / scores.shape[1]
    return images, 0.5 * scores + 0.5 * scores.roll(1, 0)


def twice_as_much(images, scores):
    return images, scores + scores.roll(1, 0)


def subtracting(images, scores):
    return images, 1.5 * scores - 0.5 * scores.roll(1, 0)


def harder(images, scores):
    """Not linear: the surer class takes all."""
    mixed = 0.6 * scores + 0.4 * scores.roll(1, 0)
    return images, nn.functional.one_hot(mixed.argmax(1), scores.shape[1]).float()


def squared(images, scores):
    mixed = 0.6 * scores + 0.4 * scores.roll(1, 0)
    return images, mixed.pow(2)


class Drawing:
    """Has a generator of its own, which nobody can put back."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, images, scores):
        lam = float(torch.rand((), generator=self.generator))
        return lam * images + (1 - lam) * images.roll(1, 0), lam * scores + (1 - lam) * scores.roll(1, 0)


def fewer(images, scores):
    return images[:-1], scores[:-1].float()


def more(images, scores):
    return torch.cat([images, images]), torch.cat([scores, scores.roll(1, 0)]).float()


REFUSED = {
    "three": (of_three, "it makes an image of 3 samples, expected one or two"),
    "two_others": (of_two_others, "it makes an image of two other samples"),
    "smoothing": (smoothing, "gives other images or targets when there are more classes"),
    "twice_as_much": (twice_as_much, "do not add up to 1"),
    "subtracting": (subtracting, "has a negative share"),
    "harder": (harder, "do not add up to 1"),
    "squared": (squared, "do not add up to 1"),
    "drawing": (Drawing(), "gives other images or targets"),
    "fewer": (fewer, "makes 5 images of 6 samples"),
    "more": (more, "makes 12 images of 6 samples"),
}


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
@pytest.mark.parametrize(("augment", "why"), REFUSED.values(), ids=REFUSED.keys())
def test_other_mixtures_are_refused_with_what_they_do(augment, why, wrapped):
    name = "RandomBatchAugment" if wrapped else getattr(augment, "__name__", type(augment).__name__)
    model = make_model(augment=RandomBatchAugment(augment) if wrapped else augment)
    weigher, _ = attached(model)
    begin(weigher)
    message = rf"the batch augmentation {name} cannot be followed: .*{why}.*; remove it, or train without InfoBatchHook"
    with pytest.raises(ValueError, match=message):
        preprocessed(model)


def test_a_mixture_is_put_to_the_proof_in_every_step():
    """It may do otherwise later: with a probability, or from some epoch on."""
    calls = []

    def later(images, scores):
        calls.append(len(images))
        return of_three(images, scores) if len(calls) > 4 else (images, scores.float())

    model = make_model(augment=later)
    weigher, _ = attached(model)
    for _ in range(2):
        begin(weigher)
        preprocessed(model)
    begin(weigher)
    with pytest.raises(ValueError, match="an image of 3 samples"):
        preprocessed(model)


def test_an_augmentation_may_be_a_module():
    class Module(nn.Module):
        def forward(self, images, scores):
            return each_its_own(images, scores)

    model = make_model(augment=None)
    model.data_preprocessor.to_onehot = True
    del model.data_preprocessor.batch_augments
    model.data_preprocessor.batch_augments = module = Module()
    weigher, views = attached(model)
    begin(weigher)
    preprocessed(model)
    views.restore()
    assert model.data_preprocessor.batch_augments is module


# ---------------------------------------------------------------- samples with targets of their own


def test_targets_that_are_soft_from_the_start_are_mixed_as_the_host_mixes_them():
    """A pipeline may pack ``gt_score`` itself: of soft labels, or of several classes."""
    model, host = make_model(), make_model()
    weigher, _ = attached(model)

    def batch(each):
        data = make_data()
        for i, sample in enumerate(data["data_samples"]):
            sample.set_gt_score(torch.full((NUM_CLASSES,), 0.2) if i % 2 else torch.eye(NUM_CLASSES)[i % NUM_CLASSES])
        result = each.data_preprocessor(data, True)
        return result["inputs"], result["data_samples"]

    drawn = host.data_preprocessor.batch_augments
    for draws in SEEDS:
        expected = weights_of_images(*replay(drawn, draws))
        begin(weigher)
        seed(draws)
        inputs, samples = batch(model)
        seed(draws)
        theirs = batch(host)
        assert torch.equal(inputs, theirs[0]) and torch.equal(targets_of(samples), targets_of(theirs[1]))
        torch.testing.assert_close(weigher.weights_on(torch.device("cpu")), expected, rtol=1e-6, atol=0)
        ours = take_step(model, lambda inputs=inputs, samples=samples: model.loss(inputs, samples))
        weigher.end()
        losses = losses_alone(host, *theirs)
        assert relative_error(ours, oracle_step(host, losses, expected)) <= 1e-6
