import copy
import operator
import re
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from recon.branching.conversion import convert
from recon.branching.fans.fan import TaskFan, merge
from recon.branching.fans.serving import serving
from recon.branching.fans.statement import where
from recon.branching.fans.trees import partition_of, restrict, value_for, within
from recon.branching.fans.value import fans_in
from recon.branching.partition import Partition
from recon.branching.plan import BranchPlan
from recon.errors import FanError
from tests.oracle import assert_close, perturb, plain_model
from tests.zoo import ReverseGradient, ScaledProduct

TASKS = ("a", "b", "c")
PER_TASK = Partition.per_task(TASKS)
COARSE = Partition.of_groups([["a", "b"], "c"], TASKS)


def fan(*shape: int, partition: Partition = PER_TASK, grad: bool = False) -> TaskFan:
    values = [torch.randn(*shape, dtype=torch.float64, requires_grad=grad) for _ in partition.groups]
    return TaskFan(partition, values)


# Any operation.

OPERATIONS = {
    "scalar": lambda x, y: 1 - x * 2 / (y + 3) ** 2,
    "compare": lambda x, y: (x > y) & (x != 0) | ~(y <= 1),
    "matmul": lambda x, y: x @ y.T,
    "rmatmul": lambda x, y: torch.ones(2, 3, dtype=x.dtype) @ x,
    "method": lambda x, y: x.clamp(min=0).sum(dim=-1, keepdim=True),
    "property": lambda x, y: x.T + y.mT.real,
    "getitem": lambda x, y: x[1:, [0, 2]] + y[..., None][torch.tensor([1, 0]), :2, 0],
    "mask": lambda x, y: torch.where(x > 0, x, y).masked_fill(y > 1, 0),
    "named tuple": lambda x, y: x.max(dim=1).values + torch.return_types.max(y.max(dim=1)).indices,
    "tuple": lambda x, y: torch.stack(x.unbind(0) + tuple(y)),
    "iteration": lambda x, y: sum(a * b for a, b in zip(x, y, strict=True)),
    "list": lambda x, y: torch.cat([x, y, torch.zeros(1, 4, dtype=x.dtype)]),
    "nested list": lambda x, y: torch.block_diag(*[x, y]),
    "functional": lambda x, y: F.softmax(F.layer_norm(x, x.shape[1:]), -1) + F.gelu(y),
    "keyword": lambda x, y: torch.add(input=x, other=y, alpha=2),
    "einsum": lambda x, y: torch.einsum("ni,nj->ij", x, y),
    "linalg": lambda x, y: torch.linalg.norm(x, dim=1) + torch.fft.rfft(y).abs().sum(1),
    "new": lambda x, y: x.new_ones(2) + torch.full_like(y, 2)[:, :2] + x.new_tensor([1.0, 2.0]),
    "dtype": lambda x, y: x.float().to(y.dtype).type_as(y).cpu().to(y.device),
    "aten": lambda x, y: torch.ops.aten.add(x, 1) + torch.ops.aten.mul.Tensor(x, y),
    "reversed": lambda x, y: reversed(x),
    "no grad": lambda x, y: torch.no_grad()(lambda: x + y)(),
    "python": lambda x, y: x * len(x) * x.dim() * x.size(1) * y.shape[0] * int(x.is_floating_point()) * y.itemsize,
    "deepcopy": lambda x, y: copy.deepcopy(x.detach()) + y,
    "parameter": lambda x, y: nn.Parameter(x) * 2,
    "view chain": lambda x, y: x.view(-1).unflatten(0, (2, -1)).transpose(0, 1).contiguous().flatten(),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("second", ["fan", "coarser fan", "plain"])
def test_an_operation_maps_over_the_groups(name, second):
    operation = OPERATIONS[name]
    x = fan(3, 4)
    y = {"fan": fan(3, 4), "coarser fan": fan(3, 4, partition=COARSE), "plain": torch.randn(3, 4).double()}[second]
    result = operation(x, y)
    assert type(result) is TaskFan
    for task in TASKS:
        expected = operation(value_for(x, task), value_for(y, task))
        assert torch.equal(value_for(result, task), expected)


def test_the_groups_of_a_result_are_the_common_refinement():
    other = Partition.of_groups(["a", ["b", "c"]], TASKS)
    x, y = fan(2, partition=COARSE), fan(2, partition=other)
    assert partition_of(x + 1) == COARSE
    assert partition_of(x + y) == PER_TASK
    assert partition_of((x, [y], torch.ones(1))) == PER_TASK
    assert partition_of(torch.ones(1)) is None


def test_what_all_groups_share_stays_plain():
    x, plain = fan(2), torch.ones(2, dtype=torch.float64)
    assert plain.type_as(x) is plain
    assert plain.to(x) is plain
    assert type(plain.expand_as(x)) is TaskFan  # three views of it


def test_values_of_different_tasks_alone_do_not_meet():
    x = fan(2)
    ab, c = restrict(x, ("a", "b")), restrict(x, ("c",))
    assert partition_of(ab + x).tasks == ("a", "b")
    with pytest.raises(FanError, match=r"Values computed for \[\['a', 'b'\], \['c'\]\] meet at test_fan.py"):
        ab + c
    with pytest.raises(FanError, match=r"Values computed for \['a', 'b'\] are used for \['c'\]"):
        restrict(ab, ("c",))
    with pytest.raises(FanError, match="task 'c' holds values computed only for"):
        value_for(ab, "c")


def test_python_sees_a_tensor():
    x = fan(3, 4)
    assert isinstance(x, Tensor) and torch.is_tensor(x) and not isinstance(x, nn.Parameter)
    assert (x.shape, x.dtype, x.device, x.ndim, len(x)) == ((3, 4), torch.float64, torch.device("cpu"), 2, 3)
    assert repr(x) == f"{x}" == "TaskFan(a: (3, 4), b: (3, 4), c: (3, 4))"
    assert {x: 1}[x] == 1


@dataclass
class Pair:
    left: Tensor
    right: dict[str, object]


@dataclass(frozen=True)
class Frozen:
    pair: Pair
    name: str = "x"


def test_structures():
    x = fan(2)
    structure = Frozen(Pair(x, {"y": [x * 2, 3], "none": None}))
    assert len(fans_in([structure, structure])) == 4
    for task in TASKS:
        picked = value_for(structure, task)
        assert (picked.name, picked.pair.right["y"][1], picked.pair.right["none"]) == ("x", 3, None)
        assert torch.equal(picked.pair.right["y"][0], value_for(x, task) * 2)
    assert type(structure.pair.left) is TaskFan  # what came in is left as it was
    narrower = within(structure, ("a", "b"))
    assert partition_of(narrower).tasks == ("a", "b") and type(within(narrower, ("a",)).pair.left) is Tensor
    merged = merge(PER_TASK, [value_for(structure, task) for task in TASKS])
    assert all(torch.equal(value_for(merged.pair.left, task), value_for(x, task)) for task in TASKS)


def test_results_that_differ_in_more_than_their_tensors():
    x, y = torch.ones(2), torch.ones(3)
    with pytest.raises(FanError, match=r"not a tensor differs between tasks.*: 1 and 2"):
        merge(COARSE, [(x, 1), (x, 2)])
    with pytest.raises(FanError, match="different structure"):
        merge(COARSE, [(x, y), (x, y, x)])
    with pytest.raises(FanError, match="not a tensor differs"):
        merge(COARSE, [(x, None), (x, y)])
    assert merge(COARSE, [{"n": 1, "s": "same"}, {"n": 1, "s": "same"}]) == {"n": 1, "s": "same"}
    masked = TaskFan(COARSE, [torch.tensor([1.0, -1.0]), torch.tensor([1.0, 1.0])])
    masked = masked[masked > 0]
    assert value_for(masked.sum(), "c") == 2
    with pytest.raises(FanError, match=r"not a tensor differs between tasks at test_fan.py:\d+, in test_results"):
        len(masked)


def test_a_groups_value_may_have_fanned_out_in_turn():
    inner = restrict(fan(2), ("a", "b"))
    outer = merge(COARSE, [inner, torch.zeros(2)])
    assert partition_of(outer) == PER_TASK
    assert torch.equal(value_for(outer, "b"), value_for(inner, "b"))


def test_code_that_serves_one_group_sees_plain_values():
    values = [torch.ones(2), torch.zeros(2)]
    with serving(("a", "b")):
        assert merge(Partition(("a", "b"), (0, 0)), values[:1]) is values[0]
        assert type(merge(Partition.per_task(("a", "b")), values)) is TaskFan
        assert type(merge(Partition.per_task(("a",)), values[:1])) is TaskFan  # b has no value
    assert type(merge(Partition(("a", "b"), (0, 0)), values[:1])) is TaskFan


# Writing in place.

AUGMENTED = {
    "+=": operator.iadd, "-=": operator.isub, "*=": operator.imul, "/=": operator.itruediv, "**=": operator.ipow,
    "//=": operator.ifloordiv, "%=": operator.imod, "@=": operator.imatmul,
    "&=": operator.iand, "|=": operator.ior, "^=": operator.ixor, "<<=": operator.ilshift, ">>=": operator.irshift,
}  # fmt: skip


@pytest.mark.parametrize("sign", AUGMENTED)
def test_augmented_assignment(sign):
    integers = sign[0] in "&|^<>"
    dtype = torch.int64 if integers else torch.float64
    x = TaskFan(PER_TASK, [torch.full((2, 2), k + 0.5).to(dtype) for k in (1, 2, 3)])
    for start in (torch.full((2, 2), 6.5).to(dtype), (fan(2, 2, partition=COARSE).abs() * 9).to(dtype)):
        before = copy.deepcopy(start)
        names = {"y": start, "x": x}
        exec(f"y {sign} x", names)
        for task in TASKS:
            expected = AUGMENTED[sign](value_for(before, task).clone(), value_for(x, task))
            assert torch.equal(value_for(names["y"], task), expected)
        if type(start) is Tensor:
            assert torch.equal(start, before)  # no task's values in what all share
        elif sign != "@=":
            assert names["y"] is start


def test_writing_into_a_fan_is_seen_by_its_aliases():
    x = fan(3, 4)
    kept, view = x, x[:, 1]
    assert x.add_(1) is x and F.relu(x, inplace=True) is x
    x[0] = fan(4)
    x[1:] *= 2
    for task in TASKS:
        assert torch.equal(value_for(kept, task), value_for(x, task))
        assert torch.equal(value_for(view, task), value_for(x, task)[:, 1])
        assert (value_for(x, task)[1:] >= 0).all()


def test_groups_are_taken_apart_before_finer_values_are_written():
    x, finer = fan(2, partition=COARSE), fan(2)
    before = copy.deepcopy(x)
    kept = x
    x.add_(finer)
    assert kept is x and partition_of(x) == PER_TASK
    for task in TASKS:
        assert torch.equal(value_for(x, task), value_for(before, task) + value_for(finer, task))


def test_groups_that_share_memory_are_taken_apart():
    plain = torch.zeros(3)
    x = plain.expand_as(fan(3))
    x.add_(TaskFan(PER_TASK, [torch.full((3,), k) for k in (1.0, 2.0, 3.0)]))
    assert [value_for(x, task)[0].item() for task in TASKS] == [1, 2, 3]
    assert plain.sum() == 0


def test_values_of_some_tasks_are_not_written_into_values_of_all():
    x = fan(2)
    with pytest.raises(FanError, match=r"Values of \['a'\] only are written into values of \['a', 'b', 'c'\]"):
        x.add_(restrict(fan(2), ("a",)))


def test_out():
    x, out = fan(2), fan(2)
    assert torch.mul(x, 3, out=out) is out
    assert torch.equal(value_for(out, "b"), value_for(x, "b") * 3)


# Statements, in the forward of a model: `first` and `second` are branched, the one into finer groups.


class Statement(nn.Module):
    def __init__(self, statement) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))
        self.statement = [statement]

    def forward(self, x):
        return dict.fromkeys(TASKS, self.statement[0](self, x * 1))


