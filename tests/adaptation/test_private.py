"""Private descent: what one image can change, how much noise there is, and what the accountant says of it."""

import math
import sys
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modmeta.adaptation.private import Privacy, clipped_sum, private_descent, secret_random, signal_share
from modmeta.errors import ModmetaError

TENSORS = {"a": torch.tensor([0.5, -1.0, 2.0]), "b": torch.ones(2, 2)}
SCALE = {"a": 1.0, "b": 0.2}


def squared_error(images: Tensor) -> tuple[object, int]:
    """Return the loss of tensors against targets ``(S, 7)``, one per image."""

    def loss(tensors: Mapping[str, Tensor], image: int) -> Tensor:
        return 0.5 * (torch.cat([tensor.flatten() for tensor in tensors.values()]) - images[image]).square().sum()

    return loss, len(images)


def sum_of(images: Tensor, clip: float) -> Tensor:
    return clipped_sum(TENSORS, SCALE, *squared_error(images), clip)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**20), st.integers(1, 6), st.floats(1e-3, 1e3), st.floats(-4, 8))
def test_one_image_moves_the_sum_by_no_more_than_the_sensitivity(
    seed: int, count: int, clip: float, size: float
) -> None:
    random = torch.Generator().manual_seed(seed)
    images = 10**size * torch.randn(count, 7, generator=random)
    other = images.clone()
    other[-1] = -(10**size) * torch.randn(7, generator=random)
    moved = (sum_of(images, clip) - sum_of(other, clip)).norm()
    assert float(moved) <= Privacy(1.0, clip=clip).sensitivity * (1 + 1e-9)
    added = (sum_of(images, clip) - sum_of(images[:-1], clip)).norm()
    assert float(added) <= clip * (1 + 1e-9)


def test_two_opposite_images_reach_the_sensitivity() -> None:
    far = torch.full((1, 7), 1e4)
    assert float((sum_of(far, 0.5) - sum_of(-far, 0.5)).norm()) == pytest.approx(1.0, rel=1e-3)


def test_the_sum_is_that_of_gradients_by_hand() -> None:
    images = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    here = torch.cat([tensor.flatten() for tensor in TENSORS.values()])
    scale = torch.tensor([1.0] * 3 + [0.2] * 4)
    gradients = scale * (here - images)
    short = gradients * (1.5 / gradients.norm(dim=1, keepdim=True)).clamp_max(1)
    assert (gradients.norm(dim=1) > 1.5).any()
    torch.testing.assert_close(sum_of(images, 1.5), short.sum(0).double(), rtol=1e-5, atol=1e-6)


@pytest.mark.fault(17)
def test_an_image_without_a_finite_gradient_counts_as_nothing() -> None:
    images = torch.randn(3, 7)
    images[1, 2] = torch.nan
    torch.testing.assert_close(sum_of(images, 1.0), sum_of(images[[0, 2]], 1.0))


def analytic_delta(epsilon: float, deviation: float) -> float:
    """Return delta of the Gaussian mechanism of sensitivity 1: Balle and Wang, ICML 2018, theorem 8."""

    def normal(x: float) -> float:
        return 0.5 * math.erfc(-x / 2**0.5)

    a = 1 / (2 * deviation)
    return normal(a - epsilon * deviation) - math.exp(epsilon) * normal(-a - epsilon * deviation)


def renyi_epsilon(deviation: float, steps: int, delta: float) -> float:
    """Return epsilon by Mironov, CSF 2017, proposition 7, and the conversion of Canonne et al., NeurIPS 2020."""
    orders = 1 + np.logspace(-3, 4, 20001)
    found = steps * orders / (2 * deviation**2) + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)
    return float(found.min())


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 3.0, 8.0, 30.0])
@pytest.mark.parametrize("steps", [1, 3, 40])
def test_the_accountant_keeps_the_promise_and_wastes_little(epsilon: float, steps: int) -> None:
    privacy = Privacy(epsilon, 1e-5)
    noise = privacy.noise_multiplier(steps)
    assert privacy.spent(noise, steps) <= epsilon
    assert privacy.spent(noise, steps) == pytest.approx(renyi_epsilon(noise, steps, 1e-5), rel=2e-3)
    assert privacy.spent(noise, steps) > 0.998 * epsilon
    # Gaussian steps on everything compose to one Gaussian mechanism, of which the exact delta is known.
    assert analytic_delta(epsilon, noise / steps**0.5) < 1e-5
    assert analytic_delta(0.8 * epsilon, noise / steps**0.5) > 1e-5


