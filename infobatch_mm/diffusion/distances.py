"""Frechet and kernel distance between samples and real images, FID and KID among them, by torch-fidelity."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset, Subset

from .features import FIRST_STAGE, INCEPTION, torch_fidelity  # which says what to install where it is missing


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
    """Compute Frechet and kernel distance of samples to real images, by torch-fidelity, in one space of features.

    In Inception's features they are the FID (Heusel et al., NeurIPS 2017) and the KID (Binkowski et al., ICLR 2018). In
    a first stage's they are the same formulas on other features: numbers of different first stages have no common
    scale, and none is an FID. Frechet distances fall with more samples: compare them at equal numbers of samples and
    real images. Kernel distances have no such bias, and may be below zero.

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
        real_name (str, optional): Name of these real images in the cache; other images need another name.

    Returns:
        dict[str, float]: ``frechet``, ``kernel_mean`` and ``kernel_std``, the last over subsets.

    Raises:
        ValueError: If there are fewer images than a subset has, or not exactly one space is named.
    """
    if (inception is None) == (first_stage is None):
        raise ValueError("name either Inception's weights or a first stage")
    check_counts(len(samples), len(real), subset_size)  # type: ignore[arg-type]
    name, weights = (FIRST_STAGE, first_stage) if inception is None else (INCEPTION, inception)
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
    """Refuse too few samples or real images for the subsets of the kernel distance.

    Raises:
        ValueError: With all three numbers.
    """
    if not 2 <= subset_size <= min(num_samples, num_real):
        raise ValueError(
            f"the kernel distance compares {subset_size} samples with as many real images, at least 2, but there are "
            f"{num_samples} samples and {num_real} real images: use more of them, or a smaller --kid_subset_size"
        )
