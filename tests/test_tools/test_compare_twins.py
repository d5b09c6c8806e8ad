"""What is a pair: twins that differ in the hook and in nothing else, and arms in words that mean one thing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

for needed in ("mmengine", "matplotlib", "rich", "scipy"):
    pytest.importorskip(needed)

from mmengine.config import Config

from infobatch_mm.cli.comparison.configs import untwinned
from infobatch_mm.cli.comparison.settings import as_plain
from infobatch_mm.cli.comparison.specs import check_spec, parse_spec, parse_specs

from .comparing import Trainings, compare, config

HOOK = dict(type="InfoBatchHook", prune_ratio=0.5)


pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


def leave(name: str, **changes: Any) -> str:
    config(Path(), **changes).dump(name)
    return name


# ---- twins -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.py", "b.py"], "a.py has an InfoBatchHook already: give the unpruned config first"),
        (["full.py", "longer.py"], "max_epochs: 4 in full.py, 40 in longer.py"),
        (["full.py", "steps.py"], "max_iters: None in full.py, 52 in steps.py"),
    ],
)
def test_what_is_no_pair_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], names: list[str], message: str
) -> None:
    trainings = Trainings(monkeypatch)
    leave("full.py", custom_hooks=[])
    leave("a.py", custom_hooks=[HOOK])
    leave("b.py", custom_hooks=[dict(HOOK, policy="variance")])
    leave("longer.py", custom_hooks=[HOOK], train_cfg=dict(by_epoch=True, max_epochs=40))
    leave("steps.py", custom_hooks=[HOOK], train_cfg=dict(max_iters=52))
    with pytest.raises(SystemExit):
        compare(*names)
    assert message in capsys.readouterr().err
    assert trainings.calls == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(load_from="pre.pth"), "load_from"),
        (dict(resume=True), "resume"),
        (dict(custom_hooks=[HOOK, dict(type="EMAHook")]), "custom_hooks (EMAHook)"),
        (dict(custom_hooks=[HOOK, dict(type="SyncBuffersHook", each=2)]), "custom_hooks (SyncBuffersHook)"),
    ],
    ids=["start", "resume", "another hook", "a hook's settings"],
)
def test_other_starts_and_hooks_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], named: str
) -> None:
    Trainings(monkeypatch)
    beside = [dict(type="SyncBuffersHook", each=1)] if "each" in str(changes) else []
    full = leave("full.py", custom_hooks=beside)
    compare(full, leave("pruned.py", **{"custom_hooks": [HOOK, *beside], **changes}))
    assert f"is no twin of full.py: they differ in {named} beside" in capsys.readouterr().err


def test_samplers_and_absent_settings_of_twins() -> None:
    def cfg(**changes: Any) -> Config:
        return Config({"train_dataloader": dict(batch_size=8), "train_cfg": dict(max_epochs=4), **changes})

    def sampled(kind: str) -> Config:
        return cfg(train_dataloader=dict(batch_size=8, sampler=dict(type=kind)))

    assert untwinned(sampled("DefaultSampler"), sampled("ClassAwareSampler")) == ["train_dataloader"]
    assert untwinned(sampled("DefaultSampler"), sampled("InfoBatchSampler")) == []
    assert untwinned(cfg(), cfg(load_from=None, resume=False, custom_hooks=[HOOK])) == []
    assert untwinned(cfg(custom_hooks=[dict(type="EMAHook")]), cfg(custom_hooks=[HOOK])) == ["custom_hooks (EMAHook)"]


# ---- settings of arms that are done ------------------------------------------------------------------------------


class Opaque:
    """An instance that says nothing of itself."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner


def test_settings_differ_where_their_instances_do() -> None:
    assert as_plain({"a": Opaque(1)}) == as_plain({"a": Opaque(1)}) != as_plain({"a": Opaque(2)})
    assert as_plain({"a": Opaque(Opaque(1))}) != as_plain({"a": Opaque(Opaque(2))})
    assert as_plain({("a", 1): (1, 2), 3: {4}}) == {"('a', 1)": [1, 2], "3": [4]}
    assert as_plain({"f": as_plain, "c": Opaque, "e": float("inf")}) == {"f": "as_plain", "c": "Opaque", "e": "inf"}
    assert "0x" not in str(as_plain({"f": [object(), Opaque(print), memoryview(b"")]}))
    around = Opaque(None)
    around.inner = around
    assert as_plain({"a": around})["a"]["inner"] == "..."


# ---- arms in words -----------------------------------------------------------------------------------------------


def test_words_that_say_nothing_or_the_same_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing after the colon"):
        parse_spec("variance:")
    with pytest.raises(ValueError, match="norm='true': use 'recalibrate'"):
        check_spec(parse_spec("infobatch:norm=true"))
    assert [spec.text for spec in parse_specs(["variance", "variance:prune_ratio=0.4"])][
        1
    ] == "variance:prune_ratio=0.4"
    with pytest.raises(ValueError, match="are the same arm"):
        parse_specs(["variance:prune_ratio=0.4,delta=1", "variance:delta=1,prune_ratio=.4"])


def test_the_direction_of_a_metric_can_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    Trainings(monkeypatch)
    pair = [leave("full.py", custom_hooks=[]), leave("pruned.py", custom_hooks=[HOOK])]
    assert compare(*pair)["lower_is_better"] is False
    assert compare(*pair, "--lower-is-better")["lower_is_better"] is True
    assert compare(*pair, "--higher-is-better")["lower_is_better"] is False
    monkeypatch.setattr("infobatch_mm.cli.comparison.results.is_loss", lambda metric: True)
    assert compare(*pair)["lower_is_better"] is True
    assert compare(*pair, "--higher-is-better")["lower_is_better"] is False
