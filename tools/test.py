"""Evaluate a checkpoint by the test settings of its config: ``infobatch-mm test``.

python tools/test.py CONFIG CHECKPOINT [--work-dir DIR] [--out DIR] [--show-dir DIR] [--tta]
"""

from infobatch_mm.cli.subcommands import run

if __name__ == "__main__":
    run("test")
