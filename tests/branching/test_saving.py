import copy
import json
import random

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

from recon.branching.conversion import convert
from recon.branching.plan import BranchPlan, plan_of
from recon.branching.plan_file import FORMAT, VERSION, plan_from_json, plan_to_json
from recon.branching.saving import PLAN_FILE, load, save
from recon.errors import CheckpointError, PlanError, UsageError, WriteError
from recon.support.files.weights import WEIGHTS_FILE, read_state_dict
from recon.support.network.forward import call
from tests import oracle
from tests.zoo import TASKS, ZOO, PlainConv, ResidualNet, image


def branched_from(name: str, kind: str = "all", seed: int = 1):
    entry = ZOO[name]
    torch.manual_seed(seed)
    model, inputs = entry.make(), entry.inputs(4)
    branched = convert(model, oracle.random_plan(model, kind, seed), inputs)
    oracle.perturb(branched)
    return entry, branched, inputs


@pytest.fixture
def saved(tmp_path):
    """A branched model and the folder that it was saved in."""
    _, branched, _ = branched_from("PlainConv", "quarter")
    save(branched, tmp_path)
    return branched, tmp_path


@pytest.mark.parametrize("name", ZOO)
def test_round_trip(name, tmp_path):
    entry, branched, inputs = branched_from(name)
    branched.train()
    call(branched, copy.deepcopy(inputs))  # moves the running statistics
    save(branched, tmp_path / "new" / "folder")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [PLAN_FILE, WEIGHTS_FILE]
    original = entry.make()
    before = oracle.snapshot(original)
    loaded = load(tmp_path / "new" / "folder", original)
    oracle.assert_untouched(original, before)
    assert plan_of(loaded) == plan_of(branched)
    ours, theirs = loaded.state_dict(), branched.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    frozen = {name for name, p in branched.named_parameters() if not p.requires_grad}
    assert {name for name, p in loaded.named_parameters() if not p.requires_grad} == frozen
    with torch.no_grad():
        one, other = call(loaded.eval(), copy.deepcopy(inputs)), call(branched.eval(), copy.deepcopy(inputs))
    for task in TASKS:
        for left, right in zip(oracle.tensors_in(one[task]), oracle.tensors_in(other[task]), strict=True):
            assert torch.equal(left, right)
    if not entry.draws:
        oracle.check(entry.make, loaded.train(), inputs)


@pytest.mark.parametrize("name", ZOO)
def test_a_checkpoint_from_before_the_surgery_loads(name):
    entry = ZOO[name]
    _, branched, inputs = branched_from(name)
    trained = entry.make()
    oracle.perturb(trained, seed=5)
    state = {key: value.clone() for key, value in trained.state_dict().items()}
    branched.load_state_dict(state)
    assert all(torch.equal(state[key], value) for key, value in trained.state_dict().items())
    with torch.no_grad():
        ours, theirs = call(branched.eval(), copy.deepcopy(inputs)), call(trained.eval(), copy.deepcopy(inputs))
    for task in TASKS:
        oracle.assert_outputs_close(ours[task], theirs[task], task)
    states = oracle.state_of(branched), oracle.state_of(trained)
    for task in TASKS:
        for key, theirs in oracle.keys_of(branched, task, set(states[1])).items():
            if key in state:
                assert torch.equal(states[0][theirs], state[key]), key


def test_a_module_that_records_its_version(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.heads = torchvision.models.mnasnet0_5(num_classes=5), nn.Linear(5, 2)

        def forward(self, x):
            return dict.fromkeys(TASKS, self.heads(self.body(x)))

    model = Net()
    branched = convert(model, BranchPlan.per_task(["heads"], TASKS), torch.randn(2, 3, 32, 32))
    save(branched, tmp_path)
    assert torch.equal(load(tmp_path, model).body.layers[0].weight, branched.body.layers[0].weight)
    save(model, tmp_path)
    convert(model, BranchPlan.per_task(["heads"], TASKS), torch.randn(2, 3, 32, 32), init=tmp_path)


@pytest.mark.parametrize(("folder", "model"), [(PlainConv(), "branched"), ("branched", PlainConv)])
def test_arguments_that_are_something_else(folder, model):
    with pytest.raises(UsageError, match=r"needs a folder and an unbranched model, but got .* Write recon\.load"):
        load(folder, model)
    with pytest.raises(UsageError, match=r"needs a model and a folder, but got .* Write recon\.save"):
        save(model, folder)


def test_named_arguments_go_in_any_order(tmp_path):
    model = PlainConv()
    save(folder=tmp_path, model=model)
    for loaded in (load(model=PlainConv(), folder=tmp_path), load(folder=tmp_path, model=PlainConv())):
        assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())


