"""Two processes, and losses that wait for the other's: both evaluate them equally often."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

pytest.importorskip("mmseg")
from mmseg.models.decode_heads import FCNHead
from oracle import gradients, make_inputs, make_labels, make_samples, make_weights, total
from oracle_losses import shown_by_own, with_head

from infobatch_mm.losses import LossWeigher, attach_views

pytestmark = pytest.mark.dist

WORLD, BLANK = 2, 2
#: Whether the pass of each step is pruned.
STEPS = {"full_first": (False, True), "pruned_first": (True, False)}


class ReducedHead(FCNHead):
    """Divides by the number of valid pixels of all processes, as detectors do."""

    calls = 0

    def loss_by_feat(self, seg_logits, batch_data_samples):
        labels = torch.stack([sample.gt_sem_seg.data[0] for sample in batch_data_samples])
        summed = nn.functional.cross_entropy(seg_logits, labels, ignore_index=255, reduction="sum")
        positives = (labels != 255).sum().to(summed)
        dist.all_reduce(positives)
        self.calls += 1
        return dict(loss_reduced=summed / (positives / WORLD).clamp(min=1))


def make_batch(me, seed):
    """One blank image, in the first process only."""
    labels = make_labels(size=(8, 8), blank=BLANK if me == 0 else None, seed=10 * me + seed)
    return make_inputs(size=(32, 32), dtype=torch.float64, seed=10 * me + seed + 1), make_samples(labels)


def train(me, kinds):
    """What each step of a weighed model and of the host's gave."""
    model, host = with_head(ReducedHead, torch.float64), with_head(ReducedHead, torch.float64)
    weigher, seen = LossWeigher(), []
    attach_views(model, weigher)
    for seed, pruned in enumerate(kinds):
        batch, weights = make_batch(me, seed), make_weights() if pruned else torch.ones(4)
        weigher.begin(weights, pruned, torch.arange(4))
        before = model.decode_head.calls
        results = []
        for each in (model, host):
            each.zero_grad()
            loss = total(each.loss(*batch))
            loss.backward()
            results += [loss.detach(), gradients(each)]
        scores, valid = weigher.end()
        entry = dict(ours=results[0], gradients=results[1], theirs=results[2], host_gradients=results[3])
        entry.update(
            calls=model.decode_head.calls - before, scores=scores, valid=valid, **objective(host, batch, weights)
        )
        seen.append(entry)
    return seen


def objective(host, batch, weights):
    """The samples' own losses, by the untouched head, and the gradient of their weighted mean."""
    inputs, samples = batch
    logits = host.decode_head(host.extract_feat(inputs))
    alone = [total(host.decode_head.loss_by_feat(logits[i : i + 1], samples[i : i + 1])) for i in range(4)]
    host.zero_grad()
    sum(weight * loss / 4 for weight, loss in zip(weights.double(), alone, strict=True)).backward()
    return dict(alone=[float(loss.detach()) for loss in alone], weighted=gradients(host))


def one_process(me, folder):
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rendezvous, timeout=timedelta(seconds=20), rank=me, world_size=WORLD)
    torch.save({name: train(me, kinds) for name, kinds in STEPS.items()}, Path(folder) / f"{me}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(one_process, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{me}.pt", weights_only=True) for me in range(WORLD)]


every_run = pytest.mark.parametrize("name", STEPS)


@every_run
def test_both_processes_evaluate_a_loss_equally_often(ranks, name):
    first, second = ([entry["calls"] for entry in seen[name]] for seen in ranks)
    assert first == second
    assert first[0] > first[1] == 5  # the samples' own, and the batch's


@every_run
def test_values_are_the_hosts_or_comparable_with_them(ranks, name):
    for seen in ranks:
        for entry, pruned in zip(seen[name], STEPS[name], strict=True):
            expected = float(entry["theirs"])
            if pruned:
                kept = entry["valid"].tolist()
                own = [torch.tensor(loss if ok else 0.0) for loss, ok in zip(entry["alone"], kept, strict=True)]
                expected = shown_by_own(entry["theirs"], own, make_weights())
            assert float(entry["ours"]) == pytest.approx(expected, rel=1e-6)


@every_run
def test_gradients_are_those_of_the_pass(ranks, name):
    for seen in ranks:
        for entry, pruned in zip(seen[name], STEPS[name], strict=True):
            expected = entry["weighted" if pruned else "host_gradients"]
            for key, gradient in entry["gradients"].items():
                torch.testing.assert_close(gradient, expected[key], rtol=1e-8, atol=1e-12)


@every_run
def test_the_blank_image_alone_has_no_score(ranks, name):
    for me, seen in enumerate(ranks):
        for entry in seen[name]:
            assert entry["valid"].tolist() == [True, True, me != 0, True]
            expected = [loss if ok else 0.0 for loss, ok in zip(entry["alone"], entry["valid"].tolist(), strict=True)]
            assert entry["scores"].tolist() == pytest.approx(expected, rel=1e-6)
