"""The frozen first stage: where it is found, what its latents are, and which UNets fit them."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")

from diffusers import AutoencoderKL, DDIMScheduler, LDMPipeline, UNet2DModel, VQModel
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from infobatch_mm.diffusion.first_stage import check_fits, fingerprint, latent_shape, load_first_stage, moments

UNET: dict[str, Any] = dict(sample_size=4, in_channels=3, out_channels=3, block_out_channels=[8, 16])


def first_stage(kind: type = VQModel, **settings: Any) -> Any:
    """A tiny one, which halves images."""
    torch.manual_seed(0)
    vae = kind(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        **{"latent_channels": 3, "scaling_factor": 0.5, **settings},
    )
    return vae.eval()


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is out of reach, as it is on many nodes."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


# ---- where it is found ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [VQModel, AutoencoderKL])
@pytest.mark.parametrize("subfolder", ["", "vqvae", "vae"])
def test_a_first_stage_is_found_alone_and_in_a_pipeline(tmp_path: Path, kind: type, subfolder: str) -> None:
    saved = first_stage(kind)
    saved.save_pretrained(tmp_path / subfolder)
    vae = load_first_stage(str(tmp_path))
    assert type(vae) is kind
    assert not vae.training and not any(weight.requires_grad for weight in vae.parameters())
    for name, weight in saved.state_dict().items():
        assert torch.equal(vae.state_dict()[name], weight)
    assert fingerprint(vae) == fingerprint(saved)


def test_a_first_stage_is_found_in_a_pipeline_that_diffusers_saved(tmp_path: Path) -> None:
    unet = UNet2DModel(
        **UNET,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
    )
    LDMPipeline(first_stage(), unet, DDIMScheduler()).save_pretrained(tmp_path)
    assert fingerprint(load_first_stage(str(tmp_path))) == fingerprint(first_stage())


def _nothing(folder: Path) -> None:
    folder.mkdir()


def _without_weights(folder: Path) -> None:
    first_stage().save_pretrained(folder)
    next(folder.glob("*.safetensors")).unlink()


def _truncated_weights(folder: Path) -> None:
    first_stage().save_pretrained(folder)
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])


def _broken_config(folder: Path) -> None:
    first_stage().save_pretrained(folder)
    (folder / "config.json").write_text("{")


def _another_model(folder: Path) -> None:
    first_stage().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "UNet2DModel"}))


def _missing_weight(folder: Path) -> None:
    first_stage().save_pretrained(folder)
    path = next(folder.glob("*.safetensors"))
    weights = load_file(path)
    del weights["quant_conv.weight"]
    save_file(weights, path, metadata={"format": "pt"})


def _other_shapes(folder: Path) -> None:
    first_stage().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "latent_channels": 5}))


def _list_as_config(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("[]")


def _another_model_in_a_pipeline(folder: Path) -> None:
    _another_model(folder / "vae")


def _truncated_in_a_pipeline(folder: Path) -> None:
    _truncated_weights(folder / "vqvae")


def _file(folder: Path) -> None:
    first_stage().save_pretrained(folder.parent / "model")
    folder.write_text((folder.parent / "model/config.json").read_text())


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda folder: None, ""),
        (_nothing, "config.json"),
        (_without_weights, "safetensors|weights|bin"),
        (_truncated_weights, "safetensors|weights|bin"),
        (_broken_config, "config.json"),
        (_another_model, "it holds a UNet2DModel)"),
        (_missing_weight, "1 of its weights are not in the file, such as quant_conv.weight"),
        (_other_shapes, "expected shape"),
        (_list_as_config, "it holds no model of diffusers"),
        (_another_model_in_a_pipeline, "it holds a UNet2DModel in vae/"),
        (_truncated_in_a_pipeline, "vqvae/diffusion_pytorch_model.safetensors"),
        (_file, ""),
    ],
)
def test_what_is_no_first_stage_is_refused_with_its_name(tmp_path: Path, spoil: Any, reason: str) -> None:
    spoil(tmp_path / "here")
    with pytest.raises(ValueError, match="cannot load a first stage from") as caught:
        load_first_stage(str(tmp_path / "here"))
    message = str(caught.value)
    assert str(tmp_path / "here") in message and "name the folder of a VQModel" in message
    assert any(word in message for word in reason.split("|"))


def test_a_hub_out_of_reach_is_refused_with_advice() -> None:
    with pytest.raises(ValueError, match=r"'nobody/nothing'.*must be reachable or in the cache already"):
        load_first_stage("nobody/nothing")


def test_a_hub_out_of_reach_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes half a minute to find out each time."""
    asked = []

    def unreachable(*_: Any, subfolder: str | None, local_files_only: bool) -> None:
        asked.append((subfolder, local_files_only))
        try:
            raise LocalEntryNotFoundError("no connection")
        except LocalEntryNotFoundError:
            raise OSError("no config.json")  # noqa: B904 (as diffusers does)

    monkeypatch.setattr(VQModel, "load_config", unreachable)
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_first_stage("nobody/nothing")
    assert asked == [(None, True), ("vqvae", True), ("vae", True), (None, False)]


def test_weights_in_half_precision_are_loaded_in_full(tmp_path: Path) -> None:
    first_stage().half().save_pretrained(tmp_path)
    assert load_first_stage(str(tmp_path)).dtype == torch.float32


def test_shifted_latents_are_refused(tmp_path: Path) -> None:
    first_stage(AutoencoderKL, shift_factor=0.1159).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"0\.1159"):
        load_first_stage(str(tmp_path))


# ---- its latents ------------------------------------------------------------------------------------------


