"""The training of an unconditional latent-diffusion model, pruned by InfoBatch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm.auto import tqdm

from ..accelerated import AcceleratedInfoBatch
from ..core import PruningPolicy, build_policy
from ..core.score_rule import build_score
from .checkpoints import check_identity, find_checkpoint, run_identity, save_checkpoint, set_aside
from .denoising import Denoising, draw, held_out_loss, log_snr, predictor
from .encoding import all_encoded, to_latents
from .first_stage import FirstStage, fingerprint, latent_shape
from .pipelines import build_pipeline
from .sampling import averaged, save_samples
from .training_setup import (
    TrainingImages,
    build_accelerator,
    build_denoising,
    build_loader,
    build_lr_scheduler,
    build_optimizer,
    loggable,
    open_first_stage,
    open_training_images,
)

#: In the output folder: what was measured at the end.
METRICS_FILE = "metrics.json"


def train(args: argparse.Namespace) -> None:
    """Train, or go on with, the model that the options describe; leave its pipeline, samples and summary behind.

    Args:
        args (argparse.Namespace): Options of :func:`.parse_options`.

    Raises:
        ValueError: If images, first stage, options and checkpoint do not fit together.
    """
    checkpoint = find_checkpoint(Path(args.output_dir), args.resume_from_checkpoint)
    # Values out of range are refused before anything is read.
    policy = build_policy(args.policy, args.prune_ratio, args.delta, args.prune_quantile)
    build_score(args.score, args.score_ema)
    denoising = build_denoising(args)
    accelerator = build_accelerator(args)
    vae = open_first_stage(args, accelerator.device)
    identity = run_identity(args, fingerprint(vae))
    if checkpoint is not None:
        check_identity(checkpoint, identity)
    images = open_training_images(args, vae, accelerator)
    training = LatentDiffusionTraining(args, accelerator, vae, denoising, images, policy, identity)
    if checkpoint is not None:
        training.resume(checkpoint)
    training.run()
    training.finish()


class LatentDiffusionTraining:
    """One training: its model, optimiser, schedule and passes.

    The global generators are seeded here, so that the model is the same whether or not images were encoded before.

    Args:
        args (argparse.Namespace): Options of :func:`.parse_options`.
        accelerator (Accelerator): The run's.
        vae (VQModel | AutoencoderKL): The first stage, frozen, on the accelerator's device.
        denoising (Denoising): The objective.
        images (TrainingImages): What is trained on.
        policy (PruningPolicy): What a pass visits.
        identity (dict[str, Any]): :func:`.run_identity` of this run.

    Raises:
        ValueError: If the options are out of range for :class:`.AcceleratedInfoBatch`.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        vae: FirstStage,
        denoising: Denoising,
        images: TrainingImages,
        policy: PruningPolicy,
        identity: dict[str, Any],
    ) -> None:
        self._args = args
        self._accelerator = accelerator
        self._vae = vae
        self._denoising = denoising
        self._images = images
        self._identity = identity
        self._output_dir = Path(args.output_dir)
        self._shape = latent_shape(vae, args.resolution)
        loader = build_loader(args, images.dataset)
        set_seed(args.seed)  # not earlier: encoding the images may draw from the global generators
        unet = UNet2DModel.from_config(args.unet_config)
        optimizer = build_optimizer(args, unet)
        self._infobatch = AcceleratedInfoBatch(
            accelerator,
            loader,
            args.num_epochs,
            max_train_steps=args.max_train_steps,
            policy=policy,
            seed=args.seed,
            item_seed=True,
            score=args.score,
            score_ema=args.score_ema,
            fingerprint=images.fingerprint,
        )
        self._by_gradient = args.score == "gradient"
        if self._by_gradient:
            self._infobatch.observe(unet.conv_out)
        lr_scheduler = build_lr_scheduler(args, optimizer, len(images.dataset), accelerator.num_processes)
        prepared = self._infobatch.prepare(unet, optimizer, loader, lr_scheduler)
        self._unet, self._optimizer, self._loader, self._lr_scheduler = prepared
        self._model = accelerator.unwrap_model(self._unet)
        self._ema: EMAModel | None = None
        if args.use_ema:
            self._ema = EMAModel(self._model.parameters(), args.ema_max_decay)
            # Without it a checkpoint would hold no average, and a resumed run would begin one at its own weights.
            accelerator.register_for_checkpointing(self._ema)

    def resume(self, checkpoint: Path) -> None:
        """Go on where a checkpoint was saved; every process must call it, before :meth:`run`.

        Args:
            checkpoint (Path): Its folder.

        Raises:
            ValueError: If the checkpoint is of other images or settings, or the output folder of another run.
        """
        self._infobatch.check_output(self._output_dir)
        self._accelerator.load_state(str(checkpoint))
        if self._accelerator.is_main_process:
            set_aside(self._output_dir, checkpoint)
        if self._ema is not None:
            self._ema.to(self._accelerator.device)  # the average is loaded to the CPU, and could not be updated there

    def run(self) -> None:
        """Make all passes that are left."""
        if self._args.logger != "none":
            self._accelerator.init_trackers("train_ldm", loggable(self._args))
        infobatch = self._infobatch
        self._bar = tqdm(initial=infobatch.updates_done, total=infobatch.updates_expected, unit="update")
        self._bar.disable = not self._accelerator.is_local_main_process
        for epoch in range(infobatch.passes_done, infobatch.num_passes):
            self._train_epoch(epoch)
            self._accelerator.log(infobatch.logs(), step=infobatch.updates_done)
            self._sample(epoch)
        self._bar.close()

    def _train_epoch(self, epoch: int) -> None:
        self._unet.train()
        for step, batch in enumerate(self._loader):
            if step == 0:
                self._bar.total = self._infobatch.updates_expected  # each pass knows better how many are left
            self._train_batch(batch, epoch)
            if self._accelerator.sync_gradients:  # else the batch was accumulated, and no update was made
                self._after_update()

    def _train_batch(self, batch: dict[str, Tensor], epoch: int) -> None:
        """Train on one batch: an update, or its share of one where gradients are accumulated."""
        accelerator, infobatch, unet = self._accelerator, self._infobatch, self._unet
        scheduler = self._denoising.scheduler
        # Seeded by image and pass, so that a resumed run sees the same noise as one that was never killed.
        drawn = draw(infobatch.index.tolist(), self._shape, self._args.ddpm_num_steps, self._args.seed, epoch)
        latents = to_latents(self._vae, batch, drawn)
        noise, timesteps = drawn.noise.to(latents.device), drawn.timesteps.to(latents.device)
        with accelerator.accumulate(unet):
            losses, scores = self._denoising.losses(predictor(unet), latents, noise, timesteps)
            ranked = None if self._by_gradient else scores
            accelerator.backward(infobatch.weigh(losses, ranked, log_snr=log_snr(scheduler, timesteps)))
            if accelerator.sync_gradients and self._args.max_grad_norm:
                accelerator.clip_grad_norm_(unet.parameters(), self._args.max_grad_norm)
            self._optimizer.step()
            self._lr_scheduler.step()
            self._optimizer.zero_grad()

    def _after_update(self) -> None:
        """Average the weights, log, and save a checkpoint where it is time."""
        if self._ema is not None:
            self._ema.step(self._model.parameters())  # before the checkpoint, which holds the average of its weights
        update = self._infobatch.updates_done
        scalars = {"loss": self._infobatch.loss.item(), "lr": self._lr_scheduler.get_last_lr()[0]}
        self._accelerator.log(scalars, step=update)
        self._bar.set_postfix(scalars, refresh=False)
        self._bar.update(update - self._bar.n)
        if update % self._args.checkpointing_steps == 0:
            limit = self._args.checkpoints_total_limit
            names = self._images.images.names
            save_checkpoint(self._output_dir, self._accelerator, self._infobatch, self._identity, names, limit)

    def _sample(self, epoch: int) -> None:
        """Save a grid of samples, where it is time after a pass."""
        args = self._args
        is_last = epoch + 1 == self._infobatch.num_passes
        if not args.save_images_epochs or not (is_last or (epoch + 1) % args.save_images_epochs == 0):
            return
        with averaged(self._model, self._ema):
            if self._accelerator.is_main_process:
                grid = self._output_dir / "samples" / f"{epoch + 1:04d}.png"
                pipeline = build_pipeline(self._vae, self._model, self._denoising.scheduler)
                save_samples(pipeline, grid, args.eval_batch_size, args.ddpm_num_inference_steps, args.seed)

    def finish(self) -> None:
        """Write summary, scores, pipeline and held-out loss, and say what was saved; every process must call it."""
        self._infobatch.merge()
        self._infobatch.write(self._output_dir, self._images.images.names)
        if self._accelerator.is_main_process:
            with averaged(self._model, self._ema):
                build_pipeline(self._vae, self._model, self._denoising.scheduler).save_pretrained(self._output_dir)
                self._measure()
            summary = self._infobatch.summary()
            print(
                f"{summary['visits']} of {summary['visits_full']} visits, saved {summary['saved_ratio']:.1%}, "
                f"{summary['iterations']} iterations, {summary['wall_time_s']:.0f} s"
            )
        self._accelerator.end_training()

    def _measure(self) -> None:
        """Measure the held-out loss, where there are held-out images."""
        held_out = self._images.held_out
        if held_out is None:
            return
        items = all_encoded(self._vae, held_out, self._args.train_batch_size)
        loss = held_out_loss(self._denoising, predictor(self._model), items, self._accelerator.device)
        (self._output_dir / METRICS_FILE).write_text(json.dumps({"held_out_loss": loss}) + "\n")
        print(f"held-out denoising loss {loss:.6f}")
