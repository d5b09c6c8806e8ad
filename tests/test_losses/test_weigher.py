import copy
import weakref

import pytest
import torch

from infobatch_mm.losses import LossWeigher
from infobatch_mm.losses.elements import samplewise_sum, valid_per_sample
from infobatch_mm.losses.view import LossView


def begun(*weights):
    weigher = LossWeigher()
    weigher.begin(torch.tensor(weights))
    return weigher


def test_weigher_is_active_between_begin_and_end_only():
    weigher = LossWeigher()
    assert not weigher.active
    weigher.begin(torch.ones(2))
    assert weigher.active
    weigher.end()
    assert not weigher.active


def test_end_without_a_score_gives_none():
    assert LossWeigher().end() == (None, None)
    assert begun(1.0, 2.0).end() == (None, None)


@pytest.mark.parametrize("normaliser", [6.0, torch.tensor(6.0), 1.0])
@pytest.mark.parametrize("pruned", [False, True], ids=["full", "pruned"])
def test_the_value_is_the_host_loss_or_the_mean_by_weights_and_the_gradient_the_weighted_sum(normaliser, pruned):
    per_sample = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    host_loss = (per_sample.sum() / normaliser).detach()
    weigher = LossWeigher()
    weigher.begin(torch.tensor([0.5, 0.0, 4.0]), pruned)
    out = weigher.weigh(per_sample, host_loss, normaliser)
    if pruned:
        torch.testing.assert_close(out, torch.tensor(3 * 12.5 / 4.5) / normaliser, rtol=1e-6, atol=0)
    else:
        assert torch.equal(out, host_loss)
    out.backward()
    torch.testing.assert_close(per_sample.grad, torch.tensor([0.5, 0.0, 4.0]) / normaliser, rtol=1e-7, atol=0)


def test_weights_of_one_give_the_gradient_of_the_plain_sum_to_the_bit():
    values = torch.rand(7, generator=torch.Generator().manual_seed(0))
    ours, host = values.clone().requires_grad_(), values.clone().requires_grad_()
    begun(*[1.0] * 7).weigh(ours, (ours.sum() / 13.0), 13.0).backward()
    (host.sum() / 13.0).backward()
    assert torch.equal(ours.grad, host.grad)


def test_no_gradient_flows_through_the_host_loss():
    per_sample = torch.rand(2, requires_grad=True)
    host_loss = torch.tensor(3.0, requires_grad=True)
    begun(1.0, 2.0).weigh(per_sample, host_loss, 2.0).backward()
    assert host_loss.grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weighed_loss_keeps_the_host_dtype(dtype):
    per_sample = torch.ones(2, dtype=dtype, requires_grad=True)
    out = begun(1.5, 2.0).weigh(per_sample, torch.tensor(2.0, dtype=dtype), 4.0)
    assert out.dtype == dtype
    out.backward()
    assert per_sample.grad.dtype == dtype
    torch.testing.assert_close(per_sample.grad.float(), torch.tensor([0.375, 0.5]))


def test_several_losses_of_one_batch_are_weighed_alike():
    weigher = begun(2.0, 3.0)
    first, second = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    (weigher.weigh(first, first.sum(), 1.0) + weigher.weigh(second, second.sum(), 2.0)).backward()
    assert first.grad.tolist() == [2.0, 3.0]
    assert second.grad.tolist() == [1.0, 1.5]


@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_losses_of_another_batch_size_are_refused(size):
    with pytest.raises(ValueError, match=rf"{size} samples.*batch has 3"):
        begun(1.0, 1.0, 1.0).weigh(torch.ones(size), torch.tensor(1.0), 1.0)


def test_inputs_are_left_alone():
    per_sample, host_loss, weights = torch.rand(3), torch.tensor(2.0), torch.tensor([1.0, 2.0, 3.0])
    before = per_sample.clone(), host_loss.clone(), weights.clone()
    weigher = LossWeigher()
    weigher.begin(weights)
    weigher.weigh(per_sample, host_loss, 3.0)
    weigher.score(per_sample, torch.ones(3, dtype=torch.bool))
    weigher.score(per_sample, torch.ones(3, dtype=torch.bool))
    for left, right in zip((per_sample, host_loss, weights), before, strict=True):
        assert torch.equal(left, right)


def test_scores_add_up_over_the_losses_that_have_a_valid_pixel_in_the_sample():
    weigher = begun(1.0, 1.0, 1.0)
    weigher.score(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, True, False]))
    weigher.score(torch.tensor([0.5, 0.5, 0.5]), torch.tensor([True, False, True]))
    scores, valid = weigher.end()
    assert scores.tolist() == [1.5, 2.0, 0.5]
    assert valid.tolist() == [True, True, True]


def test_scores_are_float32_and_hold_no_graph():
    weigher = begun(1.0, 1.0)
    weigher.score(torch.rand(2, dtype=torch.float64, requires_grad=True) * 2, torch.tensor([True, True]))
    scores, _ = weigher.end()
    assert scores.dtype == torch.float32
    assert not scores.requires_grad


