"""The console command: what it lists, imports, refuses, and that ``tools/`` are short ways into it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import pytest

from infobatch_mm.cli import subcommands
from infobatch_mm.cli.__main__ import main
from infobatch_mm.cli.subcommands import SUBCOMMANDS, command

ROOT = Path(__file__).parents[2]
HOSTS = {"mm": "mmengine", "diffusers": "diffusers"}
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """What ``infobatch-mm`` ends with and prints."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return int(end.value.code or 0), "".join(capsys.readouterr())


@pytest.fixture(autouse=True)
def arguments_of_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command names itself in ``sys.argv``; pytest gets its own back."""
    monkeypatch.setattr("sys.argv", ["infobatch-mm"])


def test_the_help_lists_every_subcommand_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    status, text = said(capsys, "--help")
    assert status == 0
    flat = " ".join(text.split())
    for name, subcommand in SUBCOMMANDS.items():
        assert f" {name} {subcommand.line} " in flat


@pytest.mark.parametrize("arguments", [["comparison"], []], ids=["unknown", "none"])
def test_what_is_no_subcommand_is_refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    status, text = said(capsys, *arguments)
    assert status == 2
    if arguments:
        assert "'comparison'" in text
        assert all(name in text.rsplit("error:", 1)[1] for name in SUBCOMMANDS)


def test_the_help_imports_no_subcommand() -> None:
    code = (
        "import sys, infobatch_mm\n"
        "before = set(sys.modules)\n"
        "from infobatch_mm.cli.__main__ import main\n"
        "try:\n"
        "    main(['--help'])\n"
        "except SystemExit:\n"
        "    print(*(set(sys.modules) - before))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], env=ONE_THREAD, capture_output=True, text=True, check=True)
    loaded = found.stdout.splitlines()[-1].split()
    ours = {name for name in loaded if name.startswith("infobatch_mm")}
    assert ours == {"infobatch_mm.cli", "infobatch_mm.cli.__main__", "infobatch_mm.cli.subcommands"}
    assert not {"mmengine", "diffusers", "accelerate", "rich", "matplotlib", "PIL", "yaml"} & set(loaded)


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_subcommand_has_a_file_and_a_tool(name: str) -> None:
    assert importlib.util.find_spec(f"infobatch_mm.cli.{SUBCOMMANDS[name].module}") is not None
    tool = ROOT / f"tools/{name.replace('-', '_')}.py"
    assert len(tool.read_text().splitlines()) <= 15


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_a_tool_says_what_its_subcommand_says(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(HOSTS[SUBCOMMANDS[name].extra])
    status, text = said(capsys, name, "--help")
    assert (status, text.split()[:3]) == (0, ["usage:", "infobatch-mm", name])
    tool = ROOT / f"tools/{name.replace('-', '_')}.py"
    monkeypatch.setattr("sys.argv", [str(tool), "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(tool), run_name="__main__")
    assert not end.value.code
    # A longer name indents and breaks the lines of the usage in other places.
    assert capsys.readouterr().out.replace(tool.name, f"infobatch-mm {name}").split() == text.split()


def test_the_entry_point_is_there() -> None:
    module, function = re.search(r'"infobatch-mm = ([\w.]+):(\w+)"', (ROOT / "setup.py").read_text()).groups()
    assert getattr(import_module(module), function) is main


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("compare", "rich", "'infobatch_mm[report]'"),
        ("compare-ldm", "matplotlib", "'infobatch_mm[report]'"),
        ("train", "mmengine", "'infobatch_mm[mm]', or any mmengine you have"),
        ("train-ldm", "diffusers", "'infobatch_mm[diffusers]'"),
    ],
)
@pytest.mark.parametrize("in_its_own_words", [False, True])
def test_a_missing_package_ends_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str, extra: str, in_its_own_words: bool
) -> None:
    def missing(module: str) -> NoReturn:
        error = ModuleNotFoundError(f"No module named {package!r}", name=package)
        if in_its_own_words:
            raise ImportError("infobatch_mm.somewhere needs it") from error
        raise error

    monkeypatch.setattr(subcommands, "import_module", missing)
    with pytest.raises(SystemExit) as end:
        main([name])
    assert end.value.code == f"infobatch-mm {name} needs {package}, which is not installed: pip install {extra}"


@pytest.mark.parametrize("error", [ImportError("broken"), ModuleNotFoundError("no operators", name="mmcv._ext")])
def test_a_broken_installation_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, error: ImportError) -> None:
    def broken(module: str) -> NoReturn:
        raise error

    monkeypatch.setattr(subcommands, "import_module", broken)
    with pytest.raises(ImportError) as found:
        main(["train"])
    assert found.value is error


def test_the_figures_need_matplotlib_when_they_are_drawn() -> None:
    for needed in ("mmengine", "rich"):
        pytest.importorskip(needed)
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'matplotlib':\n"
        "            raise ModuleNotFoundError(name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from infobatch_mm.cli.__main__ import main\n"
        "main(['compare'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ONE_THREAD, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "infobatch-mm compare needs matplotlib, which is not installed: pip install 'infobatch_mm[report]'"
    )


@pytest.mark.skipif(sys.version_info < (3, 11), reason="no -P")
def test_processes_see_the_packages_that_this_one_sees(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/somewhere/bin", *sys.path])
    assert command("a.module", "train") == [sys.executable, "-P", "-m", "a.module", "train"]
    for here in ("", os.getcwd()):
        monkeypatch.setattr("sys.path", [here, *sys.path])
        assert command("a.module") == [sys.executable, "-m", "a.module"]


def processes(monkeypatch: pytest.MonkeyPatch, where: Any) -> list[list[str]]:
    """The commands that a module starts from now on, none of which is run."""
    started: list[list[str]] = []

    def start(arguments: list[str], **_: Any) -> NoReturn:
        started.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(where.subprocess, "Popen", start)
    return started


def test_a_comparison_starts_modules_not_files_of_the_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for needed in ("mmengine", "rich"):
        pytest.importorskip(needed)
    from rich.progress import Progress

    from infobatch_mm.cli.comparison import checks, training

    config = tmp_path / "model.py"
    config.write_text("train_cfg = dict(max_epochs=1)")
    started = processes(monkeypatch, training)
    with pytest.raises(KeyboardInterrupt):
        training.train("baseline", config, tmp_path, ["a=1"], Progress())
    with pytest.raises(KeyboardInterrupt):
        checks.check_built(None, {config: []})
    assert [line[line.index("-m") + 1 :][:2] for line in started] == [
        ["infobatch_mm.cli", "train"],
        ["infobatch_mm.cli.preflight", str(config)],
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_package_without_the_checkout_around_it_compares(scenes: Path, tmp_path: Path) -> None:
    pytest.importorskip("mmseg")
    for needed in ("matplotlib", "rich"):
        pytest.importorskip(needed)
    from test_engine.toy import ONE_LINE, config

    shutil.copytree(ROOT / "infobatch_mm", tmp_path / "site/infobatch_mm", ignore=shutil.ignore_patterns("__pycache__"))
    cfg = config(scenes, tmp_path / "unused", custom_hooks=[])
    cfg.pop("work_dir")
    cfg.custom_imports = dict(imports=["infobatch_mm.engine"], allow_failed_imports=False)
    cfg.dump(tmp_path / "model.py")
    (tmp_path / "model-infobatch.py").write_text(f"_base_ = 'model.py'\ncustom_hooks = {ONE_LINE}\n")
    where = "import infobatch_mm.cli.__main__ as main; print(main.__file__); main.main()"
    arguments = ["compare", "model.py", "model-infobatch.py", "--work-dir", "out"]
    done = subprocess.run(
        [sys.executable, "-c", where, *arguments],
        cwd=tmp_path,
        env={**ONE_THREAD, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.startswith(str(tmp_path / "site"))
    result = json.loads((tmp_path / "out/comparison.json").read_text())
    assert result["infobatch"]["visits"] < result["baseline"]["visits"]
