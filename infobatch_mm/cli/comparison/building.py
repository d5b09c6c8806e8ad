"""Configs are built, each in a process of its own, before any is trained."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..subcommands import command

# Processes at once: each imports its host, and holds a model.
_AT_ONCE = 4


def check_built(parser: argparse.ArgumentParser, configs: dict[Path, list[str]]) -> None:
    """Refuse a config that cannot be built: a typo in the second must not wait until the first is trained.

    Args:
        parser (ArgumentParser): Tells the user, and ends the process.
        configs (dict[Path, list[str]]): Overrides of each config.
    """
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(_AT_ONCE) as pool:
        built = [
            pool.submit(_build, config, options, f"{folder}/{number}")
            for number, (config, options) in enumerate(configs.items())
        ]
        results = [each.result() for each in built]
    for config, result in zip(configs, results, strict=True):
        if result.returncode:
            print("".join(result.stdout.splitlines(keepends=True)[-25:]), file=sys.stderr)
            parser.error(f"{config} cannot be trained, for the reason above; nothing was trained")


def _build(config: Path, options: list[str], work_dir: str) -> subprocess.CompletedProcess[str]:
    arguments = [str(config), "--work-dir", work_dir, *(["--cfg-options", *options] if options else [])]
    return subprocess.run(
        [*command("infobatch_mm.cli.preflight"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
