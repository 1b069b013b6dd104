"""Models that hold tensors of an earlier forward, with its graph, which torch does not copy.

The next forward makes them anew: a copy needs only their values.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import recon
from recon.branching.plan import BranchPlan
from recon.branching.surgery.copies import copy_model
from tests import oracle
from tests.zoo import TASKS


class Keeping(nn.Module):
    def __init__(self, prepare, keep) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.heads = nn.ModuleDict({task: nn.Linear(4, 2) for task in TASKS})
        self.keep = keep
        torch.manual_seed(2)
        prepare(self.second)

    def forward(self, x):
        h = self.second(self.norm(self.first(x)))
        self.keep(self, h)
        return {task: head(h) for task, head in self.heads.items()}


class Hook:
    def __init__(self) -> None:
        self.kept = []

    def __call__(self, module, args, output):
        self.kept.append(output)


def nothing(*_):
    pass


KINDS = {
    "an attribute": (nothing, lambda net, h: setattr(net, "features", h)),
    "an attribute of a layer": (nothing, lambda net, h: setattr(net.second, "features", h)),
    "a list": (nothing, lambda net, h: setattr(net, "features", [h, {"twice": h * 2}])),
    "a hook's": (lambda layer: layer.register_forward_hook(Hook()), nothing),
    "a pruned weight": (lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5), nothing),
    "a weight of weight norm": (nn.utils.weight_norm, nothing),
    "a weight of spectral norm": (nn.utils.spectral_norm, nothing),
    "a parametrized weight": (parametrizations.weight_norm, nothing),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("layer", "mode"),
    [("first", "fan"), ("second", "fan"), ("second", "per-task")],
    ids=["first", "second", "per-task"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_between_profile_and_convert(kind, layer, mode, tmp_path):
    def make():
        torch.manual_seed(0)
        return Keeping(*KINDS[kind]).double()

    model, x = make(), torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    profiler = recon.Profiler(model)
    profiler.backward({task: oracle.loss_of(output, task) for task, output in model(x).items()})
    model(x)
    plan = BranchPlan.per_task([layer], TASKS)
    if mode == "fan":
        assert recon.costs(model, plan, x).parameters > sum(p.numel() for p in model.parameters())
        recon.plan(profiler.conflict_map(), model, layers=[layer])
    branched = recon.convert(model, plan, x, mode=mode)
    outputs, expected = branched(x), model(x)
    for task in TASKS:
        oracle.assert_close(outputs[task], expected[task], task)
    if kind != "a weight of spectral norm":  # what is estimated of a weight that is changed needs many forwards
        oracle.perturb(branched)
    for training in (True, False):
        oracle.check(make, branched.train(training), x)
    branched.train()(x)  # they hold tensors of this one
    recon.verify(model, branched, x)
    recon.save(branched, tmp_path)
    loaded = recon.load(tmp_path, model).eval()
    for task in TASKS:
        plain = recon.extract_task(branched.eval(), task)
        assert torch.equal(plain(x)[task], branched(x)[task]) and torch.equal(loaded(x)[task], branched(x)[task])


def test_a_plain_model_that_was_saved(tmp_path):
    model = Keeping(*KINDS["an attribute"])
    model(torch.randn(4, 6))
    recon.save(model, tmp_path)
    loaded = recon.load(tmp_path, model)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())


def test_values_are_kept_without_their_graph():
    model = Keeping(*KINDS["a list"])
    model(torch.randn(4, 6))
    twin = copy_model(model)
    kept, copied = (net.features[0] for net in (model, twin))
    assert kept.grad_fn is not None and copied.is_leaf and torch.equal(copied, kept)
    assert type(copied) is Tensor and copied.data_ptr() != kept.data_ptr()
