"""Each module that ships, against what it is said to compute, on a plain timm model."""

import copy
from collections.abc import Callable

import pytest
import torch
from modmeta_modules import norm_blend
from torch import Tensor, nn

from modmeta.adapters import AdaptedBackbone, State, UnitConfig
from modmeta.backbone import Backbone

Build = Callable[..., tuple[AdaptedBackbone, State]]


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet_gn", "test_vit", "test_convnext"])
def test_film_scales_and_shifts_every_norm(name: str, images: Tensor, build: Build) -> None:
    model, state = build(name, "film")
    (unit,) = model.units
    plain = copy.deepcopy(model.backbone.model)
    for site in unit.sites:
        norm = plain.get_submodule(site.name)
        size = max(float(norm.weight.detach().pow(2).mean().sqrt()), 0.1)
        norm.weight.data += size * state[f"{unit.name}|{site.name}|scale"]
        norm.bias.data += size * state[f"{unit.name}|{site.name}|shift"]
    with torch.no_grad():
        expected = plain(model.backbone.prepare(images))
        torch.testing.assert_close(model(images, state, {unit.name: 1.0}), expected, rtol=1e-4, atol=1e-4)
        assert float((expected - model.backbone(images)).abs().max()) > 1e-2


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "test_convnext"])
@pytest.mark.parametrize(("rank", "alpha"), [(1, 1.0), (3, 2.0)])
def test_lora_adds_a_product_of_low_rank(name: str, rank: int, alpha: float, images: Tensor, build: Build) -> None:
    model, state = build(name, "lora", rank=rank, alpha=alpha)
    (unit,) = model.units
    plain = copy.deepcopy(model.backbone.model)
    for site in unit.sites:
        weight = plain.get_submodule(site.name).weight.data
        down, up = (state[f"{unit.name}|{site.name}|{part}"] for part in ("down", "up"))
        change = torch.einsum("or,rk->ok", up, down).reshape(weight.shape)
        assert torch.linalg.matrix_rank(change.flatten(1)) <= rank
        weight += alpha * weight.pow(2).mean().sqrt() / rank**0.5 * change
    with torch.no_grad():
        expected = plain(model.backbone.prepare(images))
        found = model(images, state, {unit.name: 1.0})
        assert float((found - expected).abs().max()) < 1e-4 * max(1.0, float(expected.abs().max()))
        assert float((expected - model.backbone(images)).abs().max()) > 1e-2 * float(expected.abs().max())


def test_lora_of_a_small_weight_has_that_weights_rank(build: Build) -> None:
    model, _ = build("test_efficientnet", "lora", rank=1000)
    for name, tensor in model.fresh().items():
        _, site, part = name.split("|")
        rows, *rest = model.backbone.site(site).shapes["weight"]
        assert tensor.shape[1 if part == "up" else 0] == min(rows, torch.Size(rest).numel())


