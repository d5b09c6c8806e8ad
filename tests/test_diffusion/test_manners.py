"""Scripts in the manner of diffusers' own, in processes of their own: counted in steps and killed, or with caches."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("diffusers", reason="diffusers is not installed")

from safetensors.torch import load_file

pytestmark = pytest.mark.slow

MANNERS = Path(__file__).with_name("manners")


def launch(name: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(MANNERS / name), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "journal").read_text().splitlines()]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_script_counted_in_steps_is_killed_and_resumed_to_the_same_end(tmp_path: Path, accumulate: int) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for folder in (straight, killed):
        folder.mkdir()
    steps = 87 // accumulate  # 7.25 epochs
    options = ["--max_train_steps", str(steps), "--gradient_accumulation_steps", str(accumulate)]
    options += ["--checkpointing_steps", "7"]
    done = launch("unconditional.py", "--output_dir", str(straight), *options)
    assert done.returncode == 0, done.stderr[-3000:]
    told = re.search(r"steps (\d+) of (\d+), broken (\w+), epochs (\d+)", done.stderr)
    assert told is not None and int(told[1]) < int(told[2]) == steps and told.groups()[2:] == ("False", "8")
    begun = launch("unconditional.py", "--output_dir", str(killed), *options, "--kill_at", str(40 // accumulate))
    assert begun.returncode == -signal.SIGKILL
    seen = len(journal(killed))
    resumed = launch("unconditional.py", "--output_dir", str(killed), *options, "--resume_from_checkpoint", "latest")
    assert resumed.returncode == 0, resumed.stderr[-3000:]

    whole, parts = journal(straight), journal(killed)
    assert parts[:seen] == whole[:seen]
    again = len(whole) - (len(parts) - seen)
    assert parts[seen:] == whole[again:] and again < seen  # from the checkpoint on, the same samples and rates
    assert whole[-1]["lr"] == [0.0] and max(entry["lr"][0] for entry in whole) == 1e-3
    rates = [entry["lr"][0] for entry in whole]
    assert all(later <= before for before, later in itertools.pairwise(rates[20:]))  # it never rises again
    books = [json.loads((folder / "infobatch_summary.json").read_text()) for folder in (straight, killed)]
    assert books[0]["saved_ratio"] > 0.1 and books[0]["passes_done"] == 8
    assert books[0]["passes_total"] == pytest.approx(87 / 12, abs=0.1)
    assert [{**each, "wall_time_s": 0} for each in books[:1]] == [{**each, "wall_time_s": 0} for each in books[1:]]
    theirs, ours = (load_file(f / "unet/diffusion_pytorch_model.safetensors") for f in (straight, killed))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    lines = [line for line in done.stderr.splitlines() if line.startswith("INFO - infobatch_mm - InfoBatch")]
    assert len(lines) == 9 and "pass 8 of 8 done: kept" in lines[7] and "in 8 passes" in lines[8]
    assert "UserWarning" not in done.stderr and "the script ended" not in done.stderr


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments that name a tiny pipeline and captioned pictures."""
    for name in ("transformers", "peft"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    from infobatch_mm.demo.pipeline import build_pipeline, caption_images

    root = tmp_path_factory.mktemp("demo")
    images = caption_images(root / "images", num_train=22, size=32)
    build_pipeline().save_pretrained(root / "pipeline")
    return ["--pretrained_model_name_or_path", str(root / "pipeline"), "--train_data_dir", str(images)]


@pytest.mark.parametrize("cache", ["index", "step"])
def test_a_cache_by_index_is_right_and_one_by_step_is_warned_of(demo: list[str], tmp_path: Path, cache: str) -> None:
    done = launch("lora_cached.py", *demo, "--output_dir", str(tmp_path), "--cache", cache)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads((tmp_path / "seen.json").read_text())
    books = json.loads((tmp_path / "infobatch_summary.json").read_text())
    assert books["visits"] == seen["total"] < books["visits_full"] == 4 * 22
    warned = re.search(r"UserWarning: a whole walk .* was not weighed.*cache\[infobatch\.index\]", done.stderr)
    if cache == "index":
        assert seen["right"] == seen["total"] and warned is None
    else:
        assert seen["right"] < seen["total"] and warned is not None
