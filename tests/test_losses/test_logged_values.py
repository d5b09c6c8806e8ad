"""What a pruned pass shows: means by weights, while what is optimised is never divided by the sum of the weights."""

import itertools

import pytest
import torch
from torch import nn

pytest.importorskip("mmseg")
from mmseg.models.decode_heads import FCNHead
from oracle import contributions, fcn, make_inputs, make_labels, make_samples, make_weights, total
from oracle_losses import labels_of, shown, tiny_model, with_head

from infobatch_mm.losses import LossWeigher, attach_views, logged

UNEVEN = torch.tensor([0.5, 0.0, 4.0, 1.0])


def test_means_by_weights_of_contributions():
    parts = torch.tensor([1.0, 2.0, 3.0, 0.5])
    value = logged.from_contributions(parts.sum(), (UNEVEN * parts).sum(), UNEVEN)
    assert float(value) == pytest.approx(shown(parts, UNEVEN))
    assert float(value) == pytest.approx(4 * 13.0 / 5.5)


@pytest.mark.parametrize("weight", [0.0, 1.0, 1.7])
def test_equal_weights_show_the_host_to_the_bit(weight):
    host, weights = torch.tensor(0.1), torch.full((3,), weight)
    assert torch.equal(logged.from_contributions(host, weight * torch.tensor(0.2), weights), host)
    assert torch.equal(logged.from_own_losses(host, torch.rand(3), weights), host)


def test_no_row_at_all_shows_the_host():
    assert float(logged.from_contributions(torch.tensor(2.0), torch.tensor(0.0), torch.zeros(0))) == 2


def test_own_losses_that_average_to_the_hosts_show_their_mean_by_weights():
    own = torch.tensor([1.0, 2.0, 3.0, 0.5])
    assert float(logged.from_own_losses(own.mean(), own, UNEVEN)) == pytest.approx(13.0 / 5.5)
    assert float(logged.from_own_losses(-own.mean(), -own, UNEVEN)) == pytest.approx(-13.0 / 5.5)


def test_own_losses_that_do_not_keep_the_scale_of_the_hosts():
    """Lovasz over a batch is not the mean of Lovasz over its images: full and pruned passes are to be compared."""
    own = torch.tensor([1.0, 2.0, 3.0, 0.5])
    assert float(logged.from_own_losses(torch.tensor(10.0), own, UNEVEN)) == pytest.approx(
        10 * (13.0 / 5.5) / (6.5 / 4)
    )


def test_own_losses_of_both_signs_have_no_quotient():
    own = torch.tensor([1.0, -2.0, 3.0, -2.0])  # their mean is 0
    mean = (0.5 + 12.0 - 2.0) / 5.5
    assert float(logged.from_own_losses(torch.tensor(0.25), own, UNEVEN)) == pytest.approx(0.25 + mean)


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_leaves_the_hosts(odd):
    own = torch.tensor([1.0, odd, 3.0, 2.0])
    assert float(logged.from_own_losses(torch.tensor(2.0), own, UNEVEN)) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_shape_and_dtype_are_the_hosts(dtype):
    host = torch.ones(1, dtype=dtype)
    for value in (
        logged.from_contributions(host, torch.tensor(2.0), UNEVEN),
        logged.from_own_losses(host, torch.rand(4), UNEVEN),
    ):
        assert value.shape == (1,) and value.dtype == dtype and not value.requires_grad


def test_factors_of_rows_make_means_and_sums_comparable():
    losses = torch.tensor([1.0, 2.0, 3.0, 0.5])
    assert float((logged.factors_of_rows(UNEVEN) * losses).mean()) == pytest.approx(13.0 / 5.5)
    assert logged.factors_of_rows(torch.full((3,), 2.0)).tolist() == [1.0, 1.0, 1.0]


# ---------------------------------------------------------------- models


