"""The report reads files: it needs no host, so that it can be made where none is installed."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import infobatch_mm.report

FILES = sorted(Path(infobatch_mm.report.__file__).parent.glob("*.py"))
NEEDED = {"matplotlib", "rich", "PIL", "numpy", "scipy"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_of_the_report_imports_the_core_alone(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level < 2 or node.module.split(".")[0] in ("core", "policies"), node.module
            names = [] if node.level else [node.module]
        else:
            continue
        for name in names:
            assert name.split(".")[0] in NEEDED | set(sys.stdlib_module_names), name
