"""The cards of the policies in the documentation, held against the policies."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from infobatch_mm.core import AnnealedPolicy
from infobatch_mm.core.policy_registry import registered

CARDS = Path(__file__).parents[2] / "docs/policies.md"
OURS = {name: each for name, each in sorted(registered().items()) if each.__module__.startswith("infobatch_mm.")}


def cards() -> dict[str, str]:
    """The text of each card by its policy's name, in their order."""
    parts = re.split(r"^## `(\w+)`$", CARDS.read_text().split("## Scores")[0], flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_policy_has_a_card_and_a_row() -> None:
    assert sorted(cards()) == list(OURS)
    rows = re.findall(r"^\| \[`(\w+)`\]\(#(\w+)\)", CARDS.read_text(), flags=re.M)
    assert sorted(rows) == [(name, name) for name in OURS]


@pytest.mark.parametrize("name", list(OURS))
def test_a_card_has_all_arguments_with_their_defaults(name: str) -> None:
    shown = eval(cards()[name].split("```python\n")[1].split("```")[0])
    shared = set(inspect.signature(AnnealedPolicy).parameters) - {"prune_ratio", "delta"}
    expected: dict[str, Any] = {"type": name}
    for key, each in inspect.signature(OURS[name]).parameters.items():
        if key not in shared and each.kind is not each.VAR_KEYWORD:
            expected[key] = shown.get(key) if each.default is each.empty else each.default
    if OURS[name].__init__ is AnnealedPolicy.__init__:
        expected |= {"prune_ratio": 0.5, "delta": 0.875}
    assert shown == expected


@pytest.mark.parametrize("name", list(OURS))
def test_a_card_says_whether_it_is_unbiased_and_what_it_goes_by(name: str) -> None:
    card, policy = " ".join(cards()[name].split()), OURS[name]
    row = next(line for line in CARDS.read_text().splitlines() if line.startswith(f"| [`{name}`]"))
    says_no = row.split("|")[4].strip().startswith("no")
    assert says_no == (policy.unbiased is not True)  # a property where it depends on an argument
    assert ("not unbiased" in card.lower()) == says_no
    assert policy.score is None or f'"{policy.score}"' in card
    assert all(word in card for word in ("Rule:", "Weights:", "Cost per pass:", "Use"))
