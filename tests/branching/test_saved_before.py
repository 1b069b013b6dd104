"""A folder that an earlier version saved is read as it was written: its keys are a contract."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import recon

DATA = Path(__file__).parents[1] / "data"


class Codebook(nn.Module):
    """A module with a running buffer, a bare parameter and a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.scale = nn.BatchNorm1d(4), nn.Parameter(torch.ones(4))
        self.register_buffer("centre", torch.zeros(4))

    def forward(self, x):
        x = self.norm(x) * self.scale
        if self.training:
            self.centre.lerp_(x.detach().mean(0), 0.1)
        return x - self.centre


class Saved(nn.Module):
    """A branched norm, shared ones behind it, and statistics around statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.book = Codebook()
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(4, 1)})

    def forward(self, x):
        x = self.book(self.body(x))
        return {task: head(x) for task, head in self.heads.items()}


@pytest.mark.parametrize("mode", ["fan", "per-task"])
def test_a_folder_of_an_earlier_version(mode):
    folder = DATA / f"saved_{mode}"
    loaded = recon.load(folder, Saved().double())
    saved, state = load_file(folder / "weights.safetensors"), loaded.state_dict()
    assert state.keys() == saved.keys() and "body.3.branches.b.running_var" in state and "body.3.weight" in state
    assert all(torch.equal(state[key], saved[key]) for key in saved)
    expected = json.loads((folder / "outputs.json").read_text())
    x = torch.tensor(expected["inputs"], dtype=torch.float64)
    for training, outputs in ((False, expected["evaluation"]), (True, expected["training"])):
        found = loaded.train(training)(x)
        for task in ("a", "b"):
            torch.testing.assert_close(found[task].detach(), torch.tensor(outputs[task], dtype=torch.float64))
