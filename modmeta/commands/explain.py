"""From jsonargparse's nested reports to one line: the full key, what is wrong, the nearest right one."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from typing import Any, get_type_hints

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import Logger

from modmeta.errors import ModmetaError, nearest

_LONGEST_VALUE = 60


def explain(message: str, keys: Iterable[str]) -> ModmetaError:
    """Return the user error for a report of jsonargparse.

    Args:
        message: the report, with newlines and nested reports.
        keys: the full keys that exist outside of the user's classes.
    """
    text = " ".join(message.split())
    known = list(keys)
    key = prefix = ""
    while True:
        if found := re.match(r'Parser key "([^"]+)": (.*)', text):
            key, text = prefix + found[1], found[2]
        inner = re.search(r"Problem with given class_path '([^']+)': (.*)", text)
        if inner is None:
            break
        cls = loaded_class(inner[1])
        # A configuration record is a plain mapping; any other class has its arguments under init_args.
        prefix = f"{key}." if is_dataclass(cls) else f"{key}.init_args."
        known += [prefix + name for name in argument_keys(cls)]
        text = inner[2]
    return ModmetaError(_describe(text, key, prefix, known))


def explain_interpolation(key: str | None, what: str, keys: Iterable[str]) -> ModmetaError:
    """Return the user error for a ``${...}`` that cannot be resolved.

    Args:
        key: the key whose value it is.
        what: OmegaConf's report.
        keys: the full keys that exist.
    """
    report = " ".join(what.split()).partition(" full_key:")[0]
    report = re.sub(r"^\w+ raised while resolving interpolation: ", "", report).strip('"')
    missing = re.search(r"Interpolation key '([^']+)' not found", report)
    close = nearest(missing[1], keys) if missing else None
    return ModmetaError(f"{key or 'config'}: {report}" + (f"; did you mean {close}?" if close else ""))


def argument_keys(cls: Any) -> Iterator[str]:
    """Yield the keys of a class's arguments, with those of the records among them."""
    if not isinstance(cls, type):
        return
    try:
        hints = get_type_hints(getattr(cls, "__init__"))  # noqa: B009
    except (NameError, TypeError):
        hints = {}
    for name in inspect.signature(cls).parameters:
        yield name
        if is_dataclass(hints.get(name)):
            yield from (f"{name}.{inner}" for inner in argument_keys(hints[name]))


def _describe(text: str, key: str, prefix: str, known: list[str]) -> str:
    if found := re.match(r"unrecognized arguments: (\S+)", text):
        if not found[1].startswith("-"):
            return f"unexpected word {found[1]!r}; options begin with --"
        return _unknown_key(prefix + found[1].lstrip("-").partition("=")[0], known)
    if found := re.match(r"Option '([^']+)' is not accepted", text):
        return _unknown_key(prefix + found[1], known)
    if found := re.match(r"(?:Group|Subcommand) '([^']+)' does not accept option '([^']+)'", text):
        return _unknown_key(f"{prefix}{found[1]}.{found[2]}", known)
    if found := re.search(r"the following arguments are required: ([^ ,]+)", text):
        return f"the key {prefix}{found[1]} is missing; give it in a configuration file or as an option"
    if found := re.search(r"Expected a dot import path string: (\S+)", text):
        return f"{key}: unknown class {found[1]!r}; {_advice(found[1], _class_names())}"
    if found := re.search(r"(No module named '[^']+'|module '\S+' has no attribute '\S+')", text):
        return f"{key}: {found[1]}; give a class that can be imported, or its file with --modules"
    if "Not a valid subclass of" in text or "Expected a path but" in text:
        return f"{key}: expected a class_path, such as ModularMetaLearner, with its arguments under init_args"
    if found := re.match(r"Expected an? (.+?)\.? Got value: (.+)", text):
        return f"{key}: expected {_type(found[1])}, got {_shorten(_own_part(found[2]))!r}"
    if found := re.match(r".*?Subtypes: (\[.*\]) Errors: .*? Given value: (.+)", text):
        kinds = _split(found[1][1:-1])
        return f"{key}: expected {' or '.join(map(_type, kinds))}, got {_shorten(_own_part(found[2]))}"
    return f"{key}: {_shorten(text, 300)}" if key else _shorten(text, 300)


def _unknown_key(key: str, known: list[str]) -> str:
    return f"unknown key {key}; {_advice(key, known, keys=True)}"


def _advice(name: str, known: Iterable[str], keys: bool = False) -> str:
    close = nearest(name, known)
    if close is not None:
        return f"did you mean {close}?"
    return "see `modmeta fit --help-all`" if keys else "give its full import path, or its file with --modules"


def _class_names() -> set[str]:
    """Return the short names of the classes that may be named in a configuration."""
    found: set[str] = set()
    waiting: list[type] = [LightningModule, Callback, Logger]
    while waiting:
        cls = waiting.pop()
        waiting += cls.__subclasses__()
        found.add(cls.__name__)
    return found


def loaded_class(path: str) -> Any:
    """Return what a full path names, if its module is loaded."""
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def _own_part(text: str) -> str:
    """Cut off what enclosing reports say behind the innermost one."""
    return re.split(r" - Expected an? | Given value type: ", text)[0]


def _split(kinds: str) -> list[str]:
    """Split a list of types at its outer commas."""
    return re.findall(r"(?:[^,\[]|\[[^\[\]]*(?:\[[^\]]*\][^\[\]]*)*\])+", kinds)


def _type(name: str) -> str:
    name = re.sub(r"<class '([^']+)'>", r"\1", name.strip().rstrip("."))
    if found := re.fullmatch(r"typing\.Literal\[(.*)\]", name):
        return f"one of {found[1]}"
    return {"NoneType": "null", "collections.abc.Sequence": "a list"}.get(name, name)


def _shorten(text: str, longest: int = _LONGEST_VALUE) -> str:
    return text if len(text) <= longest else text[: longest - 3] + "..."
