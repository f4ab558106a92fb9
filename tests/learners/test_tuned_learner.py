"""Depth and strength of statistics in a learner: measured as the test says they are, and off by default."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from torch.nn.functional import cross_entropy

from modmeta.adaptation import LabelTrust, candidates, read_statistics
from modmeta.adapters import Gates, State
from modmeta.data import DomainDataModule
from modmeta.errors import ModmetaError
from modmeta.evaluation.card import make_card, render_markdown
from modmeta.learners import ModularMetaLearner
from modmeta.learners.held_out import HeldOut
from modmeta.learners.measuring import episode_support

STRENGTHS = [0.0, 1.0, 2.0]
SHARE = 0.5


def made(data: DomainDataModule, strengths: list[float], depths: tuple[float, ...] = (1.0,)) -> ModularMetaLearner:
    units = [replace(tiny.UNITS[0], group="stage"), *tiny.UNITS[1:]]
    options = {"units": units, "statistics_depths": depths, "statistics_strengths": strengths}
    learner = tiny.modular(prior_share=SHARE, veto=False, **options).eval()
    learner.sources.measure(learner.model.backbone, [c[:3] for c in data.source_images(3)], data.classes)
    return learner


def test_every_strength_is_judged_by_heads_that_have_not_seen_the_image(data: DomainDataModule) -> None:
    learner = made(data, STRENGTHS)
    support = episode_support(data.episode("test", 1), hide=False)
    reading = [unit.name for unit in learner.model.units if unit.reads]
    with torch.no_grad():
        plan = learner.plan(learner.situate(support)).detach()
        adapted = learner.adapt(support)
        before = learner.held_out_logits(learner.model.backbone(support.images), support)
    expected, losses = {}, {}
    for factor in STRENGTHS:
        tried = plan.keeping(reading).strengthened(reading, factor)
        with torch.no_grad():
            state = read_statistics(learner.model, learner.bank.initial(), tried, support.images)
            after = learner.held_out_logits(learner.features(support.images, state, tried), support)
        logits = (1 - SHARE) * after + SHARE * before
        losses[factor] = cross_entropy(logits, support.labels, reduction="none")
        expected[f"{factor:g}"] = float(cross_entropy(before, support.labels) - losses[factor].mean())
    told = adapted.report["statistics_strengths"]
    assert told == pytest.approx(expected, abs=1e-4)
    page = render_markdown("a", make_card(learner, support, adapted, 1.0))
    assert all(f"{name}: {gain:+.3f}" in page for name, gain in told.items())
    assert len({round(gain, 4) for gain in told.values()}) == len(STRENGTHS)
    best = float(max(told, key=lambda name: told[name]))
    gap = losses[1.0] - losses[best]
    sure = float(gap.mean()) > float(gap.std()) / len(gap) ** 0.5
    torch.testing.assert_close(adapted.plan.gates, plan.strengthened(reading, best if sure else 1.0).gates)


@pytest.mark.parametrize("some", [False, True])
def test_in_an_explained_support_none_stands_in_place_of_the_policys_strength(
    data: DomainDataModule, some: bool
) -> None:
    learner = made(data, [1.0])
    support = episode_support(data.episode("test", 1), hide=False)
    with torch.no_grad():
        situation = learner.situate(support)
        before = cross_entropy(learner.held_out_logits(situation.features, support), support.labels, reduction="none")
        believed = before < before.median() if some else None
        loss = float(before[... if believed is None else believed].mean())
        for threshold, tried in ((0.99 * loss, {"1"}), (1.01 * loss, {"0", "1"})):
            learner.explained_loss = threshold
            told = learner.tune(situation, support, believed)[1]
            assert told["explained"] == ("0" in tried)
            assert set(told["statistics_strengths"]) == tried


def test_images_that_look_wrong_do_not_say_whether_a_support_is_explained(
    data: DomainDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = made(data, STRENGTHS)
    learner.veto = True
    support = episode_support(data.episode("test", 1), hide=False)
    with torch.no_grad():
        features = learner.model.backbone(support.images)
        before = cross_entropy(learner.held_out_logits(features, support), support.labels, reduction="none")
    mask = before < before.median()
    learner.explained_loss = float(before[mask].mean() + before.mean()) / 2
    wrong = LabelTrust(0.5, 0.1, 0.0, mask, 1.0)
    assert not learner.adapt(support).report["explained"]
    monkeypatch.setattr(learner, "wrong_labels", lambda features, support: wrong)
    adapted = learner.adapt(support)
    assert adapted.report["explained"]
    assert "explained without any" in render_markdown("a", make_card(learner, support, adapted, 1.0))


@pytest.mark.parametrize("near", [True, False])
def test_in_a_near_domain_images_that_look_wrong_judge_no_statistics(data: DomainDataModule, near: bool) -> None:
    learner = made(data, STRENGTHS)
    support = episode_support(data.episode("test", 1), hide=False)
    reading = [unit.name for unit in learner.model.units if unit.reads]
    with torch.no_grad():
        situation = learner.situate(support)
        held_out = HeldOut(learner, support, situation.features)
        unadapted = cross_entropy(held_out(None), support.labels, reduction="none")
        believed = unadapted < unadapted.median()
        learner.near_loss = (1.01 if near else 0.99) * float(unadapted[believed].mean())
        told = learner.tune(situation, support, believed, held_out)[1]["statistics_strengths"]
        plan = learner.plan(situation).detach().keeping(reading)
        judges = believed if near else torch.ones_like(believed)
        for factor in STRENGTHS:
            after = held_out(plan.strengthened(reading, factor) if factor else None)
            gain = unadapted[judges].mean() - cross_entropy(after[judges], support.labels[judges])
            assert told[f"{factor:g}"] == pytest.approx(float(gain), abs=1e-5)
        learner.near_loss = 1e9
        assert learner.tune(situation, support, torch.zeros_like(believed), held_out)[1]["statistics_strengths"]


def test_trials_carry_out_the_strength_that_was_chosen(data: DomainDataModule, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, episode = made(data, [2.0]), data.episode("train", 3)
    reading = [unit.name for unit in learner.model.units if unit.reads]
    found, plan = learner.trial(episode).gains, learner.plan
    learner.statistics_strengths = []
    assert learner.trial(episode).gains != found
    monkeypatch.setattr(learner, "plan", lambda situation: plan(situation).strengthened(reading, 2.0))
    assert learner.trial(episode).gains == pytest.approx(found)


def test_without_strengths_or_labels_the_policys_gates_stand(data: DomainDataModule) -> None:
    support = episode_support(data.episode("test", 0), hide=False)
    for strengths, given in (([], support), (STRENGTHS, replace(support, labels=None))):
        learner = made(data, strengths)
        with torch.no_grad():
            plan = learner.plan(learner.situate(given)).detach()
            adapted = learner.adapt(given)
        assert torch.equal(adapted.plan.gates, plan.gates)
        assert adapted.report["statistics_strengths"] == {}
        assert "trengths of the statistics" not in render_markdown("a", make_card(learner, given, adapted, 1.0))


def test_plans_read_down_to_the_first_depth_and_the_support_judges_the_others(data: DomainDataModule) -> None:
    support = episode_support(data.episode("test", 1), hide=False)
    learner, everywhere = made(data, [], (0.3, 1.0)), made(data, [])
    everywhere.load_state_dict(learner.state_dict())
    reading = [unit.name for unit in learner.model.units if unit.reads]
    late = [unit.name for unit in learner.model.units if unit.reads and unit.depth > 0.3]
    assert 0 < len(late) < len(reading)
    with torch.no_grad():
        situation = learner.situate(support)
        full = everywhere.plan(situation).detach()
        early = full.keeping([name for name in full.units if name not in late])
        assert torch.equal(learner.plan(situation).gates, early.gates)
        assert torch.equal(learner.plan(situation, depth=1.0).gates, full.gates)
        before = learner.held_out_logits(situation.features, support)
        losses = {}
        for name, plan in (("0.3", early), ("1", full)):
            tried = plan.keeping(reading)
            state = read_statistics(learner.model, learner.bank.initial(), tried, support.images)
            after = learner.held_out_logits(learner.features(support.images, state, tried), support)
            losses[name] = cross_entropy(torch.lerp(after, before, SHARE), support.labels, reduction="none")
        adapted = learner.adapt(support)
    gains = {name: float(cross_entropy(before, support.labels) - loss.mean()) for name, loss in losses.items()}
    assert adapted.report["statistics_depths"] == pytest.approx(gains, abs=1e-4)
    assert abs(gains["1"] - gains["0.3"]) > 1e-3
    gap = losses["0.3"] - losses["1"]
    sure = float(gap.mean()) > float(gap.std()) / len(gap) ** 0.5
    assert torch.equal(adapted.plan.gates, (full if sure else early).gates)
    page = render_markdown("a", make_card(learner, support, adapted, 1.0))
    assert f"Depths down to which statistics were tried, 0.3: {gains['0.3']:+.3f}, 1: {gains['1']:+.3f}" in page


def test_training_reads_down_to_the_first_depth_only(data: DomainDataModule, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = made(data, [], (0.3, 1.0)).train()
    seen = []
    carry_out = learner.carry_out
    monkeypatch.setattr(learner, "carry_out", lambda plan, support: (seen.append(plan), carry_out(plan, support))[1])
    learner.episode_loss(data.episode("train", 1))
    late = {unit.name for unit in learner.model.units if unit.reads and unit.depth > 0.3}
    assert late
    assert not late & set(seen[0].gate_of())


@pytest.mark.parametrize("strengths", [[-1.0], [1.0, float("nan")]])
def test_a_strength_that_is_no_factor_is_refused(strengths: list[float]) -> None:
    with pytest.raises(ModmetaError, match="statistics_strengths"):
        tiny.modular(statistics_strengths=strengths)


@pytest.mark.parametrize("option", ["explained_loss", "near_loss", "near_shift", "statistics_prior"])
def test_a_negative_number_is_refused(option: str) -> None:
    with pytest.raises(ModmetaError, match=option):
        tiny.modular(**{option: -0.1})


@pytest.mark.parametrize("depths", [[], [0.3, 1.5], [float("nan")]])
def test_a_depth_outside_the_backbone_is_refused(depths: list[float]) -> None:
    with pytest.raises(ModmetaError, match="statistics_depths"):
        tiny.modular(statistics_depths=depths)


def test_statistics_of_few_images_count_for_less(data: DomainDataModule) -> None:
    learner = made(data, [])
    support = episode_support(data.episode("test", 1), hide=False)
    situation = learner.situate(support)
    images = len(support.images)
    reading = torch.tensor([name in learner._reading() for name in learner.plan(situation).units])
    with torch.no_grad():
        without = learner.plan(situation).gates
        learner.statistics_prior = 3.0 * images
        weighed = learner.plan(situation).gates
        learner.statistics_prior = 0.0
        assert torch.equal(learner.plan(situation).gates, without)
    assert 0 < int(reading.sum()) < len(reading)
    torch.testing.assert_close(weighed[reading], without[reading] / 4)
    torch.testing.assert_close(weighed[~reading], without[~reading], rtol=0, atol=0)


def test_what_tuning_has_measured_the_veto_does_not_measure_again(
    data: DomainDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = made(data, STRENGTHS, depths=(0.3, 1.0))
    learner.veto, learner.veto_folds = True, 0
    support = episode_support(data.episode("test", 1), hide=False)
    passes: list[list[float]] = []
    observe = learner.model.observe

    def counted(images: torch.Tensor, state: State, gates: Gates, **where: str | None) -> tuple[torch.Tensor, State]:
        passes.append([float(gate) for gate in gates.values()])
        return observe(images, state, gates, **where)

    monkeypatch.setattr(learner.model, "observe", counted)
    situation = learner.situate(support)
    held_out = HeldOut(learner, support, situation.features)
    with torch.no_grad():
        plan, told = learner.tune(situation, support, held_out=held_out)
        tried = len(passes)
        verdict = learner._judge(candidates(plan, learner._reading()), plan, held_out, None)
    assert tried == len(told["statistics_depths"]) + len(STRENGTHS) - 2  # none needs no pass, 1 had one already
    assert len(passes) == tried
    assert verdict.evidence == len(support.images)
    held_out(replace(plan.keeping(learner._reading()), ridge=2 * plan.ridge))
    assert len(passes) == tried
    again = HeldOut(learner, support, situation.features)(plan.keeping(learner._reading()))
    torch.testing.assert_close(held_out(plan.keeping(learner._reading())), again, rtol=0, atol=0)
