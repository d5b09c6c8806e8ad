"""Features by which samples are compared with real images: Inception's, and the first stage's own.

torch-fidelity has the first; importing this file registers the second with it.
"""

from __future__ import annotations

import hashlib
import textwrap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from .first_stage import fingerprint, load_first_stage

try:
    import torch_fidelity
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.utils import create_feature_extractor
except ImportError as error:
    raise ImportError(
        "infobatch_mm.diffusion.features needs torch-fidelity: pip install 'infobatch_mm[diffusers]'"
    ) from error

#: Names, within torch-fidelity, of the extractor of its own FID, and of ours.
INCEPTION, FIRST_STAGE = "inception-v3-compat", "infobatch-mm-first-stage"


class FirstStageFeatures(FeatureExtractorBase):
    """Features for torch-fidelity: what the encoder of a first stage sees in the four quarters of an image.

    The features are the activations after the encoder's middle block, the deepest it has, averaged over each quarter:
    averages over the whole image would not tell a face from the same face upside down. Their name holds the fingerprint
    of the first stage, so that the cache never takes features of one first stage for features of another.

    Args:
        name (str): As registered.
        features_list (list[str]): ``['mid_block']``.
        feature_extractor_weights_path (str): Folder of the first stage, as for :func:`.load_first_stage`.
    """

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str, **_: Any) -> None:
        super().__init__(name, features_list)
        self.vae = load_first_stage(feature_extractor_weights_path)
        self._name = f"{name}-{fingerprint(self.vae)}"

    def get_name(self) -> str:
        return self._name

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("mid_block",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "mid_block"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, input: Tensor) -> tuple[Tensor]:
        """From images ``(B, 3, R, R)``, uint8, to features ``(B, 4 C)``, float64."""
        seen: list[Tensor] = []
        hook = self.vae.encoder.mid_block.register_forward_hook(lambda module, given, output: seen.append(output))
        try:
            self.vae.encoder(input.float() / 127.5 - 1)
        finally:
            hook.remove()
        # float64: torch-fidelity computes means and covariances in the precision of the features
        return (adaptive_avg_pool2d(seen[0].double(), 2).flatten(1),)


torch_fidelity.register_feature_extractor(FIRST_STAGE, FirstStageFeatures)


def check_inception(path: str | Path) -> str:
    """Refuse a file that holds no weights of torch-fidelity's Inception.

    Args:
        path (str | Path): The file.

    Returns:
        str: Its SHA-256 in hexadecimal: torch-fidelity's own file begins with ``6726825d``.

    Raises:
        ValueError: If it is missing, damaged, or of something else.
    """
    try:
        content = Path(path).read_bytes()
        # torch-fidelity unpickles the file, which would run code that a stranger put into it: refuse such a file first.
        torch.load(path, map_location="cpu", weights_only=True)
        create_feature_extractor(
            INCEPTION, ["2048"], cuda=False, feature_extractor_weights_path=str(path), verbose=False
        )
    except Exception as error:  # of a damaged file torch raises almost anything
        reason = textwrap.shorten(str(error), 200, placeholder=" ...")
        raise ValueError(
            f"cannot use the Inception weights {path} ({reason}): name the file of torch-fidelity's releases, "
            "weights-inception-2015-12-05-6726825d.pth, or do without"
        ) from error
    return hashlib.sha256(content).hexdigest()
