"""Shells of one model, lent to one user at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from torch import nn

from modmeta.backbone.apart import apart

Key = tuple[str | None, str | None]


class ShellPool:
    """Keeps the shells of a model that are not in use, by the cuts between which they run.

    A shell is written into while it runs, so neither two threads nor a slot that runs the backbone again may
    share one. Copies and pickles of a pool are empty: shells hold closures, and the tensors of their model.
    """

    def __init__(self) -> None:
        self._idle: dict[Key, list[nn.Module]] = {}

    @contextmanager
    def lend(self, key: Key, build: Callable[[], nn.Module]) -> Iterator[nn.Module]:
        """Give a shell for the cuts ``key`` to this context alone, built if none is idle."""
        idle = self._idle.setdefault(key, [])
        try:
            shell = idle.pop()
        except IndexError:
            shell = apart(build)
        try:
            yield shell
        finally:
            idle.append(shell)

    def clear(self) -> None:
        """Drop all shells, those in use too when they come back."""
        self._idle = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_idle": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()
