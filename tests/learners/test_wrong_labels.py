"""Wrong labels: seen where the sources can contradict them, and then less is learned from them, or nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch

from modmeta.adaptation import Plan, Support, backward_macs, label_trust
from modmeta.data import DomainDataModule
from modmeta.evaluation.card import make_card, render_markdown
from modmeta.evaluation.systems.learned import learner_backward_macs
from modmeta.learners import ModularMetaLearner
from modmeta.learners.measuring import episode_support


def made(data: DomainDataModule, **options: object) -> ModularMetaLearner:
    learner = tiny.modular(**({"head_options": {"label_noise": 0.1}} | options)).eval()
    learner.sources.measure(learner.model.backbone, [c[:3] for c in data.source_images(3)], data.classes)
    return learner


@pytest.fixture
def support(data: DomainDataModule) -> Support:
    return episode_support(data.episode("test", 1), hide=False)


def test_the_expected_share_is_the_mean_doubt_of_heads_that_have_not_seen_the_image(
    data: DomainDataModule, support: Support
) -> None:
    learner = made(data)
    with torch.no_grad():
        features = learner.prior_features(support.images)
        found = learner.wrong_labels(features, support)
        probabilities = learner.held_out_logits(features, support).softmax(1)
        own = probabilities.gather(1, support.labels[:, None])[:, 0]
        wrong = 0.1 * (1 - own) / (support.ways - 1)
    assert found == pytest.approx(label_trust(wrong / (0.9 * own + wrong), 0.1), rel=1e-5)


def test_nothing_is_told_where_nothing_can_be(data: DomainDataModule, support: Support) -> None:
    learner = made(data)
    features = learner.prior_features(support.images)
    assert learner.wrong_labels(features, support)
    assert learner.wrong_labels(features, replace(support, labels=None)) == {}
    new = replace(support, classes=(*support.classes[:-1], "new"))
    assert learner.wrong_labels(features, new) == {}
    assert made(data, head_options={}).wrong_labels(features, support) == {}
    assert made(data, head="ridge").wrong_labels(features, support) == {}


@pytest.mark.parametrize("veto", [True, False])
@pytest.mark.parametrize("trust", [0.75, 0.25])
def test_the_less_labels_are_trusted_the_less_is_learned_from_them(
    data: DomainDataModule, support: Support, veto: bool, trust: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = made(data, veto=veto, veto_caution=0.0)
    wrong = {"expected": 0.07, "reckoned": 0.1, "trust": trust}
    monkeypatch.setattr(learner, "wrong_labels", lambda features, support: dict(wrong))
    carried: list[Plan] = []
    carry_out = learner.carry_out
    monkeypatch.setattr(learner, "carry_out", lambda plan, *rest: carried.append(plan) or carry_out(plan, *rest))
    with torch.no_grad():
        adapted = learner.adapt(support)
    page = render_markdown("a", make_card(learner, support, adapted, 1.0))
    refused = trust < 0.5
    learning = {unit.name for unit in learner.model.units if unit.learns}
    learned = bool(learning & set(adapted.plan.gate_of()))
    rates = torch.tensor(adapted.report["plan"]["rates"])
    assert adapted.report["wrong_labels"] == wrong | {"learning": (0.0 if refused else trust) if veto else 1.0}
    assert "wrong to heads that had not seen their image: 7.0 %" in page
    assert f"than the 10 % that are reckoned with is {100 * trust:.0f} %" in page
    assert ("too small for anything to learn" in page) == (refused and veto)
    assert ("learning rates were multiplied" in page) == (learned and veto)
    assert any(torch.allclose(plan.rates, (trust if veto else 1.0) * rates) for plan in carried) != (refused and veto)
    if veto:
        offered = {"statistics"} if refused else {"statistics", "plan/3", "plan"}
        assert set(adapted.report["verdict"]["gains"]) == offered
        indicators = backward_macs(
            learner.model, learner.model.units, len(support.images), learner.indicators.backward_passes
        )
        assert (learner_backward_macs(learner, support, adapted) == indicators) == refused
    else:
        assert learned
