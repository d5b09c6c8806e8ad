"""Measure finished latent-diffusion models: what ``infobatch-mm eval-ldm`` does.

python tools/eval_ldm.py RUN [RUN ...] --train_data_dir DIR [--eval_data_dir DIR] [--inception FILE]
"""

from infobatch_mm.cli.subcommands import run

if __name__ == "__main__":
    run("eval-ldm")
