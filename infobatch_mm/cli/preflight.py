"""Build all of a training and wire it, as far as a run goes before its first step; then stop.

    python -m infobatch_mm.cli.preflight CONFIG --work-dir DIR [--cfg-options k=v ...]

Ends with status 0 if the config could be trained; what is wrong with it is an error as of the training itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from mmengine.hooks import Hook

from .config import add_common_arguments, load_config
from .train import build_runner


class _Wired(Exception):
    """All hooks have seen the run."""


class _Stop(Hook):
    """Ends a run where its training would begin."""

    def before_run(self, runner: Any) -> None:
        raise _Wired


def main(argv: Sequence[str] | None = None) -> None:
    """Build what the command line names."""
    parser = argparse.ArgumentParser(description="Build all of a training, and train nothing")
    parser.add_argument("config", help="path of the config file")
    add_common_arguments(parser)
    cfg = load_config(parser.parse_args(argv))
    if cfg.get("visualizer"):  # no experiment is to be begun on a tracker's server
        cfg.visualizer.vis_backends = [dict(type="LocalVisBackend")]
    runner = build_runner(cfg)
    runner.register_hook(_Stop(), priority="LOWEST")
    try:
        runner.train()
    except _Wired:
        return


if __name__ == "__main__":
    main()
