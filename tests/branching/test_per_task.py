import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import recon
from recon.branching.conversion import convert
from recon.branching.extract import extract_task
from recon.branching.plan import BranchPlan, plan_of
from recon.branching.saving import load, save
from recon.branching.surgery.task_view import ByTask
from recon.errors import PlanError, UsageError
from recon.support.network.forward import call
from tests import oracle
from tests.branching.test_conversion import check_both_modes, check_through_training, seed_of, sgd_steps
from tests.branching.test_fan import CANNOT_WORK, Statement
from tests.scripting import script
from tests.zoo import TASKS, ZOO, PlainConv, image, vector


def per_task(name: str, kind: str, seed: int):
    entry = ZOO[name]
    torch.manual_seed(seed)
    model, inputs = entry.make(), entry.inputs(4)
    return entry, model, convert(model, oracle.random_plan(model, kind, seed), inputs, mode="per-task"), inputs


@pytest.mark.parametrize("kind", ["one", "all"])
@pytest.mark.parametrize("name", ZOO)
def test_every_task_gets_the_original_with_its_own_copies(name, kind):
    entry, _, branched, inputs = per_task(name, kind, seed_of(name, kind, "per-task"))
    check_through_training(entry, branched, inputs)


@pytest.mark.parametrize("name", ZOO)
def test_both_modes_have_the_same_state(name):
    for kind in ("quarter", "all"):
        entry, model, branched, inputs = per_task(name, kind, seed_of(kind, name))
        fan = convert(model, plan_of(branched).on(model), inputs, mode="fan")
        anew = convert(model, BranchPlan(TASKS, plan_of(branched).layers), inputs)
        assert plan_of(anew).statistics == plan_of(branched).statistics
        assert list(fan.state_dict()) == list(anew.state_dict()) == list(branched.state_dict())
        oracle.perturb(branched)
        fan.load_state_dict(branched.state_dict())
        check_both_modes(entry, fan, inputs)


@pytest.mark.parametrize("name", ZOO)
def test_conversion_changes_no_bit_and_leaves_the_model_alone(name):
    entry = ZOO[name]
    torch.manual_seed(seed_of(name))
    model, inputs = entry.make(), entry.inputs(4)
    before = oracle.snapshot(model)
    branched = convert(model, oracle.random_plan(model, "all", 0), inputs, mode="per-task").eval()
    oracle.assert_untouched(model, before)
    ours, theirs = call(branched, copy.deepcopy(inputs)), call(model.eval(), copy.deepcopy(inputs))
    for task in TASKS:
        for one, other in zip(oracle.tensors_in(ours[task]), oracle.tensors_in(theirs[task]), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["PlainConv", "BareParameters", "StatisticsAroundStatistics", "TwoNames", "Cached"])
def test_copies_saves_and_extracts_stay_per_task(name, tmp_path):
    entry, model, branched, inputs = per_task(name, "all", 1)
    oracle.perturb(branched)
    twin = copy.deepcopy(branched)
    before = {key: value.clone() for key, value in branched.state_dict().items()}
    sgd_steps(twin, entry)
    assert all(torch.equal(before[key], value) for key, value in branched.state_dict().items())
    save(twin, tmp_path)
    loaded = load(tmp_path, model)
    assert plan_of(loaded).mode == "per-task"
    for network in (twin, loaded):
        check_both_modes(entry, network, inputs)
    outputs = twin.eval()(inputs)
    for task in TASKS:
        plain = extract_task(twin, task)
        assert type(plain) is type(model) and "forward" not in vars(plain)
        model.load_state_dict(plain.state_dict())
        assert torch.equal(plain(inputs)[task], outputs[task])


def test_an_unknown_mode():
    with pytest.raises(PlanError, match=r"mode is 'twice'\. Choose 'fan' or 'per-task'"):
        convert(PlainConv().double(), BranchPlan.per_task(["body.0.0"], TASKS), image(2), mode="twice")


# Forwards that fans cannot pass.


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("statement", [case[0] for case in CANNOT_WORK], ids=lambda statement: statement.__name__)
def test_what_fans_cannot_pass_works(statement):
    torch.manual_seed(0)
    model, x = Statement(statement).double(), torch.randn(3, 4).double()
    plan = BranchPlan.grouped({"first": ["a", "b", "c"], "second": [["a", "b"], "c"]}, TASKS)
    branched = convert(model, plan, x, mode="per-task")
    oracle.perturb(branched)
    outputs = branched(x)
    for task in TASKS:
        plain = oracle.plain_model(lambda: Statement(statement).double(), branched, task)
        oracle.assert_outputs_close(outputs[task], plain(x)[task], task)


class Decides(nn.Module):
    """Takes another way, a scripted one or none, by the value that it sees."""

    def __init__(self):
        super().__init__()
        self.body, self.norm = nn.Linear(6, 4), nn.BatchNorm1d(4)
        self.scripted = script(nn.Linear(4, 4))

    def forward(self, x):
        x = self.body(x)
        x = self.scripted(x) if x.sum() > 0 else self.norm(x)
        return dict.fromkeys(TASKS, x)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
