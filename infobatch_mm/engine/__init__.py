"""MMEngine: the hook, the sampler and the loops, in its root registries.

``custom_imports = dict(imports=['infobatch_mm.engine'], allow_failed_imports=False)`` registers them.
"""

try:
    import mmengine  # noqa: F401
except ImportError as error:
    raise ImportError(
        "infobatch_mm.engine needs MMEngine: pip install 'infobatch_mm[mm]', or any mmengine you have"
    ) from error

from .hook import InfoBatchHook
from .loops import InfoBatchEpochLoop, InfoBatchIterLoop
from .reconstruction import ReconstructionHook
from .samplers import InfoBatchSampler

__all__ = ["InfoBatchEpochLoop", "InfoBatchHook", "InfoBatchIterLoop", "InfoBatchSampler", "ReconstructionHook"]
