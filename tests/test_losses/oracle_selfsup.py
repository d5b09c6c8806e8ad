"""Reference for mmpretrain's self-supervised models, written from the formulas of their papers.

Nothing here imports infobatch_mm. The loss of each masked token of each sample is written down; what the host divides
by is held. An untouched host runs on the same batch with the same random numbers, and what its head is called with is
taken apart here, with its graph.
"""

import copy
import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

pytest.importorskip("mmpretrain")
import mmpretrain.models  # noqa: F401
from mmengine.config import ConfigDict
from mmpretrain.models.selfsup import BaseSelfSupervisor
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from oracle_alone import Step, gradients_of, seed, take_step

BATCH = 4
#: Uneven, with a 0 and a large one.
WEIGHTS = torch.tensor([1.7, 0.0, 0.3, 12.5, 0.6])
CLASSES, DIMS = 11, 8


# ---------------------------------------------------------------- losses, token by token


@dataclass
class Parts:
    """What each sample contributes to the host's loss, and its score; None for one without a masked token."""

    contributions: list
    scores: list
    rows: list | None = None  # how many rows of a list each sample has; None where a sample is a row


def number(value):
    return float(value.detach())


def together(parts, factor=1.0):
    """The sum of several losses, of which the host optimises a multiple."""
    contributions = [factor * sum(each) for each in zip(*(part.contributions for part in parts), strict=True)]
    scores = zip(*(part.scores for part in parts), strict=True)
    return Parts(contributions, [None if None in each else sum(each) for each in scores], parts[0].rows)


def pixels_of(loss, pred, target):
    return (pred - target).abs() if loss["criterion"] == "L1" else (pred - target) ** 2


def cosine_of(loss, pred, target):
    """shift - scale * cos(p, t), along the last axis."""
    products = (pred * target).sum(-1) / (pred.pow(2).sum(-1).sqrt() * target.pow(2).sum(-1).sqrt())
    return loss.get("shift_factor", 0.0) - loss.get("scale_factor", 1.0) * products


def cross_entropy_of(loss, logits, label):
    """Of one token; with smoothed labels every class has a share in the target."""
    smoothing = loss.get("label_smooth_val", 0.0)
    target = torch.full_like(logits, smoothing / len(logits))
    target[label] += 1 - smoothing
    return loss.get("loss_weight", 1.0) * (target * (torch.logsumexp(logits, 0) - logits)).sum()


def token_losses(loss, pred, target):
    """Of one sample's tokens, shape (L,): the mean over a token's values, or its cosine."""
    if loss["type"] == "CosineSimilarityLoss":
        return cosine_of(loss, pred, target)
    return torch.stack([pixels_of(loss, p, t).mean() for p, t in zip(pred, target, strict=True)])


def masked_tokens(loss, pred, target, mask=None):
    """Predictions (B, L, C): the mean over the masked tokens of all samples, or over all tokens."""
    batch = len(pred)
    # The host divides by the channels, which the mean has taken care of already, where a mask is given only.
    divisor = loss.get("channel") or 1
    contributions, scores = [], []
    for i in range(batch):
        each = token_losses(loss, pred[i], target[i])
        if mask is None:
            contributions.append(each.sum() / (batch * len(each)))
            scores.append(number(each.mean()))
            continue
        own = [each[j] for j in range(len(each)) if mask[i % len(mask), j]]  # a single mask is shared
        total = int((mask != 0).sum())
        contributions.append(sum(own, 0.0 * each.sum()) / total / divisor)
        scores.append(number(sum(own)) / len(own) / divisor if own else None)
    return Parts(contributions, scores)


def masked_pixels(loss, pred, target, mask):
    """Predictions (B, C, H, W), masks (B, H, W): the sum over the masked pixels, by their number and the channels."""
    contributions, scores = [], []
    for i in range(len(pred)):
        own = [
            pixels_of(loss, pred[i, :, y, x], target[i, :, y, x]).sum() / (loss.get("channel") or 1)
            for y, x in (mask[i] != 0).nonzero().tolist()
        ]
        contributions.append(sum(own, 0.0 * pred[i].sum()) / int((mask != 0).sum()))
        scores.append(number(sum(own)) / len(own) if own else None)
    return Parts(contributions, scores)


