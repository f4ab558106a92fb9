"""Sites of known models, and all architectures that must work."""

from collections import Counter
from itertools import pairwise

import pytest
import torch

from modmeta.backbone import KINDS, Backbone, second_order_safe
from modmeta.errors import ModmetaError

# By architecture: the smallest useful image size, and what of the anatomy is easy to count by hand.
ARCHITECTURES = {
    "resnet18": (32, {"conv": 17, "pwconv": 3, "norm": 20, "block": 8}),
    "tf_efficientnet_lite0": (32, {"conv": 1, "dwconv": 16, "norm": 49, "block": 16}),
    "mobilenetv3_small_100": (32, {"dwconv": 11, "norm": 34, "block": 12}),
    "convnext_atto": (32, {"dwconv": 12, "block": 12}),
    "regnety_002": (32, {"conv": 14, "block": 13}),
    "fastvit_t8": (32, {"conv": 1}),
    "repvit_m0_9": (32, {"conv": 2}),
    "vit_tiny_patch16_224": (32, {"qkv": 12, "proj": 12, "mlp": 24, "norm": 25, "block": 12}),
    "deit_tiny_patch16_224": (32, {"qkv": 12, "proj": 12, "mlp": 24, "norm": 25, "block": 12}),
    "swin_tiny_patch4_window7_224": (32, {"qkv": 12, "mlp": 24, "block": 12}),
    "swinv2_tiny_window8_256": (32, {"qkv": 12, "mlp": 24, "block": 12}),
    "beit_base_patch16_224": (32, {"qkv": 12, "proj": 12, "mlp": 24, "block": 12}),
    "eva02_tiny_patch14_224": (28, {"qkv": 12, "proj": 12, "block": 12}),
    "mobilevit_xxs": (32, {"qkv": 9, "proj": 9, "mlp": 18, "dwconv": 7}),
    "poolformer_s12": (32, {"pwconv": 24, "block": 12}),
    "levit_128s": (32, {"conv": 4}),
    "edgenext_xx_small": (32, {"qkv": 3, "mlp": 24, "block": 12}),
}

# Tokens without windows, convolutions, rotary or relative positions.
ANY_LENGTH = {"vit_tiny_patch16_224", "deit_tiny_patch16_224"}


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_architecture(name, build):
    size, counts = ARCHITECTURES[name]
    backbone = build(name, size)
    images = torch.rand(2, 3, size, size)
    # PyTorch picks matmul kernels by `requires_grad`, even without gradients: compare with a frozen model.
    backbone.requires_grad_(False)
    expected = backbone.model(backbone.prepare(images))
    assert expected.shape == (2, backbone.feature_dim)
    assert torch.equal(backbone(images), expected)

    sites = backbone.sites
    found = Counter(site.kind for site in sites)
    assert found.keys() <= set(KINDS)
    assert {kind: found[kind] for kind in counts} == counts
    assert [site.order for site in sites] == list(range(len(sites)))
    assert sites[-1].name == "features"
    assert sites[-1].depth == 1
    for one, other in pairwise(sites):
        assert (one.depth, one.stage, one.block) <= (other.depth, other.stage, other.block)
    tensors = backbone.tensors()
    for site in sites:
        for local, shape in site.shapes.items():
            assert tensors[f"{site.name}.{local}"].shape == shape
        assert (site.macs > 0) == (site.kind not in ("norm", "features"))
        assert site.positions > 0
        assert site.any_length == (site.kind == "block" and name in ANY_LENGTH)

    # Exactness of every cut is what makes it one; here for images that its proof did not see.
    assert len(backbone.cuts) >= 5
    for cut in backbone.cuts[:: max(1, len(backbone.cuts) // 4)]:
        hidden = backbone.run(images, stop=cut.name)
        assert torch.equal(backbone.run(hidden, start=cut.name), expected)

    for kind in ("norm", "qkv", "dwconv"):
        if found[kind]:
            site = [site for site in sites if site.kind == kind][-1]
            weight = f"{site.name}.weight"
            noise = torch.randn(site.shapes["weight"], generator=torch.Generator().manual_seed(0))
            assert not torch.equal(backbone(images, {weight: tensors[weight] + noise}), expected)


def test_channels_and_their_axis_are_those_of_the_output(backbone, images):
    outputs = {}
    slots = {site.name: (lambda x, y, run, name=site.name: outputs.setdefault(name, y)) for site in backbone.sites}
    backbone.run(images, slots=slots)
    for site in backbone.sites:
        assert outputs[site.name].shape[site.channel_dim] == site.channels
        assert outputs[site.name].numel() == len(images) * site.positions * site.channels


def test_macs_of_a_block_are_those_of_the_layers_inside(backbone):
    layers = [site for site in backbone.sites if site.kind != "block"]
    for block in (site for site in backbone.sites if site.kind == "block"):
        assert block.macs == sum(site.macs for site in layers if site.name.startswith(f"{block.name}."))
    assert backbone.macs() == sum(site.macs for site in layers)


def test_a_block_of_any_length_really_takes_more_tokens(get, images):
    backbone = get("test_vit")
    lengths = []

    def slot(x, y, run):
        longer = torch.cat([x, torch.zeros(len(x), 7, x.shape[-1])], dim=1)
        lengths.append(run(longer).shape[1] - y.shape[1])
        return y

    blocks = [site.name for site in backbone.sites if site.any_length]
    assert len(blocks) == 6
    assert torch.equal(backbone.run(images, slots=dict.fromkeys(blocks, slot)), backbone(images))
    assert lengths == [7] * 6


def test_macs_of_known_layers(get):
    sites = {site.name: site for site in get("test_vit").sites}
    assert sites["patch_embed.proj"].macs == 2 * 2 * 64 * 3 * 16 * 16
    assert sites["blocks.0.attn.qkv"].macs == 5 * 64 * 192
    grouped = Backbone("regnety_002", False, 32).site("s1.b1.conv2.conv")
    assert (grouped.kind, grouped.groups) == ("conv", 3)
    assert grouped.macs == 8 * 8 * 24 * 8 * 9


def test_weights_that_are_read_and_never_called_are_sites(build):
    backbone = build("eva02_tiny_patch14_224", 28)
    site = backbone.site("blocks.3.attn.qkv")
    assert not site.called
    assert site.macs == 5 * 192 * 576
    assert backbone.cut_before([site.name]) == "blocks.2"
    images = torch.rand(1, 3, 28, 28)
    weight = torch.zeros(site.shapes["weight"], requires_grad=True)
    with second_order_safe():
        features = backbone(images, {f"{site.name}.weight": weight})
    assert torch.autograd.grad(features.square().sum(), weight)[0].abs().sum() > 0
    with pytest.raises(ModmetaError, match="never calls site"):
        backbone.run(images, slots={site.name: lambda x, y, run: y})


def test_group_norm_and_stages(get):
    backbone = get("test_efficientnet_gn")
    assert all("running_mean" not in site.shapes for site in backbone.sites)
    assert sorted({site.stage for site in backbone.sites}) == [0, 1, 2, 3, 4]
    assert {site.stage for site in get("test_vit").sites} == {0}
