"""Three kinds of rules, a class each, and the one spelling that users know."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest
from torch import nn

from infobatch_mm.losses import FunctionRule, HeadRule, LossWeigher, ModulesRule, SamplewiseRule, registry
from infobatch_mm.losses.head_rules import HeadInModel
from infobatch_mm.losses.inseparable import InseparableView
from infobatch_mm.losses.separable import SeparableView
from infobatch_mm.losses.views import OrderView, VectorisedView


class Head(nn.Module):
    def loss_by_feat(self, predictions):
        return dict(loss=predictions.mean())


def valid_of(head, arguments):
    return None


def rows_of(head, arguments):
    return {}


def apart(head, predictions):
    return {}


def in_model(valid=None, module_views=lambda default: iter(())):
    return HeadInModel(Head(), "head (Head)", LossWeigher(), True, valid, module_views)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(), SamplewiseRule()),
        (dict(by_modules=True), ModulesRule()),
        (dict(function=apart), FunctionRule(function=apart)),
        (dict(by_modules=True, function=apart), ModulesRule()),
        (
            dict(by_modules=True, method="loss", overrides=("forward",), view=VectorisedView),
            ModulesRule(method="loss", overrides=("forward",), view=VectorisedView),
        ),
        (
            dict(method="loss", overrides=("forward",), function=apart),
            FunctionRule(method="loss", overrides=("forward",), function=apart),
        ),
        (
            dict(method="loss", separable=True, trusted=True, apart=True, reduction="sum", axes={"a": 1}, rows=rows_of),
            SamplewiseRule(
                method="loss", separable=True, trusted=True, apart=True, reduction="sum", axes={"a": 1}, rows=rows_of
            ),
        ),
        (dict(valid=valid_of, overrides=("loss",)), SamplewiseRule(valid=valid_of, overrides=("loss",))),
    ],
    ids=range(8),
)
def test_a_rule_is_of_the_kind_that_its_words_say(options, expected):
    assert HeadRule(**options) == expected and type(HeadRule(**options)) is type(expected)


def test_the_one_spelling_has_a_word_for_each_field_of_the_rules_that_a_user_sets():
    words = set(inspect.signature(HeadRule).parameters) - {"by_modules"}
    named = {field.name for rule in (ModulesRule, SamplewiseRule, FunctionRule) for field in fields(rule)}
    assert words == named - {"default_loss"}


@pytest.mark.parametrize(
    ("rule", "views"),
    [
        (ModulesRule(), [OrderView]),
        (SamplewiseRule(), [InseparableView]),
        (SamplewiseRule(separable=True), [SeparableView]),
        (FunctionRule(function=apart), [VectorisedView]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_rule_makes_the_views_of_its_kind(rule, views):
    assert [type(view) for view in rule.views(in_model())] == views


def test_the_loss_modules_of_a_head_get_the_view_that_its_rule_says_and_else_the_hosts():
    asked = []

    def module_views(default):
        asked.append(default)
        return iter(())

    def factory(module, weigher, scored, title):
        raise AssertionError

    for rule in (ModulesRule(), ModulesRule(default_loss=factory)):
        list(rule.views(in_model(module_views=module_views)))
    assert asked == [None, factory]


def test_a_reduction_is_said_to_the_rule_that_evaluates_sample_by_sample_alone():
    assert SamplewiseRule(trusted=True).with_reduction("sum") == SamplewiseRule(trusted=True, reduction="sum")
    for rule in (ModulesRule(), FunctionRule(function=apart)):
        assert rule.with_reduction("sum") is rule


@pytest.mark.parametrize("make", [HeadRule, SamplewiseRule])
def test_another_reduction_is_refused_with_what_was_given(make):
    with pytest.raises(ValueError, match="reduction='none'"):
        make(reduction="none")


@pytest.mark.parametrize("kind", [dict(by_modules=True), dict(function=apart), dict(separable=True)], ids=range(3))
def test_a_subclass_with_a_method_of_its_own_loses_the_rule(kind, monkeypatch):
    monkeypatch.setattr(registry, "_HEADS", {Head: HeadRule(overrides=("loss",), **kind)})
    assert registry.head_rule(type("Heir", (Head,), {})()) is not None
    assert registry.head_rule(type("Own", (Head,), {"loss": None})()) is None
