"""Two processes and a task that is missing in one of them: gradients are those of the host under DDP, weighted."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("mmpretrain")
from oracle_losses import only, shown, weighted
from oracle_mmpretrain import (
    BATCH,
    ONES,
    WEIGHTS,
    build,
    classifier,
    gradients_of,
    labelled,
    linear_head,
    make_inputs,
    make_labels,
    with_tasks,
)

from infobatch_mm.losses import LossWeigher, attach_views

pytestmark = pytest.mark.dist

WORLD = 2
#: Which tasks the samples of each process have, and their weights.
TASKS = [[["shape", "colour"], ["shape"], ["colour"], ["shape", "colour"]], [["shape"]] * BATCH]
STEPS = {"ones": [ONES, ONES], "weighted": [WEIGHTS, WEIGHTS.flip(0)]}


def make_model():
    heads = dict(shape=linear_head(), colour=linear_head(dict(type="LabelSmoothLoss", label_smooth_val=0.1)))
    return build(classifier(dict(type="MultiTaskHead", task_heads=heads)), torch.float64)


def make_batch(me):
    drawn = zip(make_labels(seed=10 + me), make_labels(seed=20 + me), TASKS[me], strict=True)
    samples = [
        with_tasks(
            {name: labelled([label])[0] for name, label in dict(shape=shape, colour=colour).items() if name in has}
        )
        for shape, colour, has in drawn
    ]
    return make_inputs(dtype=torch.float64, seed=30 + me), samples


def one_step(me, weights=None):
    model = make_model()
    weigher = LossWeigher()
    if weights is not None:
        attach_views(model, weigher)
        weigher.begin(weights, pruned=True)
    parallel = DistributedDataParallel(model, find_unused_parameters=True)  # as the host needs it for such data
    loss, _ = model.parse_losses(parallel(*make_batch(me), mode="loss"))
    loss.backward()
    scores, valid = weigher.end()
    return dict(loss=loss.detach(), gradients=gradients_of(model), scores=scores, valid=valid)


def one_process(me, folder):
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rendezvous, timeout=timedelta(seconds=60), rank=me, world_size=WORLD)
    steps = {name: one_step(me, weights[me]) for name, weights in STEPS.items()}
    torch.save(steps | dict(host=one_step(me)), Path(folder) / f"{me}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(one_process, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{me}.pt", weights_only=True) for me in range(WORLD)]


def assert_same(ours, theirs):
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-10, atol=1e-12)


def test_weights_of_one_are_the_hosts_step(ranks):
    for steps in ranks:
        assert torch.equal(steps["ones"]["loss"], steps["host"]["loss"])
        assert_same(steps["ones"]["gradients"], steps["host"]["gradients"])


def test_gradients_are_the_mean_over_processes_of_their_weighted_tasks(ranks):
    model, objective = make_model(), 0.0
    for me, weights in enumerate(STEPS["weighted"]):
        inputs, samples = make_batch(me)
        feats = model.extract_feat(inputs)
        scores, seen = torch.zeros(BATCH, dtype=torch.float64), 0.0
        for name, head in model.head.task_heads.items():
            places = [i for i, sample in enumerate(samples) if name in sample]
            losses = [type(head).loss(head, (only(feats[0], i),), [samples[i].get(name)])["loss"] for i in places]
            if places:
                objective = objective + weighted(losses, weights[places]) / len(places) / WORLD
                scores[places] += torch.stack(losses).detach()
                seen += shown(losses, weights[places]) / len(places)
        assert float(ranks[me]["weighted"]["loss"]) == pytest.approx(seen, rel=1e-6)
        assert ranks[me]["weighted"]["valid"].all()
        torch.testing.assert_close(ranks[me]["weighted"]["scores"].double(), scores, rtol=1e-6, atol=0)
    objective.backward()
    expected = gradients_of(model)
    for steps in ranks:
        assert_same(steps["weighted"]["gradients"], expected)
