"""Profiling some layers only, and several as one unit."""

import copy
from itertools import combinations

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

import recon
from recon.errors import CheckpointError, UsageError
from recon.profiling.profiler import Profiler
from tests import zoo
from tests.families import transformers_model

LOSSES = dict.fromkeys(zoo.TASKS, lambda out, target: (out - target).square().mean())
BLOCKS = r"body\.\d"


def batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, *zoo.image(6).shape, generator=generator)
    return [(x, {t: torch.randn(6, 2, generator=generator) for t in zoo.TASKS}) for x in inputs]


def profiled(method="joint", memory="exact", **choice):
    """The weights after a short profile, and the map."""
    torch.manual_seed(0)
    model = zoo.PlainConv()
    cmap = recon.profile(
        model,
        batches(6),
        LOSSES,
        optimizer=torch.optim.Adam(model.parameters(), 0.01),
        epochs=1,
        method=method,
        memory=memory,
        **choice,
    )
    return model.state_dict(), cmap


CHOICES = [
    {"layers": r"body\.0\..*"},
    {"exclude": r"body\.0\.0"},
    {"layers": r"body\..*", "exclude": r".*\.0", "units": r"(?P<unit>body)\..*"},
    {"units": r"(?P<unit>body)\.\d\.0"},  # two that are apart
]


@pytest.mark.parametrize(
    ("method", "memory"), [("joint", "exact"), ("joint", "sketch"), ("pcgrad", "exact"), ("cagrad", "exact")]
)
def test_the_training_is_the_same_to_the_bit_whichever_layers_are_counted(method, memory):
    weights, _ = profiled(method, memory)
    for choice in CHOICES:
        others, _ = profiled(method, memory, **choice)
        for name, value in weights.items():
            assert torch.equal(value, others[name]), (choice, name)


@pytest.mark.parametrize("memory", ["exact", "sketch"])
def test_chosen_layers_have_the_counts_of_a_whole_profile(memory):
    _, whole = profiled(memory=memory)
    _, chosen = profiled(memory=memory, layers=r"body\..*", exclude=r"body\.1\.0")
    kept = [layer for layer in whole.layers if layer.name != "body.1.0"]
    assert [layer.name for layer in chosen.layers] == [layer.name for layer in kept]
    for mine, theirs in zip(chosen.layers, kept, strict=True):
        assert (mine.histogram == theirs.histogram).all() and (mine.conflicts == theirs.conflicts).all()


# Units. The oracle: autograd's gradients, put one after the other.


def unit_gramians(model, losses, units):
    """`{unit: (T, T)}` from a full backward pass a task."""
    names = {id(p): name for name, p in model.named_parameters()}
    rows = []
    for loss in losses.values():
        model.zero_grad()
        loss.backward(retain_graph=True)
        rows.append(
            {names[id(p)]: torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()}
        )
    model.zero_grad()
    found = {}
    for unit, prefixes in units.items():
        J = torch.stack(
            [torch.cat([row[n].flatten() for p in prefixes for n in row if n.startswith(p)]) for row in rows]
        )
        found[unit] = J @ J.T
    return found


