"""Whether a loss is a mean or a sum over samples is said or found out exactly, and never guessed."""

import pytest
import torch
from torch import nn

pytest.importorskip("mmseg")
from mmseg.models.decode_heads import FCNHead
from oracle import (
    assert_close_gradients,
    assert_same_tensors,
    gradients,
    make_inputs,
    make_labels,
    make_samples,
    make_weights,
    total,
)
from oracle_losses import labels_of, losses_alone, passes, weighted, weighted_mean, with_head

import infobatch_mm.losses.hosts.mmseg  # noqa: F401 - registers for good what a test must not register for itself
from infobatch_mm.losses import (
    HeadRule,
    LossWeigher,
    attach_views,
    register_head_rule,
    register_samplewise_loss,
    registry,
)

SIZE, BATCH = (8, 8), 4


@pytest.fixture(autouse=True)
def clean_registries(monkeypatch):
    for name in ("_LOSSES", "_HEADS"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))


def own_cross_entropies(logits, samples):
    pixels = nn.functional.cross_entropy(logits, labels_of(samples), ignore_index=255, reduction="none")
    return pixels.mean((1, 2))


class Mean(FCNHead):
    def loss_by_feat(self, seg_logits, batch_data_samples):
        return dict(loss_own=own_cross_entropies(seg_logits, batch_data_samples).mean())


class Sum(FCNHead):
    def loss_by_feat(self, seg_logits, batch_data_samples):
        return dict(loss_own=own_cross_entropies(seg_logits, batch_data_samples).sum())


class Both(FCNHead):
    def loss_by_feat(self, seg_logits, batch_data_samples):
        losses = own_cross_entropies(seg_logits, batch_data_samples)
        return dict(loss_mean=losses.mean(), loss_sum=losses.sum())


class Between(FCNHead):
    """Divides by one more than there are samples: neither a mean nor a sum."""

    def loss_by_feat(self, seg_logits, batch_data_samples):
        losses = own_cross_entropies(seg_logits, batch_data_samples)
        return dict(loss_own=losses.sum() / (len(losses) + 1))


def dropped(logits, head):
    return nn.functional.dropout(logits, head.rate, training=True)


class RandomMean(Mean):
    rate = 0.5

    def loss_by_feat(self, seg_logits, batch_data_samples):
        return super().loss_by_feat(dropped(seg_logits, self), batch_data_samples)


class RandomSum(Sum):
    rate = 0.5

    def loss_by_feat(self, seg_logits, batch_data_samples):
        return super().loss_by_feat(dropped(seg_logits, self), batch_data_samples)


class RandomLoss(nn.Module):
    loss_name = "loss_random"

    def forward(self, pred, label, weight=None, ignore_index=255):
        pred = nn.functional.dropout(pred, 0.5)
        pixels = nn.functional.cross_entropy(pred, label, ignore_index=ignore_index, reduction="none")
        return pixels.mean((1, 2)).sum()


def batch(size=BATCH, blank=None, seed=0):
    labels = make_labels(size, SIZE, seed=30 + seed, blank=blank)
    return make_inputs(size, (32, 32), torch.float64, seed=20 + seed), make_samples(labels)


def step(model, given, weights, pruned, weigher=None):
    if weigher is None:
        weigher = LossWeigher()
        attach_views(model, weigher)
    weigher.begin(weights, pruned, torch.arange(len(weights)))
    model.zero_grad()
    torch.manual_seed(0)
    losses = model.loss(*given)
    total(losses).backward()
    weigher.end()
    return gradients(model)


def objective(head, given, weights, form, keys=None):
    """Gradients of the weighted objective of the untouched head, from each sample alone."""
    host = with_head(head, torch.float64)
    logits = host.decode_head(host.extract_feat(given[0]))

    def loss(*arguments):
        losses = host.decode_head.loss_by_feat(*arguments)
        return sum(losses[key] for key in keys or losses)

    form(losses_alone(loss, len(logits), logits, given[1]), weights).backward()
    return gradients(host)