def test_scores_do_not_survive_their_batch():
    weigher = begun(1.0, 1.0)
    weigher.score(torch.ones(2), torch.tensor([True, True]))
    weigher.begin(torch.ones(2))  # the batch before was given up (an exception in the forward pass, say)
    weigher.score(torch.full((2,), 5.0), torch.tensor([True, False]))
    scores, valid = weigher.end()
    assert scores.tolist() == [5.0, 0.0]
    assert valid.tolist() == [True, False]
    assert weigher.end() == (None, None)


def test_weigher_copies_in_the_middle_of_a_batch():
    weigher = begun(1.0, 2.0)
    per_sample = torch.rand(2, requires_grad=True)
    weigher.weigh(per_sample, per_sample.sum(), 1.0)
    weigher.score(per_sample, torch.tensor([True, True]))
    copy.deepcopy(weigher)


def test_samplewise_sum_and_valid_per_sample_keep_the_first_dimension():
    values = torch.arange(24.0).reshape(2, 3, 4)
    assert samplewise_sum(values).tolist() == [66.0, 210.0]
    assert samplewise_sum(values[:, 0, 0]).tolist() == [0.0, 12.0]
    assert valid_per_sample(values > 10).tolist() == [1, 12]
    assert valid_per_sample(values[:, 0, 0] > 10).tolist() == [0, 1]
    assert valid_per_sample(values > 10).dtype == torch.int64


def test_nothing_of_a_batch_outlives_its_end():
    weigher = begun(1.0, 2.0)
    lifelong = set(vars(weigher))
    batch = weakref.ref(weigher.batch)
    samples = weakref.ref(weights := torch.tensor([1.0, 2.0]))
    weigher.begin(weights, True, torch.arange(2))
    assert batch() is None
    weigher.mix(torch.eye(2))
    weigher.batch.reached = True
    weigher.batch.labelled = torch.tensor([True, True])
    weigher.batch.rows.data_samples = [object(), object()]
    weigher.score(torch.ones(2))
    batch = weakref.ref(weigher.batch)
    del weights
    assert weigher.reached and weigher.end()[1].all()
    assert batch() is None and samples() is None
    assert set(vars(weigher)) == lifelong and not weigher.reached


@pytest.mark.parametrize("standing_in", ["narrowed", "in_parts"])
def test_an_exception_leaves_the_rows_of_the_batch_as_they_were(standing_in):
    """Else a step that goes on after it would weigh by rows that are not its samples."""
    weigher = begun(1.0, 2.0, 4.0)
    rows = dict(narrowed=lambda: weigher.narrowed([0, 2]), in_parts=lambda: weigher.in_parts(torch.tensor([1, 0, 1])))
    weigher.score(torch.ones(3))
    with pytest.raises(RuntimeError, match="mine"), rows[standing_in]():
        weigher.score(torch.full((2,), 7.0))
        raise RuntimeError("mine")
    assert weigher.batch_size == 3
    assert weigher.weights_on(torch.device("cpu")).tolist() == [1.0, 2.0, 4.0]
    assert weigher.end()[0].tolist() == [1.0, 1.0, 1.0]


def test_a_batch_after_an_exception_begins_clean():
    weigher = LossWeigher()
    weigher.begin(torch.tensor([1.0, 2.0]), True, blank_factor=0.5)
    weigher.mix(torch.eye(2).flip(0))
    weigher.batch.labelled = torch.tensor([False, False])
    weigher.batch.met = weigher.batch.reached = True
    weigher.distrust(torch.tensor(True))
    weigher.begin(torch.tensor([3.0, 4.0, 5.0]), False)
    assert not weigher.reached and not weigher.pruned and weigher.batch.shares is None
    assert weigher.end() == (None, None)
    weigher.begin(torch.ones(2))
    weigher.score(torch.ones(2))
    assert weigher.end()[1].all()


def test_a_view_weighs_again_after_an_exception_in_it():
    class Loss(LossView):
        def weighed(self, value):
            if value is None:
                raise RuntimeError("mine")
            return 2 * self.host(value)

    module, weigher = torch.nn.Identity(), begun(1.0)
    view = Loss(module, "forward", weigher)
    view.attach()
    with pytest.raises(RuntimeError, match="mine"):
        module(None)
    assert module(1.0) == 2.0


def test_a_batch_that_goes_through_the_model_again_is_weighed_as_before_and_scored_again():
    weigher = LossWeigher()
    weigher.begin(torch.tensor([1.0, 2.0]), True, blank_factor=0.5)
    weigher.score(torch.full((2,), 7.0))
    weigher.batch.restart()
    per_sample = torch.ones(2, requires_grad=True)
    weigher.weigh(per_sample, per_sample.sum(), 1.0, mean_over_valid=True).backward()
    assert per_sample.grad.tolist() == [0.5, 1.0]
    weigher.score(torch.ones(2))
    assert weigher.end()[0].tolist() == [1.0, 1.0]
