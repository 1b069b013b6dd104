import pytest
from torch import nn

from recon.support.network.references import redirect_references, replace_references

OLD, NEW, OTHER = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)


def swap(module):
    return NEW if module is OLD else module


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (OLD, NEW),
        ([OTHER, OLD], [OTHER, NEW]),
        ((1, [OLD]), (1, [NEW])),
        ({"a": OLD, "b": (OLD, 2)}, {"a": NEW, "b": (NEW, 2)}),
    ],
)
def test_modules_are_replaced_wherever_they_are(value, expected):
    assert replace_references(value, swap) == expected


def test_bound_methods_change_their_owner():
    method = replace_references(OLD.extra_repr, swap)
    assert method.__self__ is NEW and method.__func__ is nn.Linear.extra_repr


@pytest.mark.parametrize("value", [OTHER, [OTHER, 1], (OTHER,), {"a": OTHER}, OTHER.extra_repr, "text", None])
def test_what_does_not_change_stays_the_same_object(value):
    assert replace_references(value, swap) is value


def test_children_and_state_are_left_alone():
    parent = nn.Sequential(OLD)
    parent.again, parent.listed = OLD, [OLD]
    redirect_references([parent], swap)
    assert parent[0] is OLD and parent._modules["again"] is OLD and parent.listed == [NEW]
