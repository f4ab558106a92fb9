"""Signals in double precision against direct computations, and what each is smallest for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from modmeta.adaptation import SIGNALS, Signal, SignalConfig, SignalMixture
from modmeta.adaptation.signals import Seen
from modmeta.errors import ModmetaError

WAYS, DIM = 3, 6
Categorical = torch.distributions.Categorical


def make(name: str, **options: Any) -> Signal:
    signal: Signal = SIGNALS.make(name, **options)
    return signal


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


WEIGHT = normal(DIM, WAYS, seed=7)


def seen(features: Tensor, views: Tensor | None = None) -> Seen:
    views = features.new_zeros(0, *features.shape) if views is None else views
    return Seen(features, views, features @ WEIGHT, lambda x: x @ WEIGHT)


def of(logits: Tensor) -> Seen:
    return Seen(logits, logits.new_zeros(0, *logits.shape), logits, lambda x: x)


# ---------------------------------------------------------------------- predictions


def test_entropy_and_information() -> None:
    features = normal(5, DIM)
    p = (features @ WEIGHT).softmax(1)
    mean, of_mean = Categorical(p).entropy().mean(), Categorical(p.mean(0)).entropy()
    torch.testing.assert_close(make("entropy").loss(seen(features)), mean)
    torch.testing.assert_close(make("information_maximisation").loss(seen(features)), mean - of_mean)
    torch.testing.assert_close(
        make("information_maximisation", diversity=0.3).loss(seen(features)), mean - 0.3 * of_mean
    )


def test_one_class_for_all_satisfies_entropy_but_not_information() -> None:
    collapsed = of(torch.tensor([[90.0, 0, 0]] * 3))
    spread = of(90.0 * torch.eye(3))
    assert float(make("entropy").loss(collapsed)) == pytest.approx(0, abs=1e-12)
    assert float(make("entropy").loss(spread)) == pytest.approx(0, abs=1e-12)
    assert float(make("information_maximisation").loss(collapsed)) == pytest.approx(0, abs=1e-12)
    assert float(make("information_maximisation").loss(spread)) == pytest.approx(-math.log(3))


# ---------------------------------------------------------------------- consistency


def test_consistency_is_the_divergence_from_the_images_predictions() -> None:
    features, views = normal(4, DIM).requires_grad_(), normal(3, 4, DIM, seed=1).requires_grad_()
    loss = make("consistency").loss(seen(features, views))
    target = Categorical(logits=features @ WEIGHT)
    each = [torch.distributions.kl_divergence(target, Categorical(logits=view @ WEIGHT)) for view in views]
    torch.testing.assert_close(loss, torch.stack(each).mean())
    to_images, to_views = torch.autograd.grad(loss, [features, views], allow_unused=True)
    assert to_images is None or not to_images.any()  # the image's own prediction counts as fixed
    assert to_views.abs().max() > 1e-3
    assert float(make("consistency").loss(seen(features, features.detach().expand(3, -1, -1)))) == pytest.approx(0)


def test_views_of_consistency_are_mirrored_and_shifted() -> None:
    images = torch.arange(2 * 3 * 6 * 6).reshape(2, 3, 6, 6).to(torch.uint8)
    mirrored, back, forth = make("consistency", shift=0.3).views(images)
    assert torch.equal(mirrored, images.flip(3))
    assert torch.equal(back[..., :4, :4], images[..., 2:, 2:])
    assert torch.equal(forth[..., 2:, 2:], images[..., :4, :4])
    assert torch.equal(back[..., -1, -1], images[..., -1, -1])
    assert torch.equal(back[..., 4, :4], images[..., -1, 2:])  # the border repeated
    assert len(make("consistency", flip=False).views(images)) == make("consistency", flip=False).count == 2
    assert len(make("consistency", shift=0.0).views(images)) == make("consistency", shift=0.0).count == 1


# ---------------------------------------------------------------------- rotation


@pytest.mark.parametrize("images", [2, 5])
def test_rotation_leaves_every_image_out_of_the_regression_that_judges_it(images: int) -> None:
    features = normal(4, images, DIM)
    x = features.transpose(0, 1).flatten(0, 1)
    x = torch.nn.functional.normalize(x - x.mean(0), dim=1)
    y = torch.eye(4, dtype=torch.double).repeat(images, 1) - 0.25
    errors = []
    for image in range(images):
        rest = torch.tensor([row // 4 != image for row in range(4 * images)])
        weight = torch.linalg.solve(x[rest].T @ x[rest] + 0.5 * torch.eye(DIM).double(), x[rest].T @ y[rest])
        errors.append((y[~rest] - x[~rest] @ weight).square().sum(1))
    found = make("rotation", ridge=0.5).loss(seen(features[0], features[1:]))
    torch.testing.assert_close(found, torch.cat(errors).mean())


def test_rotation_is_small_where_features_tell_the_turns_and_chance_where_they_do_not() -> None:
    told = torch.eye(4, dtype=torch.double)[:, None].expand(4, 6, 4) + 0.01 * normal(4, 6, 4)
    assert float(make("rotation").loss(seen_raw(told))) < 0.01
    assert float(make("rotation").loss(seen_raw(normal(1, 6, 4).expand(4, 6, 4)))) > 0.7  # 0.75: nothing is known
    one = normal(4, 1, DIM).requires_grad_()
    loss = make("rotation").loss(seen_raw(one))
    assert float(loss) == pytest.approx(0.75)
    assert float(torch.autograd.grad(loss, one)[0].abs().max()) < 1e-12  # a single image teaches nothing


def seen_raw(turns: Tensor) -> Seen:
    return Seen(turns[0], turns[1:], turns[0], lambda x: x)


def test_views_of_rotation_are_quarter_turns() -> None:
    images = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    first, second, third = make("rotation").views(images)
    assert torch.equal(second, images.flip(2, 3))
    assert torch.equal(first, images.transpose(2, 3).flip(2))
    assert torch.equal(third, first.flip(2, 3))


# ---------------------------------------------------------------------- mixtures


def test_a_mixture_is_the_weighted_sum_each_with_its_own_views() -> None:
    configs = [SignalConfig("consistency", 0.5), SignalConfig("entropy", 2.0), SignalConfig("rotation")]
    mixture = SignalMixture(configs)
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    everything = mixture.images(images)
    assert everything.shape == (4 * (1 + 3 + 0 + 3), 3, 8, 8)

    def embed(pictures: Tensor) -> Tensor:
        return pictures[:, 0].flatten(1) @ normal(64, DIM, seed=3)

    def classify(x: Tensor) -> Tensor:
        return x @ WEIGHT

    own = embed(images)
    expected = torch.zeros((), dtype=torch.double)
    for config in configs:
        signal = make(config.name)
        views = [embed(view) for view in signal.views(images)]
        expected = expected + config.weight * signal.loss(seen(own, torch.stack(views) if views else None))
    torch.testing.assert_close(mixture.loss(embed(everything), own @ WEIGHT, classify), expected)


def test_no_signals_change_nothing() -> None:
    images = torch.rand(2, 3, 4, 4)
    assert not SignalMixture([])
    assert torch.equal(SignalMixture([]).images(images), images)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("entropie", {}, "unknown signal 'entropie'.*entropy"),
        ("entropy", {"diversity": 1.0}, "unknown option of signal 'entropy'"),
        ("information_maximisation", {"diversity": -1.0}, "signals: diversity must be"),
        ("rotation", {"ridge": 0.0}, "signals: ridge must be"),
        ("consistency", {"shift": 0.6}, r"signals: shift must lie in 0..0.5"),
        ("consistency", {"shift": 0.0, "flip": False}, "compares nothing"),
    ],
)
def test_options_that_cannot_be(name: str, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ModmetaError, match=expected):
        SignalMixture([SignalConfig(name, options=options)])


def test_a_weight_of_nothing_is_refused() -> None:
    with pytest.raises(ModmetaError, match="signals: weight of 'entropy' must be finite and above 0, got 0"):
        SignalConfig("entropy", 0.0)
