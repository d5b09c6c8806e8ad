"""Which small faults of the package the default tests find.

    OMP_NUM_THREADS=1 python benchmarks/mutants.py [--only NAME ...] [--quick] [--before RESULTS] [--json OUT]

Each fault of ``mutants_table.py`` replaces one piece of text in a copy of the package, such as a sign, the end of a
pass or a line that gives something back. The tests that are likeliest to fail are run on the copy, and then those of
its room, until the first one fails; with ``--quick`` the likeliest alone. A text that is not found exactly once is
reported as "does not apply". A fault survives if no test fails.

Run it before and after a change of the tests: a fault that was killed before and survives after is a loss. With
``--before``, the JSON of an earlier run, the test that killed each fault there is run first, which makes the second run
short. ``--only`` takes names or beginnings of names, as ``core-`` or ``engine-views``. The hosts are imported once, and
each fault is tried in a process forked from there, so this needs Unix. All faults take about an hour on one core.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from mutants_table import FAULTS, ROOMS

ROOT = Path(__file__).resolve().parents[1]
#: Seconds after which a fault counts as killed: its tests hang.
PATIENCE_S = 1500
#: Imported once, before the processes are forked; nothing of the package may be among them.
_HOSTS = ("torch", "mmengine.runner", "mmseg.models", "mmpretrain.models", "accelerate", "diffusers", "pandas")
_LEFT_OUT = shutil.ignore_patterns(".*", "work_dirs", "data", "__pycache__", "*.egg-info")


@dataclass(frozen=True)
class Mutant:
    """A small fault.

    Attributes:
        name (str): Room and what is wrong.
        file (str): Below ``infobatch_mm/``.
        old (str): Text that occurs once in the file.
        new (str): What takes its place.
        first (list[str]): Files and tests below ``tests/`` that are the likeliest to fail.
        room (list[str]): Folders of all that should be run.
    """

    name: str
    file: str
    old: str
    new: str
    first: list[str]
    room: list[str]

    def written_into(self, package: Path) -> str | None:
        """Put the fault into a copy of the package; returns why that is not possible, if it is not."""
        path = package / self.file
        text = path.read_text() if path.is_file() else ""
        if (count := text.count(self.old)) != 1:
            return f"does not apply: its text is found {count} times in {self.file}"
        path.write_text(text.replace(self.old, self.new))
        return None


def all_mutants() -> list[Mutant]:
    """The faults of the table."""
    mutants = []
    for file, faults in FAULTS.items():
        room = file.partition("/")[0]
        for name, first, old, new in faults:
            mutants.append(Mutant(f"{room}-{name}", file, old, new, first.split(), ROOMS[room].split()))
    return mutants


class _FirstFailure:
    """Remembers the first test that fails, or file that cannot be collected."""

    def __init__(self) -> None:
        self.name: str | None = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.name is None:
            self.name = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and self.name is None:
            self.name = f"{report.nodeid} (cannot be collected)"


def first_failure(copy: Path, tests: list[str]) -> str | None:
    """Run tests on a copy of the repository, in a process of its own, until one fails.

    Args:
        copy (Path): The copy.
        tests (list[str]): Files, folders or single tests, relative to its folder of tests.

    Returns:
        str | None: The test that failed; None if none did.
    """
    told = copy / "first_failure.json"
    child = os.fork()
    if child == 0:
        os.setsid()  # its own processes end with it
        _run_tests(copy, tests, told)
    end = time.monotonic() + PATIENCE_S
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "(it hangs)"
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):  # what a test has left running
        os.killpg(child, signal.SIGKILL)
    return json.loads(told.read_text()) if told.is_file() else "(the process of the tests died)"


def _run_tests(copy: Path, tests: list[str], told: Path) -> None:
    """Run tests in a forked process, write down which failed first, and end the process."""
    os.chdir(copy)
    log = os.open(copy / "log.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(PYTHONPATH=str(copy), OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(copy))
    sys.modules["__main__"] = ModuleType("__main__")  # or processes that tests spawn would run this script first
    failure = _FirstFailure()
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=-m 'not slow'"]
    code = pytest.main([*options, *(str(copy / "tests" / name) for name in tests)], plugins=[failure])
    if code not in (0, 1) and failure.name is None:
        failure.name = f"(pytest ended with {int(code)})"
    told.write_text(json.dumps(failure.name))
    os._exit(0)


def tried(mutant: Mutant, known: str | None = None, is_quick: bool = False) -> dict[str, Any]:
    """What became of a mutant: its state, the test that killed it, and the seconds it took.

    Args:
        mutant (Mutant): Which one.
        known (str, optional): A test that killed it before, to be run first.
        is_quick (bool): Whether to leave out the tests of its room. Defaults to False.
    """
    start = time.perf_counter()
    failure = None
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        shutil.copytree(ROOT, copy, ignore=_LEFT_OUT, symlinks=True)
        problem = mutant.written_into(copy / "infobatch_mm")
        stages = [[known.removeprefix("tests/")]] if known else []
        for tests in [*stages, mutant.first, *([] if is_quick else [mutant.room])]:
            # A test that was known may be gone; pytest refuses names that it does not find.
            if problem is None and failure is None:
                failure = first_failure(copy, tests)
                failure = None if failure and failure.startswith("(pytest ended") else failure
    state = problem or ("survived" if failure is None else "killed")
    return {"name": mutant.name, "state": state, "test": failure, "seconds": round(time.perf_counter() - start, 1)}


def main() -> None:
    """Try all mutants, or some, and say which survive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="names, or beginnings of names")
    parser.add_argument("--quick", action="store_true", help="leave out the tests of the rooms")
    parser.add_argument("--before", type=Path, metavar="RESULTS", help="JSON of an earlier run")
    parser.add_argument("--json", type=Path, metavar="OUT", help="where to write the results")
    arguments = parser.parse_args()
    known = (
        {each["name"]: each["test"] for each in json.loads(arguments.before.read_text())} if arguments.before else {}
    )
    for host in _HOSTS:
        with contextlib.suppress(ImportError):
            importlib.import_module(host)
    assert "infobatch_mm" not in sys.modules
    results = []
    for mutant in all_mutants():
        if not mutant.name.startswith(tuple(arguments.only)):
            continue
        results.append(result := tried(mutant, known.get(mutant.name), arguments.quick))
        print(f"{result['name']:48} {result['state']:9} {result['seconds']:6} s  {result['test'] or ''}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    killed = sum(result["state"] == "killed" for result in results)
    print(f"{killed} of {len(results)} mutants were killed")


if __name__ == "__main__":
    main()