def listed_tokens(loss, samples):
    """One list of all samples' tokens, given as (losses) by sample: the mean over the list."""
    total = sum(len(own) for own in samples)
    contributions = [sum(own) / total if own else torch.zeros(()) for own in samples]
    scores = [number(sum(own)) / len(own) if own else None for own in samples]
    return Parts(contributions, scores, [len(own) for own in samples])


# ---------------------------------------------------------------- heads: (settings, head, what its loss is called with)


def patches_of(image, size):
    """The patches of (C, H, W), row by row, each with its pixels row by row and their channels."""
    _, height, width = image.shape
    return torch.stack(
        [
            image[:, y : y + size, x : x + size].permute(1, 2, 0).flatten()
            for y in range(0, height, size)
            for x in range(0, width, size)
        ]
    )


def normalised(patches):
    """Each by its own mean and unbiased variance."""
    rows = []
    for patch in patches:
        mean = patch.sum() / len(patch)
        variance = ((patch - mean) ** 2).sum() / (len(patch) - 1)
        rows.append((patch - mean) / math.sqrt(float(variance) + 1e-6))
    return torch.stack(rows)


def targets_of(settings, images, norm_pix):
    patches = [patches_of(image, settings["patch_size"]) for image in images]
    return torch.stack([normalised(each) for each in patches] if norm_pix else patches)


def mae(settings, head, pred, images, mask):
    return masked_tokens(settings["loss"], pred, targets_of(settings, images, settings.get("norm_pix", False)), mask)


def spark(settings, head, pred, images, active):
    hidden = torch.stack([each.flatten() == 0 for each in active])
    pred = torch.stack([patches_of(each, settings["patch_size"]) for each in pred])
    return masked_tokens(settings["loss"], pred, targets_of(settings, images, settings.get("norm_pix", True)), hidden)


def mixmim(settings, head, decoded, images, mask):
    """Image i was mixed with image B-1-i; a token that it gave away is decoded with the other's."""
    batch, tokens = len(images), decoded.shape[1]
    pred = [
        torch.stack([decoded[i if mask[0, j] else 2 * batch - 1 - i, j] for j in range(tokens)]) for i in range(batch)
    ]
    targets = targets_of(settings, images, settings.get("norm_pix", False))
    return masked_tokens(settings["loss"], torch.stack(pred), targets)


def mim(settings, head, pred, target, mask=None):
    return masked_tokens(settings["loss"], pred, target, mask)


