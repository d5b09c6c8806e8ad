"""A tiny text-to-image pipeline and captioned pictures, to try the examples with where there is no network.

    python -m infobatch_mm.demo.pipeline data/demo-pipeline

The pipeline has the parts and the folders of Stable Diffusion and random weights: it shows how an example runs, and its
pictures show nothing. The pictures to train on lie in a folder per class, with their captions in a ``metadata.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .shapes import draw_dataset

#: Tokens of a caption, which are its letters.
MAX_TOKENS = 32
#: Classes that are no single thing.
_PLURAL = ("checkers", "stripes")
_START, _END = "<|startoftext|>", "<|endoftext|>"
#: Pictures that the latents' spread is measured on, at most.
_MEASURED = 64


def caption(name: str) -> str:
    """What a picture of a class shows, in words."""
    words = name.replace("_", " ")
    return f"a drawing of {words if name in _PLURAL else 'a ' + words}"


def caption_images(root: str | Path, images: str | Path | None = None, num_train: int = 200, size: int = 32) -> Path:
    """Put captioned pictures below ``root``, as the ``imagefolder`` of the datasets library reads them.

    Args:
        root (str | Path): Folder for ``<class>/<picture>`` and ``metadata.jsonl``; made if it is not there.
        images (str | Path, optional): Pictures in a folder per class, which are copied. Without it shapes are drawn.
        num_train (int): How many are drawn. Defaults to 200.
        size (int): Their width and height in pixels. Defaults to 32.

    Returns:
        Path: ``root``.

    Raises:
        ValueError: If ``images`` holds no pictures in folders, or ``root`` holds others already.
    """
    root = Path(root)
    with tempfile.TemporaryDirectory() as drawn:
        source = Path(images) if images else draw_dataset(drawn, num_train, 0, size) / "train"
        endings = Image.registered_extensions()
        paths = sorted(path for path in source.glob("*/*") if path.suffix.lower() in endings)
        if not paths:
            raise ValueError(f"{source} holds no pictures in a folder per class: draw some, or leave --images out")
        names = [path.relative_to(source) for path in paths]
        others = {path.relative_to(root) for path in root.glob("*/*")} - set(names)
        if others:
            raise ValueError(f"{root} holds other pictures already, {min(others)} for one: name another folder")
        for path in paths:
            (root / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, root / path.relative_to(source))
    lines = [json.dumps({"file_name": name.as_posix(), "text": caption(name.parent.name)}) for name in names]
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return root


def build_tokenizer() -> CLIPTokenizer:
    """A tokenizer that knows letters and no words: CLIP's, with its alphabet of bytes and nothing merged."""
    # Bytes that cannot be printed stand for themselves in CLIP's files as the characters from 256 on.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + number) for number in range(256 - len(printable))]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), _START, _END]
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_TOKENS,
        **{"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END},
    }
    with tempfile.TemporaryDirectory() as folder:  # the constructor's arguments are others in transformers 5 than in 4
        Path(folder, "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        Path(folder, "tokenizer_config.json").write_text(json.dumps(settings))
        return CLIPTokenizer.from_pretrained(folder)


def build_pipeline(seed: int = 0, width: int = 16) -> StableDiffusionPipeline:
    """A pipeline of Stable Diffusion's parts, for pictures of 32 pixels, whose weights are random.

    Args:
        seed (int): Of the weights. Defaults to 0.
        width (int): Channels of the narrowest layers, a multiple of 8. Defaults to 16.

    Returns:
        StableDiffusionPipeline: Without a safety checker.
    """
    tokenizer = build_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=2 * width,
        intermediate_size=4 * width,
        projection_dim=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(text)
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            block_out_channels=[width, width],
            norm_num_groups=8,
            sample_size=32,
        )
        unet = UNet2DConditionModel(
            sample_size=16,
            layers_per_block=1,
            down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
            up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
            block_out_channels=[width, 2 * width],
            norm_num_groups=8,
            cross_attention_dim=2 * width,
        )
    with torch.no_grad():
        vae.quant_conv.bias[4:] = -20.0  # a posterior without variance: what is drawn from it tells pictures apart
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    return StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )


@torch.no_grad()
def scale_latents(vae: AutoencoderKL, images: Path) -> None:
    """Have the latents of pictures of 32 pixels vary by about one, as the noise that is added to them does."""
    paths = sorted(images.glob("*/*"))
    paths = paths[:: max(1, len(paths) // _MEASURED)]
    pixels = [np.asarray(Image.open(path).convert("RGB").resize((32, 32)), dtype=np.float32) for path in paths]
    latents = vae.encode(torch.from_numpy(np.stack(pixels)).movedim(3, 1) / 127.5 - 1).latent_dist.mode()
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="A tiny text-to-image pipeline and captioned pictures")
    parser.add_argument("root", type=Path, help="folder for pipeline/ and images/, e.g. data/demo-pipeline")
    parser.add_argument("--images", help="pictures in a folder per class, e.g. data/demo-shapes/train; else drawn")
    parser.add_argument("--num-train", type=int, default=200, help="pictures that are drawn")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    args = parser.parse_args()
    try:
        images = caption_images(args.root / "images", args.images, args.num_train)
    except ValueError as error:
        parser.error(str(error))
    pipeline = build_pipeline(args.seed)
    scale_latents(pipeline.vae, images)
    pipeline.save_pretrained(args.root / "pipeline")
    print(f"wrote a pipeline of random weights into {args.root / 'pipeline'}, captioned pictures into {images}")


if __name__ == "__main__":
    main()
