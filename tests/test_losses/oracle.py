"""Reference for the loss views of mmseg models, written from the host's semantics alone.

Nothing here imports infobatch_mm. A sample's contribution to the host's loss is what the loss of the untouched host
loses when the sample's labels are ignored, with the host's normaliser held: the host divides by fewer pixels then,
so each term is scaled back by the two denominators, which are counted here by plain loops.
"""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("mmseg")
import mmseg.models  # noqa: F401
from mmengine.config import ConfigDict
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

NUM_CLASSES = 5
EPS = torch.finfo(torch.float32).eps
BN = dict(type="BN", requires_grad=True)


# ---------------------------------------------------------------- models and data


def resnet():
    """Four maps of 4, 8, 16, 32 channels, strides 4 to 32."""
    return dict(
        type="ResNetV1c",
        depth=18,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        dilations=(1, 1, 1, 1),
        strides=(1, 2, 2, 2),
        stem_channels=4,
        base_channels=4,
        norm_cfg=BN,
        style="pytorch",
        contract_dilation=True,
    )


def ce(**options):
    return dict(type="CrossEntropyLoss", **options)


def fcn(in_index=1, in_channels=8, loss=None, **options):
    head = dict(
        type="FCNHead",
        in_channels=in_channels,
        in_index=in_index,
        channels=4,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0,
        num_classes=NUM_CLASSES,
        norm_cfg=BN,
        loss_decode=ce() if loss is None else loss,
    )
    return {**head, **options}


def encoder_decoder(decode_head=None, auxiliary_head=None, backbone=None, **options):
    config = dict(
        type="EncoderDecoder",
        data_preprocessor=dict(type="mmseg.SegDataPreProcessor"),
        backbone=resnet() if backbone is None else backbone,
        decode_head=fcn() if decode_head is None else decode_head,
        auxiliary_head=auxiliary_head,
        train_cfg=dict(),
        test_cfg=dict(mode="whole"),
    )
    return {**config, **options}


