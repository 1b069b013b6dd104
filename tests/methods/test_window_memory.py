"""What a step task by task holds at its peak, as torch's allocator saw it (`torch.profiler`, `profile_memory`)."""

import json

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import recon
from recon.profiling.sketches.sketch import SIZE

TASKS = tuple("abcdef")


class Wide(nn.Module):
    """Its shared layers weigh far more than everything else of a step."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(*[part for _ in range(4) for part in (nn.Linear(500, 500), nn.Tanh())])
        self.heads = nn.ModuleDict({task: nn.Linear(500, 1) for task in TASKS})

    def loss(self, task):
        return self.heads[task](self.body(torch.ones(2, 500))).square().mean()


def peak(step, folder):
    """Bytes that were held at the worst moment of a step, above those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    trace.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    held = sorted((e["ts"], e["args"]) for e in events if e.get("name") == "[memory]")
    totals = [args["Total Allocated"] for _, args in held]
    return max(totals) - (totals[0] - held[0][1]["Bytes"])


@pytest.mark.parametrize(
    ("method", "memory", "gradients"),
    [
        (None, None, 1),  # the sum, which becomes .grad
        (None, "sketch", 1),
        (None, "exact", len(TASKS) + 1),  # each task's, and .grad
        ("pcgrad", None, len(TASKS) + 1),
        ("cagrad", "exact", len(TASKS) + 1),
        ("gls", None, len(TASKS) + 1),
    ],
)
def test_the_peak_of_a_step(method, memory, gradients, tmp_path):
    model = Wide()
    shared = sum(p.numel() * p.element_size() for p in model.body.parameters())
    profiler = memory and recon.Profiler(model, memory=memory)
    window = recon.Window(model, method, profiler=profiler, tasks=TASKS)

    def step():
        model.zero_grad()
        for task in TASKS:
            window.add(task, model.loss(task))
        window.step()

    if memory == "sketch":
        step()  # makes the random signs, of a size that no model changes
        shared += 2 * len(TASKS) * len(recon.Profiler(model).layers) * SIZE * 4
    # The gradient that is being made weighs 1 / 4 of all; the graph, with a batch of 2, next to nothing.
    for _ in range(2):
        assert peak(step, tmp_path) <= (gradients + 0.5) * shared
