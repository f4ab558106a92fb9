"""Gradients of the unadapted modules on two halves of the support, for the indicators."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from modmeta.adaptation.inner_loop import detached
from modmeta.adapters import AdaptedBackbone, State


def split_half_gradients(
    model: AdaptedBackbone, state: State, images: Tensor, losses: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Return per learning unit the gradients ``(2, P)`` of the loss on every other support image.

    One forward pass serves both halves; the images are sorted by class, so each half holds all classes that
    have two images or more.

    Args:
        model: backbone and units.
        state: the state at which to take the gradients.
        images: support images ``(S, 3, H, W)``.
        losses: from features ``(S, D)`` to a loss per image ``(S,)``.
    """
    units = [unit for unit in model.units if unit.learns]
    if not units or len(images) < 2:
        return {}
    start = model.cut_before(units)
    gates = {unit.name: 1.0 for unit in units}
    state = detached(state)
    with torch.no_grad():
        hidden = images if start is None else model(images, state, {}, stop=start)
    with torch.enable_grad():
        leaves = {name: state[name].requires_grad_() for unit in units for name in model.learned_names(unit)}
        value = losses(model(hidden, state | leaves, gates, start=start))
        halves = [
            torch.autograd.grad(value[half::2].mean(), list(leaves.values()), retain_graph=half == 0, allow_unused=True)
            for half in (0, 1)
        ]
    found: dict[str, Tensor] = {}
    for unit in units:
        rows = []
        for half in halves:
            own = [
                (torch.zeros_like(leaf) if g is None else g).flatten()
                for (name, leaf), g in zip(leaves.items(), half, strict=True)
                if name.startswith(f"{unit.name}|")
            ]
            rows.append(torch.cat(own))
        found[unit.name] = torch.stack(rows).detach()
    return found
