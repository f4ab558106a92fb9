"""Private adaptation of a learner: nothing but the clipped sums may look at the images."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import Fitted, head_only
from torch import Tensor

from modmeta.adaptation import Adapted, Support
from modmeta.adaptation import private as descent
from modmeta.adaptation.private import Privacy
from modmeta.data import DigitsDomains
from modmeta.errors import ModmetaError
from modmeta.learners import private
from modmeta.learners.private import adapt_privately, public_plan


@pytest.fixture(scope="module")
def support() -> Support:
    digits = DigitsDomains(32)
    images = torch.cat([digits.load(digits.ids("neon", name)[:3]) for name in ("0", "1", "2")])
    return Support(images, torch.arange(3).repeat_interleave(3), ("0", "1", "2"))


def run(fitted: Fitted, support: Support, epsilon: float = 3.0, seed: int = 0) -> Adapted:
    with torch.no_grad():
        return adapt_privately(fitted.learner.eval(), support, Privacy(epsilon), np.random.default_rng(seed))


def tensors_of(adapted: Adapted) -> dict[str, Tensor]:
    return dict(adapted.state) | vars(adapted.classifier) | {"gates": adapted.plan.gates, "rates": adapted.plan.rates}


def equal(one: Adapted, two: Adapted) -> bool:
    first, second = tensors_of(one), tensors_of(two)
    same = [torch.equal(first[n], second[n]) for n in first if isinstance(first[n], Tensor)]
    return all(same) and one.report == two.report


@pytest.mark.parametrize("epsilon", [3.0, 3000.0], ids=["head alone", "with units"])
def test_only_the_clipped_sums_see_the_images(
    epsilon: float, fitted: Fitted, support: Support, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = replace(support, images=255 - support.images.flip(0))
    assert not equal(run(fitted, support, epsilon), run(fitted, others, epsilon))

    def blind(tensors: Mapping[str, Tensor], *rest: Any) -> Tensor:
        return torch.zeros(sum(tensor.numel() for tensor in tensors.values()), dtype=torch.double)

    monkeypatch.setattr(descent, "clipped_sum", blind)
    assert equal(run(fitted, support, epsilon), run(fitted, others, epsilon))


def test_the_gradient_of_an_image_is_its_own(fitted: Fitted, support: Support, monkeypatch: pytest.MonkeyPatch) -> None:
    others = support.images.flip(-1).clone()
    others[4] = support.images[4]
    found: list[dict[str, Tensor]] = []

    def look(initial: Mapping[str, Tensor], rates: Any, loss: descent.Loss, *rest: Any) -> dict[str, Tensor]:
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in initial.items()}
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss(leaves, 4), list(leaves.values()))
        found.append(dict(zip(leaves, gradients, strict=True)))
        return dict(initial)

    monkeypatch.setattr(private, "private_descent", look)
    for images in (support.images, others):
        run(fitted, replace(support, images=images), math.inf)
    assert {name.partition("@")[0] for name in found[0]} == {"head", "film", "projection"}
    assert all(float(gradient.norm()) > 0 for gradient in (found[0]["head"],))
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_units_are_adapted_where_the_noise_leaves_signal(fitted: Fitted, support: Support) -> None:
    assert not run(fitted, support, 1.0).plan.gate_of()
    loud = run(fitted, support, math.inf)
    assert loud.plan.gate_of()
    assert not [name for name in loud.plan.gate_of() if name.startswith("norm_blend")]
    assert loud.report["privacy"]["steps"] == 2


def test_more_noise_leaves_less_of_the_images(fitted: Fitted, support: Support) -> None:
    source = fitted.learner.sources.view().classifier(support.classes).weight
    strengths = []
    for epsilon in (0.1, 1.0, 10.0):
        adapted = run(fitted, support, epsilon)
        assert adapted.report["privacy"]["epsilon_spent"] <= epsilon
        strengths.append(float((adapted.classifier.weight - source).norm()))
    assert strengths == sorted(strengths)
    assert strengths[0] < 0.1 * strengths[-1]


def test_a_seed_repeats_the_noise(fitted: Fitted, support: Support) -> None:
    assert equal(run(fitted, support, seed=1), run(fitted, support, seed=1))
    assert not equal(run(fitted, support, seed=1), run(fitted, support, seed=2))


def test_the_public_plan_knows_no_support(fitted: Fitted) -> None:
    one, two = public_plan(fitted.learner), public_plan(fitted.learner)
    assert torch.equal(one.gates, two.gates)
    assert torch.isfinite(one.rates).all()


def test_what_cannot_be_private(fitted: Fitted, support: Support) -> None:
    with pytest.raises(ModmetaError, match="needs labelled images"):
        run(fitted, replace(support, labels=None))
    with pytest.raises(ModmetaError, match="class 'zebra' is new"):
        run(fitted, replace(support, classes=("0", "1", "zebra")))
    with pytest.raises(ModmetaError, match="this learner has none"):
        adapt_privately(head_only(), support, Privacy(1.0))
