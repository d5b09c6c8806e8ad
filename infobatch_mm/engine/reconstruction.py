"""Pictures of what a masked-image model makes of its training images."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop
from torch import Tensor, nn

from ..core import rng
from .loader import IndexedLoader
from .process_state import bare_model
from .takeover import check_runner

# Small images are enlarged to at least this many pixels.
_SMALLEST = 96


@HOOKS.register_module()
class ReconstructionHook(Hook):
    """Draws, at intervals, training images, what a masked-image model sees of them, and what it makes of that.

    For MMPretrain's models that predict pixels: MAE and its kin, SimMIM, SparK. The picture goes to the runner's
    visualizer as ``reconstruction``: a column for each image, which is always the same crop under the same mask;
    visible patches of the reconstruction are the image's own, and so are, with ``norm_pix``, mean and contrast of the
    hidden ones, which the model does not predict. Training goes on as if nothing had been drawn.

    Args:
        interval (int): Epochs, or iterations, between pictures, at least 1. Defaults to 10.
        num_images (int): Images, spread evenly over the data set, at least 1. Defaults to 8.
        by_epoch (bool, optional): Whether ``interval`` counts epochs. Defaults to what the training loop counts.
        seed (int): Seed of crops and masks, at least 0. Defaults to 0.

    Raises:
        ValueError: If an argument is out of its range; before training starts, if the model predicts no pixels, or
            is sharded.

    Images are read in the main process, and shown in the channels' order that the model sees.

    Example:
        >>> default_hooks = dict(reconstruction=dict(type='infobatch_mm.engine.ReconstructionHook', interval=10))
    """

    # After InfoBatchHook, for which the iteration is then over.
    priority = "LOW"

    def __init__(self, interval: int = 10, num_images: int = 8, by_epoch: bool | None = None, seed: int = 0) -> None:
        for name, value, least in (("interval", interval, 1), ("num_images", num_images, 1), ("seed", seed, 0)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"ReconstructionHook has {name}={value}: use a whole number, at least {least}")
        self.interval = interval
        self.num_images = num_images
        self.by_epoch = by_epoch
        self.seed = seed

    def before_train(self, runner: Any) -> None:
        """Refuse a model that predicts no pixels, or of which one process has a part only."""
        check_runner(runner)
        _reader(bare_model(runner))
        if self.by_epoch is None:
            self.by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)

    def after_train_epoch(self, runner: Any) -> None:
        """Draw after every so many epochs."""
        if self.by_epoch and self.every_n_epochs(runner, self.interval):
            self._draw(runner, runner.epoch + 1)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Draw after every so many iterations."""
        if not self.by_epoch and self.every_n_train_iters(runner, self.interval):
            self._draw(runner, runner.iter + 1)

    @master_only
    def _draw(self, runner: Any, step: int) -> None:
        loader = runner.train_dataloader
        collate = loader.host_collate_fn if isinstance(loader, IndexedLoader) else loader.collate_fn
        size, model = len(loader.dataset), bare_model(runner)
        # In the middle of equal parts: a repeated data set begins again at the edges of some.
        number = min(self.num_images, size)
        places = ((np.arange(number) + 0.5) * size / number).astype(int).tolist()
        with _seeded(self.seed, next(model.parameters()).device):
            rows = reconstruct(model, collate([loader.dataset[place] for place in places]))
        runner.visualizer.add_image("reconstruction", _picture(rows), step)


