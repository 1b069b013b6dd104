"""Aggregators that solve a problem, against its optimality conditions or a direct solution on the gradients."""

from __future__ import annotations

import sys
from collections import Counter
from itertools import chain, combinations

import pytest
import torch
from torch import Tensor

from recon import methods
from recon.errors import UsageError
from tests.task_gradients import every_count, every_hard_kind, every_kind, gradients

every_scale = pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])


def weights_of(method: methods.Method, J: Tensor, scale: float = 1.0) -> Tensor:
    return method.weights((scale * J) @ (scale * J).T)


# --- dual cone --------------------------------------------------------------------------------------------


def assert_min_norm_above(J: Tensor, w: Tensor, lowest: Tensor) -> None:
    """KKT conditions of min ‖w @ J‖ over w ≥ lowest: gains are the multipliers of the bounds."""
    lengths = torch.linalg.norm(J, dim=1)
    gains, size = J @ (w @ J), torch.linalg.norm(lowest @ J)
    tolerance = 1e-7 * lengths * size
    assert (w >= lowest).all()
    assert (gains >= -tolerance).all()
    free = w > lowest
    assert (gains[free].abs() <= tolerance[free]).all()


@every_scale
@every_count
@every_kind
def test_dualproj_meets_the_optimality_conditions(kind, count, scale):
    for seed in range(3):
        J = gradients(kind, count, seed)
        assert_min_norm_above(J, weights_of(methods.get("dualproj"), J, scale), torch.ones(count).double())


def projected(J: Tensor, i: int) -> Tensor:
    """The projection of gradient i onto the dual cone, by trying which tasks end up with no gain."""
    count, best = len(J), None
    lengths = torch.linalg.norm(J, dim=1)
    for bound in chain.from_iterable(combinations(range(count), size) for size in range(count + 1)):
        A = J[list(bound)]
        d = J[i] - torch.linalg.pinv(A) @ (A @ J[i]) if bound else J[i]
        feasible = (J @ d >= -1e-9 * lengths * lengths[i]).all()
        if feasible and (best is None or torch.linalg.norm(J[i] - d) < torch.linalg.norm(J[i] - best)):
            best = d
    return best


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@every_kind
def test_upgrad_sums_the_projections(kind, count):
    for seed in range(2):
        J = gradients(kind, count, seed)
        expected = torch.stack([projected(J, i) for i in range(count)]).sum(dim=0)
        update = methods.get("upgrad")(J)
        assert torch.linalg.norm(update - expected) <= 1e-7 * torch.linalg.norm(J)


@every_scale
@every_count
@every_kind
def test_upgrad_harms_no_task(kind, count, scale):
    J = gradients(kind, count)
    update = weights_of(methods.get("upgrad"), J, scale) @ J
    lengths = torch.linalg.norm(J, dim=1)
    assert (J @ update >= -1e-7 * lengths * lengths.max()).all()


# --- fairness ---------------------------------------------------------------------------------------------


@every_scale
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 40])
@every_hard_kind
def test_fairgrad_is_stationary(kind, count, alpha, scale):
    """Ban & Ji 2024, eq. (4): `G w = w^(-1/α)`, up to the length; the length is that of Nash-MTL."""
    J = gradients(kind, count)
    if kind == "dependent":
        J = J.abs()  # otherwise no direction helps all
    w = weights_of(methods.get("fairgrad", alpha=alpha), J, scale)
    assert (w > 0).all()
    ratios = (J @ (w @ J)) * w ** (1 / alpha)
    torch.testing.assert_close(ratios / ratios.mean(), torch.ones(count).double(), rtol=1e-6, atol=0)
    length = torch.linalg.norm(w @ J)
    assert length.item() == pytest.approx((count * torch.linalg.norm(J @ J.T)).sqrt().item(), rel=1e-6)


@every_count
@every_kind
def test_nash_mtl_gives_every_task_the_same_share(kind, count):
    """Navon et al. 2022, eq. (2): `w_i g_i·d` is the same for all; with ‖G‖ = 1 for a unit, `G w = 1 / w`."""
    J = gradients(kind, count)
    if kind == "dependent":
        J = J.abs()
    unit = J / torch.linalg.norm(J @ J.T).sqrt()
    w = weights_of(methods.get("nash-mtl"), J)
    torch.testing.assert_close((unit @ (w @ unit)) * w, torch.ones(count).double(), rtol=1e-7, atol=0)
    torch.testing.assert_close(weights_of(methods.get("fairgrad", alpha=1), J), w)


def test_nash_mtl_of_orthogonal_gradients_has_a_closed_form():
    lengths = torch.tensor([1e-6, 1.0, 20.0], dtype=torch.float64)
    w = methods.get("nash-mtl").weights(torch.diag(lengths**2))
    torch.testing.assert_close(w, torch.linalg.norm(lengths**2).sqrt() / lengths)


