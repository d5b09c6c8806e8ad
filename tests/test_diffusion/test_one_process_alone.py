"""Two processes of which one is alone: with accelerate's share of the data, or in a call that all must make."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="accelerate is not installed")

from launching import accelerate_launch

pytestmark = pytest.mark.dist

BEGIN = """
import time
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from infobatch_mm.diffusion import AcceleratedInfoBatch
"""
NOT_ON_CPU = """
try:
    AcceleratedInfoBatch(Accelerator(), DataLoader(torch.arange(32.0), 4), 8)
except ValueError as error:
    print("TOLD", error, flush=True)
"""
MERGED_ALONE = """
accelerator = Accelerator(cpu=True)
loader = DataLoader(torch.arange(32.0), 4, shuffle=True)
infobatch = AcceleratedInfoBatch(accelerator, loader, 8)
loader = infobatch.prepare(loader)
for step, x in enumerate(loader):
    infobatch.weigh(x)
    if step == 1:
        infobatch.merge()
        if accelerator.is_main_process:
            begin = time.time()
            try:
                infobatch.merge(timeout_s=2)
            except ValueError as error:
                print("TOLD", error, flush=True)
            print("AFTER", round(time.time() - begin), flush=True)
        else:
            time.sleep(4)
        break
"""


def run(folder: Path, source: str) -> str:
    (folder / "script.py").write_text(BEGIN + source)
    process = subprocess.Popen(
        [sys.executable, *accelerate_launch(), str(folder / "script.py")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        return process.communicate(timeout=200)[0]
    finally:
        process.terminate()


def test_a_cpu_that_was_not_asked_for_is_named(tmp_path: Path) -> None:
    output = run(tmp_path, NOT_ON_CPU)
    told = [line for line in output.splitlines() if "TOLD" in line]
    assert len(told) == 2 and all("among 1 processes" in line and "2:" in line for line in told), output[-3000:]
    assert all("make Accelerator(cpu=True)" in line for line in told)


def test_a_merge_on_the_main_process_alone_ends_in_seconds_with_its_name(tmp_path: Path) -> None:
    output = run(tmp_path, MERGED_ALONE)
    (told,) = (line for line in output.splitlines() if "TOLD" in line)
    assert "infobatch.merge() was called on process 0, but not within 2 s on every other" in told
    assert "is_main_process" in told
    assert any(line.endswith(("AFTER 2", "AFTER 3")) for line in output.splitlines()), output[-3000:]
