"""The gradient methods against their papers' formulas and optimality conditions."""

from __future__ import annotations

import io
import json
import math
from dataclasses import FrozenInstanceError, asdict

import pytest
import torch
from torch import Tensor

from recon import methods
from recon.errors import GradientError, UnknownNameError, UsageError
from recon.methods import registry
from tests.task_gradients import every_count, every_hard_kind, every_kind, gradients

WEIGHTINGS = ["joint", "uw", "dwa", "gradnorm", "rlw", "gls", "imtl-l", "stch", "famo"]
AGGREGATORS = [
    *["pcgrad", "cagrad", "mgda", "gradvac", "graddrop", "imtl-g", "config", "nash-mtl", "fairgrad", "aligned-mtl"],
    *["upgrad", "dualproj", "sdmgrad", "modo", "excessmtl", "pe-ltr"],
]
ALL = [*WEIGHTINGS, *AGGREGATORS, "rotograd"]
GRAMIAN = [name for name in AGGREGATORS if name not in ("graddrop", "excessmtl")]
REMEMBERING = ["gradvac", "sdmgrad", "modo", "excessmtl"]
TASKS = ("seg", "depth", "normal")


def make(name: str, tasks: int | None = None) -> methods.Method:
    method = methods.get(name)
    if tasks:
        method.setup([f"task{i}" for i in range(tasks)])
    return method


def make_for(name: str, tasks: tuple[str, ...] = TASKS) -> methods.Method:
    method = methods.get(name)
    method.setup(tasks)
    return method


def apply(method: methods.Aggregator, J: Tensor, tasks: tuple[str, ...]) -> Tensor:
    """The update of a step in which these tasks took part."""
    if isinstance(method, methods.GramianAggregator):
        return method.weights(J @ J.T, tasks=tasks) @ J
    return method.combine(J, tasks)[0]


def saved(method: methods.Method) -> dict:
    """The state_dict as it comes back from a file."""
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- registry ---------------------------------------------------------------------------------------------


def test_names_are_in_registry_order():
    assert methods.names() == ALL


@pytest.mark.parametrize("name", ALL)
def test_entry_describes_the_method_and_cannot_be_changed(name):
    entry = methods.entry(name)
    assert entry.name == name == methods.get(name).name
    families = {
        "weighting": methods.Weighting,
        "aggregator": methods.Aggregator,
        "feature method": methods.FeatureMethod,
    }
    assert isinstance(methods.get(name, **entry.options), families[entry.family])
    assert (entry.family == "weighting") == (name in WEIGHTINGS)
    assert isinstance(methods.get(name), methods.GramianAggregator) == (name in GRAMIAN)
    assert all([entry.title, entry.paper, entry.scale])
    assert json.loads(json.dumps(asdict(entry)))["options"] == entry.options
    with pytest.raises(FrozenInstanceError):
        entry.name = "other"


def test_entry_lists_options_with_their_defaults():
    assert methods.entry("cagrad").options == {"c": 0.4, "rescale": False}
    assert methods.entry("pcgrad").options == {"seed": 0}
    assert methods.entry("dwa").options == {"temperature": 2.0}
    assert methods.entry("upgrad").options == methods.entry("gls").options == {}


