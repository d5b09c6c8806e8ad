"""Shared by the tests of the tools."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a tool writes beside the user's files is this test's alone."""
    monkeypatch.chdir(tmp_path)
