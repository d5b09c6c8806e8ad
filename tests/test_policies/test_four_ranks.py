"""Every policy on four processes: one plan, shared out, from scores that all of them know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from launching import meeting, on_ranks

from infobatch_mm import InfoBatch
from infobatch_mm.core.rng import generator

from .test_contract import POLICIES, N

WORLD, EPOCHS, BATCH = 4, 8, 12

pytestmark = pytest.mark.dist


def trained(policy: Any) -> dict[str, Any]:
    """The plan of each pass, what this process visited of it, and the scores at the end."""
    infobatch = InfoBatch(N, EPOCHS, policy=policy, batch_size=BATCH, seed=2)
    loader = infobatch.loader(list(range(N)))
    plans, visits = [], []
    for epoch in range(EPOCHS):
        taken: list[int] = []
        for index, _ in loader:
            if not taken:
                plans.append({key: infobatch.state_dict()["plan"][key] for key in ("indices", "weights", "pruned")})
            outputs = torch.rand(N, 1, generator=generator(4, epoch))[index].requires_grad_()
            infobatch.weigh(outputs[:, 0] ** 2, index, outputs=outputs).backward()
            taken += index.tolist()
        visits.append(taken)
    state = infobatch.state_dict()
    scores = {key: state[key] for key in ("scores", "seen", "times_seen", "unmerged")}
    return {"plans": plans, "visits": visits, "scores": scores}


def one_process(me: int, folder: str) -> None:
    with meeting(folder, me, WORLD):
        torch.save({name: trained(policy) for name, policy in POLICIES.items()}, Path(folder) / f"{me}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(WORLD, one_process, str(folder))
    return [torch.load(folder / f"{me}.pt", weights_only=True) for me in range(WORLD)]


@pytest.mark.parametrize("name", list(POLICIES))
def test_four_processes_walk_one_plan_between_them(ranks: list[dict[str, Any]], name: str):
    seen = [each[name] for each in ranks]
    pruned = 0
    for number in range(EPOCHS):
        plan = seen[0]["plans"][number]
        for other in seen[1:]:
            assert torch.equal(plan["indices"], other["plans"][number]["indices"])
            assert torch.equal(plan["weights"], other["plans"][number]["weights"])
        together = [i for each in seen for i in each["visits"][number]]
        assert sorted(together) == sorted(plan["indices"].tolist())
        assert len({len(each["visits"][number]) for each in seen}) == 1
        pruned += plan["pruned"]
    assert (pruned > 0) == (name != "none")
    for other in seen[1:]:
        assert all(
            torch.equal(seen[0]["scores"][key], other["scores"][key]) for key in ("scores", "seen", "times_seen")
        )
    assert not seen[0]["scores"]["unmerged"]
