"""MMPretrain's masked-image models in runs: by epochs, with masks of the model's or of the pipeline's."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mmpretrain")

import mmpretrain
import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from infobatch_mm.core.score_file import read_scores

from . import toy_classifier
from .test_mmpretrain_schedules import (
    HOOK,
    SMALL,
    TO_THE_END,
    WARM_UP,
    Rates,
    assert_equal_rates,
    assert_steps_of_the_host,
    scaled,
)
from .test_resume import KillAt, Killed
from .toy_classifier import EPOCHS, ONE_LINE, PER_EPOCH, N, hook_of, train

# ---- models and configs -----------------------------------------------------------------------------------

VIT = dict(embed_dims=16, num_layers=1, num_heads=2, feedforward_channels=16)
PIXELS = dict(type="PixelReconstructionLoss", criterion="L2")


@MODELS.register_module(force=True)
class TinyTokens(nn.Module):
    """Logits of DALL-E's form, without its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, 11, 4, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.projection(images)


#: Images of 16 x 16 in patches of 4 x 4.
MAE = dict(
    type="MAE",
    backbone=dict(type="MAEViT", arch=VIT, img_size=16, patch_size=4, mask_ratio=0.75),
    neck=dict(
        type="MAEPretrainDecoder",
        num_patches=16,
        patch_size=4,
        embed_dim=16,
        decoder_embed_dim=16,
        decoder_depth=1,
        decoder_num_heads=2,
    ),
    head=dict(type="MAEPretrainHead", norm_pix=True, patch_size=4, loss=PIXELS),
)
#: Images of 64 x 64: its last stage sees them at a 32nd.
MIXMIM = dict(
    type="MixMIM",
    backbone=dict(
        type="MixMIMPretrainTransformer",
        arch=dict(embed_dims=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2]),
        img_size=64,
        window_size=[2, 2, 2, 2],
    ),
    neck=dict(
        type="MixMIMPretrainDecoder",
        num_patches=4,
        encoder_stride=32,
        embed_dim=64,
        decoder_embed_dim=16,
        decoder_depth=1,
        decoder_num_heads=2,
    ),
    head=dict(type="MixMIMPretrainHead", norm_pix=True, loss=PIXELS),
)
SIMMIM = dict(
    type="SimMIM",
    backbone=dict(
        type="SimMIMSwinTransformer",
        arch=dict(embed_dims=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2]),
        img_size=32,
        pad_small_map=True,
        stage_cfgs=dict(block_cfgs=dict(window_size=2)),
    ),
    neck=dict(type="SimMIMLinearDecoder", in_channels=64, encoder_stride=32),
    head=dict(type="SimMIMHead", patch_size=4, loss=dict(PIXELS, criterion="L1", channel=3)),
)
BEIT = dict(
    type="BEiT",
    backbone=dict(type="BEiTPretrainViT", arch=VIT, img_size=16, patch_size=4, drop_path_rate=0.1),
    neck=None,
    head=dict(type="BEiTV1Head", embed_dims=16, num_embed=11, loss=dict(type="CrossEntropyLoss")),
    target_generator=dict(type="TinyTokens"),
)
SIMMIM_MASK = dict(type="SimMIMMaskGenerator", input_size=32, mask_patch_size=8, model_patch_size=4, mask_ratio=0.6)
BEIT_MASK = dict(type="BEiTMaskGenerator", input_size=(4, 4), num_masking_patches=6, min_num_patches=2)
TWO_PICTURES = dict(
    type="RandomResizedCropAndInterpolationWithTwoPic",
    size=16,
    second_size=16,
    interpolation="bicubic",
    second_interpolation="bicubic",
    scale=(0.2, 1.0),
)
ONE_NORM = dict(type="SelfSupDataPreprocessor", mean=[120.0] * 3, std=[60.0] * 3, to_rgb=True)
TWO_NORMS = dict(ONE_NORM, type="TwoNormDataPreprocessor", second_mean=[127.5] * 3, second_std=[127.5] * 3)
FLIP = dict(type="RandomFlip", prob=0.5)
#: Model, its preprocessor, the size of the pictures, and what the pipeline does to them.
METHODS: dict[str, tuple[dict, dict, int, list]] = {
    "mae": (MAE, ONE_NORM, 16, [FLIP]),
    "mixmim": (MIXMIM, ONE_NORM, 64, [FLIP]),
    "simmim": (SIMMIM, ONE_NORM, 32, [FLIP, SIMMIM_MASK]),
    "beit": (BEIT, TWO_NORMS, 20, [FLIP, TWO_PICTURES, BEIT_MASK]),
}
#: Methods of which the default suite makes whole comparisons: masks drawn in the model, and in the pipeline.
SHORT = ("mae", "beit")
ADAMW = dict(optimizer=dict(type="AdamW", lr=5e-3, betas=(0.9, 0.95), weight_decay=0.05))


