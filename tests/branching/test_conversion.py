import copy
import pickle
import threading
import zlib

import pytest
import torch
from torch import nn

from recon.branching.conversion import convert
from recon.branching.extract import extract_task
from recon.branching.fans.trees import partition_of
from recon.branching.fans.value import fans_in
from recon.branching.partition import Partition
from recon.branching.plan import BranchPlan, plan_of
from recon.branching.verification import verify
from recon.errors import FanError, PlanError, UnknownNameError, UsageError
from recon.support.network.forward import call
from tests import oracle
from tests.scripting import script
from tests.zoo import TASKS, ZOO, Entry, PlainConv, ResidualNet, SomeTasksOnly, image, vector


def seed_of(*parts: object) -> int:
    return zlib.crc32("/".join(map(str, parts)).encode()) % 10_000


def branch(entry: Entry, kind: str, seed: int) -> tuple[nn.Module, nn.Module, object]:
    torch.manual_seed(seed)
    model, inputs = entry.make(), entry.inputs(4)
    return model, convert(model, oracle.random_plan(model, kind, seed), inputs), inputs


def sgd_steps(branched: nn.Module, entry: Entry, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(branched.parameters(), lr=0.05, momentum=0.9)
    branched.train()
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = call(branched, entry.inputs(4))
        sum(oracle.loss_of(outputs[task], task) for task in plan_of(branched).tasks).backward()
        optimizer.step()
        for buffer in branched.buffers():
            assert not buffer.requires_grad


def check_through_training(entry: Entry, branched: nn.Module, inputs: object, seed: int = 0) -> None:
    """With copies that differ, before and after a few steps."""
    oracle.perturb(branched, seed)
    check_both_modes(entry, branched, inputs)
    oracle.assert_no_crosstalk(branched, inputs)
    sgd_steps(branched, entry)
    check_both_modes(entry, branched, inputs)


def check_both_modes(entry: Entry, branched: nn.Module, inputs: object) -> None:
    for training in (True, False):
        branched.train(training)
        if not (training and entry.draws):
            oracle.check(entry.make, branched, inputs)


# The oracle.


@pytest.mark.parametrize("kind", oracle.KINDS)
@pytest.mark.parametrize("name", ZOO)
def test_every_task_gets_the_original_with_its_own_copies(name, kind):
    entry = ZOO[name]
    _, branched, inputs = branch(entry, kind, seed_of(name, kind))
    check_through_training(entry, branched, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("name", ZOO)
def test_every_task_gets_the_original_with_its_own_copies_for_many_plans(name, seed):
    entry = ZOO[name]
    for kind in oracle.KINDS:
        _, branched, inputs = branch(entry, kind, seed)
        check_through_training(entry, branched, inputs, seed)


@pytest.mark.parametrize("name", ZOO)
def test_conversion_changes_no_bit_and_leaves_the_model_alone(name):
    entry = ZOO[name]
    for kind in ("quarter", "all"):
        torch.manual_seed(seed_of(name, kind))
        model, inputs = entry.make(), entry.inputs(4)
        list(model.modules())[-1].eval()  # modes need not be all the same
        before = oracle.snapshot(model)
        branched = convert(model, oracle.random_plan(model, kind, seed_of(kind, name)), inputs)
        oracle.assert_untouched(model, before)
        modes = {path: module.training for path, module in branched.named_modules()}
        assert all(modes.get(path, module.training) == module.training for path, module in model.named_modules())
        for training in (True, False):
            if training and entry.draws:
                continue
            ours = call(branched.train(training), copy.deepcopy(inputs))
            theirs = call(model.train(training), copy.deepcopy(inputs))
            for task in TASKS:
                for one, other in zip(oracle.tensors_in(ours[task]), oracle.tensors_in(theirs[task]), strict=True):
                    assert torch.equal(one, other), task


@pytest.mark.parametrize("name", ZOO)
def test_extract_task_gives_the_original_architecture(name):
    entry = ZOO[name]
    _, branched, inputs = branch(entry, "all", seed_of(name))
    oracle.perturb(branched)
    original = entry.make()
    branched.eval()
    with torch.no_grad():
        outputs = call(branched, copy.deepcopy(inputs))
    for task in TASKS:
        plain, expected = extract_task(branched, task), oracle.plain_model(entry.make, branched, task)
        assert _structure(plain) == _structure(original.eval())
        original.load_state_dict(plain.state_dict())
        assert not any(type(part).__module__.startswith("recon") for part in plain.modules())
        assert not any(fans_in(value) for part in plain.modules() for value in vars(part).values())
        for (key, one), (other_key, other) in zip(
            oracle.state_of(plain).items(), oracle.state_of(expected).items(), strict=True
        ):
            assert key == other_key and torch.equal(one, other), key
        oracle.assert_outputs_close(call(plain, copy.deepcopy(inputs))[task], outputs[task], task)
        if not entry.draws:
            oracle.assert_outputs_close(
                call(plain.train(), copy.deepcopy(inputs))[task],
                call(expected.train(), copy.deepcopy(inputs))[task],
                task,
            )
    assert plan_of(branched).tasks == TASKS  # still branched


def _structure(model: nn.Module) -> list[tuple]:
    """Paths, classes and hooks, and which paths lead to one and the same module or parameter."""
    modules = list(model.named_modules(remove_duplicate=False))
    parameters = list(model.named_parameters(remove_duplicate=False))
    first = {}
    return [
        (path, first.setdefault(id(m), path), type(m).__name__, *map(len, _hooks_of(m)), m.training)
        for path, m in modules
    ] + [(path, first.setdefault(id(p), path), p.requires_grad) for path, p in parameters]


def _hooks_of(module: nn.Module) -> list[dict]:
    return [module._forward_hooks, module._forward_pre_hooks, module._load_state_dict_pre_hooks]


@pytest.mark.parametrize("tasks", [("a", "b"), ("a", "b", "c", "d", "e")])
@pytest.mark.parametrize("kind", oracle.KINDS)
def test_other_numbers_of_tasks(kind, tasks):
    def make():
        return PlainConv(tasks).double()

    torch.manual_seed(0)
    for seed in (0, 1):
        model = make()
        branched = convert(model, oracle.random_plan(model, kind, seed, tasks), image(2))
        oracle.perturb(branched)
        for training in (True, False):
            oracle.check(make, branched.train(training), image(3))


@pytest.mark.parametrize(
    "layers",
    [
        ["blocks.1.conv1", "blocks.1.bn1", "blocks.1.conv2", "blocks.1.bn2"],
        ["blocks.1.shortcut"],
        ["blocks.0.bn1", "blocks.1.shortcut"],
        ["heads.heads.b"],
        ["first.1"],
    ],
    ids="+".join,
)
def test_chosen_parts_of_a_residual_block(layers):
    entry = ZOO["ResidualNet"]
    for grouped in (False, True):
        model = entry.make()
        plan = BranchPlan.grouped({n: [["a", "c"], "b"] for n in layers}, TASKS)
        branched = convert(model, plan if grouped else BranchPlan.per_task(layers, TASKS), image(4))
        oracle.perturb(branched)
        check_both_modes(entry, branched, image(4))


def test_groups_refine_where_fans_meet():
    entry = ZOO["ResidualNet"]
    model = entry.make()
    plan = BranchPlan.grouped({"blocks.1.conv1": [["a", "b"], "c"], "blocks.1.shortcut": ["a", ["b", "c"]]}, TASKS)
    branched = convert(model, plan, image(2))
    statistics = {path: p.groups for path, p in plan_of(branched).statistics.items()}
    assert statistics == {"blocks.1.bn1": (("a", "b"), ("c",)), "blocks.1.bn2": (("a", "b"), ("c",))}
    oracle.perturb(branched)
    check_both_modes(entry, branched, image(4))


class TiedAcrossLayers(nn.Module):
    """A decoder with the encoder's weight and a bias of its own, which a plan may split in other groups."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(6, 6, bias=False)
        self.decode = nn.Linear(6, 6)
        self.decode.weight = self.encode.weight
        self.heads = nn.ModuleDict({task: nn.Linear(6, 2) for task in TASKS})

    def forward(self, x):
        x = self.decode(torch.tanh(self.encode(x)))
        return {task: head(x) for task, head in self.heads.items()}


@pytest.mark.parametrize(
    ("encode", "decode"),
    [
        (["a", "bc"], ["ab", "c"]),
        (["ab", "c"], ["a", "bc"]),
        (["a", "bc"], ["a", "b", "c"]),
        (["ac", "b"], ["ab", "c"]),
    ],
    ids=" ".join,
)
def test_a_weight_stays_tied_where_the_layers_that_hold_it_are_split_in_other_groups(encode, decode):
    entry = Entry("", lambda: TiedAcrossLayers().double(), vector)
    torch.manual_seed(0)
    model, inputs = entry.make(), vector(4)
    plan = BranchPlan.grouped({"encode": [list(g) for g in encode], "decode": [list(g) for g in decode]}, TASKS)
    branched = convert(model, plan, inputs)
    copies = {p for name, p in branched.named_parameters() if name.startswith(("encode", "decode")) and p.ndim == 2}
    assert len(copies) == 2  # as many as the encoder's groups
    check_through_training(entry, branched, inputs)


def test_single_precision():
    torch.manual_seed(0)
    model = PlainConv().float()
    branched = convert(model, BranchPlan.per_task(["body.1.0", "body.3.1"], TASKS), image(2).float())
    oracle.perturb(branched)
    inputs = image(4).float()
    for training in (True, False):
        branched.train(training)
        plains = {task: oracle.plain_model(lambda: PlainConv().float(), branched, task) for task in TASKS}
        outputs = branched(inputs)
        for task, plain in plains.items():
            oracle.assert_close(outputs[task], plain(inputs)[task], task, tolerance=1e-5)


def test_random_numbers_are_drawn_for_each_group():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5), ToTasks()).double()
    branched = convert(model, BranchPlan.grouped({"0": [["a", "b"], "c"]}, TASKS), vector(2))
    outputs = branched(vector(4))
    assert torch.equal(outputs["a"], outputs["b"])
    kept = {task: outputs[task] != 0 for task in TASKS}
    assert not torch.equal(kept["a"], kept["c"])
    assert all(0.3 < kept[task].double().mean() < 0.7 for task in TASKS)


class ToTasks(nn.Module):
    def forward(self, x):
        return dict.fromkeys(TASKS, x)


# What runs how often.


@pytest.mark.parametrize("position", range(4))
def test_what_comes_before_the_branch_point_is_computed_once(position):
    convs = [nn.Conv2d(3, 3, 1) for _ in range(4)]
    model = nn.Sequential(*convs, ToTasks()).double()
    branched = convert(model, BranchPlan.grouped({str(position): [["a", "b"], "c"]}, TASKS), image(2))
    with CountConvolutions() as counted:
        branched(image(2))
    assert counted.total == position + 2 * (4 - position)


class CountConvolutions(torch.utils._python_dispatch.TorchDispatchMode):
    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.total += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


def test_a_module_that_serves_some_tasks_runs_for_these_alone():
    model = SomeTasksOnly().double()
    branched = convert(model, BranchPlan.per_task(["body.0"], TASKS), vector(4))
    # `heads` is called on values of a and b alone, its layer for c included: the restriction would break that call.
    assert plan_of(branched).task_modules == {}
    model = PlainConv().double()
    branched = convert(model, BranchPlan.per_task(["body.0.0"], TASKS), image(4))
    assert plan_of(branched).task_modules == {f"heads.heads.{task}": (task,) for task in TASKS}
    seen = {task: [] for task in TASKS}
    for task, head in branched.heads.heads.items():
        head.register_forward_hook(lambda module, args, out, task=task: seen[task].append(partition_of(out).tasks))
    branched(image(2))
    assert seen == {task: [(task,)] for task in TASKS}


def test_a_head_with_statistics_of_its_own_runs_for_its_task_alone():
    heads = nn.ModuleDict({task: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for task in TASKS})

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.heads = nn.Linear(6, 4), copy.deepcopy(heads)

        def forward(self, x):
            x = self.body(x)
            return {task: head(x) for task, head in self.heads.items()}

    model = Net().double()
    branched = convert(model, BranchPlan.grouped({"body": [["a", "b"], "c"]}, TASKS), vector(4))
    assert plan_of(branched).task_modules == {f"heads.{task}": (task,) for task in TASKS}
    oracle.check(lambda: Net().double(), branched, vector(4))


def test_a_task_whose_output_is_a_dataclass_is_served_too():
    model = ZOO["NestedOutputs"].make()
    branched = convert(model, BranchPlan.per_task(["body"], TASKS), vector(4))
    assert plan_of(branched).task_modules == {f"heads.heads.{task}": (task,) for task in TASKS}


def test_frozen_norms_keep_one_set_of_statistics():
    model = ZOO["FrozenStatistics"].make()
    branched = convert(model, BranchPlan.per_task(["first.0"], TASKS), image(4))
    assert plan_of(branched).statistics == {}


def test_statistics_follow_the_fan():
    model = ZOO["PlainConv"].make()
    branched = convert(model, BranchPlan.grouped({"body.1.0": [["a", "b"], "c"]}, TASKS), image(4))
    assert list(plan_of(branched).statistics) == ["body.1.1", "body.3.1"]
    keys = set(branched.state_dict())
    assert {"body.1.1.weight", "body.1.1.branches.a+b.running_mean", "body.1.1.branches.c.running_var"} <= keys
    assert "body.0.1.running_mean" in keys and "body.1.1.running_mean" not in keys


def test_a_second_conversion_with_the_found_plan_needs_no_example():
    entry = ZOO["StatisticsAroundStatistics"]
    model, branched, inputs = branch(entry, "all", 0)
    again = convert(model, plan_of(branched))
    assert plan_of(again) == plan_of(branched)
    assert list(again.state_dict()) == list(branched.state_dict())
    again.load_state_dict(branched.state_dict())
    oracle.perturb(again)
    check_both_modes(entry, again, inputs)


def test_the_dry_runs_leave_no_trace():
    model = ZOO["Cached"].make()
    branched = convert(model, BranchPlan.per_task(["first", "second"], TASKS), vector(4))
    assert (branched.calls, branched.last) == (0, None)
    assert not branched._forward_pre_hooks and len(branched._forward_hooks) == 1


# Around a branched model.


def test_forward_hooks_of_the_user_run_on_every_copy():
    model = ZOO["PlainConv"].make()
    model.body[0][0].register_forward_hook(lambda module, args, out: out * 2)
    branched = convert(model, BranchPlan.per_task(["body.0.0"], TASKS), image(2)).eval()
    outputs, expected = branched(inputs := image(2)), model.eval()(inputs)
    assert all(torch.equal(outputs[task], expected[task]) for task in TASKS)
    seen = []
    branched.body[0][0].branches.get_submodule("b").register_forward_hook(lambda *_: seen.append("b"))
    branched(inputs)
    assert seen == ["b"]


@pytest.mark.parametrize("name", ["PlainConv", "BareParameters", "StatisticsAroundStatistics", "TwoNames", "Recurrent"])
def test_deepcopy_is_independent(name):
    entry = ZOO[name]
    _, branched, inputs = branch(entry, "all", 0)
    twin = copy.deepcopy(branched)
    before = {key: value.clone() for key, value in branched.state_dict().items()}
    sgd_steps(twin, entry)
    assert all(torch.equal(before[key], value) for key, value in branched.state_dict().items())
    check_both_modes(entry, twin, inputs)
    assert plan_of(twin) == plan_of(branched)


@pytest.mark.parametrize("name", ["PlainConv", "Norms", "BareParameters", "StatisticsAroundStatistics", "Recurrent"])
def test_to_another_dtype_and_back(name):
    entry = ZOO[name]
    _, branched, inputs = branch(entry, "all", 0)
    branched.float()
    assert {p.dtype for p in branched.parameters()} == {torch.float32}
    assert branched(inputs.float())["a"].dtype == torch.float32
    branched.double()
    oracle.perturb(branched)
    check_both_modes(entry, branched, inputs)


def test_bfloat16_autocast():
    _, branched, inputs = branch(ZOO["PlainConv"], "quarter", 0)
    model = PlainConv().float()
    branched = convert(model, BranchPlan.per_task(["body.1.0"], TASKS), inputs.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, expected = branched.eval()(inputs.float()), model.eval()(inputs.float())
    for task in TASKS:
        assert outputs[task].dtype == torch.bfloat16 and torch.equal(outputs[task], expected[task])


def test_gradients_accumulate():
    entry = ZOO["ResidualNet"]
    _, branched, _ = branch(entry, "all", 2)
    branched.eval()
    batches = [image(2), image(2)]
    for batch in batches:
        sum(oracle.loss_of(out, task) for task, out in branched(batch).items()).backward()
    total = {name: p.grad.clone() for name, p in branched.named_parameters() if p.grad is not None}
    branched.zero_grad()
    sum(oracle.loss_of(out, task) for batch in batches for task, out in branched(batch).items()).backward()
    for name, p in branched.named_parameters():
        if p.grad is not None:
            oracle.assert_close(p.grad, total[name], name)


# What cannot work.


def test_a_plan_whose_layers_are_split_over_other_tasks():
    with pytest.raises(PlanError, match=r"'body' is split over tasks \['a', 'b'\], but the plan is for"):
        BranchPlan(TASKS, {"body": Partition.per_task(("a", "b"))})
    with pytest.raises(PlanError, match=r"at least two different tasks, but got \['a'\]"):
        BranchPlan(("a",), {"body": Partition.per_task(("a",))})


def test_an_unknown_layer_gets_the_nearest_names():
    model = ResidualNet().double()
    with pytest.raises(UnknownNameError, match=r"no layer named 'blocks.0.covn1'. Did you mean .*'blocks.0.conv1'"):
        convert(model, BranchPlan.per_task(["blocks.0.covn1"], TASKS), image(2))


def test_an_unknown_module_in_a_plan():
    model = PlainConv().double()
    plan = BranchPlan(TASKS, {"body.0.0": Partition.per_task(TASKS)}, {"body.0.7": Partition.per_task(TASKS)}, {})
    with pytest.raises(UnknownNameError, match=r"no module named 'body.0.7'. Did you mean"):
        convert(model, plan)
    plan = BranchPlan(TASKS, {"body.0.0": Partition.per_task(TASKS)}, {}, {"heads.heads.d": ("a",)})
    with pytest.raises(UnknownNameError, match=r"no module named 'heads.heads.d'. Did you mean"):
        convert(model, plan)


def test_aliases_name_the_same_layer():
    model = ZOO["TwoNames"].make()
    branched = convert(model, BranchPlan.per_task(["two.linear"], TASKS), vector(4))
    assert list(plan_of(branched).layers) == ["one.linear"]


def test_a_model_that_is_branched_already():
    _, branched, inputs = branch(ZOO["PlainConv"], "one", 0)
    with pytest.raises(PlanError, match="branched already"):
        convert(branched, plan_of(branched), inputs)


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, torch.compile, lambda model: torch.jit.trace(model, image(2), strict=False)]
)
@pytest.mark.filterwarnings("ignore")
def test_a_wrapped_model(wrap):
    with pytest.raises(UsageError, match=r"is wrapped in .* Convert the plain module inside"):
        convert(wrap(PlainConv().double()), BranchPlan.per_task(["body.0.0"], TASKS), image(2))


def test_arguments_in_another_order():
    with pytest.raises(PlanError, match=r"The plan is a Tensor\. The order is convert\(model, plan, example_inputs\)"):
        convert(PlainConv().double(), image(2), BranchPlan.per_task(["body.0.0"], TASKS))


def test_a_container_of_layers_and_a_bare_string_are_no_layers():
    with pytest.raises(PlanError, match=r"'body.0' is not a layer, but holds 2: body\.0\.0, body\.0\.1\. Name"):
        convert(PlainConv().double(), BranchPlan.per_task(["body.0"], TASKS), image(2))
    with pytest.raises(PlanError, match=r"The layers are the string 'body\.0\.0'\. Pass a list of names"):
        BranchPlan.per_task("body.0.0", TASKS)


def test_no_example_inputs():
    with pytest.raises(UsageError, match="convert needs example_inputs"):
        convert(PlainConv(), BranchPlan.per_task(["body.0.0"], TASKS))


def test_a_model_on_the_meta_device():
    with pytest.raises(UsageError, match="on the meta device"):
        convert(PlainConv().to("meta"), BranchPlan.per_task(["body.0.0"], TASKS), image(2).to("meta"))


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
def test_buffers_and_modules_that_take_no_part():
    class Net(PlainConv):
        def __init__(self):
            super().__init__()
            self.register_buffer("mixing", torch.eye(5).to_sparse())
            self.register_buffer("expanded", torch.arange(5.0).expand(3, 5))
            self.register_buffer("nothing", None)
            self.scripted = script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))

        def forward(self, x):
            x = self.body(self.scripted(x)).mean((2, 3))
            return self.heads(torch.sparse.mm(self.mixing, x.t()).t() + self.expanded[0])

    model = Net().double()
    branched = convert(model, BranchPlan.per_task(["body.0.0"], TASKS), image(4)).eval()
    outputs, expected = branched(inputs := image(2)), model.eval()(inputs)
    assert all(torch.equal(outputs[task], expected[task]) for task in TASKS)


def test_example_inputs_that_do_not_fit():
    with pytest.raises(UsageError, match="fails on the example inputs in training mode: RuntimeError"):
        convert(PlainConv(), BranchPlan.per_task(["body.0.0"], TASKS), image(2))  # float64 into float32


def test_a_model_that_cannot_be_copied():
    model = PlainConv().double()
    model.body[1].lock = threading.Lock()
    with pytest.raises(UsageError, match=r"cannot be copied, because of 'body\.1\.lock' \(lock\): TypeError"):
        convert(model, BranchPlan.per_task(["body.0.0"], TASKS), image(2))


@pytest.mark.parametrize("mode", ["fan", "per-task"])
def test_caches_are_as_they_were(mode):
    model = ZOO["FilledCache"].make()
    branched = convert(model, BranchPlan.per_task(["bias"], TASKS), vector(4), mode=mode)
    assert branched.cache == model.cache == {} and branched.seen == model.seen == []


def test_a_layer_whose_module_keeps_the_handle_of_a_hook():
    model = PlainConv().double()
    layer = model.body[0][0]
    layer.handle = layer.register_forward_hook(lambda module, args, out: out * 2)
    branched = convert(model, BranchPlan.per_task(["body.0.0"], TASKS), image(4)).eval()
    x = image(2)
    for network in (branched, copy.deepcopy(branched), extract_task(branched, "b")):
        assert torch.equal(network(x)["b"], model.eval()(x)["b"])


def test_statistics_that_the_example_does_not_change():
    model, inputs = PlainConv().double(), image(4)
    for norm in (model.body[1][1], model.body[3][1]):
        norm.momentum = 1.0
    model.train()(inputs)
    branched = convert(model, BranchPlan.per_task(["body.1.0"], TASKS), inputs)
    assert list(plan_of(branched).statistics) == ["body.1.1", "body.3.1"]
    assert torch.equal(branched.body[1][1].branches.get_submodule("a").running_var, model.body[1][1].running_var)


@pytest.mark.parametrize("mode", ["fan", "per-task"])
def test_a_function_that_holds_the_original(mode):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.last = nn.Linear(6, 4), nn.Linear(4, 4)
            self.close = lambda x: self.last(x)

        def forward(self, x):
            return dict.fromkeys(TASKS, self.close(self.body(x)))

    with pytest.raises(UsageError, match=r"still uses last\.weight, last\.bias of the original: .* Make it a method"):
        convert(Net().double(), BranchPlan.per_task(["body"], TASKS), vector(4), mode=mode)


@pytest.mark.parametrize("name", sorted(set(ZOO) - {"Parametrized"}))  # torch pickles no parametrized module
def test_pickle(name):
    entry = ZOO[name]
    for mode in ("fan", "per-task"):
        torch.manual_seed(0)
        model, inputs = entry.make(), entry.inputs(4)
        branched = convert(model, oracle.random_plan(model, "all", 1), inputs, mode=mode)
        oracle.perturb(branched)
        again = pickle.loads(pickle.dumps(branched))
        assert plan_of(again) == plan_of(branched)
        check_both_modes(entry, again, inputs)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
def test_a_scripted_child_is_copied_with_its_parameters():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scripted, self.body = script(nn.Linear(6, 6)), nn.Linear(6, 4)

        def forward(self, x):
            return dict.fromkeys(TASKS, self.body(self.scripted(x)))

    model = Net().double()
    branched = convert(model, BranchPlan.per_task(["body"], TASKS), vector(4))
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in branched.parameters())
    sum(oracle.loss_of(out, task) for task, out in branched(vector(4)).items()).backward()
    assert branched.scripted.weight.grad is not None and model.scripted.weight.grad is None
    branched.zero_grad()
    verify(model, branched, vector(4))
    assert branched.scripted.weight.grad is None and model.scripted.weight.grad is None


def test_an_output_that_lacks_a_task():
    with pytest.raises(UsageError, match="no entry for task 'd'"):
        convert(PlainConv().double(), BranchPlan.per_task(["body.0.0"], (*TASKS, "d")), image(2))
    with pytest.raises(UsageError, match=r"must return \{task name: output\}, but it returned Tensor"):
        convert(nn.Sequential(nn.Linear(6, 4)).double(), BranchPlan.per_task(["0"], TASKS), vector(2))


class OwnTrunks(nn.Module):
    """Task b reads the result of a's own layer, without its gradient; the third layer is frozen."""

    def __init__(self):
        super().__init__()
        self.stem, self.own, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x):
        x = self.frozen(self.stem(x))
        y = self.own(x)
        return {"a": y, "b": x + y.detach()}


@pytest.mark.parametrize("mode", ["fan", "per-task"])
def test_a_layer_of_one_task_is_named(mode, caplog):
    model, inputs = OwnTrunks(), torch.randn(3, 4)
    convert(model, BranchPlan.per_task(["stem", "own", "frozen"], ("a", "b")), inputs, mode=mode)
    told = [record.message for record in caplog.records if "alone" in record.message]
    assert told == ["own: used by task a alone, so the other tasks' copies are never trained."]
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    caplog.clear()
    convert(model, BranchPlan.per_task(["stem"], ("a", "b")), inputs, mode=mode)
    assert not caplog.records


def test_a_plan_for_some_of_the_tasks_tells_what_it_leaves_out(caplog):
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 4)

        def forward(self, x):
            return dict.fromkeys(("a", "b", "c"), self.body(x))

    plan = BranchPlan.per_task(["body"], tasks=("a", "b"))
    for mode in ("fan", "per-task"):
        caplog.clear()
        branched = convert(Three(), plan, torch.randn(8, 4), mode=mode)
        assert list(branched(torch.randn(8, 4))) == ["a", "b"]
        assert "also has 'c', which the branched model leaves out" in caplog.text


