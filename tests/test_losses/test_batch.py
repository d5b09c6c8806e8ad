"""Arguments of a host's loss, taken apart by sample."""

from collections import namedtuple

import pytest
import torch
from mmengine.config import ConfigDict

from infobatch_mm.losses.dissect.arguments import BatchedArguments

Outputs = namedtuple("Outputs", "logits masks")


def grad(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).requires_grad_()


def samples_of(arguments, batch_size, **options):
    return BatchedArguments(arguments, batch_size, **options).samples()


def assert_sliced(pieces, tensor, axis=0):
    """The pieces are the samples' slices, each still a batch of one, and in the tensor's graph."""
    for i, piece in enumerate(pieces):
        assert torch.equal(piece, tensor.narrow(axis, i, 1))
        assert piece.requires_grad == tensor.requires_grad


# ---------------------------------------------------------------- one sample at a time


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_tensors_are_taken_apart_along_the_batch(batch):
    logits, labels = grad(batch, 5, 3, 3), torch.arange(batch * 9).reshape(batch, 3, 3)
    samples = samples_of(dict(logits=logits, labels=labels), batch)
    assert len(samples) == batch
    assert_sliced([sample["logits"] for sample in samples], logits)
    assert_sliced([sample["labels"] for sample in samples], labels)


def test_levels_of_a_pyramid_keep_their_list():
    levels = [grad(3, 5, size, size) for size in (8, 4)]
    samples = samples_of(dict(levels=levels), 3)
    for k, level in enumerate(levels):
        assert_sliced([sample["levels"][k] for sample in samples], level)
    assert all(type(sample["levels"]) is list and len(sample["levels"]) == 2 for sample in samples)


@pytest.mark.parametrize("carries_gradient", [True, False])
def test_four_levels_of_a_batch_of_four_are_levels(carries_gradient):
    levels = [grad(4, 2, size, size) for size in (8, 4, 2, 1)]
    if not carries_gradient:
        levels = [level.detach() for level in levels]
    samples = samples_of(dict(levels=levels), 4)
    assert all(len(sample["levels"]) == 4 for sample in samples)
    for k, level in enumerate(levels):
        assert_sliced([sample["levels"][k] for sample in samples], level)


def test_lists_of_other_things_have_one_for_each_sample():
    shapes = [(8, 8), (8, 6), (4, 4)]
    metas = ({"id": 0}, {"id": 1}, {"id": 2})
    samples = samples_of(dict(shapes=shapes, metas=metas), 3)
    assert [sample["shapes"] for sample in samples] == [[(8, 8)], [(8, 6)], [(4, 4)]]
    assert [sample["metas"] for sample in samples] == [({"id": 0},), ({"id": 1},), ({"id": 2},)]


def test_a_list_of_tensors_of_the_samples_own_sizes_has_one_for_each_sample():
    boxes = [torch.rand(2, 4), torch.rand(0, 4), torch.rand(7, 4)]
    samples = samples_of(dict(boxes=boxes), 3)
    assert all(len(sample["boxes"]) == 1 for sample in samples)
    assert [sample["boxes"][0] for sample in samples] == boxes


def test_tuples_and_named_tuples_keep_their_type():
    outputs = Outputs(grad(3, 5), grad(3, 2, 2))
    pair = grad(3, 1), grad(3, 4)
    samples = samples_of(dict(outputs=outputs, pair=pair), 3)
    for i, sample in enumerate(samples):
        assert type(sample["outputs"]) is Outputs and type(sample["pair"]) is tuple
        assert torch.equal(sample["outputs"].masks, outputs.masks[i : i + 1])
        assert torch.equal(sample["pair"][1], pair[1][i : i + 1])


def test_dicts_are_entered():
    outputs = dict(logits=grad(3, 5), levels=[grad(3, 2), grad(3, 1)], shapes=[(1,), (2,), (3,)], scale=2.0)
    samples = samples_of(dict(outputs=outputs), 3)
    assert_sliced([sample["outputs"]["logits"] for sample in samples], outputs["logits"])
    assert_sliced([sample["outputs"]["levels"][1] for sample in samples], outputs["levels"][1])
    assert [sample["outputs"]["shapes"] for sample in samples] == [[(1,)], [(2,)], [(3,)]]
    assert all(sample["outputs"]["scale"] == 2.0 for sample in samples)


def test_lists_of_dicts_with_predictions_are_entered():
    """One dict for each decoder layer, as query heads give their auxiliary outputs."""
    layers = [dict(logits=grad(3, 5), masks=grad(3, 2, 2)) for _ in range(2)]
    samples = samples_of(dict(layers=layers), 3)
    for k, layer in enumerate(layers):
        assert_sliced([sample["layers"][k]["masks"] for sample in samples], layer["masks"])


def test_levels_of_levels_are_entered():
    stages = [[grad(3, 5, 4, 4), grad(3, 5, 2, 2)], [grad(3, 5, 4, 4), grad(3, 5, 2, 2)]]
    samples = samples_of(dict(stages=stages), 3)
    assert_sliced([sample["stages"][1][0] for sample in samples], stages[1][0])


def test_the_batch_may_lie_along_another_axis_by_name():
    queries, labels = grad(2, 3, 7), torch.arange(3)
    samples = samples_of(dict(queries=queries, labels=labels), 3, axes=dict(queries=1))
    assert_sliced([sample["queries"] for sample in samples], queries, axis=1)
    assert_sliced([sample["labels"] for sample in samples], labels)


def test_an_axis_of_the_batchs_size_does_not_hide_the_named_one():
    queries = grad(3, 3, 7)
    samples = samples_of(dict(queries=queries), 3, axes=dict(queries=1))
    assert_sliced([sample["queries"] for sample in samples], queries, axis=1)