# ---------------------------------------------------------------- found out


@pytest.mark.parametrize(("head", "form"), [(Mean, weighted_mean), (Sum, weighted)])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_loss_without_random_numbers_is_found_out(head, form, size):
    given, weights = batch(size), make_weights(size)
    ours = step(with_head(head, torch.float64), given, weights, True)
    assert_close_gradients(ours, objective(head, given, weights, form), 1e-8)


def test_each_loss_of_a_head_is_found_out_by_itself():
    given, weights = batch(), make_weights()
    ours = step(with_head(Both, torch.float64), given, weights, True)
    mean = objective(Both, given, weights, weighted_mean, ["loss_mean"])
    added = objective(Both, given, weights, weighted, ["loss_sum"])
    expected = {key: None if value is None else value + added[key] for key, value in mean.items()}
    assert_close_gradients(ours, expected, 1e-8)


@pytest.mark.parametrize("first", [(1, None), (BATCH, "all")], ids=["of_one", "blank"])
@pytest.mark.parametrize(("head", "form"), [(Mean, weighted_mean), (Sum, weighted)])
def test_a_batch_that_tells_nothing_decides_nothing(head, form, first):
    """A batch of one is its own mean and sum; a blank one has no loss."""
    size, blank = first
    given = batch(size)
    if blank:
        for sample in given[1]:
            sample.gt_sem_seg.data[:] = 255
    model, weigher = with_head(head, torch.float64), LossWeigher()
    attach_views(model, weigher)
    step(model, given, torch.ones(size), False, weigher)
    given, weights = batch(seed=1), make_weights()
    ours = step(model, given, weights, True, weigher)
    assert_close_gradients(ours, objective(head, given, weights, form), 1e-8)


def test_the_first_step_makes_as_many_evaluations_whatever_is_in_the_batch():
    """On several processes a loss may wait in each for the others'."""
    calls = []
    for blank in (False, True):
        model = with_head(Mean, torch.float64)
        given = batch()
        if blank:
            for sample in given[1]:
                sample.gt_sem_seg.data[:] = 255
        host, count = model.decode_head.loss_by_feat, []

        def counted(*arguments, host=host, count=count):
            count.append(1)
            return host(*arguments)

        model.decode_head.loss_by_feat = counted
        step(model, given, torch.ones(BATCH), False)
        calls.append(len(count))
    assert calls[0] == calls[1] > BATCH + 1


# ---------------------------------------------------------------- refused


@passes
@pytest.mark.parametrize("head", [RandomMean, RandomSum])
def test_a_random_loss_is_refused_until_somebody_says_what_it_is(head, pruned):
    message = (
        rf"loss_own of decode_head \({head.__name__}\) cannot be weighed: its loss on 4 copies of a sample is [\d.]+ "
        r"times that on the sample, and it draws random numbers: neither a mean over samples, which is 1 times, nor a "
        rf"sum, 4 times; say which it is with register_head_rule\({head.__name__}, HeadRule\(method='loss_by_feat', "
        r"reduction='mean'\)\), or reduction='sum'"
    )
    with pytest.raises(ValueError, match=message):
        step(with_head(head, torch.float64), batch(), torch.ones(BATCH), pruned)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.9])
def test_it_is_refused_however_little_is_random(rate, monkeypatch):
    """A threshold takes a loss that is random in few places for a mean or for a sum, and is right, or wrong by B."""
    monkeypatch.setattr(RandomSum, "rate", rate)
    with pytest.raises(ValueError, match="reduction='sum'"):
        step(with_head(RandomSum, torch.float64), batch(), make_weights(), True)


@pytest.mark.parametrize("head", [RandomMean, RandomSum, Between])
def test_a_run_that_is_watched_only_needs_no_word(head):
    """Its batches come from no plan: the host's loss is optimised in all of them."""
    model, host, weigher, given = with_head(head), with_head(head), LossWeigher(), batch()
    given = (given[0].float(), given[1])
    attach_views(model, weigher)
    results = []
    for each in (model, host):
        weigher.begin(torch.ones(BATCH), pruned=False)
        torch.manual_seed(0)
        total(each.loss(*given)).backward()
        results.append(gradients(each))
    assert_same_tensors(*results)


