"""Forecast what pruning is worth on a training, from a checkpoint of it: ``infobatch-mm plan``.

python tools/plan.py CONFIG --checkpoint CKPT [--samples 256] [--scores WORK_DIR] [--json FILE]
"""

from infobatch_mm.cli.subcommands import run

if __name__ == "__main__":
    run("plan")