@pytest.mark.parametrize("find", [methods.get, methods.entry, methods.parse])
def test_unknown_method_gets_the_nearest_name(find):
    with pytest.raises(UnknownNameError, match="Did you mean 'cagrad'"):
        find("cagard")


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("cagrad", {"seed": 1}, "no option 'seed'. Its options: c=0.4, rescale=False"),
        ("gls", {"c": 1}, "no option 'c'. Its options: none"),
        ("cagrad", {"c": "big"}, "'c' of method 'cagrad' must be of type float, but got 'big'"),
        ("cagrad", {"c": True}, "must be of type float, but got True"),
        ("cagrad", {"rescale": 1}, "must be of type bool, but got 1"),
        ("pcgrad", {"seed": 0.5}, "must be of type int, but got 0.5"),
        ("pcgrad", {"seed": True}, "must be of type int, but got True"),
        ("cagrad", {"c": -0.1}, "at least 0, but got -0.1"),
        ("cagrad", {"c": math.nan}, "at least 0, but got nan"),
        ("dwa", {"temperature": 0}, "must be positive and finite, but got 0"),
        ("gradnorm", {"alpha": -1}, "at least 0, but got -1"),
        ("gradnorm", {"lr": 0}, "must be positive and finite, but got 0"),
        ("gradnorm", {"initial": "1/-1"}, "initial losses must be finite numbers of at least 0, .*'-1'"),
        ("stch", {"mu": 0}, "must be positive and finite, but got 0"),
        ("stch", {"reference": [0, math.inf]}, "references must be finite numbers, .* one is inf"),
        ("famo", {"lr": math.nan}, "must be positive and finite, but got nan"),
        ("famo", {"weight_decay": -1}, "at least 0, but got -1"),
        ("mgda", {"normalize": "max"}, r"must be one of none, l2, loss, loss\+, but got 'max'"),
        ("graddrop", {"leak": 1.5}, "from 0 to 1, but got 1.5"),
        ("gradvac", {"beta": -0.5}, "from 0 to 1, but got -0.5"),
        ("fairgrad", {"alpha": 0}, "from 0.1 to 10, but got 0"),
        ("aligned-mtl", {"size": "max"}, "one of min, median, rmse, but got 'max'"),
        ("sdmgrad", {"lam": -1}, "at least 0, but got -1"),
        ("sdmgrad", {"lr": 0}, "positive and finite, but got 0"),
        ("sdmgrad", {"iterations": 0}, "at least 1, but got 0"),
        ("modo", {"gamma": math.inf}, "positive and finite, but got inf"),
        ("modo", {"rho": math.nan}, "at least 0, but got nan"),
        ("excessmtl", {"lr": 0}, "positive and finite, but got 0"),
        ("excessmtl", {"warmup": 0}, "at least 1 step, but got 0"),
        ("pe-ltr", {"bound": -0.1}, "at least 0 and add up to less than 1, but got -0.1"),
        ("pe-ltr", {"bounds": "0.1/x"}, "must be numbers, such as '0.1/0.2/0.1', but got '0.1/x'"),
        ("pe-ltr", {"bounds": (0.5, 0.5)}, "add up to less than 1, but got 0.5, 0.5"),
    ],
)
def test_wrong_options_are_refused(name, options, said):
    with pytest.raises(UsageError, match=said):
        methods.get(name, **options)


def test_parse_reads_options():
    method = methods.parse(" cagrad : c=1, rescale=True ")
    assert isinstance(method, methods.CAGrad)
    assert (method.c, method.rescale) == (1.0, True)
    assert methods.parse("dwa:temperature=1e-1").temperature == 0.1
    assert methods.parse("mgda").name == "mgda"
    assert methods.parse("gradnorm:layer=3,alpha=1").layer == "3"  # of an nn.Sequential


@pytest.mark.parametrize(
    "text", ["cagrad:", "cagrad:c", "cagrad:c=", "cagrad:=1", "cagrad:c=1,", "cagrad:c=1,c=2", "cagrad:c=x"]
)
def test_parse_refuses_malformed_text(text):
    with pytest.raises(UsageError):
        methods.parse(text)


@pytest.fixture
def scratch_registry(monkeypatch):
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))


def test_user_registers_a_method(scratch_registry):
    @methods.register("first-task", title="First task", paper="none", scale="One task's gradient.")
    class FirstTask(methods.GramianAggregator):
        def __init__(self, label: str = "x", factor: float = 1.0) -> None:
            super().__init__()
            self.label, self.factor = label, factor

        def weights(self, gramian, tasks=None):
            return self.factor * torch.eye(len(gramian)).to(gramian)[0]

    assert methods.names()[-1] == "first-task"
    J = gradients("random", 3)
    torch.testing.assert_close(methods.parse("first-task:factor=2,label=y")(J), 2 * J[0])


