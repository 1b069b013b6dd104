"""Aggregators that draw or remember something, against direct implementations of their papers' algorithms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from recon import methods
from recon.errors import UsageError
from recon.methods.aggregators.graddrop import follow_one_sign
from tests.task_gradients import every_count, every_kind, gradients

TASKS = ("seg", "depth", "normal")


def steps(kind: str, tasks: int, count: int = 4) -> list[Tensor]:
    return [gradients(kind, tasks, seed) for seed in range(count)]


# --- GradDrop ---------------------------------------------------------------------------------------------


def graddrop(J: Tensor, draws: Tensor, leak: float) -> Tensor:
    """Chen et al. 2020, Algorithm 1, lines 10 to 15."""
    purity = 0.5 * (1 + J.sum(dim=0) / J.abs().sum(dim=0))
    update = torch.zeros_like(J[0])
    for g in J:
        mask = ((purity > draws) * (g > 0) + (purity < draws) * (g < 0)).to(J.dtype)  # times leak, a bool is float32
        update += (leak + (1 - leak) * mask) * g
    return update


@pytest.mark.parametrize("leak", [0.0, 0.3, 1.0])
@every_count
@every_kind
def test_graddrop_is_algorithm_1(kind, count, leak):
    J = gradients(kind, count)
    draws = torch.rand(J.shape[1], generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    off = (follow_one_sign(J, draws, leak) - graddrop(J, draws, leak)).abs()
    assert (off <= (count + 4) * torch.finfo(torch.float64).eps * J.abs().sum(dim=0)).all()


@pytest.mark.parametrize("leak", [0.0, 0.3])
def test_graddrop_draws_one_number_for_each_coordinate(leak):
    """Over several blocks, and however they are cut."""
    J = torch.randn(3, 100_001, generator=torch.Generator().manual_seed(1))
    method = methods.get("graddrop", leak=leak)
    method.stream.generator = lambda device: torch.Generator(device).manual_seed(7)
    draws = torch.rand(J.shape[1], generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(method(J), graddrop(J, draws, leak))


def test_graddrop_keeps_a_sign_as_often_as_its_share():
    method = methods.get("graddrop", seed=3)
    J = torch.tensor([[3.0], [-1.0]]).expand(2, 200_000)
    first, second = method(J), method(J)
    assert set(first.tolist()) == {3.0, -1.0}
    for update in (first, second):
        share = (update > 0).double().mean().item()
        assert abs(share - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 200_000)
    # Another step and another seed are other draws.
    assert abs(((first > 0) == (second > 0)).double().mean().item() - 0.625) < 0.01
    assert not methods.get("graddrop", seed=4)(J).equal(first)
    assert methods.get("graddrop", seed=3)(J).equal(first)


def test_graddrop_leaves_the_gradients_alone():
    J = gradients("conflicting", 3)
    before = J.clone()
    methods.get("graddrop", leak=0.5)(J)
    assert J.equal(before)


# --- GradVac ----------------------------------------------------------------------------------------------


def gradvac(J: Tensor, targets: Tensor, orders: list[list[int]], beta: float) -> Tensor:
    """Wang et al. 2021, Algorithm 1, on the gradients themselves; updates `targets`."""
    update = torch.zeros_like(J[0])
    for i, order in enumerate(orders):
        g = J[i].clone()
        for j in order:
            cosine = (g @ J[j]) / (torch.linalg.norm(g) * torch.linalg.norm(J[j]))
            target = targets[i, j].clone()
            if cosine < target:
                sines = torch.sqrt(1 - cosine**2), torch.sqrt(1 - target**2)
                factor = torch.linalg.norm(g) * (target * sines[0] - cosine * sines[1])
                g = g + factor / (torch.linalg.norm(J[j]) * sines[1]) * J[j]
            targets[i, j] = (1 - beta) * target + beta * cosine
        update += g
    return update


@pytest.mark.parametrize("beta", [0.01, 0.5])
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("kind", ["random", "unequal", "conflicting", "agreeing"])
def test_gradvac_is_algorithm_1(kind, count, beta):
    stream = torch.Generator().manual_seed(7)
    method = methods.get("gradvac", beta=beta, seed=7)
    targets = torch.zeros(count, count, dtype=torch.float64)
    for J in steps(kind, count):
        orders = []
        for i in range(count):
            others = [j for j in range(count) if j != i]
            orders.append([others[k] for k in torch.randperm(count - 1, generator=stream).tolist()])
        torch.testing.assert_close(method(J), gradvac(J, targets, orders, beta), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(method.memory["targets"], targets)


def test_gradvac_stays_finite_where_tasks_always_agree():
    """Their usual cosine comes to be 1, and so does the one of the step, up to rounding."""
    method = methods.get("gradvac", beta=1.0)
    g = gradients("random", 1)[0]
    for step in range(60):
        J = torch.stack([g, g * (1 + 1e-9 * step), 2 * g])
        torch.testing.assert_close(method(J), J.sum(dim=0), rtol=1e-3, atol=1e-3)


# --- SDMGrad and MoDo -------------------------------------------------------------------------------------


def onto_simplex(v: Tensor) -> Tensor:
    """The nearest point of the simplex, by bisection on what is taken off."""
    low, high = v.min() - 1, v.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (v - middle).clamp(min=0).sum() > 1 else (low, middle)
    return (v - high).clamp(min=0)


@every_count
@every_kind
def test_sdmgrad_is_projected_gradient_descent(kind, count):
    """Xiao et al. 2023, Algorithm 1, with the scale of section 6.1 and the code's momentum."""
    method = methods.get("sdmgrad", lam=0.4, lr=0.7, iterations=5)
    w = torch.full((count,), 1 / count, dtype=torch.float64)
    for J in steps(kind, count):
        A = J @ J.T / torch.linalg.norm(J, dim=1).mean() ** 2
        velocity = torch.zeros(count, dtype=torch.float64)
        for _ in range(5):
            velocity = 0.5 * velocity + A @ (w + 0.4 / count)
            w = onto_simplex(w - 0.7 * velocity)
        expected = count * (w + 0.4 / count) / 1.4
        torch.testing.assert_close(method.weights(J @ J.T), expected, rtol=1e-6, atol=1e-6)