def simmim(settings, head, pred, images, mask):
    size = settings["patch_size"]
    pixels = torch.zeros(len(images), *images.shape[2:])
    for y in range(images.shape[2]):
        for x in range(images.shape[3]):
            pixels[:, y, x] = mask[:, y // size, x // size]
    return masked_pixels(settings["loss"], pred, images, pixels)


def linear(module, vector):
    return module.weight @ vector + module.bias


def beit_v1(settings, head, feats, target, mask):
    samples = []
    for i in range(len(feats)):
        labels = target[i].flatten(1).argmax(0)
        masked = (mask[i].flatten() != 0).nonzero().flatten().tolist()
        logits = [linear(head.cls_head, feats[i, 1 + j]) for j in masked]
        samples.append(
            [cross_entropy_of(settings["loss"], each, labels[j]) for each, j in zip(logits, masked, strict=True)]
        )
    return listed_tokens(settings["loss"], samples)


def beit_v2(settings, head, feats, feats_cls, target, mask):
    parts = []
    for each in (feats, feats_cls):
        samples = []
        for i in range(len(feats)):
            masked = (mask[i].flatten() != 0).nonzero().flatten().tolist()
            samples.append(
                [cross_entropy_of(settings["loss"], linear(head.cls_head, each[i, j]), target[i, j]) for j in masked]
            )
        parts.append(listed_tokens(settings["loss"], samples))
    return together(parts)


def itpn_clip(settings, head, feats, target, mask):
    samples = []
    for i in range(len(feats)):
        masked = (mask[i].flatten() != 0).nonzero().flatten().tolist()
        pairs = [(linear(head.cls_head, feats[i, j]), target[i, j]) for j in masked]
        samples.append([token_losses(settings["loss"], p[None], t[None])[0] for p, t in pairs])
    return listed_tokens(settings["loss"], samples)


def cae(settings, head, logits, logits_target, latent_pred, latent_target, mask):
    """Cross entropy of the masked tokens, and lambda times the squared error of their latents."""
    rows, samples = iter(logits), []
    for i in range(len(mask)):
        labels = logits_target[i].flatten(1).argmax(0)
        masked = mask[i].nonzero().flatten().tolist()
        samples.append([cross_entropy_of({}, next(rows), labels[j]) for j in masked])
    align = dict(type="PixelReconstructionLoss", criterion="L2")
    latents = masked_tokens(align, latent_pred, latent_target.detach())
    lambd = settings["loss"]["lambd"]
    latents = Parts([lambd * each for each in latents.contributions], [lambd * each for each in latents.scores])
    return together([listed_tokens({}, samples), latents])


def latents(settings, head, online, target):
    """The negative cosine of what is predicted for one view and what the other gives, a mean over samples."""
    each = cosine_of(settings["loss"], head.predictor([online])[0], target.detach())
    return Parts([one / len(each) for one in each], [number(one) for one in each])


FORMULAS = dict(
    MAEPretrainHead=mae,
    SparKPretrainHead=spark,
    MixMIMPretrainHead=mixmim,
    MIMHead=mim,
    SimMIMHead=simmim,
    BEiTV1Head=beit_v1,
    BEiTV2Head=beit_v2,
    iTPNClipHead=itpn_clip,
    CAEHead=cae,
    LatentPredictHead=latents,
)


# ---------------------------------------------------------------- targets that need no download


class TinyClip(nn.Module):
    """Features of CLIP's form, the class token first, and attention."""

    def __init__(self):
        super().__init__()
        self.projection = nn.Conv2d(3, DIMS, 1)

    @torch.no_grad()
    def forward(self, images):
        tokens = self.projection(nn.functional.adaptive_avg_pool2d(images, 4)).flatten(2).transpose(1, 2)
        features = torch.cat([tokens.mean(1, keepdim=True), tokens], 1)
        return features, (features @ features.transpose(1, 2)).softmax(2)


class TinyDalle(nn.Module):
    """Logits of DALL-E's form."""

    def __init__(self):
        super().__init__()
        self.projection = nn.Conv2d(3, CLASSES, 1)

    def forward(self, images):
        return self.projection(nn.functional.adaptive_avg_pool2d(images, 4))


class TinyTokenizer(TinyDalle):
    """Tokens of VQ-KD's form."""

    def forward(self, images):
        return super().forward(images).argmax(1).flatten(1)


for _generator in (TinyClip, TinyDalle, TinyTokenizer):
    MODELS.register_module(module=_generator, force=True)


# ---------------------------------------------------------------- models as small as they can be

L2 = dict(type="PixelReconstructionLoss", criterion="L2")
COSINE = dict(type="CosineSimilarityLoss", shift_factor=2.0, scale_factor=2.0)
CE = dict(type="CrossEntropyLoss")
VIT = dict(embed_dims=24, num_layers=2, num_heads=2, feedforward_channels=32)
HIVIT = dict(embed_dims=32, depths=[1, 1, 1], num_heads=2)
PYRAMID = dict(embed_dims=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2])
DECODER = dict(num_patches=16, decoder_embed_dim=24, decoder_depth=1, decoder_num_heads=2)
WITH_CLS = dict(DECODER, patch_size=8, embed_dim=24)


def pixel_head(size, **options):
    return dict(type="MAEPretrainHead", norm_pix=True, patch_size=size, loss=L2) | options


def vit(type, **options):
    return dict(type=type, arch=VIT, img_size=32, patch_size=8, **options)


def hivit(type, **options):
    return dict(type=type, arch=HIVIT, img_size=64, patch_size=16, out_indices=[0], **options)


def mlp(in_channels, pool, norm="BN1d"):
    return dict(
        type="NonLinearNeck",
        in_channels=in_channels,
        hid_channels=12,
        out_channels=DIMS,
        with_last_bn=False,
        with_avg_pool=pool,
        norm_cfg=dict(type=norm),
    )


