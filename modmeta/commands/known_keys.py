"""What a configuration says is compared with the keys that there are, at every depth, before anything is made of it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from functools import reduce
from operator import or_
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from modmeta.commands.explain import loaded_class
from modmeta.errors import ModmetaError, nearest

_PLAIN = (int, float, bool, str, bytes, dict, list, tuple, set, object, NoneType)


@dataclass(frozen=True)
class Key:
    """What a key takes.

    Attributes:
        hint: the type of its value; ``Any`` where that is not known.
        default: its default.
    """

    hint: Any
    default: Any = None


class KnownKeys:
    """The keys of a command, by which what files and options say is checked one after the other.

    jsonargparse checks keys as well, but passes over what is empty, such as ``sourse: {}``, and takes ``null`` for any
    key of a file. What only it finds, such as values of another type, is left to it.

    Args:
        keys: the full names of all keys, such as ``data.root``; those of classes and records are looked up there.
    """

    def __init__(self, keys: Mapping[str, Key]) -> None:
        self._names = list(keys)
        self._tree = _nested(keys)
        self._paths: dict[str, str] = {}

    def check_file(self, content: Mapping[str, Any]) -> None:
        """Refuse keys that do not exist, ``null`` where a value is needed, and numbers that are not finite.

        Raises:
            ModmetaError: naming the full key and the nearest right one.
        """
        self._shorthand = False
        self._children(content, self._tree, "")

    def check_option(self, name: str, value: Any) -> None:
        """Refuse the same in the value of an option; whether there is such an option is left to jsonargparse."""
        if name.partition(".")[0] in self._tree and (
            value is None or isinstance(value, (list, Mapping, float)) or name.endswith(("model", "class_path"))
        ):
            self._shorthand = True
            self._children({name: value}, self._tree, "")

    def _children(self, content: Mapping[Any, Any], known: Mapping[str, Any], prefix: str) -> None:
        for full, value in content.items():
            name, _, rest = str(full).partition(".")
            if name not in known:
                raise ModmetaError(f"unknown key {prefix}{name}; {self._advice(prefix, name, known)}")
            inner, below = known[name], {rest: value} if rest else value
            if isinstance(inner, Key):
                self._value(below, inner, prefix + name)
            elif isinstance(below, Mapping):
                self._children(below, inner, f"{prefix}{name}.")
            elif below is None:
                raise ModmetaError(f"{prefix}{name}: expected keys, such as {next(iter(inner))}; got null")

    def _value(self, value: Any, key: Key, name: str) -> None:
        kinds = list(_kinds(key.hint))
        if value is None and key.default is not None and kinds and not {NoneType, Any} & set(kinds):
            wanted = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
            raise ModmetaError(f"{name}: expected {wanted}, got null")
        if isinstance(value, float) and not math.isfinite(value) and value != key.default:
            raise ModmetaError(f"{name}: expected a finite number, got {value}")
        if isinstance(value, list):
            members = [each for kind in kinds for each in get_args(kind)] or [Any]
            element = Key(reduce(or_, members), ...)
            for each in value:
                self._paths.pop(name, None)
                self._value(each, element, name)
        elif isinstance(value, str) and any(map(_is_class, kinds)):
            self._paths[name] = value
        elif isinstance(value, Mapping):
            self._mapping(value, kinds, name)

    def _mapping(self, value: Mapping[Any, Any], kinds: list[Any], name: str) -> None:
        classes: list[type] = [kind for kind in kinds if _is_class(kind)]
        record = next(filter(is_dataclass, classes), None)
        if record is not None:
            self._children(value, _arguments(record) or {}, f"{name}.")
        elif any(get_origin(kind) in (dict, Mapping) or kind in (Any, dict) for kind in kinds):
            for inner, each in value.items():
                self._value(each, Key(Any), f"{name}.{inner}")
        elif classes:
            self._class(value, classes, name)

    def _class(self, value: Mapping[Any, Any], bases: list[type], name: str) -> None:
        path = value.get("class_path", self._paths.get(name))
        if isinstance(path, str):
            self._paths[name] = path
        cls = _find(path, bases) if isinstance(path, str) else None
        arguments = None if cls is None else _arguments(cls)
        anything = Key(Any)
        # Where the class is not known here, or takes any argument, its keys are left to jsonargparse.
        known: dict[str, Any] = {"class_path": Key(str), "init_args": anything if arguments is None else arguments}
        if arguments is None:
            known["dict_kwargs"] = anything
        if self._shorthand:
            known |= arguments or dict.fromkeys(value, anything)
        self._children(value, known, f"{name}.")

    def _advice(self, prefix: str, name: str, known: Iterable[str]) -> str:
        close = nearest(name, known)
        if close is not None:
            return f"did you mean {prefix}{close}?"
        elsewhere = [full for full in self._names if full.rpartition(".")[2] == name]
        return f"did you mean {elsewhere[0]}?" if elsewhere else f"known: {', '.join(list(known)[:12])}"


def _nested(keys: Mapping[str, Key]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, key in keys.items():
        *groups, last = name.split(".")
        place = tree
        for group in groups:
            inner = place.get(group)
            if not isinstance(inner, dict):  # a group has a key of its own, too, which takes a file
                inner = place[group] = {}
            place = inner
        place.setdefault(last, key)
    return tree


def _arguments(cls: type) -> dict[str, Any] | None:
    """Return the arguments of a class, or None if it takes arguments that its signature does not name."""
    try:
        parameters = list(inspect.signature(cls).parameters.values())
        hints = get_type_hints(getattr(cls, "__init__"))  # noqa: B009
    except (NameError, TypeError, ValueError):
        return None
    if any(parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) for parameter in parameters):
        return None
    return {p.name: Key(hints.get(p.name, Any), ... if p.default is p.empty else p.default) for p in parameters}


def _find(path: str, bases: Iterable[type]) -> type | None:
    if "." in path:
        found = loaded_class(path)
        return found if isinstance(found, type) else None
    waiting = list(bases)
    while waiting:
        cls = waiting.pop()
        if cls.__name__ == path:
            return cls
        waiting += cls.__subclasses__()
    return None


def _kinds(hint: Any) -> Iterator[Any]:
    """Yield the members of a union of types, or the type itself."""
    if get_origin(hint) in (Union, UnionType):
        for each in get_args(hint):
            yield from _kinds(each)
    else:
        yield hint


def _is_class(kind: Any) -> bool:
    return isinstance(kind, type) and kind not in _PLAIN