def build(config, dtype=torch.float32, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MODELS.build(ConfigDict(copy.deepcopy(config)))
    return model.to(dtype).train()


def make_labels(batch=4, size=(32, 32), num_classes=NUM_CLASSES, holes=0.2, blank=None, fill=255, seed=1):
    """Labels ``(N, H, W)``; a share of the pixels, different in each sample, holds ``fill``, sample ``blank`` all."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_classes, (batch, *size), generator=generator)
    share = holes * torch.linspace(0.5, 2.0, batch)[:, None, None]
    labels[torch.rand(labels.shape, generator=generator) < share] = fill
    if blank is not None:
        labels[blank] = fill
    return labels


def make_samples(labels):
    shape = tuple(labels.shape[1:])
    meta = dict(img_shape=shape, ori_shape=shape, pad_shape=shape, padding_size=[0, 0, 0, 0])
    return [SegDataSample(metainfo=dict(meta), gt_sem_seg=PixelData(data=label[None].clone())) for label in labels]


def make_inputs(batch=4, size=(32, 32), dtype=torch.float32, seed=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_weights(batch=4, seed=3):
    """Uneven float32 weights, among them a 0 and one below 1."""
    weights = 0.5 + 3 * torch.rand(batch, generator=torch.Generator().manual_seed(seed))
    if batch > 2:
        weights[1] = 0.0
        weights[2] = 0.3
    return weights


# ---------------------------------------------------------------- the host's terms


def heads(model):
    """Key prefix in the losses dict -> head."""
    named = {}
    for attribute, prefix in (("decode_head", "decode"), ("auxiliary_head", "aux")):
        head = getattr(model, attribute, None)
        if isinstance(head, nn.ModuleList):
            named.update({f"{prefix}_{i}": each for i, each in enumerate(head)})
        elif head is not None:
            named[prefix] = head
    return named


def loss_modules(head):
    return list(head.loss_decode) if isinstance(head.loss_decode, nn.ModuleList) else [head.loss_decode]


def all_loss_modules(model):
    return [module for head in heads(model).values() for module in loss_modules(head)]


def total(losses):
    """What the host optimises (``parse_losses``): the sum of the keys with 'loss' in them."""
    terms = [value if isinstance(value, list) else [value] for key, value in losses.items() if "loss" in key]
    return sum(sum(each.mean() for each in term) for term in terms)


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def denominator(module, labels, ignore_index, channels):
    """What the host's ``CrossEntropyLoss`` divides its summed loss by, counted pixel by pixel."""
    if module.reduction == "sum":
        return 1.0
    flat = labels.flatten().tolist()
    kept = [label for label in flat if label != ignore_index]
    if module.use_sigmoid:
        kept = [label for label in kept if label >= 0]
        return len(kept) * channels + EPS if module.avg_non_ignore else float(len(flat) * channels)
    if module.class_weight is not None:
        return sum(module.class_weight[label] for label in kept) + EPS
    return (len(kept) if module.avg_non_ignore else len(flat)) + EPS


def hold_pixel_samplers(model):
    """Pixel samplers answer every later call with the pixels they chose in the first."""
    for head in heads(model).values():
        if head.sampler is not None:
            head.sampler.sample = _once(head.sampler.sample)


def _once(function):
    answers = []

    def held(*args):
        if not answers:
            answers.append(function(*args))
        return answers[0].clone()

    return held


def name_losses_apart(model):
    for head in heads(model).values():
        for i, module in enumerate(loss_modules(head)):
            module._loss_name = f"loss_{i}"


def contributions(model, run, labels):
    """Contributions of the samples to the total loss of an untouched host model, with their graph.

    ``run(model, samples)`` returns the losses dict. Returns the copy of the model whose parameters carry the graph,
    and the list of contributions.
    """
    host = copy.deepcopy(model)
    hold_pixel_samplers(host)
    name_losses_apart(host)
    named = heads(host)
    full = run(host, make_samples(labels))
    parts = []
    for i in range(len(labels)):
        part = 0.0
        for key, term in _terms(full, named):
            prefix, index = key
            head = named[prefix]
            module = loss_modules(head)[index]
            without_i = labels.clone()
            without_i[i] = head.ignore_index
            rest = run(host, make_samples(without_i))[f"{prefix}.loss_{index}"]
            held = [denominator(module, each, head.ignore_index, head.out_channels) for each in (without_i, labels)]
            part = part + (term - rest * (held[0] / held[1]))
        parts.append(part)
    return host, parts


def _terms(losses, named):
    for prefix, head in named.items():
        for index in range(len(loss_modules(head))):
            key = f"{prefix}.loss_{index}"
            if key in losses:
                yield (prefix, index), losses[key]


def weighted_sum(parts, weights):
    return sum(weight * part for weight, part in zip(weights.double().tolist(), parts, strict=True))


# ---------------------------------------------------------------- pixel by pixel


def pixel_loss(module, logits, label, ignore_index):
    """Loss of one pixel, logits of shape ``(C,)``, summed over classes where they are one-hot; None if ignored."""
    if label == ignore_index or (module.use_sigmoid and label < 0):
        return None
    if not module.use_sigmoid:
        loss = torch.logsumexp(logits, 0) - logits[label]
        return loss if module.class_weight is None else loss * module.class_weight[label]
    positive = 1.0 if module.class_weight is None else module.class_weight[0]
    target = torch.zeros_like(logits)
    if len(logits) == 1:
        target[0] = label
    else:
        target[label] = 1
    soft = nn.functional.softplus
    return (positive * target * soft(-logits) + (1 - target) * soft(logits)).sum()


def brute_force(modules, logits, labels, ignore_index, weights, chosen=None):
    """The weighted objective of one head, and its scores, by loops over losses, samples and pixels.

    ``chosen`` are a pixel sampler's pixels ``(N, H, W)``. Scores: mean over the sample's valid pixels (and classes,
    where a loss has one element for each) of the loss the head optimises, None without a valid pixel.
    """
    batch, channels, height, width = logits.shape
    objective, scores = 0.0, [0.0] * batch
    for module in modules:
        divisor = denominator(module, labels, ignore_index, channels)
        for i in range(batch):
            sample, pixels = 0.0, 0
            for y in range(height):
                for x in range(width):
                    loss = pixel_loss(module, logits[i, :, y, x], int(labels[i, y, x]), ignore_index)
                    if loss is None:
                        continue
                    pixels += 1
                    sample = sample + (loss if chosen is None else loss * float(chosen[i, y, x]))
            if pixels == 0:
                scores[i] = None
                continue
            objective = objective + float(weights[i]) * module.loss_weight * sample / divisor
            elements = pixels * channels if module.use_sigmoid else pixels
            scores[i] = scores[i] + module.loss_weight * float(sample.detach()) / elements
    return objective, scores


# ---------------------------------------------------------------- assertions


def assert_same_tensors(actual, expected):
    """Same keys, types and bits."""
    assert list(actual) == list(expected)
    for key, value in expected.items():
        if value is None:
            assert actual[key] is None, key
            continue
        assert actual[key].dtype == value.dtype, (key, actual[key].dtype, value.dtype)
        same = torch.equal(actual[key], value) or (value.isnan().all() and actual[key].isnan().all())
        assert same, (key, actual[key], value)


def assert_close_gradients(actual, expected, tolerance):
    """Relative error of each tensor; the floor is a thousandth of the largest gradient (BatchNorm cancels some)."""
    assert list(actual) == list(expected)
    norms = {key: 0.0 if value is None else float(value.norm()) for key, value in expected.items()}
    largest = max(norms.values())
    assert largest > 0
    for key, value in expected.items():
        if value is None:
            assert actual[key] is None, key
            continue
        error = float((actual[key] - value).norm()) / (norms[key] + 1e-3 * largest)
        assert error <= tolerance, (key, error)


def assert_close_whole_gradient(actual, expected, tolerance):
    """Relative error of all gradients taken together, for float32, where single tensors carry rounding noise."""
    assert [key for key, value in actual.items() if value is None] == [
        key for key, value in expected.items() if value is None
    ]
    flat = [
        torch.cat([value.double().flatten() for value in each.values() if value is not None])
        for each in (actual, expected)
    ]
    assert float(flat[1].norm()) > 0
    error = float((flat[0] - flat[1]).norm() / flat[1].norm())
    assert error <= tolerance, error
