"""``modules``: the registered adapter modules, read from their source so that nothing heavy is imported."""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from rich.table import Table

from modmeta.commands.plugins import resolve_file
from modmeta.evaluation.terminal import console

GROUP = "modmeta.modules"
_UNKNOWN = "-"


@dataclass(frozen=True)
class Entry:
    """What is known of a module without importing it.

    Attributes:
        name: the name that configurations use.
        kinds: the kinds of site that it acts on.
        summary: first line of its docstring.
        origin: where it comes from.
    """

    name: str
    kinds: str
    summary: str
    origin: str


def run(options: argparse.Namespace) -> int:
    """List the modules; with a backbone or units, where they act and what they cost."""
    if options.backbone or options.units:
        return int(import_module("modmeta.commands.anatomy").run(options))
    table = Table(title="adapter modules")
    for heading in ("name", "acts on", "what it is", "from"):
        table.add_column(heading)
    for entry in sorted([*installed(), *in_files(options.modules)], key=lambda entry: entry.name):
        table.add_row(entry.name, entry.kinds, entry.summary, entry.origin)
    console().print(table)
    return 0


def installed() -> Iterator[Entry]:
    """Yield the modules that installed packages offer."""
    for point in entry_points(group=GROUP):
        module, _, attribute = point.value.partition(":")
        source = _source(module)
        classes = {} if source is None else _classes(source)
        yield _entry(point.name, classes.get(attribute), point.value)


def in_files(names: list[str]) -> Iterator[Entry]:
    """Yield the modules that user files register with ``@register_module``."""
    for name in names:
        path = resolve_file(name)
        for cls in _classes(path).values():
            registered = _registered_name(cls)
            if registered is not None:
                yield _entry(registered, cls, name)


def _entry(name: str, cls: ast.ClassDef | None, origin: str) -> Entry:
    if cls is None:
        return Entry(name, _UNKNOWN, _UNKNOWN, origin)
    summary = (ast.get_docstring(cls) or _UNKNOWN).splitlines()[0]
    return Entry(name, _kinds(cls), summary, origin)


def _source(module: str) -> Path | None:
    """Return the source file of a module without importing the packages that it lies in."""
    top, *rest = module.split(".")
    try:
        spec = find_spec(top)
        name = top
        for part in rest:
            if spec is None or spec.submodule_search_locations is None:
                return None
            name = f"{name}.{part}"
            spec = PathFinder.find_spec(name, spec.submodule_search_locations)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin)


def _classes(path: Path) -> dict[str, ast.ClassDef]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        print(f"modmeta: warning: {path} cannot be read ({error})", file=sys.stderr)
        return {}
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _kinds(cls: ast.ClassDef) -> str:
    for node in cls.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        if value is not None and any(isinstance(t, ast.Name) and t.id == "kinds" for t in targets):
            constants = (each.value for each in ast.walk(value) if isinstance(each, ast.Constant))
            return ", ".join(sorted(str(constant) for constant in constants)) or _UNKNOWN
    return _UNKNOWN


def _registered_name(cls: ast.ClassDef) -> str | None:
    for decorator in cls.decorator_list:
        if isinstance(decorator, ast.Call) and decorator.args:
            function, argument = decorator.func, decorator.args[0]
            called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            if called == "register_module" and isinstance(argument, ast.Constant):
                return str(argument.value)
    return None