def test_statistics_behind_statistics_that_follow_a_fan_from_one_tasks_layer():
    class MasksOfTasks(nn.Module):
        """Every task's values pass the same norm in turn, between norms of its own."""

        def __init__(self):
            super().__init__()
            self.before, self.after = (nn.ModuleDict({t: nn.BatchNorm1d(6) for t in TASKS}) for _ in range(2))
            self.shared = nn.BatchNorm1d(6)

        def forward(self, x):
            return {task: self.after[task](self.shared(self.before[task](x)).relu()) for task in TASKS}

    torch.manual_seed(0)
    model = MasksOfTasks().double()
    branched = convert(model, BranchPlan.per_task([f"before.{TASKS[1]}"], TASKS), vector(8))
    assert set(plan_of(branched).statistics) == {"shared", *(f"after.{task}" for task in TASKS)}
    verify(model, branched, vector(8))


def test_extract_from_a_plain_model_or_for_an_unknown_task():
    _, branched, _ = branch(ZOO["PlainConv"], "one", 0)
    with pytest.raises(PlanError, match="no task 'd' in this model"):
        extract_task(branched, "d")
    with pytest.raises(PlanError, match="not branched"):
        extract_task(PlainConv(), "a")


def test_statistics_kept_by_the_model_as_a_whole():
    class Centred(PlainConv):
        def __init__(self):
            super().__init__()
            self.register_buffer("centre", torch.zeros(5))

        def forward(self, x):
            x = self.body(x)
            self.centre.lerp_(x.detach().mean((0, 2, 3)), 0.1)
            return self.heads(x - self.centre[:, None, None])

    with pytest.raises(FanError, match="Centred itself keeps running statistics"):
        convert(Centred().double(), BranchPlan.per_task(["body.0.0"], TASKS), image(2))


def test_a_child_named_as_the_copies_are():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.branches = nn.Linear(6, 4)
            self.register_buffer("centre", torch.zeros(4))

        def forward(self, x):
            x = self.branches(x)
            self.centre.lerp_(x.detach().mean(0), 0.1)
            return dict.fromkeys(TASKS, x - self.centre)

    with pytest.raises(UsageError, match="Outer keeps running statistics and has a child named 'branches'"):
        convert(nn.Sequential(Outer()).double(), BranchPlan.per_task(["0.branches"], TASKS), vector(2))
