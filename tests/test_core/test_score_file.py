"""The file of scores: both kinds, in chunks, one line for each sample."""

from __future__ import annotations

import builtins
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infobatch_mm.core import ScoreStore
from infobatch_mm.core import score_file as module
from infobatch_mm.core.score_file import read_scores, write_scores


@pytest.fixture(params=["parquet", "npz"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "parquet":
        pytest.importorskip("pyarrow")
    else:
        real = builtins.__import__

        def without_pyarrow(name: str, *args: Any, **kwargs: Any) -> Any:
            if name.startswith("pyarrow"):
                raise ImportError(name)
            return real(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    return str(request.param)


def store_of(length: int) -> ScoreStore:
    store = ScoreStore(length)
    odd = torch.arange(1, length, 2)
    store.record(odd, odd.float())
    store.record(odd[:1], odd[:1].float())
    return store


def named(length: int, size: int) -> Iterator[list[str]]:
    names = (f"ä{index}.png" for index in range(length))
    while chunk := list(itertools.islice(names, size)):
        yield chunk


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_a_file_has_one_line_for_each_sample(kind: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_CHUNK", 4)
    for names in (None, [f"ä{index}.png" for index in range(10)], named(10, size)):
        path = write_scores(str(tmp_path), store_of(10), names)
        assert [each.name for each in tmp_path.iterdir()] == [f"infobatch_scores.{kind}"] == [Path(path).name]
        found = read_scores(tmp_path)
        assert found["index"].tolist() == list(range(10))
        np.testing.assert_array_equal(found["score"], [np.nan, 1, np.nan, 3, np.nan, 5, np.nan, 7, np.nan, 9])
        assert found["times_seen"].tolist() == [0, 2, 0, 1, 0, 1, 0, 1, 0, 1]
        assert [found[name].dtype.kind for name in ("index", "score", "times_seen", "name")] == ["i", "f", "i", "U"]
        assert found["score"].dtype == np.float32
        assert found["name"].tolist() == ([""] * 10 if names is None else [f"ä{index}.png" for index in range(10)])


def test_no_old_file_of_the_other_kind_is_left(kind: str, tmp_path: Path):
    other = tmp_path / f"infobatch_scores.{'npz' if kind == 'parquet' else 'parquet'}"
    other.write_bytes(b"old")
    write_scores(str(tmp_path), store_of(10))
    assert not other.exists()


@pytest.mark.parametrize("count", [0, 9, 11])
def test_names_that_do_not_fit_are_refused(kind: str, count: int, tmp_path: Path):
    for names in ([str(index) for index in range(count)], named(count, 2)):
        with pytest.raises(ValueError, match=r"names for 10 samples"):
            write_scores(str(tmp_path), store_of(10), names)
    assert not any((tmp_path / f"infobatch_scores.{each}").exists() for each in ("npz", "parquet"))


def test_a_missing_file_is_said(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        read_scores(tmp_path)
