"""Build all of a training and wire it, as far as a run goes before its first step; then stop.

    python tools/_preflight.py CONFIG --work-dir DIR [--cfg-options k=v ...]

Ends with status 0 if the config could be trained; what is wrong with it is an error as of the training itself.
"""

from __future__ import annotations

import argparse
from typing import Any

from _config import add_common_arguments, load_config
from mmengine.hooks import Hook
from mmengine.registry import RUNNERS
from mmengine.runner import Runner


class _Wired(Exception):
    """All hooks have seen the run."""


class _Stop(Hook):
    """Ends a run where its training would begin."""

    def before_run(self, runner: Any) -> None:
        raise _Wired


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Build all of a training, and train nothing")
    parser.add_argument("config", help="path of the config file")
    add_common_arguments(parser)
    cfg = load_config(parser.parse_args())
    if cfg.get("visualizer"):  # no experiment is to be begun on a tracker's server
        cfg.visualizer.vis_backends = [dict(type="LocalVisBackend")]
    runner = RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)
    runner.register_hook(_Stop(), priority="LOWEST")
    try:
        runner.train()
    except _Wired:
        return


if __name__ == "__main__":
    main()
