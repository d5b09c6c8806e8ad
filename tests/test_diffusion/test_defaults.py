"""What a script has set as torch's default dtype or device changes neither weights nor noise nor states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("diffusers", reason="diffusers is not installed")

from accelerate import Accelerator
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch.utils.data import DataLoader

from infobatch_mm.diffusion import AcceleratedInfoBatch
from infobatch_mm.diffusion.denoising import draw, log_snr

from .toy import forget_accelerators

pytestmark = pytest.mark.usefixtures("no_accelerator_of_another_test")


@contextmanager
def default(dtype: torch.dtype | None = None, device: str | None = None) -> Iterator[None]:
    try:
        if dtype is not None:
            torch.set_default_dtype(dtype)
        if device is not None:
            torch.set_default_device(device)
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


#: A device that holds no values: what is made there by mistake cannot be read.
DEFAULTS: list[dict[str, Any]] = [{"dtype": torch.bfloat16}, {"dtype": torch.float64}, {"device": "meta"}]
IDS = ["bfloat16", "float64", "device"]


@pytest.mark.filterwarnings("ignore:InfoBatch")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("score", ["raw", "ema", "timestep"])
def test_a_training_is_the_same_under_any_default_dtype(dtype: torch.dtype, score: str) -> None:
    def train() -> tuple[list[Any], dict[str, Any]]:
        forget_accelerators()
        torch.manual_seed(0)
        loader = DataLoader(data, 4, shuffle=True)
        infobatch = AcceleratedInfoBatch(Accelerator(cpu=True), loader, 8, score=score, item_seed=True)
        loader = infobatch.prepare(loader)
        seen: list[Any] = []
        for _ in range(5):
            for x in loader:
                weighted = infobatch.weigh(x**2, scores=x.abs(), log_snr=x)
                seen.append((infobatch.index.tolist(), infobatch._in_hand.weights.dtype, weighted, infobatch.loss))
        return seen, infobatch.state_dict()

    data = torch.randn(46, generator=torch.Generator().manual_seed(0))
    expected, state = train()
    with default(dtype):
        found, other = train()
    for ours, theirs in zip(found, expected, strict=True):
        assert ours[:2] == theirs[:2]
        for value, usual in zip(ours[2:], theirs[2:], strict=True):
            assert value.dtype == torch.float32 and torch.equal(value, usual)
    assert len(expected) < 5 * 12
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            assert other[key].dtype == value.dtype and torch.equal(other[key], value), key


@pytest.mark.parametrize("defaults", DEFAULTS, ids=IDS)
def test_noise_and_timesteps_are_the_same_under_any_default(defaults: dict[str, Any]) -> None:
    expected = draw([3, 7], (3, 4, 4), 1000, 0, 2)
    posterior = expected.posterior
    with default(**defaults):
        found = draw([3, 7], (3, 4, 4), 1000, 0, 2)
        again = found.posterior
    for ours, theirs in ((found.noise, expected.noise), (found.timesteps, expected.timesteps), (again, posterior)):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("defaults", DEFAULTS, ids=IDS)
def test_noise_levels_are_the_same_under_any_default(defaults: dict[str, Any]) -> None:
    timesteps = torch.tensor([1, 500, 999])
    for scheduler in (DDPMScheduler(), FlowMatchEulerDiscreteScheduler()):
        expected = log_snr(scheduler, timesteps)
        with default(**defaults):
            found = log_snr(scheduler, timesteps)
        assert found.dtype == expected.dtype == torch.float32 and torch.equal(found, expected)


def test_noise_levels_of_flow_matching_are_as_exact_as_float32_can_hold_them() -> None:
    timesteps = torch.cat([torch.linspace(0.01, 999.99, 4001), torch.tensor([1e-3, 999.9999])])
    sigmas = timesteps.double() / 1000
    exact = 2 * torch.log((1 - sigmas) / sigmas)
    found = log_snr(FlowMatchEulerDiscreteScheduler(), timesteps)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=2e-6)
    ends = log_snr(FlowMatchEulerDiscreteScheduler(), torch.tensor([0, 1000]))
    assert ends.tolist() == [float("inf"), float("-inf")]


@pytest.mark.parametrize("defaults", DEFAULTS, ids=IDS)
def test_images_and_latents_are_read_alike_under_any_default(tmp_path: Path, defaults: dict[str, Any]) -> None:
    pytest.importorskip("torchvision")
    from PIL import Image

    from infobatch_mm.diffusion.images import ImageFolder
    from infobatch_mm.diffusion.latents import CachedLatents

    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "0.png")
    images = ImageFolder(tmp_path, 8)
    np.save(tmp_path / "latents.npy", np.arange(48, dtype=np.float32).reshape(1, 2, 6, 2, 2))
    (tmp_path / "latents.json").write_text('{"has_spread": true}')
    cached = CachedLatents(tmp_path, ["0.png"])

    def read() -> list[torch.Tensor]:
        torch.manual_seed(5)
        return [images.fixed(0), cached[0]["latents"], cached[0]["latents"]]

    expected = read()
    with default(**defaults):
        found = read()
    assert torch.equal(expected[0], torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 * 2 - 1)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32 and torch.equal(ours, theirs)