@every_count
@every_kind
def test_modo_is_one_projected_step(kind, count):
    """Chen et al. 2023, Algorithm 1, gradients in units of their root mean square norm."""
    method = methods.get("modo", gamma=0.3, rho=0.2)
    w = torch.full((count,), 1 / count, dtype=torch.float64)
    for J in steps(kind, count):
        G = J @ J.T
        w = onto_simplex(w - 0.3 * (G / G.diagonal().mean() @ w + 0.2 * w))
        torch.testing.assert_close(method.weights(G), count * w, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "options"), [("sdmgrad", {"lam": 0.0}), ("modo", {"rho": 0.0})])
def test_tracked_weights_come_to_be_those_of_mgda(name, options):
    J = gradients("agreeing", 3) * torch.tensor([[1.0], [1.2], [1.4]])
    method = methods.get(name, **options)
    for _ in range(500):
        weights = method.weights(J @ J.T)
    torch.testing.assert_close(weights, methods.get("mgda").weights(J @ J.T), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["sdmgrad", "modo", "excessmtl"])
def test_tasks_that_are_there_share_what_they_have(name):
    method = methods.get(name)
    method.setup(TASKS)
    for J in steps("conflicting", 3):
        method(J * torch.tensor([[1.0], [2.0], [4.0]]))

    def shares() -> Tensor:
        return method.memory["log_shares"].exp() if name == "excessmtl" else method.memory["shares"].clone()

    before = shares()
    J = gradients("conflicting", 2) * torch.tensor([[1.0], [3.0]])
    if name == "excessmtl":
        _, weights = method.combine(J, ("normal", "seg"))
        assert sum(weights.values()).item() == pytest.approx(2)
    else:
        assert method.weights(J @ J.T, tasks=("normal", "seg")).sum().item() == pytest.approx(2)
    after = shares()
    assert after[1] == before[1]
    assert after.sum().item() == pytest.approx(1)
    assert not torch.allclose(after[0], before[0], rtol=1e-6)


# --- ExcessMTL --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_count
def test_excess_mtl_is_the_formula(count, dtype, warmup):
    """He et al. 2024, eqs. (6), (7) and (9); over several blocks.

    A risk is a sum of n terms, off by some √n ulps. Up to four risks stand in an exponent, times lr = 1/2, and
    dividing by what the tasks have together doubles that.
    """
    n, epsilon = 70_001, torch.finfo(dtype).eps
    slack = 4 * n**0.5 * epsilon
    stream = torch.Generator().manual_seed(2)
    method = methods.get("excessmtl", lr=0.5, warmup=warmup)
    method.setup([f"task{i}" for i in range(count)])
    squares = torch.zeros(count, n, dtype=torch.float64)
    w, first = torch.ones(count, dtype=torch.float64) / count, torch.zeros(count, dtype=torch.float64)
    for step in range(5):
        J = torch.randn(count, n, generator=stream, dtype=torch.float64) * torch.arange(1, count + 1)[:, None]
        J[:, ::7] = 0  # never a gradient
        J[-1] /= step + 1
        squares += J**2
        risks = torch.nan_to_num(J**2 / squares.sqrt()).sum(dim=1)
        if step < warmup:
            first += risks / warmup
        else:
            w = w * torch.exp(0.5 * risks / first)
            w /= w.sum()
        update, weights = method.combine(J.to(dtype))
        torch.testing.assert_close(torch.stack(list(weights.values())).double(), count * w, rtol=slack, atol=0)
        off = (update.double() - count * w @ J).abs()
        assert (off <= (slack + count * epsilon) * (count * w @ J.abs())).all()
    assert count == 1 or not torch.allclose(w, torch.full_like(w, 1 / count), rtol=1e-2)


def test_excess_mtl_needs_the_same_parameters_in_every_step():
    method = methods.get("excessmtl")
    method(torch.ones(2, 5))
    with pytest.raises(UsageError, match="had 5 gradients of each task so far, but now got 6"):
        method(torch.ones(2, 6))
    assert method(torch.ones(2, 5)).isfinite().all()


def test_excess_mtl_passes_a_lone_task_by():
    """The parameters that it reaches are shared with none that is there."""
    method = methods.get("excessmtl")
    method.setup(TASKS)
    method(gradients("random", 3))
    before = {name: value.clone() for name, value in method.memory.items()}
    for J in (torch.ones(1, 0), torch.ones(1, 5)):
        update, weights = method.combine(J, ("depth",))
        assert update.equal(J[0])
        assert weights["depth"].item() == 1
    assert all(value.equal(before[name]) for name, value in method.memory.items())


def test_excess_mtl_of_a_task_without_a_gradient_at_first():
    method = methods.get("excessmtl")
    J = gradients("random", 3)
    method(J * torch.tensor([[1.0], [0.0], [1.0]]))
    for _ in range(3):
        assert method(J).isfinite().all()
