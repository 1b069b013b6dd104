"""Other networks for a problem: which fit, and how the verbs pass them on."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from recon import models
from recon.errors import UnknownNameError, UsageError
from recon.experiments.backbones import with_backbone
from recon.experiments.run import Run
from recon.maps.conflict_map import ConflictMap
from recon.problems.problem import Problem, Task
from recon_cli.options.problem import backbone_name

PROBLEM = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from recon.models import SmallResNet
from recon.problems.problem import Problem, Task
from recon.problems.loading import TensorBatches, in_order, shuffled


class Flat(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.shared = nn.Linear(192, width)
        self.heads = nn.ModuleDict({"left": nn.Linear(width, 2), "right": nn.Linear(width, 4)})

    def forward(self, x):
        x = self.shared(x.flatten(1)).relu()
        return {task: head(x) for task, head in self.heads.items()}


def wide():
    return Flat(12)


def make_loaders(seed):
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    data = TensorBatches(x, {"left": (x[:, 0].mean((1, 2)) > 0).long(), "right": x.mean((1, 2, 3)).gt(0).long()})
    return shuffled(data, 8, seed), in_order(data, 16)


def problem():
    tasks = [Task("left", cross_entropy), Task("right", cross_entropy)]
    return Problem("pictures", tasks, Flat, make_loaders, epochs=1)
"""


class Own(nn.Module):
    """A problem's own network: gives whatever shape its tasks have."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes = shapes

    def forward(self, x):
        return {task: torch.rand(len(x), *shape) for task, shape in self.shapes.items()}


def problem(inputs, **shapes):
    """One with inputs and, by task, outputs of these shapes, but without data."""

    def no_data(seed):
        raise AssertionError("the data were read")

    return Problem(
        "made up",
        [Task(task, nn.functional.mse_loss) for task in shapes],
        make_model=lambda: Own(shapes),
        make_loaders=no_data,
        example_inputs=lambda: torch.rand(4, *inputs),
    )


LOGITS = problem((2, 32, 32), a=(3,), b=(5,))
MAPS = problem((2, 32, 48), a=(1, 32, 48), b=(5, 32, 48))
ROWS = problem((7,), a=(1,), b=(2,))
BY_KIND = {"images": LOGITS, "dense": MAPS, "vectors": ROWS}


# What fits.


def test_the_kind_of_every_backbone_is_known():
    assert set(models.__all__) <= set(models.KINDS) and set(models.KINDS.values()) == set(BY_KIND)


@pytest.mark.parametrize("name", models.__all__)
def test_a_backbone_fits_problems_of_its_kind(name):
    fitting = BY_KIND[models.KINDS[name]]
    before = torch.get_rng_state()
    changed = with_backbone(fitting, name)
    assert torch.equal(torch.get_rng_state(), before)
    assert changed.backbone == name and replace(changed, backbone="", make_model=fitting.make_model) == fitting
    inputs = fitting.example_inputs()
    outputs = changed.make_model().eval()(inputs)
    assert {task: output.shape for task, output in outputs.items()} == {
        task: output.shape for task, output in fitting.make_model()(inputs).items()
    }


def test_no_name_leaves_the_problem_as_it_is():
    assert with_backbone(LOGITS, "") is LOGITS


class Rows(nn.Module):
    """A backbone for vectors."""

    def __init__(self, tasks, in_features):
        super().__init__()
        self.heads = nn.ModuleDict({task: nn.Linear(in_features, outputs) for task, outputs in tasks.items()})

    def forward(self, x):
        return {task: head(x) for task, head in self.heads.items()}


class Halving(nn.Module):
    """Gives one task maps of half the size, the other whole ones."""

    def __init__(self, tasks, in_channels):
        super().__init__()
        self.tasks = tasks

    def forward(self, x):
        maps = {task: x.new_zeros(len(x), channels, *x.shape[2:]) for task, channels in self.tasks.items()}
        return {**maps, "b": maps["b"][..., ::2, ::2]}


class Breaking(Halving):
    """Cannot run."""

    def forward(self, x):
        raise RuntimeError("sizes of tensors must match")


@pytest.fixture
def unknown(monkeypatch):
    """Backbones of recon's whose kind is not known: they are tried."""
    for backbone in (Rows, Halving, Breaking):
        monkeypatch.setattr(models, backbone.__name__, backbone, raising=False)
    monkeypatch.setattr(models, "__all__", [*models.__all__, "Rows", "Halving", "Breaking"])


def test_a_backbone_of_unknown_kind_is_tried(unknown):
    model = with_backbone(ROWS, "Rows").make_model()
    assert {task: head.weight.shape for task, head in model.heads.items()} == {"a": (1, 7), "b": (2, 7)}


