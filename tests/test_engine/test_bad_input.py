"""One clear error before training starts: every row of docs/refusals.md."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("mmseg")

from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from mmengine.registry import DATA_SAMPLERS, LOOPS
from mmengine.runner import FlexibleRunner, IterBasedTrainLoop, Runner
from mmseg.registry import DATASETS
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from infobatch_mm import InfoBatch, Plan, PruningPolicy
from infobatch_mm.core import distributed
from infobatch_mm.demo.street import draw_dataset
from infobatch_mm.engine import InfoBatchHook, ReconstructionHook
from infobatch_mm.engine.loader import IndexedLoader
from infobatch_mm.engine.reconstruction import reconstruct
from infobatch_mm.engine.samplers import InfoBatchSampler, pass_loader
from infobatch_mm.engine.takeover import check_runner, watch
from infobatch_mm.loop import infobatch, passes, sizes
from infobatch_mm.losses import LossWeigher, attach_views
from infobatch_mm.losses.mixing import MixingView
from infobatch_mm.policies import RandomPolicy

from .test_resume import KillAt, Killed
from .toy import EPOCHS, ONE_LINE, config, train

ROWS = re.findall(
    r"^\| (.+?) \| `(.+)` \|$", (Path(__file__).parents[2] / "docs/refusals.md").read_text(), re.MULTILINE
)


@DATASETS.register_module(force=True)
class StreamOfScenes(IterableDataset):
    def __iter__(self) -> Any:
        yield {}

    def __len__(self) -> int:
        return 22


@DATASETS.register_module(force=True)
class NoScenes:
    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> Any:
        raise IndexError(index)


@DATA_SAMPLERS.register_module(force=True)
class OddBatchSampler(BatchSampler):
    def __init__(self, sampler: Any, batch_size: int) -> None:
        super().__init__(sampler, batch_size, drop_last=False)


@DATA_SAMPLERS.register_module(force=True)
class OddSampler(DefaultSampler):
    pass


@LOOPS.register_module(force=True)
class OddLoop(IterBasedTrainLoop):
    pass


class ShardedModel(torch.nn.Module):
    pass


class Case:
    """What a row has at hand to do wrong."""

    def __init__(self, scenes: Path, folder: Path, killed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.scenes = scenes
        self.folder = folder
        self.killed = killed
        self.monkeypatch = monkeypatch

    def train(self, spoil: Callable[[Config], None] = lambda cfg: None, **overrides: Any) -> None:
        """Train a config with something wrong in it: not a step is made."""
        cfg = config(self.scenes, overrides.pop("folder", self.folder), **overrides)
        spoil(cfg)
        runner = Runner.from_cfg(cfg)
        try:
            runner.train()
        finally:
            loop = runner._train_loop
            assert isinstance(loop, dict) or loop.iter in (0, 16)  # where it was, a resumed run was at 16

    def hooked(self, **arguments: Any) -> None:
        self.train(custom_hooks=[dict(type="InfoBatchHook", **arguments)])

    def resume(self, spoil: Callable[[dict[str, Any]], None] | None = None, **overrides: Any) -> None:
        """Resume a run that was killed, after something was done to its state."""
        self.trained()
        if spoil is not None:
            path = self.folder / "iter_16.pth"
            checkpoint = torch.load(path, weights_only=False)
            spoil(checkpoint["infobatch"]["pruner"])
            torch.save(checkpoint, path)
        self.train(resume=True, **overrides)

    def trained(self) -> None:
        """A copy of the run that was killed after iteration 17, with checkpoints at 8 and 16."""
        shutil.copytree(self.killed, self.folder, dirs_exist_ok=True)
        pointer = self.folder / "last_checkpoint"
        pointer.write_text(str(self.folder / Path(pointer.read_text()).name))

    def as_rank_of(self, world: int) -> None:
        """Seem to be the first of several processes, the others of which say seed 1."""

        def gather(into: list[Any], own: dict[str, str], group: Any = None) -> None:
            into[:] = [own] + [{**own, "seed": "1"}] * (world - 1)

        for module in (distributed, infobatch, passes, sizes):
            self.monkeypatch.setattr(module, "world_size", lambda group=None: world)
        self.monkeypatch.setattr(distributed, "dist", SimpleNamespace(all_gather_object=gather))


def set_to(path: str, **values: Any) -> Callable[[Config], None]:
    def spoil(cfg: Config) -> None:
        cfg.merge_from_dict({f"{path}.{key}": value for key, value in values.items()})

    return spoil


def flexible_runner(case: Case) -> None:
    cfg = config(case.scenes, case.folder)
    cfg.strategy = dict(type="SingleDeviceStrategy")
    FlexibleRunner.from_cfg(cfg).train()


def sharded_model(case: Case) -> None:
    runner = Runner.from_cfg(config(case.scenes, case.folder))
    runner._world_size, runner.model = 2, ShardedModel()
    check_runner(runner)


def other_average(case: Case) -> None:
    case.resume(custom_hooks=[dict(**ONE_LINE[0], score_ema=0.8)])


def text_retriever(case: Case) -> None:
    retrievers = pytest.importorskip("mmpretrain.models.retrievers")
    retriever = type(
        "TextRetriever", (retrievers.BaseRetriever,), dict.fromkeys(retrievers.BaseRetriever.__abstractmethods__)
    )
    attach_views(retriever.__new__(retriever), LossWeigher())


def moco(case: Case) -> None:
    attach_views(headed("MoCo", "ContrastiveHead"), LossWeigher())


def no_pixels(case: Case) -> None:
    reconstruct(headed("BEiT", "BEiTV1Head"), {})


def headed(model: str, head: str) -> torch.nn.Module:
    """A model of MMPretrain with a head, of which nothing else was built."""
    models = pytest.importorskip("mmpretrain.models")
    bare = [getattr(package, name) for package, name in ((models.selfsup, model), (models.heads, head))]
    made = [cls.__new__(cls) for cls in bare]
    for module in made:
        torch.nn.Module.__init__(module)
    made[0].head = made[1]
    return made[0]


class MixThree:
    def __call__(self, images: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images, (scores + scores.roll(1, 0) + scores.roll(2, 0)) / 3


def mix_three(case: Case) -> None:
    preprocessor, weigher = torch.nn.Module(), LossWeigher()
    preprocessor.batch_augments = MixThree()
    MixingView(preprocessor, "batch_augments", weigher, trusted=False).attach()
    weigher.begin(torch.ones(4))
    preprocessor.batch_augments(torch.zeros(4, 3, 2, 2), torch.eye(4))


class SizelessBatches:
    """Says neither how many samples a batch holds nor how many batches there are."""

    def __iter__(self) -> Iterator[list[int]]:
        yield [0, 1]


def sizeless_batches(case: Case) -> None:
    loop = SimpleNamespace(dataloader=DataLoader(range(22), batch_sampler=SizelessBatches()))
    watch(SimpleNamespace(cfg={}), loop)


def uneven_processes(case: Case) -> None:
    sampler = InfoBatchSampler(range(22), round_up=False)
    sampler.world = 4
    pass_loader(DataLoader(range(22), sampler=sampler), seed=0)


def differing_processes(case: Case) -> None:
    case.as_rank_of(2)
    InfoBatch(10, 2)


def other_work_dir(case: Case) -> None:
    case.trained()
    other = Path(shutil.copytree(case.killed, case.folder / "other"))
    summary = json.loads((other / "infobatch_summary.json").read_text())
    (other / "infobatch_summary.json").write_text(json.dumps({**summary, "prune_ratio": 0.3}))
    case.train(resume=True, load_from=str(case.folder / "iter_16.pth"), folder=other)


def longer_data_set(case: Case) -> None:
    more = draw_dataset(case.folder / "more", num_train=30, num_val=4, size=32)
    case.trained()
    case.scenes = more
    case.train(resume=True)


def renamed_data_set(case: Case) -> None:
    renamed = draw_dataset(case.folder / "renamed", num_train=22, num_val=4, size=32)
    for file in renamed.rglob("training/00021.*"):
        file.rename(file.with_stem("00021b"))
    case.trained()
    case.scenes = renamed
    case.train(resume=True)


def nan_score(state: dict[str, Any]) -> None:
    state["scores"][0] = float("nan")


def newer(state: dict[str, Any]) -> None:
    state["version"] = 99


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-100])
    return path


def named_but_cut(case: Case) -> None:
    case.trained()
    case.train(resume=True, load_from=str(cut(case.folder / "iter_16.pth")))


def named_but_missing(case: Case) -> None:
    case.trained()
    case.train(resume=True, load_from=str(case.folder / "iter_99.pth"))


def latest_cut(case: Case) -> None:
    case.trained()
    cut(case.folder / "iter_16.pth")
    (case.folder / "iter_8.pth").unlink()
    case.train(resume=True)


def divided(case: Case) -> None:
    case.as_rank_of(2)
    InfoBatch(10, 2, batch_size=5)


def too_early(case: Case) -> None:
    pruned = InfoBatch(10, 2)
    case.as_rank_of(2)
    iter(pruned.sampler)


def left_out(case: Case) -> None:
    pruned = InfoBatch(10, 4)
    for index in pruned.sampler:
        pruned.weigh(torch.tensor([float(index)]), [index])
    skipped = set(range(10)) - set(pruned.sampler)
    pruned.weigh(torch.ones(1), [skipped.pop()])


def too_soon(case: Case) -> None:
    pruned = InfoBatch(10, 2)
    first, _ = next(iter(pruned.loader(list(range(10)), 5)))
    later = (set(range(10)) - set(first.tolist())).pop()
    pruned.weigh(torch.ones(1), [later])


def two_iterators(case: Case) -> None:
    pruned = InfoBatch(10, 2)
    loader = pruned.loader(list(range(10)), 5)
    for index, _ in loader:
        pruned.weigh(torch.ones(5), index)
        list(loader)


def other_seed(case: Case) -> None:
    InfoBatch(10, 2, seed=1).load_state_dict(InfoBatch(10, 2, seed=0).state_dict())


def by_validations(case: Case) -> None:
    pruned = InfoBatch(10, 2, batch_size=5)
    pruned.schedule(ReduceLROnPlateau(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])))


def weigh(losses: Any, index: Any) -> None:
    pruned = InfoBatch(10, 2)
    list(pruned.sampler)
    pruned.weigh(torch.tensor(losses), index)


def by_ratio(ratio: float) -> list[dict[str, Any]]:
    return [dict(type="InfoBatchHook", prune_ratio=ratio, delta=0.75)]


class OddPolicy(PruningPolicy):
    name = "odd"

    def is_active(self, progress: float) -> bool:
        return True

    def draw(self, *args: Any) -> Plan:
        return Plan(torch.tensor([3, 1, 3, 2]), torch.ones(4), pruned=True)


def by_size(items: list[int]) -> torch.Tensor:
    return torch.tensor(sorted(items, reverse=True))


def without_first(items: list[int]) -> torch.Tensor:
    return torch.tensor([item for item in items if item])


def in_one(items: list[int]) -> torch.Tensor:
    return torch.tensor(items).sum()


def collated(collate_fn: Callable[[list[int]], torch.Tensor]) -> None:
    list(IndexedLoader(DataLoader(range(12), 4, collate_fn=collate_fn)))


CASES: dict[str, Callable[[Case], Any]] = {
    "`prune_ratio=1.5`": lambda case: case.hooked(prune_ratio=1.5),
    "`delta=0`": lambda case: case.hooked(delta=0),
    "`policy='x'`": lambda case: case.hooked(policy="x"),
    "`policy=dict(prune_ratio=0.5)`, without a type": lambda case: case.hooked(policy=dict(prune_ratio=0.5)),
    "`policy=dict(type='infobatch', quantil=0.5)`": lambda case: case.hooked(
        policy=dict(type="infobatch", quantil=0.5)
    ),
    "a policy's class in place of an instance": lambda case: InfoBatchHook(policy=RandomPolicy),
    "`prune_ratio` beside a policy's dict that says otherwise": lambda case: case.hooked(
        prune_ratio=0.5, policy=dict(type="infobatch", prune_ratio=0.4)
    ),
    "a policy of the user's that visits a sample twice": lambda case: case.hooked(policy=OddPolicy()),
    "a ratio and a target": lambda case: case.hooked(policy=dict(type="variance", prune_ratio=0.3, target_saving=0.4)),
    "a target that the passes cannot meet": lambda case: case.hooked(policy=dict(type="variance", target_saving=0.8)),
    "`rescale='steps'`": lambda case: case.hooked(policy=dict(type="random", rescale="steps")),
    "a bar below one": lambda case: case.hooked(policy=dict(type="auto", bar=0.9)),
    "a policy that asks what a pass is worth, and a score that is no norm": lambda case: case.hooked(
        policy="auto", score="forgetting"
    ),
    "a chance below the smallest": lambda case: case.hooked(policy="variance", prune_ratio=0.95),
    "`keep='step'`": lambda case: case.hooked(policy=dict(type="variance", keep="step")),
    "a rule for learning rates without smaller batches": lambda case: case.hooked(
        policy=dict(type="variance", lr_rule="sqrt")
    ),
    "a last layer that is none": lambda case: case.hooked(score=dict(type="gradient", layer="decode_head")),
    "`norm='precise'`": lambda case: case.hooked(norm="precise"),
    "`seed=-1`": lambda case: case.hooked(seed=-1),
    "`score_ema=1`": lambda case: case.hooked(score_ema=1),
    "two hooks": lambda case: case.train(custom_hooks=ONE_LINE * 2),
    "hook and sampler that differ": lambda case: case.train(
        set_to("train_dataloader.sampler", type="InfoBatchSampler", prune_ratio=0.3)
    ),
    "`InfoBatchSampler` without a hook or loop": lambda case: case.train(
        set_to("train_dataloader.sampler", type="InfoBatchSampler"), custom_hooks=[]
    ),
    "`policy='none'` and `InfoBatchSampler`": lambda case: case.train(
        set_to("train_dataloader.sampler", type="InfoBatchSampler", policy="none"),
        custom_hooks=[dict(type="InfoBatchHook")],
    ),
    "`policy='none'` and `item_seed=True`": lambda case: case.hooked(policy="none", item_seed=True),
    "an empty data set (MMSegmentation's own raise an error of theirs first)": lambda case: case.train(
        set_to("train_dataloader", dataset=dict(_delete_=True, type="NoScenes"))
    ),
    "an iterable data set": lambda case: case.train(
        set_to("train_dataloader", dataset=dict(_delete_=True, type="StreamOfScenes"), sampler=None)
    ),
    "a batch sampler of the user's own": lambda case: case.train(
        set_to("train_dataloader", batch_sampler=dict(type="OddBatchSampler"))
    ),
    "with `policy='none'`, a batch sampler of which nothing says how many samples a batch holds": sizeless_batches,
    "a sampler that repeats or weighs samples": lambda case: case.train(
        set_to("train_dataloader.sampler", type="OddSampler")
    ),
    "a loop of the user's own": lambda case: case.train(set_to("train_cfg", type="OddLoop")),
    "a global batch larger than the data set": lambda case: case.train(set_to("train_dataloader", batch_size=23)),
    "`drop_last=True` and less than one batch": lambda case: case.train(
        set_to("train_dataloader", batch_size=30, drop_last=True), **EPOCHS
    ),
    "a loss that gives no scalar": lambda case: case.train(
        lambda cfg: cfg.model.decode_head.update(loss_decode=dict(type="CrossEntropyLoss", reduction="none"))
    ),
    "`round_up=False` where samples do not divide": uneven_processes,
    "`num_repeats=0`": lambda case: InfoBatchSampler(range(10), num_repeats=0),
    "repeated augmentation of a fixed order": lambda case: InfoBatchSampler(range(10), shuffle=False, num_repeats=3),
    "a model of MMPretrain that is neither a classifier nor self-supervised": text_retriever,
    "a contrastive model: MoCo, SimCLR, DenseCL, SwAV, Barlow Twins": moco,
    "`ReconstructionHook(num_images=0)`": lambda case: ReconstructionHook(num_images=0),
    "`ReconstructionHook` with a model that predicts no pixels": no_pixels,
    "a batch augmentation that mixes three samples": mix_three,
    "a collate function that sorts or mixes its samples": lambda case: collated(by_size),
    "a collate function that drops samples": lambda case: collated(without_first),
    "a collate function whose order cannot be seen": lambda case: collated(in_one),
    "DeepSpeed, FSDP and other strategies of `FlexibleRunner`": flexible_runner,
    "a model that is sharded by its wrapper": sharded_model,
    "processes with another seed, data set or order of it": differing_processes,
    "another ratio, δ or policy": lambda case: case.resume(custom_hooks=by_ratio(0.3)),
    "a work directory that another run has left its summary in": other_work_dir,
    "a data set of another length": longer_data_set,
    "a data set with other file names; one of them is enough": renamed_data_set,
    "the other kind of loop": lambda case: case.resume(**EPOCHS),
    "a `max_iters` that the checkpoint is beyond, in iterations of full data": lambda case: case.resume(
        **{"train_cfg.max_iters": 15}
    ),
    "another `num_repeats` of repeated augmentation": lambda case: case.resume(
        **{"train_dataloader.sampler": dict(type="InfoBatchSampler", num_repeats=3)}
    ),
    "another `score_ema`": other_average,
    "a state of a newer package": lambda case: case.resume(newer),
    "a state with a NaN score, a sample planned twice, a missing entry": lambda case: case.resume(nan_score),
    "a named checkpoint that was cut short": named_but_cut,
    "a named checkpoint that does not exist": named_but_missing,
    "the latest was cut short, and it was the only one": latest_cut,
    "`InfoBatch(0, 10)`": lambda case: InfoBatch(0, 10),
    "`InfoBatch(10, 0)`": lambda case: InfoBatch(10, 0),
    '`InfoBatch(10, "4")`': lambda case: InfoBatch(10, "4"),
    "`attach` of a data set of another length": lambda case: InfoBatch(10, 2).attach(range(11)),
    "a batch size that does not divide among the processes": divided,
    "an `InfoBatch` that was made before the process group": too_early,
    "`weigh` of a mean instead of losses per sample": lambda case: weigh(1.0, [0]),
    "`weigh` with fewer indices than losses": lambda case: weigh([1.0, 2.0, 3.0], [0, 1]),
    "indices as floats": lambda case: weigh([1.0], [0.0]),
    "an index outside the data set": lambda case: weigh([1.0], [10]),
    "an index that is not part of the pass": left_out,
    "an index whose batch the loader has not handed out yet": too_soon,
    "a loader that is walked anew in the midst of a walk": two_iterators,
    "`loader(shuffle=True)`, or a sampler": lambda case: InfoBatch(10, 2).loader(list(range(10)), shuffle=True),
    "a batch of the loader that does not make up the global one": lambda case: InfoBatch(10, 2, batch_size=4).loader(
        list(range(10)), 3
    ),
    "a state of another length of training, seed, order or `item_seed`": other_seed,
    "a schedule by validations": by_validations,
}


@pytest.fixture(scope="module")
def killed(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after iteration 17, with checkpoints at 8 and 16."""
    cfg = config(scenes, tmp_path_factory.mktemp("killed"))
    cfg.default_hooks.checkpoint.interval = 8
    with pytest.raises(Killed):
        train(cfg, KillAt(17))
    return Path(cfg.work_dir)


