"""The bank: a universal start, specialists of domains, and blends of them."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from modmeta.adapters import AdaptedBackbone, Bank, State, UnitConfig
from modmeta.errors import ModmetaError

Make = Callable[..., AdaptedBackbone]
Move = Callable[..., State]


@pytest.fixture
def model(make: Make) -> AdaptedBackbone:
    return make("test_efficientnet", UnitConfig("norm_blend"), UnitConfig("film"), UnitConfig("projection"))


@pytest.fixture
def bank(model: AdaptedBackbone, move: Move) -> Bank:
    bank = Bank(model)
    for seed, domain in enumerate(("art", "photo", "sketch"), start=1):
        bank.add(domain, move(model, seed=seed))
    return bank


def test_it_starts_fresh_and_learns_only_what_units_learn(model: AdaptedBackbone) -> None:
    bank = Bank(model)
    initial, fresh = bank.initial(), model.fresh()
    assert initial.keys() == fresh.keys()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in initial.items())
    learned = {name for unit in model.units for name in model.learned_names(unit)}
    assert {name for name, tensor in initial.items() if tensor.requires_grad} == learned
    assert not any(name.startswith("norm_blend") for name in learned)


def test_a_one_hot_blend_is_that_specialist(model: AdaptedBackbone, bank: Bank, move: Move) -> None:
    domains = ["sketch", "art"]  # the order is the caller's
    for row, expected in enumerate([bank.initial(), bank.specialist("sketch"), bank.specialist("art")]):
        weights = torch.eye(3)[row]
        for unit in model.units:
            blended = bank.blend(unit, domains, weights)
            assert blended.keys() == set(model.learned_names(unit))
            assert all(torch.equal(tensor, expected[name]) for name, tensor in blended.items())
    film = model.units[5]
    assert not torch.equal(*[bank.specialist(d)[model.learned_names(film)[0]] for d in ("art", "sketch")])


def test_a_blend_is_the_weighted_sum_and_differentiable_in_weights_and_prior(
    model: AdaptedBackbone, bank: Bank
) -> None:
    unit = next(unit for unit in model.units if unit.learns)
    name = model.learned_names(unit)[0]
    weights = torch.tensor([0.5, 0.3, 0.2], requires_grad=True)
    blended = bank.blend(unit, ["art", "photo"], weights)[name]
    parts = [bank.initial()[name], bank.specialist("art")[name], bank.specialist("photo")[name]]
    torch.testing.assert_close(blended, 0.5 * parts[0] + 0.3 * parts[1] + 0.2 * parts[2])
    blended.sum().backward()
    torch.testing.assert_close(weights.grad, torch.stack([part.detach().sum() for part in parts]))
    prior = bank.prior[bank.names.index(name)]
    torch.testing.assert_close(prior.grad, torch.full_like(prior, 0.5))


def test_removing_one_leaves_the_others_alone(model: AdaptedBackbone, bank: Bank) -> None:
    before = {name: tensor.clone() for name, tensor in bank.specialist("art").items()}
    bank.remove("photo")
    assert list(bank.specialists) == ["art", "sketch"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in bank.specialist("art").items())
    with pytest.raises(ModmetaError, match="unknown domain of the bank 'photo'"):
        bank.remove("photo")
    with pytest.raises(ModmetaError, match="did you mean 'sketch'"):
        bank.specialist("sketsch")


def test_specialists_are_matched_where_their_domains_mean_is_known(
    model: AdaptedBackbone, bank: Bank, move: Move
) -> None:
    assert bank.visible() == []  # added without: there to be looked up and no more
    mean = torch.rand(model.backbone.feature_dim)
    for domain in ("photo", "new"):
        bank.add(domain, move(model), mean)
    assert sorted(bank.visible()) == ["new", "photo"]
    assert bank.visible("photo") == ["new"]
    assert bank.visible("unheard of") == bank.visible()
    other = Bank(model)
    other.load_state_dict(bank.state_dict())
    assert other.visible() == bank.visible()
    assert torch.equal(other.means["new"], mean)
    bank.remove("new")
    bank.add("photo", move(model))
    assert bank.visible() == []
    assert sorted(other.visible()) == ["new", "photo"]


def test_what_is_added_is_a_copy(model: AdaptedBackbone, move: Move) -> None:
    bank, state = Bank(model), move(model)
    bank.add("art", state)
    name = bank.names[0]
    kept = state[name].clone()
    state[name].zero_()
    assert torch.equal(bank.specialist("art")[name], kept)
    assert not bank.specialist("art")[name].requires_grad


def test_a_state_dict_brings_everything_back(model: AdaptedBackbone, bank: Bank) -> None:
    with torch.no_grad():
        for parameter in bank.prior:
            parameter.normal_()
    other = Bank(model)
    other.load_state_dict(bank.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(bank.prior, other.prior, strict=True))
    assert list(other.specialists) == list(bank.specialists)
    for domain, state in bank.specialists.items():
        assert all(torch.equal(tensor, other.specialist(domain)[name]) for name, tensor in state.items())
    # A bank of its own from then on.
    other.specialist("photo")[other.names[0]].add_(1.0)
    assert not torch.equal(other.specialist("photo")[other.names[0]], bank.specialist("photo")[bank.names[0]])
    other.remove("art")
    assert "art" in bank.specialists


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(value: float, model: AdaptedBackbone, bank: Bank, move: Move) -> None:
    state = move(model)
    state[bank.names[-1]].view(-1)[0] = value
    before = bank.specialist("art")
    with pytest.raises(ModmetaError, match="'art' is not finite in") as caught:
        bank.add("art", state)
    assert bank.names[-1] in str(caught.value)
    assert bank.specialist("art") is before


def test_states_of_other_units_are_refused(bank: Bank, make: Make, move: Move) -> None:
    with pytest.raises(ModmetaError, match="does not fit unit tensor"):
        bank.add("art", move(make("test_efficientnet", UnitConfig("film"))))
    with pytest.raises(ModmetaError, match="does not fit unit tensor"):
        bank.add("art", move(make("test_convnext", UnitConfig("film"), UnitConfig("projection"))))


def test_it_moves_as_a_whole(model: AdaptedBackbone, bank: Bank, move: Move) -> None:
    bank.add("new", move(model), torch.rand(model.backbone.feature_dim))
    bank.double()
    tensors = [*bank.initial().values(), *bank.specialist("new").values(), *bank.means.values()]
    assert {tensor.dtype for tensor in tensors} == {torch.float64}
    unit = next(unit for unit in model.units if unit.learns)
    assert {t.dtype for t in bank.blend(unit, ["new"], torch.tensor([0.5, 0.5]).double()).values()} == {torch.float64}


def test_a_file_brings_everything_back(model: AdaptedBackbone, bank: Bank, move: Move, tmp_path: Path) -> None:
    bank.add("new", move(model), torch.rand(model.backbone.feature_dim))
    torch.save(bank.state_dict(), tmp_path / "bank.pt")
    other = Bank(model)
    other.load_state_dict(torch.load(tmp_path / "bank.pt", weights_only=True))
    assert other.specialists.keys() == bank.specialists.keys()
    assert other.visible() == ["new"]
    unit, weights = next(unit for unit in model.units if unit.learns), torch.tensor([0.2, 0.3, 0.5])
    for name, tensor in bank.blend(unit, ["art", "new"], weights).items():
        assert torch.equal(other.blend(unit, ["art", "new"], weights)[name], tensor)


def test_a_damaged_or_foreign_specialist_is_not_taken_from_a_file(model: AdaptedBackbone, bank: Bank) -> None:
    saved = bank.state_dict()
    for damaged in ({}, {name: torch.full_like(t, math.nan) for name, t in bank.specialist("art").items()}):
        saved["_extra_state"] = {"specialists": {"art": damaged}, "means": {}}
        with pytest.raises(ModmetaError, match="domain 'art'"):
            Bank(model).load_state_dict(saved)


def test_a_new_domains_specialist_is_usable_at_once(model: AdaptedBackbone, bank: Bank, move: Move) -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    gates = {unit.name: 1.0 for unit in model.units}

    def features(*weights: float) -> torch.Tensor:
        parts = [bank.blend(unit, ["art", "new"], torch.tensor(weights)) for unit in model.units]
        blended = {name: tensor for part in parts for name, tensor in part.items()}
        with torch.no_grad():
            return model(images, model.fresh() | blended, gates)

    bank.add("new", move(model, seed=9))
    with torch.no_grad():
        alone = model(images, model.fresh() | bank.specialist("new"), gates)
        plain = model.backbone(images)
    assert torch.equal(features(0.0, 0.0, 1.0), alone)
    assert torch.equal(features(1.0, 0.0, 0.0), plain)
    assert not torch.equal(features(0.0, 0.5, 0.5), alone)
    bank.remove("new")
    with pytest.raises(ModmetaError, match="unknown domain of the bank 'new'"):
        features(1.0, 0.0, 0.0)
    mean = torch.full((model.backbone.feature_dim,), math.nan)
    with pytest.raises(ModmetaError, match="mean"):
        bank.add("new", move(model), mean)
    assert "new" not in bank.specialists
