from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")

from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from infobatch_mm.diffusion.denoising import PREDICTION_TYPES, Denoising, draw, held_out_loss, log_snr

SHAPE = (3, 4, 4)


def scheduler(prediction_type: str = "epsilon") -> DDPMScheduler:
    return DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.0015,
        beta_end=0.0195,
        prediction_type=prediction_type,
        clip_sample=False,
    )


def model(noisy: Tensor, timesteps: Tensor) -> Tensor:
    return noisy.tanh() * (timesteps / 1000).view(-1, 1, 1, 1)


def batch(size: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    drawn = draw(range(size), SHAPE, 1000, seed=3, pass_index=1)
    return torch.randn(size, *SHAPE, generator=torch.Generator().manual_seed(1)), drawn.noise, drawn.timesteps


def by_hand(prediction_type: str, gamma: float | None) -> list[float]:
    """The loss of each image, from the formulas, one number at a time."""
    latents, noise, timesteps = batch()
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - betas, 0)
    losses = []
    for x, e, t in zip(latents.double(), noise.double(), timesteps.tolist(), strict=True):
        a, s = kept[t] ** 0.5, (1 - kept[t]) ** 0.5
        noisy = a * x + s * e
        target = {"epsilon": e, "v_prediction": a * e - s * x, "sample": x}[prediction_type]
        loss = ((noisy.tanh() * t / 1000 - target) ** 2).mean()
        snr = kept[t] / (1 - kept[t])
        clipped = snr if gamma is None else min(snr, torch.tensor(gamma))
        if prediction_type == "sample":
            loss = loss * clipped
        elif gamma is not None:
            loss = loss * clipped / (snr if prediction_type == "epsilon" else snr + 1)
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("gamma", [None, 5.0, 0.1])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_losses_are_the_formulas(prediction_type: str, gamma: float | None) -> None:
    losses, scores = Denoising(scheduler(prediction_type), gamma).losses(model, *batch())
    assert losses.tolist() == pytest.approx(by_hand(prediction_type, gamma), rel=2e-5)
    assert scores.tolist() == pytest.approx(by_hand(prediction_type, None), rel=2e-5)


def test_their_mean_is_the_loss_of_diffusers_example() -> None:
    latents, noise, timesteps = batch()
    losses, _ = Denoising(scheduler()).losses(model, latents, noise, timesteps)
    noisy = scheduler().add_noise(latents, noise, timesteps)
    assert losses.mean().item() == pytest.approx(F.mse_loss(model(noisy, timesteps), noise).item(), rel=1e-6)


def test_scores_carry_no_gradient() -> None:
    factor = torch.ones((), requires_grad=True)
    losses, scores = Denoising(scheduler(), 5.0).losses(lambda x, t: factor * model(x, t), *batch())
    assert losses.requires_grad
    assert not scores.requires_grad


@pytest.mark.parametrize("gamma", [0.0, -1.0, float("nan")])
def test_a_gamma_out_of_range_is_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match=r"snr_gamma=.* is not positive"):
        Denoising(scheduler(), gamma)


def test_an_unknown_prediction_type_is_refused() -> None:
    noise_scheduler = scheduler()
    noise_scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="prediction_type='flow': choose one of"):
        Denoising(noise_scheduler)


def test_draws_depend_on_image_pass_and_seed_alone() -> None:
    whole = draw([5, 2, 9, 4], SHAPE, 1000, seed=0, pass_index=3)
    part = draw([9, 2], SHAPE, 1000, seed=0, pass_index=3)
    for name in ("noise", "timesteps", "posterior"):
        assert torch.equal(getattr(whole, name)[[2, 1]], getattr(part, name))
    others = [
        draw([9, 2], SHAPE, 1000, seed=1, pass_index=3),
        draw([9, 2], SHAPE, 1000, seed=0, pass_index=4),
        draw([9, 2], SHAPE, 1000, seed=0, pass_index=3, repeat=1),
        draw([8, 1], SHAPE, 1000, seed=0, pass_index=3),
    ]
    for other in others:
        assert not torch.equal(other.noise, part.noise)


def test_draws_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    draw(range(4), SHAPE, 1000, seed=0, pass_index=0)
    assert torch.equal(before, torch.get_rng_state())


