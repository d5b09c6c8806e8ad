"""Train a model from a config, with or without InfoBatch: ``infobatch-mm train``.

python tools/train.py CONFIG [--work-dir DIR] [--resume [CHECKPOINT]] [--cfg-options k=v ...]
"""

from infobatch_mm.cli.subcommands import run

if __name__ == "__main__":
    run("train")
