"""Import a user's file or module, with errors that point at the user's own line."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from recon.errors import ProblemError, ReconError, UnknownNameError
from recon.support.user_code import user_frame

_problem_folders: set[Path] = set()


def import_target(target: str) -> ModuleType:
    """The module behind `path/to/file.py` or `package.module`."""
    if target.endswith(".py") or "/" in target or "\\" in target:
        return _import_file(target)
    return _import_module(target)


def functions_of(module: ModuleType) -> list[str]:
    """The functions that the module itself defines."""
    functions = inspect.getmembers(module, inspect.isfunction)
    return [name for name, function in functions if function.__module__ == module.__name__]


def definitions_of(module: ModuleType) -> list[str]:
    """The functions and classes that the module itself defines."""
    classes = inspect.getmembers(module, inspect.isclass)
    return functions_of(module) + [name for name, cls in classes if cls.__module__ == module.__name__]


def call_in_module(module: ModuleType, name: str, options: Mapping[str, Any]) -> Any:
    """What the module's function returns for these options; anything that is not a function is returned as it is."""
    value = getattr(module, name)
    if not callable(value):
        return value
    with _user_code(f"Calling {name}() of {module.__file__}"):
        return value(**options)


def _import_file(target: str) -> ModuleType:
    path = Path(target).expanduser().resolve()
    if path.suffix != ".py" or not path.is_file():
        neighbours = map(str, sorted(Path(target).parent.glob("*.py")))
        raise UnknownNameError("Python file", target, neighbours, f"Paths are relative to {Path.cwd()}.")
    _put_first(path.parent)
    _forget_namesakes(path.parent)
    _problem_folders.add(path.parent)
    name = _module_name(path)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # true of every .py file
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _user_code(f"Importing {target}"):
            spec.loader.exec_module(module)
    except ReconError:
        sys.modules.pop(name, None)
        raise
    return module


def _import_module(name: str) -> ModuleType:
    _put_first(Path.cwd())  # as `python -m` does: a console script's sys.path lacks the current folder
    try:
        with _user_code(f"Importing {name}"):
            return importlib.import_module(name)
    except ProblemError as error:
        missing = error.__cause__.name if isinstance(error.__cause__, ModuleNotFoundError) else None
        if missing is None or not f"{name}.".startswith(f"{missing}."):
            raise  # the module exists, but one of its own imports is missing
        neighbours = sorted(file.stem for file in Path.cwd().glob("*.py"))
        hint = f"Looked in {Path.cwd()} and among the installed packages. To name a file, write its .py too."
        raise UnknownNameError("module", name, neighbours, hint) from None


def _put_first(folder: Path) -> None:
    # For good, as `python file.py` does, not only while importing: the imports inside make_model() come
    # later, and data loader workers that are spawned find the file's classes by sys.path.
    sys.path[:] = [str(folder), *(entry for entry in sys.path if entry != str(folder))]


def _forget_namesakes(folder: Path) -> None:
    # Two problems in one process may both have a `model.py` beside them; each must get its own.
    others = _problem_folders - {folder}
    for name in {neighbour.stem for neighbour in folder.iterdir()} & set(sys.modules):
        file = Path(getattr(sys.modules[name], "__file__", None) or "")
        home = file.parent.parent if file.stem == "__init__" else file.parent
        if home in others:
            for module in [module for module in sys.modules if f"{module}.".startswith(f"{name}.")]:
                del sys.modules[module]


def _module_name(path: Path) -> str:
    # The plain name lets other processes unpickle the file's classes; a file named like a module that is
    # already imported must not replace it.
    try:
        found = importlib.util.find_spec(path.stem)
    except (ImportError, ValueError):
        found = None
    if found is not None and found.origin == str(path):
        return path.stem
    return f"{path.stem}_{zlib.crc32(str(path).encode()):08x}"


@contextmanager
def _user_code(what: str) -> Iterator[None]:
    try:
        yield
    except ReconError:
        raise  # already says what is wrong
    except (Exception, SystemExit) as error:
        # str() of a syntax error repeats the file, without its folder.
        message = error.msg if isinstance(error, SyntaxError) else str(error)
        raise ProblemError(f"{what} raised {type(error).__name__}: {message}{_user_line(error)}") from error


def _user_line(error: BaseException) -> str:
    """The deepest line that is neither in a library nor in recon, as ` (file, line n)`."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}, line {error.lineno})"
    frame = user_frame(error)
    return "" if frame is None else f" ({frame.filename}, line {frame.lineno})"
