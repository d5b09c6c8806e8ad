"""No ordinary step waits for its device: on one that is far away, a step asks as little as the host's own.

What a loss has to prove is proven in the first step, which is taken on the CPU.
"""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("mmseg")
pytest.importorskip("mmpretrain")
from far import Notes, far, near, noted
from mmseg.models.decode_heads import FCNHead
from oracle import make_inputs, make_labels, make_samples, make_weights
from oracle_alone import seed
from oracle_losses import labels_of, passes, with_head
from waiting_kinds import INDICES, KINDS, InlineHead, Kind, Run, halves, scenes

from infobatch_mm import InfoBatch
from infobatch_mm.core.store import ScoreStore
from infobatch_mm.losses import HeadRule, LossWeigher, register_head_rule
from infobatch_mm.losses.hosts import mmseg_losses


def here(value):
    return value


def step(run, turn, place, pruned, notes=None):
    """A step on a device; returns loss, scores and gradients, and who waited."""
    seed(turn)
    batch = place(run.kind.batch(turn))
    with noted(notes) as notes:
        loss, scores, valid = run.step(batch, pruned)
    gradients = {name: near(each.grad) for name, each in run.model.named_parameters()}
    return dict(loss=near(loss), scores=near(scores), valid=near(valid), **gradients), notes.waits


def host_waits(kind):
    """Of the untouched host: what in its own step waits, and how often."""
    run = Run(kind, is_ours=False)
    step(run, 0, here, False)
    far(run.model)
    return Counter(wait.what for wait in step(run, 1, far, False)[1])


@passes
@pytest.mark.parametrize("name", KINDS)
def test_a_step_waits_no_more_than_the_hosts_own(name, pruned):
    kind = KINDS[name]
    run = Run(kind)
    step(run, 0, here, False)
    far(run.model)
    _, waits = step(run, 1, far, pruned)
    if kind.evaluations > 1:
        assert not [str(wait) for wait in waits if wait.is_ours]
    allowed = Counter({what: times * kind.evaluations for what, times in host_waits(kind).items()})
    assert Counter(wait.what for wait in waits) <= allowed, "\n".join(map(str, waits))


@passes
@pytest.mark.parametrize("name", KINDS)
def test_the_far_device_computes_what_the_cpu_does(name, pruned):
    runs = [Run(KINDS[name]) for _ in range(2)]
    for run in runs:
        step(run, 0, here, False)
    far(runs[1].model)
    for turn in (1, 2):
        (ours, _), (theirs, _) = step(runs[1], turn, far, pruned), step(runs[0], turn, here, pruned)
        for key, value in theirs.items():
            assert (value is None) == (ours[key] is None), key
            if value is not None:  # torch has other kernels for the attention of other devices
                torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-6, equal_nan=True)


# ---------------------------------------------------------------- what no model above does


def test_rows_of_detectors_are_weighed_without_waiting():
    """Their number differs from image to image, and is known on the CPU."""
    weigher, predictions = LossWeigher(), torch.ones(6, 2)
    gradients = []
    for place in (here, far):
        weigher.begin(make_weights())
        given = place(predictions).requires_grad_()
        with noted() as notes:
            weigher.scale_gradient(given, rows=[1, 0, 3, 2]).sum().backward()
        gradients.append(near(given.grad))
        assert not notes.waits
    assert torch.equal(*gradients) and torch.equal(gradients[0][:, 0], make_weights()[[0, 2, 2, 2, 3, 3]])


@pytest.mark.parametrize("place", [here, far])
def test_labels_may_be_known_on_the_cpu_alone(place):
    weigher = LossWeigher()
    weigher.begin(torch.ones(4))
    weigher.batch.labelled = torch.tensor([True, False, True, True])
    with noted() as notes:
        weigher.score(place(torch.ones(4)), torch.tensor([True, True, True, False]))
        _, valid = weigher.end()
    assert near(valid).tolist() == [True, False, True, False] and not notes.waits


