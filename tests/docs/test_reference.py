"""The reference has every public name, of whatever package."""

import importlib

import pytest

import recon
from scripts import reference

PAGES = reference.pages()


def test_there_is_a_page_for_each_package_with_public_names():
    assert {page.package for page in PAGES} >= {"recon", "recon.errors", "recon.methods", "recon.problems"}
    assert len({page.path for page in PAGES}) == len(PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.package)
def test_a_page_has_every_name_that_its_package_lists(page):
    face = importlib.import_module(page.package)
    listed = [name.rpartition(".")[2] for name in (entry.public for entry in page.listed)]
    assert sorted(listed) == sorted(reference.public_names(face))
    text = reference.markdown(page)
    assert all(f"[`{entry.public}`]" in text for entry in page.listed)


def test_every_name_is_documented_on_one_page():
    texts = {page.path: reference.markdown(page) for page in PAGES}
    for path, home in reference.documented(PAGES):
        assert sum(text.count(f"::: {home}\n") for text in texts.values()) == 1, home
        assert f"::: {home}\n" in texts[path]


def test_a_new_name_appears_by_itself(monkeypatch):
    monkeypatch.setattr(recon, "__all__", [*recon.__all__, "__version__"])
    (page,) = [page for page in reference.pages.__wrapped__() if page.package == "recon"]
    assert any(entry.public == "recon.__version__" for entry in page.listed)


def test_a_public_name_without_a_docstring_is_refused(monkeypatch):
    def silent():
        pass

    monkeypatch.setattr(recon, "silent", silent, raising=False)
    monkeypatch.setattr(recon, "__all__", [*recon.__all__, "silent"])
    with pytest.raises(SystemExit, match="no docstring"):
        reference.pages.__wrapped__()
