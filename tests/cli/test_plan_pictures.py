import pytest

from tests.cli.test_cli import PROBLEM
from tests.maps.test_conflict_map import make_map

PLAN = "plan tiny.py:problem --map map.json --top-k 2"


@pytest.fixture
def files(tmp_path):
    (tmp_path / "tiny.py").write_text(PROBLEM)
    make_map(layers=("conv", "norm", "mix"), tasks=("up", "down")).save(tmp_path / "map.json")
    return tmp_path


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_the_frontier_as_a_table_and_as_pictures(command, files):
    code, out, err = command(f"{PLAN} --frontier")
    assert code == 0, err
    chosen = [line for line in out.splitlines() if line.startswith(">")]
    assert len(chosen) == 1 and "top_k=2" in chosen[0] and "top_k=3" in out
    assert "Saved frontier.png and network.png." in out
    assert is_png(files / "frontier.png") and is_png(files / "network.png")


def test_pictures_by_name(command, files):
    (files / "out").mkdir()
    code, out, err = command(f"{PLAN} --frontier out/a.png")
    assert code == 0, err
    assert is_png(files / "out" / "a.png") and is_png(files / "out" / "network.png")
    code, out, err = command(f"{PLAN} --frontier a.png --picture b.png")
    assert code == 0, err
    assert "Saved a.png and b.png." in out
    assert sorted(path.name for path in files.glob("*.png")) == ["a.png", "b.png"]


def test_plain_values(ask):
    data = ask(f"{PLAN} --frontier")
    assert [point["selector"] for point in data["frontier"][:3]] == ["top_k=1", "top_k=2", "top_k=3"]
    assert [point["selector"] for point in data["frontier"] if point["chosen"]] == ["top_k=2"]
    assert data["pictures"] == ["frontier.png", "network.png"]
    assert "frontier" not in ask(PLAN)


def test_layers_by_name_can_be_drawn_without_a_map(ask, files):
    data = ask("plan tiny.py:problem --layers mix --picture")
    assert data["pictures"] == ["network.png"] and is_png(files / "network.png")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("plan tiny.py:problem --layers mix --frontier", "--frontier needs --map MAP"),
        (f"{PLAN} --picture network.pdf", "Give a name that ends in .png"),
        (f"{PLAN} --frontier map.json", "Give a name that ends in .png"),
        (f"{PLAN} --picture missing.py/network.png", None),
    ],
)
def test_what_is_refused(refused, files, line, words):
    (files / "missing.py").write_text("")
    refused(line, words or "missing.py is not a folder")


def test_another_file_is_not_overwritten(refused, files):
    (files / "other.png").write_text("not a picture")
    refused(f"{PLAN} --picture other.png", "other.png holds something else")
