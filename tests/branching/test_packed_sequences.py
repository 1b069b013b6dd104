"""Recurrent layers on packed sequences, behind the branch point and as what is branched."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from recon.branching.conversion import convert
from recon.branching.plan import BranchPlan
from tests import oracle
from tests.zoo import TASKS

LAYERS = {
    "LSTM": nn.LSTM,
    "LSTM with projections": lambda *args, **kwargs: nn.LSTM(*args, proj_size=3, **kwargs),
    "GRU": nn.GRU,
    "RNN": nn.RNN,
    "RNN with relu": lambda *args, **kwargs: nn.RNN(*args, nonlinearity="relu", **kwargs),
}

# Both directions, the batch first, the longest sequence first, the initial state: every pair of choices.
SHAPES = [
    (False, False, False, "none"),
    (True, True, False, "plain"),
    (True, False, True, "fan"),
    (False, True, True, "none"),
    (False, True, False, "fan"),
    (True, True, True, "none"),
]


class Packed(nn.Module):
    """Reads the lengths of what it has packed as Python numbers, as recurrent layers do."""

    def __init__(self, kind, bidirectional, batch_first, in_order, start) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.rnn = LAYERS[kind](4, 5, 2, batch_first=batch_first, bidirectional=bidirectional)
        self.batch_first, self.in_order, self.start = batch_first, in_order, start
        self.size, self.lstm = self.rnn.proj_size or 5, isinstance(self.rnn, nn.LSTM)
        self.heads = nn.ModuleDict({task: nn.Linear(self.size * (1 + bidirectional), 2) for task in TASKS})

    def forward(self, x):
        y = self.first(x) if self.batch_first else self.first(x).transpose(0, 1)
        lengths = torch.tensor([5, 4, 2, 1] if self.in_order else [2, 5, 1, 4])
        packed = pack_padded_sequence(y, lengths, batch_first=self.batch_first, enforce_sorted=self.in_order)
        out, last = self.rnn(packed, self.initial(y, 2 * (1 + self.rnn.bidirectional)))
        out, found = pad_packed_sequence(out, batch_first=self.batch_first)
        assert packed.batch_sizes.tolist()[0] == 4 and found.tolist() == lengths.tolist()
        last = last[0] if isinstance(last, tuple) else last
        time = 1 if self.batch_first else 0
        return {task: head(out).sum(time) + last.mean() for task, head in self.heads.items()}

    def initial(self, y, layers):
        if self.start == "none":
            return None
        hidden = y.new_full((layers, 4, self.size), 0.1)
        hidden = hidden + y.mean() if self.start == "fan" else hidden
        return (hidden, y.new_ones(layers, 4, 5)) if self.lstm else hidden


@pytest.mark.parametrize(
    ("mode", "layer", "shapes"),
    [("fan", "first", SHAPES), ("fan", "rnn", SHAPES[1:2]), ("per-task", "first", SHAPES[2:3])],
    ids=["behind the branch point", "branched", "per-task"],
)
@pytest.mark.parametrize("kind", LAYERS)
def test_packed_sequences(kind, mode, layer, shapes):
    torch.manual_seed(0)
    x = torch.randn(4, 5, 3).double()
    for shape in shapes:

        def make():
            return Packed(kind, *shape).double()  # noqa: B023  (used within this turn)

        branched = convert(make(), BranchPlan.per_task([layer], TASKS), x, mode=mode)
        oracle.perturb(branched)
        for training in (True, False):
            oracle.check(make, branched.train(training), x)


def test_lengths_that_differ_between_tasks_stay_fans():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.heads = nn.Linear(3, 3), nn.ModuleDict({task: nn.Linear(3, 1) for task in TASKS})

        def forward(self, x):
            y = self.first(x)
            lengths = (y.detach().sum((1, 2)) > 0).to(torch.int64) + 1
            packed = pack_padded_sequence(y, lengths, batch_first=True, enforce_sorted=False)
            return {task: head(packed.data.sum(0)) for task, head in self.heads.items()}

    x = torch.randn(4, 5, 3).double()
    branched = convert(Net().double(), BranchPlan.per_task(["first"], TASKS), x)
    for part, sign in zip(branched.first.branches.children(), (1, -1, 3), strict=True):
        nn.init.constant_(part.weight, sign)
    oracle.check(lambda: Net().double(), branched, x)