@pytest.mark.parametrize("name", ["nash-mtl", "fairgrad"])
def test_fairness_where_gradients_cancel_goes_to_zero(name):
    J = gradients("random", 3)
    J = torch.cat([J, -J.sum(dim=0, keepdim=True)])
    update = methods.get(name)(J)
    assert torch.linalg.norm(update) <= 1e-5 * torch.linalg.norm(J)


SOLVED = [name for name in methods.names() if isinstance(methods.get(name), methods.GramianAggregator)]


@pytest.mark.parametrize("size", [0.0, 1e-12])
@pytest.mark.parametrize("name", SOLVED)
def test_a_gradient_of_next_to_nothing_is_left_out(name, size):
    J = gradients("agreeing", 2)
    with_zero = torch.stack([J[0], -size * J[0], J[1]])
    torch.testing.assert_close(methods.get(name)(with_zero), methods.get(name)(J))


@pytest.mark.parametrize("name", ["nash-mtl", "fairgrad", "upgrad", "cagrad", "mgda", "pe-ltr"])
@every_hard_kind
def test_forty_tasks_take_a_thousand_calls(name, kind):
    """Python's and C's: work that is the same on every machine; a laptop does 10,000 in a tenth of a second."""
    G = gradients(kind, 40) @ gradients(kind, 40).T
    method = methods.get(name)
    events = Counter()
    before = sys.getprofile()
    sys.setprofile(lambda frame, event, argument: events.update([event]))
    try:
        method.weights(G)
    finally:
        sys.setprofile(before)
    assert 0 < events["call"] + events["c_call"] < 10_000


# --- closed forms -----------------------------------------------------------------------------------------


@every_scale
@pytest.mark.parametrize("kind", ["random", "unequal", "conflicting", "agreeing"])
@every_count
def test_imtl_g_has_equal_projections(kind, count, scale):
    """Liu et al. 2021, eq. (5), and weights that add up to T."""
    J = gradients(kind, count)
    w = weights_of(methods.get("imtl-g"), J, scale)
    projections = torch.nn.functional.normalize(J) @ (w @ J)
    torch.testing.assert_close(projections, projections.mean().expand(count), rtol=1e-7, atol=0)
    assert w.sum().item() == pytest.approx(count)


@every_kind
@every_count
def test_config_is_the_formula(kind, count):
    """Liu et al. 2025, eq. (2), on the gradients themselves."""
    J = gradients(kind, count)
    best = torch.linalg.pinv(torch.nn.functional.normalize(J)).sum(dim=1)
    direction = best / torch.linalg.norm(best)
    torch.testing.assert_close(methods.get("config")(J), (J @ direction).sum() * direction, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["random", "conflicting", "dependent", "agreeing"])
@pytest.mark.parametrize("size", ["min", "median", "rmse"])
@every_count
def test_aligned_mtl_is_the_polar_factor(kind, size, count):
    """Senushkin et al. 2023, eq. (11): the gradients' singular values become one of them."""
    J = gradients(kind, count)
    U, values, V = torch.linalg.svd(J, full_matrices=False)
    rank = int((values > 1e-6 * values[0]).sum())
    squares = values[:rank] ** 2
    common = {"min": squares.min(), "median": squares.median(), "rmse": squares.mean()}[size].sqrt()
    expected = (common * U[:, :rank] @ V[:rank]).sum(dim=0)
    torch.testing.assert_close(methods.get("aligned-mtl", size=size)(J), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["imtl-g", "config", "aligned-mtl", "pe-ltr"])
