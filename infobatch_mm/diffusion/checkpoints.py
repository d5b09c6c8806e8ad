"""Checkpoints of a latent-diffusion training: found, checked, saved, set aside."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..accelerated import AcceleratedInfoBatch
from ..core.summary import differences

#: Within a checkpoint: the options of its run.
IDENTITY_FILE = "train_ldm.json"
#: Options that a resumed run may change.
_FREE = {
    *("config", "output_dir", "cpu", "train_data_dir", "dataset_name", "eval_data_dir", "vae", "latents_dir"),
    *("dataset_config_name", "cache_dir", "vae_scaling_factor"),  # the first stage's fingerprint holds it
    "max_train_steps",  # other batches take another number of steps for the same length: AcceleratedInfoBatch compares
    *("cache_latents", "dataloader_num_workers", "mixed_precision", "train_batch_size", "gradient_accumulation_steps"),
    *("checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "logger", "save_images_epochs"),
    *("eval_batch_size", "ddpm_num_inference_steps"),
}


def find_checkpoint(output_dir: Path, wanted: str | None) -> Path | None:
    """Find the checkpoint to resume from.

    Args:
        output_dir (Path): Where the run's checkpoints are; it need not be there yet.
        wanted (str | None): A folder, the name of one in ``output_dir``, or ``'latest'``; None begins a new run.

    Returns:
        Path | None: The checkpoint; None for a new run.

    Raises:
        ValueError: If it is not there, or a new run would mix its checkpoints with another run's.
    """
    found = checkpoints(output_dir)
    if wanted is None and not found and (output_dir / "model_index.json").is_file():
        raise ValueError(f"{output_dir} holds a finished training: delete it, or name another --output_dir")
    if wanted is None:
        if found:
            raise ValueError(
                f"{output_dir} holds checkpoints of another run, the last one {found[-1].name}: go on with it by "
                "--resume_from_checkpoint latest, or name another --output_dir"
            )
        return None
    if wanted == "latest":
        if not found:
            print(f"{output_dir} holds no checkpoint: a new training begins")
        return found[-1] if found else None
    path = Path(wanted) if Path(wanted).is_dir() else output_dir / wanted
    if not path.is_dir():
        names = ", ".join(each.name for each in found) or "none"
        raise ValueError(f"there is no checkpoint {wanted}; {output_dir} holds: {names}")
    return path


def checkpoints(output_dir: Path) -> list[Path]:
    """List the finished checkpoints of a run, oldest first."""
    # A half-written checkpoint ends in .partial, one that was set aside in .superseded: neither matches.
    found = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in output_dir.glob("checkpoint-*"))
    return [output_dir / match[0] for match in sorted((each for each in found if each), key=lambda each: int(each[1]))]


def set_aside(output_dir: Path, checkpoint: Path) -> None:
    """Rename the checkpoints after the one that is resumed, whose updates the resumed run makes again.

    Under their own names ``latest`` would mean one of them after a kill, and the run would go on from updates that are
    not its own.

    Args:
        output_dir (Path): Where the run's checkpoints are.
        checkpoint (Path): The checkpoint that is resumed.
    """
    found = checkpoints(output_dir)
    if checkpoint in found:
        for later in found[found.index(checkpoint) + 1 :]:
            aside = later.with_name(f"{later.name}.superseded")
            shutil.rmtree(aside, ignore_errors=True)
            later.rename(aside)


def run_identity(args: argparse.Namespace, first_stage: str) -> dict[str, Any]:
    """Collect what must be the same where a run is resumed.

    Args:
        args (argparse.Namespace): Options of :func:`.parse_options`.
        first_stage (str): Fingerprint of the first stage.

    Returns:
        dict[str, Any]: The options that a resumed run may not change, and the fingerprint.
    """
    options = {name: value for name, value in vars(args).items() if name not in _FREE}
    if args.max_train_steps is not None:
        options["num_epochs"] = None  # has no effect beside max_train_steps
    return {"first_stage": first_stage, **options}


def check_identity(checkpoint: Path, identity: dict[str, Any]) -> None:
    """Refuse a checkpoint of a run with other settings.

    Args:
        checkpoint (Path): The checkpoint.
        identity (dict[str, Any]): :func:`run_identity` of this run.

    Raises:
        ValueError: With the names and both values.
    """
    try:
        before = json.loads((checkpoint / IDENTITY_FILE).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot resume: {checkpoint} is no checkpoint of train_ldm.py: {error}") from error
    if differ := differences(before, identity):
        raise ValueError(
            f"cannot resume: {checkpoint} is of a run with other settings ({differ}); use the same, or another "
            "--output_dir"
        )


def save_checkpoint(
    output_dir: Path,
    accelerator: Accelerator,
    infobatch: AcceleratedInfoBatch,
    identity: dict[str, Any],
    names: Sequence[str],
    total_limit: int | None = None,
) -> None:
    """Save all of the run's state as ``checkpoint-<updates>``; every process must call it.

    Args:
        output_dir (Path): Where the run's checkpoints are.
        accelerator (Accelerator): The run's; what is registered with it is saved.
        infobatch (AcceleratedInfoBatch): The run's passes; its summary and scores are written too.
        identity (dict[str, Any]): :func:`run_identity` of this run.
        names (Sequence[str]): Names of the images.
        total_limit (int, optional): How many checkpoints are kept, at least 1. Defaults to None: all.
    """
    final = output_dir / f"checkpoint-{infobatch.updates_done}"
    # Written under another name and then renamed: a kill in between leaves the checkpoint before it as the latest.
    partial = output_dir / f"{final.name}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    infobatch.merge()
    # Without the first meeting a process could write into the folder that the main process deletes, without the second
    # the main process would rename a folder that others still write into.
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / IDENTITY_FILE).write_text(json.dumps(identity, indent=2) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        # Only now: deleted before, a kill could leave no checkpoint at all.
        if total_limit is not None:
            for old in checkpoints(output_dir)[:-total_limit]:
                shutil.rmtree(old)
    infobatch.write(output_dir, names)
