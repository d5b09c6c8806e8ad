"""Python snippets of the README and the pages behind it, run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parents[1]


def snippet(heading: str, page: str = "README.md") -> str:
    """The first Python block below a heading."""
    text = (ROOT / page).read_text()
    return re.search(rf"^##+ {heading}\n.*?^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[1]


def data(num_samples: int) -> TensorDataset:
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(num_samples, 4, generator=drawn)
    return TensorDataset(x, (x.sum(1) + torch.randn(num_samples, generator=drawn) > 0).long())


def test_the_loop_of_your_own_prunes_and_ends_where_its_schedule_ends(capsys: pytest.CaptureFixture):
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names: dict[str, Any] = dict(dataset=data(2000), model=model, optimizer=optimizer, F=F, OneCycleLR=OneCycleLR)
    exec(snippet("In a loop of your own"), names)
    saved = float(capsys.readouterr().out)
    assert 0.2 < saved < 0.4375
    # OneCycleLR ends far below where it began, and only there.
    scheduler = names["scheduler"]
    assert scheduler.last_epoch == scheduler.total_steps == 200 * 16
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 25 / 1e4, abs=1e-7)
    assert names["infobatch"].passes_done == 200
    names["loader"]._loader._iterator._shutdown_workers()


def test_the_lines_in_a_diffusers_script_run(tmp_path: Path):
    pytest.importorskip("diffusers")
    from accelerate import Accelerator
    from diffusers import DDPMScheduler

    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    noise = torch.randn(4, 4)
    bar: list[float] = []

    class Names(dict):
        """What the script has at hand; its model is called anew for each batch."""

        def __getitem__(self, name: str) -> Any:
            return model(noise) if name == "model_output" else super().__getitem__(name)

    class Bar:
        def set_postfix(self, loss: float) -> None:
            bar.append(loss)

    class Args:
        num_epochs, checkpointing_steps, output_dir = 4, 2, str(tmp_path / "out")

    names = Names(
        accelerator=Accelerator(cpu=True),
        train_dataloader=DataLoader(data(32), 4, shuffle=True),
        model=model,
        optimizer=optimizer,
        lr_scheduler=LambdaLR(optimizer, lambda step: 1.0),
        args=Args,
        F=F,
        noise=noise,
        noise_scheduler=DDPMScheduler(),
        timesteps=torch.tensor([1, 10, 100, 900]),
        progress_bar=Bar(),
        global_step=2,
        folder=str(tmp_path / "checkpoint"),
    )
    exec(snippet("In a diffusers script"), names)
    assert len(bar) > 20 and (tmp_path / "out/infobatch_summary.json").exists()
    assert (tmp_path / "checkpoint").exists()


def test_the_policy_of_your_own_is_found_in_every_form(monkeypatch: pytest.MonkeyPatch):
    from infobatch_mm import InfoBatch
    from infobatch_mm.core import policy_registry

    monkeypatch.setattr(policy_registry, "_POLICIES", dict(policy_registry._POLICIES))
    names: dict[str, Any] = {"__name__": "my_project.policies"}
    exec(snippet("A policy of your own", "docs/usage.md"), names)
    for policy in ("drop", dict(type="drop", share=0.3), names["Drop"](0.3)):
        infobatch = InfoBatch(100, 4, policy=policy)
        for _ in range(4):
            for index, _ in infobatch.loader(list(range(100)), 10):
                infobatch.weigh(torch.ones(len(index)), index)
        assert [entry["kept"] for entry in infobatch.summary()["per_pass"]] == [70] * 4


def test_the_policy_of_chances_prunes():
    from infobatch_mm import InfoBatch, Thinning
    from infobatch_mm.core import AnnealedPolicy

    text = (ROOT / "docs/usage.md").read_text()
    block = re.search(r"```python\n(class BelowMedian.*?)```", text, re.DOTALL)[1]
    names: dict[str, Any] = dict(AnnealedPolicy=AnnealedPolicy, Thinning=Thinning)
    exec(block, names)
    infobatch = InfoBatch(40, 8, policy=names["BelowMedian"](0.5, 1.0), batch_size=4)
    loader = infobatch.loader(list(range(40)))
    for _ in range(8):
        for index, _ in loader:
            infobatch.weigh(index.float(), index)
    assert infobatch.summary()["saved_ratio"] > 0.1
    assert infobatch.summary()["policy"] == "below_median"


def test_the_lines_with_accelerate_run(tmp_path: Path):
    accelerate = pytest.importorskip("accelerate")
    model = torch.nn.Linear(4, 2)
    names: dict[str, Any] = dict(
        Accelerator=accelerate.Accelerator,
        dataset=data(40),
        num_epochs=3,
        batch_size=8,
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        folder=str(tmp_path),
    )
    from infobatch_mm import InfoBatch

    exec(snippet("With accelerate", "docs/usage.md"), {**names, "InfoBatch": InfoBatch, "OneCycleLR": OneCycleLR})
    assert (tmp_path / "custom_checkpoint_0.pkl").exists()
