"""Processes on accelerate, for tests."""

from __future__ import annotations


def accelerate_launch(processes: int | str = 2) -> list[str]:
    """Arguments of the interpreter that start a script in so many processes, which meet at a free port."""
    return [
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes), "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
    ]


def forget_accelerators() -> None:
    """Have the next ``Accelerator`` be as the first; processes that met stay together."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    together = PartialState._shared_state and PartialState().num_processes > 1
    AcceleratorState._reset_state(reset_partial_state=not together)
    GradientState._reset_state()