def test_each_task_takes_its_own_way():
    model = Decides().double()
    branched = convert(model, BranchPlan.per_task(["body"], TASKS), vector(4), mode="per-task").eval()
    with torch.no_grad():
        for task, sign in zip(TASKS, (1, -1, 1), strict=True):
            branched.body.branches.get_submodule(task).bias.fill_(sign * 100.0)
    inputs = vector(4)
    outputs = branched(inputs)
    for task in TASKS:
        plain = oracle.plain_model(lambda: copy.deepcopy(model), branched, task)
        assert torch.equal(outputs[task], plain(inputs)[task])
    assert not torch.equal(outputs["a"], outputs["b"])


def test_statistics_that_the_model_itself_keeps():
    class Centred(PlainConv):
        def __init__(self):
            super().__init__()
            self.register_buffer("centre", torch.zeros(5))

        def forward(self, x):
            x = self.body(x)
            if self.training:
                self.centre.lerp_(x.detach().mean((0, 2, 3)), 0.1)
            return self.heads(x - self.centre[:, None, None])

    def make():
        return Centred().double()

    branched = convert(make(), BranchPlan.per_task(["body.0.0"], TASKS), image(4), mode="per-task")
    assert "branches.b.centre" in branched.state_dict()
    oracle.perturb(branched)
    for training in (True, False):
        oracle.check(make, branched.train(training), image(4))
    assert type(extract_task(branched, "a")) is Centred


# How it runs.


def test_the_whole_network_runs_once_per_task():
    model = PlainConv().double().eval()
    branched = convert(model, BranchPlan.per_task(["heads.heads.a"], TASKS), image(2), mode="per-task").eval()
    counts = []
    for network in (model, branched):
        with FlopCounterMode(display=False) as counter:
            network(image(2))
        counts.append(counter.get_total_flops())
    assert counts[1] == len(TASKS) * counts[0]


def test_shared_statistics_are_updated_once():
    model = PlainConv().double()
    branched = convert(model, BranchPlan.per_task(["body.1.0"], TASKS), image(4), mode="per-task")
    for network in (model, branched):
        network.train()(inputs := torch.ones(4, 3, 8, 8).double())
    del inputs
    assert torch.equal(model.body[0][1].running_mean, branched.body[0][1].running_mean)
    assert branched.body[0][1].num_batches_tracked == 1


def test_attributes_that_a_forward_sets_are_kept():
    _, _, branched, inputs = per_task("Cached", "all", 0)
    oracle.perturb(branched)
    for _ in range(3):
        branched(inputs)
    assert branched.calls == 3
    assert type(branched.last) is ByTask and set(branched.last) == set(TASKS)
    assert not torch.equal(branched.last["a"], branched.last["b"])


def test_what_tasks_put_into_containers_is_kept_if_it_is_the_same():
    _, _, branched, inputs = per_task("FilledCache", "all", 0)
    oracle.perturb(branched)
    for _ in range(2):
        branched.eval()(inputs)
    assert branched.seen == [4, 4] and branched.cache == {}


def test_an_attribute_set_after_the_conversion_counts():
    class Scaled(PlainConv):
        factor = 1.0

        def forward(self, x):
            return super().forward(x * self.factor)

    branched = convert(Scaled().double(), BranchPlan.per_task(["body.0.0"], TASKS), image(2), mode="per-task").eval()
    x = image(2)
    expected = branched(x * 3.0)["a"]
    branched.factor = 3.0
    assert torch.equal(branched(x)["a"], expected)


def test_hooks_run_for_every_task():
    _, _, branched, inputs = per_task("PlainConv", "all", 0)
    seen = []
    branched.body[0][0].register_forward_hook(lambda module, args, out: seen.append(type(module)))
    branched.body[3].register_forward_pre_hook(lambda module, args: seen.append(type(args[0])))
    branched.register_forward_hook(lambda module, args, out: seen.append(sorted(out)))
    branched(inputs)
    assert seen == [nn.Conv2d, torch.Tensor] * 3 + [list(TASKS)]


def test_modes_of_modules_count():
    _, _, branched, inputs = per_task("PlainConv", "all", 0)
    before = {key: value.clone() for key, value in branched.state_dict().items()}
    branched.eval()(inputs)
    assert all(torch.equal(before[key], value) for key, value in branched.state_dict().items())


def test_to_another_dtype_and_back():
    entry, _, branched, inputs = per_task("Norms", "all", 0)
    branched.float()
    assert branched(inputs.float())["a"].dtype == torch.float32
    branched.double()
    oracle.perturb(branched)
    check_both_modes(entry, branched, inputs)


# Forwards that write into their inputs.


