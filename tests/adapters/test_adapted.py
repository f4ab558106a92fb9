"""Features under a state: identity, gates, order of modules, cuts, and functional binding."""

import copy
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from modmeta.adapters import AdaptedBackbone, AdapterModule, Layer, State, UnitConfig, register_module
from modmeta.adapters.adapted import bind
from modmeta.backbone import Backbone, Site

NORMS = ("test_efficientnet", "test_efficientnet_gn", "test_convnext", "test_vit", "test_resnet")
Make = Callable[..., AdaptedBackbone]
Move = Callable[..., State]
Configs = Callable[[str], list[UnitConfig]]


@register_module("test_double")
class Double(AdapterModule):
    kinds = frozenset({"norm", "features"})

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.by = nn.Parameter(torch.zeros(1))

    def overlay(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor * (1 + self.by) for name, tensor in tensors.items() if name == "weight"}

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * (1 + self.by) if self.site.kind == "features" else y


@register_module("test_add")
class Add(AdapterModule):
    kinds = frozenset({"norm", "features"})

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.by = nn.Parameter(torch.zeros(1))

    def overlay(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor + self.by for name, tensor in tensors.items() if name == "weight"}

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.by if self.site.kind == "features" else y


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("batch", [1, 5, 16])
def test_fresh_modules_change_no_bit(name: str, batch: int, make: Make, all_modules: Configs) -> None:
    model = make(name, *all_modules(name))
    images = torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
    with torch.no_grad():
        plain = model.backbone(images)
        for gate in (1.0, 0.3, torch.tensor(0.7)):
            gates = {unit.name: gate for unit in model.units}
            assert torch.equal(model(images, model.fresh(), gates), plain)
        for unit in model.units:
            assert torch.equal(model(images, model.fresh(), {unit.name: 1.0}), plain), unit.name


@pytest.mark.parametrize("name", NORMS)
def test_a_closed_unit_is_absent_to_the_bit(
    name: str, make: Make, all_modules: Configs, move: Move, images: Tensor
) -> None:
    model = make(name, *all_modules(name))
    state = move(model)
    with torch.no_grad():
        plain = model.backbone(images)
        assert torch.equal(model(images, state, {unit.name: 0.0 for unit in model.units}), plain)
        assert torch.equal(model(images, state, {}), plain)
        *rest, last = model.units
        others = {unit.name: 1.0 for unit in rest}
        alone = AdaptedBackbone(model.backbone, all_modules(name)[:-1])  # without the last module altogether
        assert last.module.name == "projection"
        expected = alone(images, {n: state[n] for n in alone.fresh()}, others)
        assert torch.equal(model(images, state, others | {last.name: torch.tensor(0.0)}), expected)
        assert not torch.equal(model(images, state, others | {last.name: 1.0}), expected)


@pytest.mark.parametrize("name", NORMS[:3])
def test_a_gate_blends_the_weights(name: str, make: Make, move: Move, images: Tensor) -> None:
    model = make(name, UnitConfig("film", group="all"))
    state, unit = move(model), model.units[0].name
    full, part, plain = model.overlay(state, {unit: 1.0}), model.overlay(state, {unit: 0.25}), model.backbone.tensors()
    assert full.keys() == part.keys()
    for key, tensor in part.items():
        torch.testing.assert_close(tensor, 0.75 * plain[key] + 0.25 * full[key])


def test_two_modules_on_one_site_act_in_order(make: Make, images: Tensor) -> None:
    names = ["bn1"]
    for first, second, expected in (
        ("test_double", "test_add", lambda w: w * 2 + 3),
        ("test_add", "test_double", lambda w: (w + 3) * 2),
    ):
        model = make("test_efficientnet", UnitConfig(first, names=names), UnitConfig(second, names=names))
        by = {"test_double": 1.0, "test_add": 3.0}
        state = {name: torch.full_like(t, by[name.partition("@")[0]]) for name, t in model.fresh().items()}
        gates = {unit.name: 1.0 for unit in model.units}
        weight = model.backbone.tensors()["bn1.weight"]
        torch.testing.assert_close(model.overlay(state, gates)["bn1.weight"], expected(weight))
        on_features = make(
            "test_efficientnet",
            UnitConfig(first, kinds=["features"], group="all"),
            UnitConfig(second, kinds=["features"], group="all"),
        )
        state = {name: torch.full_like(t, by[name.partition("@")[0]]) for name, t in on_features.fresh().items()}
        found = on_features(images, state, {unit.name: 1.0 for unit in on_features.units})
        torch.testing.assert_close(found, expected(on_features.backbone(images)))