MAE = dict(
    type="MAE",
    backbone=vit("MAEViT", mask_ratio=0.75),
    neck=dict(type="MAEPretrainDecoder", **WITH_CLS),
    head=pixel_head(8),
)
BEIT = vit("BEiTPretrainViT", drop_path_rate=0.1, layer_scale_init_value=0.1)
SIAMESE = dict(
    backbone=dict(type="ResNet", depth=18, stem_channels=4, base_channels=4),
    neck=mlp(32, True),
    head=dict(
        type="LatentPredictHead", predictor=mlp(DIMS, False), loss=dict(type="CosineSimilarityLoss", shift_factor=1.0)
    ),
)
ITPN = dict(num_patches=16, patch_size=16, embed_dim=32, decoder_embed_dim=32, fpn_dim=16, fpn_depth=1)
SPARK = dict(
    type="SparK",
    input_size=64,
    enc_dec_norm_cfg=dict(type="SparseSyncBatchNorm2d"),
    enc_dec_norm_dim=64,
    backbone=dict(
        type="SparseResNet", depth=18, stem_channels=8, base_channels=8, out_indices=(0, 1, 2, 3), drop_path_rate=0.05
    ),
    neck=dict(type="SparKLightDecoder", feature_dim=64, upsample_ratio=32),
    head=dict(type="SparKPretrainHead", loss=L2),
)
CONFIGS = {
    "mae": MAE,
    "mae_plain": MAE | dict(head=pixel_head(8, norm_pix=False)),
    "mae_hivit": dict(
        type="MAE",
        backbone=hivit("MAEHiViT", mask_ratio=0.75),
        neck=dict(DECODER, type="MAEPretrainDecoder", patch_size=16, embed_dim=32),
        head=pixel_head(16),
    ),
    "mff": MAE | dict(type="MFF", backbone=vit("MFFViT", out_indices=[0, 1])),
    "simmim": dict(
        type="SimMIM",
        backbone=dict(
            type="SimMIMSwinTransformer",
            arch=PYRAMID,
            img_size=32,
            pad_small_map=True,
            stage_cfgs=dict(block_cfgs=dict(window_size=2)),
        ),
        neck=dict(type="SimMIMLinearDecoder", in_channels=64, encoder_stride=32),
        head=dict(type="SimMIMHead", patch_size=4, loss=dict(L2, criterion="L1", channel=3)),
    ),
    "beit_v1": dict(
        type="BEiT",
        backbone=BEIT,
        neck=None,
        head=dict(type="BEiTV1Head", embed_dims=24, num_embed=CLASSES, loss=CE),
        target_generator=dict(type="TinyDalle"),
    ),
    "beit_v2": dict(
        type="BEiT",
        backbone=dict(BEIT, out_indices=[-2, -1], final_norm=False),
        neck=dict(type="BEiTV2Neck", num_layers=1, early_layers=1, backbone_arch=dict(VIT, depth=2)),
        head=dict(type="BEiTV2Head", embed_dims=24, num_embed=CLASSES, loss=CE),
        target_generator=dict(type="TinyTokenizer"),
    ),
    "maskfeat": dict(
        type="MaskFeat",
        backbone=vit("MaskFeatViT") | dict(img_size=112),
        neck=dict(type="LinearNeck", in_channels=24, out_channels=27, norm_cfg=None),
        head=dict(type="MIMHead", loss=L2),
        target_generator=dict(type="HOGGenerator", nbins=9, pool=8, gaussian_window=16),
    ),
    "milan": dict(
        type="MILAN",
        backbone=vit("MILANViT", mask_ratio=0.75),
        neck=dict(type="MILANPretrainDecoder", predict_feature_dim=DIMS, **WITH_CLS),
        head=dict(type="MIMHead", loss=COSINE),
        target_generator=dict(type="TinyClip"),
    ),
    "eva": dict(
        type="EVA",
        backbone=vit("MAEViT", mask_ratio=0.75),
        neck=dict(type="MAEPretrainDecoder", predict_feature_dim=DIMS, **WITH_CLS),
        head=dict(type="MIMHead", loss=COSINE),
        target_generator=dict(type="TinyClip"),
    ),
    "cae": dict(
        type="CAE",
        backbone=vit("CAEPretrainViT", layer_scale_init_value=0.1),
        neck=dict(
            type="CAENeck",
            num_classes=CLASSES,
            embed_dims=24,
            num_heads=2,
            regressor_depth=1,
            decoder_depth=1,
            layer_scale_init_value=0.1,
            mask_tokens_num=6,
        ),
        head=dict(type="CAEHead", loss=dict(type="CAELoss", lambd=2)),
        target_generator=dict(type="TinyDalle"),
    ),
    "mixmim": dict(
        type="MixMIM",
        backbone=dict(
            type="MixMIMPretrainTransformer", arch=PYRAMID, img_size=64, window_size=[2, 2, 2, 2], drop_rate=0.1
        ),
        neck=dict(DECODER, type="MixMIMPretrainDecoder", num_patches=4, encoder_stride=32, embed_dim=64),
        # The model adds the patch size itself.
        head=dict(type="MixMIMPretrainHead", norm_pix=True, loss=L2),
    ),
    "spark": SPARK,
    "spark_convnext": SPARK
    | dict(
        enc_dec_norm_cfg=dict(type="SparseLN2d", eps=1e-6),
        backbone=dict(
            type="SparseConvNeXt",
            arch=dict(depths=[1, 1, 1, 1], channels=[8, 16, 32, 64]),
            out_indices=(0, 1, 2, 3),
            gap_before_output=False,
            drop_path_rate=0.2,
        ),
    ),
    "itpn_pixel": dict(
        type="iTPN",
        backbone=hivit("iTPNHiViT", reconstruction_type="pixel"),
        neck=dict(ITPN, type="iTPNPretrainDecoder", decoder_depth=1, decoder_num_heads=2, reconstruction_type="pixel"),
        head=pixel_head(16),
    ),
    "itpn_clip": dict(
        type="iTPN",
        backbone=hivit("iTPNHiViT", reconstruction_type="clip", rpe=True, layer_scale_init_value=0.1),
        neck=dict(ITPN, type="iTPNPretrainDecoder", reconstruction_type="clip"),
        head=dict(type="iTPNClipHead", embed_dims=32, num_embed=DIMS, loss=dict(type="CosineSimilarityLoss")),
        target_generator=dict(type="TinyClip"),
    ),
    "byol": SIAMESE | dict(type="BYOL"),
    "simsiam": SIAMESE | dict(type="SimSiam"),
}
#: Side of the images, and of the mask in the data samples.
SIZES = dict.fromkeys(("mae_hivit", "mixmim", "spark", "spark_convnext", "itpn_pixel", "itpn_clip"), 64) | dict(
    maskfeat=112
)
MASKS = dict(simmim=8, beit_v1=4, beit_v2=4, maskfeat=14, cae=4, itpn_clip=4)
#: Models that are given two views of each image.
TWO_VIEWS = ("beit_v1", "beit_v2", "cae", "itpn_clip", "byol", "simsiam")
#: What the host multiplies the sum of its losses by.
FACTORS = dict(byol=2.0, simsiam=0.5)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def build(config, dtype=torch.float32, draws=0):
    with torch.random.fork_rng():
        torch.manual_seed(draws)
        model = MODELS.build(ConfigDict(copy.deepcopy(config), _scope_="mmpretrain"))
        for parameter in model.parameters():
            if not parameter.any():  # tokens and positions that init_weights would fill, with pages of log
                nn.init.normal_(parameter, std=0.1)
    return model.to(dtype).train()