def test_register_refuses_what_cannot_work(scratch_registry):
    about = {"title": "", "paper": "", "scale": ""}
    with pytest.raises(UsageError, match="already a method named 'mgda'"):
        methods.register("mgda", **about)(methods.CAGrad)
    with pytest.raises(UsageError, match="letters, digits"):
        methods.register("a:b", **about)(methods.MGDA)
    with pytest.raises(UsageError, match="int is none of these"):
        methods.register("new", **about)(int)
    with pytest.raises(UsageError, match="a str is none of these"):
        methods.register("new")("text")
    with pytest.raises(UsageError, match=r"its first parameter, by this name, but wrong\(x, J\) has none"):

        @methods.register("new")
        def wrong(x, J): ...

    class NeedsOption(methods.MGDA):
        def __init__(self, strength) -> None:
            super().__init__()

    with pytest.raises(UsageError, match="'strength' has none"):
        methods.register("new", **about)(NeedsOption)
    assert methods.names() == ALL


# --- every method -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@every_count
def test_agreeing_tasks_give_the_sum(name, count):
    g = gradients("random", 1)[0]
    expected = count * g * (1.4 if name == "cagrad" else 1)
    torch.testing.assert_close(make(name, count)(g.expand(count, -1)), expected)
    torch.testing.assert_close(make(name)(g.expand(count, -1)), expected)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("scale", [1e-25, 1e-10, 1e10, 1e25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_kind
def test_update_scales_with_the_gradients(name, scale, dtype, kind):
    J = gradients(kind, 4)
    if kind == "dependent":
        J = J.abs()  # Otherwise some updates are zero, and what is left of them is rounding.
    expected = make(name)(J)
    update = make(name)((scale * J).to(dtype))
    assert update.dtype == dtype
    tolerance = 1e-3 if dtype == torch.float32 else 1e-7
    assert torch.linalg.norm(update.double() / scale - expected) <= tolerance * torch.linalg.norm(expected)


@pytest.mark.parametrize("name", ALL)
def test_zero_gradients_give_zero(name):
    assert make(name)(torch.zeros(3, 5)).equal(torch.zeros(5))


@pytest.mark.parametrize("name", GRAMIAN)
def test_zero_gramian_gives_joint_training(name):
    assert make(name).weights(torch.zeros(3, 3)).equal(torch.ones(3))


@pytest.mark.parametrize("name", GRAMIAN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_kind
def test_update_is_weights_times_gradients(name, dtype, kind):
    J = gradients(kind, 5).to(dtype)
    weights = make(name).weights(J @ J.T)
    assert (weights.dtype, weights.shape) == (dtype, (5,))
    assert not weights.requires_grad
    torch.testing.assert_close(make(name).weights((J @ J.T).requires_grad_()) @ J, weights @ J, rtol=0, atol=0)
    # In float32, the two Gramians differ by rounding; how much that moves the update is the problem's condition.
    tolerance = 1e-3 if dtype == torch.float32 else 1e-6
    assert torch.linalg.norm(make(name)(J) - weights @ J) <= tolerance * torch.linalg.norm(J)


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_gradient_is_refused_by_name(name, bad):
    J = gradients("random", 3)
    good = J.clone()
    J[1, 4] = bad
    with pytest.raises(GradientError, match="gradient of task 1 is not finite"):
        methods.get(name)(J)
    with pytest.raises(GradientError, match=r"task 1 \('depth'\) is not"):
        apply(methods.get(name), J, TASKS)
    method, spared = make_for(name), make_for(name)
    J[2, 0] = bad
    with pytest.raises(GradientError, match=r"task 1 \('depth'\), 2 \('normal'\) is not"):
        method(J)
    # The refused step leaves no trace.
    assert method(good).equal(spared(good))


@pytest.mark.parametrize("name", GRAMIAN)
@pytest.mark.parametrize("shape", [(2, 3), (4,), (0, 0)])
def test_gramian_of_wrong_shape_is_refused(name, shape):
    with pytest.raises(UsageError, match=r"shape \(T, T\), but got"):
        methods.get(name).weights(torch.zeros(shape))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(3,), (0, 3), (2, 3, 4)])
def test_gradients_of_wrong_shape_are_refused(name, shape):
    with pytest.raises(UsageError, match=r"shape \(T, P\)"):
        methods.get(name)(torch.zeros(shape))


@pytest.mark.parametrize("name", ALL)
def test_setup_is_for_one_set_of_tasks(name):
    method = methods.get(name)
    for wrong in ([], ["seg", "seg"]):
        with pytest.raises(UsageError, match="needs the names of all tasks, each once"):
            method.setup(wrong)
    method.setup(TASKS)
    parameters = [id(p) for p in method.parameters()]
    method.setup(list(TASKS))
    assert [id(p) for p in method.parameters()] == parameters
    with pytest.raises(UsageError, match="cannot change to"):
        method.setup(TASKS[:2])


@pytest.mark.parametrize("name", AGGREGATORS)
def test_global_random_state_is_neither_read_nor_changed(name):
    J = gradients("conflicting", 5)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = methods.get(name)(J)
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(2)
    assert methods.get(name)(J).equal(first)


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_combined_in_full(name, dtype):
    J = gradients("agreeing", 3).to(dtype)
    update = make(name)(J)
    assert update.dtype == dtype
    expected = make(name)(J.double())
    # The product of weights and gradients is of their dtype.
    assert torch.linalg.norm(update.double() - expected) <= 2e-2 * torch.linalg.norm(expected)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_an_absent_task_takes_no_part(name):
    J = gradients("agreeing", 2)
    method, two = make_for(name), make_for(name, ("seg", "normal"))
    torch.testing.assert_close(apply(method, J, ("seg", "normal")), apply(two, J, ("seg", "normal")))
    with pytest.raises(UnknownNameError, match="Did you mean 'depth'"):
        apply(method, J, ("seg", "dept"))
    with pytest.raises(UsageError, match="but got 2 rows"):
        method(J)


@pytest.mark.parametrize("name", REMEMBERING)
def test_an_absent_task_keeps_its_state(name):
    method = make_for(name)
    for seed in range(3):
        method(gradients("conflicting", 3, seed))
    before = {k: v.clone() for k, v in method.memory.items()}
    for seed in range(3):
        apply(method, gradients("unequal", 2, seed), ("normal", "seg"))
    for key, value in method.memory.items():
        assert value[1].equal(before[key][1])
        assert key == "first_risks" or not value.equal(before[key])
        if key == "targets":
            assert value[:, 1].equal(before[key][:, 1])


# GradVac visits rows in another order in another order.
@pytest.mark.parametrize("name", [name for name in REMEMBERING if name != "gradvac"])
def test_rows_are_told_by_their_names(name):
    method, other = make_for(name), make_for(name, TASKS[::-1])
    for seed in range(3):
        J = gradients("random", 3, seed) * torch.tensor([[1.0], [2.0], [4.0]])
        first = apply(method, J, TASKS)
        torch.testing.assert_close(apply(other, J.flip(0), TASKS[::-1]), first)
        torch.testing.assert_close(apply(make_for(name), J.flip(0), TASKS[::-1]), apply(make_for(name), J, TASKS))


@pytest.mark.parametrize("name", AGGREGATORS)
def test_aggregator_state_continues_to_the_bit(name):
    method = make_for(name)
    for seed in range(3):
        method(gradients("conflicting", 3, seed))
    apply(method, gradients("conflicting", 2), TASKS[:2])
    file = saved(method)
    resumed = make_for(name)
    resumed(gradients("random", 3))  # whatever it knew before is forgotten
    resumed.load_state_dict(file)
    for seed in range(3, 6):
        J = gradients("conflicting", 3, seed)
        assert resumed(J).equal(method(J))
        assert apply(resumed, J[1:], TASKS[1:]).equal(apply(method, J[1:], TASKS[1:]))


@pytest.mark.parametrize("name", REMEMBERING)
def test_a_loaded_state_is_a_copy(name):
    method, other = make_for(name), make_for(name)
    method(gradients("conflicting", 3))
    other.load_state_dict(method.state_dict())
    J = gradients("unequal", 3)
    expected = method(J)
    assert other(J).equal(expected)


@pytest.mark.parametrize("name", REMEMBERING)
def test_the_first_step_without_setup_names_the_tasks_by_position(name):
    method, named = methods.get(name), make_for(name)
    for seed in range(3):
        J = gradients("conflicting", 3, seed)
        assert method(J).equal(named(J))
    assert method.tasks == ("0", "1", "2")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ALL)