def test_the_noise_is_what_the_accountant_was_told() -> None:
    privacy, steps = Privacy(2.0, 1e-5, clip=0.7), 2
    initial = {"a": torch.zeros(20_000, dtype=torch.double)}

    def flat(tensors: Mapping[str, Tensor], image: int) -> Tensor:
        return 0.0 * tensors["a"].sum()

    random = np.random.default_rng(0)
    moved = private_descent(initial, [{"a": 0.1}] * steps, flat, 10, privacy, random)["a"]
    size = 0.1 * signal_share(privacy, steps, 10, 20_000) * math.sqrt(20_000) / (10 * 0.7)
    expected = size * math.sqrt(steps) * privacy.noise_multiplier(steps) * 2 * 0.7
    # 20,000 draws: the standard error of a deviation is 0.5 %, of the mean 0.7 %.
    assert float(moved.std()) == pytest.approx(expected, rel=0.02)
    assert abs(float(moved.mean())) < 0.03 * expected
    assert float((moved.abs() > 2 * expected).double().mean()) == pytest.approx(0.0455, abs=0.006)


def test_the_noise_is_a_function_of_the_seed_and_without_one_never_the_same() -> None:
    def run(random: np.random.Generator) -> Tensor:
        images = torch.ones(2, 7)
        return private_descent(TENSORS, [SCALE], *squared_error(images), Privacy(3.0), random)["b"]

    torch.testing.assert_close(run(np.random.default_rng(5)), run(np.random.default_rng(5)), rtol=0, atol=0)
    assert not torch.equal(run(np.random.default_rng(5)), run(np.random.default_rng(6)))
    assert not torch.equal(run(secret_random()), run(secret_random()))


def test_without_steps_nothing_moves_and_nothing_is_spent() -> None:
    privacy = Privacy(1.0)
    found = private_descent(TENSORS, [], *squared_error(torch.ones(2, 7)), privacy, np.random.default_rng(0))
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert privacy.to_dict(0)["epsilon_spent"] == 0.0


def test_without_noise_a_descent_ends_at_the_mean() -> None:
    images = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
    privacy = Privacy(math.inf, clip=100.0)
    rates = [{"a": 2.0, "b": 2.0}] * 80
    found = private_descent(TENSORS, rates, *squared_error(images), privacy, np.random.default_rng(0))
    torch.testing.assert_close(torch.cat([t.flatten() for t in found.values()]), images.mean(0), rtol=0.02, atol=0.02)
    assert privacy.spent(privacy.noise_multiplier(80), 80) == math.inf


def test_less_privacy_or_more_images_leave_more_signal() -> None:
    shares = [signal_share(Privacy(epsilon), 3, images, 500) for epsilon, images in ((1, 20), (8, 20), (8, 80))]
    assert shares == sorted(shares)
    assert signal_share(Privacy(math.inf), 3, 20, 500) == 1.0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0.0,), "epsilon must be above 0"),
        ((math.nan,), "epsilon must be above 0"),
        ((1.0, 0.0), "delta must lie between 0 and 1"),
        ((1.0, 1e-5, -1.0), "clip must be above 0"),
        ((1.0, 1e-5, math.inf), "clip must be above 0"),
    ],
)
def test_promises_that_cannot_be_made(arguments: tuple[float, ...], expected: str) -> None:
    with pytest.raises(ModmetaError, match=expected):
        Privacy(*arguments)


def test_without_opacus_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    with pytest.raises(ModmetaError, match=r"needs Opacus: pip install modmeta\[private\]"):
        Privacy(1.0).noise_multiplier(3)
