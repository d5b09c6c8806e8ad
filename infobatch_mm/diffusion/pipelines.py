"""The pipeline that a training leaves behind: made of its parts, and loaded again."""

from __future__ import annotations

from pathlib import Path

from diffusers import DDIMScheduler, DDPMScheduler, LDMPipeline, UNet2DModel
from torch import nn

from .first_stage import FirstStage, check_fits, load_first_stage

#: Settings of a UNet that must fit the first stage.
_OF_THE_LATENTS = ("in_channels", "out_channels", "sample_size", "block_out_channels")


def build_pipeline(vae: FirstStage, model: nn.Module, noise_scheduler: DDPMScheduler) -> LDMPipeline:
    """Make the pipeline that samples from a model by DDIM.

    Args:
        vae (VQModel | AutoencoderKL): The first stage.
        model (UNet2DModel): The trained model.
        noise_scheduler (DDPMScheduler): The schedule that it was trained with.

    Returns:
        LDMPipeline: Holding these very modules, not copies.
    """
    # The last step goes to the first timestep of the schedule, as it does in latent diffusion's own sampler.
    sampler = DDIMScheduler.from_config(noise_scheduler.config, set_alpha_to_one=False, steps_offset=1)
    return LDMPipeline(vqvae=vae, unet=model, scheduler=sampler)


def load_pipeline(folder: str | Path) -> LDMPipeline:
    """Load the pipeline of a finished training; nothing is downloaded.

    Args:
        folder (str | Path): Folder of a saved ``LDMPipeline``.

    Returns:
        LDMPipeline: On the CPU, in evaluation mode, sampling by DDIM.

    Raises:
        ValueError: If there is none, if files of it are missing or damaged, if weights are not finite, or if its parts
            do not fit each other.
    """
    if not Path(folder, "model_index.json").is_file():
        raise ValueError(
            f"{folder} holds no finished training: tools/train_ldm.py leaves an LDMPipeline (model_index.json) behind"
        )
    vae = load_first_stage(str(folder))
    try:
        unet, info = UNet2DModel.from_pretrained(
            folder, subfolder="unet", output_loading_info=True, local_files_only=True
        )
        # DDIM, whatever scheduler the pipeline was saved with
        scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler", local_files_only=True)
    except Exception as error:  # of damaged files diffusers raises almost anything
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"cannot load the pipeline {folder}: {reason}") from error
    # diffusers fills missing weights with random ones, and only warns: the numbers would be of another model
    if missing := info["missing_keys"]:
        raise ValueError(f"{folder}: {len(missing)} weights of the UNet are not in its file, such as {missing[0]}")
    for part in (vae, unet):
        if damaged := [name for name, weight in part.state_dict().items() if not weight.isfinite().all()]:
            # A VQ model decodes NaN to a picture like any other: the damage would go unnoticed.
            raise ValueError(
                f"{folder}: {len(damaged)} weights of the {type(part).__name__} are not finite, such as {damaged[0]}: "
                "the training diverged, or the file is damaged"
            )
    pipeline = LDMPipeline(vqvae=vae, unet=unet.eval(), scheduler=scheduler)
    check_fits(vae, {name: unet.config[name] for name in _OF_THE_LATENTS}, resolution_of(pipeline))
    return pipeline


def resolution_of(pipeline: LDMPipeline) -> int:
    """Width and height of a pipeline's samples in pixels."""
    return pipeline.unet.config.sample_size * 2 ** (len(pipeline.vqvae.config.block_out_channels) - 1)
