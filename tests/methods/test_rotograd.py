"""RotoGrad against a direct implementation of its paper's Algorithm 1, and what carries its rotations around."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recon
from recon import methods
from recon.branching.modules.rotations import attach_rotations
from recon.errors import GradientError, UnknownNameError, UsageError
from recon.models import SmallResNet

TASKS = ("seg", "depth", "normal")


class Net(nn.Module):
    """A trunk whose output the heads see, through whatever comes in between."""

    def __init__(self, width: int = 5, tasks: tuple[str, ...] = TASKS) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, width), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(width, 2) for task in tasks})
        self.double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.trunk(x)
        return {task: head(z) for task, head in self.heads.items()}


class ConvNet(nn.Module):
    """Heads that are convolutions, with an operation in place right behind the features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 5, 3, padding=1)
        self.heads = nn.ModuleDict({task: nn.Conv2d(5, 1, 3) for task in TASKS})
        self.double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = F.relu(self.body(self.stem(x).tanh()), inplace=True)
        return {task: head(z) for task, head in self.heads.items()}


def made(make=Net, tasks=TASKS, seed=0, **options):
    """A model and its method, attached."""
    torch.manual_seed(seed)
    model = make()
    method = methods.get("rotograd", **options)
    method.setup(tasks)
    method.attach(model)
    return model, method


def batches(count: int, seed: int = 1, shape: tuple[int, ...] = (4,)) -> list[tuple[Tensor, dict[str, Tensor]]]:
    g = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64)  # noqa: E731
    return [(draw(7, *shape), {task: draw(7, 2) for task in TASKS}) for _ in range(count)]


def losses_of(model: nn.Module, x: Tensor, targets: dict[str, Tensor]) -> dict[str, Tensor]:
    # Scales as different as those of real tasks.
    return {
        task: 10.0**i * F.mse_loss(out, targets[task])
        for i, (task, out) in enumerate(model(x).items())
        if task in targets
    }


def square_losses(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return {task: (out - 1).square().mean() * (i + 1) for i, (task, out) in enumerate(model(x).items())}


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def matrices(model: nn.Module) -> dict[str, Tensor]:
    return {task: model.rotograd.matrix(task).detach().clone() for task in model.rotograd.tasks}


def train(model, method, steps, lr=0.05):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for x, targets in steps:
        optimizer.zero_grad()
        recon.backward(losses_of(model, x, targets), model, method)
        optimizer.step()


class Algorithm1:
    """The paper's Algorithm 1 word by word: rotations `expm(A - Aᵀ)`, gradients per task, losses per sample."""

    def __init__(self, model: Net, lr: float, decay: float) -> None:
        self.model, self.decay = model, decay
        size = model.heads[TASKS[0]].in_features
        self.A = {task: torch.zeros(size, size, dtype=torch.float64, requires_grad=True) for task in TASKS}
        self.optimizer = torch.optim.Adam(self.A.values(), lr=lr)
        self.first: dict[str, Tensor] = {}

    def rotation(self, task: str) -> Tensor:
        lower = self.A[task].tril()
        return torch.matrix_exp(lower - lower.T)

    def step(self, x: Tensor, targets: dict[str, Tensor]) -> None:
        z = self.model.trunk(x)
        r = {task: z.detach() @ self.rotation(task).detach().T for task in targets}
        G, g, heads = {}, {}, {}
        for task in targets:
            r[task].requires_grad_()
            loss = 10.0 ** TASKS.index(task) * F.mse_loss(self.model.heads[task](r[task]), targets[task])
            own = list(self.model.heads[task].parameters())
            g[task], *heads[task] = torch.autograd.grad(loss, [r[task], *own])
            G[task] = g[task] @ self.rotation(task).detach()
            self.first.setdefault(task, G[task].norm())
        U = {task: G[task] / G[task].norm() for task in G}
        alpha = {task: G[task].norm() / self.first[task] for task in G}
        total = sum(alpha.values())
        C = sum(alpha[task] / total * G[task].norm() for task in G)
        z.backward(C * sum(U.values()))
        for task in heads:
            for p, gradient in zip(self.model.heads[task].parameters(), heads[task], strict=True):
                p.grad = gradient
        v = sum(U.values()) / len(U)
        self.optimizer.zero_grad()
        for task in G:
            rotation_loss = -sum(torch.dot(self.rotation(task).T @ g[task][n], v[n]) for n in range(len(x)))
            rotation_loss.backward()
        self.optimizer.step()
        for group in self.optimizer.param_groups:
            group["lr"] *= self.decay


def test_it_is_algorithm_1():
    model, method = made(lr=0.05, decay=0.9)
    oracle = Algorithm1(copy.deepcopy(model), lr=0.05, decay=0.9)
    del oracle.model._modules["rotograd"]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, oracle.model)]
    steps = batches(6)
    del steps[2][1]["depth"], steps[3][1]["depth"], steps[0][1]["normal"]
    for x, targets in steps:
        for optimizer in optimizers:
            optimizer.zero_grad()
        recon.backward(losses_of(model, x, targets), model, method)
        oracle.step(x, targets)
        expected = gradients_of(oracle.model)
        assert len(expected) == 4 + 2 * len(targets)
        torch.testing.assert_close(gradients_of(model), expected, rtol=1e-9, atol=1e-12)
        for optimizer in optimizers:
            optimizer.step()
    for task, R in matrices(model).items():
        torch.testing.assert_close(R, oracle.rotation(task).detach(), rtol=1e-9, atol=1e-12)
        assert (R - torch.eye(5)).abs().max() > 0.1


