"""Train a pair of configs, unpruned and pruned, and set them side by side: ``infobatch-mm compare``.

python tools/compare.py UNPRUNED PRUNED [--seeds 0 1] [--shortened] [--random] [--metric NAME]
    [--then CONFIG] [--then-options k=v ...] [--work-dir DIR] [--cfg-options k=v ...]
"""

from infobatch_mm.cli.subcommands import run

if __name__ == "__main__":
    run("compare")
