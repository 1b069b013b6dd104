"""recon profile --floor."""

import pytest

import recon

PROFILE = "profile digits --train-samples 512 --epochs 1"


@pytest.fixture
def files(tmp_path):
    return tmp_path


def test_the_floor_is_taken_unless_it_is_switched_off(command):
    for option, every, taken in (("", 12, 1), ("--floor 2", 2, 2), ("--floor off", None, 0)):
        code, _, err = command(f"{PROFILE} {option} --out map.json")
        assert code == 0, err
        cmap = recon.ConflictMap.load("map.json")
        assert cmap.made_by.get("floor_every") == every
        assert cmap.has_floor == (taken > 0)
        assert {layer.floor.observed[0] for layer in cmap.layers if layer.floor} == ({taken} if taken else set())


def test_a_finished_map_of_another_floor_is_not_taken_for_the_result(command):
    command(f"{PROFILE} --floor 2 --out map.json")
    code, _, err = command(f"{PROFILE} --floor 2 --out map.json --resume")
    assert (code, "nothing to resume" in err) == (0, True)
    code, _, err = command(f"{PROFILE} --floor off --out map.json --resume")
    assert (code, "nothing to resume" in err) == (0, False)
    assert not recon.ConflictMap.load("map.json").has_floor


@pytest.mark.parametrize("value", ["1", "0", "-3", "2.5", "often", "none"])
def test_a_floor_that_is_no_number_of_steps_is_refused(command, value):
    code, _, err = command(f"profile digits --floor={value} --out map.json")
    assert code == 2
    assert f"argument --floor: '{value}' is not a whole number of at least 2, auto or off" in err
