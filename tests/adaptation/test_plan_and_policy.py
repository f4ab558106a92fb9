"""Plans are plain data; the policy is one network for any units and domains."""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from modmeta.adaptation import UPDATE_RULES, Plan, Policy, backward_macs, backward_shares
from modmeta.adapters import AdaptedBackbone, Cost, Unit, UnitConfig
from modmeta.adapters.module import MODULES
from modmeta.backbone import Site

Make = Callable[..., AdaptedBackbone]
G, F = 3, 4


def units_of(count: int, seed: int = 0) -> list[Unit]:
    random = torch.Generator().manual_seed(seed)

    def draw() -> float:
        return float(torch.rand((), generator=random))

    found = []
    for number in range(count):
        site = Site(f"n{number}", "norm", number, number / max(count, 1), 0, 0, {"weight": (2,)}, 2, 1, 1, 0)
        learns = draw() < 0.7
        module = MODULES.get("film" if learns else "norm_blend")
        found.append(Unit(f"u{number}", module, (site,), {}, Cost(4), learns, not learns, draw(), 0.01 + 0.1 * draw()))
    return found


def trained(steps: int = 3, seed: int = 0) -> Policy:
    """Return a policy whose outputs depend on everything, as after training."""
    policy = Policy(G, F, steps)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return policy.eval()


def inputs(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(G, generator=generator), torch.randn(count, F, generator=generator)


def tensors(plan: Plan) -> dict[str, Tensor]:
    return {name: value for name, value in vars(plan).items() if name != "units"}


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 7), domains=st.integers(0, 4), seed=st.integers(0, 99))
def test_the_order_of_units_does_not_matter(count: int, domains: int, seed: int) -> None:
    policy, units, (whole, each) = trained(seed=seed), units_of(count, seed), inputs(count, seed)
    distances = torch.rand(domains)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    plan = policy(units, whole, each, distances)
    shuffled = policy([units[i] for i in order], whole, each[order], distances)
    assert shuffled.units == tuple(plan.units[i] for i in order)
    for name, tensor in tensors(plan).items():
        expected = tensor[order] if tensor.ndim else tensor
        torch.testing.assert_close(getattr(shuffled, name), expected, msg=name)


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 7), domains=st.integers(0, 4), steps=st.integers(0, 4), seed=st.integers(0, 99))
def test_plans_are_within_their_bounds(count: int, domains: int, steps: int, seed: int) -> None:
    policy, units, (whole, each) = trained(steps, seed), units_of(count, seed), inputs(count, seed)
    plan = policy(units, 100 * whole, 100 * each, torch.rand(domains))
    assert plan.rates.shape == (count, steps)
    assert bool(((plan.gates >= 0) & (plan.gates <= 1)).all())
    assert bool(((plan.decay >= 0) & (plan.decay <= 1)).all())
    assert plan.bank.shape == (count, 1 + domains)
    torch.testing.assert_close(plan.bank.sum(1), torch.ones(count))
    base = torch.tensor([unit.rate for unit in units])[:, None] * torch.nn.functional.softplus(policy.step_scale)
    slack = 1 + 1e-4
    assert bool((plan.rates <= 10 * base * slack).all())
    assert bool((plan.rates >= base / 10 / slack).all())
    assert 0.1 / slack <= float(plan.ridge.detach()) <= 10 * slack


def test_evaluation_draws_no_noise_and_training_draws_the_generators() -> None:
    policy, units, (whole, each) = trained(), units_of(5), inputs(5)

    def gates(seed: int | None) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return policy(units, whole, each, None, generator).gates

    assert torch.equal(gates(1), gates(None))
    policy.train()
    assert torch.equal(gates(1), gates(1))
    assert not torch.equal(gates(1), gates(2))
    assert torch.equal(gates(None), policy.eval()(units, whole, each).gates)


def test_untrained_it_says_what_the_configuration_says() -> None:
    policy, units = Policy(G, F, 3).eval(), units_of(6, seed=4)
    units = [replace(unit, gate=gate) for unit, gate in zip(units, (0.0, 0.1, 0.5, 0.8, 0.95, 1.0), strict=True)]
    for seed in range(3):
        plan = policy(units, *inputs(6, seed)).detach()
        torch.testing.assert_close(plan.gates[1:5], torch.tensor([unit.gate for unit in units[1:5]]))
        # The ends of a stretched sigmoid are flat; a policy must be able to leave them.
        assert float(plan.gates[0]) == 0.0
        assert float(plan.gates[5]) == 1.0
        rates = torch.tensor([[unit.rate] * 3 for unit in units])
        torch.testing.assert_close(plan.rates, rates)
        assert float(plan.ridge) == 1.0
        assert float(plan.decay.max()) < 0.01


