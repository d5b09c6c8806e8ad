"""MMSegmentation's heads that need mmcv's compiled operators or mmdet, from the configs it ships.

The set-prediction heads do not separate over samples: the oracle is the untouched head's loss on each image alone. The
losses of the others do: a sample's contribution is what the untouched host's loss loses when its labels are ignored
(these configs divide by all pixels, so the normaliser is held by itself).
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmseg")
pytest.importorskip("mmcv._ext", reason="mmdet imports only where mmcv has its compiled operators: make ops")
pytest.importorskip("mmdet")
import mmseg
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from oracle_alone import BATCH, WEIGHTS, AloneHeads, Step, gradients_of, relative_error, seed, small_config, take_step

from infobatch_mm.losses import LossWeigher, attach_views

CONFIGS = Path(mmseg.__file__).parent / ".mim" / "configs"
CLASSES, SIZE, IGNORED = 5, 64, 255
BLANK = 2  # the sample without a label


# ---------------------------------------------------------------- models


@dataclass(frozen=True)
class Case:
    """A shipped config, made small; ``main``: what the keys of the losses that score begin with."""

    config: str
    small: dict = field(default_factory=dict)
    main: str = "decode."


RESNET = {"backbone.depth": 18, "backbone.base_channels": 4}
RESNET_V1C = {**RESNET, "backbone.stem_channels": 4}
DECODER_LAYERS = {
    f"decode_head.transformer_decoder.layer_cfg.{name}": 32
    for name in (
        "self_attn_cfg.embed_dims",
        "cross_attn_cfg.embed_dims",
        "ffn_cfg.embed_dims",
        "ffn_cfg.feedforward_channels",
    )
}
QUERIES = {
    **RESNET,
    **DECODER_LAYERS,
    "decode_head.in_channels": [4, 8, 16, 32],
    "decode_head.feat_channels": 32,
    "decode_head.out_channels": 32,
    "decode_head.num_classes": CLASSES,
    "decode_head.num_queries": 20,
    "decode_head.positional_encoding.num_feats": 16,
    "decode_head.pixel_decoder.norm_cfg.num_groups": 4,
    "decode_head.transformer_decoder.num_layers": 3,
    "decode_head.loss_cls.class_weight": [1.0] * CLASSES + [0.1],
}
MASK2FORMER = {
    **QUERIES,
    "decode_head.pixel_decoder.encoder.num_layers": 1,
    "decode_head.pixel_decoder.encoder.layer_cfg.self_attn_cfg.embed_dims": 32,
    "decode_head.pixel_decoder.encoder.layer_cfg.ffn_cfg.embed_dims": 32,
    "decode_head.pixel_decoder.encoder.layer_cfg.ffn_cfg.feedforward_channels": 32,
    "decode_head.pixel_decoder.positional_encoding.num_feats": 16,
    "decode_head.train_cfg.num_points": 112,
}
SAN = {
    "image_encoder.img_size": (32, 32),
    "image_encoder.embed_dims": 32,
    "image_encoder.num_layers": 3,
    "image_encoder.num_heads": 4,
    "image_encoder.out_indices": (0, 1, 2),
    "text_encoder.dataset_name": None,
    "text_encoder.vocabulary": ["road", "car", "tree", "sky", "wall"],
    "text_encoder.templates": ["a photo of a {}."],
    "text_encoder.embed_dims": 32,
    "text_encoder.output_dims": 32,
    "text_encoder.num_layers": 1,
    "text_encoder.num_heads": 4,
    "decode_head.num_classes": CLASSES,
    "decode_head.deep_supervision_idxs": [3],
    "decode_head.san_cfg.clip_channels": 32,
    "decode_head.san_cfg.embed_dims": 24,
    "decode_head.san_cfg.num_queries": 8,
    "decode_head.san_cfg.cfg_encoder.num_encode_layer": 4,
    "decode_head.san_cfg.cfg_encoder.num_heads": 2,
    "decode_head.san_cfg.cfg_decoder.num_heads": 4,
    "decode_head.san_cfg.cfg_decoder.embed_channels": 16,
    "decode_head.san_cfg.cfg_decoder.mlp_channels": 16,
    "decode_head.maskgen_cfg.sos_token_num": 8,
    "decode_head.maskgen_cfg.num_layers": 1,
    "decode_head.maskgen_cfg.embed_dims": 32,
    "decode_head.maskgen_cfg.num_heads": 4,
    "decode_head.maskgen_cfg.out_dims": 32,
    "decode_head.train_cfg.num_points": 112,
    "decode_head.loss_decode.0.class_weight": [1.0] * CLASSES + [0.1],
}
FCN_AUXILIARY = {
    "decode_head.in_channels": 32,
    "decode_head.channels": 16,
    "decode_head.num_classes": CLASSES,
    "auxiliary_head.in_channels": 16,
    "auxiliary_head.channels": 4,
    "auxiliary_head.num_classes": CLASSES,
}

SETS = {
    "maskformer": Case("maskformer/maskformer_r50-d32_8xb2-160k_ade20k-512x512.py", QUERIES),
    "mask2former": Case("mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py", MASK2FORMER),
    "san": Case("san/san-vit-b16_voc12aug-640x640.py", SAN),
}
PIXELS = {
    "point_rend": Case(
        "point_rend/pointrend_r50_4xb4-160k_ade20k-512x512.py",
        {
            **RESNET_V1C,
            "neck.in_channels": [4, 8, 16, 32],
            "neck.out_channels": 8,
            "decode_head.0.in_channels": [8, 8, 8, 8],
            "decode_head.0.channels": 8,
            "decode_head.0.num_classes": CLASSES,
            "decode_head.1.in_channels": [8],
            "decode_head.1.channels": 8,
            "decode_head.1.num_classes": CLASSES,
            "train_cfg.num_points": 64,
        },
        main="decode_1.",
    ),
    "ccnet": Case("ccnet/ccnet_r50-d8_4xb4-160k_ade20k-512x512.py", {**RESNET_V1C, **FCN_AUXILIARY}),
    "psanet": Case(
        "psanet/psanet_r50-d8_4xb4-160k_ade20k-512x512.py",
        {**RESNET_V1C, **FCN_AUXILIARY, "decode_head.mask_size": (15, 15)},
    ),
}
CASES = {**SETS, **PIXELS}


def build(case):
    config = small_config(CONFIGS / case.config, case.small, import_custom_modules=False)
    with torch.random.fork_rng(), DefaultScope.overwrite_default_scope("mmseg"):
        torch.manual_seed(0)
        model = MODELS.build(config)
        if hasattr(model, "text_encoder"):
            # SAN can only be initialised from a checkpoint: without one it fails, or leaves parameters unset.
            for each in model.parameters():
                if each.dim() > 1:
                    torch.nn.init.xavier_uniform_(each.data)
        else:
            model.init_weights()
    for name, parameter in model.named_parameters():
        if name.endswith("cca.gamma.scale"):
            parameter.data.fill_(0.5)  # criss-cross attention starts switched off
    return model.train()


@pytest.fixture(scope="module")
def models():
    """Each model is built once."""
    built = {}

    def copy_of(case):
        if case.config not in built:
            built[case.config] = build(case)
        return copy.deepcopy(built[case.config])

    return copy_of


# ---------------------------------------------------------------- data and steps


def make_labels():
    """Quarters of an image of different classes, with unlabelled borders; sample BLANK has no label at all."""
    draw = torch.Generator().manual_seed(1)
    labels = torch.randint(0, CLASSES, (BATCH, 2, 2), generator=draw)
    labels = labels.repeat_interleave(SIZE // 2, 1).repeat_interleave(SIZE // 2, 2)
    for i in range(BATCH):
        labels[i, : 4 * i + 2] = IGNORED
    labels[BLANK] = IGNORED
    return labels


def losses_of(model, labels):
    meta = {key: (SIZE, SIZE) for key in ("img_shape", "ori_shape", "pad_shape", "batch_input_shape")}
    samples = [SegDataSample(metainfo=dict(meta), gt_sem_seg=PixelData(data=each[None].clone())) for each in labels]
    inputs = torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    seed(2)
    return model.loss(inputs, samples)


def step(model, weigher=None, weights=None, pruned=False):
    return take_step(model, lambda: losses_of(model, make_labels()), weigher, weights, pruned)


def step_with_us(models, case, weights, pruned):
    model, weigher = models(case), LossWeigher()
    views = attach_views(model, weigher)
    return step(model, weigher, weights.clone(), pruned), views


def total(losses):
    return sum(loss.sum() for key, loss in losses.items() if "loss" in key)


# ---------------------------------------------------------------- tests


# In pruned passes the losses of a set have another form.
@pytest.mark.parametrize("name, pruned", [*((name, False) for name in CASES), *((name, True) for name in PIXELS)])
def test_with_all_weights_1_the_loss_is_the_hosts(models, name, pruned):
    case = CASES[name]
    host = step(models(case))

    ours, _ = step_with_us(models, case, torch.ones(BATCH), pruned)

    assert ours.loss == pytest.approx(host.loss, rel=1e-6)
    assert ours.log == pytest.approx(host.log, rel=1e-6)
    assert relative_error(ours, host) <= 1e-6


@pytest.mark.parametrize("name", SETS)
def test_a_pruned_pass_of_a_set_prediction_optimises_each_samples_own_loss(models, name):
    case = CASES[name]
    host = step(models(case))
    twin = models(case)
    oracle = AloneHeads(twin, {"decode_head": "loss_by_feat"}, WEIGHTS)
    expected = step(twin)

    ours, views = step_with_us(models, case, WEIGHTS, pruned=True)

    assert relative_error(ours, expected) <= 1e-4
    assert ours.log == pytest.approx(host.log, rel=1e-6)
    assert ours.scores.dtype == torch.float32 and not ours.scores.requires_grad
    assert ours.scored.tolist() == [i != BLANK for i in range(BATCH)]
    assert ours.scores[ours.scored].tolist() == pytest.approx(oracle.scores[ours.scored].tolist(), rel=1e-5)
    # Weights matter to this loss: the oracle is not met by chance.
    assert relative_error(ours, host) > 1e-2
    assert len(views.not_separable) == 1


@pytest.mark.parametrize("name", PIXELS)
def test_a_pruned_pass_weighs_each_samples_contribution(models, name):
    case = CASES[name]
    host = step(models(case))
    twin, labels = models(case), make_labels()
    full = losses_of(twin, labels)
    contributions = []
    for i in range(BATCH):
        without = labels.clone()
        without[i] = IGNORED
        contributions.append({key: full[key] - value for key, value in losses_of(twin, without).items()})
    objective = sum(weight * total(each) for weight, each in zip(WEIGHTS.tolist(), contributions, strict=True))
    twin.zero_grad()
    objective.backward()
    expected = Step(float(objective.detach()), {}, gradients_of(twin))

    ours, views = step_with_us(models, case, WEIGHTS, pruned=True)

    assert relative_error(ours, expected) <= 1e-4
    assert ours.log == pytest.approx(host.log, rel=1e-6)
    assert relative_error(ours, host) > 1e-2
    assert views.vectorised and not views.not_separable
    # The score is the mean over the valid pixels, or points, of the main head's loss.
    counted = count_pixels(models(case), labels)
    assert ours.scored.tolist() == [i != BLANK for i in range(BATCH)] == [number > 0 for number, _ in counted]
    for i, (number, of) in enumerate(counted):
        if number:
            main = {key: value for key, value in contributions[i].items() if key.startswith(case.main)}
            assert float(ours.scores[i]) == pytest.approx(float(total(main).detach()) * of / number, rel=1e-4)


def count_pixels(model, labels):
    """Of each sample: labelled pixels that the main head's loss is computed over, and all of the batch."""
    heads = model.decode_head if isinstance(model.decode_head, torch.nn.ModuleList) else [model.decode_head]
    seen = []
    heads[-1].loss_decode.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[1]))
    losses_of(model, labels)
    (targets,) = seen
    return [(int((each != IGNORED).sum()), targets.numel()) for each in targets]


@pytest.mark.parametrize("name", CASES)
def test_restore_gives_the_model_back(models, name):
    case = CASES[name]
    host = step(models(case))

    model = models(case)
    before = {path: list(vars(module)) for path, module in model.named_modules()}
    views = attach_views(model, LossWeigher())
    idle = step(model)
    views.restore()
    assert {path: list(vars(module)) for path, module in model.named_modules()} == before

    model.load_state_dict(models(case).state_dict())
    restored = step(model)
    assert idle.log == host.log and restored.log == host.log
    assert relative_error(restored, host) <= 1e-6
