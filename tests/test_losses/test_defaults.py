"""Torch's default dtype and device are users' own: they change no weight, no score and no state of ours."""

import pytest
import torch
from torch import nn

pytest.importorskip("mmseg")
pytest.importorskip("mmpretrain")
from mmseg.models.decode_heads import FCNHead
from oracle import ce, gradients, make_inputs, make_labels, make_samples, make_weights, total
from oracle_losses import labels_of, passes, tiny_model, with_head, with_loss

from infobatch_mm.losses import LossWeigher, attach_views
from infobatch_mm.losses.dissect.arguments import BatchedArguments, have_instances
from infobatch_mm.losses.hosts import mmseg_losses


class InlineHead(FCNHead):
    def loss_by_feat(self, seg_logits, batch_data_samples):
        labels = labels_of(batch_data_samples)
        pixels = nn.functional.cross_entropy(seg_logits, labels, ignore_index=255, reduction="none")
        return dict(loss_own=pixels.mean())


CASES = {
    "cross_entropy": tiny_model,
    "avg_non_ignore": with_loss(**ce(avg_non_ignore=True)),
    "class_weight": with_loss(**ce(class_weight=[0.5, 1.0, 2.5, 0.1, 1.7])),
    "sigmoid": with_loss(**ce(use_sigmoid=True, avg_non_ignore=True)),
    "dice": with_loss(type="DiceLoss"),
    "tversky": with_loss(type="TverskyLoss"),
    "inline": lambda: with_head(InlineHead),
}


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def default_dtype(request):
    before = torch.get_default_dtype()
    yield lambda: torch.set_default_dtype(request.param)
    torch.set_default_dtype(before)


@pytest.fixture
def default_device():
    yield lambda: torch.set_default_device("meta")
    torch.set_default_device(None)  # naming the CPU would leave a torch function mode behind, for all later tests


def steps(make, pruned, batch, weights):
    weigher, seen = LossWeigher(), []
    model = make()
    attach_views(model, weigher)
    for _ in range(2):
        weigher.begin(weights, pruned, blank_factor=0.9)
        model.zero_grad()
        value = total(model.loss(*batch))
        value.backward()
        seen += [value.detach(), *weigher.end(), *gradients(model).values()]
    return seen


def batch_of(blank=1):
    return make_inputs(size=(32, 32)), make_samples(make_labels(size=(8, 8), blank=blank))


def assert_same(ours, expected):
    assert len(ours) == len(expected)
    for one, other in zip(ours, expected, strict=True):
        assert one.dtype == other.dtype and one.device == other.device
        assert torch.equal(one, other)


@passes
@pytest.mark.parametrize("name", CASES)
def test_the_default_dtype_changes_nothing(name, pruned, default_dtype):
    batch, weights = batch_of(), make_weights() if pruned else torch.ones(4)
    expected = steps(CASES[name], pruned, batch, weights)
    model = CASES[name]()
    mmseg_losses._counts_ignored_pixels.cache_clear()
    default_dtype()
    assert_same(steps(lambda: model, pruned, batch, weights), expected)


@pytest.mark.parametrize("default", ["dtype", "device"])
def test_what_is_known_of_the_host_does_not_depend_on_defaults(default, default_dtype, default_device):
    expected = mmseg_losses._counts_ignored_pixels()
    mmseg_losses._counts_ignored_pixels.cache_clear()
    (default_dtype if default == "dtype" else default_device)()
    assert mmseg_losses._counts_ignored_pixels() == expected


def weighings():
    """What the weigher does with tensors of its own making."""
    weigher = LossWeigher()
    ones = torch.ones(3, dtype=torch.float32, device="cpu")
    losses = torch.arange(3, dtype=torch.float32, device="cpu")
    results = []

    def note(step):
        weigher.begin(ones * 2, True)
        step()
        results.extend(weigher.end())

    def paired():
        weigher.pair(torch.arange(3, device="cpu").flip(0))
        results.append(weigher.weights_on(losses.device))
        weigher.score(losses)

    def mixed():
        weigher.mix(torch.eye(3, dtype=torch.float32, device="cpu") * 0.5 + 0.5 * torch.eye(3, device="cpu").flip(0))
        results.append(weigher.weights_on(losses.device))
        weigher.score(losses)

    def narrowed():
        with weigher.narrowed([0, 2]):
            weigher.score(losses[:2])
            results.append(weigher.weigh(losses[:2], losses[:2].mean(), 2.0))

    def in_parts():
        with weigher.in_parts(torch.tensor([1, 0, 2], device="cpu"), 3):
            weigher.score(losses)
            results.append(weigher.weigh(losses, losses.mean(), 3.0))

    def met():
        weigher.batch.met = True

    def rows():
        given = losses.clone().requires_grad_()
        weigher.scale_gradient(given, rows=[1, 0, 2]).sum().backward()
        results.append(given.grad)
        results.append(weigher.weigh_rows(losses))
        weigher.score(losses)

    for step in (paired, mixed, narrowed, in_parts, met, rows):
        note(step)
    return results


def test_weights_and_scores_do_not_depend_on_the_default_dtype(default_dtype):
    expected = weighings()
    default_dtype()
    assert_same(weighings(), expected)


def test_weights_and_scores_do_not_depend_on_the_default_device(default_device):
    expected = weighings()
    default_device()
    assert_same(weighings(), expected)


def test_arguments_are_taken_apart_on_their_own_device(default_device):
    pred = torch.arange(8.0).view(4, 2)
    batch = BatchedArguments(dict(pred=pred, names=list("abcd")), 4)
    rows = BatchedArguments(dict(pred=pred, names=list("ab")), 2, rows=dict(pred=[1, 3]))
    default_device()
    assert batch.reordered([3, 0])["pred"].tolist() == [[6.0, 7.0], [0.0, 1.0]]
    assert rows.reordered([1, 0])["pred"][0].tolist() == [2.0, 3.0]
    assert have_instances(nn.Identity(), dict(batch_gt_instances=[[1], []])).tolist() == [True, False]
