"""Packaging of infobatch_mm."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "infobatch_mm/version.py").read_text())[1]

EXTRAS = {
    # The maintained forks of the OpenMMLab packages. Leave this extra out where another OpenMMLab
    # installation is there already: it has the same import names.
    "mm": [
        "torchvision",
        "onedl-mmengine>=0.10.12",
        "onedl-mmcv>=2.3",
        "onedl-mmsegmentation>=1.4",
        "onedl-mmpretrain>=1.3",
        "pillow",
    ],
    # Imports only where mmcv has its compiled operators (`make ops`); ftfy and regex are SAN's text encoder's.
    "det": ["onedl-mmdetection>=3.5", "ftfy", "regex"],
    # transformers and peft are for the text-to-image examples alone.
    "diffusers": [
        "diffusers>=0.30",
        "accelerate>=1.0",
        "torchvision",
        "pillow",
        "pyyaml",
        "tensorboard",
        "datasets>=2.14",
        "torch-fidelity>=0.4",
        "transformers>=4.41.2",
        "peft>=0.17",
    ],
    "report": ["matplotlib>=3.7", "rich>=13", "scipy>=1.12"],
    "test": ["pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.5", "accelerate>=1.0"],
    "dev": ["ruff>=0.6", "mypy>=1.11", "pre-commit>=3"],
}
EXTRAS["all"] = sorted({requirement for extra in EXTRAS.values() for requirement in extra})

setup(
    name="infobatch_mm",
    version=VERSION,
    description="Train segmentation and generative models on fewer samples: InfoBatch for MMEngine and PyTorch",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["infobatch_mm", "infobatch_mm.*"]),
    package_data={"infobatch_mm": ["py.typed"]},
    entry_points={"console_scripts": ["infobatch-mm = infobatch_mm.cli.__main__:main"]},
    install_requires=["torch>=2.0", "numpy>=1.23"],
    extras_require=EXTRAS,
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
