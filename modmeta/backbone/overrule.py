"""Temporary changes to a module of a shell: another forward, other tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from modmeta.errors import unknown


def overrule(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Let ``module`` compute ``forward`` from now on, and return the function that undoes this."""
    before = vars(module).get("forward")
    module.forward = forward

    def undo() -> None:
        if before is None:
            del module.forward
        else:
            module.forward = before

    return undo


@contextmanager
def replaced(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Give ``module`` other tensors, by local name, inside the context.

    ``functional_call`` cannot do this from within a module's forward, as it would call the module again.

    Raises:
        ModmetaError: if the module has no such tensor.
    """
    stores: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for name, tensor in tensors.items():
            holder: Any = module._parameters if name in module._parameters else module._buffers
            if name not in holder:
                known = {**module._parameters, **module._buffers}
                raise unknown("tensor", name, known, where=type(module).__name__)
            stores.append((holder, name, holder[name]))
            holder[name] = tensor
        yield
    finally:
        for holder, name, before in reversed(stores):
            holder[name] = before
