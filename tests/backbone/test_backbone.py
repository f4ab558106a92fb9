"""The forward pass: exactness, overlays, gradients, modes, copies and threads."""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.func import grad, vmap

from modmeta.backbone import Backbone, second_order_safe
from modmeta.errors import ModmetaError


def test_without_overlay_it_is_the_timm_model_bit_for_bit(backbone, images):
    with torch.no_grad():
        expected = backbone.model(backbone.prepare(images))
    assert torch.equal(backbone(images), expected)
    assert torch.equal(backbone.run(images, {}), expected)
    assert expected.shape == (3, backbone.feature_dim)


def test_overlay_of_the_own_tensors_changes_nothing(backbone, images):
    assert torch.equal(backbone(images, backbone.tensors()), backbone(images))


def test_overlay_gives_the_outputs_and_gradients_of_a_model_that_has_these_tensors(backbone, images, change):
    overlay = {name: tensor.requires_grad_() for name, tensor in change(backbone).items()}
    edited = copy.deepcopy(backbone.model)
    edited.load_state_dict({name: tensor.detach() for name, tensor in overlay.items()}, strict=False)
    got, expected = backbone(images, overlay), edited(backbone.prepare(images))
    assert torch.equal(got, expected)
    assert not torch.equal(got, backbone(images))
    (got**2).sum().backward()
    (expected**2).sum().backward()
    parameters = dict(edited.named_parameters())
    for name, tensor in overlay.items():
        if name in parameters:
            torch.testing.assert_close(tensor.grad, parameters[name].grad)
        else:  # running statistics have a gradient in an overlay only
            assert tensor.grad is not None
            assert tensor.grad.abs().sum() > 0


def test_gradients_of_running_statistics_match_finite_differences(get):
    backbone = copy.deepcopy(get("test_resnet")).double()
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    name = "bn1.running_var"
    value = backbone.tensors()[name]

    def loss(var):
        return (backbone(images, {name: var}) ** 2).mean()

    step = 1e-6 * torch.eye(len(value), dtype=torch.float64)[3]
    numeric = (loss(value + step) - loss(value - step)) / 2e-6
    torch.testing.assert_close(grad(loss)(value)[3], numeric, rtol=1e-5, atol=1e-9)


def test_no_gradient_reaches_the_model(backbone, images):
    assert all(parameter.requires_grad for parameter in backbone.model.parameters())
    assert not backbone(images).requires_grad
    assert all(parameter.grad is None for parameter in backbone.model.parameters())


def test_vmap_over_overlays_equals_a_loop(backbone, images, change):
    overlays = [change(backbone, kinds=("norm",), seed=seed) for seed in range(3)]
    stacked = {name: torch.stack([overlay[name] for overlay in overlays]) for name in overlays[0]}
    expected = torch.stack([backbone(images, overlay) for overlay in overlays])
    torch.testing.assert_close(vmap(lambda o: backbone(images, o))(stacked), expected, rtol=1e-4, atol=1e-5)
    tasks = torch.stack([images, images.flip(0), images.flip(3)])
    expected = torch.stack([backbone(x, o) for x, o in zip(tasks, overlays, strict=True)])
    torch.testing.assert_close(vmap(backbone.run)(tasks, stacked), expected, rtol=1e-4, atol=1e-5)


def test_vmap_behind_a_cut_equals_a_loop(backbone, images, change):
    cut = backbone.cuts[len(backbone.cuts) // 2]
    overlays = [change(backbone, kinds=("norm",), seed=seed) for seed in range(2)]
    stacked = {name: torch.stack([overlay[name] for overlay in overlays]) for name in overlays[0]}
    hidden = torch.stack([backbone.run(x, stop=cut.name) for x in (images, images.flip(0))])
    expected = torch.stack([backbone.run(h, o, start=cut.name) for h, o in zip(hidden, overlays, strict=True)])
    got = vmap(lambda h, o: backbone.run(h, o, start=cut.name))(hidden, stacked)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("test_vit", "bias"),
        ("test_resnet", "bias"),
        ("test_resnet", "running_mean"),
        ("test_resnet", "running_var"),
    ],
)
def test_second_order_matches_finite_differences(get, name, local):
    backbone = copy.deepcopy(get(name)).double()
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    site = next(site for site in backbone.sites if site.kind == "norm" and site.depth > 0.5)
    tensor = f"{site.name}.{local}"
    value = backbone.tensors()[tensor]

    def after_one_step(start):
        def loss(x):
            return (backbone(images, {tensor: x}) ** 2).mean()

        return loss(start - 0.5 * grad(loss)(start))

    with second_order_safe():
        exact = grad(after_one_step)(value)
        tracked = value.clone().requires_grad_()
        inner = (backbone(images, {tensor: tracked}) ** 2).mean()
        (slope,) = torch.autograd.grad(inner, tracked, create_graph=True)
        outer = (backbone(images, {tensor: tracked - 0.5 * slope}) ** 2).mean()
        (by_autograd,) = torch.autograd.grad(outer, tracked)
        step = torch.zeros_like(value)
        step[1] = 1e-5
        numeric = (after_one_step(value + step) - after_one_step(value - step)) / 2e-5
    torch.testing.assert_close(exact, by_autograd)
    torch.testing.assert_close(exact[1], numeric, rtol=1e-5, atol=1e-8)


