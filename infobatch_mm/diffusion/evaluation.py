"""What a finished latent-diffusion model is worth: samples, their distance to real images, and its held-out loss.

Distances are computed by torch-fidelity, in the feature space of Inception if its weights are at hand, and in that of
the model's own first stage always.
"""

from __future__ import annotations

import hashlib
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from torch.utils.data import Dataset, Subset
from tqdm.auto import tqdm

from ..core import rng
from .denoising import log_snr
from .first_stage import check_fits, fingerprint, load_first_stage
from .images import Images

try:
    import torch_fidelity
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.utils import create_feature_extractor
except ImportError as error:
    raise ImportError(
        "infobatch_mm.diffusion.evaluation needs torch-fidelity: pip install 'infobatch_mm[diffusers]'"
    ) from error

#: Distinguishes the noise of samples from the draws of any pass.
_SAMPLES = 2**31 + 1
#: Settings of a UNet that must fit the first stage.
_OF_THE_LATENTS = ("in_channels", "out_channels", "sample_size", "block_out_channels")
#: Names, within torch-fidelity, of what gives the features of its own FID, and of ours.
_INCEPTION, _FIRST_STAGE = "inception-v3-compat", "infobatch-mm-first-stage"


def load_pipeline(folder: str | Path) -> LDMPipeline:
    """Load what a finished training left behind; nothing is downloaded.

    Args:
        folder (str | Path): Of a saved ``LDMPipeline``.

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
        # whatever the pipeline was saved with
        scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler", local_files_only=True)
    except Exception as error:  # of damaged files diffusers raises almost anything
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"cannot load the pipeline {folder}: {reason}") from error
    # diffusers makes up what is missing, and only warns
    if missing := info["missing_keys"]:
        raise ValueError(f"{folder}: {len(missing)} weights of the UNet are not in its file, such as {missing[0]}")
    for part in (vae, unet):
        if damaged := [name for name, weight in part.state_dict().items() if not weight.isfinite().all()]:
            # A VQ model decodes NaN to a picture like any other: it would go unnoticed.
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


def sample(
    pipeline: LDMPipeline,
    num_samples: int,
    num_inference_steps: int = 50,
    eta: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
) -> Tensor:
    """Draw samples, each from a generator of its own.

    Sample i depends on seed and i alone: not on the batch it is drawn in (to rounding), nor on how many there are. Two
    models of equal latents start from equal noise.

    Args:
        pipeline (LDMPipeline): On any device.
        num_samples (int): N.
        num_inference_steps (int): Steps of DDIM (Song et al., ICLR 2021). Defaults to 50.
        eta (float): 0 for deterministic steps, 1 for those of DDPM. Defaults to 0.
        seed (int): At least 0. Defaults to 0.
        batch_size (int): Samples at once. Defaults to 64.

    Returns:
        Tensor: Shape ``(N, 3, R, R)``, uint8, on the CPU: what the pipeline would save as PNG.
    """
    # One of our own, to change its steps: LDMPipeline gives their noise (eta > 0) no generator.
    sampler = LDMPipeline(pipeline.vqvae, pipeline.unet, DDIMScheduler.from_config(pipeline.scheduler.config))
    sampler.set_progress_bar_config(disable=True)
    step = sampler.scheduler.step
    resolution = resolution_of(pipeline)
    samples = torch.empty(num_samples, 3, resolution, resolution, dtype=torch.uint8, device="cpu")
    bar = tqdm(total=num_samples, desc="sampling", unit="image")
    for part in torch.arange(num_samples, device="cpu").split(batch_size):
        generators = [rng.generator(seed, _SAMPLES, int(index)) for index in part]
        sampler.scheduler.step = partial(step, generator=generators)
        images = sampler(
            len(part), generators, eta=eta, num_inference_steps=num_inference_steps, output_type="np"
        ).images
        samples[part] = torch.from_numpy((images * 255).round().astype("uint8")).permute(0, 3, 1, 2)
        bar.update(len(part))
    bar.close()
    return samples


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as numbers of 0 to 255, any shape; exact for those that were such numbers before."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class RealPixels(Dataset):
    """Images as torch-fidelity takes them: shape ``(3, R, R)``, uint8; the middle of each, not mirrored.

    Args:
        images (Images): N of them.
    """

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return to_uint8(self.images.fixed(index))


class FirstStageFeatures(FeatureExtractorBase):
    """For torch-fidelity: what the encoder of a first stage sees in the four quarters of an image.

    The features are the activations after the encoder's middle block, the deepest it has, averaged over each quarter:
    averages over the whole image would not tell a face from the same face upside down. Their name has the fingerprint
    of the first stage: features of different ones are never taken for each other.

    Args:
        name (str): As registered.
        features_list (list[str]): ``['mid_block']``.
        feature_extractor_weights_path (str): Folder of the first stage, as for :func:`.load_first_stage`.
    """

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str, **_: Any) -> None:
        super().__init__(name, features_list)
        self.vae = load_first_stage(feature_extractor_weights_path)
        self._name = f"{name}-{fingerprint(self.vae)}"

    def get_name(self) -> str:
        return self._name

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("mid_block",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "mid_block"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, input: Tensor) -> tuple[Tensor]:
        """From images ``(B, 3, R, R)``, uint8, to features ``(B, 4 C)``, float64."""
        seen: list[Tensor] = []
        hook = self.vae.encoder.mid_block.register_forward_hook(lambda module, given, output: seen.append(output))
        try:
            self.vae.encoder(input.float() / 127.5 - 1)
        finally:
            hook.remove()
        # torch-fidelity averages in the precision it is given
        return (adaptive_avg_pool2d(seen[0].double(), 2).flatten(1),)


torch_fidelity.register_feature_extractor(_FIRST_STAGE, FirstStageFeatures)


def check_inception(path: str | Path) -> str:
    """Refuse a file that holds no weights of torch-fidelity's Inception.

    Args:
        path (str | Path): The file.

    Returns:
        str: Its SHA-256 in hexadecimal: torch-fidelity's own file begins with ``6726825d``.

    Raises:
        ValueError: If it is missing, damaged, or of something else.
    """
    try:
        content = Path(path).read_bytes()
        torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity's own reading runs what is pickled
        create_feature_extractor(
            _INCEPTION, ["2048"], cuda=False, feature_extractor_weights_path=str(path), verbose=False
        )
    except Exception as error:  # of a damaged file torch raises almost anything
        reason = textwrap.shorten(str(error), 200, placeholder=" ...")
        raise ValueError(
            f"cannot use the Inception weights {path} ({reason}): name the file of torch-fidelity's releases, "
            "weights-inception-2015-12-05-6726825d.pth, or do without"
        ) from error
    return hashlib.sha256(content).hexdigest()


def distances(
    samples: Tensor,
    real: Dataset,
    *,
    inception: str | Path | None = None,
    first_stage: str | Path | None = None,
    batch_size: int = 64,
    subset_size: int = 1000,
    subsets: int = 100,
    cuda: bool = False,
    workers: bool = False,
    cache_dir: str | Path | None = None,
    real_name: str | None = None,
) -> dict[str, float]:
    """Frechet and kernel distance of samples to real images, by torch-fidelity, in one space of features.

    With Inception's they are the FID (Heusel et al., NeurIPS 2017) and KID (Binkowski et al., ICLR 2018). With a first
    stage's, the same formulas on other features: numbers of different first stages have no common scale, and none is an
    FID. Frechet distances fall with more samples; compare them at equal numbers of samples and real images. Kernel
    distances have no such bias, and may be below zero.

    Args:
        samples (Tensor): Shape ``(N, 3, R, R)``, uint8.
        real (Dataset): M items of shape ``(3, R, R)``, uint8.
        inception (str | Path, optional): File of Inception's weights.
        first_stage (str | Path, optional): Folder of the first stage. One of the two is needed.
        batch_size (int): Images at once. Defaults to 64.
        subset_size (int): Images of each side in a kernel distance. Defaults to 1000.
        subsets (int): How many kernel distances are averaged; which images they take is always the same. Defaults to
            100.
        cuda (bool): Whether to compute features on the GPU. Defaults to False.
        workers (bool): Whether processes of their own read the images, as many as torch-fidelity likes. Defaults to
            False.
        cache_dir (str | Path, optional): Where features of the real images are kept for the next call. Defaults to
            None: nowhere.
        real_name (str, optional): What tells these real images from others in the cache.

    Returns:
        dict[str, float]: ``frechet``, ``kernel_mean`` and ``kernel_std``, the last over subsets.

    Raises:
        ValueError: If there are fewer images than a subset has, or not exactly one space is named.
    """
    if (inception is None) == (first_stage is None):
        raise ValueError("name either Inception's weights or a first stage")
    check_counts(len(samples), len(real), subset_size)  # type: ignore[arg-type]
    name, weights = (_FIRST_STAGE, first_stage) if inception is None else (_INCEPTION, inception)
    found = torch_fidelity.calculate_metrics(
        input1=Subset(samples, range(len(samples))),  # type: ignore[arg-type] # which makes a data set of a tensor
        input2=real,
        input2_cache_name=real_name if cache_dir is not None else None,
        cache=cache_dir is not None,
        cache_root=None if cache_dir is None else str(cache_dir),
        feature_extractor=name,
        feature_extractor_weights_path=str(weights),
        fid=True,
        kid=True,
        kid_subset_size=subset_size,
        kid_subsets=subsets,
        batch_size=batch_size,
        cuda=cuda,
        save_cpu_ram=not workers,
        verbose=False,
    )
    return {
        "frechet": found[torch_fidelity.KEY_METRIC_FID],
        "kernel_mean": found[torch_fidelity.KEY_METRIC_KID_MEAN],
        "kernel_std": found[torch_fidelity.KEY_METRIC_KID_STD],
    }


def check_counts(num_samples: int, num_real: int, subset_size: int) -> None:
    """Refuse what is too few for the kernel distance's subsets.

    Raises:
        ValueError: With all three numbers.
    """
    if not 2 <= subset_size <= min(num_samples, num_real):
        raise ValueError(
            f"the kernel distance compares {subset_size} samples with as many real images, at least 2, but there are "
            f"{num_samples} samples and {num_real} real images: use more of them, or a smaller --kid_subset_size"
        )


def loss_by_band(losses: Tensor, scheduler: Any, bands: int) -> list[dict[str, float]]:
    """Mean loss in equal parts of the noise schedule.

    Args:
        losses (Tensor): Shape ``(N, D)``, as of :func:`.losses_over_timesteps`: draw d lies in the d-th of D equal
            parts of the schedule. D is a multiple of ``bands``.
        scheduler (DDPMScheduler): The schedule, of T timesteps.
        bands (int): How many parts, B.

    Returns:
        list[dict[str, float]]: From little noise to much: ``first_timestep`` and ``last_timestep``, both included
        (where T does not divide by D, bands may share the timestep between them), ``log_snr``, the mean of
        ln(signal power / noise power) over them, and ``loss``. The mean over bands is that of ``losses``.

    Raises:
        ValueError: If the draws do not divide by the bands.
    """
    draws = losses.shape[1]
    check_bands(draws, bands)
    num_timesteps = scheduler.config.num_train_timesteps
    rows: list[dict[str, float]] = []
    for band, part in enumerate(losses.chunk(bands, dim=1)):
        begin, end = band * part.shape[1], (band + 1) * part.shape[1]
        first, last = begin * num_timesteps // draws, (end * num_timesteps - 1) // draws
        level = log_snr(scheduler, torch.arange(first, last + 1, device="cpu")).double().mean()
        rows.append(
            {"first_timestep": first, "last_timestep": last, "log_snr": float(level), "loss": float(part.mean())}
        )
    return rows


def check_bands(draws: int, bands: int) -> None:
    """Refuse draws that do not divide evenly among bands.

    Raises:
        ValueError: With both numbers.
    """
    if bands < 1 or draws < 1 or draws % bands:
        raise ValueError(
            f"--draws_per_image {draws} does not divide by --timestep_bands {bands}: each band gets as many draws as "
            "any other"
        )