def test_update_stays_on_the_gpu(name):
    J = gradients("conflicting", 3)
    update = methods.get(name)(J.cuda())
    assert update.is_cuda
    if name != "graddrop":  # its draws are the device's own
        torch.testing.assert_close(update.cpu(), methods.get(name)(J))


# --- PCGrad -----------------------------------------------------------------------------------------------


def algorithm_1(J: Tensor, orders: list[list[int]]) -> Tensor:
    """Yu et al. 2020, Algorithm 1, on the gradients themselves."""
    update = torch.zeros_like(J[0])
    for i, order in enumerate(orders):
        g = J[i].clone()
        for j in order:
            if j != i and g @ J[j] < 0:
                g -= (g @ J[j]) / (J[j] @ J[j]) * J[j]
        update += g
    return update


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("seed", [0, 7])
@every_kind
def test_pcgrad_is_algorithm_1(count, seed, kind):
    stream = torch.Generator().manual_seed(seed)
    method = methods.get("pcgrad", seed=seed)
    for step in range(3):
        J = gradients(kind, count, seed=step)
        orders = [torch.randperm(count, generator=stream).tolist() for _ in range(count)]
        torch.testing.assert_close(method(J), algorithm_1(J, orders), rtol=1e-9, atol=1e-9)


def test_pcgrad_order_matters_and_depends_on_the_seed():
    J = gradients("conflicting", 5)
    assert not torch.allclose(methods.get("pcgrad", seed=0)(J), methods.get("pcgrad", seed=1)(J))
    method = methods.get("pcgrad")
    assert not torch.allclose(method(J), method(J))