@register_module("test_outer")
class Outer(AdapterModule):
    """Adds what its layer gives on twice the input."""

    kinds = frozenset({"block"})

    def __init__(self, site: Site, factor: float) -> None:
        super().__init__(site)
        self.factor = factor
        self.by = nn.Parameter(torch.zeros(()))

    def rerun(self, x: Tensor, y: Tensor, layer: Layer) -> Tensor:
        return y + self.by * self.factor * layer.run(2 * x)


def test_slots_on_one_site_wrap_each_other_in_order(make: Make, images: Tensor) -> None:
    options = {"names": ["blocks.1.0"], "group": "all"}
    model = make(
        "test_efficientnet",
        UnitConfig("test_outer", {"factor": 1.0}, **options),
        UnitConfig("test_outer", {"factor": 3.0}, **options),
    )
    first, second = (unit.name for unit in model.units)
    state = {name: torch.ones_like(tensor) for name, tensor in model.fresh().items()}

    def block(gates: Mapping[str, float]) -> nn.Module:
        plain = copy.deepcopy(model.backbone.model)
        module = plain.get_submodule("blocks.1.0")
        run = module.forward

        def inner(x: Tensor) -> Tensor:
            return run(x) + gates[first] * run(2 * x)

        module.forward = lambda x: inner(x) + gates[second] * 3 * inner(2 * x)
        return plain

    with torch.no_grad():
        for gates in ({first: 1.0, second: 1.0}, {first: 0.5, second: 0.25}, {first: 0.0, second: 1.0}):
            expected = block(gates)(model.backbone.prepare(images))
            torch.testing.assert_close(model(images, state, gates), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_is_read_is_the_pass_itself_not_what_a_slot_runs_again(make: Make, images: Tensor) -> None:
    name = "blocks.1.0"
    around = UnitConfig("test_outer", {"factor": 1.0}, names=[name], group="all")
    alone, both = (make("test_efficientnet", UnitConfig("norm_blend", group="all"), *more) for more in ((), (around,)))
    state = {n: torch.ones_like(t) if n.endswith("|by") else t for n, t in both.fresh().items()}
    _, expected = alone.observe(images, alone.fresh(), {"norm_blend@all": 1.0})
    _, found = both.observe(images, state, {unit.name: 1.0 for unit in both.units})
    inside = [n for n in expected if f"|{name}." in n]
    assert inside
    assert all(torch.equal(found[n], expected[n]) for n in inside)
    assert not all(torch.equal(found[n], expected[n]) for n in expected)


def test_gates_rates_and_trainability_are_separate_things(
    make: Make, all_modules: Configs, move: Move, images: Tensor
) -> None:
    model = make("test_vit", *all_modules("test_vit"))
    names = [unit.name for unit in model.units]
    learned = {unit.name: model.learned_names(unit) for unit in model.units}
    before = {unit.name: (unit.rate, unit.gate, unit.learns) for unit in model.units}
    trained, closed, *_ = names
    state = move(model)
    leaves = {name: state[name].requires_grad_() for unit in (trained, closed) for name in learned[unit]}
    gates = dict.fromkeys(names, 1.0) | {closed: 0.0}
    features = model(images, state | leaves, gates)
    found = torch.autograd.grad(features.sum(), list(leaves.values()), allow_unused=True)
    gradients = dict(zip(leaves, found, strict=True))
    assert all(gradients[name] is not None for name in learned[trained])
    assert all(gradients[name] is None for name in learned[closed])
    # An open unit counts whether it is trained or not; a closed one can be trained again at once.
    still = model(images, {name: tensor.detach() for name, tensor in state.items()}, gates)
    assert torch.equal(still, features)
    assert not still.requires_grad
    assert model(images, state | leaves, gates | {closed: 0.1}).requires_grad
    assert {unit.name: (unit.rate, unit.gate, unit.learns) for unit in model.units} == before
    for unit in model.units:
        assert all(parameter.requires_grad for module in unit.build().values() for parameter in module.parameters())


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "test_convnext"])
def test_going_on_from_the_cut_before_a_unit_is_the_whole_pass(
    name: str, make: Make, all_modules: Configs, move: Move, images: Tensor
) -> None:
    model = make(name, *(UnitConfig(c.module, c.options, group="block") for c in all_modules(name)))
    state = move(model)
    starts = set()
    with torch.no_grad():
        for first in range(0, len(model.units), 3):
            units = model.units[first:]
            gates = {unit.name: 0.8 for unit in units}
            start = model.cut_before(units)
            starts.add(start)
            hidden = images if start is None else model(images, state, {}, stop=start)
            assert torch.equal(model(hidden, state, gates, start=start), model(images, state, gates))
    assert starts - {None}
    assert model.cut_before([]) == "features"