@pytest.mark.parametrize(("name", "rank"), [("test_resnet", 4), ("test_vit", None), ("test_vit", 10_000)])
def test_projection_is_a_matrix(name: str, rank: int | None, images: Tensor, build: Build) -> None:
    model, state = build(name, "projection", rank=rank)
    (unit,) = model.units
    width = model.backbone.feature_dim
    up = state[f"{unit.name}|features|up"]
    down = state.get(f"{unit.name}|features|down", torch.eye(width) * width**0.5)
    matrix = torch.eye(width) + up @ down / (up.shape[1] * width) ** 0.5
    for gate in (1.0, 0.4):
        gated = torch.eye(width) + gate * (matrix - torch.eye(width))
        expected = (gated @ model.backbone(images).T).T
        torch.testing.assert_close(model(images, state, {unit.name: gate}), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def with_statistics_of(backbone: Backbone, support: Tensor) -> nn.Module:
    """Return a copy of the timm model whose batch norms really have the running statistics of some images."""
    model = copy.deepcopy(backbone.model)

    def replace(module: nn.BatchNorm2d, args: tuple[Tensor, ...]) -> None:
        x = args[0].transpose(0, 1).flatten(1).double()
        module.running_mean.copy_(x.mean(1))
        module.running_var.copy_(x.var(1, correction=0))

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(replace)
    model(backbone.prepare(support))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module._forward_pre_hooks.clear()
    return model


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
@torch.no_grad()
def test_norm_blend_at_gate_one_is_the_supports_own_statistics(
    name: str, images: Tensor, monkeypatch: pytest.MonkeyPatch, build: Build
) -> None:
    monkeypatch.setattr(norm_blend, "_FLOOR", 0.0)  # exact but for the floor under small variances
    model, _ = build(name, "norm_blend")
    gates = {model.units[0].name: 1.0}
    query = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 0.5
    passed, observed = model.observe(images, model.fresh(), gates)
    replaced = with_statistics_of(model.backbone, images)
    for x in (images, query):
        expected = replaced(model.backbone.prepare(x))
        found = model(x, observed, gates)
        assert float((found - expected).abs().max()) < 1e-3 * float(expected.abs().max())
        assert float((model.backbone(x) - expected).abs().max()) > 1e-2 * float(expected.abs().max())
    torch.testing.assert_close(passed, model(images, observed, gates), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_norm_blend_blends_gamma_and_beta_and_observes_under_its_own_gate(images: Tensor, build: Build) -> None:
    model, _ = build("test_efficientnet", "norm_blend")
    (unit,) = model.units
    _, full = model.observe(images, model.fresh(), {unit.name: 1.0})
    _, part = model.observe(images, model.fresh(), {unit.name: 0.3})
    first, *_, last = unit.sites

    def read(state: State, site: str) -> Tensor:
        return state[f"{unit.name}|{site}|shift"]

    # The first layer sees the same input whatever the gate; the last sees what the earlier ones let through.
    assert torch.equal(read(full, first.name), read(part, first.name))
    assert not torch.allclose(read(full, last.name), read(part, last.name), atol=1e-3)
    plain = model.backbone.tensors()
    whole, half = (model.overlay(full, {unit.name: gate}) for gate in (1.0, 0.5))
    for name, tensor in half.items():
        torch.testing.assert_close(tensor, (plain[name] + whole[name]) / 2)


@torch.no_grad()
def test_norm_blend_of_the_sources_own_statistics_changes_nothing(images: Tensor, build: Build) -> None:
    model, _ = build("test_efficientnet", "norm_blend")
    host_ = copy.deepcopy(model.backbone)
    host_.model.load_state_dict(with_statistics_of(model.backbone, images).state_dict())
    same = AdaptedBackbone(host_, [UnitConfig("norm_blend", group="all")])
    _, observed = same.observe(images, same.fresh(), {"norm_blend@all": 1.0})
    assert all(float(tensor.abs().max()) < 1e-2 for tensor in observed.values())
    torch.testing.assert_close(same(images, observed, {"norm_blend@all": 1.0}), host_(images), rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_norm_blend_of_a_channel_that_is_silent_keeps_the_next_image_within_bounds(build: Build) -> None:
    model, _ = build("test_efficientnet", "norm_blend")
    gates = {model.units[0].name: 1.0}
    _, observed = model.observe(torch.zeros(1, 3, 32, 32), model.fresh(), gates)
    features = model(torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(4)), observed, gates)
    assert bool(torch.isfinite(features).all())
    variances = [t for name, t in model.overlay(observed, gates).items() if name.endswith("running_var")]
    assert all(float(variance.min()) > 4e-4 for variance in variances)


def test_residual_is_a_parallel_1x1_convolution(images: Tensor, build: Build) -> None:
    model, state = build("test_resnet", "residual")
    (unit,) = model.units
    plain = copy.deepcopy(model.backbone.model)
    for site in unit.sites:
        conv = plain.get_submodule(site.name)
        beside = nn.Conv2d(conv.in_channels, conv.out_channels, 1, conv.stride, bias=False)
        size = float(conv.weight.detach().pow(2).mean().sqrt()) * conv.kernel_size[0]
        beside.weight.data = size * state[f"{unit.name}|{site.name}|matrix"][..., None, None]
        conv.register_forward_hook(lambda _, args, out, beside=beside: out + beside(args[0]))
    with torch.no_grad():
        expected = plain(model.backbone.prepare(images))
        found = model(images, state, {unit.name: 1.0})
        assert float((found - expected).abs().max()) < 1e-4 * max(1.0, float(expected.abs().max()))
        assert float((expected - model.backbone(images)).abs().max()) > 1e-2 * float(expected.abs().max())


def test_ia3_scales_keys_values_and_hidden_units(images: Tensor, build: Build) -> None:
    model, state = build("test_vit", "ia3")
    (unit,) = model.units
    assert {site.name.rpartition(".")[2] for site in unit.sites} == {"qkv", "fc2"}
    plain = copy.deepcopy(model.backbone.model)
    for site in unit.sites:
        factor = state[f"{unit.name}|{site.name}|log_factor"].exp()
        layer = plain.get_submodule(site.name)
        if site.name.endswith("qkv"):
            whole = torch.cat([torch.ones(len(factor) // 2), factor])  # queries are left alone
            layer.register_forward_hook(lambda _, args, out, whole=whole: out * whole)
        else:
            layer.register_forward_pre_hook(lambda _, args, factor=factor: (args[0] * factor,))
    with torch.no_grad():
        expected = plain(model.backbone.prepare(images))
        found = model(images, state, {unit.name: 1.0})
        assert float((found - expected).abs().max()) < 1e-4 * max(1.0, float(expected.abs().max()))
        assert float((expected - model.backbone(images)).abs().max()) > 1e-3 * float(expected.abs().max())


@pytest.mark.parametrize("per_tap", [False, True])
def test_scale_multiplies_depthwise_kernels(per_tap: bool, images: Tensor, build: Build) -> None:
    model, state = build("test_efficientnet", "scale", per_tap=per_tap)
    (unit,) = model.units
    plain = copy.deepcopy(model.backbone.model)
    for site in unit.sites:
        plain.get_submodule(site.name).weight.data *= state[f"{unit.name}|{site.name}|log_factor"].exp()
    with torch.no_grad():
        expected = plain(model.backbone.prepare(images))
        torch.testing.assert_close(model(images, state, {unit.name: 1.0}), expected, rtol=1e-4, atol=1e-4)
    weights = sum(plain.get_submodule(site.name).weight.numel() for site in unit.sites)
    assert unit.cost.parameters == (weights if per_tap else sum(site.channels for site in unit.sites))


def test_full_reaches_every_weight_and_bias_of_its_layers(build: Build) -> None:
    model, state = build("test_vit", "full")
    (unit,) = model.units
    changed = model.overlay(state, {unit.name: 1.0})
    layers = {name for name, _ in model.backbone.model.named_parameters() if name.endswith((".weight", ".bias"))}
    assert set(changed) == layers
    tensors = model.backbone.tensors()
    assert all(not torch.equal(changed[name], tensors[name]) for name in layers)
    assert unit.cost.parameters == sum(tensors[name].numel() for name in layers)


def test_bias_shifts_biases_only(build: Build) -> None:
    model, state = build("test_efficientnet", "bias")
    (unit,) = model.units
    changed = model.overlay(state, {unit.name: 1.0})
    assert set(changed) == {f"{site.name}.bias" for site in unit.sites}
    assert unit.cost.parameters == sum(tensor.numel() for tensor in changed.values())


def test_full_unscaled_adds_its_change_as_it_is(build: Build) -> None:
    model, state = build("test_vit", "full", scaled=False)
    (unit,) = model.units
    overlay, tensors = model.overlay(state, {unit.name: 1.0}), model.backbone.tensors()
    for key, change in state.items():
        name = ".".join(key.split("|")[1:])
        assert torch.equal(overlay[name], tensors[name] + change)
