"""``examples/train_unconditional.py``: an accelerate script but for its marked lines, to be killed at any step.

Run as a script, this file is the example with a journal: every process writes down what it weighs.
"""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("torchvision", reason="torchvision is not installed")

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file

from infobatch_mm.diffusion import AcceleratedInfoBatch

EXAMPLE = Path(__file__).parents[2] / "examples/train_unconditional.py"
SOURCE = EXAMPLE.read_text()
ADDED, REPLACED = "# (+)", "# (-) "
SAMPLES, EPOCHS = 22, 6
#: In the midst of a pruned pass, some steps behind a checkpoint that is within a pass too.
KILL_AT, KILL_TWO_AT = 18, 23
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


# ---- the script and the script without us -----------------------------------------------------------------


def original(source: str) -> str:
    """The script as it was before: without the added lines, with those that were replaced."""
    lines = [line for line in source.splitlines() if not line.endswith(ADDED)]
    return "\n".join(line.replace(REPLACED, "", 1) if line.lstrip().startswith(REPLACED) else line for line in lines)


def run(source: str, *arguments: str) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    namespace: dict[str, Any] = {"__name__": "train_unconditional"}
    exec(compile(source, str(EXAMPLE), "exec"), namespace)
    namespace["main"](arguments)


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


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, float]]]:
    """What the script logs, step by step."""
    logged: list[dict[str, float]] = []
    log = Accelerator.log

    def keep(self: Accelerator, values: dict[str, float], *args: Any, **kwargs: Any) -> None:
        logged.append({name: values[name] for name in ("loss", "lr")})
        log(self, values, *args, **kwargs)

    monkeypatch.setattr(Accelerator, "log", keep)
    yield logged
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def where(pictures: Path, folder: Path) -> list[str]:
    data = ["--train_data_dir", str(pictures / "images"), "--model_config_name_or_path", str(pictures / "config.json")]
    return [*ARGUMENTS, *data, "--output_dir", str(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet/diffusion_pytorch_model.safetensors")


def test_a_dozen_lines_are_ours():
    lines = SOURCE.splitlines()
    marked = [line.endswith(ADDED) for line in lines]
    assert sum(marked) - sum(line.startswith("from ") for line in lines if line.endswith(ADDED)) < 12
    # What is replaced stands right above what replaces it; some lines are just left out.
    for number, line in enumerate(lines):
        if line.lstrip().startswith(REPLACED) and not lines[number + 1].lstrip().startswith(REPLACED):
            assert marked[number + 1] or "resume_step = 0" in line
    before = original(SOURCE)
    code = ast.unparse(ast.parse(before)).partition('"""\n')[2]  # after the docstring, without comments
    assert "infobatch" not in code.lower() and "accelerator.prepare(" in code and "skip_first_batches" in code


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


# ---- killed and resumed -----------------------------------------------------------------------------------


def run_with_journal(folder: Path, kill_at: int, arguments: list[str]) -> None:
    """The example, killed before a step is done; what it weighs is written down."""
    written = (folder / f"journal.{os.environ.get('RANK', 0)}").open("a", buffering=1)
    steps = itertools.count(1)
    weigh, log = AcceleratedInfoBatch.weigh, Accelerator.log

    def weigh_and_tell(self: AcceleratedInfoBatch, losses: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        batch = self._in_hand
        weighted = weigh(self, losses, **more)
        entry = {"index": batch.index.tolist(), "weights": batch.weights.tolist(), "loss": self.loss.item()}
        written.write(json.dumps(entry) + "\n")
        if next(steps) == kill_at:
            if dist.is_initialized():
                dist.barrier()
            os.kill(os.getpid(), signal.SIGKILL)
        return weighted

    def log_and_tell(self: Accelerator, values: dict[str, float], **kwargs: Any) -> None:
        written.write(json.dumps({"lr": values["lr"]}) + "\n")
        log(self, values, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AcceleratedInfoBatch, "weigh", weigh_and_tell)
        patch.setattr(Accelerator, "log", log_and_tell)
        run(SOURCE, *arguments)
    written.close()


def told(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    """One entry per step."""
    lines = [json.loads(line) for line in (folder / f"journal.{rank}").read_text().splitlines()]
    return [{**step, **rate} for step, rate in itertools.zip_longest(lines[::2], lines[1::2], fillvalue={})]


def launch(folder: Path, *more: str, kill_at: int = 0, launcher: list[str] | None = None) -> None:
    folder.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, *(launcher or []), __file__, str(folder), str(kill_at), *more],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output = process.communicate(timeout=200)[0]
    finally:
        process.terminate()
    assert bool(process.returncode) == bool(kill_at), output[-4000:]


def steps_saved(folder: Path) -> tuple[int, int]:
    """Steps that are in the last checkpoint, and those of its pass."""
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    states = [torch.load(path, weights_only=True) for path in last.glob("custom_checkpoint_*.pkl")]
    (ours,) = (state for state in states if "iterations" in state)
    return ours["iterations"], ours["visited"]


def test_killed_in_a_pass_and_resumed_it_ends_with_the_same_bits(pictures: Path, tmp_path: Path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir()
    run_with_journal(straight, 0, where(pictures, straight))
    launch(killed, *where(pictures, killed), kill_at=KILL_AT)
    whole, begun = told(straight), told(killed)
    assert [{**step, "lr": 0} for step in begun] == [{**step, "lr": 0} for step in whole[:KILL_AT]]
    assert len(whole) < EPOCHS * SAMPLES / 2 and max(gamma for step in whole for gamma in step["weights"]) > 1
    (killed / "journal.0").unlink()
    saved, visited = steps_saved(killed)
    assert saved < KILL_AT and visited  # in the midst of a pass
    run_with_journal(killed, 0, [*where(pictures, killed), "--resume_from_checkpoint"])
    assert told(killed) == whole[saved:]
    theirs, ours = weights(straight), weights(killed)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    books, others = (json.loads((f / "infobatch_summary.json").read_text()) for f in (straight, killed))
    assert {**books, "wall_time_s": 0} == {**others, "wall_time_s": 0}
    with np.load(killed / "infobatch_scores.npz") as scores:
        names = scores["name"].tolist()
    assert len(names) == SAMPLES and names == sorted(names) and re.search(r"images/more/\d+\.png$", names[-1])


@pytest.mark.dist
def test_killed_on_two_processes_it_goes_on_with_the_same_samples_on_one(pictures: Path, tmp_path: Path):
    from launching import accelerate_launch  # the processes that run this file do not find it

    arguments = [*where(pictures, tmp_path), "--checkpointing_steps", "11"]
    launch(tmp_path, *arguments, kill_at=KILL_TWO_AT, launcher=accelerate_launch())
    begun = [told(tmp_path, rank) for rank in range(2)]
    saved, visited = steps_saved(tmp_path)
    assert [len(steps) for steps in begun] == [KILL_TWO_AT] * 2 and saved < KILL_TWO_AT - 1 and visited
    (tmp_path / "journal.0").unlink()
    run_with_journal(tmp_path, 0, [*arguments, "--resume_from_checkpoint", "--train_batch_size", "4"])
    again = told(tmp_path)
    for first, second, one in zip(begun[0][saved:], begun[1][saved:], again, strict=False):
        assert one["index"] == first["index"] + second["index"]
        assert one["weights"] == first["weights"] + second["weights"]
    assert max(gamma for step in again for gamma in step["weights"]) > 1
    assert (tmp_path / "model_index.json").exists()
    assert json.loads((tmp_path / "infobatch_summary.json").read_text())["passes_done"] == EPOCHS


if __name__ == "__main__":
    run_with_journal(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
