"""Private copies of a model's modules that share its tensors, to run it in parts and with other tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from modmeta.backbone.norm_gradients import differentiate_statistics
from modmeta.backbone.overrule import overrule, replaced

Rerun = Callable[[Tensor], Tensor]
"""The module that a slot sits on: run again, on another input, in the midst of the same pass."""

Slot = Callable[[Tensor, Tensor, Rerun], Tensor]
Observer = Callable[[Tensor], Mapping[str, Tensor] | None]

RESUME = "modmeta_resume"  # buffer of the cut module that holds the activations to go on from


class _Stop(Exception):
    """Leaves the forward pass of a model with the output of the module it was to stop at."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


def share(model: nn.Module) -> nn.Module:
    """Return a copy of the module tree in eval mode whose tensors are ``model``'s own storage.

    ``functional_call`` writes into the modules while it runs; on such a copy nobody else sees that. In-place
    updates of the model show in the copy. Parameters are detached aliases, so no gradient ever reaches
    the model.
    """
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    shell = copy.deepcopy(model, memo).eval()
    differentiate_statistics(shell)
    _forget_caches(shell)
    return shell


def _forget_caches(shell: nn.Module) -> None:
    # In eval mode levit and its kin keep what they computed from a weight, whatever an overlay says later.
    caches = [
        value
        for module in shell.modules()
        for name, value in vars(module).items()
        if name.endswith("_cache") and isinstance(value, dict)
    ]

    def forget(*_args: Any) -> None:
        for cache in caches:
            cache.clear()

    if caches:
        shell.register_forward_pre_hook(forget)
        shell.register_forward_hook(forget, always_call=True)


def resume_at(
    model: nn.Module, name: str, skipped: Mapping[str, tuple[int, ...]], dense: bool
) -> list[Callable[[], None]]:
    """Make a shared copy start at the output of module ``name``, and return what undoes it.

    The modules stay where they are, as models read attributes of theirs (``patch_embed.grid_size`` in swin);
    only their ``forward`` is overruled. Calling the model then goes through the motions up to the cut. What
    the skipped modules return is NaN: should anything behind the cut depend on it, that shows.

    Args:
        model: a copy made by :func:`share`.
        name: module whose output is taken from its buffer ``modmeta_resume``.
        skipped: modules that need not run, with their output shapes without batch.
        dense: whether skipped modules must return memory of their own, because the model writes into it.
    """
    cut = model.get_submodule(name)
    cut.register_buffer(RESUME, None, persistent=False)

    def resume(*_args: Any, **_kwargs: Any) -> Tensor:
        return cut.get_buffer(RESUME)

    def skip(shape: tuple[int, ...]) -> Callable[..., Tensor]:
        def nothing(*_args: Any, **_kwargs: Any) -> Tensor:
            hidden = cut.get_buffer(RESUME)
            return _nothing(hidden, *shape).clone() if dense else _nothing(hidden, *shape)

        return nothing

    undo = [overrule(cut, resume)]
    undo += [overrule(model.get_submodule(other), skip(shape)) for other, shape in skipped.items()]
    return undo


def stop_at(model: nn.Module, name: str) -> None:
    """Make a shared copy end at module ``name``: :func:`call` then returns that module's output."""

    def leave(_module: nn.Module, _args: Any, output: Tensor) -> None:
        raise _Stop(output)

    model.get_submodule(name).register_forward_hook(leave)


def call(model: nn.Module, x: Tensor, tensors: Mapping[str, Tensor], start: str | None, image_size: int) -> Tensor:
    """Run a shared copy with some of its tensors replaced.

    Args:
        model: a copy made by :func:`share`.
        x: prepared images (B, 3, H, W), or the activations at ``start``.
        tensors: replacements by full tensor name.
        start: the module that the copy was made to resume at, if any.
        image_size: height and width of the images, in pixels.
    """
    replaced = dict(tensors)
    if start is not None:
        replaced[f"{start}.{RESUME}"] = x
        x = _nothing(x, 3, image_size, image_size)
    try:
        output: Tensor = functional_call(model, replaced, (x,)) if replaced else model(x)
    except _Stop as stop:
        return stop.output
    return output


def _nothing(like: Tensor, *shape: int) -> Tensor:
    """Return a NaN for each element of a batch of ``shape``, all in one place in memory."""
    return like.new_full((), torch.nan).expand(like.shape[0], *shape)


@contextmanager
def hooked(model: nn.Module, slots: Mapping[str, Slot], observers: Mapping[str, Observer]) -> Iterator[None]:
    """Let ``observers`` and ``slots`` act on the modules of a shared copy inside the context."""
    undo = []
    for name in {**slots, **observers}:
        module = model.get_submodule(name)
        undo.append(overrule(module, _hooked_forward(module, slots.get(name), observers.get(name))))
    try:
        yield
    finally:
        for undo_one in undo:
            undo_one()


def _hooked_forward(module: nn.Module, slot: Slot | None, observer: Observer | None) -> Callable[..., Tensor]:
    plain = module.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        local = observer(x) if observer is not None else None

        def run(x: Tensor) -> Tensor:
            with replaced(module, local or {}):
                y: Tensor = plain(x, *args, **kwargs)
            return y

        y = run(x)
        return slot(x, y, run) if slot is not None else y

    return forward
