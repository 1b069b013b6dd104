"""What hands tensors to C++ or to other libraries, on values that differ between tasks: right, or refused by name."""

import copy
import ctypes
import io
import pickle
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

from recon.branching.conversion import convert
from recon.branching.extract import extract_task
from recon.branching.fans import value
from recon.branching.fans.fan import TaskFan
from recon.branching.fans.unmappable import UNREADABLE
from recon.branching.partition import Partition
from recon.branching.plan import BranchPlan
from recon.errors import FanError
from recon.support.network.state import state_kept
from tests import oracle

TASKS = ("a", "b", "c")


class Keeper(nn.Module):
    """A layer behind the branch point, whose statement runs while `on`."""

    def __init__(self, statement, on=True):
        super().__init__()
        self.statement, self.on = [statement], on
        self.weight = nn.Parameter(torch.linspace(0.5, 2, 4))
        self.register_buffer("mean", torch.linspace(-1, 1, 4))
        self.kept = torch.zeros(4).double()

    def forward(self, x):
        return self.statement[0](self, x) if self.on else x * self.weight


class Kept(nn.Module):
    def __init__(self, statement, on=True):
        super().__init__()
        self.first, self.keeper, self.last = nn.Linear(4, 4), Keeper(statement, on), nn.Linear(4, 4)

    def forward(self, x):
        return dict.fromkeys(TASKS, self.last(self.keeper(self.first(x))))


PLAN = BranchPlan.grouped({"first": [["a", "b"], "c"]}, TASKS)


def converted(statement, mode="fan", on=True):
    torch.manual_seed(0)
    x = torch.randn(3, 4).double()
    return convert(Kept(statement, on).double(), PLAN, x, mode=mode), x


def update(net, x):
    return (0.9 * net.mean + 0.1 * x.mean(0)).detach()


# Statistics that a forward keeps by assigning to `.data`: one set per group.


def assigns_data(net, x):
    if net.training:
        net.mean.data = 0.9 * net.mean.data + 0.1 * x.mean(0).data
    return x * net.weight - net.mean


def adds_to_data(net, x):
    if net.training:
        net.mean.data += 0.1 * (x.mean(0).data - net.mean.data)
    return x * net.weight - net.mean


def scales_data(net, x):
    if net.training:
        net.mean.data *= x.detach().abs().mean()
    return x * net.weight - net.mean


def assigns_data_twice(net, x):
    if net.training:
        net.mean.data = net.mean.data * 2
        net.mean.data = update(net, x)
        net.mean.mul_(x.detach().abs().mean())
    return x * net.weight - net.mean


def assigns_data_of_another_shape(net, x):
    if net.training:
        net.mean.data = torch.cat([net.mean.data[-4:], x.mean(0).data])
    return x * net.weight - net.mean[-4:]


def assigns_data_in_evaluation_too(net, x):
    net.mean.data = update(net, x)
    return x * net.weight - net.mean


def assigns_data_in_the_dictionary(net, x):
    if net.training:
        net._buffers["mean"].data = update(net, x)
    return x * net.weight - net.mean


def copies_into_data(net, x):
    if net.training:
        net.mean.data.copy_(update(net, x))
    return x * net.weight - net.mean


def writes_elements_of_data(net, x):
    if net.training:
        net.mean.data[1:] = update(net, x)[1:]
    return x * net.weight - net.mean


def adds_to_elements_of_data(net, x):
    if net.training:
        net.mean.data[1:] += 0.1 * x.mean(0).data[1:]
    return x * net.weight - net.mean


def adds_to_an_alias(net, x):
    if net.training:
        mean = net.mean
        mean += 0.1 * x.mean(0).detach()
    return x * net.weight - net.mean


STATISTICS = [
    assigns_data,
    adds_to_data,
    scales_data,
    assigns_data_twice,
    assigns_data_of_another_shape,
    assigns_data_in_evaluation_too,
    assigns_data_in_the_dictionary,
    copies_into_data,
    writes_elements_of_data,
    adds_to_elements_of_data,
    adds_to_an_alias,
]


@pytest.mark.parametrize("mode", ["fan", "per-task"])
@pytest.mark.parametrize("statement", STATISTICS, ids=lambda statement: statement.__name__)
def test_statistics_kept_by_assignment_follow_the_fan(statement, mode):
    branched, x = converted(statement, mode)
    assert {path: p.groups for path, p in branched.branch_plan.statistics.items()} == {"keeper": (("a", "b"), ("c",))}
    assert all(buffer.shape == (4,) for buffer in branched.buffers())  # the dry runs leave no trace
    oracle.perturb(branched)
    for training in (True, False):
        branched.train(training)
        if not (training and statement is assigns_data_of_another_shape):  # the oracle loads states of one shape
            oracle.check(lambda: Kept(statement).double(), branched, x)