def test_loading_the_original_is_strict():
    _, branched, _ = branched_from("StatisticsAroundStatistics")
    state = ZOO["StatisticsAroundStatistics"].make().state_dict()
    for key in list(state):
        lacking = {name: value for name, value in state.items() if name != key}
        with pytest.raises(RuntimeError, match="Missing key"):
            branched.load_state_dict(lacking)
        with pytest.raises(RuntimeError, match="Unexpected key"):
            branched.load_state_dict({**state, f"{key}2": state[key]})


def test_a_plain_model_round_trips(tmp_path):
    model = PlainConv()
    oracle.perturb(model)
    branched = branched_from("PlainConv")[1]
    save(branched, tmp_path)
    save(model, tmp_path)  # in the same place: no plan is left over
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS_FILE]
    loaded = load(tmp_path, PlainConv())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_tied_weights_stay_tied(tmp_path):
    entry, branched, _ = branched_from("TiedWeights")
    save(branched, tmp_path)
    loaded = load(tmp_path, entry.make())
    for group in [name for name, _ in loaded.embed.branches.items()]:
        copies = [module.branches.get_submodule(group) for module in (loaded.embed, loaded.decode)]
        assert copies[0].weight is copies[1].weight


def test_untied_weights_do_not_fit_a_tied_model(tmp_path):
    untied = ZOO["TiedWeights"].make()
    untied.decode.weight = nn.Parameter(untied.embed.weight.detach() * 2)
    save(untied, tmp_path)
    assert torch.equal(load(tmp_path, copy.deepcopy(untied)).decode.weight, untied.decode.weight)
    with pytest.raises(CheckpointError, match=r"embed.weight hold the same weights in this model, but not in the file"):
        load(tmp_path, ZOO["TiedWeights"].make())


def test_channels_last_weights(tmp_path):
    _, branched, _ = branched_from("PlainConv")
    branched.to(memory_format=torch.channels_last)
    save(branched, tmp_path)
    loaded = load(tmp_path, ZOO["PlainConv"].make())
    assert all(torch.equal(value, branched.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_the_plan_is_readable(saved):
    _, folder = saved
    text = (folder / PLAN_FILE).read_text()
    document = json.loads(text)
    assert (document["format"], document["version"], document["tasks"]) == (FORMAT, VERSION, list(TASKS))
    assert set(document) == {"format", "version", "tasks", "mode", "layers", "statistics", "task_modules"}
    assert max(map(len, text.splitlines())) < 120


def test_a_plan_that_was_never_converted_round_trips():
    plan = BranchPlan.grouped({"body": [["a", "b"], "c"]}, TASKS)
    read = plan_from_json(plan_to_json(plan), "plan.json")
    assert (read.tasks, read.layers, read.statistics, read.task_modules) == (TASKS, plan.layers, {}, {})


# Files that are not what they should be.


def test_an_empty_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no weights.safetensors: no model was saved there"):
        load(tmp_path, PlainConv())
    with pytest.raises(CheckpointError, match=r"holds no weights.safetensors"):
        load(tmp_path / "nowhere", PlainConv())


@pytest.mark.parametrize("part", [0, 4, 100, 0.5, 0.99])
def test_truncated_weights(saved, part):
    _, folder = saved
    path = folder / WEIGHTS_FILE
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content)) if isinstance(part, float) else part])
    with pytest.raises(CheckpointError, match=r"weights.safetensors is damaged or truncated"):
        load(folder, ZOO["PlainConv"].make())