def reconstruct(model: nn.Module, data: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What a masked-image model sees of images, and what it makes of that.

    Args:
        model (nn.Module): A model of MMPretrain that predicts pixels.
        data (dict): A collated batch, as the model's data preprocessor takes it.

    Returns:
        tuple: Images, images with the masked patches grey, and images with their reconstruction in these
        places, each of shape ``(B, 3, H, W)``, float32, in [0, 255], on the CPU.

    Raises:
        ValueError: If the model predicts no pixels.
    """
    loss, read = _reader(model)
    calls: list[inspect.BoundArguments] = []
    signature = inspect.signature(type(loss).forward)

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.append(signature.bind(module, *args, **kwargs))

    handle = loss.register_forward_pre_hook(note, with_kwargs=True)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # no statistics are learned from these images
    try:
        with torch.no_grad():
            batch = model.data_preprocessor(data, False)
            model.loss(**batch)
    finally:
        handle.remove()
        for module, training in modes:
            module.training = training
    images = batch["inputs"]
    if not calls:
        raise ValueError(f"{type(model.head).__name__} has not called its loss module: its prediction cannot be drawn")
    predicted, mask = read(images, *calls[-1].args[1:])
    preprocessor = model.data_preprocessor
    mean, std = getattr(preprocessor, "mean", 0.0), getattr(preprocessor, "std", 1.0)
    images, predicted = ((values.float() * std + mean).clamp(0, 255).cpu() for values in (images, predicted))
    hidden = mask.bool().cpu()
    return images, torch.where(hidden, 127.5, images), torch.where(hidden, predicted, images)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from the generators of the process and of the device under a seed, then put them back."""
    on_cpu = device.type == "cpu"
    fork = nullcontext() if on_cpu else torch.random.fork_rng([device], device_type=device.type)
    with fork, rng.seeded((seed,)):
        if not on_cpu:
            torch.get_device_module(device).manual_seed(seed)
        yield


def _reader(model: nn.Module) -> tuple[nn.Module, Callable[..., tuple[Tensor, Tensor]]]:
    """A model's loss module, and how to read reconstructions and masks, ``(B, C, H, W)``, from what it is given."""
    try:
        from mmpretrain.models import heads
    except ImportError as error:
        raise ImportError("ReconstructionHook needs MMPretrain: pip install 'infobatch_mm[mm]'") from error
    head = getattr(model, "head", None)
    if isinstance(head, heads.SimMIMHead):
        return head.loss_module, lambda images, predicted, target, mask: (predicted, mask)
    if isinstance(head, heads.SparKPretrainHead):
        return head.loss, lambda images, *given: _from_patches(head, images, *given)
    if isinstance(head, heads.MAEPretrainHead) and not isinstance(head, heads.MixMIMPretrainHead):
        return head.loss_module, lambda images, *given: _from_patches(head, images, *given)
    raise ValueError(
        f"ReconstructionHook cannot draw what {type(model).__name__} with {type(head).__name__} predicts: it draws the "
        "pixels of MAE's, SimMIM's and SparK's heads; remove it from the config"
    )


def _from_patches(head: Any, images: Tensor, predicted: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Put patches, shape ``(B, L, p * p * C)``, together; normalised targets get the image's own contrast back."""
    if head.norm_pix:
        own = head.patchify(images)
        predicted = predicted * (own.var(dim=-1, keepdim=True) + 1e-6) ** 0.5 + own.mean(dim=-1, keepdim=True)
    pixels = mask[..., None].expand_as(predicted)
    return _put_together(predicted, images, head.patch_size), _put_together(pixels, images, head.patch_size)


def _put_together(patches: Tensor, images: Tensor, size: int) -> Tensor:
    """Images of patches in rows, each with its channels last."""
    batch, channels, height, width = images.shape
    grid = patches.reshape(batch, height // size, width // size, size, size, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(images.shape)


def _picture(rows: tuple[Tensor, ...]) -> np.ndarray:
    """One picture of rows of images, shape ``(H, W, 3)``, uint8."""
    from torchvision.utils import make_grid

    images = torch.cat(rows)
    factor = -(-_SMALLEST // images.shape[-1])
    images = images.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    grid = make_grid(images, nrow=len(rows[0]), padding=4, pad_value=255)
    return grid.round().byte().permute(1, 2, 0).contiguous().numpy()
