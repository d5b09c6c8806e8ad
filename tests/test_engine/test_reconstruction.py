"""Pictures of reconstructions: what is drawn, when, and that training goes on as if nothing had been."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mmpretrain")

import cv2
import numpy as np
import torch
from mmengine.registry import init_default_scope
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from infobatch_mm.engine import InfoBatchHook, ReconstructionHook
from infobatch_mm.engine.reconstruction import reconstruct

from .test_mmpretrain_selfsup_runs import METHODS, assert_equal_models, config
from .toy_classifier import ONE_LINE, train

DRAWN = dict(type="ReconstructionHook", interval=2, num_images=3)


def build(method: str, **head: Any) -> nn.Module:
    init_default_scope("mmpretrain")
    model, preprocessor, *_ = METHODS[method]
    return MODELS.build(dict(model, data_preprocessor=preprocessor, head=dict(model["head"], **head)))


def images_of(size: int, number: int = 4) -> Tensor:
    return torch.randint(0, 256, (number, 3, size, size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


class Knows(nn.Module):
    """A decoder that has seen the images: it predicts each patch of them, whatever it is given."""

    def __init__(self, patches: Tensor) -> None:
        super().__init__()
        self.patches = patches

    def forward(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        return self.patches


@pytest.mark.parametrize("norm_pix", [True, False])
def test_a_model_that_predicts_the_truth_is_drawn_as_the_images(norm_pix: bool) -> None:
    model, raw = build("mae", norm_pix=norm_pix), images_of(16)
    data = dict(inputs=raw, data_samples=[])
    prepared = model.data_preprocessor(data, False)["inputs"]
    model.neck = Knows(model.head.construct_target(prepared))
    images, seen, drawn = reconstruct(model, data)
    assert torch.allclose(images, raw.flip(1).float(), atol=1e-2)  # to_rgb
    assert torch.allclose(drawn, images, atol=1e-2)
    # 12 of the 16 patches of 4 x 4 are hidden: grey where the model sees nothing.
    patches = (seen == 127.5).all(1).unfold(1, 4, 4).unfold(2, 4, 4).flatten(3).all(-1)
    assert patches.flatten(1).sum(1).tolist() == [12] * 4
    hidden = patches.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand_as(seen)
    assert torch.equal(seen[~hidden], images[~hidden])


def test_only_hidden_patches_are_drawn_from_the_prediction() -> None:
    model, raw = build("mae", norm_pix=False), images_of(16)
    model.neck = Knows(torch.full((4, 16, 48), 100.0))  # far beyond white
    images, _, drawn = reconstruct(model, dict(inputs=raw, data_samples=[]))
    assert torch.equal(drawn[drawn != 255], images[drawn != 255])
    assert float((drawn == 255).float().mean()) == pytest.approx(0.75, abs=0.02)


def test_simmim_is_drawn_by_its_masks_of_pixels() -> None:
    from mmpretrain.structures import DataSample

    model, mask = build("simmim"), torch.zeros(8, 8)  # of patches of 4 x 4
    mask[:4] = 1
    data = dict(inputs=images_of(32, 2), data_samples=[DataSample(mask=mask), DataSample(mask=1 - mask)])
    images, seen, drawn = reconstruct(model, data)
    for each, where in ((0, slice(0, 16)), (1, slice(16, 32))):
        other = slice(16, 32) if each == 0 else slice(0, 16)
        assert (seen[each, :, where] == 127.5).all()
        assert torch.equal(seen[each, :, other], images[each, :, other])
        assert torch.equal(drawn[each, :, other], images[each, :, other])
        assert not torch.equal(drawn[each, :, where], images[each, :, where])


class SparseStandIn(nn.Module):
    """What SparK gives its head: whole images, and which cells of its mask are seen."""

    def __init__(self) -> None:
        super().__init__()
        self.data_preprocessor = MODELS.build(METHODS["mae"][1])
        loss = dict(type="PixelReconstructionLoss", criterion="L2")
        self.head = MODELS.build(dict(type="SparKPretrainHead", norm_pix=False, patch_size=4, loss=loss))

    def loss(self, inputs: Tensor, data_samples: list) -> dict[str, Tensor]:
        seen = torch.zeros(len(inputs), 1, 4, 4, dtype=torch.bool)
        seen[:, :, 0] = True
        return dict(loss=self.head(inputs.flip(3), inputs, seen))


def test_spark_is_drawn_by_its_cells() -> None:
    init_default_scope("mmpretrain")
    images, seen, drawn = reconstruct(SparseStandIn(), dict(inputs=images_of(16), data_samples=[]))
    assert torch.equal(seen[:, :, :4], images[:, :, :4]) and (seen[:, :, 4:] == 127.5).all()
    assert torch.equal(drawn[:, :, :4], images[:, :, :4])
    assert torch.equal(drawn[:, :, 4:], images.flip(3)[:, :, 4:])


def test_the_model_is_left_as_it_was() -> None:
    model = build("mae").train()
    model.backbone.layers[0].eval()  # as a frozen part
    hooks = len(model.head.loss_module._forward_pre_hooks)
    modes, state = [m.training for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    reconstruct(model, dict(inputs=images_of(16), data_samples=[]))
    assert [m.training for m in model.modules()] == modes
    assert len(model.head.loss_module._forward_pre_hooks) == hooks
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def pictures(folder: Path) -> dict[str, np.ndarray]:
    return {path.stem: cv2.imread(str(path)) for path in sorted(folder.glob("*/vis_data/vis_image/*.png"))}


def drawing(folder: Path, method: str = "mae", hooks: Any = ONE_LINE, **drawn: Any) -> Any:
    visualizer = dict(type="UniversalVisualizer", vis_backends=[dict(type="LocalVisBackend")])
    custom_hooks = [*hooks, *([dict(DRAWN, **drawn)] if drawn.pop("draw", True) else [])]
    return train(config(folder, method, custom_hooks=custom_hooks, visualizer=visualizer))


@pytest.mark.parametrize(
    ("method", "hooks"),
    [
        pytest.param("mae", ONE_LINE, id="pruned-mae"),
        pytest.param("simmim", [], id="host-simmim"),
        pytest.param("mae", [], id="host-mae", marks=pytest.mark.slow),
        pytest.param("simmim", ONE_LINE, id="pruned-simmim", marks=pytest.mark.slow),
    ],
)
def test_training_goes_on_as_if_nothing_had_been_drawn(tmp_path: Path, method: str, hooks: list) -> None:
    without, _ = drawing(tmp_path / "without", method, hooks, draw=False)
    runner, _ = drawing(tmp_path / "with", method, hooks)
    assert_equal_models(runner, without)
    assert pictures(tmp_path / "without") == {}
    made = pictures(tmp_path / "with")
    assert list(made) == ["reconstruction_2", "reconstruction_4"]
    size = {16: 96, 32: 96}[METHODS[method][2]]
    assert {picture.shape for picture in made.values()} == {(3 * (size + 4) + 4, 3 * (size + 4) + 4, 3)}
    first, second = made.values()
    assert np.array_equal(first[: 2 * (size + 4)], second[: 2 * (size + 4)]), "the same crops under the same masks"
    assert not np.array_equal(first, second)


def test_intervals_may_be_iterations_and_fall_into_a_pruned_pass(tmp_path: Path) -> None:
    without, plain = drawing(tmp_path / "without", draw=False)
    runner, recorder = drawing(tmp_path / "with", interval=5, by_epoch=False)
    assert_equal_models(runner, without)
    assert recorder.losses == plain.losses
    drawn = sorted(int(name.split("_")[1]) for name in pictures(tmp_path / "with"))
    assert drawn == list(range(5, runner.iter + 1, 5))


def test_a_model_that_predicts_no_pixels_is_refused_before_training(tmp_path: Path) -> None:
    for method, head in (("beit", "BEiTV1Head"), ("mixmim", "MixMIMPretrainHead")):
        with pytest.raises(ValueError, match=rf"ReconstructionHook cannot draw what .* with {head} predicts"):
            drawing(tmp_path / method, method)


@pytest.mark.parametrize("arguments", [dict(interval=0), dict(interval=2.5), dict(num_images=-1), dict(seed=-1)])
def test_arguments_out_of_range_are_refused_with_their_value(arguments: dict[str, int]) -> None:
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        ReconstructionHook(**arguments)


def test_it_comes_after_pruning_is_done_with_the_iteration() -> None:
    from mmengine.runner import get_priority

    assert get_priority(ReconstructionHook.priority) > get_priority(InfoBatchHook.priority)
