"""A registry of named things that the package, its plug-ins and its users can all add to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points
from inspect import signature
from types import NoneType, UnionType
from typing import Any, Generic, TypeVar, get_args, get_type_hints

from modmeta.errors import ModmetaError, unknown

T = TypeVar("T")
R = TypeVar("R")


class Registry(Generic[T]):
    """Names for objects of one sort.

    A name is added by the decorator :meth:`register`, or by an installed package through an entry
    point, which is imported only when its name is first asked for.

    Args:
        noun: what is registered, for messages (``"module"``).
        group: the entry-point group through which packages add names, if there is one.
    """

    def __init__(self, noun: str, group: str | None = None) -> None:
        self.noun = noun
        self.group = group
        self._items: dict[str, T] = {}

    def register(self, name: str, *, override: bool = False) -> Callable[[R], R]:
        """Return a decorator that files its argument under ``name``.

        Raises:
            ModmetaError: if another object has the name and ``override`` is false.
        """

        def add(item: R) -> R:
            known = self._items.get(name)
            if known is not None and not override and not _same_source(known, item):
                raise ModmetaError(
                    f"{self.noun} {name!r} is registered already by {_source(known)}; "
                    f"choose another name or pass override=True"
                )
            self._items[name] = item  # type: ignore[assignment]
            return item

        return add

    def get(self, name: str) -> T:
        """Return what is registered under ``name``.

        Raises:
            ModmetaError: if the name is unknown (with the nearest one) or its plug-in fails to import.
        """
        if name not in self._items:
            entry = self._entry_points().get(name)
            if entry is None:
                raise unknown(self.noun, name, self.names())
            try:
                item = entry.load()
            except Exception as error:
                raise ModmetaError(
                    f"{self.noun} {name!r} could not be imported from {entry.value}: {type(error).__name__}: {error}"
                ) from error
            self._items.setdefault(name, item)
        return self._items[name]

    def make(self, name: str, /, *arguments: Any, **options: Any) -> Any:
        """Call what is registered under ``name``.

        Args:
            name: its name.
            *arguments: what the program gives it.
            **options: what the user gives it.

        Raises:
            ModmetaError: if the name or an option is unknown, or its value of another type.
        """
        maker: Any = self.get(name)
        parameters = list(signature(maker).parameters)[len(arguments) :]
        hints = get_type_hints(getattr(maker, "__init__", maker) if isinstance(maker, type) else maker)
        for option, value in options.items():
            if option not in parameters:
                raise unknown(f"option of {self.noun} {name!r}:", option, parameters)
            hint = hints.get(option, Any)
            if not suits(value, hint):
                wanted = getattr(hint, "__name__", hint)
                raise ModmetaError(f"option {option!r} of {self.noun} {name!r} is {value!r}; give {wanted}")
        return maker(*arguments, **options)

    def names(self) -> list[str]:
        """Return every name, those of plug-ins that are not imported yet included."""
        return sorted({*self._items, *self._entry_points()})

    def __contains__(self, name: object) -> bool:
        return name in self._items or name in self._entry_points()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def _entry_points(self) -> dict[str, EntryPoint]:
        if self.group is None:
            return {}
        return {entry.name: entry for entry in entry_points(group=self.group)}


def _source(item: object) -> str:
    return f"{getattr(item, '__module__', '?')}.{getattr(item, '__qualname__', item)}"


def _same_source(known: object, item: object) -> bool:
    # A notebook cell that is run again defines its class anew; that is an edit, not a clash.
    return _source(known) == _source(item)


def suits(value: object, hint: Any) -> bool:
    """Return whether a value of a configuration is of a type; types other than plain ones and unions of them pass."""
    types = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if not all(each in (int, float, bool, str, NoneType) for each in types):
        return True
    if type(value) is int:
        return int in types or float in types
    return type(value) in types
