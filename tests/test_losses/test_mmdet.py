"""MMDetection's heads, from the configs it ships: gradients, logs and scores against losses on each image alone.

The oracle shares no code with the package: a twin of the untouched model, whose heads evaluate their own losses on
slices of their predictions written down here, argument by argument.
"""

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmengine")
pytest.importorskip("mmcv._ext", reason="mmdet imports only where mmcv has its compiled operators: make ops")
mmdet = pytest.importorskip("mmdet")
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData
from oracle_alone import BATCH, WEIGHTS, AloneHeads, relative_error, seed, small_config, take_step

from infobatch_mm.losses import LossWeigher, attach_views

CONFIGS = Path(mmdet.__file__).parent / ".mim" / "configs"
CLASSES = 5
BOXES = (1, 3, 0, 2)


# ---------------------------------------------------------------- models


@dataclass(frozen=True)
class Case:
    """A shipped config, made small.

    ``heads``: path of each head that computes losses -> its method. ``boxes``: in each image.
    """

    config: str
    heads: dict[str, str]
    small: dict = field(default_factory=dict)
    size: int = 64
    boxes: tuple = BOXES
    masks: bool = False


DENSE = {"bbox_head": "loss_by_feat"}
RESNET = {"backbone.depth": 18, "backbone.base_channels": 4}
ANCHORS = {
    **RESNET,
    "neck.in_channels": [4, 8, 16, 32],
    "neck.out_channels": 8,
    "bbox_head.num_classes": CLASSES,
    "bbox_head.in_channels": 8,
    "bbox_head.feat_channels": 8,
    "bbox_head.stacked_convs": 1,
}
RCNN = {
    **RESNET,
    "neck.in_channels": [4, 8, 16, 32],
    "neck.out_channels": 8,
    "rpn_head.in_channels": 8,
    "rpn_head.feat_channels": 8,
    "roi_head.bbox_roi_extractor.out_channels": 8,
    "train_cfg.rpn_proposal.nms_pre": 50,
    "train_cfg.rpn_proposal.max_per_img": 30,
}
SHARED_2FC = {
    "roi_head.bbox_head.in_channels": 8,
    "roi_head.bbox_head.fc_out_channels": 16,
    "roi_head.bbox_head.num_classes": CLASSES,
    "train_cfg.rcnn.sampler.num": 16,
}
MASK_HEAD = {
    "roi_head.mask_roi_extractor.out_channels": 8,
    "roi_head.mask_head.in_channels": 8,
    "roi_head.mask_head.conv_out_channels": 8,
    "roi_head.mask_head.num_convs": 1,
    "roi_head.mask_head.num_classes": CLASSES,
}
CASCADE = {
    f"{key}.{stage}.{name}": value
    for stage in range(3)
    for key, name, value in (
        ("roi_head.bbox_head", "in_channels", 8),
        ("roi_head.bbox_head", "fc_out_channels", 16),
        ("roi_head.bbox_head", "num_classes", CLASSES),
        ("train_cfg.rcnn", "sampler.num", 16),
    )
}


def attention(dims=32):
    layers = {
        f"{part}.layer_cfg.{each}.embed_dims": dims
        for part, each in (
            ("encoder", "self_attn_cfg"),
            ("encoder", "ffn_cfg"),
            ("decoder", "self_attn_cfg"),
            ("decoder", "cross_attn_cfg"),
            ("decoder", "ffn_cfg"),
        )
    }
    return {
        **RESNET,
        **layers,
        "num_queries": 20,
        "encoder.num_layers": 1,
        "decoder.num_layers": 2,
        "encoder.layer_cfg.ffn_cfg.feedforward_channels": 32,
        "decoder.layer_cfg.ffn_cfg.feedforward_channels": 32,
        "positional_encoding.num_feats": dims // 2,
        "neck.out_channels": dims,
        "bbox_head.num_classes": CLASSES,
        "bbox_head.embed_dims": dims,
    }


