import builtins
import copy
import os
import runpy
import shutil
import threading
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from recon.branching.conversion import convert
from recon.branching.lowering import lower
from recon.branching.plan import BranchPlan
from recon.errors import PlanError, UsageError
from recon.support.network.forward import call, inputs
from tests import oracle
from tests.zoo import TASKS, ZOO, Entry, Heads, PlainConv, image, sequence, vector

# What torch.export cannot trace, and the message about it.
CANNOT = {
    "ChunksAndLoops": r"program fails on a batch of 8, the model does not: .* 4.*\. A loop over the samples",
    "NestedOutputs": r"The output of task 'c' holds a Parts: .* Call torch.export.register_dataclass\(Parts\) first",
}
if torch.__version__ < "2.7":
    CANNOT["Recurrent"] = "cannot trace the model at zoo.py:.*self.gru.* but got 4-D tensor"  # nor the plain model
    CANNOT["FilledCache"] = "cannot trace the model: ValueError: Node arity mismatch"  # its list grows in a forward


def branch(entry: Entry, kind: str = "all", mode: str = "fan", seed: int | None = None) -> tuple[nn.Module, object]:
    seed = zlib.crc32(f"{entry.name}/{kind}".encode()) % 10_000 if seed is None else seed
    torch.manual_seed(seed)
    model, example = entry.make(), entry.inputs(4)
    branched = convert(model, oracle.random_plan(model, kind, seed), example, mode=mode)
    oracle.perturb(branched, seed)
    return branched, example


def branch_at(layers: list[str], model: nn.Module, example: object, tasks: tuple[str, ...] = TASKS) -> nn.Module:
    branched = convert(model, BranchPlan.per_task(layers, tasks), example)
    oracle.perturb(branched)
    return branched


class Function(nn.Module):
    """`forward` calls a function of the test's."""

    def __init__(self, function, body: nn.Module) -> None:
        super().__init__()
        self.body, self.heads, self.function = body, Heads(4, ("a", "b")), function

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def branch_function(function, example: object, body: nn.Module | None = None, layer: str = "body") -> nn.Module:
    return branch_at([layer], Function(function, body or nn.Linear(6, 4)).double(), example, ("a", "b"))


def check(module: nn.Module, branched: nn.Module, given: object) -> None:
    with torch.no_grad():
        actual, expected = call(module, given), call(branched.eval(), given)
    assert list(actual) == list(expected)
    for task in expected:
        oracle.assert_outputs_close(actual[task], expected[task], task)


def count_nodes(program: torch.export.ExportedProgram) -> Counter[str]:
    return Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")


# The program.


@pytest.mark.parametrize("name", [name for name in ZOO if name not in CANNOT])
def test_a_program_computes_what_the_branched_model_does_for_any_batch_size(name):
    check_program(name, ("all", "quarter")[list(ZOO).index(name) % 2])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["all", "quarter"])
@pytest.mark.parametrize("name", [name for name in ZOO if name not in CANNOT])
def test_programs_of_more_plans(name, kind):
    check_program(name, kind)


def check_program(name, kind):
    branched, example = branch(ZOO[name], kind)
    branched.train()
    list(branched.modules())[-1].eval()  # modes need not be all the same
    before = oracle.snapshot(branched)
    program = lower(branched, example)
    oracle.assert_untouched(branched, before)
    module = program.module()
    for batch in (7, 1):
        check(module, branched, ZOO[name].inputs(batch))


@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_be_lowered_is_refused_clearly(name):
    branched, example = branch(ZOO[name])
    before = oracle.snapshot(branched)
    with pytest.raises(UsageError, match=CANNOT[name]):
        lower(branched, example)
    oracle.assert_untouched(branched, before)


@pytest.mark.parametrize("name", ["PlainConv", "BareParameters", "TwoNames", "SeveralArguments", "HeldElsewhere"])
def test_a_network_that_runs_once_per_task(name):
    branched, example = branch(ZOO[name], mode="per-task")
    module = lower(branched, example).module()
    for batch in (7, 1):
        check(module, branched, ZOO[name].inputs(batch))


