"""The data sets drawn on the spot."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image")

from infobatch_mm.demo import shapes
from infobatch_mm.demo.photo import draw_difficulty, photograph


def test_shapes_are_laid_out_like_imagenet_with_equal_classes(tmp_path: Path) -> None:
    root = shapes.draw_dataset(tmp_path / "new" / "folder", num_train=40, num_val=20, size=24)
    for split, each in (("train", 4), ("val", 2)):
        files = [path.relative_to(root / split) for path in (root / split).rglob("*.*")]
        assert Counter(path.parts[0] for path in files) == dict.fromkeys(shapes.CLASSES, each)
        assert {len(path.parts) for path in files} == {2}
        with Image.open(root / split / files[0]) as picture:
            assert (picture.mode, picture.size) == ("RGB", (24, 24))


def test_shapes_are_equal_for_equal_seeds_only(tmp_path: Path) -> None:
    def drawn(name: str, seed: int) -> list[tuple[str, bytes]]:
        root = shapes.draw_dataset(tmp_path / name, num_train=20, num_val=10, seed=seed)
        return [(str(path.relative_to(root)), path.read_bytes()) for path in sorted(root.rglob("*.png"))]

    first, again, other = drawn("first", 0), drawn("again", 0), drawn("other", 1)
    assert first == again
    assert [name for name, _ in first] == [name for name, _ in other]
    assert all(mine != theirs for (_, mine), (_, theirs) in zip(first, other, strict=True))
    assert len({content for _, content in first}) == 30


def test_every_class_is_drawn_in_its_own_way() -> None:
    """Of one seed, hence of one colour, place and size; noise alone differs by less."""
    pictures = {
        name: np.asarray(shapes.draw_picture(np.random.default_rng(0), name, 0.0, 32), dtype=float)
        for name in shapes.CLASSES
    }
    for i, name in enumerate(shapes.CLASSES):
        for other in shapes.CLASSES[i + 1 :]:
            assert np.abs(pictures[name] - pictures[other]).mean() > 6, (name, other)


def test_most_pictures_are_plain_and_a_long_tail_is_hard() -> None:
    rng = np.random.default_rng(0)
    difficulties = np.array([draw_difficulty(rng) for _ in range(2000)])
    assert difficulties.min() >= 0
    assert difficulties.max() <= 1
    assert np.median(difficulties) < 0.25
    assert 0.03 < (difficulties > 0.5).mean() < 0.2


def test_harder_photographs_are_darker_and_noisier() -> None:
    grey = Image.new("RGB", (32, 32), (120, 120, 120))
    plain, hard = (
        np.asarray(photograph(grey, np.random.default_rng(0), difficulty), dtype=float) for difficulty in (0.0, 0.9)
    )
    assert plain.std() < 10 < hard.std()
    assert hard.mean() < plain.mean() - 10


@pytest.mark.parametrize("module", ["street", "shapes"])
def test_the_command_line_says_what_it_drew(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib

    arguments = [module, str(tmp_path / module), "--num-train", "10", "--num-val", "10", "--size", "24"]
    monkeypatch.setattr("sys.argv", arguments)
    importlib.import_module(f"infobatch_mm.demo.{module}").main()
    assert "drew 10 training and 10 validation" in capsys.readouterr().out
    assert (tmp_path / module).is_dir()
