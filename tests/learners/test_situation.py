"""What a learner collects for its indicators, and what it leaves alone when none of them asks."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import Fitted
from torch import Tensor

from modmeta.adaptation import INDICATORS, Support
from modmeta.errors import ModmetaError
from modmeta.learners import ModularMetaLearner
from modmeta.learners.measuring import episode_support

ALL = [name for name in INDICATORS.names() if not name.startswith("test_")]
FREE = [name for name in ALL if not INDICATORS.get(name).needs]


@pytest.fixture(scope="module")
def support() -> Support:
    data = tiny.digits()
    data.setup()
    return episode_support(data.episode("test", 1), hide=False)


def measured(fitted: Fitted, **changes: Any) -> ModularMetaLearner:
    """Return a learner on the sources and the bank of a fit, whose policy is another one."""
    learner = tiny.modular(**changes).eval()
    learner.model.backbone.load_state_dict(fitted.learner.model.backbone.state_dict())
    learner.sources = fitted.learner.sources
    return learner


def passes(learner: ModularMetaLearner, support: Support, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Return how many images went forward through the backbone, and back through the units, to describe one."""
    forward, backward = [], []
    run, grad = learner.model.backbone.run, torch.autograd.grad

    def watched(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("start") is None:
            forward.append(len(x))
        return run(x, *args, **kwargs)

    def counted(outputs: Tensor, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(inputs, Tensor):
            backward.append(len(outputs))
        return grad(outputs, inputs, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(learner.model.backbone, "run", watched)
        patch.setattr(torch.autograd, "grad", counted)
        learner.situate(support)
    return sum(forward) // len(support.images), sum(backward) // len(support.images)


def test_nothing_is_computed_that_no_indicator_asks_for(
    fitted: Fitted, support: Support, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cost(*more: str) -> tuple[int, int]:
        return passes(measured(fitted, indicators=[*FREE, *more]), support, monkeypatch)

    assert cost() == (1, 0)
    assert cost("norm_drift") == (1, 0)
    assert cost("consistency") == (2, 0)
    forward, _ = cost("gradient")
    assert cost("gradient") == (forward, 1)
    assert cost("gradient", "signal") == (forward, 1)
    assert cost("gradient", "signal", "noise_floor") == (forward, 2)


def test_all_indicators_at_once_describe_every_support(fitted: Fitted, support: Support) -> None:
    learner = measured(fitted, indicators=ALL)
    unlabelled = Support(support.images, None, learner.sources.classes)
    single = Support(support.images[:1], None, learner.sources.classes)
    for each in (support, unlabelled, single):
        whole, per_unit = learner.indicators(learner.situate(each))
        assert whole.shape == (learner.indicators.global_width,)
        assert per_unit.shape == (len(learner.model.units), learner.indicators.unit_width)
        assert bool(torch.isfinite(whole).all())
        assert bool(torch.isfinite(per_unit).all())
    again = learner.indicators(learner.situate(support))
    assert all(torch.equal(a, b) for a, b in zip(again, learner.indicators(learner.situate(support)), strict=True))


def test_permuted_labels_are_those_of_the_same_loss(fitted: Fitted, support: Support) -> None:
    learner = measured(fitted, indicators=["gradient", "noise_floor"])
    found = learner.situate(support)
    assert found.gradients.keys() == found.noise.keys() == {u.name for u in learner.model.units if u.learns}
    for name, gradient in found.gradients.items():
        assert found.noise[name].shape == gradient.shape
        assert not torch.allclose(found.noise[name], gradient)


def test_episodes_draw_their_budgets_only_for_a_policy_that_sees_them() -> None:
    def draws(**changes: Any) -> list[float]:
        learner = tiny.modular(**changes)
        return [learner._training_budget(torch.Generator().manual_seed(seed)) for seed in range(200)]

    assert set(draws(budget=0.5)) == {0.5}
    drawn = draws(indicators=[*FREE])
    assert "budget" in FREE
    assert drawn == draws(indicators=[*FREE])
    assert 0.01 <= min(drawn) < 0.015
    assert 0.9 < max(drawn) <= 1.0
    assert 0.4 < sum(value < 0.1 for value in drawn) / 200 < 0.6  # log-uniform


def test_a_checkpoint_of_other_indicators_is_refused_in_one_line(fitted: Fitted, tmp_path: Path) -> None:
    learner = tiny.modular(source=tiny.source(), baselines=["prototype"], indicators=FREE)
    with pytest.raises(ModmetaError, match=r"policy sees .* choice of indicators; fit again") as e:
        tiny.trainer(tmp_path, 1).test(
            learner, datamodule=tiny.digits(), ckpt_path=str(fitted.checkpoint), verbose=False
        )
    assert len(str(e.value).splitlines()) == 1


def test_noise_on_the_indicators_is_the_episodes_own(fitted: Fitted, support: Support) -> None:
    learner = measured(fitted, indicator_dropout=0.2, indicator_noise=0.1)
    with torch.no_grad():
        learner.policy.per_unit.weight.normal_(generator=torch.Generator().manual_seed(0))
    situation = learner.situate(support)

    def rates(seed: int | None) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return learner.plan(situation, generator).rates.detach()

    assert torch.equal(rates(1), rates(2))  # evaluation
    learner.train()
    assert torch.equal(rates(1), rates(1))
    assert not torch.equal(rates(1), rates(2))
    assert torch.equal(rates(None), learner.eval() and rates(1))