def test_pcgrad_with_a_zero_gradient_ignores_that_task():
    J = gradients("conflicting", 2)
    two = methods.get("pcgrad")(J)
    torch.testing.assert_close(methods.get("pcgrad")(torch.cat([J, torch.zeros_like(J[:1])])), two)
    # Its squared norm is zero in float32, but not its inner products with the others.
    G = torch.tensor([[1.0, -1e-25], [-1e-25, 0.0]])
    assert methods.get("pcgrad").weights(G).equal(torch.ones(2))


def test_pcgrad_state_continues_the_stream():
    J = gradients("conflicting", 5)
    method = methods.get("pcgrad", seed=3)
    method(J)
    resumed = methods.get("pcgrad")
    resumed.load_state_dict(saved(method))
    for _ in range(3):
        assert resumed(J).equal(method(J))


# --- MGDA -------------------------------------------------------------------------------------------------


def assert_min_norm(J: Tensor, weights: Tensor) -> None:
    """`weights @ J` is the min-norm point of the hull: KKT conditions in units of the lengths involved."""
    weights = weights / len(J)
    d = weights @ J
    lengths = torch.linalg.norm(J, dim=1)
    assert (weights >= 0).all()
    assert weights.sum().item() == pytest.approx(1)
    assert torch.linalg.norm(d) <= lengths.min() * (1 + 1e-12)
    slack = J @ d - d @ d
    assert (slack >= -1e-9 * lengths.min() ** 2).all()
    support = weights > 0
    assert (slack[support].abs() <= 1e-9 * lengths[support] * lengths.min()).all()


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
@every_count
@every_hard_kind
def test_mgda_meets_the_optimality_conditions(kind, count, scale):
    for seed in range(5):
        J = scale * gradients(kind, count, seed)
        assert_min_norm(J / scale, methods.get("mgda").weights(J @ J.T))


def test_mgda_of_two_tasks_has_a_closed_form():
    """Sener & Koltun 2018, eq. (4)."""
    for seed in range(20):
        a, b = gradients("random" if seed % 2 else "agreeing", 2, seed) * torch.tensor([[1.0], [2.0]])
        gamma = ((b - a) @ b / ((a - b) @ (a - b))).clamp(0, 1)
        update = methods.get("mgda")(torch.stack([a, b]))
        torch.testing.assert_close(update, 2 * (gamma * a + (1 - gamma) * b))


def test_mgda_is_zero_where_no_direction_helps_all():
    J = gradients("random", 3)
    torch.testing.assert_close(methods.get("mgda")(torch.cat([J, -J[:1]])), torch.zeros(60).double())