def test_rotations_stay_orthogonal():
    model, method = made(lr=0.3, decay=1.0)
    train(model, method, batches(200), lr=1e-4)
    for R in matrices(model).values():
        torch.testing.assert_close(R @ R.T, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-6)
        assert torch.linalg.det(R) > 0
        assert (R - torch.eye(5)).abs().max() > 0.5


def test_it_is_joint_training_where_lengths_are_equal_and_nothing_is_turned():
    model, method = made(lr=0.0)
    with torch.no_grad():
        first = model.heads["seg"].weight
        for shift, task in enumerate(TASKS):
            model.heads[task].weight.copy_(first.roll(shift, dims=1))
    x = batches(1)[0][0]
    weights = recon.backward({task: out.sum() for task, out in model(x).items()}, model, method)
    assert [w.item() for w in weights.values()] == pytest.approx([1, 1, 1])
    found = gradients_of(model)
    model.zero_grad()
    sum(out.sum() for out in model(x).values()).backward()
    torch.testing.assert_close(found, gradients_of(model))


def branched_net() -> nn.Module:
    return recon.convert(Net(), recon.BranchPlan.grouped({"trunk.2": [["seg", "normal"], ["depth"]]}, TASKS), x_of(Net))


def branched_conv_net() -> nn.Module:
    return recon.convert(ConvNet(), recon.BranchPlan.per_task(["stem"], TASKS), x_of(ConvNet))


def x_of(make) -> Tensor:
    image = make in (ConvNet, branched_conv_net)
    return torch.randn(3, *((2, 6, 6) if image else (4,)), dtype=torch.float64)


@pytest.mark.parametrize("make", [Net, ConvNet, branched_net, branched_conv_net])
def test_gradients_are_weighted_before_the_features_and_plain_behind(make):
    model, method = made(make, lr=0.1)
    for _ in range(4):
        recon.backward(square_losses(model, x_of(make)), model, method)  # turn
    x = x_of(make)
    model.zero_grad()
    # The network as it is now, its rotations too, differentiated task by task.
    by_task = {}
    for task in TASKS:
        square_losses(model, x)[task].backward()
        by_task[task] = gradients_of(model)
        model.zero_grad()
    weights = recon.backward(square_losses(model, x), model, method)
    found = gradients_of(model)
    assert set(found) == set().union(*by_task.values())
    for name, gradient in found.items():
        parts = [(1 if name.startswith("heads") else weights[t]) * g[name] for t, g in by_task.items() if name in g]
        torch.testing.assert_close(gradient, sum(parts), msg=name)
    assert len({round(w.item(), 6) for w in weights.values()}) == 3


def test_branched_features_turn_within_their_group():
    model, method = made(branched_net, lr=0.1)
    train(model, method, batches(5))
    turned = {task: (R - torch.eye(5)).abs().max().item() for task, R in matrices(model).items()}
    assert turned["depth"] == 0
    assert min(turned["seg"], turned["normal"]) > 0.1