def test_closed_gates_can_still_be_learned_from_somewhere() -> None:
    # A unit that is configured shut has no gradient at evaluation; the noise of training opens it at times.
    policy, units = Policy(G, F).train(), [replace(unit, gate=0.0) for unit in units_of(4)]
    opened = [policy(units, *inputs(4), None, torch.Generator().manual_seed(s)).gates for s in range(40)]
    assert 0.02 < float((torch.stack(opened) > 0).float().mean()) < 0.6


def test_nearer_specialists_weigh_more() -> None:
    plan = Policy(G, F)(units_of(3), *inputs(3), torch.tensor([0.1, 5.0, 1.0]))
    prior, near, far, middle = plan.bank.T
    assert bool((near > middle).all())
    assert bool((middle > far).all())
    assert bool((prior > near).all())
    alone = Policy(G, F)(units_of(3), *inputs(3))
    assert torch.equal(alone.bank, torch.ones(3, 1))


def test_the_forecast_does_not_bend_the_plan() -> None:
    policy, units, (whole, each) = trained(), units_of(4), inputs(4)
    plan = policy(units, whole, each)
    (plan.gain + plan.gain_log_variance).backward()
    moved = {name.partition(".")[0] for name, p in policy.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"forecast"}


def test_its_size_depends_on_neither_units_nor_domains() -> None:
    policy = trained()
    for count, domains in ((1, 0), (9, 5)):
        assert policy(units_of(count), *inputs(count), torch.rand(domains)).gates.shape == (count,)


# ---------------------------------------------------------------------- plans


@settings(max_examples=30, deadline=None)
@given(count=st.integers(0, 4), steps=st.integers(0, 3), domains=st.integers(0, 2), seed=st.integers(0, 99))
def test_a_plan_goes_through_json_and_back(count: int, steps: int, domains: int, seed: int) -> None:
    policy, units = trained(steps, seed), units_of(max(count, 1), seed)
    plan = policy(units, *inputs(max(count, 1), seed), torch.rand(domains)).detach()
    if not count:
        empty = torch.zeros(0)
        plan = replace(plan, units=(), gates=empty, rates=torch.zeros(0, steps), decay=empty, bank=torch.zeros(0, 1))
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again.units == plan.units
    assert again.steps == plan.steps or not count
    assert again.gate_of().keys() == plan.gate_of().keys()
    for name, tensor in tensors(plan).items():
        if tensor.numel():
            assert torch.equal(getattr(again, name), tensor), name


def test_keeping_closes_the_others_and_nothing_else(make: Make) -> None:
    units = units_of(4)
    plan = trained()(units, *inputs(4))
    plan = replace(plan, gates=torch.tensor([0.5, 1.0, 0.0, 0.2]))
    kept = plan.keeping(["u0", "u2"])
    assert kept.gates.tolist() == [0.5, 0.0, 0.0, 0.0]
    assert list(plan.gate_of()) == ["u0", "u1", "u3"]
    assert list(kept.gate_of()) == ["u0"]
    assert torch.equal(kept.rates, plan.rates)
    assert plan.keeping(()).gate_of() == {}
    assert torch.equal(plan.scaled(0.5).rates, plan.rates * 0.5)


