import pytest
from torch import nn

from recon.errors import MapMismatchError, UnknownNameError, UsageError
from recon.maps.names import renamed
from recon.plans.matching import match
from tests.maps.test_conflict_map import make_map, score_map

NAMES = ("conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2")


def net(names=NAMES, **sizes):
    """A model of (2, 3) weights with these layers; `sizes` gives some of them another width."""
    model = nn.Module()
    for name in names:
        *path, last = name.split(".")
        parent = model
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, nn.Linear(sizes.get(name, 3), 2, bias=False))
    return model


def under(prefix, names=NAMES):
    return [f"{prefix}.{name}" for name in names]


def test_a_map_of_the_same_architecture_fits():
    found = match(make_map(layers=NAMES), net())
    assert (found.matched, found.missing, found.changed, found.hint) == (NAMES, (), (), "")
    assert found.warnings() == []


def test_layers_come_in_the_model_s_order_with_their_counts():
    cmap = make_map(layers=NAMES[::-1])
    found = match(cmap, net())
    assert found.matched == NAMES
    assert found.cmap.scores() == {name: cmap.scores()[name] for name in NAMES}


def test_what_the_model_lacks_and_what_has_other_shapes_is_reported():
    found = match(make_map(layers=(*NAMES, "gone", "away")), net(conv1=7))
    assert found.matched == NAMES
    assert found.missing == ("gone", "away")
    assert found.changed == ("conv1",)
    assert [line.partition(" layers ")[0] for line in found.warnings()] == ["2 of the map's 7", "1 of the 5 matched"]
    assert "gone, away" in found.warnings()[0] and "conv1" in found.warnings()[1]


def test_layers_of_the_model_that_the_map_lacks_are_not_shared():
    found = match(make_map(layers=NAMES[:2]), net())
    assert found.matched == NAMES[:2] and not found.missing


def test_a_map_without_shapes_has_no_changed_ones():
    assert match(score_map(dict.fromkeys(NAMES, 1)), net(conv1=7)).changed == ()


def test_no_match_fails():
    with pytest.raises(MapMismatchError, match=r"none of its 5 layers is in this model .*the model has head, tail"):
        match(make_map(layers=NAMES), net(("head", "tail")))


def test_no_match_gives_the_nearest_names():
    with pytest.raises(MapMismatchError, match=r"'encoder_conv' is like 'encoder.conv'"):
        match(make_map(layers=("encoder_conv",)), net(("encoder.conv", "head")))


@pytest.mark.parametrize(
    "map_names, model_names, old, new",
    [
        (NAMES, under("backbone"), "", "backbone"),
        (under("module"), NAMES, "module", ""),
        (under("backbone"), under("encoder.net"), "backbone", "encoder.net"),
        (under("a.b"), under("a.c"), "a.b", "a.c"),
        (NAMES, [*under("backbone"), "heads.x.conv1", "heads.y.conv1"], "", "backbone"),
    ],
)
def test_a_suggested_rename_makes_the_map_fit(map_names, model_names, old, new):
    cmap, model = make_map(layers=map_names), net(model_names)
    with pytest.raises(MapMismatchError) as error:
        match(cmap, model)
    assert f"--rename '{old}={new}'" in str(error.value) and f"rename={{{old!r}: {new!r}}}" in str(error.value)
    found = match(cmap, model, {old: new})
    assert len(found.matched) == len(NAMES) and not found.missing


def test_a_rename_is_suggested_where_few_layers_fit():
    found = match(make_map(layers=("conv1", *under("old", NAMES[1:]))), net(("conv1", *under("new", NAMES[1:]))))
    assert found.matched == ("conv1",)
    assert "--rename 'old=new'" in found.warnings()[0]


def test_no_rename_is_suggested_for_names_that_meet_by_chance():
    with pytest.raises(MapMismatchError) as error:
        match(make_map(layers=NAMES), net(("a.conv1", "b.norm", "c.fc")))
    assert "rename" not in str(error.value)


@pytest.mark.parametrize(
    "rename, name, expected",
    [
        ({"backbone": "encoder.net"}, "backbone.conv", "encoder.net.conv"),
        ({"backbone": "encoder"}, "backbone", "encoder"),
        ({"": "net"}, "conv", "net.conv"),
        ({"module": ""}, "module.conv", "conv"),
        ({"module.": ""}, "module.conv", "conv"),
        ({"a.b": "x"}, "a.b.c", "x.c"),
        ({"a": "x", "a.b": "y"}, "a.b.c", "y.c"),
        ({"a": "b", "b": "c"}, "a.d", "b.d"),
    ],
)
def test_renames_are_of_whole_components_and_the_longest_counts_once(rename, name, expected):
    others = [f"{old}.other".strip(".") for old in rename]  # every rename must hit something
    cmap = make_map(layers=[name, *(other for other in others if other != name)])
    assert renamed(cmap, rename).layers[0].name == expected


def test_a_rename_leaves_names_alone_that_only_begin_alike():
    cmap = renamed(make_map(layers=("layer1.conv", "layer10.conv", "player1.conv")), {"layer1": "x"})
    assert [layer.name for layer in cmap.layers] == ["x.conv", "layer10.conv", "player1.conv"]


def test_a_rename_leaves_the_given_map_as_it_was():
    cmap = make_map(layers=("a.conv",))
    renamed(cmap, {"a": "b"})
    assert cmap.layers[0].name == "a.conv"


def test_a_rename_that_hits_no_layer_names_the_nearest():
    with pytest.raises(UnknownNameError, match=r"named 'bakbone'. Did you mean 'backbone'"):
        match(make_map(layers=under("backbone")), net(), {"bakbone": ""})


def test_a_rename_that_makes_one_layer_of_two():
    with pytest.raises(MapMismatchError, match=r"one layer, 'c.conv', of the map's layers 'a.conv' and 'b.conv'"):
        match(make_map(layers=("a.conv", "b.conv")), net(("c.conv",)), {"a": "c", "b": "c"})


def test_a_rename_that_leaves_no_name():
    with pytest.raises(UsageError, match="leaves nothing"):
        match(make_map(layers=("conv", "fc")), net(("conv", "fc")), {"conv": ""})


def test_a_layer_under_another_path_of_the_same_module():
    model = net(("first", "fc"))
    model.again = model.first
    assert match(make_map(layers=("again", "fc")), model).matched == ("first", "fc")
    with pytest.raises(MapMismatchError, match="reached by two paths"):
        match(make_map(layers=("first", "again")), model)


def test_a_map_of_an_interrupted_profile_says_so():
    cmap = make_map(layers=NAMES)
    for layer in cmap.layers:
        layer.shapes = {"weight": [2, 3]}
    assert not cmap.unfinished and not match(cmap, net()).warnings()
    cmap.made_by |= {"finished": False, "epoch": 2, "epochs": 5}
    (warning,) = match(cmap, net()).warnings()
    assert warning.startswith("The profile was interrupted in epoch 2 of 5")