def test_a_shared_parameter_is_marked_by_name():
    prototypes = grad(3, 7)
    batch = BatchedArguments(dict(logits=grad(3, 5), prototypes=prototypes), 3, axes=dict(prototypes=None))
    assert all(sample["prototypes"] is prototypes for sample in batch.samples())
    assert batch.reordered([2, 0, 1])["prototypes"] is prototypes
    assert [tuple(tensor.shape) for tensor, _ in batch.predictions()] == [(3, 5)]


def test_only_plain_dicts_are_entered():
    """A config is shared, whatever it holds; one with a prediction in it is none."""
    settings = ConfigDict(sizes=[(1,), (2,), (3,)], thresholds=torch.rand(3))
    assert all(sample["settings"] is settings for sample in samples_of(dict(logits=grad(3, 5), settings=settings), 3))


@pytest.mark.parametrize("rows", [[2, 0, 3], [5, 0, 0], [1, 1, 3]])
def test_rows_belong_to_the_samples_as_said(rows):
    points = grad(5, 4)
    samples = samples_of(dict(points=points), 3, rows=dict(points=rows))
    ends = torch.tensor(rows).cumsum(0).tolist()
    for sample, count, end in zip(samples, rows, ends, strict=True):
        assert torch.equal(sample["points"], points[end - count : end])


@pytest.mark.parametrize("rows", [[2, 3], [2, 2, 2]], ids=["samples", "sum"])
def test_rows_that_do_not_add_up_are_refused(rows):
    with pytest.raises(ValueError, match=r"points has 5 rows.*\[2, "):
        samples_of(dict(points=grad(5, 4)), 3, rows=dict(points=rows))


@pytest.mark.parametrize(
    "shared",
    [
        torch.tensor(2.0),
        torch.ones(7),
        torch.zeros(0),
        "mean",
        None,
        4,
        0.5,
        [],
        (),
        {},
        [torch.ones(7)],
        ["a", "b"],
        ["a", "b", "c"],
        [1, 0.5, 0.25],
        (1, 2, 3),
    ],
    ids=str,
)
def test_all_else_is_shared(shared):
    samples = samples_of(dict(logits=grad(3, 5), shared=shared), 3)
    assert all(sample["shared"] is shared or sample["shared"] == shared for sample in samples)


def test_arguments_are_left_alone():
    levels, names = [grad(3, 5), grad(3, 1)], ["a", "b", "c"]
    arguments = dict(levels=levels, names=names)
    before = [level.clone() for level in levels]
    batch = BatchedArguments(arguments, 3)
    batch.samples(), batch.reordered([2, 0, 1]), batch.mapped(lambda tensor, axis, rows: tensor * 2)
    assert arguments["levels"] is levels and arguments["names"] is names and names == ["a", "b", "c"]
    assert all(torch.equal(level, old) for level, old in zip(levels, before, strict=True))


def test_gradients_of_the_samples_arrive_where_their_slices_are():
    logits = grad(3, 5)
    sum(i * sample["logits"].sum() for i, sample in enumerate(samples_of(dict(logits=logits), 3))).backward()
    assert logits.grad[:, 0].tolist() == [0.0, 1.0, 2.0]


# ---------------------------------------------------------------- mapped and reordered


def test_only_predictions_are_mapped():
    seen = []

    def scale(tensor, axis, rows):
        seen.append((tuple(tensor.shape), axis, rows))
        return 2 * tensor

    arguments = dict(
        logits=grad(3, 5), queries=grad(2, 3), points=grad(4, 1), levels=[grad(3, 1)], labels=torch.arange(3), n=3
    )
    batch = BatchedArguments(arguments, 3, axes=dict(queries=1), rows=dict(points=[1, 1, 2]))
    scaled = batch.mapped(scale)
    assert seen == [((3, 5), 0, None), ((2, 3), 1, None), ((4, 1), 0, [1, 1, 2]), ((3, 1), 0, None)]
    assert torch.equal(scaled["levels"][0], 2 * arguments["levels"][0])
    assert scaled["labels"] is arguments["labels"] and scaled["n"] == 3


def test_reordered_is_the_same_batch_in_another_order():
    arguments = dict(
        logits=grad(3, 5), levels=[grad(3, 1), grad(3, 2)], queries=grad(2, 3), shapes=[(1,), (2,), (3,)], flag=True
    )
    other = BatchedArguments(arguments, 3, axes=dict(queries=1)).reordered([2, 0, 1])
    order = [2, 0, 1]
    assert torch.equal(other["logits"], arguments["logits"][order])
    assert torch.equal(other["levels"][1], arguments["levels"][1][order])
    assert torch.equal(other["queries"], arguments["queries"][:, order])
    assert other["shapes"] == [(3,), (1,), (2,)] and other["flag"] is True


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (dict(logits=grad(2, 5)), r"logits is a prediction of shape \(2, 5\), expected 3 rows along axis 0"),
        (dict(logits=grad(6, 5)), r"logits.*\(6, 5\)"),
        (dict(logits=grad(1)), r"logits.*\(1,\)"),
        (dict(levels=[grad(3, 5), grad(2, 5)]), r"levels.*\(2, 5\)"),
        (dict(out=dict(logits=grad(2, 5))), r"out.*\(2, 5\)"),
        (dict(labels=torch.arange(3), n=4), r"none of labels, n is a prediction with 3 rows"),
        (dict(), r"prediction with 3 rows"),
    ],
)
def test_predictions_without_a_batch_are_refused(arguments, pattern):
    with pytest.raises(ValueError, match=pattern):
        BatchedArguments(arguments, 3).check()
