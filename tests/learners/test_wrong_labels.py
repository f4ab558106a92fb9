"""Wrong labels: seen where the sources can contradict them, and then less is learned from them, or nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch

from modmeta.adaptation import LabelTrust, Plan, Support, backward_macs, label_trust, read_statistics
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
    expected = label_trust(wrong / (0.9 * own + wrong), 0.1)
    assert found is not None
    assert found.to_dict() == pytest.approx(expected.to_dict(), rel=1e-5)
    assert torch.equal(found.believed, expected.believed)


def test_nothing_is_told_where_nothing_can_be(data: DomainDataModule, support: Support) -> None:
    learner = made(data)
    features = learner.prior_features(support.images)
    assert learner.wrong_labels(features, support)
    assert learner.wrong_labels(features, replace(support, labels=None)) is None
    new = replace(support, classes=(*support.classes[:-1], "new"))
    assert learner.wrong_labels(features, new) is None
    assert made(data, head_options={}).wrong_labels(features, support) is None
    assert made(data, head="ridge").wrong_labels(features, support) is None


@pytest.mark.parametrize("veto", [True, False])
@pytest.mark.parametrize(("trust", "learning", "left_out"), [(0.95, 0.95, 0), (0.4, 0.75, 2), (0.25, 0.0, 2)])
def test_the_less_labels_are_trusted_the_less_is_learned_from_them(
    data: DomainDataModule,
    support: Support,
    veto: bool,
    trust: float,
    learning: float,
    left_out: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learner = made(data, veto=veto, veto_caution=0.0)
    believed = torch.ones(len(support.images), dtype=torch.bool)
    believed[:left_out] = False
    wrong = LabelTrust(0.07, 0.1, trust, believed, learning)
    monkeypatch.setattr(learner, "wrong_labels", lambda features, support: wrong)
    carried: list[Plan] = []
    carry_out = learner.carry_out
    monkeypatch.setattr(
        learner, "carry_out", lambda plan, *rest, **named: carried.append(plan) or carry_out(plan, *rest, **named)
    )
    with torch.no_grad():
        adapted = learner.adapt(support)
    page = render_markdown("a", make_card(learner, support, adapted, 1.0))
    refused = not learning
    units = {unit.name for unit in learner.model.units if unit.learns}
    learned = bool(units & set(adapted.plan.gate_of()))
    rates = torch.tensor(adapted.report["plan"]["rates"])
    assert adapted.report["wrong_labels"] == wrong.to_dict() | (
        {"left_out": left_out, "learning": learning, "held_back": trust < 0.9}
        if veto
        else {"left_out": 0, "learning": 1.0, "held_back": False}
    )
    assert "wrong to heads that had not seen their image: 7.0 %" in page
    assert f"than the 10 % that are reckoned with is {100 * trust:.0f} %" in page
    assert ("too small for anything to learn" in page) == (refused and veto)
    assert ("learning rates were multiplied" in page) == (learned and veto)
    assert ("held back by a stronger ridge" in page) == (veto and trust < 0.9 and bool(adapted.plan.gate_of()))
    assert ("nothing was learned from 2" in page) == (learned and veto and left_out > 0)
    with torch.no_grad():
        planned = learner.plan(learner.situate(support)).ridge
    expected = 4 * max(float(planned), 1.0) if veto and trust < 0.9 else float(planned)
    assert {round(float(plan.ridge), 5) for plan in carried} <= {round(expected, 5)}
    assert adapted.report["plan"]["ridge"] == pytest.approx(expected, rel=1e-5)
    moving = [plan for plan in carried if units & set(plan.gate_of())]
    assert bool(moving) != (refused and veto)
    assert any(torch.allclose(plan.rates, (learning if veto else 1.0) * rates) for plan in moving) == bool(moving)
    if veto:
        offered = {"statistics"} if refused else {"statistics", "plan/3", "plan"}
        assert set(adapted.report["verdict"]["gains"]) == offered
        indicators = backward_macs(
            learner.model, learner.model.units, len(support.images), learner.indicators.backward_passes
        )
        assert (learner_backward_macs(learner, support, adapted) == indicators) == refused
    else:
        assert learned


@pytest.mark.parametrize("lacking", [True, False])
def test_where_a_class_has_no_image_the_head_is_held_back(
    data: DomainDataModule, support: Support, monkeypatch: pytest.MonkeyPatch, lacking: bool
) -> None:
    learner = made(data)
    learner.veto_caution = -1e9  # every plan is carried out
    part = support.keeping(support.labels != 0) if lacking else support
    wrong = LabelTrust(0.01, 0.1, 0.99, torch.ones(len(part.images), dtype=torch.bool), 0.99)
    monkeypatch.setattr(learner, "wrong_labels", lambda features, support: wrong)
    with torch.no_grad():
        planned = float(learner.plan(learner.situate(part)).ridge)
        adapted = learner.adapt(part)
    assert adapted.report["wrong_labels"]["held_back"] is lacking
    assert float(adapted.plan.ridge) == pytest.approx(4 * max(planned, 1.0) if lacking else planned, rel=1e-5)
    assert ("held back by a stronger ridge" in render_markdown("a", make_card(learner, part, adapted, 1.0))) is lacking


def test_what_is_not_believed_moves_nothing_but_statistics(data: DomainDataModule, support: Support) -> None:
    learner = made(data)
    believed = torch.ones(len(support.images), dtype=torch.bool)
    believed[::4] = False
    others = support.labels.clone()
    others[~believed] = (others[~believed] + 1) % support.ways
    with torch.no_grad():
        plan = learner.plan(learner.situate(support)).detach()
        statistics = read_statistics(learner.model, learner.bank.initial(), plan, support.images)
        told, losses = learner.carry_out(plan, support, believed=believed)
        other, _ = learner.carry_out(plan, replace(support, labels=others), believed=believed)
        alone, same = learner.carry_out(plan, support.keeping(believed), statistics)
        every, _ = learner.carry_out(plan, support)
        none, nothing = learner.carry_out(plan, support, believed=torch.zeros_like(believed))
    learned = {f"{unit.name}|" for unit in learner.model.units if unit.learns}
    names = [name for name in told if name.startswith(tuple(learned))]
    assert all(torch.equal(told[name], other[name]) for name in told)
    assert losses == pytest.approx(same, rel=1e-4)
    assert all(torch.allclose(told[name], alone[name], atol=1e-5) for name in told)
    assert any(not torch.allclose(told[name], every[name], atol=1e-5) for name in names)
    assert nothing == []
    assert all(torch.equal(none[name], statistics[name]) for name in none)


def test_folds_learn_from_nothing_that_is_not_believed(
    data: DomainDataModule, support: Support, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = made(data, veto_folds=2)
    believed = torch.ones(len(support.images), dtype=torch.bool)
    believed[1] = False
    wrong = LabelTrust(0.07, 0.1, 0.4, believed, 0.9)
    monkeypatch.setattr(learner, "wrong_labels", lambda features, support: wrong)
    taught: list[tuple[int, int]] = []
    carry_out = learner.carry_out

    def carry(plan: Plan, own: Support, statistics: object = None, believed: torch.Tensor | None = None) -> object:
        assert believed is not None
        doubted = (own.images == support.images[1]).flatten(1).all(1)
        assert torch.equal(believed, ~doubted)
        taught.append((len(own.images), int(believed.sum())))
        return carry_out(plan, own, statistics, believed)

    monkeypatch.setattr(learner, "carry_out", carry)
    with torch.no_grad():
        learner.adapt(support)
    assert (len(support.images), len(support.images) - 1) in taught
    assert {seen - kept for seen, kept in taught if seen < len(support.images)} == {0, 1}
