import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from recon.branching.conversion import convert
from recon.branching.plan import BranchPlan
from recon.branching.saving import save
from recon.errors import CheckpointError, UsageError
from tests import oracle
from tests.zoo import TASKS, ZOO, PlainConv, image, vector

PLAN = BranchPlan.grouped({"body.0.0": [["a", "b"], "c"], "body.1.0": ["a", "b", "c"]}, TASKS)


INPUTS = image(4)


def make() -> nn.Module:
    return PlainConv().double()


MODEL = make()


def branch(model: nn.Module, **options) -> nn.Module:
    return convert(model, PLAN, INPUTS, **options)


def copies(branched: nn.Module) -> dict[str, list[torch.Tensor]]:
    """The weights of each branched layer's copies."""
    state = branched.state_dict()
    return {
        layer: [value for key, value in state.items() if key.startswith(f"{layer}.branches.") and "weight" in key]
        for layer in PLAN.layers
    }


def assert_weights_of(branched: nn.Module, state: dict[str, torch.Tensor]) -> None:
    for task in TASKS:
        plain = oracle.plain_model(make, branched, task).state_dict()
        assert [key for key, value in state.items() if not torch.equal(plain[key], value)] == [], task


# Fresh weights.


@pytest.mark.parametrize("init", ["scratch", make], ids=["scratch", "factory"])
def test_fresh_weights_with_equal_copies(init):
    model = make()
    before = oracle.snapshot(model)["state"]
    torch.manual_seed(3)
    branched = branch(model, init=init)
    assert all(torch.equal(value, model.state_dict()[name]) for name, (_, value) in before.items())
    assert all(torch.equal(first, other) for first, *others in copies(branched).values() for other in others)
    own = model.state_dict()
    for name, value in branched.state_dict().items():
        if name.endswith("weight") and value.dim() > 1 and name in own:
            assert not torch.equal(value, own[name]), name
    torch.manual_seed(3)
    again = branch(model, init=init)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in branched.state_dict().items())


@pytest.mark.parametrize("init", ["scratch", make], ids=["scratch", "factory"])
def test_fresh_weights_with_independent_copies(init):
    torch.manual_seed(3)
    branched = branch(MODEL, init=init, copies="independent")
    for weights in copies(branched).values():
        assert all(not torch.equal(one, other) for i, one in enumerate(weights) for other in weights[:i])
        assert all(0.2 < one.std() / weights[0].std() < 5 for one in weights)
    torch.manual_seed(3)
    equal = branch(MODEL, init=init).state_dict()
    for key, value in branched.state_dict().items():  # the first copy and what is shared are the first draw's
        if ".branches." not in key or ".branches.a" in key:
            assert torch.equal(value, equal[key]), key


def test_a_factory_gives_its_own_weights():
    torch.manual_seed(3)
    branched = branch(MODEL, init=make)
    torch.manual_seed(3)
    assert_weights_of(branched, make().state_dict())


@pytest.mark.parametrize("name", ["BareParameters", "TiedWeights", "TwoNames", "ParameterLists", "Recurrent"])
def test_independent_copies_of_awkward_layers(name):
    entry = ZOO[name]
    model, inputs = entry.make(), entry.inputs(4)
    plan = oracle.random_plan(model, "all", 0)
    drawn = []

    def draw():
        fresh = entry.make()
        oracle.perturb(fresh, seed=len(drawn))
        drawn.append(fresh.state_dict())
        return fresh

    branched = convert(model, plan, inputs, init=draw, copies="independent")
    for number, task in enumerate(TASKS):
        plain = oracle.plain_model(entry.make, branched, task)
        for key, parameter in plain.named_parameters():
            assert torch.equal(parameter, drawn[number][key]), key


def test_a_tied_layer_that_is_not_branched_keeps_its_weights():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.decode = nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
            self.decode.weight = self.embed.weight

        def forward(self, x):
            return dict.fromkeys(TASKS, self.decode(self.embed(x)))

    model = Net().double()
    plan = BranchPlan.per_task(["decode"], TASKS)  # its bias: the weight is the first layer's
    torch.manual_seed(3)
    branched = convert(model, plan, vector(4), init="scratch", copies="independent")
    torch.manual_seed(3)
    assert torch.equal(branched.embed.weight, convert(model, plan, vector(4), init="scratch").embed.weight)


def test_what_draws_no_weights_is_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.body = nn.Parameter(torch.ones(6)), weight_norm(nn.Linear(6, 4))

        def forward(self, x):
            return dict.fromkeys(TASKS, self.body(x * self.scale))

    with pytest.raises(UsageError, match=r"nothing draws scale, .*weight.*original0.* init=make_model"):
        convert(Net().double(), BranchPlan.per_task(["body"], TASKS), vector(4), init="scratch")


