"""Train an unconditional latent-diffusion model, pruned by InfoBatch, on a folder of images.

infobatch-mm train-ldm --config configs/ldm/RECIPE.yaml --train_data_dir DIR --vae DIR --output_dir DIR
accelerate launch -m infobatch_mm.cli.train_ldm --config ... --resume_from_checkpoint latest
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ..diffusion.options import parse_options
from ..diffusion.training import train


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says.

    Args:
        argv (Sequence[str], optional): The arguments. Defaults to the command line of this process.
    """
    args = parse_options(argv)
    try:
        train(args)
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


if __name__ == "__main__":
    main()
