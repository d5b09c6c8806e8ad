"""The codes of a VQModel in training, kept in use."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from diffusers import VQModel
from torch import Tensor


class Codebook:
    """Keeps a VQModel's codes in use: a code that no latent is near to gets no gradient, and would never get one.

    For the first tenth of the training the model is a plain autoencoder. Then the codes are drawn from its latents.
    Until the middle of the training, codes that were nearest to no recent latent are drawn again.

    Args:
        vae (VQModel): The model.
        accelerator (Accelerator): The run's; all processes draw the same codes.
        steps (int): Length of the training.
        seed (int): Seed of the draws.
    """

    #: Latest batches whose latents are kept to draw from.
    BATCHES = 8

    def __init__(self, vae: VQModel, accelerator: Accelerator, steps: int, seed: int) -> None:
        self._vae = vae
        self._accelerator = accelerator
        self._start = max(1, steps // 10)
        self._end = max(self._start, steps // 2)
        self._interval = max(1, steps // 50)
        # A generator of its own: the processes' global ones have drawn other numbers, and their codes would differ.
        self._generator = torch.Generator().manual_seed(seed)
        self._latents: list[Tensor] = []

    def used_at(self, step: int) -> bool:
        """Whether the model quantises in a step, counted from 0."""
        return step >= self._start

    def after_step(self, step: int, latents: Tensor) -> None:
        """Draw codes where it is time; every process calls it after each step.

        Args:
            step (int): The step that was done, from 0.
            latents (Tensor): This process's latents before quantisation, shape ``(B, C, h, w)``.
        """
        if step >= self._end:
            return
        self._latents = [*self._latents[1 - self.BATCHES :], latents.movedim(1, -1).flatten(0, -2).float()]
        codes = self._vae.quantize.embedding.weight
        if step + 1 == self._start:
            codes.data.copy_(self._draw(len(codes)))
        elif self.used_at(step) and (step + 1 - self._start) % self._interval == 0:
            counts = torch.bincount(torch.cdist(torch.cat(self._latents), codes.data).argmin(1), minlength=len(codes))
            unused = self._accelerator.reduce(counts) == 0  # by no process: a code may serve one of them alone
            codes.data[unused] = self._draw(int(unused.sum()))

    def _draw(self, count: int) -> Tensor:
        """Draw from the latents of all processes, with a little noise, so that no two codes are the same.

        Returns:
            Tensor: Shape ``(count, C)``, the same on every process.
        """
        # Every process holds equally many latents, so that they can be gathered.
        everyones = self._accelerator.gather(torch.cat(self._latents))
        chosen = torch.randint(len(everyones), (count,), generator=self._generator)
        noise = torch.randn(count, everyones.shape[1], generator=self._generator).to(everyones)
        return everyones[chosen.to(everyones.device)] + 0.01 * everyones.std(0) * noise