@pytest.mark.fault(35)
def test_train_never_reaches_the_model(get, images):
    parent = nn.Sequential(copy.deepcopy(get("test_resnet")))
    before = parent[0](images)
    parent.train()
    assert parent[0].training
    assert not any(module.training for module in parent[0].model.modules())
    assert torch.equal(parent[0](images), before)


def test_trainable_trains_the_model_and_runs_follow(get, images):
    backbone = copy.deepcopy(get("test_resnet"))
    before, hash_before = backbone(images), backbone.fingerprint()
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1)
    with backbone.trainable() as host:
        host.train()  # as Lightning does, at any time
        assert backbone.model.training
        host.train_forward(images).square().mean().backward()
        optimizer.step()
        inside = backbone(images)
    assert not backbone.model.training
    assert not torch.equal(backbone(images), before)
    assert torch.equal(backbone(images), inside)
    assert torch.equal(backbone(images), backbone.model(backbone.prepare(images)))
    assert backbone.fingerprint() != hash_before
    with pytest.raises(RuntimeError, match="trainable"):
        backbone.train_forward(images)


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_weights_show_in_later_runs(get, images, assign):
    backbone, other = copy.deepcopy(get("test_resnet")), Backbone("test_resnet", False, 32, seed=7)
    backbone(images)  # so that there is a shell that could be out of date
    parent = nn.ModuleDict({"backbone": backbone})
    parent.load_state_dict(nn.ModuleDict({"backbone": other}).state_dict(), assign=assign)
    assert torch.equal(backbone(images), other(images))


def test_moved_weights_show_in_later_runs(get, images):
    backbone = copy.deepcopy(get("test_vit"))
    backbone(images)
    assert nn.ModuleList([backbone]).double()[0](images).dtype == torch.float64


def test_copies_are_independent(get, images):
    backbone = copy.deepcopy(get("test_efficientnet"))
    expected = backbone.run(backbone.run(images, stop=backbone.cuts[2].name), start=backbone.cuts[2].name)
    copies = [copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))]
    buffer = io.BytesIO()
    torch.save(backbone, buffer)
    buffer.seek(0)
    copies.append(torch.load(buffer, weights_only=False))
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(1)
    for other in copies:
        assert torch.equal(other(images), expected)
        assert other.sites == backbone.sites


def test_threads_do_not_see_each_other(get, images, change):
    backbone = copy.deepcopy(get("test_resnet"))
    overlays = [change(backbone, seed=seed) for seed in range(4)]
    expected = [backbone(images, overlay) for overlay in overlays]
    wrong = []

    def work(index):
        for _ in range(10):
            if not torch.equal(backbone(images, overlays[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_prepare_takes_bytes_and_floats_and_normalises(get):
    backbone = get("test_resnet")
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    got = backbone.prepare(pixels)
    mean, std = (torch.tensor(backbone.preprocessing[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(got, (pixels / 255 - mean) / std)
    torch.testing.assert_close(backbone.prepare(pixels / 255), got)
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(2, 3, 40, 32),
        torch.zeros(2, 1, 32, 32),
        torch.zeros(3, 32, 32),
        torch.zeros(2, 3, 32, 32, dtype=torch.int64),
    ],
)
def test_prepare_refuses_what_are_no_images(get, wrong):
    with pytest.raises(ModmetaError, match=r"give|resize"):
        get("test_resnet").prepare(wrong)


def test_unknown_and_misshapen_tensors_are_refused(get, images):
    backbone = get("test_resnet")
    with pytest.raises(ModmetaError, match=r"did you mean 'bn1\.weight'"):
        backbone(images, {"bn1.weigth": torch.ones(32)})
    with pytest.raises(ModmetaError, match="shape"):
        backbone(images, {"bn1.weight": torch.ones(1)})


def test_overlay_given_is_not_written_to(get, images, change):
    backbone = get("test_resnet")
    overlay = change(backbone)
    before = dict(overlay)
    backbone(images, overlay)
    assert overlay.keys() == before.keys()
    assert all(overlay[name] is before[name] for name in before)


def test_a_first_run_inside_a_transform_or_inference_mode_is_like_any_other(get, images):
    name, value = "bn1.weight", torch.ones(32)
    expected = grad(lambda w: get("test_resnet")(images, {name: w}).sum())(value)
    backbone = copy.deepcopy(get("test_resnet"))
    backbone._anatomy = None
    with torch.inference_mode():
        cut = backbone.cuts[3].name
        hidden = backbone.run(images, stop=cut)
        backbone.run(hidden, start=cut)
        backbone(images)
    assert torch.equal(grad(lambda w: backbone(images, {name: w}).sum())(value), expected)
    backbone._shells.clear()
    vmap(grad(lambda w: backbone(images, {name: w}).sum()))(value[None])
    assert torch.equal(grad(lambda w: backbone(images, {name: w}).sum())(value), expected)