def deformable(dims=32):
    return {
        **attention(dims),
        "neck.in_channels": [8, 16, 32],
        "neck.norm_cfg.num_groups": 4,
    }


RTMDET = {
    "backbone.widen_factor": 0.0625,
    "backbone.deepen_factor": 0.1,
    "neck.in_channels": [16, 32, 64],
    "neck.out_channels": 16,
    "neck.num_csp_blocks": 1,
    "bbox_head.num_classes": CLASSES,
    "bbox_head.in_channels": 16,
    "bbox_head.feat_channels": 16,
}
MASK2FORMER = {
    **RESNET,
    "panoptic_head.in_channels": [4, 8, 16, 32],
    "panoptic_head.feat_channels": 32,
    "panoptic_head.out_channels": 32,
    "panoptic_head.num_things_classes": CLASSES,
    "panoptic_fusion_head.num_things_classes": CLASSES,
    "panoptic_head.num_queries": 20,
    "panoptic_head.loss_cls.class_weight": [1.0] * CLASSES + [0.1],
    "panoptic_head.pixel_decoder.norm_cfg.num_groups": 4,
    "panoptic_head.pixel_decoder.encoder.num_layers": 1,
    "panoptic_head.pixel_decoder.encoder.layer_cfg.self_attn_cfg.embed_dims": 32,
    "panoptic_head.pixel_decoder.encoder.layer_cfg.ffn_cfg.embed_dims": 32,
    "panoptic_head.pixel_decoder.encoder.layer_cfg.ffn_cfg.feedforward_channels": 32,
    "panoptic_head.pixel_decoder.positional_encoding.num_feats": 16,
    "panoptic_head.positional_encoding.num_feats": 16,
    "panoptic_head.transformer_decoder.num_layers": 3,
    "panoptic_head.transformer_decoder.layer_cfg.self_attn_cfg.embed_dims": 32,
    "panoptic_head.transformer_decoder.layer_cfg.cross_attn_cfg.embed_dims": 32,
    "panoptic_head.transformer_decoder.layer_cfg.ffn_cfg.embed_dims": 32,
    "panoptic_head.transformer_decoder.layer_cfg.ffn_cfg.feedforward_channels": 32,
    "train_cfg.num_points": 112,
}
TWO_STAGE = {"rpn_head": "loss_by_feat", "roi_head.bbox_head": "loss_and_target"}

CASES = {
    "retinanet": Case("retinanet/retinanet_r50_fpn_1x_coco.py", DENSE, ANCHORS),
    "fcos": Case(
        "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py",
        DENSE,
        {**ANCHORS, "bbox_head.norm_cfg": dict(type="GN", num_groups=4)},
    ),
    "faster_rcnn": Case("faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", TWO_STAGE, {**RCNN, **SHARED_2FC}),
    "mask_rcnn": Case(
        "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
        {**TWO_STAGE, "roi_head.mask_head": "loss_and_target"},
        {**RCNN, **SHARED_2FC, **MASK_HEAD},
        masks=True,
    ),
    "cascade_rcnn": Case(
        "cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py",
        {"rpn_head": "loss_by_feat", **{f"roi_head.bbox_head.{i}": "loss_and_target" for i in range(3)}},
        {**RCNN, **CASCADE},
    ),
    "detr": Case(
        "detr/detr_r50_8xb2-150e_coco.py",
        DENSE,
        {**attention(), "neck.in_channels": [32]},
    ),
    "deformable_detr": Case("deformable_detr/deformable-detr_r50_16xb2-50e_coco.py", DENSE, deformable()),
    "deformable_detr_two_stage": Case(
        "deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco.py", DENSE, deformable(256)
    ),
    "dino": Case(
        "dino/dino-4scale_r50_8xb2-12e_coco.py", DENSE, {**deformable(), "dn_cfg.group_cfg.num_dn_queries": 20}
    ),
    "rtmdet": Case("rtmdet/rtmdet_l_8xb32-300e_coco.py", DENSE, RTMDET),
    "rtmdet_ins": Case("rtmdet/rtmdet-ins_l_8xb32-300e_coco.py", DENSE, RTMDET, masks=True),
    "mask2former": Case(
        "mask2former/mask2former_r50_8xb2-lsj-50e_coco.py",
        {"panoptic_head": "loss_by_feat"},
        MASK2FORMER,
        masks=True,
    ),
}