def test_draws_have_their_distributions() -> None:
    drawn = draw(range(4000), SHAPE, 10, seed=0, pass_index=0)
    counts = torch.bincount(drawn.timesteps, minlength=10)
    assert ((counts - 400).abs() < 5 * 20).all()  # five standard deviations
    for normal in (drawn.noise, drawn.posterior):
        assert normal.mean().abs() < 5 / normal.numel() ** 0.5
        assert (normal.var() - 1).abs() < 5 * (2 / normal.numel()) ** 0.5
    together = torch.corrcoef(torch.stack([drawn.noise.flatten(), drawn.posterior.flatten()]))
    assert together[0, 1].abs() < 5 / drawn.noise.numel() ** 0.5


class Latents(list):
    pass


def held_out(size: int) -> Latents:
    latents = torch.randn(size, *SHAPE, generator=torch.Generator().manual_seed(2))
    return Latents({"latents": each} for each in latents)


def test_the_held_out_loss_is_the_same_whatever_the_batch() -> None:
    denoising, device = Denoising(scheduler(), 5.0), torch.device("cpu")
    losses = [held_out_loss(denoising, model, held_out(7), device, size, draws_per_image=4) for size in (1, 3, 7)]
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-5)
    without = held_out_loss(Denoising(scheduler()), model, held_out(7), device, draws_per_image=4)
    assert without == pytest.approx(losses[0], rel=1e-5)


def test_the_held_out_loss_looks_at_the_whole_schedule() -> None:
    seen: list[int] = []

    def watching(noisy: Tensor, timesteps: Tensor) -> Tensor:
        seen.extend(timesteps.tolist())
        return model(noisy, timesteps)

    held_out_loss(Denoising(scheduler()), watching, held_out(5), torch.device("cpu"), draws_per_image=8)
    parts = torch.bincount(torch.tensor(seen) * 8 // 1000, minlength=8)
    assert parts.tolist() == [5] * 8


def test_who_knows_the_noise_has_no_held_out_loss() -> None:
    latents = torch.zeros(4, *SHAPE)
    kept = scheduler().alphas_cumprod

    def knowing(noisy: Tensor, timesteps: Tensor) -> Tensor:
        return noisy / (1 - kept[timesteps]).sqrt().view(-1, 1, 1, 1)

    data = Latents({"latents": each} for each in latents)
    assert held_out_loss(Denoising(scheduler()), knowing, data, torch.device("cpu")) < 1e-10


def test_the_noise_level_is_the_log_of_signal_over_noise() -> None:
    timesteps = torch.tensor([0, 17, 500, 999])
    kept = torch.cumprod(1 - torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2, 0)[timesteps]
    levels = log_snr(scheduler(), timesteps)
    assert levels.dtype == torch.float32
    assert levels.tolist() == pytest.approx(torch.log(kept / (1 - kept)).tolist(), abs=1e-3)


def test_the_noise_level_of_flow_matching_is_that_of_its_mixture() -> None:
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    levels = log_snr(flow, flow.timesteps[[0, 300, 999]])
    sigmas = flow.sigmas[[0, 300, 999]].double()
    assert levels.tolist() == pytest.approx((2 * torch.log((1 - sigmas) / sigmas)).tolist(), abs=1e-4)
    assert log_snr(flow, torch.tensor([0.0, 500.0, 1000.0])).tolist() == [torch.inf, 0, -torch.inf]
    assert levels[0] == -torch.inf or levels[0] < levels[2]


def test_noise_levels_that_are_not_known_are_refused():
    from diffusers import DDPMScheduler, EDMEulerScheduler, EulerDiscreteScheduler

    with pytest.raises(ValueError, match=r"EulerDiscreteScheduler with timesteps in torch.float32.*-2 \* sigma.log"):
        log_snr(EulerDiscreteScheduler(), torch.ones(2))
    with pytest.raises(ValueError, match=r"EDMEulerScheduler has no alphas_cumprod and is none of flow matching"):
        log_snr(EDMEulerScheduler(), torch.ones(2))
    with pytest.raises(ValueError, match="give it the scheduler, then the timesteps"):
        log_snr(torch.ones(2, dtype=torch.int64), DDPMScheduler())  # type: ignore[arg-type]