class Recorded(Profiler):
    """Keeps the Gramians of its last step."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        count = self._counts.add

        def add(layers, tasks, gramians, *others):
            self.gramians = dict(zip([self.layers[i].name for i in layers], gramians.clone(), strict=True))
            count(layers, tasks, gramians, *others)

        self._counts.add = add


class WithHeads(nn.Module):
    def __init__(self, body, width, features):
        super().__init__()
        self.body, self.features = body, features
        self.heads = nn.ModuleDict({task: nn.Linear(width, 2) for task in zoo.TASKS})

    def forward(self, x):
        x = self.features(self.body(x))
        return {task: head(x) for task, head in self.heads.items()}


def residual_network():
    body = resnet18(weights=None)
    body.fc = nn.Identity()
    model = WithHeads(body, 512, lambda x: x)
    blocks = {f"body.layer{s}.{b}": [f"body.layer{s}.{b}."] for s in (1, 2, 3, 4) for b in (0, 1)}
    return model, torch.randn(2, 3, 32, 32), r"layer\d+\.\d+", blocks


def adapted_encoder():
    """BERT whose queries and values have adapters; the rest is frozen."""
    peft = pytest.importorskip("peft")
    options = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = transformers_model("Bert", intermediate_size=16, max_position_embeddings=8, **options)
    encoder = peft.get_peft_model(encoder, peft.LoraConfig(r=2, target_modules=["query", "value"], lora_dropout=0.0))
    for name, parameter in encoder.named_parameters():
        if "lora_B" in name:  # which begins at zero, and its partner's gradient with it
            nn.init.normal_(parameter, std=0.3)
    model = WithHeads(encoder, 16, lambda out: out.last_hidden_state.mean(1))
    modules = [
        f"body.base_model.model.encoder.layer.{i}.attention.self.{name}" for i in (0, 1) for name in ("query", "value")
    ]
    units = {module: [f"{module}.lora_A.", f"{module}.lora_B."] for module in modules}
    return model, torch.randint(20, (4, 8)), "lora_[AB]", units


def attention():
    model = zoo.Attention()
    units = {"first+attention": ["first.", "attention."]}
    return model, zoo.sequence(6), "first|attention", units


@pytest.mark.parametrize("build", [residual_network, adapted_encoder, attention], ids=lambda build: build.__name__)
def test_a_units_cosines_are_those_of_its_gradients_put_together(build):
    torch.manual_seed(0)
    model, x, units, prefixes = build()
    model = model.double()
    x = x.double() if x.is_floating_point() else x

    def losses():
        out = model(x)
        return {task: (out[task] - number).square().mean() for number, task in enumerate(zoo.TASKS)}

    expected = unit_gramians(model, losses(), prefixes)
    profiler = Recorded(model, units=units)
    profiler.backward(losses())
    assert [layer.name for layer in profiler.layers if layer.members] == list(prefixes)
    for unit, gramian in expected.items():
        torch.testing.assert_close(profiler.gramians[unit], gramian, rtol=1e-12, atol=1e-15)
    cmap = profiler.conflict_map()
    by_name = {layer.name: layer for layer in cmap.layers}
    for unit, gramian in expected.items():
        cosines = gramian / gramian.diag().outer(gramian.diag()).sqrt()
        pairs = torch.tensor([cosines[i, j] for i, j in combinations(range(len(cosines)), 2)])
        assert by_name[unit].histogram.sum() == len(pairs)
        assert cmap.scores()[unit] == int((pairs < -0.1).sum())
        assert all(
            name.startswith(tuple(prefixes[unit])) or f"{name}." in prefixes[unit] for name in by_name[unit].members
        )
        assert by_name[unit].size == sum(
            p.numel() for n, p in model.named_parameters() if n.startswith(tuple(prefixes[unit]))
        )


def test_a_sketched_unit_is_the_whole_one_to_the_error_of_sketches():
    torch.manual_seed(0)
    model, x, units, prefixes = residual_network()

    def gramians(memory):
        profiler = Recorded(copy.deepcopy(model).eval(), units=units, memory=memory)
        out = profiler.model(x)
        profiler.backward({task: (out[task] - number).square().mean() for number, task in enumerate(zoo.TASKS)})
        return profiler.gramians

    exact, sketched = gramians("exact"), gramians("sketch")
    assert list(exact) == list(sketched)
    for unit in prefixes:
        cosines = [g / g.diag().outer(g.diag()).sqrt() for g in (exact[unit], sketched[unit])]
        torch.testing.assert_close(*cosines, rtol=0, atol=6 / 2039**0.5)  # six standard deviations


def test_a_task_that_misses_a_part_of_a_unit_counts_as_zero_there():
    shared, mine = nn.Parameter(torch.ones(1, dtype=torch.float64)), nn.Parameter(torch.ones(1, dtype=torch.float64))
    model = nn.ModuleDict({"block": nn.ParameterDict({"shared": shared, "mine": mine})})
    profiler = Recorded(model, units="block")
    profiler.backward({"a": shared.sum(), "b": (-3 * shared - 4 * mine).sum()})  # (1, 0) and (-3, -4): cosine -0.6
    assert profiler.gramians["block"].tolist() == [[1, -3], [-3, 25]]


@pytest.mark.parametrize("memory", ["exact", "sketch"])  # which is exact in layers as small as these
def test_the_floor_of_a_unit_is_that_of_its_gradients_put_together(memory):
    torch.manual_seed(0)
    model = zoo.PlainConv().double().eval()
    profiler = Profiler(model, units=BLOCKS, exclude=r"body\.3.*", memory=memory)
    units, steps = {"body.0": ["body.0."], "body.1": ["body.1."]}, 12
    names = [name for name, _ in model.named_parameters()]
    expected = {unit: dict.fromkeys(zoo.TASKS, 0) for unit in units}
    for _ in range(steps):
        both = []
        for _ in ("first", "second"):
            out = model(zoo.image(2).double())
            both.append({task: (out[task] * torch.randn(2, 2, dtype=torch.float64)).sum() for task in zoo.TASKS})
        for task in zoo.TASKS:
            gradients = [
                dict(
                    zip(
                        names,
                        torch.autograd.grad(losses[task], list(model.parameters()), None, True, allow_unused=True),
                        strict=True,
                    )
                )
                for losses in both
            ]
            for unit, (prefix,) in units.items():
                one, two = (torch.cat([g[n].flatten() for n in names if n.startswith(prefix)]) for g in gradients)
                expected[unit][task] += int(one @ two / (one.norm() * two.norm()) < -0.1)
        profiler.floor(both[1])
        profiler.backward(both[0])
    floor = profiler.conflict_map().floor()
    for unit, counts in expected.items():
        assert floor[unit] == {task: count / steps for task, count in counts.items()}
    assert list(floor) == ["body.0", "body.1"] and sum(sum(counts.values()) for counts in expected.values())


# What is noted, saved and refused.


def test_the_map_says_how_its_layers_were_chosen():
    _, cmap = profiled(layers=[r"body\..*"], units=BLOCKS)
    assert cmap.made_by["layers"] == [r"body\..*"] and cmap.made_by["units"] == BLOCKS and "exclude" not in cmap.made_by
    assert {layer.name: layer.members for layer in cmap.layers} == {
        "body.0": ("body.0.0", "body.0.1"),
        "body.1": ("body.1.0", "body.1.1"),
        "body.3": ("body.3.0", "body.3.1"),
    }


def test_state_of_other_layers_is_refused():
    model = zoo.PlainConv()
    whole = r"(?P<unit>body)\..*"
    state = Profiler(model, units=whole).state_dict()
    Profiler(model, units=whole).load_state_dict(state)
    with pytest.raises(CheckpointError, match="other layers"):
        Profiler(model).load_state_dict(state)
    with pytest.raises(CheckpointError, match="other units"):
        Profiler(model, units=whole, exclude=r"body\.0\.0").load_state_dict(state)


def test_a_resumed_profile_needs_the_same_choice(tmp_path):
    def profile(**options):
        model = zoo.PlainConv()
        adam = torch.optim.Adam(model.parameters())
        return recon.profile(model, batches(2), LOSSES, optimizer=adam, checkpoint=path, **options)

    path = tmp_path / "map.checkpoint"
    profile(epochs=1, units=[BLOCKS])
    with pytest.raises(CheckpointError, match="units"):
        profile(epochs=2, resume=True)
    assert profile(epochs=2, units=[BLOCKS], resume=True).steps == 4


def test_bad_choices_are_refused_before_anything_is_trained():
    model = zoo.PlainConv()
    before = copy.deepcopy(model.state_dict())
    adam = torch.optim.Adam(model.parameters())
    for choice in ({"layers": "bodi"}, {"units": "trunk"}, {"exclude": ".*"}, {"units": r"body\.0\.0"}):
        with pytest.raises(UsageError):
            recon.profile(model, batches(2), LOSSES, optimizer=adam, epochs=1, **choice)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(UsageError, match="the choice of layers has 2 layers"):
        Profiler(model, layers=r"body\.0\..*", top_k=3)


def test_chosen_layers_that_no_two_tasks_share():
    with pytest.raises(UsageError, match="None of the 3 layers that were chosen"):
        profiled(layers=r"heads\..*")
