"""What is checked of every library beside which recon works: a profiled step, and a branched model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

import recon
from recon.support.network.layers import find_layers
from tests import oracle

Losses = Callable[[nn.Module], Mapping[str, Tensor]]
"""Runs the model on a batch; `{task: loss}`."""


def cosines_of(model: nn.Module, losses_of: Losses) -> dict[str, list[float]]:
    """`{layer: cosine of each pair of tasks}` of the layers that two tasks reach, by one plain backward a task."""
    gradients: dict[str, dict[int, Tensor]] = {}
    for task in losses_of(model):
        model.zero_grad()
        losses_of(model)[task].backward()
        gradients[task] = {id(p): p.grad.detach().clone() for p in model.parameters() if p.grad is not None}
    model.zero_grad()
    found: dict[str, list[float]] = {}
    for layer in find_layers(model):
        vectors = [
            torch.cat([by_id.get(id(p), torch.zeros_like(p)).flatten() for p in layer.parameters.values()])
            for by_id in gradients.values()
            if any(id(p) in by_id for p in layer.parameters.values())
        ]
        if len(vectors) > 1:
            found[layer.name] = [float(u @ v / (u.norm() * v.norm())) for u, v in combinations(vectors, 2)]
    return found


def check_profiled_step(model: nn.Module, losses_of: Losses) -> recon.ConflictMap:
    """One step of a profiler leaves the gradients of the sum, and counts the cosines that plain autograd gives."""
    expected = cosines_of(copy.deepcopy(model), losses_of)
    plain = copy.deepcopy(model)
    torch.stack(list(losses_of(plain).values())).sum().backward()
    profiler = recon.Profiler(model)
    profiler.backward(losses_of(model))
    assert_same_gradients(model, plain)
    cmap = profiler.conflict_map()
    assert (cmap.steps, cmap.skipped) == (1, 0)
    assert [layer.name for layer in cmap.layers] == list(expected) and expected
    for layer in cmap.layers:
        cosines = torch.tensor(expected[layer.name], dtype=torch.float64).clamp(
            -1, 1
        )  # rounding: a layer of one number
        counts = torch.histc(cosines, 200, -1, 1)
        assert layer.histogram.tolist() == counts.tolist(), layer.name
    return cmap


def check_branched(model: nn.Module, plan: recon.BranchPlan, inputs: Any) -> nn.Module:
    """A branched model computes the original with each task's copies, in both modes; the tasks are named by letters."""
    branched = recon.convert(model, plan, inputs)
    tried = copy.deepcopy(branched)
    oracle.perturb(tried)
    for training in (True, False):
        oracle.check(lambda: copy.deepcopy(model), tried.train(training), inputs)
    oracle.assert_no_crosstalk(tried, inputs)
    return branched


def assert_same_gradients(model: nn.Module, expected: nn.Module) -> None:
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            oracle.assert_close(ours.grad, theirs.grad, f"gradient of {name}")
