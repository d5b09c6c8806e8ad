"""Scores that are norms of gradients in a loop: exact, late, and worth what the true norms are worth."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from infobatch_mm import InfoBatch
from infobatch_mm.core.rng import generator
from infobatch_mm.core.sample_norms import SampleNorms, layer_squares
from infobatch_mm.core.systematic import proportional
from infobatch_mm.core.worth import cost, worth

pytestmark = pytest.mark.filterwarnings("ignore:InfoBatch")
N, B = 96, 8


def images(size: int = N) -> Tensor:
    """Images of which most are dull: a few have a structure."""
    source = generator(1)
    plain = 0.05 * torch.randn(size, 3, 8, 8, generator=source)
    strong = torch.rand(size, 1, 1, 1, generator=source) ** 4
    return plain + 4 * strong * torch.randn(size, 3, 8, 8, generator=source)


class Task:
    """A model, its data, and its losses by sample."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.x = images()
        hidden = 6
        convolutions = [nn.Conv2d(channels, hidden, 3, padding=1) for channels in (3, hidden)]
        self.body = nn.Sequential(convolutions[0], nn.GELU(), convolutions[1])
        self.noise = torch.randn(self.x.shape, generator=generator(2))
        self.name = name
        if name == "classifier":
            self.y = (self.x.flatten(1).std(1) > 0.4).long()
            self.head: nn.Module = nn.Linear(hidden, 2)
        elif name == "segmentor":
            self.y = (self.x.mean(1) > 0.5).long() + (self.x.mean(1) < -0.5).long() * 2
            self.head = nn.Conv2d(hidden, 3, 1)
        else:
            self.head = nn.Conv2d(hidden, 3, 3, padding=1)

    def features(self, x: Tensor) -> Tensor:
        found = self.body(x)
        return found.mean((2, 3)) if self.name == "classifier" else found

    def inputs(self, index: Tensor) -> tuple[Tensor, Tensor]:
        x = self.x[index]
        if self.name != "denoiser":
            return x, self.y[index]
        return 0.7 * x + 0.7 * self.noise[index], x

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.name == "denoiser":
            return F.mse_loss(outputs, targets, reduction="none").flatten(1).mean(1)
        losses = F.cross_entropy(outputs, targets, reduction="none")
        return losses.flatten(1).mean(1) if losses.dim() > 1 else losses

    def true_norms(self) -> np.ndarray:
        """Norm of each sample's gradient in the last layer, by autograd."""
        x, targets = self.inputs(torch.arange(N))
        features = self.features(x).detach()
        parameters = {name: each.detach() for name, each in self.head.named_parameters()}

        def loss(parameters: dict[str, Tensor], feature: Tensor, target: Tensor) -> Tensor:
            return self.losses(functional_call(self.head, parameters, (feature[None],)), target[None])[0]

        gradients = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, features, targets)
        return sum(each.flatten(1).double().square().sum(1) for each in gradients.values()).sqrt().numpy()


def walked(task: Task, passes: int, learns: bool = True, scale: float = 1.0, **how: bool) -> InfoBatch:
    policy = dict(type="variance", prune_ratio=0.5, delta=1.0)
    infobatch = InfoBatch(N, num_epochs=passes + 1, batch_size=B, policy=policy)
    if how.get("layer"):
        infobatch.observe(task.head)
    parameters = [*task.body.parameters(), *task.head.parameters()]
    optimizer = torch.optim.Adam(parameters, 3e-3 if learns else 0.0)
    for _ in range(passes):
        for index, _ in infobatch.loader(list(range(N))):
            x, targets = task.inputs(index)
            outputs = task.head(task.features(x))
            given = outputs if how.get("outputs") else None
            loss = infobatch.weigh(task.losses(outputs, targets), index, outputs=given)
            optimizer.zero_grad()
            (scale * loss).backward()
            if learns:
                optimizer.step()
    return infobatch


def scores_of(infobatch: InfoBatch) -> np.ndarray:
    return infobatch.state_dict()["scores"].double().numpy()


TASKS = ["classifier", "segmentor", "denoiser"]