# What maps over the groups.


def collates(net, x):
    return default_collate([{"x": row} for row in x])["x"] * net.weight


def loads_batches(net, x):
    return next(iter(DataLoader(TensorDataset(x), batch_size=3)))[0] * net.weight


def copies_deeply(net, x):
    return copy.deepcopy({"x": [x.detach()]})["x"][0] + x * net.weight


def adds_lists(net, x):
    return torch._foreach_add([x, x], 1.0)[0] * net.weight


def writes_a_list_of_buffers(net, x):
    torch._foreach_lerp_([net.mean], [x.mean(0).detach()], 0.1)
    return x * net.weight - net.mean


def joins_vectors(net, x):
    return nn.utils.parameters_to_vector([x, x])[:12].view(3, 4) * net.weight


def goes_sparse(net, x):
    return x.to_sparse().to_dense() * net.weight


def assigns_data_of_a_fan(net, x):
    y = (x * 1).detach()
    y.data = (x * 2).data
    return x * net.weight + y


def assigns_a_gradient(net, x):
    y = torch.zeros(3, 4).double().requires_grad_()
    y.grad = x.detach()
    return x * net.weight + y.grad


def multiplies_by_numpy_scalars(net, x):
    return x * np.float64(2.0) * net.weight


def takes_a_gradient(net, x):
    y = torch.ones(4).double().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad((y * x).sin().sum(), [y])
    return x * net.weight * gradient


RIGHT = [
    takes_a_gradient,
    collates,
    loads_batches,
    copies_deeply,
    adds_lists,
    writes_a_list_of_buffers,
    joins_vectors,
    goes_sparse,
    assigns_data_of_a_fan,
    assigns_a_gradient,
    multiplies_by_numpy_scalars,
]


@pytest.mark.parametrize("statement", RIGHT, ids=lambda statement: statement.__name__)
def test_what_maps_over_the_groups(statement):
    branched, x = converted(statement)
    oracle.perturb(branched)
    oracle.check(lambda: Kept(statement).double(), branched, x)


# What cannot: refused at the conversion, and, where no dry run met the statement, when it is met.


def assigns_data_of_a_parameter(net, x):
    net.weight.data = net.weight.data + x.mean(0).data
    return x * net.weight


def assigns_data_of_an_attribute(net, x):
    net.kept.data = x.mean(0).data
    return x * net.weight + net.kept


def assigns_data_of_a_local(net, x):
    y = torch.empty(0).double()
    y.data = x.detach()
    return x * net.weight + y


def fills_parameters(net, x):
    nn.utils.vector_to_parameters(x.mean(0).detach(), [net.weight])
    return x * net.weight


def applies_to_the_module(net, x):
    net._apply(lambda tensor: tensor * x.detach().mean())
    return x * net.weight


def exports_by_dlpack(net, x):
    return torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(x.detach())) * net.weight


def exports_by_torch(net, x):
    return torch.from_dlpack(torch.to_dlpack(x.detach())) * net.weight


def imports_by_dlpack(net, x):
    return torch.from_dlpack(x.detach()) * net.weight


def imports_into_numpy(net, x):
    return torch.from_numpy(np.from_dlpack(x.detach())) * net.weight


def becomes_an_array(net, x):
    return torch.from_numpy(np.asarray(x.detach())) * net.weight


def calls_a_numpy_function(net, x):
    return torch.from_numpy(np.array([np.sin(x.detach())])[0]) * net.weight


def reads_the_storage(net, x):
    return x * net.weight * x.untyped_storage()[0]


def sets_from_a_storage(net, x):
    return torch.empty(0).double().set_(x.detach().untyped_storage(), 0, (3, 4)) * net.weight


def sets_from_a_tensor(net, x):
    return torch.empty(0).double().set_(x.detach()) * net.weight


def reads_an_address(net, x):
    return x * net.weight * ctypes.c_double.from_address(x.data_ptr()).value


def pickles(net, x):
    return pickle.loads(pickle.dumps(x.detach())) * net.weight


def saves(net, x):
    torch.save(x.detach(), io.BytesIO())
    return x * net.weight


def copies_shallowly(net, x):
    return copy.copy(x.detach()) * net.weight


def gathers_floats(net, x):
    return torch.tensor([x[0, 0], 1.0])[0] * x * net.weight


def indexes_a_list(net, x):
    return [1.0, 2.0][x.argmax()] * x


def works_below_torch_function(net, x):
    with torch._C.DisableTorchFunctionSubclass():
        return x * net.weight


