"""Accelerators other than CUDA's: faked, because none is here."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from infobatch_mm.core import distributed, rng


def test_generators_of_other_devices_are_kept(monkeypatch: pytest.MonkeyPatch):
    states = [torch.arange(4, dtype=torch.uint8)]
    fake = SimpleNamespace(
        is_available=lambda: True, get_rng_state=lambda: states[-1].clone(), set_rng_state=states.append
    )
    monkeypatch.setattr(torch, "npu", fake, raising=False)
    kept = rng.capture()
    states.append(torch.zeros(4, dtype=torch.uint8))
    rng.restore(kept)
    assert states[-1].tolist() == [0, 1, 2, 3]
    monkeypatch.delattr(torch, "npu")
    rng.restore(kept)  # elsewhere there is nothing to put it into
    assert len(states) == 3
    del kept["other"]  # as earlier versions wrote it
    rng.restore(kept)


@pytest.mark.parametrize(
    ("backends", "device"),
    [
        ("cpu:gloo,cuda:nccl", "cpu"),
        ("cpu:gloo,cuda:gloo", "cpu"),
        ("cuda:nccl", "cuda:3"),
        ("npu:hccl", "npu:3"),
        ("xpu:xccl", "xpu:3"),
    ],
)
def test_tensors_travel_from_where_their_group_takes_them(backends: str, device: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dist, "get_backend_config", lambda group: backends)
    made: list[str] = []

    def made_device(kind: str, index: int | None = None) -> str:
        made.append(kind if index is None else f"{kind}:{index}")
        return made[-1]

    monkeypatch.setattr(torch, "device", made_device)
    for kind in ("cuda", "npu", "xpu"):
        monkeypatch.setattr(torch, kind, SimpleNamespace(current_device=lambda: 3), raising=False)
    assert distributed.device_of(None) == device  # type: ignore[comparison-overlap]