@pytest.mark.parametrize("name", TASKS)
def test_scores_are_the_norms_of_the_last_layers_gradient(name: str):
    task = Task(name)
    infobatch = walked(task, 3, learns=False, scale=1234.5, layer=True)
    assert infobatch.summary()["saved_ratio"] == pytest.approx(1 / 3, abs=0.02)
    assert scores_of(infobatch) == pytest.approx(task.true_norms(), rel=1e-4)


def test_without_a_layer_they_are_the_norms_at_the_outputs_and_without_outputs_the_losses():
    task = Task("segmentor")
    x, targets = task.inputs(torch.arange(N))
    outputs = task.head(task.features(x)).detach().requires_grad_()
    losses = task.losses(outputs, targets)
    norms = torch.autograd.grad(losses.sum(), outputs)[0].flatten(1).norm(dim=1)
    assert scores_of(walked(task, 2, learns=False, outputs=True)) == pytest.approx(norms.double().numpy(), rel=1e-4)
    assert scores_of(walked(task, 2, learns=False)) == pytest.approx(losses.detach().double().numpy(), rel=1e-5)


def efficiency(norms: np.ndarray, scores: np.ndarray) -> float:
    chances = proportional(scores, N / 2, 0.1)
    return worth(norms, chances) / cost(chances)


@pytest.mark.parametrize("name", TASKS)
def test_chances_by_the_scores_of_a_training_are_worth_nine_tenths_of_chances_by_true_norms(name: str):
    task = Task(name)
    scores, norms = scores_of(walked(task, 4, layer=True)), task.true_norms()
    best = efficiency(norms, norms)
    assert best > 1.1  # or there is nothing to reach
    assert efficiency(norms, scores) >= 0.9 * best
    ranks = [np.argsort(np.argsort(each)) for each in (scores, norms)]
    assert np.corrcoef(*ranks)[0, 1] > 0.6  # they are of the visit before: the model learns on


def test_the_root_of_a_denoising_loss_is_the_norm_at_the_output():
    task = Task("denoiser")
    walks = walked(task, 2, learns=False, outputs=True), walked(task, 2, learns=False)
    norms, losses = (scores_of(each) for each in walks)
    ratio = norms / np.sqrt(losses)
    assert ratio == pytest.approx(np.full(N, ratio[0]), rel=1e-4)


def test_scores_of_two_kinds_are_refused_also_after_a_resume():
    task = Task("classifier")
    infobatch = walked(task, 1, outputs=True)
    index = next(iter(infobatch.loader(list(range(N)))))[0]
    losses = torch.rand(B, requires_grad=True)
    message = "went by the gradients at the outputs so far, and would go by the losses alone now"
    with pytest.raises(ValueError, match=message):
        infobatch.weigh(losses, index)
    resumed = InfoBatch(N, num_epochs=2, batch_size=B, policy=dict(type="variance", delta=1.0))
    resumed.load_state_dict(infobatch.state_dict())
    index = next(iter(resumed.loader(list(range(N)))))[0]
    with pytest.raises(ValueError, match=message):
        resumed.weigh(losses, index)


def test_a_layer_that_was_not_called_and_outputs_of_others_are_refused():
    infobatch = InfoBatch(N, num_epochs=2, batch_size=B, policy="variance")
    index = next(iter(infobatch.loader(list(range(N)))))[0]
    losses, wrong = torch.rand(B, requires_grad=True), torch.rand(B - 1, 3, requires_grad=True)
    with pytest.raises(ValueError, match=r"outputs of shape \(7, 3\) are not what 8 losses were computed from"):
        infobatch.weigh(losses, index, outputs=wrong)
    with pytest.raises(ValueError, match=r"outputs of shape \(8,\) without a gradient"):
        infobatch.weigh(losses, index, outputs=torch.rand(B))
    with pytest.raises(ValueError, match=r"gradient of a ReLU cannot be taken apart"):
        infobatch.observe(nn.ReLU())
    with pytest.raises(ValueError, match=r"gradient of a Conv2d cannot be taken apart"):
        infobatch.observe(nn.Conv2d(4, 4, 1, groups=2))
    infobatch.observe(nn.Linear(3, 3))
    other = InfoBatch(N, num_epochs=2, batch_size=B, policy="variance")
    other.observe(nn.Linear(3, 3))
    index = next(iter(other.loader(list(range(N)))))[0]
    with pytest.raises(ValueError, match=r"was not called with the 8 samples of this weigh\(\)"):
        other.weigh(losses, index)


