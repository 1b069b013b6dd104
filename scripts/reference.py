"""The pages of the reference: every name that a package of recon lists in `__all__`, whichever packages there are."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

ROOT = "recon"


@dataclass
class Name:
    """A public name: where users find it, where its docstring stands, and on which page."""

    public: str
    home: str
    page: str
    summary: str
    is_module: bool = False


@dataclass
class Page:
    """The page of one package: what it lists, and those of its names that no other page documents."""

    package: str
    summary: str
    listed: list[Name] = field(default_factory=list)

    @property
    def path(self) -> str:
        """Where the page lies in the documentation."""
        return page_of(self.package)


def page_of(package: str) -> str:
    """Where the page of a package lies in the documentation."""
    return f"reference/{package.partition('.')[2] or package}.md"


def faces() -> list[ModuleType]:
    """`recon`, and every package below it that lists public names; `recon.errors`, a file, has a page too."""
    root = importlib.import_module(ROOT)
    found = [importlib.import_module(f"{ROOT}.{module.name}") for module in pkgutil.iter_modules(root.__path__)]
    packages = [module for module in found if hasattr(module, "__path__") and getattr(module, "__all__", None)]
    return [root, *packages, importlib.import_module(f"{ROOT}.errors")]


def public_names(face: ModuleType) -> list[str]:
    """What a package lists; of a file without a list, its own classes and functions whose names are public."""
    listed = getattr(face, "__all__", None)
    if listed is not None:
        return sorted(listed, key=str.lower)
    own = (name for name, value in vars(face).items() if getattr(value, "__module__", "") == face.__name__)
    return [name for name in own if not name.startswith("_") and inspect.isclass(getattr(face, name))]


@cache
def pages() -> list[Page]:
    """All pages. A name that two packages list is documented on the page of the one that it is defined below."""
    modules = faces()
    packages = {module.__name__ for module in modules}
    homes = {module.__name__: {name: _home(module, name) for name in public_names(module)} for module in modules}
    made = []
    for module in modules:
        page = Page(module.__name__, _first_line(module))
        for name, home in homes[module.__name__].items():
            value = getattr(module, name)
            documented_on = home if inspect.ismodule(value) else _page_package(home, homes, packages)
            public = f"{module.__name__}.{name}"
            if public_at_root(homes, home):
                public = f"{ROOT}.{home.rpartition('.')[2]}"
            page.listed.append(
                Name(public, home, page_of(documented_on), _first_line(value), is_module=inspect.ismodule(value))
            )
        made.append(page)
    return made


def public_at_root(homes: dict[str, dict[str, str]], home: str) -> bool:
    """Whether `recon` itself lists what is defined there."""
    return home in homes[ROOT].values()


def _page_package(home: str, homes: dict[str, dict[str, str]], packages: set[str]) -> str:
    """The package that lists this name and that it is defined below; the first that lists it, if there is none."""
    listing = [package for package in packages if home in homes[package].values()]
    below = [package for package in listing if home.startswith(f"{package}.")]
    return max(below, key=len) if below else min(listing, key=len)


def _home(module: ModuleType, name: str) -> str:
    """The full name of a public name where it is defined."""
    value = getattr(module, name)
    if inspect.ismodule(value):
        return value.__name__
    if inspect.isclass(value) or inspect.isroutine(value):
        return f"{value.__module__}.{value.__qualname__}"
    return f"{module.__name__}.{name}"  # a constant or a type: found by the names in the source


def _first_line(value: Any) -> str:
    if not (inspect.ismodule(value) or inspect.isclass(value) or inspect.isroutine(value)):
        return ""
    text = inspect.getdoc(value) or ""
    if not text:
        raise SystemExit(f"{value!r} is public, but has no docstring.")
    return " ".join(text.split("\n\n")[0].split())


def markdown(page: Page) -> str:
    """The page as mkdocstrings reads it: a table of what the package lists, then the docstrings."""
    lines = [f"# {page.package}", "", page.summary, "", "| name | |", "| --- | --- |"]
    for name in page.listed:
        target = name.page.rpartition("/")[2] + ("" if name.is_module else f"#{name.home}")
        cell = name.summary.replace("|", "\\|")
        lines.append(f"| [`{name.public}`]({target}) | {cell} |")
    for name in page.listed:
        if name.page == page.path and not name.is_module:
            lines += ["", f"::: {name.home}", "    options:", f"      heading: {name.public}"]
    return "\n".join(lines) + "\n"


def index(found: list[Page]) -> str:
    """The first page of the reference: the packages."""
    lines = ["# Reference", "", "Every public name of recon, by the package that it is imported from.", ""]
    lines += [f"- [`{page.package}`]({page.path.rpartition('/')[2]}): {page.summary}" for page in found]
    lines += ["", "[On the command line](command_line.md): the verbs and their options."]
    return "\n".join(lines) + "\n"


def documented(found: list[Page]) -> Iterator[tuple[str, str]]:
    """`(page, anchor)` of every public name."""
    for page in found:
        for name in page.listed:
            if not name.is_module:
                yield name.page, name.home