MISFITS = {
    "a dense one for logits": (LOGITS, "fcn_resnet50", "gives maps (N, channels, H, W), but 'made up' has inputs"),
    "what was expected": (LOGITS, "fcn_resnet50", "(2, 3) for task 'a', (2, 5) for task 'b'"),
    "what fits logits": (LOGITS, "fcn_resnet50", "Choose ResNet18, SmallResNet, ViT, vit_b_16"),
    "one for logits for maps": (MAPS, "ResNet18", "gives logits (N, classes), but 'made up' has inputs (2, 2, 32, 48)"),
    "what fits maps": (MAPS, "ResNet18", "deeplabv3_resnet50, fcn_resnet50"),
    "images for vectors": (ROWS, "ResNet18", "takes images (N, C, H, W)"),
    "a way of one's own": (ROWS, "ResNet18", "path/to/file.py:function"),
    "logits and maps": (problem((3, 8, 8), a=(2,), b=(1, 8, 8)), "ResNet18", "for task 'b'. Choose your own"),
    "maps of another size": (problem((3, 8, 8), a=(1, 4, 4), b=(1, 4, 4)), "fcn_resnet50", "Choose your own function"),
    "numbers": (problem((3, 8, 8), a=(), b=()), "ResNet18", "needs (2,) for task 'a'"),
    "sequences": (problem((3, 8), a=(2,), b=(2,)), "SmallResNet", "has inputs (2, 3, 8)"),
    "images that do not suit": (problem((1, 30, 30), a=(2,), b=(2,)), "ViT", "Images of 30x30 pixels cannot be cut"),
    "other sizes": (MAPS, "Halving", "The backbone Halving gives (2, 5, 16, 24) for task 'b', but"),
    "not those that fit": (MAPS, "Halving", "(2, 1, 32, 48) for task 'a', (2, 5, 32, 48) for task 'b'. Choose"),
    "one that cannot run": (MAPS, "Breaking", "RuntimeError: sizes of tensors must match."),
    "an unknown one": (problem((3,), a=(2, 2), b=(2,)), "Rows", "takes images or vectors"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_a_backbone_that_does_not_fit(unknown, case):
    misfit, name, words = MISFITS[case]
    with pytest.raises(UsageError) as raised:
        with_backbone(misfit, name)
    assert words in str(raised.value)


def test_what_does_not_fit_is_not_recommended(unknown):
    with pytest.raises(UsageError) as raised:
        with_backbone(problem((1, 30, 30), a=(2,), b=(2,)), "ViT")
    assert "Choose ResNet18, SmallResNet, vit_b_16, or" in str(raised.value)


def test_names_of_backbones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert backbone_name("ResNet18") == "ResNet18" and backbone_name("package.nets:make") == "package.nets:make"
    assert backbone_name("net.py:make") == f"{tmp_path / 'net.py'}:make"
    (tmp_path / "folder").mkdir()
    for text in ("ResNet", "folder", "net.py"):
        with pytest.raises(UnknownNameError, match="no backbone named"):
            backbone_name(text)


# On the command line.


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbones")
    (folder / "own.py").write_text(PROBLEM)
    return folder


def weights(folder):
    return load_file(folder / "weights.safetensors")


def test_a_backbone_from_the_profile_to_the_comparison(files, ask, command):
    code, out, _ = command("profile own.py:problem --backbone SmallResNet --epochs 1 --out map.json")
    assert code == 0 and "recon convert own.py:problem --backbone SmallResNet --map map.json" in out
    assert ConflictMap.load(files / "map.json").made_by["backbone"] == "SmallResNet"
    choice = "own.py:problem --backbone SmallResNet --map map.json --top-k 2"
    code, out, _ = command(f"plan {choice}")
    assert code == 0 and "recon convert own.py:problem --backbone SmallResNet --map map.json" in out
    ask(f"convert {choice} --out branched")
    assert Run.load(files / "branched").backbone == "SmallResNet"
    assert set(ask("evaluate own.py:problem --model branched")["results"]) == {"left", "right"}
    # From here on, the folder tells.
    run = ask("train own.py:problem --model branched --out run")
    assert run["backbone"] == "SmallResNet" and len(run["branched_layers"]) == 2
    for options in ("", "--backbone SmallResNet"):
        assert ask(f"evaluate own.py:problem --model run {options}")["results"] == run["results"]
        assert ask(f"evaluate own.py:problem --model run/best {options}")["results"] == run["results"]
    again = ask("train own.py:problem --model branched --backbone SmallResNet --out again")
    assert again["backbone"] == "SmallResNet" and again["results"] == run["results"]
    ask("train own.py:problem --backbone SmallResNet --single-task --out single")
    assert set(ask("evaluate own.py:problem --model single")["results"]) == {"left", "right"}
    rows = ask("compare run again single")["rows"]
    assert [row["backbone"] for row in rows] == 3 * ["SmallResNet"]


def test_model_and_backbone_name_the_same(files, ask):
    for option in ("--model", "--backbone"):
        ask(f"train own.py:problem {option} SmallResNet --out by{option}")
    by_model, by_backbone = (files / f"by{option}" for option in ("--model", "--backbone"))
    assert Run.load(by_model).settings == Run.load(by_backbone).settings
    assert all(torch.equal(value, weights(by_backbone)[key]) for key, value in weights(by_model).items())


def test_a_network_of_one_s_own_is_named_again(files, ask, refused):
    ask("profile own.py:problem --backbone own.py:wide --epochs 1 --out wide.json")
    assert ConflictMap.load(files / "wide.json").made_by["backbone"] == "Flat"
    ask("convert own.py:problem --backbone own.py:wide --layers shared --out wide")
    again = f"name it yourself: --backbone {files / 'own.py'}:wide"
    refused("train own.py:problem --model wide --out wider", again)
    refused("evaluate own.py:problem --model wide", again)
    run = ask("train own.py:problem --model wide --backbone own.py:wide --out wider")
    assert weights(files / "wider")["shared.branches.left.weight"].shape == (12, 192)
    assert run["backbone"] == f"{files / 'own.py'}:wide"
    (files / "moved.py").write_text((files / "own.py").read_text())
    for name in ("own.py", "moved.py"):  # a file that came with the folder lies elsewhere than it did
        found = ask(f"evaluate own.py:problem --model wider --backbone {name}:wide")
        assert found["results"] == run["results"]
    ask("train own.py:problem --backbone own.py:wide --single-task --out own-single")
    refused("evaluate own.py:problem --model own-single", again)
    assert set(ask("evaluate own.py:problem --model own-single --backbone own.py:wide")["results"]) == {"left", "right"}


def test_a_network_of_one_s_own_that_does_not_fit(files, refused):
    (files / "nets.py").write_text(
        "from recon.models import SmallResNet\n"
        "def wide(): return SmallResNet({'top_left': 10, 'bottom_right': 12})\n"
        "def of(width): return SmallResNet({'top_left': width, 'bottom_right': width})\n"
    )
    words = "gives (8, 12) for task 'bottom_right', but 'digits' has inputs (8, 1, 12, 12) and needs (8, 10)"
    for verb in ("train digits --out new", "plan digits --layers stem.conv", "profile digits --out new.json"):
        refused(f"{verb} --backbone nets.py:wide", words)
    refused("plan digits --layers stem.conv --backbone nets.py:of", "nets.py:of needs width.")


@pytest.fixture
def folders(files, ask):
    if not (files / "small").exists():  # once is enough
        ask("convert own.py:problem --layers shared --out plain")
        ask("convert own.py:problem --backbone SmallResNet --layers stem.conv --out small")


WRONG = {
    "unknown": ("plan own.py:problem --backbone SmalResNet --layers stem.conv", "'SmallResNet'"),
    "a folder": ("plan own.py:problem --backbone small --layers stem.conv", "no backbone named 'small'"),
    "no such function": ("plan own.py:problem --backbone own.py:wid --layers shared", "'wide'"),
    "misfit": ("profile own.py:problem --backbone fcn_resnet50 --out new.json", "Choose ResNet18"),
    "twice": ("train own.py:problem --model ViT --backbone ViT --out new", "does not go with --backbone ViT"),
    "evaluate another": ("evaluate own.py:problem --model small --backbone ViT", "small, whose model is SmallResNet"),
    "train another": ("train own.py:problem --model small --backbone ViT --out new", "Leave the backbone out"),
    "train recon's for one's own": (
        "train own.py:problem --model small --backbone own.py:wide --out new", "fit small, whose model is Small"
    ),
    "evaluate none": ("evaluate own.py:problem --model plain --backbone ViT", "whose model is the problem's own"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_backbones_are_refused(refused, folders, case):
    refused(*WRONG[case])


def test_a_finished_map_of_another_backbone_is_not_taken_for_the_result(command):
    line = "profile own.py:problem --epochs 1 --out kept.json"
    assert command(line)[0] == 0 and command(f"{line} --resume")[0] == 0
    code, _, err = command(f"{line} --backbone SmallResNet --resume")
    assert code == 0 and "the map in kept.json will be replaced" in err and "starting from the beginning" in err
    assert ConflictMap.load("kept.json").made_by["backbone"] == "SmallResNet"
