"""The pruned arms of a comparison, and their configs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config

from .request import Request
from .specs import Spec, check_names, folder_of, parse_specs

_IMPORT = "infobatch_mm.engine"


@dataclass(frozen=True)
class PrunedArm:
    """A pruned arm.

    Attributes:
        name (str): In tables and files.
        config (Path): Its config; for an arm of ``--policies`` it has yet to be written, by :func:`write_config`.
        spec (Spec, optional): Of an arm of ``--policies``.
    """

    name: str
    config: Path
    spec: Spec | None = None


def pruned_arms(request: Request, folder: Path) -> list[PrunedArm]:
    """The pruned arms that a user asks for; the only one of a pair of configs is called ``infobatch``.

    Args:
        request (Request): What is asked for.
        folder (Path): Where configs of ``--policies`` go.

    Raises:
        ValueError: If there are none, two of the same name, or a policy that cannot be made.
    """
    specs = parse_specs(request.policies)
    configs = request.pruned
    if not specs and not configs:
        raise ValueError("there is no pruned arm: give a pruned config, or --policies")
    names = ["infobatch"] if len(configs) == 1 and not specs else [path.stem for path in configs]
    arms = [PrunedArm(name, path) for name, path in zip(names, configs, strict=True)]
    arms += [PrunedArm(spec.text, folder / f"{folder_of(spec.text)}.py", spec) for spec in specs]
    check_names(arm.name for arm in arms)
    return arms


def write_config(unpruned: Path, arm: PrunedArm) -> None:
    """Write the config of an arm of ``--policies``: the unpruned one with the hook.

    Args:
        unpruned (Path): The unpruned config.
        arm (PrunedArm): Others are left alone.
    """
    if arm.spec is None:
        return
    cfg = Config.fromfile(unpruned)
    imports = cfg.get("custom_imports") or {}
    names = imports.get("imports") or []
    names = [names] if isinstance(names, str) else list(names)
    cfg.custom_imports = {**imports, "imports": names if _IMPORT in names else [*names, _IMPORT]}
    hook = dict(type="InfoBatchHook", policy=arm.spec.policy, **arm.spec.hook)
    cfg.custom_hooks = [*(cfg.get("custom_hooks") or []), hook]
    arm.config.parent.mkdir(parents=True, exist_ok=True)
    cfg.dump(arm.config)
