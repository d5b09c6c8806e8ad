"""``examples/train_unconditional.py``: an accelerate script but for its marked lines, to be killed at any step."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("torchvision", reason="torchvision is not installed")

from launching import accelerate_launch
from PIL import Image
from safetensors.torch import load_file

from infobatch_mm.core import read_scores

from .example_scripts import check_marks, launch, original, run, run_with_journal, source_of, steps_saved, told

EXAMPLE = "train_unconditional.py"
SOURCE = source_of(EXAMPLE)
SAMPLES, EPOCHS = 22, 6
#: The first step at which a run may be killed.
KILL_FROM = 12
ARGUMENTS = [
    *(
        "--resolution",
        "8",
        "--train_batch_size",
        "2",
        "--num_epochs",
        str(EPOCHS),
        "--gradient_accumulation_steps",
        "2",
    ),
    *("--use_ema", "--lr_warmup_steps", "3", "--learning_rate", "1e-3", "--checkpointing_steps", "4"),
]
UNET = {
    "_class_name": "UNet2DModel",
    **{"sample_size": 8, "layers_per_block": 1, "block_out_channels": [8, 16], "norm_num_groups": 4},
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of 8 x 8, some in a directory of their own, some dull and some noisy; and a small network's config."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "images/more").mkdir(parents=True)
    drawn = np.random.default_rng(0)
    for number in range(SAMPLES):
        pixels = 128 + (drawn.random((8, 8, 3)) - 0.5) * 255 * (number % 4) / 3
        where = "images/more" if number % 3 == 0 else "images"
        Image.fromarray(pixels.astype(np.uint8)).save(root / where / f"{number:02}.png")
    (root / "images/notes.txt").write_text("no picture")
    (root / "config.json").write_text(json.dumps(UNET))
    return root


def where(pictures: Path, folder: Path) -> list[str]:
    data = ["--train_data_dir", str(pictures / "images"), "--model_config_name_or_path", str(pictures / "config.json")]
    return [*ARGUMENTS, *data, "--output_dir", str(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet/diffusion_pytorch_model.safetensors")


def test_a_dozen_lines_are_ours():
    check_marks(SOURCE, fewer_than=12, left_out="resume_step = 0")


def test_without_pruning_it_is_the_original_script(pictures: Path, tmp_path: Path, journal: list[dict[str, float]]):
    run(original(SOURCE), *where(pictures, tmp_path / "original"))
    alone, steps = journal.copy(), len(journal)
    journal.clear()
    assert ', "item_seed": True' in SOURCE  # which has pictures flipped by other draws
    run(SOURCE.replace(', "item_seed": True', ""), *where(pictures, tmp_path / "ours"), "--policy", "none")
    assert len(journal) == steps == EPOCHS * SAMPLES / 2
    for ours, theirs in zip(journal, alone, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
        assert ours["lr"] == theirs["lr"]
    assert len({entry["loss"] for entry in alone}) == steps and alone[-1]["lr"] == 0
    ours, theirs = weights(tmp_path / "ours"), weights(tmp_path / "original")
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) <= 1e-6


def test_killed_in_a_pass_and_resumed_it_ends_with_the_same_bits(pictures: Path, tmp_path: Path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run_with_journal(EXAMPLE, straight, 0, where(pictures, straight))
    launch(EXAMPLE, killed, *where(pictures, killed), kill_from=KILL_FROM)
    whole, begun = told(straight), told(killed)
    assert [{**step, "lr": 0} for step in begun] == [{**step, "lr": 0} for step in whole[: len(begun)]]
    assert len(whole) < EPOCHS * SAMPLES / 2 and max(gamma for step in whole for gamma in step["weights"]) > 1
    (killed / "journal.0").unlink()
    saved, visited = steps_saved(killed)
    assert saved < len(begun) and visited  # in the midst of a pass
    run_with_journal(EXAMPLE, killed, 0, [*where(pictures, killed), "--resume_from_checkpoint"])
    assert told(killed) == whole[saved:]
    theirs, ours = weights(straight), weights(killed)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    books, others = (json.loads((f / "infobatch_summary.json").read_text()) for f in (straight, killed))
    assert {**books, "wall_time_s": 0} == {**others, "wall_time_s": 0}
    scores = read_scores(killed)
    names = scores["name"].tolist()
    assert len(names) == SAMPLES and names == sorted(names) and re.search(r"images/more/\d+\.png$", names[-1])


@pytest.mark.dist
def test_killed_on_two_processes_it_goes_on_with_the_same_samples_on_one(pictures: Path, tmp_path: Path):
    arguments = [*where(pictures, tmp_path), "--checkpointing_steps", "1"]
    launch(EXAMPLE, tmp_path, *arguments, kill_from=KILL_FROM, launcher=accelerate_launch())
    begun = [told(tmp_path, rank) for rank in range(2)]
    saved, visited = steps_saved(tmp_path)
    assert [len(steps) for steps in begun] == [saved + 2] * 2 and visited
    (tmp_path / "journal.0").unlink()
    run_with_journal(EXAMPLE, tmp_path, 0, [*arguments, "--resume_from_checkpoint", "--train_batch_size", "4"])
    again = told(tmp_path)
    for first, second, one in zip(begun[0][saved:], begun[1][saved:], again, strict=False):
        assert one["index"] == first["index"] + second["index"]
        assert one["weights"] == first["weights"] + second["weights"]
    assert max(gamma for step in again for gamma in step["weights"]) > 1
    assert (tmp_path / "model_index.json").exists()
    assert json.loads((tmp_path / "infobatch_summary.json").read_text())["passes_done"] == EPOCHS