def test_rotations_bring_gradients_together():
    # Two heads that want the opposite of each other: turned by a quarter in the plane, and flipped there.
    tasks = ("a", "b")
    model, method = made(lambda: Net(2, tasks), tasks, lr=0.05, decay=1.0)
    with torch.no_grad():
        angle = torch.tensor(0.9 * math.pi)
        turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2).double()
        model.heads["b"].weight.copy_(model.heads["a"].weight @ turn)
    x = batches(1)[0][0]

    def cosine() -> float:
        losses = {task: out.sum() for task, out in model(x).items()}
        seen = model.rotograd.features["a"].shared
        a, b = (torch.autograd.grad(loss, seen, retain_graph=True)[0].flatten() for loss in losses.values())
        return F.cosine_similarity(a, b, dim=0).item()

    cosines = [cosine()]
    for _ in range(3):
        for _ in range(20):
            recon.backward({task: out.sum() for task, out in model(x).items()}, model, method)
        cosines.append(cosine())
    assert cosines[0] < -0.9
    assert cosines == sorted(cosines)
    assert cosines[-1] > 0.95


def test_only_the_first_features_turn():
    model, method = made(size=2, lr=0.1)
    train(model, method, batches(5))
    assert matrices(model)["seg"].shape == (2, 2)
    z = torch.randn(3, 5, dtype=torch.float64)
    turned = model.rotograd.turn(z, "seg")
    assert torch.equal(turned[:, 2:], z[:, 2:])
    torch.testing.assert_close(turned[:, :2], z[:, :2] @ matrices(model)["seg"].T)


def test_channels_turn_in_images():
    model, method = made(ConvNet, lr=0.1)
    recon.backward(square_losses(model, x_of(ConvNet)), model, method)
    z = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    expected = torch.einsum("ij,njhw->nihw", matrices(model)["depth"], z)
    torch.testing.assert_close(model.rotograd.turn(z, "depth"), expected)
    torch.testing.assert_close(model.rotograd.turn(expected, "depth", back=True), z)


def test_an_absent_task_keeps_its_state():
    model, method = made(lr=0.1)
    steps = batches(3)
    train(model, method, steps[:1])
    before = matrices(model)
    del steps[1][1]["depth"]
    train(model, method, steps[1:2], lr=0.0)
    after = matrices(model)
    assert torch.equal(after["depth"], before["depth"])
    assert not torch.equal(after["seg"], before["seg"])


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("order", ["model first", "method first"])
def test_the_state_continues_to_the_last_bit(order):
    steps = batches(8)
    model, method = made(lr=0.05, decay=0.9)
    train(model, method, steps[:4])
    states = saved(model.state_dict()), saved(method.state_dict())
    resumed, again = made(seed=3, lr=0.05, decay=0.9)
    pairs = list(zip((resumed, again), states, strict=True))
    for part, state in pairs if order == "model first" else reversed(pairs):
        part.load_state_dict(state)
    train(model, method, steps[4:])
    train(resumed, again, steps[4:])
    one, other = model.state_dict(), resumed.state_dict()
    assert list(one) == list(other)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert saved(method.state_dict())["_extra_state"]["initial"] == saved(again.state_dict())["_extra_state"]["initial"]


@pytest.mark.parametrize("make", [Net, branched_net])
def test_saved_models_take_their_rotations_along(tmp_path, make):
    model, method = made(make, lr=0.1)
    steps = batches(4)
    train(model, method, steps)
    recon.save(model, tmp_path)
    loaded = recon.load(tmp_path, Net())
    x = steps[0][0]
    for task, out in model(x).items():
        assert torch.equal(loaded(x)[task], out)
    for R in matrices(loaded).values():
        assert make is branched_net or (R - torch.eye(5)).abs().max() > 0.1
    tasks = [recon.Task(task, F.mse_loss) for task in TASKS]
    assert recon.evaluate(loaded, steps, tasks) == recon.evaluate(model, steps, tasks)
    further = methods.get("rotograd")
    further.setup(TASKS)
    further.attach(loaded)
    train(loaded, further, steps)
    for R in matrices(loaded).values():
        torch.testing.assert_close(R @ R.T, torch.eye(5, dtype=torch.float64))


