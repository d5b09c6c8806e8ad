"""Images and labels from one .npz file."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mmpretrain")

from mmengine.registry import DATASETS, init_default_scope
from mmpretrain.datasets import BaseDataset

from infobatch_mm.datasets import NpzDataset
from infobatch_mm.engine.sample_names import fingerprint, sample_name

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 8, 6, 3), dtype=np.uint8)
LABELS = np.arange(12) % 3
CLASSES = np.array(["cat", "dog", "eel"])
GOOD = {"train_x": IMAGES, "train_y": LABELS, "test_x": IMAGES[:5], "test_y": LABELS[:5], "classes": CLASSES}


def save(path: Path, **changes: np.ndarray | None) -> str:
    """A good file, with arrays replaced, or left out where they are None."""
    arrays = {**GOOD, **changes}
    np.savez(path / "tiny.npz", **{name: array for name, array in arrays.items() if array is not None})
    return str(path / "tiny.npz")


def test_every_sample_comes_as_it_is_in_the_file(tmp_path: Path) -> None:
    dataset = NpzDataset(save(tmp_path))
    assert isinstance(dataset, BaseDataset)
    assert len(dataset) == 12
    for i in range(12):
        item = dataset[i]
        np.testing.assert_array_equal(item["img"], IMAGES[i])
        assert item["img"].dtype == np.uint8
        assert item["gt_label"] == LABELS[i]
    np.testing.assert_array_equal(dataset.get_gt_labels(), LABELS)
    assert dataset.get_cat_ids(4) == [1]
    assert dataset.CLASSES == ("cat", "dog", "eel")
    assert len(NpzDataset(save(tmp_path), split="test")) == 5
    assert "tiny.npz" in repr(dataset)


def test_what_a_pipeline_does_to_an_image_stays_with_it(tmp_path: Path) -> None:
    dataset = NpzDataset(save(tmp_path))
    dataset[3]["img"][:] = 0
    np.testing.assert_array_equal(dataset[3]["img"], IMAGES[3])


def test_samples_have_names_of_their_own(tmp_path: Path) -> None:
    path = save(tmp_path)
    train, test = NpzDataset(path), NpzDataset(path, split="test")
    names = [sample_name(dataset, i) for dataset in (train, test) for i in range(len(dataset))]
    assert names[0] == "tiny-train-00000"
    assert len(set(names)) == 17
    assert fingerprint(train.get_subset(5)) != fingerprint(test)


def test_it_is_built_from_configs_by_name_and_by_path(tmp_path: Path) -> None:
    init_default_scope("mmpretrain")
    for name in ("NpzDataset", "infobatch_mm.datasets.NpzDataset"):
        for data_root, ann_file in (("", save(tmp_path)), (str(tmp_path), "tiny.npz")):
            dataset = DATASETS.build(dict(type=name, data_root=data_root, ann_file=ann_file, indices=4))
            assert type(dataset) is NpzDataset
            assert len(dataset) == 4


def test_classes_of_the_config_come_before_those_of_the_file(tmp_path: Path) -> None:
    named = NpzDataset(save(tmp_path), metainfo=dict(classes=("a", "b", "c", "d")))
    assert named.CLASSES == ("a", "b", "c", "d")
    unnamed = NpzDataset(save(tmp_path, classes=None, train_y=LABELS.astype(np.uint8)))
    assert unnamed.CLASSES is None
    assert unnamed.get_gt_labels().tolist() == LABELS.tolist()


def test_all_images_are_held_once_in_a_buffer_that_workers_share(tmp_path: Path) -> None:
    images = np.zeros((1000, 32, 32, 3), dtype=np.uint8)
    dataset = NpzDataset(save(tmp_path, train_x=images, train_y=np.zeros(1000, dtype=int)))
    assert len(pickle.dumps(dataset)) < 1.1 * images.nbytes
    assert dataset.data_bytes.nbytes < 1.1 * images.nbytes
    assert dataset.data_list == []


BAD = {
    "no images": (dict(train_x=None), "there is no train_x, but train_y, test_x, test_y, classes"),
    "nothing": (dict.fromkeys(GOOD), "there is no train_x and no train_y, but nothing"),
    "fewer labels": (dict(train_y=LABELS[:7]), "there are 12 images but 7 labels"),
    "no samples": (dict(train_x=IMAGES[:0], train_y=LABELS[:0]), "there are no samples"),
    "floats": (dict(train_x=IMAGES / 255), r"images are of shape \(12, 8, 6, 3\), float64"),
    "channels first": (dict(train_x=IMAGES.transpose(0, 3, 1, 2)), r"images are of shape \(12, 3, 8, 6\), uint8"),
    "grey": (dict(train_x=IMAGES[..., 0]), r"images are of shape \(12, 8, 6\), uint8; they must be \(N, H, W, 3\)"),
    "one-hot labels": (dict(train_y=np.eye(3, dtype=int)[LABELS]), r"labels are of shape \(12, 3\), int64"),
    "labels as floats": (dict(train_y=LABELS / 1), r"labels are of shape \(12,\), float64"),
    "negative labels": (dict(train_y=LABELS - 1), "labels go from -1 to 1; they must go from 0 to 2, as there are 3 c"),
    "labels from 1": (dict(train_y=LABELS + 1), "labels go from 1 to 3; they must go from 0 to 2"),
    "negative, unnamed": (dict(train_y=LABELS - 1, classes=None), "labels go from -1 to 1; they must go from 0$"),
    "objects": (dict(classes=np.array(["cat", None], dtype=object)), "is not an .npz file with images and labels: Obj"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_by_what_is_in_them(name: str, tmp_path: Path) -> None:
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=message) as error:
        NpzDataset(save(tmp_path, **changes))
    assert "tiny.npz" in str(error.value)


def test_files_that_are_no_archive_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no file .*nowhere\.npz"):
        NpzDataset(str(tmp_path / "nowhere.npz"))
    with pytest.raises(ValueError, match=f"there is no file {re.escape(str(tmp_path))}"):
        NpzDataset(str(tmp_path))
    (tmp_path / "text.npz").write_text("no archive")
    np.save(tmp_path / "single.npy", IMAGES)
    (tmp_path / "half.npz").write_bytes(Path(save(tmp_path)).read_bytes()[:700])
    (tmp_path / "empty.npz").write_bytes(b"")
    for name in ("text.npz", "single.npy", "half.npz", "empty.npz"):
        with pytest.raises(ValueError, match=f"{name} is not an .npz file"):
            NpzDataset(str(tmp_path / name))