class Predictions(BaseSelfSupervisor):
    """A head alone: what it is given for predictions are parameters."""

    def __init__(self, head, arguments, predicted, data_preprocessor=None):
        super().__init__(backbone=nn.Identity(), head=copy.deepcopy(head))
        self.arguments = arguments
        self.predicted = nn.ParameterDict({f"argument{i}": arguments[i] for i in predicted})

    def given(self):
        return [self.predicted.get(f"argument{i}", each) for i, each in enumerate(self.arguments)]

    def loss(self, inputs=None, data_samples=None):
        method = self.head.loss if callable(getattr(type(self.head), "loss", None)) else self.head
        result = method(*self.given())
        if isinstance(result, tuple):
            return {f"loss_{i}": each for i, each in enumerate(result)}
        return dict(loss=result)


# ---------------------------------------------------------------- cases


@dataclass
class Model:
    """A whole model and a batch of data for it."""

    name: str
    options: dict = field(default_factory=dict)

    @property
    def config(self):
        return CONFIGS[self.name] | self.options

    @property
    def head(self):
        """The head's settings, with what the model adds or the class has for default."""
        added = dict(patch_size=32) if self.name in ("mixmim", "spark", "spark_convnext") else {}
        return self.config["head"] | added

    @property
    def paired(self):
        """Whether images are seen in pairs."""
        return self.name == "mixmim"

    @property
    def factor(self):
        return FACTORS.get(self.name, 1.0)

    def build(self, dtype=torch.float32):
        return build(self.config, dtype)

    def inputs(self, batch=BATCH):
        size = SIZES.get(self.name, 32)
        views = [torch.randn(batch, 3, size, size, generator=generator(i)) for i in (1, 2)]
        return views if self.name in TWO_VIEWS else views[0]

    def samples(self, batch=BATCH):
        side, samples = MASKS.get(self.name), []
        for i in range(batch):
            sample = DataSample()
            if side is not None:
                masked = 6 if self.name == "cae" else (i % 4) * side * side // 5 + 2
                mask = torch.zeros(side * side, dtype=torch.int64)
                mask[torch.randperm(side * side, generator=generator(i))[:masked]] = 1
                sample.set_field(mask.view(side, side), "mask")
            samples.append(sample)
        return samples

    def losses(self, model, batch=BATCH):
        """Called several times: from the same random numbers each time."""
        seed(3)
        return model(self.inputs(batch), self.samples(batch), mode="loss")