def test_weights_keep_their_names_and_are_a_copy():
    branched, example = branch(ZOO["StatisticsAroundStatistics"], seed=3)
    program = lower(branched, example)
    state = branched.state_dict()
    assert program.state_dict.keys() == state.keys() and any("+" in key for key in state)
    assert all(torch.equal(value, program.state_dict[key]) for key, value in state.items())
    before = program.module()(example)["a"].clone()
    oracle.perturb(branched)
    assert torch.equal(program.module()(example)["a"], before)


@pytest.mark.parametrize("position", range(4))
def test_what_comes_before_the_branch_point_is_in_the_graph_once(position):
    class ToTasks(nn.Module):
        def forward(self, x):
            return dict.fromkeys(TASKS, x)

    model = nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(4)], ToTasks()).double()
    plan = BranchPlan.grouped({str(position): [["a", "b"], "c"]}, TASKS)
    counted = count_nodes(lower(convert(model, plan, image(2)), image(2)))
    assert counted == {"aten.conv2d.default": position + 2 * (4 - position)}
    counted = count_nodes(lower(convert(model, plan, image(2), mode="per-task"), image(2)))
    assert counted == {"aten.conv2d.default": 3 * 4, "aten.clone.default": 2}  # each but the last has inputs of its own


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_attention_with_padding_is_made_of_plain_operators():
    # In evaluation mode, torch runs it by fused operators on nested tensors, and gives zeros at padded positions.
    def forward(net, x, padding):
        return net.heads(net.body(x, src_key_padding_mask=padding))

    def make(batch):
        return inputs(sequence(batch)[..., :4], torch.arange(5) > torch.arange(batch)[:, None] % 4 + 1)

    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    branched = branch_function(forward, make(4), body=nn.TransformerEncoder(layer, 2), layer="heads.heads.a")
    program = lower(branched, make(4))
    assert torch.backends.mha.get_fastpath_enabled()
    assert not [name for name in count_nodes(program) if "nested" in name or "_fwd" in name]
    given = make(7)
    with torch.no_grad():
        outputs, expected = call(program.module(), given), call(branched.eval(), given)
    kept = ~given.args[1]
    for task in ("a", "b"):
        assert not torch.equal(outputs[task], expected[task])
        oracle.assert_close(outputs[task][kept], expected[task][kept], task)


def test_what_a_training_step_leaves_behind_does_not_matter():
    branched, example = branch(ZOO["Cached"])
    sum(oracle.loss_of(output, task) for task, output in branched(example).items()).backward()
    last = branched.last
    program = lower(branched, example)
    assert branched.last is last and branched.calls == 1
    check(program.module(), branched, vector(7))


@pytest.mark.parametrize("name", ["BareParameters", "StatisticsAroundStatistics", "SeveralArguments"])
def test_save_and_load(name, tmp_path):
    branched, example = branch(ZOO[name], seed=3)
    torch.export.save(lower(branched, example), tmp_path / "program.pt2")
    module = torch.export.load(tmp_path / "program.pt2").module()
    for batch in (4, 7):
        check(module, branched, ZOO[name].inputs(batch))


# Inputs and outputs.


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_an_example_of_any_size_views_and_inputs_that_are_no_batches(batch):
    def forward(net, parts):
        return net.heads(net.body(parts["pair"].left) @ parts["mixing"] + parts["pair"].right * parts["scale"])

    def make(batch):
        return {"scale": torch.tensor(2.0), "pair": Pair(vector(batch), vector(batch + 1)[1:, :4]), "mixing": mixing.T}

    mixing = torch.randn(4, 4, dtype=torch.float64)
    branched = branch_function(forward, make(2))
    module = lower(branched, make(batch)).module()
    for other in (make(7), make(1), {**make(3), "pair": Pair(vector(6)[::2], torch.rand(3, 4, dtype=torch.float64))}):
        check(module, branched, other)