@pytest.mark.parametrize("kind", ["branched", "plain"])
def test_a_flipped_bit_is_found_wherever_it_is(kind, saved, tmp_path):
    _, folder = saved
    if kind == "plain":
        folder = tmp_path / "plain"
        save(ZOO["PlainConv"].make(), folder)
    path = folder / WEIGHTS_FILE
    content = path.read_bytes()
    chance = random.Random(0)
    for place in chance.sample(range(len(content)), 60):
        damaged = bytearray(content)
        damaged[place] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=WEIGHTS_FILE):
            load(folder, ZOO["PlainConv"].make())
    path.write_bytes(content)
    load(folder, ZOO["PlainConv"].make())


def test_weights_that_were_changed_are_named(tmp_path):
    save(PlainConv(), tmp_path)
    path = tmp_path / WEIGHTS_FILE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for read in (lambda: load(tmp_path, PlainConv()), lambda: read_state_dict(tmp_path)):
        with pytest.raises(CheckpointError, match=f"{path} is not what was saved: its checksum is another one"):
            read()


def test_folders_of_before_have_no_checksum(saved):
    branched, folder = saved
    _rewrite(folder, plan_to_json(plan_of(branched)))
    loaded, before = load(folder, ZOO["PlainConv"].make()).state_dict(), branched.state_dict()
    assert all(torch.equal(loaded[key], before[key]) for key in before)


def test_weights_that_are_something_else(saved):
    _, folder = saved
    (folder / WEIGHTS_FILE).write_bytes(b"PK\x03\x04" + bytes(5000))
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        load(folder, PlainConv())


def test_a_missing_plan(saved):
    _, folder = saved
    (folder / PLAN_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"plan.json cannot be read"):
        load(folder, PlainConv())


def test_a_plan_of_another_save(saved):
    _, folder = saved
    other = branched_from("PlainConv", "last", seed=2)[1]
    (folder / PLAN_FILE).write_text(plan_to_json(plan_of(other)))
    with pytest.raises(CheckpointError, match=r"is not the plan that weights.safetensors was saved with"):
        load(folder, PlainConv())


def test_another_architecture(saved):
    _, folder = saved
    with pytest.raises(CheckpointError, match=r"the plan does not fit this model. There is no layer named"):
        load(folder, ResidualNet())


def test_another_architecture_with_the_same_layers(saved):
    _, folder = saved
    wider = ZOO["PlainConv"].make()
    wider.heads.heads["a"] = nn.Linear(5, 7)
    with pytest.raises(CheckpointError, match=r"the weights do not fit this model .*size mismatch"):
        load(folder, wider)
    deeper = ZOO["PlainConv"].make()
    deeper.extra = nn.Linear(5, 7)
    with pytest.raises(CheckpointError, match=r"the weights do not fit this model .*extra.weight"):
        load(folder, deeper)
    shallower = ZOO["PlainConv"].make()
    shallower.body[3][1] = nn.BatchNorm2d(5, affine=False, track_running_stats=False)
    with pytest.raises(CheckpointError, match=r"do(es)? not fit this model"):
        load(folder, shallower)


def test_a_statistics_module_that_is_gone(saved):
    branched, folder = saved
    text = plan_to_json(plan_of(branched)).replace("body.3.1", "body.3.9").replace("body.1.1", "body.1.9")
    _rewrite(folder, text)
    with pytest.raises(CheckpointError, match=r"the plan does not fit this model. There is no (module|layer) named"):
        load(folder, ZOO["PlainConv"].make())


def _rewrite(folder, text):
    weights = load_file(folder / WEIGHTS_FILE)
    save_file(weights, folder / WEIGHTS_FILE, metadata={"plan": text})
    (folder / PLAN_FILE).write_text(text)