@pytest.mark.parametrize("name", NORMS)
def test_a_large_batch_goes_through_in_parts(
    name: str, make: Make, all_modules: Configs, move: Move, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(name, *all_modules(name))
    state, gates = move(model), {unit.name: 0.8 for unit in model.units}
    sizes: list[int] = []
    run = model.backbone.run
    monkeypatch.setattr(model.backbone, "run", lambda x, *a, **k: sizes.append(len(x)) or run(x, *a, **k))
    whole = model(images, state, gates)
    monkeypatch.setattr("modmeta.adapters.adapted._AT_ONCE", 2 * images[0].numel())
    with torch.no_grad():
        torch.testing.assert_close(model(images, state, gates), whole)
    assert sizes == [5, 2, 2, 1]
    sizes.clear()
    model(images, state, gates)  # what is differentiated keeps one graph
    assert sizes == [5]


def test_a_backbone_whose_images_see_each_other_is_not_split(monkeypatch: pytest.MonkeyPatch) -> None:
    model = AdaptedBackbone(Backbone("test_four_block", pretrained=False, image_size=32), [UnitConfig("film")])
    images = torch.rand(6, 3, 32, 32)
    with torch.no_grad():
        whole = model(images, model.fresh(), {})
        monkeypatch.setattr("modmeta.adapters.adapted._AT_ONCE", 1)
        assert torch.equal(model(images, model.fresh(), {}), whole)


def test_overlays_written_into_a_copy_of_the_timm_model_give_the_same_features(
    make: Make, move: Move, images: Tensor
) -> None:
    for name in NORMS:
        model = make(name, UnitConfig("film"), UnitConfig("lora", {"rank": 3}))
        state, gates = move(model), {unit.name: 0.6 for unit in model.units}
        merged = copy.deepcopy(model.backbone.model)
        merged.load_state_dict(model.overlay(state, gates), strict=False)
        with torch.no_grad():
            found, expected = merged(model.backbone.prepare(images)), model(images, state, gates)
        assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_gradients_reach_state_and_gates(make: Make, all_modules: Configs, move: Move, images: Tensor) -> None:
    model = make("test_efficientnet", *all_modules("test_efficientnet"))
    state = {name: tensor.requires_grad_() for name, tensor in move(model).items()}
    gates = {unit.name: torch.tensor(0.5, requires_grad=True) for unit in model.units}
    model(images, state, gates).square().sum().backward()
    assert all(bool(tensor.grad.any()) for tensor in [*state.values(), *gates.values()] if tensor.grad is not None)
    assert all(tensor.grad is not None for tensor in [*state.values(), *gates.values()])
    assert all(parameter.grad is None for parameter in model.backbone.parameters())


def test_nothing_given_is_written_to(make: Make, all_modules: Configs, move: Move, images: Tensor) -> None:
    model = make("test_efficientnet", *all_modules("test_efficientnet"))
    state = move(model)
    before = {name: tensor.clone() for name, tensor in state.items()}
    gates = {unit.name: 1.0 for unit in model.units}
    with torch.no_grad():
        model(images, state, gates)
        _, observed = model.observe(images, state, gates)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())
    fresh = model.fresh()
    fresh[next(iter(fresh))].add_(1.0)
    assert not torch.equal(model.fresh()[next(iter(fresh))], fresh[next(iter(fresh))])
    reading = {unit.name for unit in model.units if unit.reads}
    assert reading
    for name, tensor in observed.items():
        assert torch.equal(tensor, state[name]) == (name.partition("|")[0] not in reading), name


class Nested(nn.Module):
    """Parameters and buffers of its own and at two depths below."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width))
        self.register_buffer("offset", torch.randn(width))
        self.register_buffer("nothing", None)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))] * 0)
        for _ in range(depth):
            self.layers.append(nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width)))
        self.absent: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x * self.scale + self.offset


@settings(max_examples=25, deadline=None)
@given(width=st.integers(1, 5), depth=st.integers(0, 3), given_share=st.floats(0, 1), seed=st.integers(0, 99))
def test_bind_is_a_functional_call(width: int, depth: int, given_share: float, seed: int) -> None:
    torch.manual_seed(seed)
    module = Nested(width, depth).eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    named = [*module.named_parameters(), *module.named_buffers()]
    some = [(name, tensor) for name, tensor in named if torch.rand(()) < given_share and tensor.is_floating_point()]
    tensors = {name: torch.rand_like(tensor) + 0.5 for name, tensor in some}
    x = torch.randn(4, width)
    view = bind(module, tensors)
    assert torch.equal(view(x), functional_call(module, tensors, (x,)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(dict([*view.named_parameters(), *view.named_buffers()])[name] is t for name, t in tensors.items())


def test_gradients_reach_what_is_bound() -> None:
    module = Nested(3, 2).eval()
    tensors = {name: t.detach().clone().requires_grad_() for name, t in module.named_parameters()}
    bind(module, tensors)(torch.randn(4, 3)).sum().backward()
    assert all(tensor.grad is not None for tensor in tensors.values())
    assert all(parameter.grad is None for parameter in module.parameters())
