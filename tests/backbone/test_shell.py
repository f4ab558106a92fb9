"""Slots and observers."""

import copy

import pytest
import torch

from modmeta.backbone import Backbone
from modmeta.errors import ModmetaError


def test_slots_change_the_output_of_their_site_only(backbone, images):
    block = next(site for site in backbone.sites if site.kind == "block")
    seen = {}

    def slot(x, y, run):
        seen["shapes"] = x.shape, y.shape
        return y * 2

    changed = backbone.run(images, slots={block.name: slot})
    assert not torch.equal(changed, backbone(images))
    assert seen["shapes"][1][0] == len(images)
    assert torch.equal(backbone.run(images, slots={block.name: lambda x, y, run: y}), backbone(images))


def test_slot_equals_a_forward_hook_on_the_model(get, images):
    backbone = get("test_vit")
    module = backbone.model.get_submodule("blocks.1")
    handle = module.register_forward_hook(lambda m, args, y: y + args[0].tanh())
    with torch.no_grad():
        expected = backbone.model(backbone.prepare(images))
    handle.remove()
    assert torch.equal(backbone.run(images, slots={"blocks.1": lambda x, y, run: y + x.tanh()}), expected)


def test_a_slot_may_run_its_module_again_under_the_same_overlay(get, images, change):
    backbone = get("test_vit")
    overlay = change(backbone)
    edited = copy.deepcopy(backbone.model)
    edited.load_state_dict(overlay, strict=False)
    module = edited.get_submodule("blocks.1")
    module.register_forward_hook(lambda m, args, y: y + m.forward(args[0].flip(1)))
    with torch.no_grad():
        expected = edited(backbone.prepare(images))
    slots = {"blocks.1": lambda x, y, run: y + run(x.flip(1))}
    assert torch.equal(backbone.run(images, overlay, slots=slots), expected)
    assert not torch.equal(backbone(images, overlay), expected)


def test_observers_replace_tensors_for_one_call(get, images):
    backbone = get("test_resnet")
    site = backbone.site("layer1.0.bn1")
    seen = []

    def observer(x):
        seen.append(x)
        return {"running_mean": x.mean((0, 2, 3)), "running_var": x.var((0, 2, 3), correction=0)}

    got = backbone.run(images, observers={site.name: observer})
    overlay = {
        f"{site.name}.running_mean": seen[0].mean((0, 2, 3)),
        f"{site.name}.running_var": seen[0].var((0, 2, 3), correction=0),
    }
    assert torch.equal(got, backbone(images, overlay))
    assert not torch.equal(got, backbone(images))
    # A local replacement goes before the overlay, and ends with the call.
    local = backbone.run(images, {f"{site.name}.running_mean": torch.zeros(32)}, observers={site.name: observer})
    assert torch.equal(local, got)
    assert torch.equal(backbone.run(images, observers={site.name: lambda x: None}), backbone(images))


def test_gradients_flow_through_slots_and_observers(get, images):
    backbone = get("test_resnet")
    scale = torch.ones(32, requires_grad=True)
    features = backbone.run(
        images,
        slots={"layer1.0": lambda x, y, run: y * scale.view(1, -1, 1, 1)},
        observers={"layer1.0.bn1": lambda x: {"weight": scale * 1.5}},
    )
    (gradient,) = torch.autograd.grad(features.sum(), scale)
    assert gradient.abs().sum() > 0


def test_only_what_lies_between_the_cuts_acts(backbone, images):
    first, second = backbone.cuts[1], backbone.cuts[3]
    called = []
    observers = {site.name: (lambda x, name=site.name: called.append(name)) for site in backbone.sites if site.called}
    hidden = backbone.run(images, stop=first.name, observers=observers)
    before, called[:] = list(called), []
    backbone.run(hidden, start=first.name, stop=second.name, observers=observers)
    inside, called[:] = list(called), []
    backbone.run(images, observers=observers)
    orders = [backbone.site(name).order for name in before]
    assert orders == list(range(first.order + 1))
    assert [backbone.site(name).order for name in inside] == list(range(first.order + 1, second.order + 1))
    assert called[: len(before) + len(inside)] == before + inside
    assert called[-1] == "features"


def test_a_slot_may_run_the_backbone_again(get, images):
    backbone = get("test_resnet")
    plain = backbone(images)
    seen = []

    def slot(x, y, run):
        seen.append(backbone(images))
        return y * 2

    changed = backbone.run(images, slots={"layer1.0": slot})
    assert torch.equal(seen[0], plain)
    assert not torch.equal(changed, plain)


def test_errors_leave_nothing_behind(get, images):
    backbone = get("test_resnet")
    plain = backbone(images)
    with pytest.raises(ZeroDivisionError):
        backbone.run(images, {"bn1.weight": torch.zeros(32)}, slots={"layer1.0": lambda x, y, run: 1 / 0})
    with pytest.raises(ModmetaError, match="did you mean 'running_mean'"):
        backbone.run(images, observers={"bn1": lambda x: {"runing_mean": x.mean((0, 2, 3))}})
    with pytest.raises(ModmetaError, match="unknown site"):
        backbone.run(images, slots={"layer1": lambda x, y, run: y})
    assert torch.equal(backbone(images), plain)


def test_caches_of_the_model_do_not_outlive_a_run():
    backbone = Backbone("levit_128s", False, 64)  # keeps its attention biases from the first pass in eval mode
    images = torch.rand(2, 3, 64, 64)
    plain = backbone(images)
    name = "stages.0.blocks.0.attn.attention_biases"
    biases = torch.randn(backbone.tensors()[name].shape, requires_grad=True)
    overlay = {
        f"{site.name}.weight": torch.ones(site.shapes["weight"]) for site in backbone.sites if site.kind == "norm"
    }
    changed = backbone(images, {**overlay, name: biases})
    assert not torch.equal(changed, backbone(images, overlay))
    assert torch.autograd.grad(changed.square().sum(), biases)[0].abs().sum() > 0
    assert torch.equal(backbone(images), plain)