def converted(statement) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Statement(statement).double(), torch.randn(3, 4).double()
    plan = BranchPlan.grouped({"first": ["a", "b", "c"], "second": [["a", "b"], "c"]}, TASKS)
    return convert(model, plan, x), x


def multiplies_in_place(net, x):
    return x.mul_(net.first(x.detach()))


def writes_an_element(net, x):
    z = torch.zeros(3, 4, dtype=x.dtype)
    z[:, 0] = net.first(x)[:, 0]
    return z


def adds_to_an_element(net, x):
    x[:, 0] += net.first(x.detach())[:, 0]
    return x


def writes_by_mask(net, x):
    x[net.first(x) > 0] = 0.0
    return x


def writes_out(net, x):
    return torch.add(net.first(x).detach(), 1, out=x)


def copies_into(net, x):
    return torch.empty_like(x).copy_(net.first(x))


def adds_by_a_function(net, x):
    return operator.iadd(x, net.first(x.detach()))


def scatters(net, x):
    return x.scatter_add_(0, torch.zeros(3, 4, dtype=torch.long), net.first(x))


def renormalises(net, x):
    return F.embedding((net.first(x) > 0).long(), torch.full((2, 4), 3.0, dtype=x.dtype), max_norm=1.0)


def renormalises_a_parameter(net, x):
    return F.embedding((net.first(x) > 0).long(), net.third.weight, max_norm=0.1)


