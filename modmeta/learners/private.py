"""Private adaptation: from a support to an adapted model that depends little on any single image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from modmeta.adaptation import Adapted, Classifier, Plan, Support
from modmeta.adaptation.private import Privacy, private_descent, secret_random, signal_share
from modmeta.adapters import State
from modmeta.errors import ModmetaError
from modmeta.learners.adapting import PolicyAdaptation
from modmeta.learners.base import MetaLearner

HEAD_RATE = 0.1  # root mean square change of the head's weights per step at most, beside rates of 0.02 for units
HEAD_STEPS = 3  # where no plan says how many
WORTHWHILE = 0.5  # share of signal from which on units are adapted, too


def adapt_privately(
    learner: MetaLearner, support: Support, privacy: Privacy, random: np.random.Generator | None = None
) -> Adapted:
    """Adapt with (epsilon, delta)-differential privacy against the replacement of one image by another of its class.

    Whatever an ordinary adaptation reads off the images without noise is left out: indicators, statistics, specialists,
    the veto and the closed-form head. Instead the sources' own classifier is descended, and with it, where the promise
    leaves them enough signal, the units that learn by gradient, at the rates that the policy gives to a domain it knows
    nothing of. Each image's squared error is its own alone. What is public: the classes, the number of images of each,
    and everything learned from the source domains.

    Args:
        learner: what adapts.
        support: labelled images of classes that the sources know.
        privacy: the promise.
        random: the noise's source, to repeat an adaptation; it must stay secret. None draws one from the system.

    Raises:
        ModmetaError: if there are no labels, a class is new to the sources, or the learner never saw sources.
    """
    labels = _labels_of(learner, support)
    model = learner.model
    start = learner.sources.view(support.hidden).classifier(support.classes)
    plan = public_plan(learner)
    steps = plan.steps or HEAD_STEPS
    opened = model.active(plan.gate_of())
    count = start.weight.numel() + sum(unit.cost.parameters for unit in opened)
    if signal_share(privacy, steps, len(labels), count) < WORTHWHILE:
        plan, opened = plan.keeping(()), []
    gates = plan.gate_of()
    names = {name: plan.index(unit.name) for unit in opened for name in model.learned_names(unit)}
    initial: State = {name: tensor.detach() for name, tensor in learner.bank.initial().items()}
    rates = [
        {"head": HEAD_RATE} | {name: float(plan.rates[row, step]) for name, row in names.items()}
        for step in range(steps)
    ]
    cut = model.cut_before(opened)
    with torch.no_grad():
        hidden = support.images if cut is None else model.backbone.run(support.images, stop=cut)
    targets = F.one_hot(labels, support.ways).to(start.weight) - 1 / support.ways

    def loss(tensors: Mapping[str, Tensor], image: int) -> Tensor:
        state = initial | {name: tensors[name] for name in names}
        features = model(hidden[image : image + 1], state, gates, start=cut)
        # The sources' classifier was fitted by this error, too; with features of length 1, few gradients exceed 1.
        plain = replace(start, weight=tensors["head"], scale=torch.ones_like(start.scale))
        return 0.5 * (plain(features) - targets[image]).square().sum()

    learned = {"head": start.weight} | {name: initial[name] for name in names}
    found = private_descent(learned, rates, loss, len(labels), privacy, random or secret_random())
    head: Classifier = replace(start, weight=found.pop("head"))
    report = {"labelled": True, "plan": plan.to_dict(), "privacy": privacy.to_dict(steps)}
    return Adapted(initial | found, plan, head, support.classes, report)


def public_plan(learner: MetaLearner) -> Plan:
    """Return the plan for a domain of which nothing is known, without units that read the images' statistics."""
    if not isinstance(learner, PolicyAdaptation):
        return learner.idle_plan()
    units, indicators = learner.model.units, learner.indicators
    with torch.no_grad():
        # Indicators are standardised: zeros stand for the average domain.
        whole = torch.zeros(indicators.global_width, device=learner.device)
        plan = learner.policy(units, whole, whole.new_zeros(len(units), indicators.unit_width))
        plan = plan.within(learner.budget, learner.backward_shares)
        plan = plan.keeping([unit.name for unit in units if unit.learns and not unit.reads])
        return replace(plan, rates=learner.rule(plan)).detach()


def _labels_of(learner: MetaLearner, support: Support) -> Tensor:
    if support.labels is None:
        raise ModmetaError("a private adaptation needs labelled images: give folders class/image")
    if not learner.sources.ready:
        raise ModmetaError("a private adaptation starts from the sources' classifier, and this learner has none")
    known = learner.sources.view(support.hidden).anchor(support.classes).known.tolist()
    new = [name for name, is_known in zip(support.classes, known, strict=True) if not is_known]
    if new:
        raise ModmetaError(
            f"class {new[0]!r} is new to the source domains; a private adaptation has too little to learn it from"
        )
    return support.labels