def test_every_row_of_the_table_is_run() -> None:
    assert [entry for entry, _ in ROWS] == list(CASES)


@pytest.mark.parametrize(("entry", "message"), ROWS, ids=[entry for entry, _ in ROWS])
def test_bad_input_is_refused_with_the_documented_message(
    scenes: Path, killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, message: str
) -> None:
    pattern = ".*".join(map(re.escape, message.split("...")))
    with pytest.raises(ValueError, match=pattern):
        CASES[entry](Case(scenes, tmp_path, killed, monkeypatch))


@pytest.mark.parametrize(
    "arguments",
    [dict(prune_ratio=1.0), dict(prune_ratio=-0.1), dict(prune_ratio=float("nan")), dict(delta=1.2)],
)
def test_arguments_out_of_range_are_refused_with_their_value(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(arguments.values())))):
        InfoBatchHook(**arguments)


def test_a_config_without_train_loop_is_one_clear_error(scenes: Path, tmp_path: Path) -> None:
    cfg = config(scenes, tmp_path)
    for key in ("train_cfg", "train_dataloader", "optim_wrapper", "param_scheduler"):
        cfg.pop(key)
    runner = Runner.from_cfg(cfg)
    with pytest.raises(RuntimeError, match="train_loop"):
        runner.train()


def test_validation_and_test_ignore_the_hook(scenes: Path, tmp_path: Path) -> None:
    cfg = config(scenes, tmp_path)
    cfg.test_dataloader, cfg.test_evaluator = cfg.val_dataloader, cfg.val_evaluator
    cfg.test_cfg = dict(type="TestLoop")
    runner = Runner.from_cfg(cfg)
    assert "mIoU" in runner.val()
    assert "mIoU" in runner.test()
