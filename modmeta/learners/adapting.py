"""The way of one domain: from a support set to a situation, a plan, a verdict, and what comes of the plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from modmeta.adaptation import (
    PRIOR,
    Adapted,
    Classifier,
    DivergedError,
    IndicatorSet,
    Plan,
    Policy,
    SignalMixture,
    Situation,
    Support,
    TrackRecord,
    Trial,
    UpdateRule,
    Verdict,
    candidates,
    inner_loop,
    judge,
    measure,
    observe_norms,
    read_beyond,
    read_statistics,
    reading_units,
    running_statistics,
    support_gradients,
    tempered_losses,
    tune_statistics,
)
from modmeta.adapters import State
from modmeta.backbone import Site
from modmeta.data import Episode
from modmeta.learners.base import MetaLearner
from modmeta.learners.held_out import HeldOut
from modmeta.learners.measuring import episode_ids, episode_support


class PolicyAdaptation(MetaLearner):
    """The half of the modular learner that adapts: what a support set goes through, at test and in training alike."""

    indicators: IndicatorSet
    policy: Policy
    rule: UpdateRule
    trust: float
    full_step_drop: float
    second_order: bool
    budget: float
    prior_share: float
    statistics_depths: list[float]
    statistics_strengths: list[float]
    statistics_prior: float
    explained_loss: float
    near_loss: float
    near_share: float
    veto: bool
    veto_folds: int
    veto_caution: float
    record: TrackRecord
    signals: SignalMixture
    backward_shares: dict[str, float]
    _norm_sites: list[Site]

    def adapt(self, support: Support) -> Adapted:
        """Describe the domain, plan, consult the veto, and carry out what remains.

        The less the labels can be trusted, the less is learned from them, and not from those that look wrong, and the
        head is held back, as it is where a class lacks images; the veto is not offered to learn at all from what is
        rather not to be trusted.
        """
        situation = self.situate(support)
        wrong = self.wrong_labels(situation.features, support)
        heeded = wrong if self.veto else None
        believed, learning = (heeded.believed, heeded.learning) if heeded else (None, 1.0)
        held_out = HeldOut(self, support, situation.features)
        plan, tried = self.tune(situation, support, believed, held_out)
        held_back = False
        if heeded and support.labels is not None and heeded.holds_back(support.labels, support.ways):
            plan, held_back = heeded.temper(plan), True
        plans = candidates(plan, self._reading(), learning) if self.veto else {"plan": plan}
        verdict = self._judge(plans, plan, held_out, believed)
        chosen = plans[verdict.choice] if verdict.choice != PRIOR else plan.keeping(())
        state, losses = self.carry_out(chosen, support, believed=believed)
        unadapted = held_out.unadapted_loss(believed)
        share = self.near_share if self.is_near(unadapted) else self.prior_share
        left_out = 0 if believed is None else int((~believed).sum())
        report = {
            "labelled": support.labels is not None,
            "plan": plan.to_dict(),
            **tried,
            "wrong_labels": wrong.to_dict() | {"left_out": left_out, "learning": learning, "held_back": held_back}
            if wrong
            else {},
            "verdict": verdict.to_dict(),
            "support_losses": losses,
            "unadapted_loss": unadapted,
            "unadapted_share": share if chosen.gate_of() else 1.0,
            "expected_gain": float(plan.gain),
            "expected_gain_deviation": float((0.5 * plan.gain_log_variance).exp()),
        }
        if verdict.choice == PRIOR:
            # The prior is the head as it is; the policy's strength of the ridge is part of its plan.
            classifier = self.fit_head(situation.features, support)
            return Adapted(state, chosen, classifier, support.classes, report)
        return replace(self.conclude(chosen, state, support, situation.features, share), report=report)

    def is_near(self, loss: float | None) -> bool:
        """Return whether a domain is near, by the unadapted model's loss on held-out support images."""
        return loss is not None and loss < self.near_loss

    def conclude(
        self, plan: Plan, state: State, support: Support, prior: Tensor, share: float | None = None
    ) -> Adapted:
        """Fit the head to what came of a plan, and give the unadapted model its share in the answer.

        Averaged logits are the geometric mean of two predictions: what only one of them gets wrong, the other often
        outvotes. Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022, compare such ensembles with
        averaged weights.

        Args:
            plan: what was carried out.
            state: what came of it.
            support: the images.
            prior: their unadapted features ``(S, D)``.
            share: the unadapted model's; None is ``prior_share``.
        """
        share = self.prior_share if share is None else share
        features = self._features(support.images, state, plan, prior)
        adapted = Adapted(state, plan, self.fit_head(features, support, ridge=plan.ridge), support.classes)
        if not share or not plan.gate_of():
            return adapted
        assert isinstance(adapted.classifier, Classifier)
        beside = self.fit_head(prior, support).weighted(share)
        return replace(adapted, classifier=adapted.classifier.weighted(1 - share), prior=beside)

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
            running=running_statistics(backbone, self._norm_sites) if "running" in needs else None,
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

    def carry_out(
        self, plan: Plan, support: Support, statistics: State | None = None, believed: Tensor | None = None
    ) -> tuple[State, list[float]]:
        """Run the inner loop of a plan.

        Args:
            plan: what to do.
            support: the images.
            statistics: what the plan's reading units observe on them, where that is known already.
            believed: those whose labels are learned from ``(S,)``, bool; None is all.

        Returns:
            the adapted state, and the support loss before every step.
        """
        initial = self.initial_state(plan, support)
        images = self.signals.images(support.images)
        if statistics is None and len(images) > len(support.images):
            statistics = read_statistics(self.model, initial, plan, support.images)  # views are no images of the domain
        return inner_loop(
            self.model,
            initial,
            plan,
            images,
            self._objective(support, plan.ridge.detach(), believed),
            statistics=statistics,
            rule=self.rule,
            second_order=self.second_order,
            trust=self.trust,
            full_step_drop=self.full_step_drop,
        )

    def _objective(self, support: Support, ridge: Tensor, believed: Tensor | None) -> Callable[[Tensor], Tensor] | None:
        """Return what the steps descend, from features of images and views to a scalar; None if there is nothing."""
        trusted = support if believed is None else support.keeping(believed)
        labelled = trusted.labels is not None and len(trusted.labels) > 0
        if not labelled and not self.signals:
            return None

        def objective(features: Tensor) -> Tensor:
            own = features[: len(support.images)]
            x = own if believed is None else own[believed]
            loss = self.inner_loss(x, trusted, ridge).mean() if labelled else own.new_zeros(())
            if not self.signals:
                return loss
            classifier = self.fit_head(own, support, ridge=ridge)
            logits = classifier(own) if support.labels is None else self.held_out_logits(own, support, ridge)
            return loss + self.signals.loss(features, logits, classifier)

        return objective

    def initial_state(self, plan: Plan, support: Support) -> State:
        """Return where the units start: the bank's universal values, blended with its specialists as the plan says."""
        initial = self.bank.initial()
        specialists = self.bank.visible(support.hidden)
        if specialists:
            for row, unit in enumerate(self.model.units):
                initial |= self.bank.blend(unit, specialists, plan.bank[row])
        return initial

    def _features(self, images: Tensor, state: State, plan: Plan, prior: Tensor) -> Tensor:
        return self.features(images, state, plan) if plan.gate_of() else prior

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

    def _judge(self, plans: dict[str, Plan], plan: Plan, held_out: HeldOut, believed: Tensor | None) -> Verdict:
        if not self.veto:
            return Verdict("plan", {}, {}, 0)
        return judge(
            plans,
            **self._evidence(plans, plan, held_out, believed),
            gain=float(plan.gain),
            gain_deviation=float((0.5 * plan.gain_log_variance).exp()),
            caution=self.veto_caution,
            record=self.record,
        )

    @torch.no_grad()
    def trial(self, episode: Episode) -> Trial:
        """Carry out every candidate of an episode's plan, its domain hidden, and see what each really gains.

        Args:
            episode: a training episode.
        """
        support = episode_support(episode, hide=True)
        situation = self.situate(support)
        held_out = HeldOut(self, support, situation.features)
        plan, _ = self.tune(situation, support, held_out=held_out)
        plans = candidates(plan, self._reading())
        measured = measure(plans, **self._evidence(plans, plan, held_out))
        _, ids = episode_ids(episode)
        prior = self.fit_head(situation.features, support)(self.prior_features(episode.query, ids))
        before = tempered_losses(prior, episode.query_labels)
        gains = {}
        for name, each in plans.items():
            state, _ = self.carry_out(each, support)
            adapted = self.conclude(each, state, support, situation.features)
            after = tempered_losses(self.logits(adapted, episode.query, ids), episode.query_labels)
            gains[name] = float((before - after).mean())
        return Trial(
            domain=episode.domain,
            anchored=self.knows_classes(support),
            shots=len(support.images) / support.ways,
            forecast=float(plan.gain),
            evidence={name: float(each.mean()) for name, each in measured.items()},
            gains=gains,
        )

    def _evidence(
        self, plans: dict[str, Plan], plan: Plan, held_out: HeldOut, believed: Tensor | None = None
    ) -> dict[str, Any]:
        """Return what the veto needs to measure plans on a support, as arguments of :func:`measure`."""
        support, features = held_out.support, held_out.features
        read: dict[int, State] = {}

        def predict(candidate: Plan | None, rest: Tensor, fold: Tensor) -> Tensor:
            part = support.keeping(rest)
            with torch.no_grad():
                before = self.fit_head(features[rest], part)(features[fold])
                if candidate is None:
                    return before
                key = int(fold[0])  # folds are disjoint, so an image of one names it
                if key not in read:
                    # All candidates read the same statistics of a fold.
                    read[key] = read_statistics(self.model, self.initial_state(plan, part), plan, part.images)
                try:
                    state, _ = self.carry_out(candidate, part, read[key], None if believed is None else believed[rest])
                except DivergedError:
                    return features.new_full((len(fold), support.ways), torch.nan)  # never chosen
                both = torch.cat([rest, fold])
                x = self._features(support.images[both], state, candidate, features[both])
                after = self.fit_head(x[: len(rest)], part, ridge=candidate.ridge)(x[len(rest) :])
                return torch.lerp(after, before, self.prior_share)

        reading = self._reading()
        return {
            "labels": support.labels,
            "anchored": self.knows_classes(support),
            "predict": predict,
            "held_out": held_out,
            "label_free": [name for name, each in plans.items() if set(each.gate_of()) <= set(reading)],
            "folds": self.veto_folds,
        }
