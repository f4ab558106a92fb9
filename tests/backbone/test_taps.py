import copy

import pytest
import torch

from modmeta.backbone import Backbone
from modmeta.errors import ModmetaError

CASES = [
    ("test_efficientnet", ("blocks.0", "blocks.1")),
    ("test_vit", ("blocks.0",)),
    ("test_convnext", ("stages.1",)),
]


def built(name: str, taps: tuple[str, ...] = ()) -> Backbone:
    return Backbone(name, pretrained=False, image_size=64, taps=taps)


def images(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "taps"), CASES)
def test_features_are_the_models_own_and_then_mean_and_deviation_of_each_tap(name, taps):
    plain, tapped = built(name), built(name, taps)
    seen = []
    for each in taps:
        plain.model.get_submodule(each).register_forward_hook(lambda _m, _a, y: seen.append(y))
    with torch.no_grad():
        own = plain.model(plain.prepare(images()))
        features = tapped(images())
    rows = [y.flatten(2) if y.ndim == 4 else y.movedim(1, 2) for y in seen]  # (B, C, positions)
    expected = [torch.cat([y.mean(2), (y.var(2, correction=0) + 1e-6).sqrt()], 1) for y in rows]
    torch.testing.assert_close(features, torch.cat([own, *expected], 1))
    assert tapped.own_dim == own.shape[1]
    assert tapped.feature_dim == features.shape[1]


@pytest.mark.parametrize(("name", "taps"), CASES)
def test_the_model_keeps_its_tensors_and_its_own_features(name, taps):
    plain, tapped = built(name), built(name, taps)
    assert tapped.model.state_dict().keys() == plain.model.state_dict().keys()
    assert torch.equal(tapped(images())[:, : tapped.own_dim], plain(images()))
    assert torch.equal(copy.deepcopy(tapped)(images()), tapped(images()))


@pytest.mark.parametrize(("name", "taps"), CASES)
def test_every_cut_up_to_the_first_tap_is_kept_and_gives_the_same_features(name, taps):
    plain, tapped = built(name), built(name, taps)
    whole = tapped(images())
    names = [cut.name for cut in plain.cuts]
    last = max(place for place, each in enumerate(names) if f"{each}.".startswith(f"{taps[0]}."))
    assert last + 1 < len(names)
    assert [cut.name for cut in tapped.cuts] == names[: last + 1]
    for cut in tapped.cuts:
        assert torch.equal(tapped.run(tapped.run(images(), stop=cut.name), start=cut.name), whole)
    late = [site.name for site in tapped.sites if site.kind != "features"][-1:]
    assert tapped.cut_before(late) in [cut.name for cut in tapped.cuts]


def test_calibration_gives_each_tapped_channel_the_same_spread_and_each_tap_that_of_the_own_features():
    backbone = built("test_efficientnet", ("blocks.0", "blocks.1"))
    raw = backbone(images(64))
    scaled = backbone.calibrate(raw)
    torch.testing.assert_close(backbone(images(64)), scaled)
    own, tapped = scaled.split([backbone.own_dim, scaled.shape[1] - backbone.own_dim], dim=1)
    assert torch.equal(own, raw[:, : backbone.own_dim])
    before = raw[:, backbone.own_dim :].std(0, correction=0)
    lively = before > before.mean()
    assert tapped.std(0, correction=0)[lively].std() < 0.05 * tapped.std(0, correction=0)[lively].mean()
    ratio = tapped.std(0, correction=0).norm() / own.std(0, correction=0).norm()
    assert 0.5 * 2**0.5 < ratio < 2**0.5
    torch.testing.assert_close(backbone.calibrate(scaled), scaled)


def test_a_constant_map_gives_finite_gradients():
    backbone = built("test_efficientnet", ("blocks.0",))
    weight = torch.zeros_like(backbone.tensors()["conv_stem.weight"]).requires_grad_()
    backbone.run(images(), {"conv_stem.weight": weight}).sum().backward()
    assert torch.isfinite(weight.grad).all()


def test_taps_and_their_scale_are_part_of_the_fingerprint():
    plain, tapped = built("test_efficientnet"), built("test_efficientnet", ("blocks.0",))
    before = tapped.fingerprint()
    assert before != plain.fingerprint()
    tapped.calibrate(tapped(images(8)))
    assert tapped.fingerprint() != before
    again = built("test_efficientnet", ("blocks.0",))
    assert tapped.fingerprint(calibrated=False) == again.fingerprint(calibrated=False)


def test_batched_overlays_reach_the_taps():
    backbone = built("test_efficientnet", ("blocks.0",))
    weight = backbone.tensors()["bn1.weight"]
    batch, x = torch.stack([weight, 2 * weight]), images()
    together = torch.func.vmap(lambda w: backbone.run(x, {"bn1.weight": w}))(batch)
    alone = torch.stack([backbone.run(x, {"bn1.weight": w}) for w in batch])
    torch.testing.assert_close(together, alone)
    assert not torch.allclose(alone[0, :, backbone.own_dim :], alone[1, :, backbone.own_dim :])


@pytest.mark.parametrize(
    ("taps", "said"),
    [(("blocks.9",), "blocks"), (("blocks.0", "blocks.0"), "twice"), (("global_pool",), "neither maps")],
)
def test_wrong_taps_are_refused_in_one_line(taps, said):
    with pytest.raises(ModmetaError, match=said) as error:
        built("test_efficientnet", taps)
    assert "\n" not in str(error.value)
