"""Cuts: exact, honest about what they skip, and safe to use again and again."""

import copy
import warnings

import pytest
import torch

from modmeta.backbone import Backbone
from modmeta.errors import ModmetaError


def test_prefix_and_suffix_are_the_whole_for_every_cut(backbone, images):
    expected = backbone(images)
    assert len(backbone.cuts) >= 5
    for cut in backbone.cuts:
        hidden = backbone.run(images, stop=cut.name)
        assert hidden.shape == (3, *cut.shape)
        for _ in range(2):  # the activations are as good the second time
            assert torch.equal(backbone.run(hidden, start=cut.name), expected)


def test_from_cut_to_cut(backbone, images):
    first, second = backbone.cuts[1].name, backbone.cuts[3].name
    hidden = backbone.run(images, stop=first)
    assert torch.equal(backbone.run(hidden, start=first, stop=second), backbone.run(images, stop=second))
    assert backbone.run(hidden, start=first, stop=first) is hidden


def test_overlay_behind_a_cut_equals_the_overlay_in_a_full_run(backbone, images, change):
    for cut in backbone.cuts[::2]:
        behind = {site.name for site in backbone.sites if site.order > cut.order}
        overlay = {
            name: tensor.requires_grad_()
            for name, tensor in change(backbone).items()
            if name.rpartition(".")[0] in behind
        }
        if not overlay:
            continue
        full = backbone(images, overlay)
        part = backbone.run(backbone.run(images, stop=cut.name), overlay, start=cut.name)
        assert torch.equal(full, part)
        some = list(overlay)[:3]
        gradients = [torch.autograd.grad(y.square().sum(), [overlay[name] for name in some]) for y in (full, part)]
        for one, other in zip(*gradients, strict=True):
            assert torch.equal(one, other)


def test_cut_before_is_the_last_cut_before_all_sites(backbone):
    assert backbone.cut_before(["features"]) == "features"
    assert backbone.cut_before([backbone.sites[0].name, "features"]) is None
    for site in backbone.sites[:-1]:
        cut = backbone.cut_before([site.name, "features"])
        earlier = [cut.name for cut in backbone.cuts if cut.order < site.order]
        assert cut == (earlier[-1] if earlier else None)
        assert site.block == len(earlier)
        if site.shapes:
            assert backbone.cut_before([f"{site.name}.weight"]) == cut


def test_a_tensor_of_the_model_itself_cannot_be_skipped(get):
    assert get("test_vit").cut_before(["cls_token"]) is None


def test_features_are_a_pseudo_cut(get, images):
    backbone = get("test_vit")
    slots = {"features": lambda x, y, run: y + 1}
    plain = backbone.run(images, stop="features", slots=slots)
    assert torch.equal(plain, backbone(images))
    assert torch.equal(backbone.run(plain, start="features", slots=slots), backbone.run(images, slots=slots))
    assert backbone.macs("features") == 0


def test_macs_fall_from_cut_to_cut(backbone):
    left = [backbone.macs(), *(backbone.macs(cut.name) for cut in backbone.cuts)]
    assert left == sorted(left, reverse=True)
    assert left[0] == sum(site.macs for site in backbone.sites if site.kind != "block")


def test_residual_branches_that_give_zero_are_not_taken_for_unused():
    # timm starts the last norm of a residual branch at zero: skipping the branch changes no output then.
    names = {cut.name for cut in Backbone("test_resnet", False, 32).cuts}
    assert not any(".downsample." in name for name in names)


def test_models_that_write_into_their_input_are_not_cut_there(get):
    names = {cut.name for cut in get("test_resnet").cuts}
    assert "bn1" not in names  # the activation behind it works in place
    assert "maxpool" in names


def test_wrong_cuts_and_activations_are_refused(get, images):
    backbone = get("test_resnet")
    first, last = backbone.cuts[0].name, backbone.cuts[-1].name
    with pytest.raises(ModmetaError, match="unknown cut"):
        backbone.run(images, stop="layer9")
    with pytest.raises(ModmetaError, match="give what run"):
        backbone.run(images, start=first)
    with pytest.raises(ModmetaError, match="behind"):
        backbone.run(backbone.run(images, stop=last), start=last, stop=first)
    with pytest.raises(ModmetaError, match="behind"):
        backbone.run(backbone(images), start="features", stop=first)
    with pytest.raises(ModmetaError, match="unknown site"):
        backbone.cut_before(["layer9"])


class Whole(torch.nn.Module):
    """A model that no module boundary divides: its input is added to its output."""

    def __init__(self, inner):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.inner = inner

    def forward(self, x):
        return self.inner(self.conv(x)).mean((2, 3)) + x.mean((1, 2, 3))[:, None]


def test_a_model_that_cannot_be_cut_works_and_says_so_once(get, images):
    backbone = copy.deepcopy(get("test_resnet"))
    backbone.model = Whole(torch.nn.Conv2d(4, 5, 1)).eval()
    backbone._anatomy, backbone.feature_dim = None, 5
    with pytest.warns(UserWarning, match="cannot be cut"):
        assert backbone.cuts == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backbone.cut_before(["inner"]) is None
        assert [site.name for site in backbone.sites] == ["conv", "inner", "features"]
        assert backbone(images).shape == (3, 5)


def test_examining_leaves_the_global_random_state_alone():
    state = torch.get_rng_state()
    assert Backbone("test_vit", False, 32, seed=3).cuts
    assert torch.equal(torch.get_rng_state(), state)