@pytest.mark.parametrize(("init", "chosen"), [("copy", "independent"), ({}, "independent"), ("scratch", "different")])
def test_copies_that_cannot_be(init, chosen):
    init = make().state_dict() if init == {} else init
    with pytest.raises(UsageError, match=rf"copies is '{chosen}', with init '\w+'. Choose 'equal', or 'independent'"):
        branch(MODEL, init=init, copies=chosen)


# Checkpoints of the unbranched model.


@pytest.fixture
def trained() -> nn.Module:
    model = make()
    oracle.perturb(model, seed=7)
    return model


def as_state_dict(model, folder):
    return model.state_dict()


def as_torch_file(model, folder):
    torch.save(model.state_dict(), folder / "model.pt")
    return str(folder / "model.pt")


def as_training_checkpoint(model, folder):
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, folder / "last.ckpt")
    return folder / "last.ckpt"


def as_saved_from_ddp(model, folder):
    torch.save({f"module.{key}": value for key, value in model.state_dict().items()}, folder / "ddp.pt")
    return folder / "ddp.pt"


def as_safetensors(model, folder):
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder / "model.safetensors"


def as_recon_folder(model, folder):
    save(model, folder)
    return folder


@pytest.mark.parametrize(
    "form",
    [as_state_dict, as_torch_file, as_training_checkpoint, as_saved_from_ddp, as_safetensors, as_recon_folder],
    ids=lambda form: form.__name__,
)
def test_a_checkpoint(form, trained, tmp_path):
    model = make()
    before = oracle.snapshot(model)
    branched = branch(model, init=form(trained, tmp_path))
    oracle.assert_untouched(model, before)
    assert_weights_of(branched, trained.state_dict())


def test_tied_weights_from_a_folder(tmp_path):
    entry = ZOO["TwoNames"]
    trained = entry.make()
    oracle.perturb(trained)
    save(trained, tmp_path)
    model, inputs = entry.make(), entry.inputs(4)
    branched = convert(model, oracle.random_plan(model, "all", 0), inputs, init=tmp_path)
    plain = oracle.plain_model(entry.make, branched, "b")
    assert all(torch.equal(plain.state_dict()[key], value) for key, value in trained.state_dict().items())


def missing(folder, trained):
    return folder / "nothing.pt"


def truncated(folder, trained):
    path = folder / "model.pt"
    torch.save(trained.state_dict(), path)
    path.write_bytes(path.read_bytes()[:1000])
    return path


def truncated_safetensors(folder, trained):
    path = as_safetensors(trained, folder)
    path.write_bytes(path.read_bytes()[:1000])
    return path


def text(folder, trained):
    (folder / "model.pt").write_text("weights")
    return folder / "model.pt"


def a_whole_model(folder, trained):
    torch.save(trained, folder / "model.pt")
    return folder / "model.pt"


def a_list(folder, trained):
    torch.save([1, 2], folder / "model.pt")
    return folder / "model.pt"


def a_dict(folder, trained):
    torch.save({"epoch": 3, "weights": trained.state_dict()}, folder / "model.pt")
    return folder / "model.pt"


def of_a_part(folder, trained):
    return as_torch_file(trained.body, folder)


def branched_folder(folder, trained):
    save(branch(trained), folder)
    return folder


def another_architecture(folder, trained):
    return as_torch_file(ZOO["ResidualNet"].make(), folder)


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        (missing, "There is no file .*nothing.pt. Pass a file of a state dict"),
        (truncated, "model.pt cannot be read as a state dict"),
        (truncated_safetensors, "model.safetensors is damaged or truncated"),
        (text, "model.pt cannot be read as a state dict"),
        (a_whole_model, "model.pt cannot be read as a state dict"),
        (a_list, "model.pt holds list, not a state dict"),
        (a_dict, "model.pt holds a dict of 'epoch', 'weights', not a state dict"),
        (of_a_part, r"They are those of its part 'body': load them there before you convert \(model\.body\)"),
        (branched_folder, "holds a branched model, but a checkpoint of the unbranched model is needed"),
        (
            another_architecture,
            r"model.pt: the weights do not fit this model\. Entries: 18 missing \(body\.0\.0\.weight, .* 32 not in the",
        ),
    ],
    ids=lambda part: getattr(part, "__name__", ""),
)
def test_a_checkpoint_that_cannot_be_used(checkpoint, message, trained, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        branch(MODEL, init=checkpoint(tmp_path, trained))


def test_something_else():
    with pytest.raises(UsageError, match=r"init is a model \(PlainConv\)\. Pass its weights"):
        branch(MODEL, init=make())
    with pytest.raises(UsageError, match=r"init is int\. Choose 'copy', 'scratch', a function"):
        branch(MODEL, init=3)
    with pytest.raises(UsageError, match=r"init gives Tensor, not a model\."):
        branch(MODEL, init=lambda: torch.ones(3))