BROKEN_PLANS = {
    "version": (lambda d: d.update(version=99), "field 'version' is 99, but this recon reads version 1"),
    "format": (lambda d: d.update(format="zip"), "field 'format' is 'zip', not 'recon branch plan'"),
    "no tasks": (lambda d: d.pop("tasks"), "field 'tasks' is missing"),
    "no table of tasks": (lambda d: d.update(tasks=3), r"field 'tasks' has the wrong type \(int\)"),
    "same tasks": (lambda d: d.update(tasks=["a", "a"]), "field 'tasks' names 'a' twice"),
    "one task": (lambda d: d.update(tasks=["a"]), "field 'tasks' is .* 2 or more"),
    "mode": (lambda d: d.update(mode="evil"), "field 'mode': mode is 'evil'. Choose 'fan' or 'per-task'"),
    "type of the mode": (lambda d: d.update(mode=["fan"]), r"field 'mode' has the wrong type \(list\)"),
    "no layer": (lambda d: d.update(layers={}), "field 'layers': .* names no layer"),
    "list of layers": (lambda d: d.update(layers=["body.0.0"]), r"field 'layers' has the wrong type \(list\)"),
    "number of groups": (lambda d: d.update(layers={"body.0.0": 3}), "field 'layers.body.0.0' has the wrong type"),
    "no groups": (
        lambda d: d.update(layers={"body.0.0": ["a", "b", "c"]}),
        "0.0' is not a list of groups",
    ),
    "one group": (lambda d: d.update(layers={"body.0.0": [["a", "b", "c"]]}), "'layers.body.0.0' has 1 group"),
    "left out": (lambda d: d.update(layers={"body.0.0": [["a"], ["b"]]}), r"'layers.body.0.0' .* leave out \['c'\]"),
    "overlap": (lambda d: d.update(layers={"body.0.0": [["a", "b"], ["b", "c"]]}), "body.0.0' .* task 'b' twice"),
    "unknown": (lambda d: d.update(layers={"body.0.0": [["a"], ["b", "x"], ["c"]]}), "body.0.0' .* name 'x'"),
    "no statistics": (lambda d: d.pop("statistics"), "field 'statistics' is missing"),
    "list of statistics": (lambda d: d.update(statistics=[]), "field 'statistics' has the wrong type"),
    "overlapping statistics": (
        lambda d: d["statistics"].update({"body.3.1": [["a"], ["a"]]}),
        "field 'statistics.body.3.1'",
    ),
    "unknown in statistics": (
        lambda d: d["statistics"].update({"body.3.1": [["a"], ["x"]]}),
        "field 'statistics.body.3.1'",
    ),
    "number of modules": (
        lambda d: d.update(task_modules={"heads": 1}),
        "'task_modules.heads' has the wrong type",
    ),
    "unknown in modules": (lambda d: d.update(task_modules={"heads": ["x"]}), "field 'task_modules.heads' names tasks"),
    "twice in modules": (
        lambda d: d.update(task_modules={"heads": ["a", "a"]}),
        "modules.heads' names 'a' twice",
    ),
}


@pytest.mark.parametrize("broken", BROKEN_PLANS)
def test_a_plan_with_a_wrong_field(saved, broken):
    change, message = BROKEN_PLANS[broken]
    branched, folder = saved
    document = json.loads(plan_to_json(plan_of(branched)))
    change(document)
    _rewrite(folder, json.dumps(document))
    with pytest.raises(CheckpointError, match=f"{folder / PLAN_FILE}: .*{message}"):
        load(folder, ZOO["PlainConv"].make())


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "null", '{"format": 1}'])
def test_a_plan_that_is_none(text):
    with pytest.raises(CheckpointError, match="somewhere: "):
        plan_from_json(text, "somewhere")


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="Cannot make the folder"):
        save(PlainConv(), tmp_path / "file")


def test_nothing_half_written_stays(tmp_path, monkeypatch):
    model = PlainConv()
    save(model, tmp_path)
    content = (tmp_path / WEIGHTS_FILE).read_bytes()

    def fails(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fails)
    oracle.perturb(model)
    with pytest.raises(WriteError, match="No space left on device"):
        save(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS_FILE]
    assert (tmp_path / WEIGHTS_FILE).read_bytes() == content
    load(tmp_path, PlainConv())


def test_the_example_inputs_are_not_needed(saved):
    _, folder = saved
    loaded = load(folder, ZOO["PlainConv"].make())
    oracle.check(ZOO["PlainConv"].make, loaded.train(), image(4))


def test_a_wrapped_model_is_saved_as_the_one_inside(tmp_path):
    entry, branched, _ = branched_from("PlainConv", "quarter")
    for number, wrapped in enumerate((nn.DataParallel(branched), torch.compile(branched, backend="eager"))):
        save(wrapped, tmp_path / str(number))
        loaded = load(tmp_path / str(number), entry.make())
        for name, value in branched.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value)
        with pytest.raises(PlanError, match="is wrapped in"):
            plan_of(nn.DataParallel(branched))
