"""What a user is told about a loss that cannot be weighed."""

from __future__ import annotations

from torch import nn

#: Where users find out what to do about a loss that cannot be weighed.
HOW_TO = "write a view for it (see 'Heads and losses of your own' in docs/losses.md), or train without InfoBatchHook"


def cannot_be_weighed(title: str, why: str) -> ValueError:
    """The refusal of a head or loss: its name, what was found and expected, and what to do."""
    return ValueError(f"{title} cannot be weighed: {why}; {HOW_TO}")


def check_reduction(module: nn.Module, title: str) -> None:
    """Refuse a loss module that is configured to give no scalar."""
    if module.reduction not in ("mean", "sum"):
        raise ValueError(f"{title} has reduction={module.reduction!r}, which gives no scalar: use reduction='mean'")