class InlineHead(FCNHead):
    """Nobody registered it: a mean over all pixels."""

    def loss_by_feat(self, seg_logits, batch_data_samples):
        labels = labels_of(batch_data_samples)
        pixels = nn.functional.cross_entropy(seg_logits, labels, ignore_index=255, reduction="none")
        return dict(loss_own=pixels.mean())


def weighed(model, weights, pruned):
    weigher = LossWeigher()
    attach_views(model, weigher)
    weigher.begin(weights, pruned)
    return model


def test_an_unregistered_head_shows_the_mean_by_weights():
    model, host, weights = with_head(InlineHead, torch.float64), with_head(InlineHead, torch.float64), make_weights()
    inputs, samples = make_inputs(size=(32, 32), dtype=torch.float64), make_samples(make_labels(size=(8, 8)))
    own = [total(host.loss(inputs[i : i + 1], samples[i : i + 1])) for i in range(4)]
    expected = sum(w * float(loss) for w, loss in zip(weights.tolist(), own, strict=True)) / float(weights.sum())
    value = total(weighed(model, weights, True).loss(inputs, samples))
    assert float(value.detach()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["CrossEntropyLoss", "DiceLoss", "TverskyLoss"])
def test_auxiliary_losses_show_their_mean_by_weights_too(name):
    def make():
        return tiny_model(auxiliary_head=fcn(0, 4, num_convs=0, loss=dict(type=name)), dtype=torch.float64)

    model, host, weights = make(), make(), make_weights()
    inputs, labels = make_inputs(size=(32, 32), dtype=torch.float64), make_labels(size=(8, 8), holes=0)
    values = weighed(model, weights, True).loss(inputs, make_samples(labels))
    plain = host.loss(inputs, make_samples(labels))
    key = next(key for key in values if key.startswith("aux") and "loss" in key)
    assert float(values[key].detach()) != pytest.approx(float(plain[key].detach()), rel=1e-4)
    own = [host.loss(inputs[i : i + 1], make_samples(labels[i : i + 1]))[key] for i in range(4)]
    assert float(values[key].detach()) == pytest.approx(shown(own, weights) / 4, rel=1e-6)


def test_pruned_passes_show_in_the_mean_what_full_ones_do():
    """All batches that an exactly weighted draw can make: the mean of what they show is close to the data set's."""
    samples, kept = 8, 6
    inputs, labels = make_inputs(samples, (32, 32), torch.float64), make_labels(samples, (8, 8))
    host = tiny_model(dtype=torch.float64)
    with torch.no_grad():
        _, parts = contributions(host, lambda each, given: each.loss(inputs, given), labels)
    full = float(sum(parts))
    model = tiny_model(dtype=torch.float64)
    weigher = LossWeigher()
    attach_views(model, weigher)
    easy = sorted(range(samples), key=lambda i: float(parts[i]))[:4]
    values, plain = [], []
    for skipped in itertools.combinations(easy, samples - kept):
        places = [i for i in range(samples) if i not in skipped]
        weights = torch.tensor([2.0 if i in easy else 1.0 for i in places])
        weigher.begin(weights, True)
        with torch.no_grad():
            given = inputs[places], make_samples(labels[places])
            values.append(float(total(model.loss(*given))))
            plain.append(float(total(host.loss(*given))))
        weigher.end()
    assert sum(values) / len(values) == pytest.approx(full, rel=1e-6)
    assert sum(plain) / len(plain) > full * (1 + 1e-3), "the plain loss is that of the harder samples"


def test_the_log_does_not_jump_where_pruning_stops():
    """A step with the same samples, all kept, shows the same in both kinds of pass."""
    inputs, samples = make_inputs(size=(32, 32)), make_samples(make_labels(size=(8, 8)))
    for make in (tiny_model, lambda: with_head(InlineHead)):
        values = [total(weighed(make(), torch.ones(4), pruned).loss(inputs, samples)) for pruned in (True, False)]
        assert torch.equal(*values)