def test_a_random_loss_module_is_refused_by_name():
    model = with_head(FCNHead, torch.float64)
    model.decode_head.loss_decode = RandomLoss()
    message = r"RandomLoss of FCNHead\).*register_samplewise_loss\(RandomLoss, reduction='mean'\), or reduction='sum'"
    with pytest.raises(ValueError, match=message):
        step(model, batch(), torch.ones(BATCH), False)


def test_a_loss_that_is_neither_is_refused():
    with pytest.raises(ValueError, match=r"is 1\.6 times that on the sample: neither"):
        step(with_head(Between, torch.float64), batch(), torch.ones(BATCH), False)


# ---------------------------------------------------------------- said


@pytest.mark.parametrize("pieces", [True, False], ids=["rule", "word"])
@pytest.mark.parametrize(
    ("head", "form", "reduction"), [(RandomMean, weighted_mean, "mean"), (RandomSum, weighted, "sum")]
)
def test_what_somebody_says_is_taken(head, form, reduction, pieces, monkeypatch):
    """The gradient of a random loss is compared where the draws are: all of them 0."""
    if pieces:
        register_head_rule(head, HeadRule(reduction=reduction))
    else:
        register_head_rule(head, reduction=reduction)
    model, weigher = with_head(head, torch.float64), LossWeigher()
    attach_views(model, weigher)
    step(model, batch(), torch.ones(BATCH), False, weigher)  # random: nothing is found out
    monkeypatch.setattr(head, "rate", 0.0)
    given, weights = batch(seed=1), make_weights()
    ours = step(model, given, weights, True, weigher)
    assert_close_gradients(ours, objective(head, given, weights, form), 1e-8)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_what_somebody_says_of_a_loss_module_is_taken(reduction):
    register_samplewise_loss(RandomLoss, reduction=reduction)
    results = []
    for weights in (torch.ones(BATCH), torch.full((BATCH,), 2.0)):
        model = with_head(FCNHead, torch.float64)
        model.decode_head.loss_decode = RandomLoss()
        results.append(step(model, batch(), weights, True)["decode_head.conv_seg.weight"])
    torch.testing.assert_close(results[1], 2 * results[0])


def test_a_sum_is_as_many_times_a_mean_as_there_are_samples():
    results = []
    for reduction in ("mean", "sum"):
        register_samplewise_loss(RandomLoss, reduction=reduction)
        model = with_head(FCNHead, torch.float64)
        model.decode_head.loss_decode = RandomLoss()
        results.append(step(model, batch(), make_weights(), True)["decode_head.conv_seg.weight"])
    torch.testing.assert_close(results[1], BATCH * results[0])


def test_a_neither_may_be_called_one():
    register_head_rule(Between, reduction="mean")
    step(with_head(Between, torch.float64), batch(), make_weights(), True)


@passes
@pytest.mark.parametrize(("head", "wrong", "right"), [(Mean, "sum", "mean"), (Sum, "mean", "sum")])
def test_what_can_be_seen_to_be_wrong_is_refused(head, wrong, right, pruned):
    register_head_rule(head, reduction=wrong)
    message = rf"is registered with reduction='{wrong}', but .* makes it a {right}"
    with pytest.raises(ValueError, match=message):
        step(with_head(head, torch.float64), batch(), torch.ones(BATCH), pruned)


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="reduction='none': expected 'mean' or 'sum'"):
        HeadRule(reduction="none")
    with pytest.raises(ValueError, match="reduction='max': expected 'mean' or 'sum'"):
        register_head_rule(Mean, reduction="max")


def test_another_word_for_a_loss_module_is_refused():
    with pytest.raises(ValueError, match="reduction='none': expected 'mean' or 'sum'"):
        register_samplewise_loss(RandomLoss, reduction="none")