SPARSE = Case(
    "sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py",
    {},
    {"backbone.depth": 18, "neck.in_channels": [64, 128, 256, 512], "rpn_head.num_proposals": 10},
)


def build(case):
    with torch.random.fork_rng(), DefaultScope.overwrite_default_scope("mmdet"):
        torch.manual_seed(0)
        model = MODELS.build(small_config(CONFIGS / case.config, case.small))
        model.init_weights()  # DETRs have parameters that nothing else initialises
        return model.train()


@pytest.fixture(scope="module")
def models():
    """Each model is built once."""
    built = {}

    def copy_of(case):
        key = case.config, repr(case.small)
        if key not in built:
            built[key] = build(case)
        return copy.deepcopy(built[key])

    return copy_of


# ---------------------------------------------------------------- data and steps


def make_samples(case):
    """Images with ``case.boxes`` boxes; the masks are ellipses in them."""
    draw, size, samples = np.random.default_rng(0), case.size, []
    meta = {key: (size, size) for key in ("img_shape", "ori_shape", "pad_shape", "batch_input_shape")}
    y, x = np.mgrid[:size, :size]
    for number in case.boxes:
        corner, extent = draw.uniform(0, 0.4 * size, (number, 2)), draw.uniform(0.25 * size, 0.6 * size, (number, 2))
        boxes = np.concatenate([corner, corner + extent], 1)
        truth = InstanceData(
            bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            labels=torch.tensor(draw.integers(0, CLASSES, number)),
        )
        if case.masks:
            centre, half = corner + extent / 2, extent / 2
            masks = [
                ((x - c[0]) / h[0]) ** 2 + ((y - c[1]) / h[1]) ** 2 <= 1 for c, h in zip(centre, half, strict=True)
            ]
            truth.masks = BitmapMasks(np.array(masks, np.uint8).reshape(-1, size, size), size, size)
        sample = DetDataSample(metainfo=dict(meta, scale_factor=(1.0, 1.0)), gt_instances=truth)
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
        samples.append(sample)
    return samples


def step(model, case, weigher=None, weights=None, pruned=False):
    def losses():
        inputs = torch.randn(len(case.boxes), 3, case.size, case.size, generator=torch.Generator().manual_seed(1))
        samples = make_samples(case)
        seed(2)
        return model.loss(inputs, samples)

    return take_step(model, losses, weigher, weights, pruned)


# ---------------------------------------------------------------- tests


@pytest.mark.parametrize("name", CASES)
def test_a_full_pass_is_the_hosts(models, name):
    case = CASES[name]
    host = step(models(case), case)

    model, weigher = models(case), LossWeigher()
    attach_views(model, weigher)
    ours = step(model, case, weigher, torch.ones(BATCH), pruned=False)

    assert ours.loss == pytest.approx(host.loss, rel=1e-6)
    assert ours.log == pytest.approx(host.log, rel=1e-6)
    assert relative_error(ours, host) <= 1e-6


