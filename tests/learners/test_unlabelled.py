"""Adapting with signals: without labels, beside them, and what decides whether it is done."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import Fitted
from torch import Tensor
from traced import fit

from modmeta.adaptation import PRIOR, SIGNALS, Adapted, Plan, SignalConfig, SignalMixture, Support
from modmeta.learners import ModularMetaLearner, load_learner

NAMES = SIGNALS.names()
FILM = "film@"


@pytest.fixture(scope="module")
def images() -> Support:
    data = tiny.digits()
    data.setup()
    episode = data.episode("train", 0)
    return Support(episode.support, episode.support_labels, episode.classes)


def with_signals(fitted: Fitted, *configs: SignalConfig) -> ModularMetaLearner:
    """Return a copy that opens every unit and takes large steps along some signals."""
    learner = copy.deepcopy(fitted.learner).eval()
    learner.veto, learner.signals = False, SignalMixture(configs)
    with torch.no_grad():
        learner.policy.per_unit.bias[0] = 10.0
        learner.policy.per_unit.bias[1] = 2.0
    return learner


def adapt(learner: ModularMetaLearner, support: Support) -> Adapted:
    with torch.no_grad():
        return learner.adapt(support)


def distance(learner: ModularMetaLearner, adapted: Adapted, unit: str = FILM) -> float:
    initial = learner.bank.initial()
    moved = [adapted.state[name] - tensor.detach() for name, tensor in initial.items() if name.startswith(unit)]
    return max(float(each.abs().max()) for each in moved)


def first_loss(learner: ModularMetaLearner, adapted: Adapted, support: Support, configs: list[SignalConfig]) -> Tensor:
    """Return what the steps should descend at first, each view passed through the backbone on its own."""
    state = learner.bank.initial() | {n: t for n, t in adapted.state.items() if n.startswith("norm_blend")}
    gates = adapted.plan.gate_of()

    def embed(pictures: Tensor) -> Tensor:
        return learner.model(pictures, state, gates)

    own = embed(support.images)
    head = learner.fit_head(own, support, ridge=adapted.plan.ridge)
    labelled = support.labels is not None
    logits = learner.held_out_logits(own, support, adapted.plan.ridge) if labelled else head(own)
    total = learner.inner_loss(own, support, adapted.plan.ridge).mean() if labelled else torch.zeros(())
    for config in configs:
        mixture = SignalMixture([replace(config, weight=1.0)])
        views = mixture.images(support.images).split(len(support.images))
        total = total + config.weight * mixture.loss(torch.cat([embed(view) for view in views]), logits, head)
    return total


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("labelled", [False, True])
def test_steps_descend_the_signal(name: str, labelled: bool, fitted: Fitted, images: Support) -> None:
    config = SignalConfig(name, 0.7)
    learner = with_signals(fitted, config)
    support = images if labelled else replace(images, labels=None)
    adapted = adapt(learner, support)
    assert distance(learner, adapted) > 1e-3
    losses = adapted.report["support_losses"]
    with torch.no_grad():
        assert losses[0] == pytest.approx(float(first_loss(learner, adapted, support, [config])), rel=1e-3, abs=1e-5)
    again = adapt(learner, support)
    assert all(torch.equal(tensor, again.state[key]) for key, tensor in adapted.state.items())
    assert losses == again.report["support_losses"]
    plain = adapt(with_signals(fitted), support)
    assert (distance(learner, plain) == 0) is not labelled
    for key, tensor in adapted.state.items():
        if key.startswith("norm_blend"):
            assert torch.equal(tensor, plain.state[key])  # views are no images of the domain
        elif labelled and key.startswith(FILM):
            assert not torch.equal(tensor, plain.state[key])


def test_small_steps_make_predictions_surer(fitted: Fitted, images: Support) -> None:
    learner = with_signals(fitted, SignalConfig("entropy"))
    support = replace(images, labels=None)
    with torch.no_grad():
        plan = learner.plan(learner.situate(support)).detach()
        plan = replace(plan, rates=torch.full_like(plan.rates, 0.003).repeat(1, 3))
        _, losses = learner.carry_out(plan, support)
    assert len(losses) == 6
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 1e-4


@pytest.mark.parametrize(("gain", "choice"), [(0.5, "plan"), (-0.5, PRIOR)])
def test_without_labels_the_forecast_decides(
    gain: float, choice: str, fitted: Fitted, images: Support, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = with_signals(fitted, SignalConfig("entropy"))
    learner.veto = True
    planned = learner.plan

    def forecast(*arguments: Any) -> Plan:
        return replace(planned(*arguments), gain=torch.tensor(gain), gain_log_variance=torch.tensor(-6.0))

    monkeypatch.setattr(learner, "plan", forecast)
    adapted = adapt(learner, replace(images, labels=None))
    assert adapted.report["verdict"]["choice"] == choice
    assert adapted.report["verdict"]["evidence"] == 0
    assert (distance(learner, adapted) > 0) is (choice == "plan")


def test_signals_are_trained_with_resumed_and_remembered(tmp_path: Path) -> None:
    configs = (SignalConfig("information_maximisation", 0.5, {"diversity": 0.5}), SignalConfig("rotation"))

    def learner() -> ModularMetaLearner:
        return tiny.modular(
            units=tiny.UNITS[1:2], source_images=2, calibration_episodes=1, steps=1, source=tiny.source(),
            learning_rate=1e-2, signals=configs, unlabelled_share=1.0,
        )  # fmt: skip

    whole = fit(tmp_path, learner(), keep=True, limit_val_batches=0)
    (middle,) = (file for file in whole.files if file.stem == "step-5")
    assert fit(tmp_path, learner(), resume=middle, limit_val_batches=0).ends_like(whole)
    again = load_learner(middle)
    assert isinstance(again, ModularMetaLearner)
    assert tuple(again.hparams["signals"]) == configs
    assert again.signals