def test_latents_of_a_vqmodel_are_those_before_its_quantisation() -> None:
    vae = first_stage()
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    mean, spread = moments(vae, images)
    assert spread is None
    assert torch.equal(mean, vae.quant_conv(vae.encoder(images)).detach() * 0.5)
    # and diffusers' decoder, which divides by the factor and quantises, makes of them what the whole model makes
    assert torch.allclose(vae.decode(mean / 0.5).sample, vae(images).sample, atol=1e-6)


def test_latents_of_an_autoencoderkl_have_its_posteriors_mean_and_spread() -> None:
    vae = first_stage(AutoencoderKL)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    mean, spread = moments(vae, images)
    assert spread is not None
    parameters = vae.quant_conv(vae.encoder(images)).detach()
    assert torch.equal(mean, parameters[:, :3] * 0.5)
    torch.testing.assert_close(spread, parameters[:, 3:].div(2).exp() * 0.5)
    posterior = vae.encode(images).latent_dist
    drawn = torch.stack([posterior.sample() for _ in range(1500)]).detach() * 0.5
    torch.testing.assert_close(drawn.mean(0), mean, atol=0.1, rtol=0)
    torch.testing.assert_close(drawn.std(0), spread, atol=0, rtol=0.1)


@pytest.mark.parametrize(
    "kind, settings",
    [
        (VQModel, {}),
        (VQModel, {"latent_channels": 4, "vq_embed_dim": 2}),
        (AutoencoderKL, {"latent_channels": 4}),
        (AutoencoderKL, {"use_quant_conv": False, "use_post_quant_conv": False}),
    ],
)
@pytest.mark.parametrize("resolution", [8, 14])
def test_the_shape_of_latents_is_known_without_encoding(kind: type, settings: dict[str, Any], resolution: int) -> None:
    vae = first_stage(kind, **settings)
    mean, _ = moments(vae, torch.zeros(1, 3, resolution, resolution))
    assert latent_shape(vae, resolution) == tuple(mean.shape[1:])


def test_a_resolution_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"resolution=9 does not divide by 2"):
        latent_shape(first_stage(), 9)


# ---- fingerprints -----------------------------------------------------------------------------------------


def test_a_fingerprint_tells_models_apart() -> None:
    vae = first_stage()
    prints = [fingerprint(vae), fingerprint(first_stage(scaling_factor=0.25)), fingerprint(first_stage(AutoencoderKL))]
    with torch.no_grad():
        vae.quantize.embedding.weight[7, 1] += 1e-6
    prints.append(fingerprint(vae))
    prints.append(fingerprint(first_stage().half()))
    assert len(set(prints)) == 5
    assert all(len(each) == 32 for each in prints)


def test_a_fingerprint_does_not_depend_on_where_the_model_was(tmp_path: Path) -> None:
    for name in ("one", "two"):
        first_stage().save_pretrained(tmp_path / name)
    one, two = (fingerprint(load_first_stage(str(tmp_path / name))) for name in ("one", "two"))
    assert one == two == fingerprint(first_stage())


def test_a_fingerprint_does_not_depend_on_how_weights_lie_in_memory() -> None:
    assert fingerprint(first_stage().to(memory_format=torch.channels_last)) == fingerprint(first_stage())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_fingerprint_is_of_any_precision(dtype: torch.dtype) -> None:
    prints = {fingerprint(first_stage().to(dtype)), fingerprint(first_stage().to(dtype)), fingerprint(first_stage())}
    assert len(prints) == 2


# ---- the UNet ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample_size", [4, [4, 4], (4, 4)])
def test_a_unet_that_fits_is_taken(sample_size: Any) -> None:
    check_fits(first_stage(), {**UNET, "sample_size": sample_size}, 8)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"in_channels": 4}, r"in_channels=4, the latents of the first stage have 3 channels: set in_channels to 3"),
        ({"out_channels": 6}, r"out_channels=6, the latents of the first stage have 3 channels"),
        ({"sample_size": 8}, r"sample_size=8, images of 8 pixels have latents of 4x4: set sample_size to 4"),
        ({"sample_size": [4, 8]}, r"sample_size=\[4, 8\]"),
        ({"sample_size": None}, r"sample_size=None"),
        ({"block_out_channels": [8, 8, 8, 8]}, r"shrink its input 8 times, latents of 4x4 do not divide"),
    ],
)
def test_a_unet_that_does_not_fit_is_refused_with_both_values(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_fits(first_stage(), {**UNET, **settings}, 8)


def test_what_a_unet_leaves_out_is_diffusers_default() -> None:
    """A UNet of which nothing is said has three channels, and four levels."""
    config = {name: UNET[name] for name in ("sample_size", "block_out_channels")}
    defaults = inspect.signature(UNet2DModel.__init__).parameters
    assert (defaults["in_channels"].default, defaults["out_channels"].default) == (3, 3)
    assert len(defaults["block_out_channels"].default) == 4
    check_fits(first_stage(), config, 8)
    with pytest.raises(ValueError, match=r"in_channels=3, the latents of the first stage have 4 channels"):
        check_fits(first_stage(latent_channels=4), config, 8)
    with pytest.raises(ValueError, match=r"4 block_out_channels shrink its input 8 times, latents of 4x4"):
        check_fits(first_stage(), {"sample_size": 4}, 8)
    check_fits(first_stage(), {"sample_size": 8}, 16)


def test_a_misspelt_setting_of_the_unet_is_named() -> None:
    with pytest.raises(ValueError, match="a UNet2DModel has no setting 'layer_per_block': it has sample_size"):
        check_fits(first_stage(), {**UNET, "layer_per_block": 3}, 8)