def test_a_batch_that_is_never_trained_on_keeps_its_scores_and_one_that_overflowed_too():
    task = Task("classifier")
    infobatch = InfoBatch(N, num_epochs=3, batch_size=B, policy=dict(type="variance", prune_ratio=0.5, delta=1.0))
    infobatch.observe(task.head)
    left_out, overflowed = set(), set()
    for number, (index, _) in enumerate(infobatch.loader(list(range(N)))):
        x, targets = task.inputs(index)
        loss = infobatch.weigh(task.losses(task.head(task.features(x)), targets), index)
        if number == 3:
            left_out = set(index.tolist())
            continue
        if number == 5:
            overflowed = set(index.tolist())
        (loss * (float("inf") if number == 5 else 1.0)).backward()
    state = infobatch.state_dict()
    unseen = set((~state["seen"]).nonzero().flatten().tolist())
    assert unseen == left_out | overflowed and infobatch.summary()["nonfinite_losses"] == 0


def test_norms_come_in_after_hundreds_of_batches_in_their_order():
    size = 600
    infobatch = InfoBatch(size, num_epochs=2, batch_size=1, policy="variance")
    parameter = torch.ones(1, requires_grad=True)
    for index, _ in infobatch.loader(list(range(size))):
        outputs = parameter * (index + 1.0)
        infobatch.weigh(outputs * (index + 1.0), index, outputs=outputs).backward()
    state = infobatch.state_dict()
    assert state["seen"].all() and state["scores"].tolist() == pytest.approx([i + 1.0 for i in range(size)])


def test_a_root_mean_square_over_visits():
    score = dict(type="gradient", score_ema=0.5)
    infobatch = InfoBatch(4, num_epochs=4, batch_size=4, policy="random", prune_ratio=0.0, score=score)
    parameter = torch.ones(1, requires_grad=True)
    for value in (3.0, 1.0):
        for index, _ in infobatch.loader(list("abcd")):
            outputs = parameter * torch.ones(4)
            infobatch.weigh(outputs * value, index, outputs=outputs).backward()
    # Weights of an average with decay 1/2 and its correction: 1/3 and 2/3.
    assert infobatch.state_dict()["scores"].tolist() == pytest.approx([(9 / 3 + 2 / 3) ** 0.5] * 4)


def weighed(policy: str = "variance") -> tuple[InfoBatch, Task]:
    task = Task("classifier")
    infobatch = InfoBatch(N, num_epochs=3, batch_size=B, policy=policy)
    infobatch.observe(task.head)
    return infobatch, task


def seen(infobatch: InfoBatch) -> int:
    return int(infobatch.state_dict()["seen"].sum())


def test_books_that_are_read_between_weighing_and_the_backward_pass_cost_no_score():
    for look in ("summary", "passes_done", "merge", "state_dict", "next batch"):
        infobatch, task = weighed()
        loader = infobatch.loader(list(range(N)))
        for index, _ in loader:
            x, targets = task.inputs(index)
            loss = infobatch.weigh(task.losses(task.head(task.features(x)), targets), index)
            if look == "next batch":
                next(iter(loader), None)
            elif callable(asked := getattr(infobatch, look)):
                asked()
            loss.backward()
        # The last batch's norms are recorded with the next one that is weighed.
        assert seen(infobatch) >= N - B, look


def test_a_look_without_a_gradient_and_a_second_backward_pass_change_no_score():
    infobatch, task = weighed()
    for number, (index, _) in enumerate(infobatch.loader(list(range(N)))):
        x, targets = task.inputs(index)
        with torch.no_grad():
            infobatch.weigh(task.losses(task.head(task.features(x)), targets), index)
        outputs = task.head(task.features(x))
        loss = infobatch.weigh(task.losses(outputs, targets), index)
        for _ in range(1 + number % 2):
            loss.backward(retain_graph=True)
        outputs.square().sum().backward()  # from elsewhere
    assert scores_of(infobatch) == pytest.approx(task.true_norms(), rel=1e-4)


