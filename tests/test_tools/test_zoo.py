"""The zoo benchmark over a handful of folders: python -m pytest -m slow tests/test_tools/test_zoo.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmseg")

ROOT = Path(__file__).parents[2]
FOLDERS = {"fcn": "fast", "encnet": "fast", "danet": "fast", "knet": "fast", "stdc": "fast", "pidnet": "universal"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_handful_of_folders_is_weighed_exactly(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/zoo.py"), "--json", str(tmp_path / "zoo.json"), *FOLDERS]
    subprocess.run(command, check=True, cwd=tmp_path)
    folders = json.loads((tmp_path / "zoo.json").read_text())["folders"]
    assert {name: folders[name]["path"] for name in FOLDERS} == FOLDERS
    for name in FOLDERS:
        assert folders[name]["status"] == "ok", folders[name]["reason"]
        assert folders[name]["rel_err_ones"] <= 1e-6
        assert folders[name]["rel_err_random"] <= 1e-4
