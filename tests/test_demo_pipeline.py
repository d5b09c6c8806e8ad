"""The tiny text-to-image pipeline and the captioned images."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

for package in ("diffusers", "transformers", "PIL"):
    pytest.importorskip(package, reason=f"{package} is not installed")

from diffusers import StableDiffusionPipeline
from PIL import Image

from infobatch_mm.demo import pipeline
from infobatch_mm.demo.shapes import CLASSES


def test_every_class_has_its_caption() -> None:
    assert pipeline.caption("ring") == "a drawing of a ring"
    assert pipeline.caption("stripes") == "a drawing of stripes"
    assert pipeline.caption("traffic_light") == "a drawing of a traffic light"
    assert len({pipeline.caption(name) for name in CLASSES}) == len(CLASSES)


def test_drawn_images_are_listed_with_their_captions(tmp_path: Path) -> None:
    root = pipeline.caption_images(tmp_path / "new" / "folder", num_train=20, size=24)
    lines = [json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines()]
    assert sorted(line["file_name"] for line in lines) == sorted(
        path.relative_to(root).as_posix() for path in root.rglob("*.png")
    )
    assert len(lines) == 20 and {path.name for path in root.iterdir()} == {*CLASSES, "metadata.jsonl"}
    for line in lines:
        assert line["text"] == pipeline.caption(line["file_name"].split("/")[0])
        with Image.open(root / line["file_name"]) as image:
            assert image.size == (24, 24)


def test_images_of_ones_own_are_copied_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "own/tall tree").mkdir(parents=True)
    Image.new("RGB", (8, 8), "green").save(tmp_path / "own/tall tree/1.jpg")
    (tmp_path / "own/tall tree/notes.txt").write_text("no image")
    root = pipeline.caption_images(tmp_path / "images", tmp_path / "own")
    (line,) = (root / "metadata.jsonl").read_text().splitlines()
    assert json.loads(line) == {"file_name": "tall tree/1.jpg", "text": "a drawing of a tall tree"}
    copied, own = (folder / "tall tree/1.jpg" for folder in (root, tmp_path / "own"))
    assert copied.read_bytes() == own.read_bytes() and not (tmp_path / "own/metadata.jsonl").exists()
    with pytest.raises(ValueError, match="holds no pictures in a folder per class"):
        pipeline.caption_images(tmp_path / "none", tmp_path / "own/tall tree")
    pipeline.caption_images(root, tmp_path / "own")  # the same again
    with pytest.raises(
        ValueError, match=r"holds other pictures already, tall tree/1\.jpg for one: name another folder"
    ):
        pipeline.caption_images(root, num_train=10)


def test_the_tokenizer_spells_every_word() -> None:
    tokenizer = pipeline.build_tokenizer()
    for text in ("a drawing of a circle", "Ünïcode, 42 & ☃!"):
        tokens = tokenizer(text).input_ids
        assert tokens[0] == tokenizer.bos_token_id and tokens[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in tokens[1:-1]  # which stands for what is not known
        spelt = tokenizer.decode(tokens, skip_special_tokens=True)
        assert spelt.replace(" ", "") == text.lower().replace(" ", "")
    padded = tokenizer(["a", "a drawing of stripes " * 9], padding="max_length", truncation=True).input_ids
    assert {len(tokens) for tokens in padded} == {pipeline.MAX_TOKENS}
    assert max(len(tokenizer(pipeline.caption(name)).input_ids) for name in CLASSES) <= pipeline.MAX_TOKENS


def test_the_command_writes_a_pipeline_that_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pipeline", str(tmp_path), "--num-train", "30"])
    pipeline.main()
    assert str(tmp_path / "pipeline") in capsys.readouterr().out
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    loaded.set_progress_bar_config(disable=True)
    picture = loaded("a drawing of a star", height=32, width=32, num_inference_steps=2).images[0]
    assert picture.size == (32, 32)

    # Latents have the spread of the noise, and are the picture's own.
    files = sorted((tmp_path / "images").glob("*/*.png"))
    pixels = torch.stack([_pixels(path) for path in files])
    with torch.no_grad():
        first, second = (loaded.vae.encode(pixels).latent_dist.sample() for _ in range(2))
    latents = first * loaded.vae.config.scaling_factor
    assert 0.7 < float(latents.std()) < 1.4
    torch.testing.assert_close(first, second, atol=1e-3, rtol=0)
    assert float((first[0] - first[1]).abs().mean()) > 0.02

    state = torch.get_rng_state()
    again, other = pipeline.build_pipeline(), pipeline.build_pipeline(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    for part in ("unet", "vae", "text_encoder"):
        mine = getattr(loaded, part).state_dict()
        assert all(torch.equal(mine[key], value) for key, value in getattr(again, part).state_dict().items())
        assert not all(torch.equal(mine[key], value) for key, value in getattr(other, part).state_dict().items())

    monkeypatch.setattr(sys, "argv", ["pipeline", str(tmp_path), "--images", str(tmp_path / "pipeline/none")])
    with pytest.raises(SystemExit):
        pipeline.main()
    assert "holds no pictures" in capsys.readouterr().err


def _pixels(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.asarray(image, dtype=np.float32).copy()).movedim(2, 0) / 127.5 - 1
