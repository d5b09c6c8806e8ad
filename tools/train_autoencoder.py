"""Train a small first stage of latent diffusion on a folder of images: what ``infobatch-mm train-autoencoder`` does.

python tools/train_autoencoder.py --train_data_dir data/faces --resolution 64 --output_dir work_dirs/vq
accelerate launch tools/train_autoencoder.py --train_data_dir ...
"""

from infobatch_mm.cli.subcommands import run

if __name__ == "__main__":
    run("train-autoencoder")
