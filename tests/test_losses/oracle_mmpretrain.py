"""Reference for the loss views of mmpretrain's classifiers, written from the host's semantics alone.

Nothing here imports infobatch_mm. What a sample contributes to a host's loss is the untouched host's loss on it alone,
by what the host divides by. Where a head couples its samples (BatchNorm), its predictions for the whole batch are taken
apart instead, and the loss is written down here.
"""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("mmpretrain")
import mmpretrain.models  # noqa: F401
from mmengine.config import ConfigDict
from mmengine.model import BaseModule
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample, MultiTaskDataSample
from oracle_alone import Step, gradients_of, relative_error, take_step  # noqa: F401
from oracle_losses import only, shown_objective, weighted

BATCH, CHANNELS, NUM_CLASSES, SIZE = 4, 8, 5, (8, 8)
#: Uneven, with a 0 and a large one.
WEIGHTS = torch.tensor([1.7, 0.0, 0.3, 12.5])
ONES = torch.ones(BATCH)


# ---------------------------------------------------------------- models


@MODELS.register_module(force=True)
class TinyBackbone(BaseModule):
    """One convolution, without anything that couples samples; what it gives has the form that a head expects."""

    def __init__(self, channels=CHANNELS, form="vector"):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 4, 4)
        self.form = form

    def forward(self, inputs):
        maps = self.conv(inputs).tanh()
        vector, other = 2 * maps.mean((2, 3)), 2 * maps.amax((2, 3))
        return dict(map=(maps,), vector=(vector,), tokens=([maps, vector],), pair=([vector, other],))[self.form]


def classifier(head, channels=CHANNELS, form="vector", **options):
    return dict(type="ImageClassifier", backbone=dict(type="TinyBackbone", channels=channels, form=form), head=head) | (
        options
    )


def linear_head(loss=None, **options):
    loss = dict(type="CrossEntropyLoss") if loss is None else loss
    return dict(type="LinearClsHead", num_classes=NUM_CLASSES, in_channels=CHANNELS, loss=loss, **options)


def build(config, dtype=torch.float32, seed=0):
    """The same model for the same seed: a deep copy of a multi-task head would train the original's parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MODELS.build(ConfigDict(copy.deepcopy(config), _scope_="mmpretrain"))
    return model.to(dtype).train()


# ---------------------------------------------------------------- data


def generator(seed):
    return torch.Generator().manual_seed(seed)


def make_inputs(batch=BATCH, dtype=torch.float32, seed=2):
    return torch.randn(batch, 3, *SIZE, generator=generator(seed)).to(dtype)


def make_labels(batch=BATCH, seed=1):
    return torch.randint(0, NUM_CLASSES, (batch,), generator=generator(seed)).tolist()


def make_sets(batch=BATCH, seed=4):
    """Labels of several classes for each sample, of none for the last."""
    drawn = torch.rand(batch, NUM_CLASSES, generator=generator(seed)) < 0.4
    drawn[-1] = False
    return [row.nonzero().flatten().tolist() for row in drawn]


def make_scores(batch=BATCH, seed=5):
    """Soft targets that add up to one, one of them certain."""
    scores = torch.rand(batch, NUM_CLASSES, generator=generator(seed)).softmax(1)
    scores[0] = torch.eye(NUM_CLASSES)[2]
    return scores


def labelled(labels):
    return [DataSample().set_gt_label(label) for label in labels]


def scored(scores, labels=None):
    samples = [DataSample().set_gt_score(score) for score in scores]
    for sample, label in zip(samples, labels or [], strict=bool(labels)):
        sample.set_gt_label(label)
    return samples


def with_tasks(tasks):
    """A multi-task sample from its tasks' samples; nested dicts are nested tasks."""
    sample = MultiTaskDataSample()
    for name, task in tasks.items():
        sample.set_field(with_tasks(task) if isinstance(task, dict) else task, name)
    return sample


# ---------------------------------------------------------------- what the samples contribute


def total(model, losses):
    return model.parse_losses(losses)[0]


def losses_alone(model, inputs, samples):
    """The untouched host's loss on each sample alone."""
    return [total(model, model.loss(only(inputs, i), only(samples, i))) for i in range(len(samples))]


def cross_entropies(model, inputs, samples):
    """The same for heads with BatchNorm: the logits are those of the whole batch, the loss is written down."""
    logits = model.head(model.extract_feat(inputs))
    labels = torch.cat([sample.gt_label for sample in samples])
    return list(torch.logsumexp(logits, 1) - logits.gather(1, labels[:, None])[:, 0])


def oracle_step(model, losses, weights, divisor=None):
    """Objective, gradients and scores of an untouched host that trains on sum(weight_i * l_i / B)."""
    model.zero_grad()
    objective = weighted(losses, weights) / (divisor or len(losses))
    objective.backward()
    scores = torch.stack([each.detach().double() for each in losses])
    return Step(float(objective.detach()), {}, gradients_of(model), scores)


# ---------------------------------------------------------------- assertions


def assert_shows(ours, host):
    """The loss and the log are the host's, to the bit."""
    assert ours.loss == host.loss
    assert ours.log == host.log and list(ours.log) == list(host.log)


def assert_shows_mean(ours, host, objective, weights):
    """In a pruned pass the log has the host's keys, and the loss is the samples' mean by weights."""
    assert list(ours.log) == list(host.log)
    assert ours.loss == pytest.approx(shown_objective(objective, weights), rel=2e-6)


def assert_same_step(ours, host):
    """A step with weights of one: the host's values to the bit, its gradients to rounding."""
    assert_shows(ours, host)
    assert relative_error(ours, host) <= 1e-6
    assert [each is None for each in ours.gradients.values()] == [each is None for each in host.gradients.values()]


def assert_same_gradients(ours, oracle, dtype):
    assert relative_error(ours, oracle) <= (1e-12 if dtype == torch.float64 else 1e-6)


def assert_scores(step, expected, valid=None):
    """Float32 scores of the samples that have one."""
    kept = torch.ones(len(expected), dtype=torch.bool) if valid is None else torch.tensor(valid)
    assert step.scores.dtype == torch.float32 and not step.scores.requires_grad
    assert step.scored.tolist() == kept.tolist()
    expected = torch.as_tensor(expected)
    torch.testing.assert_close(step.scores.double()[kept], expected.double()[kept], rtol=2e-6, atol=1e-6)
