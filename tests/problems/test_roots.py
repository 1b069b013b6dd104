import pytest

from recon.errors import ProblemError, UsageError
from recon.problems.files.roots import open_root, require_files


def test_no_root_and_no_such_root(tmp_path):
    with pytest.raises(UsageError, match=r"faces reads its data set .* --data-root DIR .* Expected is a\."):
        open_root("faces", None, "Expected is a.")
    with pytest.raises(ProblemError, match=r"There is no folder .*nowhere to read faces from\. Expected is a\."):
        open_root("faces", tmp_path / "nowhere", "Expected is a.")


@pytest.mark.parametrize("absolute", [True, False])
def test_missing_files_are_named_within_the_root(tmp_path, monkeypatch, absolute):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "faces").mkdir(parents=True)
    (tmp_path / "data" / "faces" / "there.txt").touch()
    root = open_root("faces", tmp_path / "data" if absolute else "data", "")
    require_files("faces", root, ["faces/there.txt", root / "faces" / "there.txt"], "")
    for path in ("faces/a.txt", root / "faces" / "a.txt"):
        with pytest.raises(ProblemError, match=r"data lacks files of faces: faces/a\.txt\. Get it\."):
            require_files("faces", root, [path, "faces/there.txt"], "Get it.")
