"""Train a latent-diffusion model without and with InfoBatch, and compare: ``infobatch-mm compare-ldm``.

python tools/compare_ldm.py configs/ldm/FULL.yaml configs/ldm/PRUNED.yaml --work_dir DIR [--seeds 0 1] [--shortened]
    [--random] [--scores raw ema timestep] -- --train_data_dir DIR --vae DIR --eval_data_dir DIR ...
"""

from infobatch_mm.cli.subcommands import run

if __name__ == "__main__":
    run("compare-ldm")
