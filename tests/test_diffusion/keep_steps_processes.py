"""What ``test_keep_steps`` has two processes do, all in one launch; each writes down what it saw.

    accelerate launch keep_steps_processes.py FOLDER

Nothing is judged here, but that each step puts the learning rates back.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_diffusion.toy import Run, Setup

Seen = dict[str, Any]

KEEP: Any = dict(type="infobatch", prune_ratio=0.7, keep="steps")
#: How two processes share batches of 8 samples.
SHARED: dict[str, Setup] = {
    "default": Setup(samples=48, batch_size=4, policy=KEEP),
    "with a tail": Setup(samples=46, batch_size=4, policy=KEEP),
    "workers": Setup(samples=48, batch_size=4, policy=KEEP, workers=1, epochs=6),
    "split": Setup(samples=46, batch_size=8, policy=KEEP, split=True),
    "dispatched": Setup(samples=46, batch_size=4, policy=KEEP, dispatch=True),
    "dispatched, split": Setup(samples=46, batch_size=8, policy=KEEP, dispatch=True, split=True),
    "uneven": Setup(samples=46, batch_size=4, policy=KEEP, even=False),
    "drop_last": Setup(samples=46, batch_size=4, policy=KEEP, drop_last=True),
    "accumulated": Setup(samples=48, batch_size=4, policy=KEEP, accumulate=3),
}
#: Whose count of visits is the same multiple for one process and for two.
AS_ONE = Setup(samples=48, batch_size=4, policy=dict(type="random", prune_ratio=0.5, keep="steps"))  # type: ignore[arg-type]
STOP = 15


def seen_in(run: Run, stop: int = -1) -> Seen:
    """Train to the end, or to a step; writes down samples, weights and the learning rates before and in each step."""
    optimizer: Any = run.optimizer.optimizer
    looks: dict[str, float | None] = {"before": None, "within": None}

    def look(key: str) -> Any:
        def hook(*_: Any) -> None:
            looks[key] = float(optimizer.param_groups[0]["lr"])

        return hook

    def is_put_back(*_: Any) -> None:
        assert optimizer.param_groups[0]["lr"] == looks["before"]

    # Ours come with the first batch: of hooks before a step the first, and after it too, is this one.
    handles = [optimizer.register_step_pre_hook(look("before")), optimizer.register_step_post_hook(look("within"))]

    def on_step(step: int) -> bool:
        if len(handles) == 2:
            handles.append(optimizer.register_step_post_hook(is_put_back))
        run.journal[-1].update(looks, weights=run.infobatch._in_hand.weights.tolist())
        looks.update(before=None, within=None)
        return step == stop

    run.train(on_step)
    for handle in handles:
        handle.remove()
    return {"journal": run.journal, "books": run.infobatch.summary(), "parameters": run.parameters}


def everything(folder: Path) -> dict[str, Seen]:
    seen: dict[str, Seen] = {}
    for name, setup in SHARED.items():
        seen[name] = seen_in(Run(setup))
        killed = Run(setup)
        stop = STOP // setup.accumulate * setup.accumulate
        seen_in(killed, stop)
        killed.save(folder / name)
        seen[name] |= {"stop": stop, "resumed": seen_in(Run(setup).load(folder / name))["journal"]}
    seen["as one"] = seen_in(Run(AS_ONE))
    return seen


if __name__ == "__main__":
    folder, accelerator = Path(sys.argv[1]), Accelerator(cpu=True)
    seen = everything(folder)
    (folder / f"seen.{accelerator.process_index}.json").write_text(json.dumps(seen))
    accelerator.end_training()
