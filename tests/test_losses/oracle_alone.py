"""Reference for heads whose losses do not separate: a twin of the untouched model that trains on mean(weight_i * l_i).

Nothing here imports infobatch_mm. The twin's heads evaluate their own losses on slices of their predictions, which are
written down here, argument by argument.
"""

import copy
import random
from dataclasses import dataclass

import numpy as np
import torch
from mmengine.config import Config

BATCH = 4
# Uneven, with a 0 for an image with boxes and none for the one without, the third.
WEIGHTS = torch.tensor([0.3, 2.0, 1.5, 0.0])


# ---------------------------------------------------------------- models and steps


def small_config(path, small, **options):
    """The model of a shipped config, made small, that downloads nothing and needs one process."""
    config = Config.fromfile(path, **options)
    config.merge_from_dict({f"model.{key}": value for key, value in small.items()}, allow_list_keys=True)
    for part in _dicts(config.model):
        part.update({key: None for key in ("init_cfg", "pretrained") if key in part})
        if part.get("type") == "SyncBN":
            part["type"] = "BN"
    return config.model


def _dicts(value):
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from _dicts(each)


@dataclass
class Step:
    """What one forward and backward pass left behind."""

    loss: float
    log: dict
    gradients: dict
    scores: torch.Tensor | None = None
    scored: torch.Tensor | None = None


def seed(value):
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def take_step(model, losses, weigher=None, weights=None, pruned=False):
    """A forward and backward pass; ``losses()`` gives the model's dict of losses."""
    if weigher is not None:
        weigher.begin(weights, pruned)
    loss, log = model.parse_losses(losses())
    model.zero_grad()
    loss.backward()
    scores, scored = (None, None) if weigher is None else weigher.end()
    values = {key: float(value.detach()) for key, value in log.items()}
    return Step(float(loss.detach()), values, gradients_of(model), scores, scored)


def gradients_of(model):
    return {name: None if each.grad is None else each.grad.clone() for name, each in model.named_parameters()}


def relative_error(actual, expected):
    """Of all gradients together; a gradient that is None on one side counts as 0."""
    assert list(actual.gradients) == list(expected.gradients)
    pairs = [
        [torch.zeros(1) if each is None else each.double().flatten() for each in pair]
        for pair in zip(actual.gradients.values(), expected.gradients.values(), strict=True)
    ]
    difference = torch.stack([(a - b).norm() for a, b in pairs]).norm()
    norm = torch.stack([b.norm() for _, b in pairs]).norm()
    assert 0 < float(norm) < float("inf")
    return float(difference / norm)


# ---------------------------------------------------------------- the oracle

#: How to take the arguments of the heads' losses apart. A list of tensors is one of levels or of layers.
KINDS = {
    **dict.fromkeys(("dn_meta", "rcnn_train_cfg"), "shared"),
    **dict.fromkeys(
        ("batch_gt_instances", "batch_img_metas", "batch_gt_instances_ignore", "sampling_results"), "images"
    ),
    **dict.fromkeys(("cls_scores", "bbox_preds", "centernesses", "kernel_preds"), "tensors"),
    **dict.fromkeys(("mask_feat", "enc_cls_scores", "enc_bbox_preds"), "tensor"),
    **dict.fromkeys(("all_layers_cls_scores", "all_layers_bbox_preds", "all_cls_scores", "all_mask_preds"), "layers"),
    **dict.fromkeys(("cls_score", "bbox_pred", "rois"), "rois"),
    "mask_preds": "positive rois",
}


def alone(arguments, i):
    """The arguments of a head's loss for image ``i`` of the batch."""
    return {
        name: None if value is None else _slice(KINDS[name], value, i, arguments) for name, value in arguments.items()
    }


def _slice(kind, value, i, arguments):
    if kind == "shared":
        return value
    if kind == "images":
        return [copy.copy(value[i])]
    if kind == "tensor":
        return value[i : i + 1]
    if kind == "tensors" or (kind == "layers" and isinstance(value, list)):
        return [each[i : i + 1] for each in value]
    if kind == "layers":
        return value[:, i : i + 1]
    sampled = arguments["sampling_results"]
    numbers = [len(each.pos_priors) for each in sampled]
    if kind == "rois":
        numbers = [number + len(each.neg_priors) for number, each in zip(numbers, sampled, strict=True)]
    assert sum(numbers) == len(value)
    return value[sum(numbers[:i]) : sum(numbers[: i + 1])]


def leaves(losses, prefix=""):
    """Key -> loss, in a head's nested dict of losses and lists of losses."""
    if isinstance(losses, (dict, list)):
        items = losses.items() if isinstance(losses, dict) else enumerate(losses)
        return {key: leaf for name, each in items for key, leaf in leaves(each, f"{prefix}.{name}").items()}
    named_loss = "loss" in [part for part in prefix.split(".") if not part.isdigit()][-1]
    return {prefix: losses} if isinstance(losses, torch.Tensor) and named_loss else {}


class AloneHeads:
    """Makes the heads of an untouched model optimise mean(weight_i * l_i)."""

    def __init__(self, model, heads, weights):
        self.scores = torch.zeros(len(weights), dtype=torch.float64)
        for path, method in heads.items():
            head = model.get_submodule(path)
            setattr(head, method, self.wrapped(getattr(head, method), weights))

    def wrapped(self, host, weights):
        names = host.__code__.co_varnames[1 : host.__code__.co_argcount]

        def loss(*args, **kwargs):
            arguments = {**dict(zip(names, args, strict=False)), **kwargs}
            states = torch.get_rng_state(), np.random.get_state(), random.getstate()
            own = [leaves(host(**alone(arguments, i))) for i in range(len(weights))]
            torch.set_rng_state(states[0])
            np.random.set_state(states[1])
            random.setstate(states[2])
            with torch.no_grad():
                result = host(**arguments)
            for i, each in enumerate(own):
                assert list(each) == list(leaves(result))
                self.scores[i] += sum(float(value.detach()) for value in each.values())
            objective = {
                key: sum(weight * each[key].reshape(()) for weight, each in zip(weights, own, strict=True)) / len(own)
                for key in own[0]
            }
            return self.replaced(result, objective)

        return loss

    def replaced(self, result, objective, prefix=""):
        if prefix in objective:
            return objective[prefix]
        if isinstance(result, dict):
            return {key: self.replaced(value, objective, f"{prefix}.{key}") for key, value in result.items()}
        if isinstance(result, list):
            return [self.replaced(value, objective, f"{prefix}.{i}") for i, value in enumerate(result)]
        return result
