"""Train an unconditional latent-diffusion model, pruned by InfoBatch: what ``infobatch-mm train-ldm`` does.

python tools/train_ldm.py --config configs/ldm/RECIPE.yaml --train_data_dir DIR --vae DIR --output_dir DIR
accelerate launch tools/train_ldm.py --config ... --resume_from_checkpoint latest
"""

from infobatch_mm.cli.subcommands import run

if __name__ == "__main__":
    run("train-ldm")