def config(work_dir: Path, method: str = "mae", **overrides: Any) -> Config:
    """As :func:`.toy_classifier.config`: 70 pictures in batches of 8, in 4 epochs, without validation."""
    model, preprocessor, size, augment = copy.deepcopy(METHODS[method])
    pipeline = [dict(type="DrawToyImage", size=size), *augment, dict(type="PackInputs")]
    cfg = toy_classifier.config(work_dir)
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.model = dict(model, data_preprocessor=preprocessor)
    cfg.train_dataloader.dataset.pipeline = pipeline
    cfg.train_dataloader.collate_fn = dict(type="default_collate")
    cfg.optim_wrapper = copy.deepcopy(ADAMW)
    cfg.merge_from_dict(copy.deepcopy(overrides))
    return cfg


def books(work_dir: Path) -> dict[str, Any]:
    return json.loads((work_dir / "infobatch_summary.json").read_text())


def scores(work_dir: Path) -> Any:
    return read_scores(work_dir)


def assert_equal_models(ours: Runner, theirs: Runner) -> None:
    ours, theirs = ours.model.state_dict(), theirs.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


# ---- what does not change ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [pytest.param(each, marks=[] if each in SHORT else pytest.mark.slow) for each in METHODS]
)
def test_policy_none_changes_nothing(tmp_path: Path, method: str) -> None:
    made: list[Any] = []
    for name, hooks in (("host", []), ("ours", [dict(type="InfoBatchHook", policy="none")])):
        runner, recorder = train(config(tmp_path / name, method, custom_hooks=hooks))
        streams = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
        made.append((runner, recorder, streams))
    (host_runner, host, hosts_streams), (runner, ours, our_streams) = made
    assert ours.names == host.names
    assert ours.inputs == host.inputs
    assert ours.losses == host.losses and len(host.losses) == EPOCHS * PER_EPOCH
    assert ours.lrs == host.lrs
    assert_equal_models(runner, host_runner)
    assert our_streams == hosts_streams
    assert scores(tmp_path / "ours")["times_seen"].tolist() == [EPOCHS] * N
    assert np.isfinite(scores(tmp_path / "ours")["score"]).all()


# ---- what samples weigh in truth --------------------------------------------------------------------------


class Weights(Hook):
    """What each image of a batch was weighed by, read off the gradient of what its loss module was given.

    Knows nothing of views: the class's own forward gives the gradient of the host, and its value.

    Attributes:
        weights (list[Tensor]): Of every iteration, shape (B, rows of a sample).
        plans (list[Plan]): The plan of every iteration.
    """

    priority = "LOWEST"

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.plans: list[Any] = []

    def before_train(self, runner: Any) -> None:
        runner.model.head.loss_module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: tuple, result: Tensor) -> None:
        args[0].retain_grad()
        self._module, self._args = module, args

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self.plans.append(hook_of(runner)._pruner.plan)  # type: ignore[union-attr]
        self._size = len(data_batch["data_samples"])

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        pred, *others = self._args
        alone = pred.detach().requires_grad_()
        host = type(self._module)(**self._settings(runner)).forward(alone, *others)
        host.backward()
        if not self.plans[-1].pruned:  # where it is, the log shows the mean by weights
            assert float(outputs["loss"].detach()) == float(host.detach()), "the log shows the host's loss"
        ours, theirs = pred.grad.flatten(1), alone.grad.flatten(1)  # type: ignore[union-attr]
        weights = (ours * theirs).sum(1) / theirs.square().sum(1)
        used = theirs.abs().sum(1) > 0
        assert torch.allclose(weights[used, None] * theirs[used], ours[used], rtol=1e-3, atol=1e-6)
        assert not ours[~used].any()
        self.weights.append(weights.view(self._size, -1))

    @staticmethod
    def _settings(runner: Any) -> dict[str, Any]:
        return {key: value for key, value in runner.cfg.model.head.loss.items() if key != "type"}


def of_plan(plan: Any, indices: list[int]) -> Tensor:
    weights = dict(zip(plan.indices.tolist(), plan.weights.tolist(), strict=True))
    return torch.tensor([weights[index] for index in indices])