def test_what_the_cpu_reads_has_arrived_there():
    """A loss may be computed on the CPU, where a copy that nobody waits for would be read before it is there."""
    weigher, cpu = LossWeigher(), torch.device("cpu")
    weigher.begin(far(make_weights()))
    with noted():
        assert torch.equal(weigher.weights_on(cpu), make_weights())
        weigher.score(torch.ones(4), far(torch.tensor([True, False, True, False])))
        assert weigher.end()[1].tolist() == [True, False, True, False]


def test_class_weights_wait_only_where_the_host_does(monkeypatch):
    """The host's fork lists the valid pixels, which waits, upstream does not."""
    monkeypatch.setattr(mmseg_losses, "_counts_ignored_pixels", lambda: True)
    run = Run(KINDS["class_weight"])
    labels = make_labels(size=(8, 8), holes=0)
    run.kind = replace(run.kind, batch=lambda turn: (make_inputs(), make_samples(labels)))
    far(run.model)
    assert not [str(wait) for wait in step(run, 0, far, True)[1] if wait.is_ours]


def test_shares_of_ohem_are_found_without_waiting():
    """Which the host itself is not able to: it lists the valid pixels."""
    module = mmseg_losses.OhemCrossEntropy(thres=0.3, min_kept=5, class_weight=[0.5, 1.0, 2.5, 0.1, 1.7])
    pred = torch.randn(4, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    target = make_labels(size=(8, 8), blank=1)
    expected = mmseg_losses._ohem_shares(module, dict(score=pred, target=target))
    torch.testing.assert_close(expected.sum(), module(pred, target))
    with noted() as notes:
        shares = mmseg_losses._ohem_shares(module, dict(score=far(pred), target=far(target)))
    torch.testing.assert_close(near(shares), expected)
    assert not notes.waits


def test_a_loss_weight_that_is_learned_is_not_looked_at():
    run = Run(KINDS["classifier"])
    step(run, 0, here, True)
    loss_weight = nn.Parameter(torch.tensor(0.5))
    run.model.head.loss_module.loss_weight = loss_weight
    expected = step(run, 1, here, True)[0]["scores"]
    far(run.model)
    results, waits = step(run, 1, far, True)
    torch.testing.assert_close(results["scores"], expected)
    assert not waits


class RememberingHead(InlineHead):
    """Trains on what it has remembered of the model, which no sample is given."""

    def forward(self, inputs):
        self.remembered = super().forward(inputs)
        return self.remembered

    def loss_by_feat(self, seg_logits, batch_data_samples):
        losses = super().loss_by_feat(seg_logits, batch_data_samples)
        return {key: loss + 0.1 * (self.remembered.mean() * loss) for key, loss in losses.items()}


def test_a_head_that_remembers_is_looked_at_and_still_no_gradient_is_spoilt():
    """No barrier can stand before what it remembers: such a head alone waits, and trains as before."""
    run = Run(Kind(lambda: with_head(RememberingHead), scenes))
    for place in (here, far):
        place(run.model)
        for turn in range(2):
            results, waits = step(run, turn, place, True)
            assert all(results[name].isfinite().all() for name, _ in run.model.named_parameters())
    assert [wait.what for wait in waits if wait.is_ours] == ["a blocking copy"]


class ScaledHead(FCNHead):
    """Has a parameter of its own in its loss, which is 0 / 0 for an image without a label."""

    def loss_by_feat(self, seg_logits, batch_data_samples):
        labels = labels_of(batch_data_samples)
        return dict(loss_scaled=nn.functional.cross_entropy(self.gain * seg_logits, labels, ignore_index=255))


def labelled_on_the_cpu(head, arguments):
    return (near(labels_of(arguments["batch_data_samples"])) != 255).flatten(1).any(1)


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("first", ["all_blank", "one_blank"])
def test_parameters_in_a_loss_are_not_spoilt_by_an_image_without_labels(first, trusted):
    """Which parameters a loss uses is learned only from a batch that has something to be found."""
    register_head_rule(ScaledHead, HeadRule(trusted=trusted, valid=labelled_on_the_cpu))
    run = Run(Kind(lambda: with_head(ScaledHead, gain=nn.Parameter(torch.ones(()))), scenes))
    blank = make_samples(torch.full((4, 8, 8), 255))
    batches = [(make_inputs(seed=5), blank)] * (first == "all_blank") + [scenes(1), scenes(2)]
    for batch in batches:
        run.step(batch, True)
    gradients = {name: each.grad for name, each in run.model.named_parameters()}
    host = with_head(ScaledHead, gain=nn.Parameter(torch.ones(())))
    inputs, samples = batches[-1]
    logits, weights = host.decode_head(host.extract_feat(inputs)), make_weights()
    own = {i: host.decode_head.loss_by_feat(logits[i : i + 1], samples[i : i + 1])["loss_scaled"] for i in (0, 2, 3)}
    (sum(weights[i] * loss for i, loss in own.items()) / 4).backward()
    for name, each in host.named_parameters():
        torch.testing.assert_close(gradients[name], each.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("fault", ["of_three", "subtracting", "squared", "drawing"])
def test_a_mixture_that_goes_wrong_on_a_device_is_refused_two_steps_later_at_most(fault):
    turns = []

    def augment(images, scores):
        turns.append(len(images))
        images, mixed = halves(images, scores)
        if len(turns) < 5:  # twice in a step
            return images, mixed
        if fault == "of_three":
            return images, (mixed + scores.roll(2, 0) / 2) / 1.5
        if fault == "drawing":
            return images * len(turns), mixed
        return images, mixed.pow(2) if fault == "squared" else 1.5 * scores - 0.5 * scores.roll(1, 0)

    run = Run(KINDS["mixture_of_ones_own"])
    run.model.data_preprocessor.batch_augments.host = augment
    step(run, 0, here, True)
    far(run.model)
    notes = Notes()
    assert not step(run, 1, far, True, notes)[1]
    with pytest.raises(ValueError, match="cannot be followed"):
        for turn in range(2, 5):
            step(run, turn, far, True, notes)
    assert turn <= 4


# ---------------------------------------------------------------- scores


def records(number, seed=0):
    """Batches of indices, losses, and which count; some are NaN."""
    generator = torch.Generator().manual_seed(seed)
    for turn in range(number):
        size = 1 + turn % 5
        losses = torch.rand(size, generator=generator)
        losses[0] = torch.nan if turn % 50 == 0 else losses[0]
        yield torch.randint(-1, 40, (size,), generator=generator), losses, torch.rand(size, generator=generator) < 0.9


@pytest.mark.parametrize("indices_too", [False, True])
@pytest.mark.parametrize("score", ["raw", "ema", "timestep"])
def test_hundreds_of_records_do_not_wait_and_keep_their_order(score, indices_too):
    stores = [ScoreStore(40, score=score) for _ in range(2)]
    for indices, losses, valid in records(1000):
        level = torch.linspace(-3, 3, len(losses))
        stores[0].record(indices, losses, valid, level)
        with noted() as notes:
            stores[1].record(far(indices) if indices_too else indices, far(losses), far(valid), far(level))
        assert not notes.waits
    for store in stores:
        with noted() as notes:
            store.merge()
            store.settle()
    assert 0 < len(notes.waits) <= 4
    assert torch.equal(stores[0].values, stores[1].values) and torch.equal(stores[0].times_seen, stores[1].times_seen)
    assert (stores[0].num_nonfinite, stores[0].num_invalid) == (stores[1].num_nonfinite, stores[1].num_invalid)


def test_records_of_several_devices_keep_their_order():
    stores = [ScoreStore(40) for _ in range(2)]
    for turn, (indices, losses, valid) in enumerate(records(1000)):
        stores[0].record(indices, losses, valid)
        place = far if turn // 100 % 2 else here
        with noted() as notes:
            stores[1].record(indices, place(losses), place(valid))
        assert not notes.waits
    with noted():
        states = [store.state_dict() for store in stores]
    assert all(torch.equal(states[0][key], states[1][key]) for key in ("scores", "seen", "times_seen"))


def test_a_million_records_wait_once():
    store, waits = ScoreStore(40), 0
    losses, indices = far(torch.rand(4096)), torch.arange(4096) % 40
    for _ in range(257):  # the last one stays where it is: norms of gradients may yet come in
        with noted() as notes:
            store.record(indices, losses)
        waits += bool(notes.waits)
    assert waits == 1 and store.times_seen.sum() == 2**20


# ---------------------------------------------------------------- the hook


def test_replaced_samples_are_left_out_without_waiting():
    pytest.importorskip("mmengine")
    from infobatch_mm.core import IterSchedule, Watcher
    from infobatch_mm.engine.loader import BatchIndices
    from infobatch_mm.engine.run import WatchedRun
    from infobatch_mm.policies import NoPruning

    weigher = LossWeigher()
    run = WatchedRun(Watcher(IterSchedule(12, 100, 4), NoPruning()), SimpleNamespace(), SimpleNamespace(), weigher)
    weigher.begin(torch.ones(4))
    run.batch = BatchIndices(INDICES, torch.tensor([False, True, False, False]))
    with noted() as notes:
        weigher.score(far(torch.arange(4.0)))
        run.record(SimpleNamespace(model=None))
        run.advance(SimpleNamespace(world_size=1), 0)
    assert not notes.waits
    with noted():
        run.training.store.flush()
    assert run.training.store.seen.nonzero().flatten().tolist() == [3, 7, 11]


@pytest.mark.parametrize("indices_too", [False, True])
@pytest.mark.parametrize("score", ["raw", "timestep"])
def test_a_loop_of_ones_own_does_not_wait(score, indices_too):
    """With our loader, in a full pass and in a pruned one; the scores and books are those of the CPU."""
    ends = []
    for place in (here, far):
        infobatch = InfoBatch(48, 4, delta=1.0, score=score)
        loader = infobatch.loader(list(range(48)), 4)
        notes, weighted = Notes(), []
        for _ in range(3):
            for index, _ in loader:
                losses = place((index * 37 % 48).float() + 1)
                level = place(index.float() / 8)
                given = place(index) if indices_too else index
                with noted(notes):
                    weighted.append(infobatch.weigh(losses.requires_grad_(), given, level))
                    weighted[-1].backward()
        assert not notes.waits, "\n".join(map(str, notes.waits))
        with noted(notes):
            ends.append((infobatch.summary(), infobatch.state_dict()["scores"].tolist(), torch.stack(near(weighted))))
    assert ends[0][:2] == ends[1][:2] and torch.equal(ends[0][2], ends[1][2])
    assert ends[0][0]["saved_ratio"] > 0.1


def test_a_loop_on_accelerate_does_not_wait():
    accelerate = pytest.importorskip("accelerate")
    from infobatch_mm.diffusion import AcceleratedInfoBatch

    given = torch.utils.data.DataLoader(torch.arange(48.0), 4, shuffle=True)
    infobatch = AcceleratedInfoBatch(accelerate.Accelerator(cpu=True), given, 4, delta=1.0, score="timestep")
    loader = infobatch.prepare(given)
    notes = Notes()
    for _ in range(3):
        for x in loader:
            infobatch._in_hand.index = far(infobatch._in_hand.index)  # accelerate moves it with the batch
            with noted(notes):
                infobatch._in_hand.weights = infobatch._pruner.weights(infobatch._in_hand.index)
                infobatch.weigh(far(x * 37 % 48 + 1), log_snr=far(x / 8))
            waits = [wait for wait in notes.waits if wait.is_ours]
            assert not waits, "\n".join(map(str, waits))
            infobatch._pruner.store.flush()
    assert infobatch.passes_done == 3