def test_the_call_that_the_losses_come_from_is_found_among_others():
    infobatch, task = weighed()
    for index, _ in infobatch.loader(list(range(N))):
        x, targets = task.inputs(index)
        before = task.head(task.features(x.flip(0)))
        outputs = task.head(task.features(x))
        after = task.head(task.features(x * 2))
        infobatch.weigh(task.losses(outputs, targets), index).backward()
        del before, after
    assert scores_of(infobatch) == pytest.approx(task.true_norms(), rel=1e-4)
    index = next(iter(infobatch.loader(list(range(N)))))[0]
    x, targets = task.inputs(index)
    twice = task.head(task.features(x)) + task.head(task.features(x))
    with pytest.raises(ValueError, match="was called 2 times with the 8 samples"):
        infobatch.weigh(task.losses(twice, targets), index)


def test_a_compiled_model_is_watched_too():
    infobatch, task = weighed()
    model = torch.compile(nn.Sequential(task.body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), task.head), backend="eager")
    for index, _ in infobatch.loader(list(range(N))):
        x, targets = task.inputs(index)
        infobatch.weigh(task.losses(model(x), targets), index).backward()
    assert scores_of(infobatch) == pytest.approx(task.true_norms(), rel=1e-4)


def test_a_pass_without_norms_is_refused_at_its_end_and_a_function_of_the_outputs_at_once():
    infobatch, task = weighed()
    with pytest.raises(ValueError, match=r"no gradient came back for 96 of the 96 visits of this pass"):
        for index, _ in infobatch.loader(list(range(N))):
            x, targets = task.inputs(index)
            infobatch.weigh(task.losses(task.head(task.features(x)), targets), index)
    infobatch = InfoBatch(N, num_epochs=3, batch_size=B, policy="variance")
    index = next(iter(infobatch.loader(list(range(N)))))[0]
    x, targets = task.inputs(index)
    outputs = task.head(task.features(x))
    with pytest.raises(ValueError, match="give the very tensor that the model returned"):
        infobatch.weigh(task.losses(outputs, targets), index, outputs=outputs.softmax(-1))


def test_large_scales_half_precision_and_empty_parts():
    for scale in (2.0**70, 2.0**-60):
        task = Task("segmentor")
        infobatch = walked(task, 2, learns=False, scale=scale, layer=True)
        assert scores_of(infobatch) == pytest.approx(task.true_norms(), rel=1e-4)
    layer = nn.Linear(4, 4).half()
    inputs = torch.full((2, 5000, 4), 200.0).half()
    squares = layer_squares(layer, inputs, torch.ones(2, 5000, 4).half())
    assert torch.isfinite(squares).all() and squares[0] == pytest.approx(16 * 1e6**2 + 4 * 5000.0**2, rel=1e-3)
    infobatch, task = weighed()
    index = next(iter(infobatch.loader(list(range(N)))))[0]
    x, targets = task.inputs(index)
    losses = task.losses(task.head(task.features(x)), targets)
    infobatch.weigh(losses[:0], index[:0])


@pytest.mark.parametrize("name", TASKS)
def test_models_in_double_precision_have_scores_as_well(name: str):
    task = Task(name)
    for module in (task.body, task.head):
        module.double()
    task.x, task.noise = task.x.double(), task.noise.double()
    scores = scores_of(walked(task, 1, learns=False, layer=True))
    assert scores == pytest.approx(scores_of(walked(Task(name), 1, learns=False, layer=True)), rel=1e-3)


def test_small_gradients_of_half_precision_outlive_the_division_by_their_scale():
    outputs = torch.full((2, 4), 0.5, dtype=torch.float16, requires_grad=True) * 1
    norms = SampleNorms()
    norms.watch_outputs(outputs)
    losses = 1e-7 * outputs.float().sum(1)  # a gradient of 1e-7 is no number of float16
    objective = losses.sum()
    found = norms.expect(losses, torch.ones(2), objective)
    (objective * 2.0**14).backward()
    assert found.tolist() == pytest.approx([2e-7, 2e-7], rel=1e-2)