class GraphBatch:
    """Keeps its tensors in itself, as the batches of graph libraries do."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def to(self, device):
        return GraphBatch(self.x.to(device), self.y.to(device))

    def clone(self):
        return GraphBatch(self.x.clone(), self.y.clone())


def adds(body, batch):
    return body(batch["x"].add_(1.0)) * batch["y"]


def puts(body, batch):
    batch["x"] = body(batch["x"])
    return batch["x"] * batch["y"]


def pops(body, batch):
    return body(batch.pop("x")) * batch.pop("y")


def puts_into_a_graph(body, batch):
    batch.x.mul_(batch.y)
    batch.x = body(batch.x)
    return batch.x * batch.y


class Writes(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.body = how, nn.Linear(6, 4)
        self.heads = nn.ModuleDict({task: nn.Linear(4, 2) for task in TASKS})

    def forward(self, batch):
        x = torch.tanh(self.how(self.body, batch))
        return {task: head(x) for task, head in self.heads.items()}


@pytest.mark.parametrize("mode", ["fan", "per-task"])
@pytest.mark.parametrize("how", [adds, puts, pops, puts_into_a_graph])
def test_what_a_forward_writes_into_its_inputs_no_other_one_sees(how, mode):
    def batch(x, y):
        return GraphBatch(x.clone(), y.clone()) if how is puts_into_a_graph else {"x": x.clone(), "y": y.clone()}

    torch.manual_seed(0)
    model, x, y = Writes(how).double(), vector(4), vector(4)[:, :1]
    example = batch(x, y)
    plan = BranchPlan.per_task(["body"], TASKS)
    branched = convert(model, plan, example, mode=mode)
    assert recon.costs(model, plan_of(branched), example).parameters == sum(p.numel() for p in branched.parameters())
    kept = vars(example) if how is puts_into_a_graph else example
    assert list(kept) == ["x", "y"] and torch.equal(kept["x"], x) and torch.equal(kept["y"], y)
    oracle.perturb(branched)
    outputs = branched(batch(x, y))
    for task in TASKS:
        expected = oracle.plain_model(lambda: copy.deepcopy(model), branched, task)(batch(x, y))[task]
        oracle.assert_close(outputs[task], expected, task)


def test_gradients_reach_the_inputs():
    _, model, branched, _ = per_task("PlainConv", "all", 0)
    oracle.perturb(branched)
    x = image(2).requires_grad_()
    outputs = branched.eval()(x * 1.0)
    for task in TASKS:
        plain = oracle.plain_model(lambda: copy.deepcopy(model), branched, task).eval()
        (ours,), (theirs,) = (torch.autograd.grad(out[task].sum(), x, retain_graph=True) for out in (outputs, plain(x)))
        oracle.assert_close(ours, theirs, task)


class WritesItsWeight(nn.Module):
    """A shared layer whose forward changes its own weight."""

    def __init__(self, how):
        super().__init__()
        self.first, self.shared, self.how = nn.Linear(4, 4), nn.Linear(4, 4), how

    def forward(self, x):
        weight, h = self.shared.weight, self.first(x)
        match self.how:
            case "decays":
                weight.data *= 0.99
            case "adds what differs":
                weight.data.add_(h.detach().mean())
            case "replaces by what differs":
                weight.data = weight.data * 0 + h.detach().mean()
            case "normalises":
                weight.data = nn.functional.normalize(weight.data, dim=1)
            case "clips":
                weight.data.clamp_(-0.1, 0.1)
        return dict.fromkeys("abc", self.shared(h))


@pytest.mark.parametrize("how", ["decays", "adds what differs", "replaces by what differs"])
def test_a_shared_weight_that_every_task_would_write_is_refused(how):
    model, x = WritesItsWeight(how), torch.randn(3, 4)
    plan = BranchPlan.per_task(["first"], tuple("abc"))
    with pytest.raises(UsageError, match=r"parameter 'shared.weight', which the tasks a, b, c share.*optimizer's step"):
        convert(model, plan, x, mode="per-task")
    # What each task writes into a weight of its own is right.
    convert(model, BranchPlan.per_task(["first", "shared"], tuple("abc")), x, mode="per-task")


@pytest.mark.parametrize(
    ("how", "mode"),
    [("decays", "fan"), ("normalises", "fan"), ("clips", "fan"), ("normalises", "per-task"), ("clips", "per-task")],
)
def test_conversions_leave_weights_that_a_forward_writes(how, mode):
    model, x = WritesItsWeight(how).double(), torch.randn(3, 4).double()
    before = copy.deepcopy(model.state_dict())
    branched = convert(model, BranchPlan.per_task(["first"], tuple("abc")), x, mode=mode)
    for state in (model.state_dict(), branched.state_dict()):
        assert torch.equal(state["shared.weight"], before["shared.weight"])
    branched(x)
    model(x)
    assert torch.allclose(branched.shared.weight, model.shared.weight, rtol=1e-14, atol=0)