def swaps_a_buffer(net, x):
    net.mean.set_(update(net, x))
    return x * net.weight


def goes_backward(net, x):
    y = torch.ones(4).double().requires_grad_()
    with torch.enable_grad():
        (y * x).sum().backward()
    return x * net.weight * y.grad


def goes_backward_by_torch(net, x):
    y = torch.ones(4).double().requires_grad_()
    with torch.enable_grad():
        torch.autograd.backward([(y * x).sum()])
    return x * net.weight * y.grad


REFUSED = [
    goes_backward,
    goes_backward_by_torch,
    assigns_data_of_a_parameter,
    assigns_data_of_an_attribute,
    assigns_data_of_a_local,
    fills_parameters,
    applies_to_the_module,
    exports_by_dlpack,
    exports_by_torch,
    imports_by_dlpack,
    imports_into_numpy,
    becomes_an_array,
    calls_a_numpy_function,
    reads_the_storage,
    sets_from_a_storage,
    sets_from_a_tensor,
    reads_an_address,
    pickles,
    saves,
    copies_shallowly,
    gathers_floats,
    indexes_a_list,
    works_below_torch_function,
    swaps_a_buffer,
]


@pytest.mark.parametrize("statement", REFUSED, ids=lambda statement: statement.__name__)
def test_what_cannot_map_is_refused_with_its_line(statement):
    line = rf"at test_past_python.py:\d+, in (Keeper\.)?{statement.__name__}: `"
    with pytest.raises(FanError, match=line) as raised:
        converted(statement)
    assert re.search(r"fan out at 'first'\. To leave .* mode='per-task'", str(raised.value)), raised.value
    branched, x = converted(statement, on=False)
    for module in branched.modules():
        if isinstance(module, Keeper):
            module.on = True
    before = copy.deepcopy(branched.state_dict())
    with pytest.raises(FanError, match=line):
        branched(x)
    for name, tensor in branched.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def reads_below_all(net, x):
    with torch._C.DisableTorchFunctionSubclass(), torch._C._DisableTorchDispatch():
        return x * net.weight


@pytest.mark.parametrize("cuda", [True, False], ids=["built with CUDA", "built without"])
def test_the_memory_that_a_fan_does_not_have_is_refused(monkeypatch, cuda):
    if not cuda:
        monkeypatch.setattr("recon.branching.fans.value._refuse_reads", None)
    elif value._refuse_reads is None:
        pytest.skip("this torch was built without CUDA")
    with pytest.raises(FanError, match=r"a fan's memory at test_past_python.py:\d+, in reads_below_all: .*per-task"):
        converted(reads_below_all)
    fan = TaskFan(Partition.per_task(TASKS), [torch.ones(3)] * 3)
    # Older torch makes a view first.
    words = rf"{re.escape(UNREADABLE)}|C\+\+ code called .*as_strided|[Cc]annot access data pointer|not allocated"
    with torch._C.DisableTorchFunctionSubclass():
        for read in (torch._C._to_dlpack, Tensor.data_ptr):
            with pytest.raises((RuntimeError, FanError), match=words):
                read(fan)
        assert fan.shape == (3,) and fan.device.type == "cpu"  # what scripted code may ask


def test_an_assignment_to_data_without_fans_is_what_it_was():
    x, y = torch.zeros(2, requires_grad=True), torch.ones(2)
    x.data = y
    assert x.data_ptr() == y.data_ptr() and x.requires_grad and not x.data.requires_grad
    with pytest.raises(TypeError, match="data has to be a tensor"):
        x.data = 1.0
    with pytest.raises(RuntimeError, match=r"[Dd]eleting tensor data"):
        del x.data
    compiled = torch.compile(lambda x: x.data * 2 + x, backend="eager", fullgraph=True)
    assert compiled(y).tolist() == [3, 3]


def test_a_buffer_whose_data_a_forward_replaces_is_put_back_with_its_memory():
    branched, x = converted(assigns_data)
    buffer = next(branched.buffers())
    before, view = buffer.clone(), buffer.detach()[1:]
    with state_kept(branched):
        branched.train()(x)
        assert not torch.equal(buffer, before)
    assert torch.equal(buffer, before) and view.data_ptr() == buffer.data_ptr() + buffer.itemsize


# Adapters that are merged into the weights of a branched model.


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter, which merges as peft's do."""

    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(4, 4)
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
        self.merged = False

    def merge(self):
        self.base_layer.weight.data += self.up.weight @ self.down.weight
        self.merged = True

    def forward(self, x):
        return self.base_layer(x) if self.merged else self.base_layer(x) + self.up(self.down(x))