def test_two_tasks_that_agree_up_to_rounding_count_alike(name):
    """A direction in which they differ by rounding must not be inverted."""
    J = gradients("agreeing", 3)
    noise = torch.randn(J.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    J[1] = J[0] * (1 + 1e-7 * noise)
    w = weights_of(methods.get(name), J)
    assert w[0].item() == pytest.approx(w[1].item(), rel=1e-3)
    assert torch.linalg.norm(w @ J) > 0.1 * torch.linalg.norm(J.sum(dim=0))


# --- MGDA and PE-LTR --------------------------------------------------------------------------------------


@every_count
@every_hard_kind
def test_normalized_mgda_takes_the_weights_of_unit_gradients(kind, count):
    J = gradients(kind, count)
    w = weights_of(methods.get("mgda", normalize="l2"), J) / count
    units = torch.nn.functional.normalize(J)
    gains, square = units @ (w @ units), torch.linalg.norm(w @ units) ** 2
    assert (w >= 0).all()
    assert w.sum().item() == pytest.approx(1)
    assert (gains >= square - 1e-9).all()
    assert (gains[w > 0] <= square + 1e-9).all()


@pytest.mark.parametrize("bound", [0.0, 0.05])
@every_scale
@every_count
@pytest.mark.parametrize("kind", ["random", "conflicting", "agreeing"])
def test_pe_ltr_meets_the_conditions_of_both_its_steps(kind, count, scale, bound):
    J = gradients(kind, count)
    G = J @ J.T
    c = bound * torch.linspace(0.5, 1.5, count, dtype=torch.float64)
    v = weights_of(methods.get("pe-ltr", bounds=c.tolist()), J, scale) / count - c
    room = 1 - c.sum()
    # The paper's KKT system, for the equality constraint alone.
    ones = torch.ones(count, 1, dtype=torch.float64)
    M = torch.cat([torch.cat([G, ones], dim=1), torch.cat([ones.T, torch.zeros(1, 1)], dim=1)])
    relaxed = torch.linalg.solve(M, torch.cat([-G @ c, room[None]]))[:count]
    # Its projection: what is above zero was moved by one number, and the rest would have ended below.
    assert (v >= -1e-12).all()
    assert v.sum().item() == pytest.approx(room.item())
    support = v > 1e-9
    shift = (v - relaxed)[support]
    torch.testing.assert_close(shift, shift.mean().expand_as(shift), rtol=0, atol=1e-7)
    assert (relaxed[~support] + shift.mean() <= 1e-7).all()


@pytest.mark.parametrize("bound", [0.0, 0.2])
@every_kind
def test_pe_ltr_of_two_tasks_beats_a_fine_grid(kind, bound):
    x = torch.linspace(bound, 1 - bound, 4001, dtype=torch.float64)[:, None]
    for seed in range(5):
        a, b = J = gradients(kind, 2, seed)
        w = weights_of(methods.get("pe-ltr", bound=bound), J)
        assert (w >= 2 * bound - 1e-12).all()
        best = torch.linalg.norm(x * a + (1 - x) * b, dim=1).min()
        assert torch.linalg.norm(w @ J / 2) <= best * (1 + 1e-9)


def test_pe_ltr_bounds_are_the_tasks_own():
    tasks = ("seg", "depth", "normal")
    method = methods.parse("pe-ltr:bounds=0.1/0.5/0.2")
    method.setup(tasks)
    assert method.bounds == (0.1, 0.5, 0.2)
    J = torch.diag(torch.tensor([1.0, 1e3, 1.0], dtype=torch.float64))
    w = weights_of(method, J)
    assert w[1].item() == pytest.approx(1.5)
    # Two tasks of three: the bounds of those.
    w = method.weights(torch.diag(torch.tensor([1.0, 1e-6]).double()), tasks=("depth", "seg"))
    torch.testing.assert_close(w, torch.tensor([1.0, 1.0]).double(), rtol=0, atol=1e-3)


def test_pe_ltr_refuses_bounds_that_do_not_fit():
    with pytest.raises(UsageError, match="one bound for each of 3 tasks"):
        methods.get("pe-ltr", bounds="0.1/0.2").setup(("seg", "depth", "normal"))
    with pytest.raises(UsageError, match="add up to less than 1"):
        methods.get("pe-ltr", bound=0.4).setup(("seg", "depth", "normal"))
    with pytest.raises(UsageError, match="one bound for each of 2 tasks"):
        methods.get("pe-ltr", bounds="0.1/0.2/0.1")(gradients("random", 2))


@pytest.mark.parametrize("normalize", ["loss", "loss+"])
def test_mgda_divides_by_the_losses(normalize):
    J = gradients("unequal", 3)
    losses = torch.tensor([0.5, 2.0, 30.0], dtype=torch.float64)
    method = methods.get("mgda", normalize=normalize)
    method.setup(("a", "b", "c"))
    with pytest.raises(UsageError, match="does not know the loss of 'a'"):
        method.weights(J @ J.T)
    method.observe_losses(dict(zip("abc", losses, strict=True)))
    divisors = losses * J.norm(dim=1) if normalize == "loss+" else losses
    divided = J / divisors[:, None]
    expected = methods.get("mgda").weights(divided @ divided.T)  # itself checked against its optimality conditions
    torch.testing.assert_close(method.weights(J @ J.T), expected)
    two = methods.get("mgda").weights((divided @ divided.T)[1:, 1:])
    torch.testing.assert_close(method.weights((J @ J.T)[1:, 1:], tasks=["b", "c"]), two)
    with pytest.raises(UsageError, match=r"above 0; those of \['b'\] are not"):
        method.observe_losses({"a": torch.tensor(1.0), "b": torch.tensor(0.0)})
