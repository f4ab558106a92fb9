"""The four-block network: its formula against PyTorch's own layers, and what the backbone's contract asks of it."""

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from modmeta.backbone import Backbone
from modmeta.errors import ModmetaError


@pytest.fixture
def host() -> Backbone:
    return Backbone("test_four_block", pretrained=False).double()


@pytest.fixture
def pixels() -> Tensor:
    return torch.rand(6, 3, 28, 28, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def expected(host: Backbone, images: Tensor, tensors: dict[str, Tensor] | None = None) -> Tensor:
    """The network as the papers write it: convolution, PyTorch's batch norm in train mode, ReLU, then pooling."""
    t = host.tensors() | (tensors or {})
    x = images.mean(1, keepdim=True)
    for block in range(4):
        x = F.conv2d(x, t[f"blocks.{block}.conv.weight"], padding=1)
        weight, bias = t[f"blocks.{block}.norm.weight"], t[f"blocks.{block}.norm.bias"]
        x = F.max_pool2d(F.relu(F.batch_norm(x, None, None, weight, bias, training=True)), 2)
    return x.flatten(1)


def test_it_computes_the_published_network(host: Backbone, pixels: Tensor) -> None:
    torch.testing.assert_close(host(pixels), expected(host, pixels), rtol=0, atol=1e-12)


def test_it_computes_the_same_in_plain_operations(host: Backbone, pixels: Tensor) -> None:
    batched, traced = vmap(host)(pixels[None])[0], make_fx(lambda x: host(x))(pixels)
    names = {str(node.target) for node in traced.graph.nodes}
    assert any("mean" in name for name in names)
    assert not any("batch_norm" in name for name in names)
    for found in (batched, traced(pixels)):
        torch.testing.assert_close(found, expected(host, pixels), rtol=0, atol=1e-12)


def test_weights_and_affines_can_be_replaced_at_sites_of_kind_conv_and_norm(host: Backbone, pixels: Tensor) -> None:
    kinds = [(site.name, site.kind, site.stage) for site in host.sites if site.kind in ("conv", "norm")]
    assert kinds == [(f"blocks.{i}.{kind}", kind, i) for i in range(4) for kind in ("conv", "norm")]
    assert [site.shapes for site in host.sites if site.kind == "norm"] == [{"weight": (4,), "bias": (4,)}] * 4
    generator = torch.Generator().manual_seed(0)
    changed = {
        name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator, dtype=torch.double)
        for name, tensor in host.tensors().items()
    }
    torch.testing.assert_close(host(pixels, changed), expected(host, pixels, changed), rtol=0, atol=1e-12)


def test_every_cut_goes_on_bit_for_bit(host: Backbone, pixels: Tensor) -> None:
    assert [cut.name for cut in host.cuts[:3]] == ["blocks.0", "blocks.1", "blocks.2"]
    for cut in host.cuts:
        assert torch.equal(host.run(host.run(pixels, stop=cut.name), start=cut.name), host(pixels))


def test_a_query_depends_on_its_batch(host: Backbone, pixels: Tensor) -> None:
    assert not torch.allclose(host(pixels)[:3], host(pixels[:3]), atol=1e-3)


def test_second_derivatives_under_vmap_are_those_of_a_loop(host: Backbone, pixels: Tensor) -> None:
    names = [name for name in host.tensors() if "norm" in name]
    tensors = {name: host.tensors()[name] + 0.1 for name in names}
    tasks = torch.stack([pixels, pixels.flip(0).square()])

    def inner(own: dict[str, Tensor], images: Tensor) -> Tensor:
        return host(images, own).square().sum(1).mean()

    def outer(own: dict[str, Tensor], images: Tensor) -> Tensor:
        moved = grad(inner)(own, images)
        return inner({name: own[name] - 0.1 * moved[name] for name in own}, images.flip(-1))

    batched = vmap(grad(outer), in_dims=(None, 0))(tensors, tasks)
    for task, images in enumerate(tasks):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        first = torch.autograd.grad(expected(host, images, leaves).square().sum(1).mean(), [*leaves.values()],
                                    create_graph=True)  # fmt: skip
        moved = {name: leaf - 0.1 * g for (name, leaf), g in zip(leaves.items(), first, strict=True)}
        loss = expected(host, images.flip(-1), moved).square().sum(1).mean()
        for name, found in zip(names, torch.autograd.grad(loss, [*leaves.values()]), strict=True):
            torch.testing.assert_close(batched[name][task], found, rtol=1e-10, atol=1e-10)


def test_it_is_a_timm_model_with_options() -> None:
    model = timm.create_model("four_block", num_classes=7, width=8, img_size=32)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    assert model.num_features == 32
    assert isinstance(model.get_classifier(), nn.Linear)
    model.reset_classifier(0)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 32)
    assert sum(p.numel() for p in timm.create_model("four_block", num_classes=0).parameters()) == 111_680
    own = {name: tensor * 2 for name, tensor in model.state_dict().items()}
    assert functional_call(model, own, (torch.rand(2, 3, 32, 32),)).shape == (2, 32)


@pytest.mark.parametrize("size", [28, 32, 84])
def test_the_features_are_the_last_map(size: int) -> None:
    assert Backbone("test_four_block", pretrained=False, image_size=size).feature_dim == 4 * (size // 16) ** 2


def test_images_that_are_too_small_are_refused() -> None:
    with pytest.raises(ModmetaError, match="16 pixels"):
        Backbone("test_four_block", pretrained=False, image_size=12)