def test_a_forward_that_writes_into_its_input():
    def forward(net, x):
        return net.heads(net.body(x.mul_(2)))

    branched = branch_function(forward, vector(4))
    example = torch.ones(4, 6, dtype=torch.float64)
    module = lower(branched, example).module()
    assert torch.equal(example, torch.ones_like(example))
    one, other = (given := vector(7)).clone(), given.clone()
    oracle.assert_outputs_close(module(one), branched(other), "outputs")
    assert torch.equal(one, other) and torch.equal(one, 2 * given)


def test_batches_among_variable_keywords():
    def forward(net, **parts):
        return net.heads(net.body(parts["x"]) * parts["mask"])

    def make(batch):
        return inputs(mask=torch.rand(batch, 1, dtype=torch.float64), x=vector(batch))

    branched = branch_function(forward, make(4))
    check(lower(branched, make(4)).module(), branched, make(7))


def test_an_input_as_long_as_the_batch_is_taken_for_a_batch():
    def forward(net, parts):
        return net.heads(net.body(parts[0]) @ parts[1])

    mixing = torch.randn(4, 4, dtype=torch.float64)
    branched = branch_function(forward, (vector(4), mixing))
    with pytest.raises(UsageError, match=r"fails on a batch of 8: .*then pass an example of another batch size"):
        lower(branched, (vector(4), mixing))
    check(lower(branched, (vector(3), mixing)).module(), branched, (vector(7), mixing))


def test_a_fixed_batch_size():
    branched, example = branch(ZOO["ChunksAndLoops"])
    module = lower(branched, example, dynamic_batch=False).module()
    check(module, branched, example)
    with pytest.raises((AssertionError, RuntimeError), match="4"):
        module(image(7))


def test_a_registered_dataclass():
    @dataclass
    class Output:
        logits: Tensor
        width: int

    def forward(net, x):
        out = net.heads(net.body(x))
        return {"a": Output(out["a"], 2), "b": [out["b"], None, ("name", len(x))]}

    branched = branch_function(forward, vector(4))
    with pytest.raises(UsageError, match=r"The output of task 'a' holds a Output: .*register_dataclass"):
        lower(branched, vector(4))
    torch.export.register_dataclass(Output)
    module = lower(branched, vector(4)).module()
    outputs, expected = module(given := vector(7)), branched.eval()(given)
    oracle.assert_close(outputs["a"].logits, expected["a"].logits, "a")
    assert outputs["a"].width == 2 and outputs["b"][1:] == [None, ("name", 7)]


# What cannot work.


def test_a_model_that_is_not_branched():
    with pytest.raises(PlanError, match="not branched"):
        lower(PlainConv(), image(2))


def test_examples_that_do_not_fit():
    branched, example = branch(ZOO["PlainConv"])
    with pytest.raises(UsageError, match="fails on the example inputs in evaluation mode: RuntimeError"):
        lower(branched, example.float())
    with pytest.raises(UsageError, match="hold no sample"):
        lower(branched, example[:0])


def test_a_model_that_cannot_be_copied():
    branched, example = branch(ZOO["PlainConv"])
    branched.note = threading.Lock()
    with pytest.raises(UsageError, match=r"cannot be copied, because of 'note' \(lock\): TypeError: .* an open file"):
        lower(branched, example)


def decides_by_value(net, x):
    if x.sum() > 1e6:
        x = -x
    return net.heads(net.body(x))


def leaves_torch(net, x):
    return net.heads(net.body(x + torch.from_numpy(x.numpy())))


def decides_by_size(net, x):
    x = net.body(x)
    return {"a": net.heads(x)["a"], "b": net.heads(x if x.shape[0] > 1 else -x)["b"]}


def returns_a_list_of_samples(net, x):
    out = net.heads(net.body(x))
    return {"a": out["a"], "b": [out["b"][i] for i in range(min(x.shape[0], 6))]}


def knows_that_it_is_traced(net, x):
    out = net.heads(net.body(x))
    return {"a": out["a"], "b": out["b"] * (2 if torch.compiler.is_compiling() else 1)}