def calls_batch_norm(net, x):
    return F.batch_norm(net.first(x), torch.zeros(4).double(), torch.ones(4).double(), training=True)


def writes_in_evaluation(net, x):
    y = net.first(x)
    return y if net.training else x.mul_(y)


def decides(net, x):
    y = net.first(x)
    return y * 2 if y.sum() > 0 else y


def loops_while(net, x):
    y = net.first(x)
    while (y.abs() < 10).all():
        y = y * 2
    return y


def takes_an_item(net, x):
    return x * net.first(x).max().item()


def takes_a_float(net, x):
    return x * float(net.first(x).max())


def slices_by_a_value(net, x):
    return x[:, : net.first(x).argmax()]


def ranges_over_a_value(net, x):
    return sum(x for _ in range(net.first(x).argmax()))


def lists(net, x):
    return x + sum(net.first(x).flatten().tolist())


def looks_for_equal(net, x):
    return x if torch.equal(x, net.first(x)) else x + 1


def goes_to_numpy(net, x):
    return torch.as_tensor(net.first(x).detach().numpy())


def looks_inside(net, x):
    return x * (1.0 in net.first(x))


def finds_the_larger(net, x):
    return max(*net.first(x)[0, :2])


def doubled(x: Tensor) -> Tensor:
    return x * 2


