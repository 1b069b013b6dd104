import pytest

from recon_cli.texts.training import static_option


@pytest.mark.parametrize(
    ("weights", "option"),
    [
        ({"a": 1.5, "b": 0.25}, "joint:weights=1.5/0.25"),
        ({"a": 0.0, "b": 2.0}, "joint:weights=0/2"),
        ({"a": 1.0}, None),
        ({}, None),
        ({"a": 1.0, "b": -0.1}, None),
        ({"a": 1.865, "b": 1.5e5}, None),
        ({"a": 1.0, "b": float("inf")}, None),
        ({"a": 1.0, "b": float("nan")}, None),
        ({"a": 0.0, "b": 0.0}, None),
    ],
    ids=["plain", "zero", "one lacks", "none", "negative", "huge", "inf", "nan", "all zero"],
)
def test_only_weights_that_can_train_are_offered(weights, option):
    assert static_option(weights, ("a", "b")) == option