def fixes_the_size(net, x):
    return net.heads(net.body(x).reshape(4, 4))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            decides_by_value,
            r"trace the model at test_lowering.py:\d+, in decides_by_value: `if x.sum\(\) > 1e6:`: Guard",
        ),
        (leaves_torch, r"trace the model at test_lowering.py:\d+, in leaves_torch: `return .*`: \w+: .* use torch's"),
        (decides_by_size, r"output of task 'b' is not the model's for a batch of 1: it differs by [\d.]+, where"),
        (returns_a_list_of_samples, "fails on a batch of 8|'b' .* for a batch of 8: 4 tensors in place of 6"),
        (knows_that_it_is_traced, r"output of task 'b' is not the model's: it differs by [\d.]+, where the largest"),
        (fixes_the_size, r"The model fails on a batch of 8: RuntimeError: .* or pass dynamic_batch=False"),
    ],
)
def test_forwards_that_a_program_cannot_follow(function, message):
    branched = branch_function(function, example := vector(4))
    before = oracle.snapshot(branched)
    with pytest.raises(UsageError, match=message) as caught:
        lower(branched, example)
    assert "\n" not in str(caught.value)
    oracle.assert_untouched(branched, before)
    assert builtins.len is len and type(len) is type(print)


# Compiling.


def compiled_agrees(compiled: nn.Module, branched: nn.Module, batches: list[Tensor], gradients: bool = False) -> None:
    twin = copy.deepcopy(branched)
    for given in batches:
        actual, expected = compiled(given), twin(given)
        for task in TASKS:
            oracle.assert_outputs_close(actual[task], expected[task], task)
        if gradients:
            for outputs in (actual, expected):
                sum(oracle.loss_of(outputs[task], task) for task in TASKS).backward()
    if gradients:
        pairs = zip(branched.named_parameters(), twin.parameters(), strict=True)
        for (name, parameter), other in pairs:  # a compiled graph gives zeros where there is no gradient
            zero = torch.zeros_like(other)
            oracle.assert_close(parameter.grad, zero if other.grad is None else other.grad, name)
        for (name, buffer), other in zip(branched.named_buffers(), twin.buffers(), strict=True):
            oracle.assert_close(buffer, other, name)


def test_a_compiled_program():
    branched, example = branch(ZOO["MTAN"], "quarter")
    compiled = torch.compile(lower(branched, example).module(), backend="aot_eager")
    compiled_agrees(compiled, branched.eval(), [image(4), image(7)])


@pytest.mark.filterwarnings("ignore:Dynamo")
@pytest.mark.parametrize(
    ("name", "layer", "training"), [("PlainConv", "body.3.0", True), ("BareParameters", "pos_embed", False)]
)
def test_a_compiled_branched_model(name, layer, training):
    torch.compiler.reset()
    branched = branch_at([layer], ZOO[name].make(), image(4)).train(training)
    compiled_agrees(torch.compile(branched, backend="aot_eager"), branched, [image(4), image(7)], gradients=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo")
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler")
def test_the_default_compiler():
    torch.compiler.reset()
    branched, example = branch(ZOO["ResidualNet"])
    compiled_agrees(torch.compile(lower(branched, example).module()), branched.eval(), [image(4), image(7)])
    branched = branch_at(["blocks.1.conv2"], ZOO["ResidualNet"].make(), example)
    compiled_agrees(torch.compile(branched), branched, [image(4), image(7)], gradients=True)


@pytest.mark.skipif(torch.__version__ < "2.7", reason="its exporter wants an onnxscript of its own time")
def test_the_onnx_example(tmp_path, monkeypatch, capsys):
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    example = Path(__file__).parents[2] / "examples" / "export_onnx.py"
    monkeypatch.syspath_prepend(os.fspath(example.parent))
    runpy.run_path(os.fspath(example))["main"](os.fspath(tmp_path / "digits.onnx"))
    words = capsys.readouterr().out.strip().removesuffix(".").split()
    assert words[:9] == "Exported with a batch of 64, run on 256:".split() and float(words[-1]) < 1e-4
    assert os.listdir(tmp_path) == ["digits.onnx"]