def calls_torchscript(net, x):
    return torch.jit.script(doubled)(net.first(x))


def makes_a_new_tensor_of_it(net, x):
    return torch.tensor(net.first(x))


def maps_by_vmap(net, x):
    return torch.vmap(lambda row: row * 2)(net.first(x))


def reads_an_alias(net, x):
    alias = x
    x += net.first(x.detach())
    return x + alias


def reads_a_view(net, x):
    row = x[0]
    x *= net.first(x.detach())
    return x + row


def reads_a_view_of_coarser_values(net, x):
    y = net.second(x)
    row = y[0]
    y += net.first(x)
    return y + row


def writes_a_view_of_coarser_values(net, x):
    y = net.second(x)
    column = y[:, 0]
    column += net.first(x)[:, 0]
    y[:, 1] = column
    return y


def reads_what_is_expanded(net, x):
    y = x.expand_as(net.first(x))
    y.add_(net.first(x))
    return y + x


def checkpoints_the_old_way(net, x):
    return checkpoint(net.second, net.first(x), use_reentrant=True)


unnoticed = torch._C._FunctionBase.__dict__["apply"]
reverse = unnoticed.__get__(None, ReverseGradient)


class ReturnsItsInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


def reverses_by_an_old_name(net, x):
    return reverse(net.first(x), 1.0)


