"""The way of one domain: its support set is planned for, the plan is judged, and what is left of it carried out."""

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
    Plan,
    Support,
    TrackRecord,
    Trial,
    Verdict,
    candidates,
    inner_loop,
    judge,
    measure,
    read_statistics,
    tempered_losses,
)
from modmeta.adapters import State
from modmeta.data import Episode
from modmeta.learners.held_out import HeldOut
from modmeta.learners.measuring import episode_ids, episode_support
from modmeta.learners.planning import PolicyPlanning


class PolicyAdaptation(PolicyPlanning):
    """The part of the modular learner that adapts: what a support set goes through, at test and in training alike."""

    trust: float
    full_step_drop: float
    second_order: bool
    veto: bool
    veto_folds: int
    veto_caution: float
    record: TrackRecord

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
        held_back = lacking = False
        if heeded and support.labels is not None:
            lacking = heeded.lacks(support.labels, support.ways)
            held_back = heeded.holds_back(support.labels, support.ways)
        if heeded and held_back:
            plan = heeded.temper(plan)
        plans = candidates(plan, self._reading(), learning) if self.veto else {"plan": plan}
        verdict = self._judge(plans, plan, held_out, believed)
        chosen = plans[verdict.choice] if verdict.choice != PRIOR else plan.keeping(())
        state, losses = self.carry_out(chosen, support, believed=believed)
        unadapted = held_out.unadapted_loss(believed)
        share = self.unadapted_share(situation, unadapted, lacking)
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

    def _features(self, images: Tensor, state: State, plan: Plan, prior: Tensor) -> Tensor:
        return self.features(images, state, plan) if plan.gate_of() else prior

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
