"""From a support set to a plan: what the indicators see of it, what the policy decides, what its statistics add."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from modmeta.adaptation import (
    DivergedError,
    IndicatorSet,
    Plan,
    Policy,
    SignalMixture,
    Situation,
    Support,
    UpdateRule,
    early_shift,
    observe_norms,
    read_beyond,
    reading_units,
    running_statistics,
    support_gradients,
    tune_statistics,
)
from modmeta.adapters import State
from modmeta.backbone import Site
from modmeta.learners.base import MetaLearner
from modmeta.learners.held_out import HeldOut


class PolicyPlanning(MetaLearner):
    """The part of the modular learner that plans: nothing is learned from the support set here."""

    indicators: IndicatorSet
    policy: Policy
    rule: UpdateRule
    budget: float
    prior_share: float
    statistics_depths: list[float]
    statistics_strengths: list[float]
    statistics_prior: float
    explained_loss: float
    near_loss: float
    near_share: float
    near_shift: float
    lacking_share: float
    signals: SignalMixture
    backward_shares: dict[str, float]
    _norm_sites: list[Site]

    def situate(self, support: Support, budget: float | None = None) -> Situation:
        """Collect what the indicators need to know of a support set, and nothing that none of them asks for.

        Args:
            support: the images.
            budget: what the adaptation may take; None is the learner's own.
        """
        needs, backbone = self.indicators.needs, self.model.backbone
        with torch.no_grad():
            features, mean, variance = observe_norms(backbone, support.images, self._norm_sites)
            flipped = backbone(support.images.flip(-1)) if "flipped" in needs else None
            held_out = None
            gradients: list[dict[str, Tensor]] = []
            if support.labels is not None:
                held_out = self.inner_loss(features, support).mean()
                gradients = self._gradients(support, support.labels)
        view = self.sources.view(support.hidden)
        specialists = self.bank.visible(support.hidden)
        distances = None
        if specialists:
            means = torch.stack([self.bank.means[domain] for domain in specialists])
            distances = view.distances(features.mean(0), len(features), means) / view.typical
        return Situation(
            features=features,
            labels=support.labels,
            ways=support.ways,
            classes=support.classes,
            domain=support.domain,
            norm_mean=mean,
            norm_variance=variance,
            norm_sites=self._norm_sites,
            sources=view,
            distances=distances,
            held_out_loss=held_out,
            gradients=gradients[0] if gradients else {},
            noise=gradients[1] if len(gradients) > 1 else {},
            flipped=flipped,
            running=running_statistics(backbone, self._norm_sites) if "running" in needs or self.near_shift else None,
            units=self.model.units,
            shares=self.backward_shares,
            budget=self.budget if budget is None else budget,
            image_size=backbone.image_size,
        )

    def _gradients(self, support: Support, labels: Tensor) -> list[dict[str, Tensor]]:
        """Return what the indicators ask for: gradients under the labels, and under permuted ones."""
        needs = self.indicators.needs
        # The same permutation whenever there are as many images, so that the same images give the same plan.
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(labels.device)
        supports = [support] if "gradients" in needs else []
        supports += [replace(support, labels=labels[order])] if "noise" in needs else []
        losses = [lambda x, own=own: self.inner_loss(x, own) for own in supports]
        groups = 8 if "groups" in needs else 2
        return support_gradients(self.model, self.bank.initial(), support.images, losses, groups) if losses else []

    def plan(self, situation: Situation, generator: torch.Generator | None = None, depth: float | None = None) -> Plan:
        """Let the policy decide, within the budget and what the support's labels allow.

        Args:
            situation: what is known of the domain.
            generator: source of the gates' noise while training; None draws no noise.
            depth: units that begin beyond it read no statistics; None is the first of ``statistics_depths``.
        """
        whole, each = self.indicators(situation, generator)
        plan = self.policy(self.model.units, whole, each, situation.distances, generator)
        if not torch.isfinite(torch.cat([plan.gates, plan.rates.flatten()])).all():
            raise DivergedError("the policy's plan is not finite")
        images = len(situation.features)
        plan = plan.strengthened(self._reading(), images / (images + self.statistics_prior))
        limit = self.statistics_depths[0] if depth is None else depth
        deep = read_beyond(self.model.units, limit)
        plan = plan.keeping([name for name in plan.units if name not in deep])
        plan = plan.within(situation.budget, self.backward_shares)
        if situation.labels is None and not self.signals:
            plan = plan.keeping(self._reading())
        return replace(plan, rates=self.rule(plan))

    def _reading(self) -> list[str]:
        return [unit.name for unit in reading_units(self.model.units)]

    def tune(
        self,
        situation: Situation,
        support: Support,
        believed: Tensor | None = None,
        held_out: HeldOut | None = None,
    ) -> tuple[Plan, dict[str, Any]]:
        """Return the plan with its statistics as deep and strong as serves the support best, and what each gains.

        Args:
            situation: what is known of the domain.
            support: the images; without labels, or with classes that cannot do without one of theirs, nothing is tried.
            believed: those whose labels say whether the support is explained already, and in a near domain also how
                deep and strong statistics are to be ``(S,)``, bool; None is all.
            held_out: what predicts the support, where others ask it, too.
        """
        plan, labels = self.plan(situation).detach(), support.labels
        first, *others = self.statistics_depths
        nothing_to_try = not others and not self.statistics_strengths
        predict = held_out or HeldOut(self, support, situation.features)
        loss = None if nothing_to_try else predict.unadapted_loss(believed)
        if labels is None or loss is None:
            return plan, {"statistics_depths": {}, "statistics_strengths": {}, "explained": False}

        # Where the unadapted model knows its way, it knows which labels are wrong, too.
        judges = predict.counting(believed) if self.is_near(loss) else ...

        def losses(candidate: Plan | None) -> Tensor:
            return self.head.support_loss(predict(candidate), labels)[judges]

        plans = {first: plan} | {depth: self.plan(situation, depth=depth).detach() for depth in others}
        explained = loss < self.explained_loss
        stands = 0.0 if explained else 1.0
        plan, depths, strengths = tune_statistics(plans, self._reading(), self.statistics_strengths, losses, stands)
        return plan, {"statistics_depths": depths, "statistics_strengths": strengths, "explained": explained}

    def is_near(self, loss: float | None) -> bool:
        """Return whether a domain is near, by the unadapted model's loss on held-out support images."""
        return loss is not None and loss < self.near_loss

    def unadapted_share(self, situation: Situation, loss: float | None, lacking: bool) -> float:
        """Return the unadapted model's weight in the answer: it is larger in near domains.

        Args:
            situation: what is known of the domain.
            loss: the unadapted model's on held-out support images.
            lacking: whether a class has no image to believe in.
        """
        if lacking and self.near_shift:
            # The loss says nothing of that class, and what took its image may be a wrong label: the images tell.
            shift = early_shift(situation)
            if shift is not None and shift < self.near_shift:
                return self.lacking_share
        return self.near_share if self.is_near(loss) else self.prior_share

    def initial_state(self, plan: Plan, support: Support) -> State:
        """Return where the units start: the bank's universal values, blended with its specialists as the plan says."""
        initial = self.bank.initial()
        specialists = self.bank.visible(support.hidden)
        if specialists:
            for row, unit in enumerate(self.model.units):
                initial |= self.bank.blend(unit, specialists, plan.bank[row])
        return initial