def test_runs_that_leave_no_trace_may_be_the_first(tmp_path):
    model, method = made(lr=0.1)
    (x, _), *steps = batches(3)
    recon.costs(model, None, x)
    train(model, method, steps)
    recon.save(model, tmp_path)
    loaded = recon.load(tmp_path, Net())
    recon.costs(loaded, None, x)
    train(loaded, methods.get("pcgrad"), steps)  # goes on with another method, and the rotations as they are
    kept = matrices(loaded)
    assert all(torch.equal(R, kept[task]) for task, R in matrices(model).items())
    assert list(loaded(x)) == list(Net()(x))
    assert model.rotograd.layer == loaded.rotograd.layer == "trunk"


def test_trained_through_the_trainer():
    model, method = made(lambda: SmallResNet({"a": 3, "b": 3}), ("a", "b"))
    g = torch.Generator().manual_seed(0)
    loader = [(torch.randn(8, 1, 12, 12, generator=g), {t: torch.randint(3, (8,), generator=g) for t in "ab"})] * 12
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    history = recon.train(
        model, loader, dict.fromkeys("ab", F.cross_entropy), optimizer=optimizer, method=method, epochs=2
    )
    assert history.epochs[-1].losses["a"] < history.epochs[0].losses["a"]
    assert set(history.epochs[-1].weights) == {"a", "b"}
    assert model.rotograd.layer == "blocks"
    assert copy.deepcopy(model)(loader[0][0])["a"].shape == (8, 3)


def test_an_interrupted_training_resumes_to_the_last_bit(tmp_path):
    file = tmp_path / "run.checkpoint"
    steps = batches(5)
    losses = dict.fromkeys(TASKS, F.mse_loss)

    def run(epochs: int, **options) -> nn.Module:
        model, method = made(lr=0.05, decay=0.9)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        recon.train(model, steps, losses, optimizer=optimizer, method=method, epochs=epochs, **options)
        return model

    run(2, checkpoint=file)
    one, other = run(4, checkpoint=file, resume=True).state_dict(), run(4).state_dict()
    assert list(one) == list(other)
    assert any(key.startswith("rotograd.trunk.seg.") for key in one)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_mixed_precision_keeps_rotations_precise():
    model, method = made(lambda: SmallResNet(dict.fromkeys(TASKS, 3)), lr=0.1)
    for _ in range(5):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(torch.randn(8, 1, 12, 12))
            losses = {task: out.float().square().mean() for task, out in outputs.items()}
            recon.backward(losses, model, method)
    for R in matrices(model).values():
        assert R.dtype is torch.float32
        torch.testing.assert_close(R @ R.T, torch.eye(32), rtol=0, atol=4 * 32 * torch.finfo(torch.float32).eps)


def test_lengths_without_a_model():
    J = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))
    torch.testing.assert_close(methods.get("rotograd")(J), torch.tensor([2.0, 2.0], dtype=torch.float64))
    J[1] = 0
    torch.testing.assert_close(methods.get("rotograd")(J), torch.tensor([1.0, 0.0], dtype=torch.float64))


# --- what cannot work -------------------------------------------------------------------------------------


