"""What every module costs, counted by PyTorch, and how far a step of it goes."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from modmeta.adapters import MODULES, AdaptedBackbone, State, UnitConfig
from modmeta.backbone import Backbone, Rerun, second_order_safe
from modmeta.backbone.shell import Slot

Build = Callable[..., tuple[AdaptedBackbone, State]]

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("bias", "test_efficientnet", {}),
    ("bottleneck", "test_resnet", {}),
    ("bottleneck", "test_vit", {"reduction": 3}),
    ("film", "test_resnet", {}),
    ("full", "test_efficientnet", {}),
    ("ia3", "test_vit", {}),
    ("lora", "test_efficientnet", {}),
    ("lora", "test_vit", {"rank": 1}),
    ("norm_blend", "test_efficientnet", {}),
    ("projection", "test_resnet", {}),
    ("projection", "test_vit", {"rank": None}),
    ("prompt", "test_vit", {"length": 3}),
    ("prompt", "test_vit", {"deep": False}),
    ("residual", "test_resnet", {}),
    ("scale", "test_efficientnet", {}),
    ("scale", "test_efficientnet", {"per_tap": True}),
]


def test_all_modules_are_among_the_cases() -> None:
    shipped = {name for name in MODULES.names() if MODULES.get(name).__module__.startswith("modmeta_modules.")}
    assert {module for module, *_ in CASES} == shipped


@torch.no_grad()
def weight_macs(run: Callable[[], object]) -> int:
    """Return the multiply-accumulates of all matrix products and convolutions with weights."""
    with FlopCounterMode(display=False) as counter:
        run()
    found = {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}
    # Attention multiplies activations with activations, which no site counts.
    return sum(count for name, count in found.items() if "attention" not in name and "bmm" not in name) // 2


@pytest.mark.parametrize(("module", "name", "options"), CASES)
def test_cost_is_what_is_stored_and_computed(
    module: str, name: str, options: dict[str, Any], build: Build, images: Tensor
) -> None:
    model, state = build(name, module, **options)
    (unit,) = model.units
    assert unit.cost.parameters == sum(tensor.numel() for tensor in state.values())
    image, gates = images[:1], {unit.name: 1.0}
    overlay, slots = model.overlay(state, gates), model.slots(state, gates)  # an overlay is computed once
    plain = weight_macs(lambda: model.backbone(image))
    assert weight_macs(lambda: model.backbone.run(image, overlay, slots=slots)) - plain == unit.cost.macs
    assert (unit.cost.macs > 0) == unit.module.is_slot()


# Without norm_blend, which takes no steps, prompt, whose tokens have no effect before its strength has moved, and
# bias, which moves in units of the layer's output, as timm's biases are zero.
STEPPING = [case for case in CASES if case[0] not in ("norm_blend", "prompt", "bias")]


@pytest.mark.parametrize(("module", "name", "options"), STEPPING)
@torch.no_grad()
def test_a_step_of_a_hundredth_is_a_change_of_about_one_per_cent(
    module: str, name: str, options: dict[str, Any], images: Tensor
) -> None:
    backbone = Backbone(name, pretrained=False, image_size=32)
    model = AdaptedBackbone(backbone, [UnitConfig(module, options, group="all")])
    generator = torch.Generator().manual_seed(6)
    state = {n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in model.fresh().items()}
    gates = {model.units[0].name: 1.0}
    tensors, sizes = backbone.tensors(), []
    for tensor_name, changed in model.overlay(state, gates).items():
        if float(tensors[tensor_name].abs().max()) > 0.01:  # what starts at zero has no size of its own
            sizes.append(relative(changed, tensors[tensor_name]))

    def measure(x: Tensor, y: Tensor, run: Rerun, slot: Slot) -> Tensor:
        sizes.append(relative(slot(x, y, run), y))
        return y

    slots = {site: partial(measure, slot=slot) for site, slot in model.slots(state, gates).items()}
    backbone.run(images, slots=slots)
    assert 0.004 < sum(sizes) / len(sizes) < 0.02


def relative(changed: Tensor, plain: Tensor) -> float:
    return float((changed - plain).norm() / plain.norm())


@pytest.mark.parametrize(
    ("module", "name", "options"), [case for case in CASES if case[0] in ("bottleneck", "prompt", "projection")]
)
def test_second_order_gradients_of_slots_match_finite_differences(
    module: str, name: str, options: dict[str, Any], build: Build, images: Tensor
) -> None:
    single, state = build(name, module, **options)
    model = AdaptedBackbone(copy.deepcopy(single.backbone).double(), [UnitConfig(module, options, group="all")])
    state = {key: tensor.double() for key, tensor in state.items()}
    images, gates = images[:2].double(), {model.units[0].name: 0.7}
    key = next(key for key in state if key.endswith(("|up", "|strength")))

    def after_one_step(start: Tensor) -> Tensor:
        here = state | {key: start}
        with second_order_safe():
            loss = model(images, here, gates).square().mean()
            (slope,) = torch.autograd.grad(loss, start, create_graph=True)
            return model(images, here | {key: start - 0.1 * slope}, gates).square().mean()

    start = state[key].clone().requires_grad_()
    (exact,) = torch.autograd.grad(after_one_step(start), start)
    direction = torch.randn(start.shape, dtype=start.dtype, generator=torch.Generator().manual_seed(8))
    high, low = (after_one_step((start + step * direction).detach().requires_grad_()) for step in (1e-5, -1e-5))
    numeric = (high - low).detach() / 2e-5
    torch.testing.assert_close((exact * direction).sum(), numeric, rtol=1e-5, atol=1e-8)
