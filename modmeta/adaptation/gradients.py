"""Gradients of the unadapted modules on parts of the support, for the indicators."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from modmeta.adaptation.inner_loop import detached
from modmeta.adapters import AdaptedBackbone, State


def support_gradients(
    model: AdaptedBackbone,
    state: State,
    images: Tensor,
    losses: Sequence[Callable[[Tensor], Tensor]],
    groups: int = 2,
) -> list[dict[str, Tensor]]:
    """Return for each loss what groups of support images contribute to the gradient of every learning unit.

    Group ``g`` holds every ``groups``-th image from the ``g``-th on: the images are sorted by class, so a group is
    a mixture of classes. The contributions ``(G, P)`` of a unit add up to the gradient of the mean loss. A group's
    is what goes through its own images' features, so each loss costs one backward pass over the support, however
    many groups there are; all share one forward pass.

    Args:
        model: backbone and units.
        state: the state at which to take the gradients.
        images: support images ``(S, 3, H, W)``.
        losses: each from features ``(S, D)`` to a loss per image ``(S,)``, which may depend on the other images.
        groups: number of groups, a power of two; halved until there are as many images.

    Returns:
        per loss the contributions by unit; empty for fewer than two images.
    """
    units = [unit for unit in model.units if unit.learns]
    if not units or len(images) < 2:
        return [{} for _ in losses]
    while groups > len(images):
        groups //= 2
    start = model.cut_before(units)
    gates = {unit.name: 1.0 for unit in units}
    state = detached(state)
    with torch.no_grad():
        hidden = images if start is None else model(images, state, {}, stop=start)
    found = []
    with torch.enable_grad():
        leaves = {name: state[name].requires_grad_() for unit in units for name in model.learned_names(unit)}
        parts = [model(hidden[group::groups], state | leaves, gates, start=start) for group in range(groups)]
        features = parts[0].new_empty(len(images), parts[0].shape[1])
        for group, part in enumerate(parts):
            features[group::groups] = part.detach()
        for number, loss in enumerate(losses):
            x = features.clone().requires_grad_()
            (signal,) = torch.autograd.grad(loss(x).mean(), x)
            by_group = [
                torch.autograd.grad(
                    part,
                    list(leaves.values()),
                    signal[group::groups],
                    retain_graph=number < len(losses) - 1,
                    allow_unused=True,
                )
                for group, part in enumerate(parts)
            ]
            found.append(_by_unit(leaves, by_group))
    return found


def _by_unit(leaves: State, by_group: Sequence[Sequence[Tensor | None]]) -> dict[str, Tensor]:
    columns: dict[str, list[Tensor]] = {}
    for number, (name, leaf) in enumerate(leaves.items()):
        rows = [torch.zeros_like(leaf) if row[number] is None else row[number] for row in by_group]
        stacked = torch.stack([row.flatten() for row in rows if row is not None])
        columns.setdefault(name.partition("|")[0], []).append(stacked)
    return {unit: torch.cat(own, dim=1) for unit, own in columns.items()}