def multiplies_by_an_old_name(net, x):
    first, _ = unnoticed.__get__(None, ScaledProduct)(net.first(x), net.second(x))
    return first


def passes_by_an_old_name(net, x):
    return unnoticed.__get__(None, ReturnsItsInput)(net.first(x)) * 2


SHARED = "into a tensor that all tasks share"
READS = "reads the value of a tensor that differs between tasks"
PAST = r"C\+\+ code called .* on values that differ between tasks"
STALE = "uses a tensor that an earlier statement changes in place"
LOST = "The gradient of values that differ between tasks is lost"

# The statement, what the message says, and the line it names.
CANNOT_WORK = [
    (multiplies_in_place, rf"mul_\(\) writes .* {SHARED}", "return x.mul_(net.first(x.detach()))"),
    (writes_an_element, rf"__setitem__\(\) writes .* {SHARED}", "z[:, 0] = net.first(x)[:, 0]"),
    (adds_to_an_element, rf"__setitem__\(\) writes .* {SHARED}", "x[:, 0] += net.first(x.detach())[:, 0]"),
    (writes_by_mask, SHARED, "x[net.first(x) > 0] = 0.0"),
    (writes_out, rf"add\(\) writes .* {SHARED}", "return torch.add(net.first(x).detach(), 1, out=x)"),
    (copies_into, SHARED, "return torch.empty_like(x).copy_(net.first(x))"),
    (adds_by_a_function, SHARED, "return operator.iadd(x, net.first(x.detach()))"),
    (scatters, SHARED, "return x.scatter_add_("),
    (renormalises, SHARED, "return F.embedding("),
    (renormalises_a_parameter, SHARED, "return F.embedding("),
    (calls_batch_norm, SHARED, "return F.batch_norm("),
    (writes_in_evaluation, SHARED, "return y if net.training else x.mul_(y)"),
    (decides, rf"__bool__\(\) {READS}", "return y * 2 if y.sum() > 0 else y"),
    (loops_while, READS, "while (y.abs() < 10).all():"),
    (takes_an_item, rf"item\(\) {READS}", "return x * net.first(x).max().item()"),
    (takes_a_float, READS, "return x * float(net.first(x).max())"),
    (slices_by_a_value, READS, "return x[:, : net.first(x).argmax()]"),
    (ranges_over_a_value, READS, "return sum(x for _ in range(net.first(x).argmax()))"),
    (lists, READS, "return x + sum(net.first(x).flatten().tolist())"),
    (looks_for_equal, READS, "return x if torch.equal(x, net.first(x)) else x + 1"),
    (goes_to_numpy, READS, "return torch.as_tensor(net.first(x).detach().numpy())"),
    (looks_inside, READS, "return x * (1.0 in net.first(x))"),
    (finds_the_larger, READS, "return max(*net.first(x)[0, :2])"),
    (calls_torchscript, PAST, "return torch.jit.script(doubled)(net.first(x))"),
    (makes_a_new_tensor_of_it, PAST, "return torch.tensor(net.first(x))"),
    (maps_by_vmap, PAST, "return torch.vmap(lambda row: row * 2)(net.first(x))"),
    (reads_an_alias, STALE, "return x + alias"),
    (reads_a_view, STALE, "return x + row"),
    (reads_a_view_of_coarser_values, STALE, "return y + row"),
    (writes_a_view_of_coarser_values, STALE, "y[:, 1] = column"),
    (reads_what_is_expanded, STALE, "return y + x"),
    (checkpoints_the_old_way, "Values fan out inside CheckpointFunction", "use_reentrant=True)"),
    (reverses_by_an_old_name, rf"{LOST}.*ReverseGradient", ""),
    (multiplies_by_an_old_name, rf"{LOST}.*ScaledProduct", ""),
    (passes_by_an_old_name, rf"{LOST}.*ReturnsItsInput", "return unnoticed.__get__(None, ReturnsItsInput)"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("statement", "message", "line"), CANNOT_WORK, ids=lambda part: getattr(part, "__name__", ""))
def test_what_cannot_work_fails_at_conversion_and_names_the_line(statement, message, line):
    with pytest.raises(FanError, match=message) as raised:
        converted(statement)
    if line:
        assert re.search(rf"at test_fan.py:\d+, in [\w<>.]+: `[^`]*{re.escape(line)}", str(raised.value)), raised.value
    assert "Traceback" not in str(raised.value) and len(str(raised.value)) < 700
    assert "recon.extract_task" not in str(raised.value)  # of use outside a forward alone
    assert re.search(
        r"fan out at '(first|second|first', 'second)'\. To leave .* convert with mode='per-task'", str(raised.value)
    )


def adds_to_what_has_not_fanned_out(net, x):
    y = x[:, :2]
    y += net.first(x.clone())[:, :2]
    return torch.cat([y, x[:, 2:]], 1)  # the other half of x is as it was


def adds_finer_values_to_an_element(net, x):
    y = net.second(x)
    y[:, 0] += net.first(x)[:, 0]
    y[1:2] *= net.first(x)[1]
    return y.mul_(net.first(x))


def differentiates(net, x):
    y = net.first(x)
    with torch.enable_grad():
        z = y.detach().requires_grad_()
        return torch.autograd.grad((z**3 * y).sum(), z, create_graph=True)[0]


def hooks(net, x):
    y = net.first(x)
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient * 2)
        handle = y.register_hook(lambda gradient: gradient * 5)
        handle.remove()
    return y * y


