"""MMPretrain's self-supervised models: which of their heads and losses are weighed how.

Masked-image models reconstruct each image from a part of it: their losses separate over samples, each a mean
over its own masked patches. Contrastive ones compare the images of a batch with one another and are refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from mmpretrain.models import heads
from mmpretrain.models import losses as host
from torch import Tensor, nn
from torch.nn import functional as F

from ..attach import head_views
from ..elements import samplewise_sum
from ..head_rules import ModulesRule, SamplewiseRule
from ..refusals import cannot_be_weighed
from ..registry import head_rule, register_head_rule, register_loss_factory, view_factory
from ..view import LossView
from ..views import SampleLosses, VectorisedView
from ..weigher import LossWeigher

#: Why a sample's loss is not its own: leaving some samples out changes the loss of the others.
_COUPLED = {
    heads.ContrastiveHead: "it compares each image with other images, of its batch or of a queue",
    heads.MoCoV3Head: "it compares each image with the other images of its batch",
    heads.SwAVHead: "it assigns the images of a batch to prototypes in equal shares",
    heads.LatentCrossCorrelationHead: "its loss is made of correlations over the batch",
}


class TokenView(LossView):
    """Stands in for the ``loss`` of a head that makes one list of the masked tokens of all samples.

    Each token has the weight of its sample, whose score is the mean over its tokens.
    """

    def __init__(self, owner: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(owner, *args, **kwargs)
        self._signature = inspect.signature(self.host)
        self._met = False

    def weighed(self, *args: Any, **kwargs: Any) -> Any:
        mask = self._signature.bind(*args, **kwargs).arguments["mask"]
        counts = mask.flatten(1).bool().sum(1)
        # The first step proves that the loss is of all masked tokens. On a device, adding them up would make the others
        # wait: there are as many as the loss is called with, as the host has listed them already.
        size = None if self._met and counts.device.type != "cpu" else int(counts.sum())
        with self.weigher.in_parts(counts, size):
            result = self.host(*args, **kwargs)
        self._met = True
        return result


class FlippedPairsView(LossView):
    """Stands in for the ``loss`` of MixMIM's head: the first image of a batch was mixed with the last, and so on.

    The loss of each image is its own, but rests on both: it has the weight of the pair.
    """

    def weighed(self, x_rec: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.weigher.pair(torch.arange(self.weigher.batch_size, device=x_rec.device).flip(0))
        return self.host(x_rec, *args, **kwargs)


def _refuse_tokens(module: nn.Module, weigher: LossWeigher, scored: bool, title: str) -> LossView:
    raise cannot_be_weighed(title, "it is called with the masked tokens of all samples, and has no view of its own")


# Their losses all come from one loss module, which is called with (B, ...) predictions and targets.
for _head in (heads.MAEPretrainHead, heads.SimMIMHead, heads.MIMHead, heads.CAEHead, heads.LatentPredictHead):
    register_head_rule(_head, ModulesRule(method="loss"), replace=False)
register_head_rule(heads.SparKPretrainHead, ModulesRule(method="forward"), replace=False)
register_head_rule(heads.MixMIMPretrainHead, ModulesRule(method="loss", view=FlippedPairsView), replace=False)
# The loss module of these heads is called with (tokens, ...) predictions: one evaluated on each sample alone would be
# given the tokens of the wrong samples.
for _head in (heads.BEiTV1Head, heads.BEiTV2Head, heads.iTPNClipHead):
    _rule = ModulesRule(method="loss", view=TokenView, default_loss=_refuse_tokens)
    register_head_rule(_head, _rule, replace=False)


def self_supervised_views(model: nn.Module, weigher: LossWeigher) -> Iterator[LossView]:
    """The views of a self-supervised model's head.

    Args:
        model (nn.Module): A ``BaseSelfSupervisor``.
        weigher (LossWeigher): Weights and scores of the batch.

    Yields:
        LossView: Not attached yet.

    Raises:
        ValueError: If its loss couples the samples of a batch, or if it has no head.
    """
    head, name = model.head, type(model).__name__
    if head is None:
        raise ValueError(f"{name} has no head: nothing to weigh; train it without InfoBatchHook")
    rule = head_rule(head)
    for coupled, why in _COUPLED.items():
        if isinstance(head, coupled) and rule is None:
            raise ValueError(
                f"{name} cannot be pruned ({type(head).__name__}): {why}, so no sample has a loss of its own, and "
                "leaving some out changes that of the others; train it without InfoBatchHook"
            )
    method = "loss" if callable(getattr(type(head), "loss", None)) else "forward"
    # Of a head nobody registered it is not known that it compares no samples.
    yield from head_views("head", head, weigher, scored=True, default=SamplewiseRule(method=method, apart=True))


# ---- losses -----------------------------------------------------------------------------------------


def _masked_mean(elements: Tensor, mask: Tensor | None, divisor: float = 1) -> SampleLosses:
    """The host's mean over what is masked, by sample: the score is the mean over the sample's own mask."""
    if mask is None:
        counts = torch.full((len(elements),), elements.numel() // max(len(elements), 1), device=elements.device)
        return SampleLosses(samplewise_sum(elements), elements.numel(), counts, value=elements.detach().mean())
    masked, total = elements * mask, mask.sum()
    # A mask may be shared by the samples, and by the channels of an image: shapes are lined up at their end.
    shape = (1,) * (elements.dim() - mask.dim()) + mask.shape
    counts = samplewise_sum(mask.view(shape).expand(len(elements), *shape[1:]))
    value = masked.detach().sum() / total / divisor
    return SampleLosses(samplewise_sum(masked) / divisor, total, counts, value=value, mean_over_valid=True)


def _pixels(module: nn.Module, pred: Tensor, target: Tensor, mask: Tensor | None = None) -> SampleLosses:
    elements = module.penalty(pred, target)
    if elements.dim() == 3:
        elements = elements.mean(dim=-1)
    return _masked_mean(elements, mask, module.channel)


def _cosine(module: nn.Module, pred: Tensor, target: Tensor, mask: Tensor | None = None) -> SampleLosses:
    similarity = (F.normalize(pred, dim=-1) * F.normalize(target, dim=-1)).sum(dim=-1)
    return _masked_mean(module.shift_factor - module.scale_factor * similarity, mask)


def _context(
    module: nn.Module, logits: Tensor, target: Tensor, latent_pred: Tensor, latent_target: Tensor
) -> tuple[SampleLosses, SampleLosses]:
    """CAE's: every sample has as many masked tokens."""
    tokens = F.cross_entropy(logits, target, reduction="none").view(len(latent_pred), -1)
    latents = F.mse_loss(latent_pred, latent_target.detach(), reduction="none") * module.lambd
    return _masked_mean(tokens, None), _masked_mean(latents, None)


def _register(loss: type[nn.Module], function: Callable[..., SampleLosses | tuple], trusted: bool = True) -> None:
    view = view_factory(VectorisedView, function=function, trusted=trusted)
    register_loss_factory(loss, replace=False)(view)


_register(host.PixelReconstructionLoss, _pixels)
_register(host.CosineSimilarityLoss, _cosine)
_register(host.CAELoss, _context, trusted=False)
