"""A user's own Python files: imported before anything asks for the names that they register."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from modmeta.errors import ModmetaError


def resolve_file(name: str, beside: Path | None = None) -> Path:
    """Return the absolute path of a user's file, looked for in the current folder, then in ``beside``.

    Raises:
        ModmetaError: if it does not exist or is no Python file.
    """
    tried = [Path(name)] if beside is None else [Path(name), beside / name]
    for path in tried:
        if path.is_file():
            if path.suffix != ".py" or not path.stem.isidentifier():
                raise ModmetaError(f"modules: {path} is no importable Python file; name it like my_module.py")
            return path.resolve()
    raise ModmetaError(f"modules: the file {name} does not exist; give the path of a .py file")


def import_files(paths: Iterable[Path]) -> None:
    """Import files under their own names, so that ``my_module.MyClass`` works everywhere.

    Raises:
        ModmetaError: if a file fails to import, or a module of the same name exists elsewhere.
    """
    for path in paths:
        folder = str(path.parent)
        if folder not in sys.path:
            # Last, so that nothing in the user's folder stands in for an installed package.
            sys.path.append(folder)
        _refuse_other(path)
        try:
            import_module(path.stem)
        except ModmetaError:
            raise
        except Exception as error:
            raise ModmetaError(f"modules: {path} cannot be imported: {type(error).__name__}: {error}") from error


def _refuse_other(path: Path) -> None:
    loaded = sys.modules.get(path.stem)
    if loaded is None:
        spec = find_spec(path.stem)
        origin = None if spec is None else spec.origin
    else:
        origin = getattr(loaded, "__file__", None)
    if origin is None or Path(origin).resolve() != path:
        raise ModmetaError(f"modules: {path} has the name of another module ({path.stem}); rename the file")
