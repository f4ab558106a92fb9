"""Update rules that look at gradients while the inner loop runs."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from modmeta.adaptation import UPDATE_RULES, Plan, inner_loop
from modmeta.adaptation.update_rules import AlfaRule
from modmeta.adapters import AdaptedBackbone, State, UnitConfig

Make = Callable[..., AdaptedBackbone]
PlanFor = Callable[..., Plan]
Move = Callable[..., State]
UNITS = (UnitConfig("norm_blend"), UnitConfig("film", group="stage"), UnitConfig("projection", {"rank": 3}))


def target(model: AdaptedBackbone, dtype: torch.dtype = torch.float32) -> Callable[[Tensor], Tensor]:
    goal = torch.randn(6, model.backbone.feature_dim, generator=torch.Generator().manual_seed(5)).to(dtype)
    return lambda features: (features - goal).square().mean()


def trained(model: AdaptedBackbone, steps: int) -> AlfaRule:
    """Return an ALFA rule that is off its initial values."""
    rule = UPDATE_RULES.get("alfa")(model.units, steps)
    assert isinstance(rule, AlfaRule)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(2)
        for parameter in rule.network.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return rule


def test_untrained_alfa_and_rules_that_do_not_look_leave_the_loop_as_it_is(
    make: Make, plan_for: PlanFor, images: Tensor
) -> None:
    model = make("test_efficientnet", *UNITS)
    plan = plan_for(model, 3)
    plan = replace(plan, rates=plan.rates * torch.rand(plan.rates.shape), decay=torch.full_like(plan.decay, 0.1))
    expected, losses = inner_loop(model, model.fresh(), plan, images, target(model))
    for name in ("policy", "constant", "lslr", "alfa"):
        rule = UPDATE_RULES.get(name)(model.units, 3)
        state, found = inner_loop(model, model.fresh(), plan, images, target(model), rule=rule)
        assert found == losses
        assert all(torch.equal(tensor, expected[key]) for key, tensor in state.items()), name


def test_alfa_takes_its_rates_from_the_means_of_parameters_and_gradients(
    make: Make, move: Move, plan_for: PlanFor, images: Tensor
) -> None:
    model = make("test_efficientnet", *UNITS)
    rule, loss = trained(model, 2), target(model)
    plan = plan_for(model, 2, gates=torch.tensor([0.7 * (unit.learns) for unit in model.units]))
    closed = next(unit for unit in model.units if unit.learns).name
    plan = plan.keeping([unit.name for unit in model.units if unit.name != closed])
    initial = move(model, 0.02)
    with torch.no_grad():
        state, _ = inner_loop(model, initial, plan, images, loss, rule=rule, trust=1e9)
    here = initial
    for step in range(2):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in here.items()}
        loss(model(images, leaves, plan.gate_of())).backward()
        weights, slopes, directions = [], [], {}
        for unit in model.units:
            if unit.learns and unit.name != closed:
                own = model.learned_names(unit)
                gradient = torch.cat([leaves[name].grad.flatten() for name in own])  # type: ignore[union-attr]
                size = gradient.square().mean().sqrt()
                weights.append(torch.cat([here[name].flatten() for name in own]).mean())
                slopes.append((gradient / size).mean())
                directions |= {name: leaves[name].grad / size for name in own}  # type: ignore[operator]
            else:  # takes no step, and is not seen
                weights.append(torch.zeros(()))
                slopes.append(torch.zeros(()))
        x = torch.cat([torch.stack(weights), torch.stack(slopes)])
        first, second, third = (layer for layer in rule.network if isinstance(layer, torch.nn.Linear))
        out = (second.weight @ (first.weight @ x + first.bias).relu() + second.bias).relu()
        out = third.weight @ out + third.bias
        after = dict(here)
        for row, unit in enumerate(model.units):
            for name in model.learned_names(unit) if unit.name in plan.gate_of() else []:
                rate = plan.rates[row, step] * (1 + out[row])
                decay = plan.decay[row] + out[len(model.units) + row]
                after[name] = initial[name] + (1 - decay) * (here[name] - initial[name]) - rate * directions[name]
        here = {name: tensor.detach() for name, tensor in after.items()}
    for name, tensor in state.items():
        assert not tensor.requires_grad
        torch.testing.assert_close(tensor, here[name], rtol=1e-3, atol=1e-5)
    assert any(not torch.allclose(state[name], initial[name]) for name in state)


@pytest.mark.parametrize("second_order", [False, True])
def test_alfa_is_taught_by_what_comes_after(second_order: bool, make: Make, plan_for: PlanFor, images: Tensor) -> None:
    model = make("test_efficientnet", *UNITS, dtype=torch.double)
    rule = trained(model, 2).double()
    fresh = {name: tensor.double() for name, tensor in model.fresh().items()}
    plan = plan_for(model, 2)
    plan = replace(plan, **{n: getattr(plan, n).double() for n in ("gates", "rates", "decay", "bank", "ridge")})
    images, loss = images.double(), target(model, torch.double)

    def outcome() -> Tensor:
        state, _ = inner_loop(model, fresh, plan, images, loss, rule=rule, second_order=second_order)
        return sum(((tensor - 0.1) ** 2).sum() for tensor in state.values())  # type: ignore[return-value]

    bias = rule.network[-1].bias
    (found,) = torch.autograd.grad(outcome(), bias)
    assert isinstance(bias, Tensor)
    if second_order:
        for entry in range(0, len(bias), 3):
            with torch.no_grad():
                bias[entry] += 1e-5
                up = float(outcome())
                bias[entry] -= 2e-5
                down = float(outcome())
                bias[entry] += 1e-5
            assert float(found[entry]) == pytest.approx((up - down) / 2e-5, rel=1e-3, abs=1e-6)
    else:
        rows = torch.tensor([unit.learns for unit in model.units]).repeat(2)
        assert bool((found[rows] != 0).all())
