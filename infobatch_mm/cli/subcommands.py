"""The subcommands by name, and how one is started: in this process, or in one of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

#: Packages of the extra ``report``; what else a subcommand needs is in the extra of its host.
_REPORT = ("matplotlib", "rich", "scipy")


@dataclass(frozen=True)
class Subcommand:
    """What is known of a subcommand before it is imported.

    Attributes:
        line (str): What it does, for the list of subcommands.
        module (str): File in this folder, with a function ``main(argv=None)``.
        extra (str): Extra of the package that installs its host.
    """

    line: str
    module: str
    extra: str


SUBCOMMANDS = {
    "train": Subcommand("train a model from a config of MMEngine", "train", "mm"),
    "test": Subcommand("evaluate a checkpoint by the test settings of its config", "test", "mm"),
    "compare": Subcommand("train a config without and with pruning, and compare", "compare", "mm"),
    "plan": Subcommand("forecast what pruning is worth on a training, from a checkpoint", "plan", "mm"),
    "train-autoencoder": Subcommand(
        "train a first stage of latent diffusion on images", "train_autoencoder", "diffusers"
    ),
    "train-ldm": Subcommand("train a latent-diffusion model from a recipe", "train_ldm", "diffusers"),
    "eval-ldm": Subcommand("measure finished latent-diffusion models: FID, KID", "eval_ldm", "diffusers"),
    "compare-ldm": Subcommand("train a pair of recipes, unpruned and pruned, and compare", "compare_ldm", "diffusers"),
}


def run(name: str, argv: Sequence[str] | None = None) -> None:
    """Run a subcommand in this process.

    Args:
        name (str): One of :data:`SUBCOMMANDS`.
        argv (Sequence[str], optional): Its arguments. Defaults to the command line of this process.

    Raises:
        SystemExit: If a package that it imports is not installed, with the extra to install.
    """
    subcommand = SUBCOMMANDS[name]
    try:
        module = import_module(f"{__package__}.{subcommand.module}")
    except ImportError as error:
        package = _missing_package(error)
        if package is None:  # a broken installation, or a fault of ours: hiding its traceback would help nobody
            raise
        extra = "report" if package in _REPORT else subcommand.extra
        raise SystemExit(
            f"{Path(sys.argv[0]).name} needs {package}, which is not installed: pip install 'infobatch_mm[{extra}]'"
            + (f", or any {package} you have" if package.startswith("mm") else "")
        ) from error
    module.main(argv)


def _missing_package(error: BaseException | None) -> str | None:
    """The package that is not installed, also where a module of ours has said so in its own words; None if none is."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name is not None:
            return None if "." in error.name else error.name  # of a name with a dot, the package is there
        error = error.__cause__
    return None


def command(*module: str) -> list[str]:
    """The command that runs a module in a process of its own, with the packages that this process has.

    Args:
        *module (str): Its full name, and arguments.

    Returns:
        list[str]: For ``subprocess``; more arguments may follow.
    """
    # "-m" puts the working directory before all packages: a checkout there, such as mmseg/ or infobatch_mm/, would take
    # the place of the installed package that this process runs. Python 3.10 has no flag against it.
    has_directory = sys.path[:1] in ([""], [os.getcwd()])
    safe = ["-P"] if sys.version_info >= (3, 11) and not has_directory else []
    return [sys.executable, *safe, "-m", *module]