@dataclass
class Head:
    """A head alone, what makes the arguments of its loss, and which of them are predictions."""

    config: dict
    make: object
    predicted: tuple = (0,)
    paired = False
    factor = 1.0

    @property
    def head(self):
        return self.config

    def build(self, dtype=torch.float32):
        arguments = [
            each.to(dtype) if isinstance(each, torch.Tensor) and each.is_floating_point() else each
            for each in self.make()
        ]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            head = dict(self.config, _scope_="mmpretrain")
            return Predictions(head, arguments, self.predicted).to(dtype).train()

    def losses(self, model, batch=BATCH):
        return model.loss()


# ---------------------------------------------------------------- steps of an untouched host


def calls_of(head):
    """What a head's loss is called with from now on."""
    method = "loss" if callable(getattr(type(head), "loss", None)) else "forward"
    host, calls = getattr(head, method), []

    def recorded(*args):
        calls.append(args)
        return host(*args)

    setattr(head, method, recorded)
    return calls


def total(model, losses):
    return model.parse_losses(losses)[0]


def parts_of(case, model, batch=BATCH):
    """The parts of one forward pass of an untouched host, which add up to its loss."""
    calls = calls_of(model.head)
    loss = total(model, case.losses(model, batch))
    formula = FORMULAS[case.head["type"]]
    parts = together([formula(case.head, model.head, *args) for args in calls], case.factor)
    summed = sum(each.detach().double() for each in parts.contributions)
    torch.testing.assert_close(summed, loss.detach().double(), rtol=1e-5, atol=1e-6)
    return parts


def oracle_step(case, weights, dtype=torch.float32, batch=BATCH):
    """Objective, gradients and scores of an untouched host that trains on sum(weight_i * c_i)."""
    model = case.build(dtype)
    parts = parts_of(case, model, batch)
    # A score has no factor of the model's.
    objective = sum(weight * each for weight, each in zip(weights.double().tolist(), parts.contributions, strict=True))
    model.zero_grad()
    objective.backward()
    return Step(number(objective), dict(shown=shown_mean(parts, weights)), gradients_of(model), parts.scores)


def shown_mean(parts, weights):
    """What a pruned pass shows: by the weights of the rows, times their number; the host's where all are equal."""
    rows, weights = parts.rows or [1] * len(parts.scores), weights.double().tolist()
    if len({weight for weight, count in zip(weights, rows, strict=True) if count}) == 1:
        return sum(number(each) for each in parts.contributions)
    objective = sum(weight * number(each) for weight, each in zip(weights, parts.contributions, strict=True))
    return sum(rows) * objective / sum(weight * count for weight, count in zip(weights, rows, strict=True))


def step(case, model, weigher=None, weights=None, pruned=False, batch=BATCH):
    return take_step(model, lambda: case.losses(model, batch), weigher, weights, pruned)


def relative_to(step, expected):
    """The largest relative error of a step's scores; those without one have to be the same samples."""
    assert step.scores.dtype == torch.float32 and not step.scores.requires_grad
    assert step.scored.tolist() == [each is not None for each in expected]
    pairs = [(a, b) for a, b in zip(step.scores.tolist(), expected, strict=True) if b is not None]
    return max((abs(a - b) / max(abs(b), 1e-2) for a, b in pairs), default=0.0)