class WithAdapters(nn.Module):
    def __init__(self, make_adapted=Adapted):
        super().__init__()
        self.first, self.second = make_adapted(), make_adapted()

    def forward(self, x):
        return dict.fromkeys(TASKS, self.second(torch.relu(self.first(x))))


class PeftAdapted(nn.Module):
    """The same, with peft's own layer."""

    def __init__(self):
        super().__init__()
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(target_modules=["linear"], r=2, init_lora_weights=False)
        self.layer = peft.inject_adapter_in_model(config, nn.ModuleDict({"linear": nn.Linear(4, 4)}))["linear"]

    def merge(self):
        self.layer.merge()

    def forward(self, x):
        return self.layer(x)


ADAPTED = {
    Adapted: ("base_layer", ["up", "down"]),
    PeftAdapted: ("layer.base_layer", ["layer.lora_A.default", "layer.lora_B.default"]),
}


@pytest.mark.parametrize("make", ADAPTED, ids=lambda make: make.__name__)
def test_adapters_merge_into_each_copy_of_a_branched_weight(make):
    torch.manual_seed(0)
    base, adapters = ADAPTED[make]
    x = torch.randn(3, 4).double()
    model = WithAdapters(make).double()
    for names in ([base], [base, *adapters]):
        plan = BranchPlan.grouped({f"first.{name}": [["a", "b"], "c"] for name in names}, TASKS)
        branched = convert(model, plan, x).eval()
        oracle.perturb(branched)
        expected = {task: extract_task(branched, task)(x)[task] for task in TASKS}
        branched.first.merge()
        weights = [branched.get_submodule(f"first.{base}.branches.{group}").weight for group in ("a+b", "c")]
        assert all(type(weight) is nn.Parameter for weight in weights) and not torch.equal(*weights)
        for task, output in branched(x).items():
            oracle.assert_close(output, expected[task], task)


@pytest.mark.parametrize("make", ADAPTED, ids=lambda make: make.__name__)
def test_branched_adapters_do_not_merge_into_a_shared_weight(make):
    torch.manual_seed(0)
    base, adapters = ADAPTED[make]
    x = torch.randn(3, 4).double()
    plan = BranchPlan.per_task([f"first.{name}" for name in adapters], tasks=TASKS)
    branched = convert(WithAdapters(make).double(), plan, x).eval()
    oracle.perturb(branched)
    weight = branched.get_submodule(f"first.{base}").weight
    before, outputs = weight.detach().clone(), branched(x)
    with pytest.raises(
        FanError, match=r"assignment to \.data .* all tasks share .*recon.extract_task\(branched, task\)"
    ):
        branched.first.merge()
    assert torch.equal(weight, before)
    for task in TASKS:
        plain = extract_task(branched, task).eval()
        plain.first.merge()
        oracle.assert_close(plain(x)[task], outputs[task], task)


def test_adapters_of_a_whole_peft_model_merge():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    x = torch.randn(3, 4).double()
    config = peft.LoraConfig(target_modules=["first"], r=2, init_lora_weights=False)
    base = "base_model.model.first."

    def branch(*names):
        model = peft.get_peft_model(Kept(lambda net, x: x * net.weight), config).double()
        plan = BranchPlan.grouped({base + name: [["a", "b"], "c"] for name in names}, TASKS)
        branched = convert(model, plan, x).eval()
        oracle.perturb(branched)
        return branched, {task: output.detach() for task, output in branched(x).items()}

    adapter = ["lora_A.default", "lora_B.default"]
    for names in (["base_layer"], ["base_layer", *adapter]):
        branched, expected = branch(*names)
        branched.merge_adapter()
        for task, output in branched(x).items():
            oracle.assert_close(output, expected[task], task)
        branched.unmerge_adapter()
        for task, output in branched(x).items():
            oracle.assert_close(output, expected[task], task)
        for task in TASKS:  # a plain model of one task
            oracle.assert_close(extract_task(branched, task).merge_and_unload()(x)[task], expected[task], task)
        inner = branched.merge_and_unload()  # out of the model that knows its plan: nobody takes the fans apart
        with pytest.raises(FanError, match=r"differs between tasks.* outside .* recon.extract_task\(branched, task\)"):
            inner(x)["a"].tolist()
    for merge in ("merge_adapter", "merge_and_unload"):
        branched, expected = branch(*adapter)
        with pytest.raises(FanError, match=r"all tasks share .*recon.extract_task\(branched, task\)"):
            getattr(branched, merge)()
        for task in TASKS:
            plain = extract_task(branch(*adapter)[0], task)
            assert plain.merge_and_unload()(x)[task].shape == (3, 4)