class Around(Net):
    """Shares a layer beside the trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.beside = nn.Linear(4, 2).double()

    def forward(self, x):
        return {task: out + self.beside(x) for task, out in super().forward(x).items()}


class Twice(Net):
    def forward(self, x):
        self.trunk(x)
        return super().forward(x)


def test_refuses_models_without_a_branch_point():
    model, _ = made(Around)
    with pytest.raises(UsageError, match="no module whose output all tasks' losses depend on"):
        model(x_of(Around))
    model, method = made(Around, layer="trunk")
    with pytest.raises(UsageError, match=r"reach beside\.weight, beside\.bias by another way"):
        recon.backward(square_losses(model, x_of(Net)), model, method)
    model, method = made(layer="trunk.1")
    with pytest.raises(UsageError, match=r"reach trunk\.2\.weight, trunk\.2\.bias by another way"):
        recon.backward(square_losses(model, x_of(Net)), model, method)


def test_refuses_layers_that_give_no_shared_features():
    with pytest.raises(UnknownNameError, match=r"no module named 'trunc'\. Did you mean 'trunk'"):
        made(layer="trunc")
    with pytest.raises(UsageError, match="runs more than once"):
        made(Twice, layer="trunk")[0](x_of(Net))
    with pytest.raises(UsageError, match="size is 9, but 'trunk' has only 5"):
        made(layer="trunk", size=9)[0](x_of(Net))
    model, _ = made(layer="trunk")
    model.trunk[3] = nn.Flatten(0)
    with pytest.raises(UsageError, match=r"must be one tensor of features .* but is shape \(15,\)"):
        model(x_of(Net))
    model = branched_net()
    attach_rotations(model, (*TASKS, "other"), "trunk")
    with pytest.raises(UsageError, match=r"serves the tasks \['seg', 'depth', 'normal'\] only, not \['other'\]"):
        model(x_of(Net))
    model, method = made(layer="heads.seg")
    with pytest.raises(UsageError, match="loss of task 'depth' does not depend on the features"):
        recon.backward(square_losses(model, x_of(Net)), model, method)


def test_refuses_what_is_not_attached():
    model, method = Net(), methods.get("rotograd")
    with pytest.raises(UsageError, match=r"call setup\(task names\) before attach"):
        method.attach(model)
    with pytest.raises(UsageError, match="not attached to the model"):
        recon.backward(square_losses(model, x_of(Net)), model, method)
    method.attach(model)
    with pytest.raises(UsageError, match="No forward pass has computed gradients"):
        recon.backward({task: torch.ones((), requires_grad=True) for task in TASKS}, model, method)
    with pytest.raises(UsageError, match="attached to another model"):
        method.attach(Net())
    with pytest.raises(UnknownNameError, match="no task named 'dept'"):
        recon.backward({"dept": square_losses(model, x_of(Net))["depth"]}, model, method)


def test_refuses_models_that_cannot_take_rotations():
    model, _ = made(layer="trunk")
    with pytest.raises(UsageError, match=r"has rotations already, with the tasks .*, not \['a', 'b'\]"):
        attach_rotations(model, ("a", "b"))
    with pytest.raises(UsageError, match="with the layer 'trunk', not 'heads'"):
        attach_rotations(model, TASKS, "heads")
    taken = Net()
    taken.rotograd = 3
    with pytest.raises(UsageError, match="attribute 'rotograd' of its own"):
        attach_rotations(taken, TASKS)
    plan = recon.BranchPlan.per_task(["trunk.0"], TASKS)
    with pytest.raises(UsageError, match="runs once per task"):
        attach_rotations(recon.convert(Net(), plan, x_of(Net), mode="per-task"), TASKS)
    with pytest.raises(UsageError, match="trained by RotoGrad"):
        recon.convert(model, plan, x_of(Net))
    branched, _ = made(branched_net)
    with pytest.raises(UsageError, match="trained by RotoGrad"):
        recon.extract_task(branched, "seg")


def test_refuses_to_profile():
    model, method = made()
    profiler = recon.Profiler(model)
    with pytest.raises(UsageError, match="changes the gradients inside the model"):
        recon.backward(square_losses(model, x_of(Net)), model, method, profiler=profiler)


def test_refuses_several_processes(monkeypatch):
    model, method = made()
    losses = square_losses(model, x_of(Net))
    monkeypatch.setattr("recon.methods.rotograd.world_size", lambda: 2)
    with pytest.raises(UsageError, match="RotoGrad trains in one process"):
        recon.backward(losses, model, method)


def test_refuses_gradients_that_are_not_finite():
    model, method = made()
    losses = square_losses(model, x_of(Net))
    losses["depth"] = losses["depth"] * math.nan
    with pytest.raises(GradientError, match="gradient of task 'depth' at the shared features is not finite"):
        recon.backward(losses, model, method)


@pytest.mark.parametrize("options", [{"size": -1}, {"lr": -0.1}, {"lr": math.inf}, {"decay": 0.0}, {"decay": 1.5}])
def test_refuses_options_out_of_range(options):
    with pytest.raises(UsageError, match="needs a size and an lr of at least 0"):
        methods.get("rotograd", **options)


def test_a_state_of_other_rotations_does_not_load():
    model, _ = made()
    model(x_of(Net))
    other, _ = made(lambda: Net(5, ("seg", "depth")), ("seg", "depth"))
    with pytest.raises(RuntimeError, match="rotograd"):
        other.load_state_dict(model.state_dict())
