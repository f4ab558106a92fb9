"""The inner loop against steps taken by hand, and its meta-gradients against finite differences."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from modmeta.adaptation import DivergedError, Plan, inner_loop, read_statistics, support_gradients
from modmeta.adapters import AdaptedBackbone, State, UnitConfig

Make = Callable[..., AdaptedBackbone]
Move = Callable[..., State]
PlanFor = Callable[..., Plan]
UNITS = (UnitConfig("film", group="stage"), UnitConfig("projection", {"rank": 3}))


def target(model: AdaptedBackbone, dtype: torch.dtype = torch.float32) -> Callable[[Tensor], Tensor]:
    goal = torch.randn(6, model.backbone.feature_dim, generator=torch.Generator().manual_seed(5)).to(dtype)
    return lambda features: (features - goal).square().mean()


def leaves_of(model: AdaptedBackbone) -> dict[str, list[str]]:
    return {unit.name: model.learned_names(unit) for unit in model.units if unit.learns}


def rms(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors]).square().mean().sqrt()


@pytest.mark.parametrize("name", ["test_efficientnet", "test_convnext"])
def test_one_step_is_the_normalised_gradient(
    name: str, make: Make, move: Move, plan_for: PlanFor, images: Tensor
) -> None:
    model = make(name, *UNITS)
    initial, plan, loss = move(model), plan_for(model, 1), target(model)
    rates = torch.rand(len(model.units), 1, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.01
    plan = replace(plan, rates=rates)
    state, losses = inner_loop(model, initial, plan, images, loss)
    variables = {name: tensor.clone().requires_grad_() for name, tensor in initial.items()}
    value = loss(model(images, variables, plan.gate_of()))
    value.backward()
    assert losses == [pytest.approx(float(value.detach()), rel=1e-5)]
    for unit, names in leaves_of(model).items():
        size = rms([variables[n].grad for n in names])  # type: ignore[misc]
        rate = plan.rates[plan.index(unit), 0]
        for n in names:
            expected = initial[n] - rate * variables[n].grad / size
            torch.testing.assert_close(state[n], expected, rtol=1e-3, atol=1e-5)
        moved = rms([state[n] - initial[n] for n in names])
        assert float(moved) == pytest.approx(float(rate), rel=1e-3)  # the rate is the size of the change


@pytest.mark.parametrize("second_order", [False, True])
def test_a_step_that_promises_little_is_plain_gradient_descent(
    second_order: bool, make: Make, plan_for: PlanFor, images: Tensor
) -> None:
    model, rate, drop = make("test_efficientnet", UnitConfig("film", group="all")), 0.01, 1e3
    initial, loss, (names,) = model.fresh(), target(model), leaves_of(model).values()
    plan = plan_for(model, rates=torch.full((1, 1), rate))
    state, _ = inner_loop(model, initial, plan, images, loss, full_step_drop=drop, second_order=second_order)
    variables = {name: tensor.clone().requires_grad_() for name, tensor in initial.items()}
    loss(model(images, variables, plan.gate_of())).backward()
    learning_rate = rate**2 * sum(initial[n].numel() for n in names) / drop
    for n in names:
        torch.testing.assert_close(state[n] - initial[n], -learning_rate * variables[n].grad, rtol=1e-3, atol=1e-9)


def test_a_step_that_promises_enough_is_taken_whole(make: Make, plan_for: PlanFor, images: Tensor) -> None:
    model, loss = make("test_efficientnet", *UNITS), target(make("test_efficientnet", *UNITS))
    plan = plan_for(model, 1)
    whole, losses = inner_loop(model, model.fresh(), plan, images, loss)
    tiny, _ = inner_loop(model, model.fresh(), plan.scaled(1e-3), images, loss)
    promised = 1e3 * (losses[0] - float(loss(model(images, tiny, plan.gate_of()))))
    short = {}
    for share in (0.5, 2.0):
        state, _ = inner_loop(model, model.fresh(), plan, images, loss, full_step_drop=share * promised)
        short[share] = [rms([state[n] - model.fresh()[n] for n in names]) for names in leaves_of(model).values()]
    full = [rms([whole[n] - model.fresh()[n] for n in names]) for names in leaves_of(model).values()]
    torch.testing.assert_close(torch.stack(short[0.5]), torch.stack(full))
    torch.testing.assert_close(torch.stack(short[2.0]), 0.5 * torch.stack(full), rtol=0.02, atol=0)


def test_steps_go_down(make: Make, plan_for: PlanFor, images: Tensor) -> None:
    model = make("test_efficientnet", *UNITS)
    plan = plan_for(model, rates=torch.full((len(model.units), 6), 0.005))
    _, losses = inner_loop(model, model.fresh(), plan, images, target(model))
    assert len(losses) == 6
    assert losses == sorted(losses, reverse=True)


def test_decay_gives_back_a_share_of_the_distance(make: Make, plan_for: PlanFor, images: Tensor) -> None:
    model = make("test_efficientnet", UnitConfig("projection", {"rank": 2}))
    loss, initial = target(model), model.fresh()
    one, _ = inner_loop(model, initial, plan_for(model, 1), images, loss)
    still = torch.tensor([[0.05, 0.0]])
    kept, _ = inner_loop(model, initial, plan_for(model, rates=still), images, loss)
    back, _ = inner_loop(model, initial, plan_for(model, rates=still, decay=torch.tensor([0.25])), images, loss)
    for name, tensor in one.items():
        torch.testing.assert_close(kept[name], tensor)
        torch.testing.assert_close(back[name] - initial[name], 0.75 * (tensor - initial[name]))


@pytest.mark.parametrize("trust", [0.02, 0.5])
def test_no_unit_leaves_the_trust_region(trust: float, make: Make, plan_for: PlanFor, images: Tensor) -> None:
    model = make("test_efficientnet", *UNITS)
    initial = model.fresh()
    plan = plan_for(model, rates=torch.full((len(model.units), 3), 10.0))
    state, _ = inner_loop(model, initial, plan, images, target(model), trust=trust)
    for names in leaves_of(model).values():
        assert float(rms([state[n] - initial[n] for n in names])) == pytest.approx(trust, rel=1e-3)


@pytest.mark.parametrize("second_order", [False, True])
def test_rates_of_zero_leave_the_state(second_order: bool, make: Make, plan_for: PlanFor, images: Tensor) -> None:
    model = make("test_efficientnet", *UNITS)
    initial = model.fresh()
    plan = plan_for(model, rates=torch.zeros(len(model.units), 2))
    state, losses = inner_loop(model, initial, plan, images, target(model), second_order=second_order)
    assert all(torch.equal(tensor, initial[name]) for name, tensor in state.items())
    assert losses[0] == losses[1]


def test_only_open_units_move(make: Make, plan_for: PlanFor, images: Tensor) -> None:
    model = make("test_efficientnet", *UNITS)
    initial, kept = model.fresh(), [model.units[1].name, "projection@features"]
    state, _ = inner_loop(model, initial, plan_for(model).keeping(kept), images, target(model))
    moved = {name.partition("|")[0] for name, tensor in state.items() if not torch.equal(tensor, initial[name])}
    assert moved == set(kept)
    for none in (plan_for(model).keeping(()), plan_for(model, 0)):
        state, losses = inner_loop(model, initial, none, images, target(model))
        assert losses == []
        assert all(tensor is initial[name] for name, tensor in state.items())


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "test_vit", "test_convnext"])
def test_what_lies_before_the_first_learner_is_computed_once(
    name: str, make: Make, plan_for: PlanFor, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    blend = [UnitConfig("norm_blend", group="all")] if name in ("test_efficientnet", "test_resnet") else []
    model = make(name, *blend, UnitConfig("film", group="block", depth=(0.6, 1.0)))
    plan = plan_for(model, 3)
    cut, _ = inner_loop(model, model.fresh(), plan, images, target(model))
    assert model.cut_before([unit for unit in model.units if unit.learns]) is not None
    monkeypatch.setattr(AdaptedBackbone, "cut_before", lambda self, units: None)
    whole, _ = inner_loop(model, model.fresh(), plan, images, target(model))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in cut.items())


def test_statistics_need_no_labels(make: Make, plan_for: PlanFor, images: Tensor) -> None:
    model = make("test_efficientnet", UnitConfig("norm_blend"), *UNITS)
    initial, plan = model.fresh(), plan_for(model)
    state, losses = inner_loop(model, initial, plan, images, None)
    assert losses == []
    changed = {name.partition("@")[0] for name, tensor in state.items() if not torch.equal(tensor, initial[name])}
    assert changed == {"norm_blend"}
    # Reading only as far as needed gives what a whole pass under the gates of all units gives.
    _, observed = model.observe(images, initial, plan.gate_of())
    assert all(torch.equal(tensor, observed[name]) for name, tensor in state.items() if name.startswith("norm_blend"))
    closed = plan.keeping([unit.name for unit in model.units if unit.learns])
    untouched = read_statistics(model, initial, closed, images)
    assert all(tensor is initial[name] for name, tensor in untouched.items())


@pytest.mark.parametrize("second_order", [False, True])
def test_a_loss_that_is_not_finite_stops_at_its_step(
    second_order: bool, make: Make, plan_for: PlanFor, images: Tensor
) -> None:
    model = make("test_efficientnet", *UNITS)
    values = iter([1.0, math.nan])
    initial = model.fresh()
    with pytest.raises(DivergedError, match="inner step 1: the support loss is nan"):
        inner_loop(
            model, initial, plan_for(model, 3), images, lambda x: x.mean() * next(values), second_order=second_order
        )
    assert all(torch.equal(tensor, model.fresh()[name]) for name, tensor in initial.items())


def test_a_gradient_that_is_not_finite_names_its_unit(make: Make, plan_for: PlanFor, images: Tensor) -> None:
    model = make("test_efficientnet", UnitConfig("projection"))

    def loss(x: Tensor) -> Tensor:
        return (x - x.detach()).abs().sum().sqrt()  # 0, with an infinite slope

    with pytest.raises(DivergedError, match="inner step 0: the gradient of unit 'projection@features'"):
        inner_loop(model, model.fresh(), plan_for(model), images, loss)


# ---------------------------------------------------------------------- meta-gradients


def outcome(model: AdaptedBackbone, state: State, plan: Plan, images: Tensor) -> Tensor:
    """A smooth function of what an adaptation ends with."""
    features = model(images, state, plan.gate_of())
    return features.sin().mean()


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit"])
def test_second_order_meta_gradients_are_those_of_finite_differences(
    name: str, make: Make, move: Move, plan_for: PlanFor, images: Tensor
) -> None:
    double = torch.double
    model = make(name, UnitConfig("film", group="all"), UnitConfig("projection", {"rank": 2}), dtype=double)
    count, x = len(model.units), images[:3].double()
    goal = torch.randn(3, model.backbone.feature_dim, generator=torch.Generator().manual_seed(5)).double()
    start = {n: t.requires_grad_() for n, t in move(model, dtype=double).items()}
    rates = torch.tensor([[0.05, 0.03]] * count, dtype=double, requires_grad=True)
    gates = torch.tensor([0.6, 0.8], dtype=double, requires_grad=True)

    def after(start: State, rates: Tensor, gates: Tensor) -> Tensor:
        plan = plan_for(model, rates=rates, gates=gates, decay=torch.full((count,), 0.1, dtype=double))
        state, _ = inner_loop(
            model, start, plan, x, lambda f: (f - goal).square().mean(), second_order=True, trust=10.0
        )
        return outcome(model, state, plan, x)

    gradients = torch.autograd.grad(after(start, rates, gates), [*start.values(), rates, gates])
    generator = torch.Generator().manual_seed(9)
    for _ in range(3):
        directions = [torch.randn(g.shape, generator=generator).to(double) for g in gradients]
        expected = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
        ends = []
        for step in (1e-5, -1e-5):
            moved = [p.detach() + step * d for p, d in zip([*start.values(), rates, gates], directions, strict=True)]
            state = {n: t.requires_grad_() for n, t in zip(start, moved[: len(start)], strict=True)}
            ends.append(float(after(state, moved[-2], moved[-1]).detach()))
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(expected, rel=1e-4, abs=1e-8)


def test_first_order_hypergradients_are_products_with_the_steps(
    make: Make, move: Move, plan_for: PlanFor, images: Tensor
) -> None:
    model = make("test_efficientnet", *UNITS)
    loss, initial = target(model), {n: t.requires_grad_() for n, t in move(model).items()}
    rates = torch.full((len(model.units), 2), 0.05, requires_grad=True)
    plan = plan_for(model, rates=rates)
    state, _ = inner_loop(model, initial, plan, images, loss)
    after = outcome(model, state, plan.detach(), images)
    to_rates, *to_initial = torch.autograd.grad(after, [rates, *initial.values()], retain_graph=True)
    to_state = dict(zip(state, torch.autograd.grad(after, list(state.values())), strict=True))
    # Redo the steps by hand for their directions N.
    here = {n: t.detach() for n, t in initial.items()}
    for step in range(2):
        leaves = {n: t.clone().requires_grad_() for n, t in here.items()}
        loss(model(images, leaves, plan.detach().gate_of())).backward()
        for row, (unit, names) in enumerate(leaves_of(model).items()):
            assert plan.index(unit) == row
            size = rms([leaves[n].grad for n in names])  # type: ignore[misc]
            directions = {n: leaves[n].grad / size for n in names}  # type: ignore[operator]
            expected = -sum(float((to_state[n] * directions[n]).sum()) for n in names)
            assert float(to_rates[row, step]) == pytest.approx(expected, rel=2e-3, abs=1e-7)
            here |= {n: here[n] - 0.05 * directions[n] for n in names}
    # The directions count as constants: the initial value passes its gradient on as it is.
    for (name, found), tensor in zip(zip(initial, to_initial, strict=True), to_state.values(), strict=True):
        torch.testing.assert_close(found, tensor, msg=name)


def test_a_rate_beyond_the_trust_region_is_still_taught_its_direction(
    make: Make, plan_for: PlanFor, images: Tensor
) -> None:
    # Differentiated through, the bound would hide from a rate that is too large that it is.
    model = make("test_efficientnet", UnitConfig("projection"))
    rates = torch.full((1, 1), 10.0, requires_grad=True)
    initial = model.fresh()
    plan = plan_for(model, rates=rates)
    state, _ = inner_loop(model, initial, plan, images, target(model), trust=0.02)
    after = outcome(model, state, plan.detach(), images)
    names = model.learned_names(model.units[0])
    (to_rate,) = torch.autograd.grad(after, rates, retain_graph=True)
    to_state = torch.autograd.grad(after, [state[n] for n in names])
    expected = sum(float((g * (state[n] - initial[n])).sum()) for g, n in zip(to_state, names, strict=True)) / 10
    assert expected != 0.0
    assert float(to_rate) == pytest.approx(expected, rel=1e-3)


def test_first_order_gates_get_gradients_from_what_comes_after(make: Make, plan_for: PlanFor, images: Tensor) -> None:
    model = make("test_efficientnet", *UNITS)
    gates = torch.full((len(model.units),), 0.7, requires_grad=True)
    plan = plan_for(model, gates=gates)
    state, _ = inner_loop(model, model.fresh(), plan, images, target(model))
    outcome(model, state, plan, images).backward()
    assert gates.grad is not None
    assert bool((gates.grad != 0).all())


def test_gradients_can_be_switched_off_around_it(make: Make, plan_for: PlanFor, images: Tensor) -> None:
    model = make("test_efficientnet", *UNITS)
    expected, _ = inner_loop(model, model.fresh(), plan_for(model), images, target(model))
    with torch.no_grad():
        state, _ = inner_loop(model, model.fresh(), plan_for(model), images, target(model))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


# ---------------------------------------------------------------------- gradients for the indicators


@pytest.mark.parametrize(("asked", "groups"), [(2, 2), (8, 4)])
def test_groups_of_images_contribute_to_the_gradient_of_the_mean_loss(
    asked: int, groups: int, make: Make, move: Move, images: Tensor
) -> None:
    model = make("test_efficientnet", UnitConfig("norm_blend"), *UNITS)
    state = move(model)
    goal = torch.randn(6, model.backbone.feature_dim, generator=torch.Generator().manual_seed(5))

    def alone(features: Tensor) -> Tensor:
        return (features - goal).square().mean(1)

    def together(features: Tensor) -> Tensor:
        return (features - features.mean(0) * features.amax(0)).square().mean(1)

    with torch.no_grad():
        found = support_gradients(model, state, images, [alone, together], asked)
    gates = {unit.name: 1.0 for unit in model.units if unit.learns}

    def direct(loss: Tensor, leaves: State) -> dict[str, Tensor]:
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), strict=True))
        return {
            unit: torch.cat([(g if (g := gradients[n]) is not None else leaves[n] * 0).flatten() for n in names])
            for unit, names in leaves_of(model).items()
        }

    leaves = {n: t.clone().requires_grad_() for n, t in state.items()}
    for contributions, losses in zip(found, (alone, together), strict=True):
        assert set(contributions) == set(gates)
        whole = direct(losses(model(images, leaves, gates)).mean(), leaves)
        for unit, parts in contributions.items():
            assert len(parts) == groups
            torch.testing.assert_close(parts.sum(0), whole[unit], rtol=1e-3, atol=1e-6)
    for group in range(groups):  # where images do not depend on each other, a group is the loss of its own
        own = direct(alone(model(images, leaves, gates))[group::groups].sum() / len(images), leaves)
        for unit, parts in found[0].items():
            torch.testing.assert_close(parts[group], own[unit], rtol=1e-3, atol=1e-6)
    assert support_gradients(model, state, images[:1], [alone]) == [{}]
