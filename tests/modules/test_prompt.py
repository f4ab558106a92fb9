"""Prompt, against a timm ViT whose blocks are run by hand with tokens inserted."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from modmeta.adapters import MODULES, AdaptedBackbone, State, UnitConfig
from modmeta.backbone import Backbone
from modmeta.errors import ModmetaError

Build = Callable[..., tuple[AdaptedBackbone, State]]


@torch.no_grad()
def by_hand(backbone: Backbone, images: Tensor, tokens: Mapping[str, Tensor], deep: bool) -> Tensor:
    """Return features under visual prompt tuning with ``tokens`` by block name; nothing of modmeta in between."""
    model = backbone.model
    x = model.norm_pre(model._pos_embed(model.patch_embed(backbone.prepare(images))))
    count = x.shape[1]
    for name, block in model.blocks.named_children():
        if f"blocks.{name}" in tokens:
            if deep:
                x = x[:, :count]
            x = torch.cat([x, tokens[f"blocks.{name}"].expand(len(x), -1, -1)], dim=1)
        x = block(x)
    return model.forward_head(model.norm(x[:, :count]))


def at_full_strength(state: State) -> State:
    return {name: torch.ones_like(t) if name.endswith("|strength") else t for name, t in state.items()}


def tokens_of(state: State) -> dict[str, Tensor]:
    return {name.split("|")[1]: tensor for name, tensor in state.items() if name.endswith("|tokens")}


@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize("deep", [True, False])
def test_at_strength_one_it_is_visual_prompt_tuning(deep: bool, length: int, build: Build, images: Tensor) -> None:
    model, state = build("test_vit", "prompt", length=length, deep=deep)
    (unit,) = model.units
    state, tokens = at_full_strength(state), tokens_of(state)
    assert list(tokens) == [site.name for site in unit.sites][: None if deep else 1]
    assert all(tensor.shape == (length, 64) for tensor in tokens.values())
    expected = by_hand(model.backbone, images, tokens, deep)
    torch.testing.assert_close(model(images, state, {unit.name: 1.0}), expected, rtol=1e-4, atol=1e-5)
    plain = model.backbone(images)
    torch.testing.assert_close(by_hand(model.backbone, images, {}, deep), plain)
    assert float((expected - plain).abs().max()) > 1e-2


@pytest.mark.parametrize("deep", [True, False])
def test_a_unit_of_some_blocks_prompts_these_only(deep: bool, build: Build, images: Tensor) -> None:
    backbone = build("test_vit", "film")[0].backbone
    names = ["blocks.3", "blocks.4", "blocks.5"]
    model = AdaptedBackbone(backbone, [UnitConfig("prompt", {"deep": deep}, names=names, group="all")])
    state = at_full_strength(model.fresh())
    expected = by_hand(backbone, images, tokens_of(state), deep)
    gates = {model.units[0].name: 1.0}
    torch.testing.assert_close(model(images, state, gates), expected, rtol=1e-4, atol=1e-5)
    hidden = model(images, state, {}, stop="blocks.2")
    assert model.cut_before(model.units) == "blocks.2"
    assert torch.equal(model(hidden, state, gates, start="blocks.2"), model(images, state, gates))


def test_travelling_tokens_need_a_pass_that_begins_before_them(build: Build, images: Tensor) -> None:
    model, state = build("test_vit", "prompt", deep=False)
    hidden = model(images, state, {}, stop="blocks.2")
    with pytest.raises(ModmetaError, match=r"no tokens reach 'blocks\.3'.*behind 'blocks\.2'"):
        model(hidden, state, {model.units[0].name: 1.0}, start="blocks.2")


def test_halfway_is_between_with_and_without(build: Build, images: Tensor) -> None:
    backbone = build("test_vit", "film")[0].backbone
    model = AdaptedBackbone(backbone, [UnitConfig("prompt", names=["blocks.5"])])  # the last block: the rest is linear
    (unit,) = model.units
    fresh, seen = model.fresh(), {}
    for strength in (0.0, 0.25, 1.0):
        state = {n: torch.tensor(strength) if n.endswith("|strength") else t for n, t in fresh.items()}
        slots = model.slots(state, {unit.name: 1.0})
        inner = slots["blocks.5"]
        slots["blocks.5"] = lambda x, y, run, s=strength, inner=inner: seen.setdefault(s, inner(x, y, run))
        backbone.run(images, slots=slots)
    torch.testing.assert_close(seen[0.25], 0.75 * seen[0.0] + 0.25 * seen[1.0])
    assert not torch.allclose(seen[0.0], seen[1.0], atol=1e-3)


@pytest.mark.parametrize("deep", [True, False])
def test_layers_inside_the_block_are_run_again_as_other_units_change_them(
    deep: bool, build: Build, images: Tensor
) -> None:
    backbone = build("test_vit", "film")[0].backbone
    model = AdaptedBackbone(
        backbone, [UnitConfig("prompt", {"deep": deep}, group="all"), UnitConfig("lora", group="all")]
    )
    generator = torch.Generator().manual_seed(4)
    state = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in model.fresh().items()}
    state, gates = at_full_strength(state), {unit.name: 1.0 for unit in model.units}
    changed = Backbone("test_vit", False, 32)
    changed.model.load_state_dict(backbone.model.state_dict() | model.overlay(state, gates))
    expected = by_hand(changed, images, tokens_of(state), deep)
    torch.testing.assert_close(model(images, state, gates), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", [("bottleneck", "prompt"), ("prompt", "bottleneck")])
@torch.no_grad()
def test_earlier_slots_on_the_block_are_run_again_with_it(order: tuple[str, str], build: Build, images: Tensor) -> None:
    backbone = build("test_vit", "film")[0].backbone
    options = {"prompt": {"deep": False}, "bottleneck": {}}
    model = AdaptedBackbone(backbone, [UnitConfig(module, options[module], group="all") for module in order])
    generator = torch.Generator().manual_seed(4)
    state = {n: t + 0.2 * torch.randn(t.shape, generator=generator) for n, t in model.fresh().items()}
    state = at_full_strength(state)
    hand = Backbone("test_vit", False, 32)
    hand.model.load_state_dict(backbone.model.state_dict())
    for site in model.units[0].sites:
        bottleneck = MODULES.get("bottleneck")(site)
        prefix = f"bottleneck@all|{site.name}|"
        bottleneck.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})
        hand.model.get_submodule(site.name).register_forward_hook(
            lambda _m, args, y, bottleneck=bottleneck: bottleneck(args[0], y)
        )
    expected = by_hand(hand, images, tokens_of(state), deep=False)
    found = model(images, state, {unit.name: 1.0 for unit in model.units})
    # Before the prompt it acts on the prompt's tokens too, as a part of the block; behind it, they pass it by.
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4) == (order[0] == "bottleneck")


@torch.no_grad()
def test_two_prompts_on_one_block_see_each_other(build: Build, images: Tensor) -> None:
    backbone = build("test_vit", "film")[0].backbone
    model = AdaptedBackbone(backbone, [UnitConfig("prompt", {"length": 2}, group="all")] * 2)
    first, second = model.units
    state = at_full_strength(model.fresh())
    generator = torch.Generator().manual_seed(5)
    state = {n: torch.randn(t.shape, generator=generator) if n.endswith("tokens") else t for n, t in state.items()}
    both = {
        site.name: torch.cat([state[f"{second.name}|{site.name}|tokens"], state[f"{first.name}|{site.name}|tokens"]])
        for site in first.sites
    }
    expected = by_hand(backbone, images, both, deep=True)
    found = model(images, state, {first.name: 1.0, second.name: 1.0})
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_threads_do_not_see_each_others_tokens(build: Build, images: Tensor) -> None:
    model, state = build("test_vit", "prompt", deep=False)
    gates, inputs = {model.units[0].name: 1.0}, [images[:2], images[2:4], images[4:]]
    state = at_full_strength(state)
    expected = [model(x, state, gates) for x in inputs]
    with ThreadPoolExecutor(3) as executor:
        for _ in range(10):
            found = executor.map(lambda x: model(x, state, gates), inputs)
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@torch.no_grad()
def test_one_set_of_slots_may_serve_many_passes(build: Build, images: Tensor) -> None:
    model, state = build("test_vit", "prompt", deep=False)
    gates = {model.units[0].name: 1.0}
    slots = model.slots(state, gates)
    for x in (images[:2], images):
        assert torch.equal(model.backbone.run(x, slots=slots), model(x, state, gates))


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_it_fits_no_block_of_maps(name: str, build: Build) -> None:
    with pytest.raises(ModmetaError, match=rf"'prompt' acts on block, but {name} .*Prompt\.fits refuses"):
        build(name, "prompt")