def applies_functions(net, x):
    y, z = ScaledProduct.apply(net.first(x), net.second(x), 3)
    return ReturnsItsInput.apply(ReverseGradient.apply(y, 0.3)) + z


def packs_sequences(net, x):
    packed = nn.utils.rnn.pack_padded_sequence(net.first(x)[..., None], torch.tensor([4, 3, 2]), batch_first=True)
    return nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)[0]


def scale_of(x: Tensor) -> Tensor:  # as DeBERTa scales its attention
    return torch.sqrt(torch.tensor(x.size(-1) * len(x.shape), dtype=torch.float64))


def asks_for_the_shape_in_torchscript(net, x):
    y = net.first(x)
    return y / torch.jit.script(scale_of)(y)


def formats(net, x):
    y = net.first(x)
    assert "(3, 4)" in f"{y} {tuple(y.shape)}" + str([y])
    return y


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
@pytest.mark.parametrize(
    "statement",
    [
        adds_to_what_has_not_fanned_out,
        adds_finer_values_to_an_element,
        differentiates,
        hooks,
        applies_functions,
        packs_sequences,
        asks_for_the_shape_in_torchscript,
        formats,
    ],
)
def test_what_works(statement):
    branched, x = converted(statement)
    perturb(branched)
    outputs = branched(x)
    for task in TASKS:
        plain = plain_model(lambda: Statement(statement).double(), branched, task)
        expected = plain(x)[task]
        assert_close(outputs[task], expected, task)
        branched.zero_grad()
        outputs[task].square().sum().backward(retain_graph=True)
        expected.square().sum().backward()
        own = branched.first.branches.get_submodule(task)
        assert_close(own.weight.grad, plain.first.weight.grad, task)


def test_an_autograd_function_without_fans_is_called_as_ever():
    class Adds(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y, *, scale=1):
            ctx.mark_non_differentiable(y)
            return x * scale, y

        @staticmethod
        def backward(ctx, first, second):
            return first * 7, None

    x = torch.ones(2, requires_grad=True)
    first, _ = Adds.apply(x, torch.zeros(2))
    first.sum().backward()
    assert x.grad.tolist() == [7, 7] and type(first) is Tensor
    compiled = torch.compile(lambda x: ReverseGradient.apply(x, 2.0) * 3, backend="eager", fullgraph=True)
    compiled(x := torch.ones(2, requires_grad=True)).sum().backward()
    assert x.grad.tolist() == [-6, -6]


def test_the_line_is_the_users():
    class Names(nn.Module):
        def forward(self, x):
            return where()

    assert re.fullmatch(r" at test_fan.py:\d+, in Names.forward: `return where\(\)`", nn.Sequential(Names())(None))