MIXED = (
    UnitConfig("norm_blend", group="block"),
    UnitConfig("film", group="block"),
    UnitConfig("lora", {"rank": 2}, group="stage"),
    UnitConfig("projection"),
)


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_plan_costs_more_than_its_budget(name: str, make: Make, data: st.DataObject) -> None:
    model = make(name, *(MIXED if name == "test_efficientnet" else MIXED[1:]))
    shares, learners = backward_shares(model), [unit for unit in model.units if unit.learns]
    gate = st.sampled_from([0.0, 0.125, 0.5, 1.0])
    gates = data.draw(st.lists(gate, min_size=len(model.units), max_size=len(model.units)))
    plan = replace(trained()(model.units, *inputs(len(model.units))).detach(), gates=torch.tensor(gates))
    # The very cost of a unit is the hardest budget: rounding must not let it be passed.
    some = st.one_of(st.floats(0.0, 1.0), st.sampled_from(sorted(shares.values())))
    low, high = sorted((data.draw(some), data.draw(some)))
    small, large = plan.within(low, shares), plan.within(high, shares)

    whole = backward_macs(model, learners, 7, plan.steps)
    for budget, found in ((low, small), (high, large)):
        opened = model.active(found.gate_of())
        realised = backward_macs(model, opened, 7, found.steps)
        assert realised <= budget * whole * (1 + 1e-12)
        assert found.backward_share(shares) <= budget
        assert found.backward_share(shares) == pytest.approx(realised / whole)
        # Nothing that would have fitted in is left out, and nothing is opened that was shut.
        for unit, gate in zip(model.units, gates, strict=True):
            more = backward_macs(model, [*opened, unit], 7, found.steps)
            assert (unit in opened) == (gate > 0 and (not unit.learns or more <= budget * whole))
        assert all(float(g) == gates[found.index(n)] for n, g in found.gate_of().items())
    assert set(small.gate_of()) <= set(large.gate_of())
    assert small.backward_share(shares) <= large.backward_share(shares)


def test_no_set_of_units_within_a_budget_has_more_open_gates(make: Make) -> None:
    blend = UnitConfig("norm_blend", group="all")
    model = make("test_efficientnet", blend, UnitConfig("film"), UnitConfig("projection"))
    shares = backward_shares(model)
    gates = torch.rand(len(model.units), generator=torch.Generator().manual_seed(1)) + 0.01
    plan = replace(trained()(model.units, *inputs(len(model.units))).detach(), gates=gates)
    whole = backward_macs(model, model.units, 1)
    for budget in (0.0, 0.2, 0.5, 0.9):
        best = 0.0
        for choice in itertools.product((False, True), repeat=len(model.units)):
            chosen = [unit for unit, taken in zip(model.units, choice, strict=True) if taken]
            if backward_macs(model, chosen, 1) <= budget * whole:
                best = max(best, sum(float(gates[plan.index(unit.name)]) for unit in chosen))
        assert float(plan.within(budget, shares).gates.sum()) == pytest.approx(best)


def test_budgets_of_nothing_and_of_all(make: Make) -> None:
    model = make("test_efficientnet", *MIXED)
    shares = backward_shares(model)
    plan = Policy(G, F)(model.units, *inputs(len(model.units)))
    free = {unit.name for unit in model.units if backward_macs(model, [unit], 1) == 0}
    assert free >= {unit.name for unit in model.units if not unit.learns} | {"projection@features"}
    assert set(plan.within(0.0, shares).gate_of()) == free
    assert plan.within(1.0, shares).gate_of().keys() == plan.gate_of().keys()
    assert plan.backward_share(shares) == 1.0
    assert plan.keeping(()).backward_share(shares) == 0.0
    assert replace(plan, rates=plan.rates[:, :0]).backward_share(shares) == 0.0  # no step, no cost


def test_gates_that_are_not_finite_count_as_closed_in_a_forward_pass(make: Make) -> None:
    model = make("test_efficientnet", UnitConfig("projection"))
    images = torch.rand(2, 3, 32, 32)
    for gate in (math.nan, torch.tensor(math.nan)):
        assert torch.equal(model(images, model.fresh(), {"projection@features": gate}), model.backbone(images))


# ---------------------------------------------------------------------- update rules


def test_update_rules() -> None:
    units = units_of(3)
    plan = trained(2)(units, *inputs(3))
    configured = torch.tensor([[unit.rate] * 2 for unit in units])
    assert torch.equal(UPDATE_RULES.get("policy")(units, 2)(plan), plan.rates)
    torch.testing.assert_close(UPDATE_RULES.get("constant")(units, 2)(plan), configured)
    learned = UPDATE_RULES.get("lslr")(units, 2)
    torch.testing.assert_close(learned(plan), configured)
    (parameter,) = learned.parameters()
    with torch.no_grad():
        parameter[1, 0] += math.log(2)
    changed = configured.clone()
    changed[1, 0] *= 2
    torch.testing.assert_close(learned(plan), changed)
