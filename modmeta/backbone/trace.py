"""What one forward pass calls, in which order, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Call:
    """The calls of one module during one forward pass.

    Attributes:
        entered: tick at which its first call began.
        left: tick at which its last call ended.
        count: how often it was called.
        numel: elements of its tensor outputs, over all calls.
        output: its last output when that is one tensor, else None.
        args: what it was last called with, by position.
        kwargs: what it was last called with, by name.
    """

    entered: int
    left: int = -1
    count: int = 0
    numel: int = 0
    output: Tensor | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def per_image(self, batch: int) -> tuple[int, ...] | None:
        """Return the output's shape without the batch, or None if it is no (B, ...) tensor of one call."""
        if self.count != 1 or self.output is None or self.output.ndim < 2 or self.output.shape[0] != batch:
            return None
        return tuple(self.output.shape[1:])


@torch.no_grad()
def trace(model: nn.Module, images: Tensor) -> dict[str, Call]:
    """Run ``model`` once and return the calls of every module that was called, by module path.

    Args:
        model: the model; hooks are put on its modules and taken off again.
        images: its input, (B, 3, H, W).
    """
    calls: dict[str, Call] = {}
    clock = count()
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = calls.setdefault(name, Call(entered=next(clock)))
            call.count += 1
            call.args, call.kwargs = args, kwargs

        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            call = calls[name]
            call.left = next(clock)
            call.output = output if isinstance(output, Tensor) else None
            call.numel += output.numel() if isinstance(output, Tensor) else 0

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))

    for name, module in model.named_modules():
        watch(name, module)
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def parent(name: str) -> str:
    """Return the path of the module that holds the module or tensor ``name``."""
    return name.rpartition(".")[0]


def nearest_called(name: str, calls: dict[str, Call]) -> str:
    """Return ``name`` or else its closest ancestor that was called; the model itself is ``""``."""
    while name not in calls:
        name = parent(name)
    return name
