"""The tools, as processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmseg")

import mmseg

ROOT = Path(__file__).parents[2]
PRUNED = ROOT / "configs/demo/fcn_r18-tiny_1xb8-infobatch-1k_demo-96x96.py"
OURS = ROOT / "tools/train.py"
# Equal runs need equal threads: sums of floats depend on how they are split.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
HOSTS = Path(mmseg.__file__).parent / ".mim/tools/train.py"


def options(scenes: Path, *more: str) -> list[str]:
    """The demo on 22 small scenes: 6 passes in batches of 4."""
    return [
        "--cfg-options",
        *(f"{split}_dataloader.dataset.data_root={scenes}" for split in ("train", "val", "test")),
        "train_dataloader.batch_size=4",
        "train_dataloader.num_workers=0",
        "train_dataloader.persistent_workers=False",
        "val_dataloader.num_workers=0",
        "val_dataloader.persistent_workers=False",
        "test_dataloader.num_workers=0",
        "test_dataloader.persistent_workers=False",
        "train_cfg.max_iters=33",
        "param_scheduler.1.end=100",
        "default_hooks.checkpoint.interval=8",
        "default_hooks.logger.interval=5",
        *more,
    ]


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=ONE_THREAD, text=True, capture_output=True, check=False
    )


@pytest.mark.parametrize("script", [OURS, pytest.param(HOSTS, marks=pytest.mark.slow)], ids=["ours", "mmseg's"])
def test_train_runs_under_both_scripts_and_the_result_can_be_tested(scenes: Path, tmp_path: Path, script: Path) -> None:
    if not script.is_file():
        pytest.skip(f"{script} is not in this distribution")
    result = run(script, PRUNED, *options(scenes), cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    work_dir = tmp_path / "work_dirs" / PRUNED.stem
    summary = json.loads((work_dir / "infobatch_summary.json").read_text())
    assert summary["saved_ratio"] > 0
    checkpoint = work_dir / f"iter_{summary['iterations']}.pth"
    assert checkpoint.is_file()
    if script == OURS:
        tested = run(ROOT / "tools/test.py", PRUNED, checkpoint, *options(scenes), cwd=tmp_path)
        assert tested.returncode == 0, tested.stdout + tested.stderr
        assert "mIoU" in tested.stdout


@pytest.mark.slow  # test_faults.py kills runs at random moments
def test_kill_and_resume_ends_where_the_straight_run_ends(scenes: Path, tmp_path: Path) -> None:
    straight = run(OURS, PRUNED, "--work-dir", tmp_path / "straight", *options(scenes), cwd=tmp_path)
    assert straight.returncode == 0, straight.stdout + straight.stderr
    killed = tmp_path / "killed"
    command = [sys.executable, str(OURS), str(PRUNED), "--work-dir", str(killed), *options(scenes)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ONE_THREAD
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "Saving checkpoint at 16" in line:
                while not (killed / "last_checkpoint").read_text().endswith("iter_16.pth"):
                    pass
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    resumed = run(OURS, PRUNED, "--work-dir", killed, "--resume", *options(scenes), cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    books = [json.loads((folder / "infobatch_summary.json").read_text()) for folder in (tmp_path / "straight", killed)]
    for book in books:
        book.pop("wall_time_s")
    assert books[0] == books[1]


def test_data_root_reaches_every_data_set(tmp_path: Path) -> None:
    from argparse import Namespace

    from infobatch_mm.cli.config import load_config

    args = Namespace(
        config=str(PRUNED), launcher="none", local_rank=0, work_dir=None, cfg_options={"data_root": "/elsewhere"}
    )
    cfg = load_config(args)
    for split in ("train", "val", "test"):
        assert cfg[f"{split}_dataloader"].dataset.data_root == "/elsewhere"
    assert cfg.work_dir == str(Path("work_dirs", PRUNED.stem))