# --- CAGrad -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [0.1, 0.9])
@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
@every_count
@every_hard_kind
def test_cagrad_meets_the_optimality_conditions(kind, count, scale, c):
    """Weak duality bounds the worst-off task's gain by the dual at every w; d must attain the least such bound."""
    draw = torch.distributions.Dirichlet(torch.full((count,), 0.3, dtype=torch.float64))
    for seed in range(2):
        J = gradients(kind, count, seed)
        mean = J.mean(dim=0)
        radius = c * torch.linalg.norm(mean)

        def dual(w, J=J, mean=mean, radius=radius):
            return w @ J @ mean + radius * torch.linalg.norm(w @ J, dim=-1)

        weights = methods.get("cagrad", c=c).weights((scale * J) @ (scale * J).T)
        d = weights @ J / count
        assert torch.linalg.norm(d - mean) <= radius * (1 + 1e-6)
        tolerance = 1e-7 * mean @ mean
        assert (weights >= 1 - 1e-12).all()
        w = (weights - 1) / (weights - 1).sum()
        assert dual(w) - (J @ d).min() <= tolerance
        corners = torch.eye(count, dtype=torch.float64)
        assert (dual(torch.cat([draw.sample((500,)), corners])) >= (J @ d).min() - tolerance).all()


@pytest.mark.parametrize("c", [0.1, 0.4, 0.9])
@every_kind
def test_cagrad_of_two_tasks_beats_a_fine_grid(kind, c):
    x = torch.linspace(0, 1, 4001, dtype=torch.float64)[:, None]
    for seed in range(5):
        J = gradients(kind, 2, seed)
        mean, (a, b) = J.mean(dim=0), J
        points = x * a + (1 - x) * b
        values = points @ mean + c * torch.linalg.norm(mean) * torch.linalg.norm(points, dim=1)
        best = points[values.argmin()]
        d = methods.get("cagrad", c=c)(J) / 2
        gain = (J @ d).min()
        assert gain <= values.min() + 1e-12
        on_grid = mean + c * torch.linalg.norm(mean) * best / torch.linalg.norm(best)
        assert gain >= (J @ on_grid).min() - 1e-12


def test_cagrad_without_a_radius_is_joint_training():
    J = gradients("conflicting", 4)
    torch.testing.assert_close(methods.get("cagrad", c=0)(J), J.sum(dim=0))
    cancelling = torch.stack([J[0], -J[0]])
    assert methods.get("cagrad")(cancelling).equal(torch.zeros(60).double())


def test_cagrad_where_the_ball_does_not_bind():
    """Two opposite gradients and one across: no d in the ball gains on all, and the best harms none."""
    J = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    d = methods.get("cagrad")(J) / 3
    assert (J @ d).min() >= -1e-6
    assert torch.linalg.norm(d - J.mean(dim=0)) <= 0.4 * torch.linalg.norm(J.mean(dim=0)) * (1 + 1e-6)


def test_cagrad_rescale_divides_by_one_plus_c_squared():
    J = gradients("conflicting", 3)
    rescaled = methods.get("cagrad", c=0.5, rescale=True)(J)
    torch.testing.assert_close(1.25 * rescaled, methods.get("cagrad", c=0.5)(J))


# --- weightings -------------------------------------------------------------------------------------------


def losses_of(*values: float, tasks: tuple[str, ...] = TASKS) -> dict[str, Tensor]:
    return {t: torch.tensor(v, requires_grad=True) for t, v in zip(tasks, values, strict=True)}


