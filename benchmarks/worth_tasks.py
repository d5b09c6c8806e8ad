"""The trainings of `worth.py`: configs of this repository, shortened, with a checkpoint at three moments."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

#: Shares of a training at which it is looked at.
MOMENTS = (1 / 8, 1 / 2, 1.0)

_NO_VALIDATION = ("val_dataloader=None", "val_cfg=None", "val_evaluator=None")
_IN_PROCESS = ("train_dataloader.num_workers=0", "train_dataloader.persistent_workers=False")


@dataclass(frozen=True)
class Task:
    """A training.

    Args:
        config (str): Below ``configs/``; a config of MMEngine, or a recipe.
        needs (tuple[str, ...]): Environment variables that say where its data are.
        length (int): Iterations, or epochs.
        checkpoint (str): Where one is in the work dir, by ``{moment}``, counted as the length is.
        data (tuple[str, ...]): Options of the data and the model, in training and forecast alike. ``$NAME`` is an
            environment variable.
        training (tuple[str, ...]): Further options of the training.
        bands (int): Equal parts of the noise schedule, of which a unit is one of an image; 0 for whole images.
    """

    config: str
    needs: tuple[str, ...]
    length: int
    checkpoint: str
    data: tuple[str, ...] = ()
    training: tuple[str, ...] = ()
    bands: int = 0

    @property
    def is_recipe(self) -> bool:
        """Whether it is a training of latent diffusion."""
        return self.config.endswith(".yaml")

    def moments(self) -> list[int]:
        """The moments, counted as the length is."""
        return [max(1, round(each * self.length)) for each in MOMENTS]

    def train(self) -> list[str]:
        """What follows ``infobatch-mm`` to train it, without the work dir."""
        config, every = f"configs/{self.config}", str(self.moments()[0])
        if self.is_recipe:
            steps = ["--checkpointing_steps", every, "--save_images_epochs", "0", "--checkpoints_total_limit", "9"]
            return ["train-ldm", "--config", config, *self.data, *self.training, *steps]
        kept = (f"default_hooks.checkpoint.interval={every}", "default_hooks.checkpoint.max_keep_ckpts=-1")
        options = (*self.data, *self.training, *kept, *_NO_VALIDATION, *_IN_PROCESS)
        return ["train", config, "--cfg-options", *options]

    def path(self, work_dir: Path, moment: int) -> Path:
        """The checkpoint of a moment."""
        return work_dir / self.checkpoint.format(moment=moment)


def epochs(length: int, warm_up: int) -> tuple[str, ...]:
    """Options of a training of so many epochs under warm-up and cosine."""
    return (
        f"train_cfg.max_epochs={length}",
        f"param_scheduler.0.end={warm_up}",
        f"param_scheduler.1.begin={warm_up}",
        f"param_scheduler.1.T_max={length - warm_up}",
        f"param_scheduler.1.end={length}",
    )


_CELLS = "nuclei/unet-gn-tiny_1xb16-2k_nuclei-cells-64x64.py"
_FACES = dict(
    config="ldm/ldm_unet-tiny-vq-f4_1xb16-25e_faces-64px.yaml",
    needs=("FACES_ROOT", "FACES_VAE"),
    length=1600,
    checkpoint="checkpoint-{moment}",
    data=("--train_data_dir", "$FACES_ROOT", "--vae", "$FACES_VAE", "--cpu"),
    training=("--max_train_steps", "1600"),
)

TASKS = {
    "nuclei cells": Task(_CELLS, ("NUCLEI_CELLS_ROOT",), 2000, "iter_{moment}.pth"),
    "CIFAR-10": Task(
        "resnet/resnet18-tiny_1xb128-30e_cifar10-npz.py",
        ("CIFAR10_NPZ",),
        16,
        "epoch_{moment}.pth",
        training=epochs(16, 2),
    ),
    "latents of faces": Task(**_FACES),  # type: ignore[arg-type]
    "latents of faces, by noise level": Task(**_FACES, bands=20),  # type: ignore[arg-type]
    "MAE on nuclei": Task(
        "mae/mae_vit-tiny-p8_1xb64-coslr-40e_nuclei-64px.py",
        ("NUCLEI_ROOT",),
        12,
        "epoch_{moment}.pth",
        training=(*epochs(12, 2), "default_hooks.reconstruction.interval=1000"),
    ),
    "CamVid images": Task(
        "camvid/fcn_r18-tiny_1xb8-4k_camvid-128x128.py",
        ("CAMVID_ROOT",),
        920,
        "iter_{moment}.pth",
        training=("train_cfg.max_iters=920", "param_scheduler.1.end=920"),
    ),
    "CamVid cells": Task(
        _CELLS,
        ("CAMVID_CELLS_ROOT",),
        1104,
        "iter_{moment}.pth",
        data=(
            "data_root=$CAMVID_CELLS_ROOT",
            "model.decode_head.num_classes=11",
            "model.data_preprocessor.size=(48,48)",
            "train_dataloader.dataset.pipeline.2.crop_size=(48,48)",
        ),
        # 4 passes over 4,404 cells.
        training=("train_cfg.max_iters=1104", "param_scheduler.1.end=1104", "param_scheduler.1.T_max=1004"),
    ),
}


def cut_cells(source: Path, target: Path, side: int = 60) -> None:
    """Cut the training images of CamVid into square cells, laid out like ADE20K; nothing where they are there.

    Args:
        source (Path): Folder with ``images/training`` and ``annotations/training``.
        target (Path): Folder to write to.
        side (int): Of a cell, in pixels. Defaults to 60: twelve of an image of 240 x 180.
    """
    for kind in ("images", "annotations"):
        folder = target / kind / "training"
        if folder.is_dir():
            continue
        folder.mkdir(parents=True)
        for path in sorted((source / kind / "training").iterdir()):
            whole = np.asarray(Image.open(path))
            for row in range(0, whole.shape[0] - side + 1, side):
                for column in range(0, whole.shape[1] - side + 1, side):
                    # As PNG: a second JPEG would change the pixels once more, and labels must not change at all.
                    cell = Image.fromarray(whole[row : row + side, column : column + side])
                    cell.save(folder / f"{path.stem}-{row}-{column}.png")


@dataclass
class Found:
    """Rows that are there already, by task, moment and settings."""

    rows: list[dict] = field(default_factory=list)

    def has(self, key: dict) -> bool:
        """Whether a row has these values."""
        return any({name: row.get(name) for name in key} == key for row in self.rows)