def of_pairs(plan: Any, indices: list[int]) -> Tensor:
    """By the book: the chance that both were drawn undone, and that they met in a batch."""
    thinned = plan.indices[plan.weights > 1].tolist()
    own = of_plan(plan, indices)
    if not thinned:
        return own
    kept = len(thinned)
    candidates = round(kept * float(plan.weights.max()))
    together = [1.0, kept / candidates, kept * (kept - 1) / (candidates * (candidates - 1))]
    weights = []
    for first, second, weight in zip(indices, reversed(indices), own, strict=True):
        chance = together[(first in thinned) + (second in thinned)]
        weights.append(float(weight) if first == second else (len(plan) - 1) / (N - 1) / chance)
    return torch.tensor(weights)


LONG = {"train_cfg.max_epochs": 6}


@pytest.mark.parametrize("method", METHODS)
def test_images_are_weighed_by_the_plan(tmp_path: Path, method: str) -> None:
    hook = Weights()
    _, recorder = train(config(tmp_path, method, **LONG), hook)
    weigh = of_pairs if method == "mixmim" else of_plan
    for weights, plan, indices in zip(hook.weights, hook.plans, recorder.indices, strict=True):
        expected = weigh(plan, indices)
        assert torch.allclose(weights, expected[:, None].expand_as(weights), rtol=1e-3)
    assert max(float(weights.max()) for weights in hook.weights) > 1.2
    summary = books(tmp_path)
    assert summary["per_pass"][0]["kept"] == N
    assert len(recorder.losses) == summary["iterations"] < 0.95 * summary["iterations_full"]
    saved = scores(tmp_path)
    assert saved["times_seen"].tolist() == np.bincount(sum(recorder.indices, []), minlength=N).tolist()
    assert np.isfinite(saved["score"]).all() and len(set(saved["score"].tolist())) > N // 2


# ---- two views of each picture ----------------------------------------------------------------------------


def two_views(work_dir: Path, name: str, head: dict, **overrides: Any) -> Config:
    cfg = config(work_dir, "mae", **overrides)
    view = [dict(type="RandomFlip", prob=0.5), dict(type="RandomGrayscale", prob=0.2, keep_channels=True)]
    views = dict(type="MultiView", num_views=2, transforms=[view])
    cfg.train_dataloader.dataset.pipeline = [dict(type="DrawToyImage", size=16), views, dict(type="PackInputs")]
    # The last batch, of one or two pictures in some passes, is nothing for a BatchNorm.
    cfg.train_dataloader.drop_last = True
    backbone = dict(type="ResNet", depth=18, stem_channels=4, base_channels=4)
    cfg.model = dict(type=name, data_preprocessor=ONE_NORM, backbone=backbone, neck=mlp(32, True), head=head)
    return cfg


def mlp(in_channels: int, pool: bool) -> dict:
    return dict(
        type="NonLinearNeck",
        in_channels=in_channels,
        hid_channels=8,
        out_channels=8,
        with_last_bn=False,
        with_avg_pool=pool,
    )


def test_byol_reaches_the_end_of_its_momentum(tmp_path: Path) -> None:
    """Its moving average asks for the number of iterations, which a pruned run has fewer of."""
    head = dict(type="LatentPredictHead", predictor=mlp(8, False), loss=dict(type="CosineSimilarityLoss"))
    made = []
    for name, hooks in (("host", []), ("ours", ONE_LINE)):
        runner, recorder = train(two_views(tmp_path / name, "BYOL", head, custom_hooks=hooks))
        assert int(runner.model.target_net.steps) == runner.iter == len(recorder.losses)
        assert runner.message_hub.get_info("max_iters") == runner.iter
        made.append(runner)
    assert made[1].iter < made[0].iter
    saved = scores(tmp_path / "ours")["score"]
    assert np.isfinite(saved).all() and saved.min() >= -2 and saved.max() <= 2


def test_contrastive_models_are_refused_before_the_first_iteration(tmp_path: Path) -> None:
    head = dict(type="ContrastiveHead", loss=dict(type="CrossEntropyLoss"))
    with pytest.raises(ValueError, match=r"SimCLR cannot be pruned \(ContrastiveHead\)"):
        train(two_views(tmp_path / "ours", "SimCLR", head))
    assert not (tmp_path / "ours" / "infobatch_summary.json").exists()
    _, host = train(two_views(tmp_path / "host", "SimCLR", head, custom_hooks=[]))
    assert host.losses


# ---- schedules --------------------------------------------------------------------------------------------


