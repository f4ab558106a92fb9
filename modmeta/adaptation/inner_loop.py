"""The inner loop: the few gradient steps that carry out a plan on a support set."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from modmeta.adaptation.plan import Plan
from modmeta.adaptation.update_rules import UpdateRule
from modmeta.adapters import AdaptedBackbone, State
from modmeta.backbone import second_order_safe
from modmeta.errors import ModmetaError


class DivergedError(ModmetaError):
    """A loss or a gradient that is not finite."""


def inner_loop(
    model: AdaptedBackbone,
    initial: State,
    plan: Plan,
    images: Tensor,
    loss: Callable[[Tensor], Tensor] | None,
    *,
    statistics: State | None = None,
    rule: UpdateRule | None = None,
    second_order: bool = False,
    trust: float = 0.5,
    full_step_drop: float = 0.0,
) -> tuple[State, list[float]]:
    """Adapt the units that the plan opens to a support set.

    Units that read statistics do so first, in one pass. Then every step moves each learning unit along its
    gradient, scaled to unit root mean square: the rate *is* the size of the change. What lies before the earliest
    learning unit is computed once.

    Where ``full_step_drop`` is given, a step that promises less is shorter in proportion: gradient descent whose steps
    are clipped (Pascanu et al., "On the difficulty of training recurrent neural networks", ICML 2013). A support that
    is explained already is then not moved as far as one that is not.

    In first order the directions count as constants, which leaves the result differentiable in the rates, the
    gates and the initial state at the price of one extra backward pass. In second order they do not.

    Args:
        model: backbone and units.
        initial: where the units start.
        plan: what to do.
        images: support images ``(S, 3, H, W)``.
        loss: from support features ``(S, D)`` to a scalar; None where nothing may learn (no labels).
        statistics: what :func:`read_statistics` gave for these images, where that is known already.
        rule: may change the plan's rates and decays at every step; None leaves them alone.
        second_order: differentiate through the directions too.
        trust: bound on the root mean square distance of a unit from its initial value.
        full_step_drop: how far a step must promise to lower the loss, in nats and by its gradient, to be taken at full
            rate; 0 takes every step at full rate.

    Returns:
        the adapted state, and the loss before every step.

    Raises:
        DivergedError: naming the step and the units when a loss or gradient is not finite.
    """
    state = read_statistics(model, initial, plan, images) if statistics is None else statistics
    gates = plan.gate_of()
    still = plan.detach().gate_of()
    learners = [unit for unit in model.active(gates) if unit.learns]
    if loss is None or not learners or not plan.steps:
        return state, []
    start = model.cut_before(learners)
    with torch.no_grad():
        hidden = images if start is None else model(images, detached(state), still, stop=start)
    names = {unit.name: model.learned_names(unit) for unit in learners}
    losses: list[float] = []
    outside = torch.is_grad_enabled()
    # A step needs gradients even where the caller (a test loop) has switched them off.
    with torch.enable_grad(), second_order_safe() if second_order else nullcontext():
        for step in range(plan.steps):
            here = state if second_order else detached(state)
            leaves = {name: here[name] for unit in learners for name in names[unit.name]}
            if second_order:
                # A fresh leaf stands in for an initial value that carries no gradient of its own.
                leaves = {n: t if t.requires_grad else t.detach().requires_grad_() for n, t in leaves.items()}
            else:
                leaves = {name: tensor.requires_grad_() for name, tensor in leaves.items()}
            features = model(hidden, here | leaves, gates if second_order else still, start=start)
            value = loss(features)
            _check(value, f"inner step {step}: the support loss is {float(value.detach())}")
            losses.append(float(value.detach()))
            found = torch.autograd.grad(value, list(leaves.values()), create_graph=second_order, allow_unused=True)
            gradients = dict(zip(leaves, found, strict=True))
            rates, decays = plan.rates[:, step], plan.decay
            if rule is not None:
                seen = here if second_order else detached(here)
                with torch.set_grad_enabled(outside):
                    rates, decays = rule.at_step(plan, step, seen, gradients)
            directions: dict[str, State] = {}
            sizes: dict[str, Tensor] = {}
            for unit, own in names.items():
                directions[unit] = {n: torch.zeros_like(state[n]) if (g := gradients[n]) is None else g for n in own}
                sizes[unit] = _rms(list(directions[unit].values()))
                _check(sizes[unit], f"inner step {step}: the gradient of unit {unit!r} is not finite")
            if full_step_drop:
                # To first order a step of unit root mean square lowers the loss by the gradient's, times its numbers.
                drops = [
                    rates[plan.index(unit)] * size * sum(g.numel() for g in directions[unit].values())
                    for unit, size in sizes.items()
                ]
                rates = rates * (torch.stack(drops).sum().detach() / full_step_drop).clamp_max(1.0)
            for unit, direction in directions.items():
                row = plan.index(unit)
                state = state | _step(initial, state, direction, sizes[unit], rates[row], decays[row], trust)
    return state, losses


@torch.no_grad()
def read_statistics(model: AdaptedBackbone, initial: State, plan: Plan, images: Tensor) -> State:
    """Return the initial state with what the plan's reading units observe on the support; no labels needed."""
    gates = plan.detach().gate_of()
    reading = [unit for unit in model.active(gates) if unit.reads]
    if not reading:
        return dict(initial)
    last = max(site.order for unit in reading for site in unit.sites)
    behind = next((cut.name for cut in model.backbone.cuts if cut.order > last), None)
    _, observed = model.observe(images, detached(initial), gates, stop=behind)
    own = tuple(f"{unit.name}|" for unit in reading)
    return {name: observed[name] if name.startswith(own) else tensor for name, tensor in initial.items()}


def _step(
    initial: State, state: State, direction: State, size: Tensor, rate: Tensor, decay: Tensor, trust: float
) -> State:
    moved = {n: (1 - decay) * (state[n] - initial[n]) - rate * g / (size + 1e-8) for n, g in direction.items()}
    distance = _rms(list(moved.values()))
    shrink = (trust / distance.detach().clamp_min(1e-12)).clamp_max(1.0)
    return {name: initial[name] + shrink * delta for name, delta in moved.items()}


def _rms(tensors: list[Tensor]) -> Tensor:
    count = sum(tensor.numel() for tensor in tensors)
    return torch.stack([tensor.square().sum() for tensor in tensors]).sum().div(count).add(1e-20).sqrt()


def _check(value: Tensor, message: str) -> None:
    if not torch.isfinite(value).all():
        raise DivergedError(message)


def detached(state: State) -> State:
    """Return the state without gradients."""
    return {name: tensor.detach() for name, tensor in state.items()}