def test_joint_is_the_sum():
    losses = losses_of(1.0, 2.0, 4.0)
    total, weights = methods.get("joint").combine(losses)
    total.backward()
    assert total.item() == 7
    assert all(loss.grad.item() == 1 for loss in losses.values())
    assert {t: w.item() for t, w in weights.items()} == dict.fromkeys(TASKS, 1.0)
    total, _ = methods.get("joint").combine({"seg": losses["seg"]})
    assert total.item() == 1


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_combine_returns_the_weights_of_the_backward_pass(name):
    method = make(name)
    method.setup(TASKS)
    observe = getattr(method, "observe_norms", lambda norms: None)  # gradnorm asks for it
    for epoch in ((3.0, 2.0, 1.0), (1.0, 2.0, 3.0)):
        observe(losses_of(1.0, 2.0, 3.0))
        method.combine(losses_of(*epoch))
        method.end_epoch()
    observe(losses_of(1.0, 2.0, 3.0))
    for i, parameter in enumerate(method.parameters()):
        torch.nn.init.constant_(parameter, 0.3 * i - 0.2)
    losses = losses_of(1.0, 2.0, 4.0)
    total, weights = method.combine(losses)
    total.backward()
    assert list(weights) == list(TASKS)
    for task, loss in losses.items():
        assert weights[task].ndim == 0
        assert not weights[task].requires_grad
        torch.testing.assert_close(weights[task], loss.grad)
    if name != "gradnorm":  # whose weights are those of the next step by now
        J = gradients("random", 3)
        torch.testing.assert_close(method(J), torch.stack(list(weights.values())).double() @ J)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_combine_refuses_what_it_cannot_weigh(name):
    method = make(name)
    if name != "joint":
        with pytest.raises(UsageError, match="call setup"):
            method.combine(losses_of(1.0, 2.0, 3.0))
    method.setup(TASKS)
    with pytest.raises(UsageError, match="losses is empty"):
        method.combine({})
    with pytest.raises(UsageError, match=r"'depth' must be a scalar, but has shape \(2,\)"):
        method.combine({"depth": torch.ones(2)})
    with pytest.raises(UsageError, match="but got 2 rows"):
        method(torch.ones(2, 4))
    if name != "joint":
        with pytest.raises(UnknownNameError, match="Did you mean 'depth'"):
            method.combine({"dept": torch.tensor(1.0)})


def test_uw_is_the_formula():
    """Kendall et al. 2018, eq. (7) with s = log σ², doubled: Σ exp(-s) L + s."""
    method = make("uw")
    method.setup(TASKS)
    start, weights = method.combine(losses_of(1.0, 2.0, 4.0))
    assert start.item() == 7
    assert all(w.item() == 1 for w in weights.values())

    s = [0.5, -1.0, 0.25]
    for parameter, value in zip(method.parameters(), s, strict=True):
        torch.nn.init.constant_(parameter, value)
    values = [1.0, 2.0, 4.0]
    total, weights = method.combine(losses_of(*values))
    total.backward()
    assert total.item() == pytest.approx(sum(math.exp(-a) * v + a for a, v in zip(s, values, strict=True)))
    for parameter, weight, a, v in zip(method.parameters(), weights.values(), s, values, strict=True):
        assert weight.item() == pytest.approx(math.exp(-a))
        assert parameter.grad.item() == pytest.approx(1 - math.exp(-a) * v)


def test_uw_leaves_an_absent_task_alone():
    method = make("uw")
    method.setup(TASKS)
    optimizer = torch.optim.Adam(method.parameters(), lr=0.1)

    def step(losses):
        optimizer.zero_grad()
        total, weights = method.combine(losses)
        total.backward()
        optimizer.step()
        assert list(weights) == list(losses)

    seg, depth, _ = method.parameters()
    step(losses_of(1.0, 2.0, 4.0))
    before = seg.item(), depth.item()
    step(losses_of(3.0, 4.0, tasks=("seg", "normal")))
    assert depth.grad is None
    assert depth.item() == before[1] != 0
    assert seg.item() != before[0]


def test_uw_state_continues():
    def step(method, optimizer):
        optimizer.zero_grad()
        total, _ = method.combine(losses_of(1.0, 2.0, 4.0))
        total.backward()
        optimizer.step()
        return total.item()

    method, resumed = make("uw"), make("uw")
    method.setup(TASKS)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    step(method, optimizer)
    resumed.setup(TASKS)
    resumed.load_state_dict(saved(method))
    resumed_optimizer = torch.optim.SGD(resumed.parameters(), lr=0.1)
    before = [step(method, optimizer) for _ in range(3)]
    assert [step(resumed, resumed_optimizer) for _ in range(3)] == before


