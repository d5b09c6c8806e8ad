"""The loss that the log shows in a pruned pass: comparable with the unpruned run's.

A batch of a pruned pass holds more of the harder samples than the data set does, so its plain loss is higher than the
unpruned run's. The mean by weights, sum(w_i l_i) / sum(w_i), makes up for that. Only the value that is shown is divided
by the sum of the weights, never what is optimised: that would be biased.
"""

from __future__ import annotations

import torch
from torch import Tensor


def from_contributions(host_loss: Tensor, weighted: Tensor, weights: Tensor) -> Tensor:
    """What to show for a loss whose contributions by sample are known: ``B * sum(w_i c_i) / sum(w_i)``.

    Args:
        host_loss (Tensor): The host's loss of the batch, sum(c_i), of one element. It is shown, to the bit, where all
            weights are equal.
        weighted (Tensor): sum(w_i c_i), a scalar.
        weights (Tensor): w_i of the rows that stand for samples, shape ``(B,)``, on the losses' device.

    Returns:
        Tensor: Without gradient, of the shape and dtype of ``host_loss``; the host's loss where this is not finite.
    """
    host_loss = host_loss.detach()
    corrected = (weighted.detach() * _scale(weights)).to(host_loss.dtype).view(host_loss.shape)
    return torch.where(_uneven(weights) & corrected.isfinite(), corrected, host_loss)


def from_own_losses(host_loss: Tensor, own: Tensor, weights: Tensor) -> Tensor:
    """What to show for a loss that is known on the batch and on each sample alone.

    The host's loss of the batch is multiplied by the mean of the own losses by weights and divided by their plain mean:
    where the host's loss is the mean of the own ones, this is their mean by weights; elsewhere it keeps the scale of
    the host's. Own losses of both signs may have a mean of about 0: there the difference of the means is added.

    Args:
        host_loss (Tensor): As above.
        own (Tensor): The host's loss on each sample alone, shape ``(B,)``.
        weights (Tensor): As above.

    Returns:
        Tensor: Without gradient, of the shape and dtype of ``host_loss``; the host's loss where a sample's own is not
        finite.
    """
    host_loss, own = host_loss.detach(), own.detach()
    plain, weighted = own.mean(), (own * weights).sum() / weights.sum()
    of_one_sign = ((own >= 0).all() | (own <= 0).all()) & (plain != 0)
    shown = torch.where(of_one_sign, host_loss * (weighted / plain), host_loss + (weighted - plain))
    return torch.where(_uneven(weights) & shown.isfinite(), shown, host_loss).to(host_loss.dtype)


def factors_of_rows(weights: Tensor) -> Tensor:
    """Factors of the losses of the rows, shape ``(B,)``, so that their sum and their mean are comparable."""
    return torch.where(_uneven(weights), weights * _scale(weights), 1.0)


def _scale(weights: Tensor) -> Tensor:
    return len(weights) / weights.sum()


def _uneven(weights: Tensor) -> Tensor:
    """Whether weights differ, a bool: else their sum may be 0, and every mean by weights is the plain one."""
    return (weights != weights[:1]).any()