def both(work_dir: Path, method: str = "mae", **overrides: Any) -> tuple[Any, Rates, Any, Rates]:
    """Runner and rates of the unpruned run, and of the pruned one."""
    made: list[Any] = []
    small = {key: value for key, value in SMALL.items() if not key.endswith("pipeline")}
    for name, custom_hooks in (("host", []), ("ours", HOOK)):
        rates = Rates()
        cfg = config(work_dir / name, method, custom_hooks=custom_hooks, **small, **overrides)
        made += [train(cfg, rates)[0], rates]
    return tuple(made)


def assert_ends_where_the_host_ends(host_runner: Any, host: Rates, runner: Any, ours: Rates) -> None:
    assert_equal_rates(ours, host)
    assert_steps_of_the_host(ours, host, runner.param_schedulers)
    last = [(s._global_step, s.last_step) for s in runner.param_schedulers]
    assert last == [(s._global_step, s.last_step) for s in host_runner.param_schedulers]
    assert runner.iter == len(ours.steps) == runner.max_iters < host_runner.iter
    assert runner.epoch == host_runner.epoch


def test_a_pruned_run_ends_with_the_unpruned_ones_rates(tmp_path: Path) -> None:
    schedulers = [WARM_UP, dict(type="CosineAnnealingLR", eta_min=1e-6, **TO_THE_END)]
    decay = dict(type="CosineAnnealingWeightDecay", eta_min=0.2, **{**TO_THE_END, "begin": 0})
    made = both(tmp_path, param_scheduler=[*schedulers, decay])
    assert_ends_where_the_host_ends(*made)
    assert_equal_rates(made[3], made[1], "weight_decay")
    summary = books(tmp_path / "ours")
    assert summary["iterations"] == made[2].iter and summary["iterations_full"] == made[0].iter


def distinct_schedules() -> dict[str, Config]:
    """By the first config of MMPretrain's MAE folder that has each."""
    found: dict[str, tuple[str, Config]] = {}
    for path in sorted(Path(mmpretrain.__file__).parent.glob(".mim/configs/mae/mae_*.py")):
        cfg = Config.fromfile(path)
        settings = [cfg.optim_wrapper.to_dict(), cfg.train_cfg.to_dict(), *map(dict, cfg.param_scheduler)]
        key = json.dumps(settings, sort_keys=True)
        found.setdefault(key, (path.stem, cfg))
    return dict(found.values())


SCHEDULES = distinct_schedules()


def test_the_shipped_schedules_were_found() -> None:
    assert len(SCHEDULES) >= 4
    assert {cfg.train_cfg.max_epochs for cfg in SCHEDULES.values()} == {300, 400, 800, 1600}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if place < 2 else pytest.mark.slow) for place, name in enumerate(SCHEDULES)]
)
def test_rates_of_every_shipped_schedule_are_the_hosts(tmp_path: Path, name: str) -> None:
    overrides = scaled(SCHEDULES[name])
    # Half precision wants a GPU.
    for key in ("type", "loss_scale"):
        overrides["optim_wrapper"].pop(key, None)
    made = both(tmp_path, **overrides)
    assert_ends_where_the_host_ends(*made)
    assert {group["weight_decay"] for group in made[3].at_epoch_ends[0]} == {0.0, 0.05}


# ---- resuming ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "kill", "interval"),
    [("mae", 14, 12), pytest.param("mixmim", 20, 6, marks=pytest.mark.slow), ("beit", 16, 15)],
)
def test_a_run_that_was_killed_goes_on_to_the_bit(tmp_path: Path, method: str, kill: int, interval: int) -> None:
    """Masks are drawn in the model or, under seeds of their own, in the pipeline."""

    def cfg(name: str, **more: Any) -> Config:
        made = config(tmp_path / name, method, custom_hooks=[dict(ONE_LINE[0], item_seed=True)], **more)
        made.default_hooks.checkpoint.interval = interval
        return made

    straight_runner, straight = train(cfg("straight"))
    with pytest.raises(Killed):
        train(cfg("killed"), KillAt(kill))
    resumed_runner, resumed = train(cfg("killed", resume=True))
    start = kill - kill % interval
    assert straight.batch_idx[start] > 0 and len(resumed.losses) == len(straight.losses) - start > 0
    assert resumed.indices == straight.indices[start:]
    assert resumed.weights == straight.weights[start:]
    assert resumed.inputs == straight.inputs[start:]
    assert resumed.losses == straight.losses[start:]
    assert any(weight > 1 for weights in resumed.weights for weight in weights)
    assert_equal_models(resumed_runner, straight_runner)
    ours, theirs = books(tmp_path / "killed"), books(tmp_path / "straight")
    assert {**ours, "wall_time_s": 0} == {**theirs, "wall_time_s": 0}