def run_epoch(method: methods.DWA, *steps: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    weights = [method.combine(losses)[1] for losses in steps]
    method.end_epoch()
    return weights


def dwa_weights(older: list[float], newer: list[float], temperature: float) -> list[float]:
    """Liu et al. 2019, eq. (7)."""
    e = [math.exp(n / o / temperature) for o, n in zip(older, newer, strict=True)]
    return [len(e) * x / sum(e) for x in e]


@pytest.mark.parametrize("temperature", [2.0, 0.5])
def test_dwa_is_the_formula(temperature):
    method = methods.get("dwa", temperature=temperature)
    method.setup(TASKS)
    method.end_epoch()  # An epoch without a step is none.
    epochs = [
        [(4.0, 3.0, 2.0), (2.0, 3.0, 4.0)],
        [(2.0, 2.0, 4.0), (1.0, 2.0, 5.0)],
        [(1.0, 2.0, 3.0), (2.0, 1.0, 1.0)],
        [(1.0, 1.0, 1.0)],
    ]
    means = [[sum(column) / len(epoch) for column in zip(*epoch, strict=True)] for epoch in epochs]
    for i, epoch in enumerate(epochs):
        expected = dwa_weights(means[i - 2], means[i - 1], temperature) if i >= 2 else [1.0, 1.0, 1.0]
        for weights in run_epoch(method, *(losses_of(*values) for values in epoch)):
            assert [w.item() for w in weights.values()] == pytest.approx(expected, rel=1e-5)
            assert sum(expected) == pytest.approx(3)


def test_dwa_averages_a_task_over_the_steps_where_it_was_present():
    method = make("dwa")
    method.setup(TASKS)
    both = ("seg", "normal")
    run_epoch(method, losses_of(4.0, 3.0, 2.0), losses_of(2.0, 4.0, tasks=both))
    run_epoch(method, losses_of(2.0, 1.0, tasks=both), losses_of(2.0, 6.0, 1.0))
    (weights,) = run_epoch(method, losses_of(1.0, 1.0, tasks=both))
    expected = dwa_weights([3.0, 3.0, 3.0], [2.0, 6.0, 1.0], 2.0)
    assert list(weights) == list(both)
    assert [w.item() for w in weights.values()] == pytest.approx([expected[0], expected[2]], rel=1e-5)
    # A whole epoch without the task leaves its history as it was.
    (weights,) = run_epoch(method, losses_of(1.0, 1.0, 1.0))
    expected = dwa_weights([2.0, 3.0, 1.0], [1.0, 6.0, 1.0], 2.0)
    assert [w.item() for w in weights.values()] == pytest.approx(expected, rel=1e-5)


def test_dwa_counts_a_task_without_history_as_unchanged():
    method = make("dwa")
    method.setup(TASKS)
    run_epoch(method, losses_of(4.0, 0.0, tasks=("seg", "depth")))
    run_epoch(method, losses_of(2.0, 1.0, tasks=("seg", "depth")))
    (weights,) = run_epoch(method, losses_of(1.0, 1.0, 1.0))
    assert [w.item() for w in weights.values()] == pytest.approx(dwa_weights([2, 1, 1], [1, 1, 1], 2.0))


def test_dwa_state_continues_within_an_epoch():
    method = make("dwa")
    method.setup(TASKS)
    run_epoch(method, losses_of(4.0, 3.0, 2.0))
    run_epoch(method, losses_of(2.0, 3.0, 1.0))
    method.combine(losses_of(1.0, 2.0, 3.0))
    resumed = make("dwa")
    resumed.setup(TASKS)
    resumed.load_state_dict(saved(method))
    for _ in range(3):
        rest = losses_of(2.0, 1.0, 0.5)
        assert run_epoch(resumed, rest, rest) == run_epoch(method, rest, rest)


@pytest.mark.parametrize("name", WEIGHTINGS + REMEMBERING)
def test_state_of_other_tasks_is_refused(name):
    method = make(name)
    method.setup(TASKS)
    state = saved(method)
    for tasks in ((), TASKS[::-1]):
        other = make(name)
        if tasks:
            other.setup(tasks)
        with pytest.raises(UsageError, match=r"belongs to the tasks \['seg', 'depth', 'normal'\]"):
            other.load_state_dict(state)