def assert_pruned_pass_is_the_oracles(models, case, weights):
    host = step(models(case), case)
    twin = models(case)
    oracle = AloneHeads(twin, case.heads, weights)
    expected = step(twin, case)

    model, weigher = models(case), LossWeigher()
    views = attach_views(model, weigher)
    ours = step(model, case, weigher, weights.clone(), pruned=True)

    assert relative_error(ours, expected) <= 1e-4
    assert ours.log == pytest.approx(host.log, rel=1e-6)
    assert ours.loss == pytest.approx(host.loss, rel=1e-6)
    assert ours.scores.dtype == torch.float32 and not ours.scores.requires_grad
    # An image without boxes has no loss to be ranked by.
    assert ours.scored.tolist() == [boxes > 0 for boxes in case.boxes]
    assert ours.scores[ours.scored].tolist() == pytest.approx(oracle.scores[ours.scored].tolist(), rel=1e-5)
    assert len(views.not_separable) == len(case.heads)
    return host, ours


@pytest.mark.parametrize("name", CASES)
def test_a_pruned_pass_optimises_each_images_own_loss(models, name):
    host, ours = assert_pruned_pass_is_the_oracles(models, CASES[name], WEIGHTS)
    # Weights matter to this loss: the oracle is not met by chance.
    assert relative_error(ours, host) > 1e-2


# One image; as many images as decoder layers, or as parts of a mask's size; as many as levels; no box at all.
@pytest.mark.parametrize("boxes", [(2,), (0, 2), (1, 0, 2, 1, 3), (0, 0)], ids=str)
@pytest.mark.parametrize("name", ["retinanet", "detr", "mask_rcnn", "mask2former"])
def test_batches_of_other_sizes(models, name, boxes):
    weights = torch.tensor([0.3, 2.0, 1.5, 0.0, 0.7])[: len(boxes)]
    assert_pruned_pass_is_the_oracles(models, replace(CASES[name], boxes=boxes), weights)


@pytest.mark.parametrize("boxes", [(1, 2), BOXES], ids=str)
def test_settings_of_a_head_are_not_taken_apart(models, boxes):
    case = CASES["mask_rcnn"]
    case = replace(case, boxes=boxes, small={**case.small, "train_cfg.rcnn.mask_size": (28, 28)})
    assert_pruned_pass_is_the_oracles(models, case, WEIGHTS[: len(boxes)])


@pytest.mark.parametrize("name", CASES)
def test_restore_gives_the_model_back(models, name):
    case = CASES[name]
    host = step(models(case), case)

    model = models(case)
    before = {path: list(vars(module)) for path, module in model.named_modules()}
    weigher = LossWeigher()
    views = attach_views(model, weigher)
    # Outside a batch views hand everything through.
    idle = step(model, case)
    views.restore()
    assert {path: list(vars(module)) for path, module in model.named_modules()} == before

    model.load_state_dict(models(case).state_dict())
    restored = step(model, case)
    assert idle.log == host.log and restored.log == host.log
    assert relative_error(restored, host) <= 1e-6


@pytest.mark.parametrize(
    "config, named",
    [
        ("condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py", "CondInst"),
        ("yolact/yolact_r50_1xb8-55e_coco.py", "YOLACT"),
    ],
)
def test_a_mask_head_that_trains_on_what_its_bbox_head_remembers_is_refused(config, named):
    model = build(Case(config, {}, {"backbone.depth": 18, "neck.in_channels": [64, 128, 256, 512]}))
    before = [list(vars(module)) for module in model.modules()]
    with pytest.raises(ValueError, match=f"^{named} cannot be weighed: .*docs/losses.md"):
        attach_views(model, LossWeigher())
    assert [list(vars(module)) for module in model.modules()] == before


def test_an_image_without_boxes_cannot_explode_a_pruned_pass(models):
    """Sparse R-CNN divides by an epsilon where there is no positive."""
    model, weigher = models(SPARSE), LossWeigher()
    host = step(model, SPARSE)
    attach_views(model, weigher)
    ours = step(model, SPARSE, weigher, torch.ones(BATCH), pruned=True)
    assert ours.scored.tolist() == [boxes > 0 for boxes in SPARSE.boxes]
    norms = [
        sum(float(each.square().sum()) for each in of.gradients.values() if each is not None) ** 0.5
        for of in (ours, host)
    ]
    assert norms[0] < 100 * norms[1]
