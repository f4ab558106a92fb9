"""ModularMetaLearner: learns which modules to adapt to a domain, how fast, and whether at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from modmeta.adaptation import (
    DEFAULT_INDICATORS,
    UPDATE_RULES,
    IndicatorSet,
    Plan,
    Policy,
    SignalConfig,
    SignalMixture,
    Support,
    TrackRecord,
    backward_shares,
    norm_sites,
    refuse_tuning,
    tempered_losses,
)
from modmeta.adapters import UnitConfig
from modmeta.data import Episode
from modmeta.errors import ModmetaError, refuse_outside
from modmeta.learners.adapting import PolicyAdaptation
from modmeta.learners.measuring import episode_ids, episode_support
from modmeta.learners.source import BackboneConfig, SourceConfig, datamodule_of
from modmeta.learners.transfer import take_policy
from modmeta.learners.warm_start import start_from_table, table_for

_FIRST_TRIAL = 1_000_000_000  # no episode that is learned from has such a number


class ModularMetaLearner(PolicyAdaptation):
    """Adapts a frozen backbone through units that a learned policy opens, one plan per domain.

    Indicators describe the support; the policy turns them into a plan: a gate and learning rates for every
    unit; the inner loop carries it out; the veto keeps the unadapted prior unless the evidence speaks for the
    plan. Meta-training descends the query loss after the plan with respect to the policy, the bank's universal
    initial values and the head, while the episode's own domain is hidden from all that is known of the sources.

    Args:
        backbone: the timm model that all domains share.
        units: adapter modules and where they act.
        head: registered name of the head.
        head_options: options of the head.
        source: source training; off by default.
        learning_rate: of AdamW on everything that is meta-learned.
        baselines: heads that are measured beside this learner, on unadapted features and the same episodes.
        source_images: images per class and domain that the source statistics are measured on.
        cache_dir: where frozen features are kept; None keeps them in memory.
        steps: inner gradient steps.
        rule: registered update rule that gives the rates; ``policy`` lets the policy decide.
        trust: bound on the root mean square distance of a unit from its initial value.
        full_step_drop: by how many nats a step must promise to lower the support's loss to be taken at full rate; one
            that promises less is shorter in proportion, so that a support that is explained already is hardly
            learned from. 0 takes every step at full rate.
        second_order: differentiate through the inner gradients.
        indicators: registered indicators that the policy sees; with ``budget`` among them, training episodes draw
            budgets of their own.
        indicator_dropout: probability that the policy does not see an indicator's number, in training.
        indicator_noise: standard deviation of noise on the standardised indicators, in training.
        harm_weight: weight of what the plan loses against no adaptation, beyond ``harm_margin``.
        harm_margin: nats that a plan should gain at least.
        cost_weight: price of letting gradients through the whole backbone, in nats.
        budget: largest share of the backward multiply-accumulates of steps on all learning units that the steps
            of an adaptation may take; 1 is no limit. What the indicators and the veto take comes on top.
        prior_share: weight of the unadapted model in the answer of an adapted one, 0..1. Their logits are averaged:
            that takes back part of what an adaptation breaks, and costs every predicted image a second forward pass.
        statistics_depths: shares of the way through the backbone, 0..1, down to which units that only read statistics
            may begin. The first is what plans go by; ``[0.3, 1]`` is for late layers, whose statistics on few images
            are rather of their content than of the domain, and where they help nonetheless. The others are tried on the
            labelled support before anything learns from it, one forward pass each: the first stands unless a head does
            better on images that it has not seen, by more than a standard error.
        statistics_strengths: factors on the gates of units that only read statistics, such as ``[0, 0.5, 1, 2]``, tried
            after the depths, at the chosen one, in the same way; the policy's own gates stand unless another is better.
        statistics_prior: how many images the backbone's own statistics count as. With ``S`` support images the gates of
            units that only read statistics are multiplied by ``S / (S + statistics_prior)``, as few images show their
            content rather than their domain. Schneider et al., "Improving robustness against common corruptions by
            covariate shift adaptation", NeurIPS 2020, weigh the two this way. 0 leaves the gates as they are.
        explained_loss: mean loss of the unadapted model on held-out support images, in nats, below which a support
            counts as explained already. Where statistics are tried at all, it is then none that stand unless others
            are better: they have little to gain, and a few images' own chance to lose by. 0 never does.
        near_loss: that loss below which a domain counts as near: there is little to gain, and so much the less is put
            at risk. Where the unadapted model knows its way it knows which labels are wrong, too, so images whose label
            looks wrong do not judge statistics. 0 never does. Meta-training and the veto know of no near domains.
        near_share: what stands in place of ``prior_share`` in a near domain.
        near_shift: where a class has no image to believe in, and the veto is on, the loss cannot tell how much is put
            at risk: nothing speaks for that class, and the image that it lacks may be among the others under a wrong
            label. There a domain counts as near, too, where the inputs of the first fifth of the batch norms shift
            less than this against the statistics that the backbone keeps: the squared gap of the means and that of the
            deviations, in units of the kept variance. 0 never does.
        lacking_share: what stands in place of ``prior_share`` there.
        veto: whether the veto may keep the prior; without it every plan is carried out. Where the sources know all
            classes and the head reckons with wrong labels (``label_noise``), it also keeps those that look wrong from
            being learned from, multiplies all learning rates by the chance that of the others no more are wrong, and
            holds back the head on adapted features, which it also does where a class has no image to believe in.
        veto_folds: folds of its cross-fitting; with 0, plans that labels move are not measured on the support.
        veto_caution: standard errors that a gain must exceed, while there is no track record.
        veto_trials: training episodes at the end of a fit on which all candidates are carried out, each episode's
            domain hidden, for the record that the veto goes by; 0 keeps none.
        unlabelled_share: share of the training episodes that come without labels, for units that need none.
        signals: what the steps descend beside the labels' loss, or instead of it where there are no labels. Without
            any, units that learn stay closed for unlabelled images; with some, the policy's forecast alone decides
            whether a plan for those is carried out, as no label is there to contradict. Views of the images that a
            signal asks for come on top of the budget.
        calibration_episodes: training episodes on which the indicators are standardised.
        warm_start: folder of an action table of these units and indicators. Before the first episode the policy is
            regressed onto the best action of its episodes, and the indicators are standardised on those.
        policy_from: checkpoint of another modular learner whose policy, standardisation of the indicators and strengths
            of the head this one takes over, whatever its backbone, units and domains were. ``test`` then needs no
            training, and a ``fit`` goes on from there.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        units: Sequence[UnitConfig],
        head: str = "anchored_ridge",
        head_options: dict[str, float] | None = None,
        source: SourceConfig = SourceConfig(),
        learning_rate: float = 1e-3,
        baselines: Sequence[str] = (),
        source_images: int = 100,
        cache_dir: str | None = None,
        steps: int = 3,
        rule: str = "policy",
        trust: float = 0.5,
        full_step_drop: float = 0.0,
        second_order: bool = False,
        indicators: Sequence[str] = DEFAULT_INDICATORS,
        indicator_dropout: float = 0.0,
        indicator_noise: float = 0.0,
        harm_weight: float = 2.0,
        harm_margin: float = 0.02,
        cost_weight: float = 0.02,
        budget: float = 1.0,
        prior_share: float = 0.0,
        statistics_depths: Sequence[float] = (1.0,),
        statistics_strengths: Sequence[float] = (),
        statistics_prior: float = 0.0,
        explained_loss: float = 0.0,
        near_loss: float = 0.0,
        near_share: float = 1.0,
        near_shift: float = 0.0,
        lacking_share: float = 1.0,
        veto: bool = True,
        veto_folds: int = 2,
        veto_caution: float = 1.0,
        veto_trials: int = 32,
        unlabelled_share: float = 0.1,
        signals: Sequence[SignalConfig] = (),
        calibration_episodes: int = 32,
        warm_start: str | None = None,
        policy_from: str | None = None,
    ) -> None:
        if not units:
            raise ModmetaError("units: the modular learner needs at least one adapter module; run `modmeta modules`")
        shares = {"prior_share": prior_share, "near_share": near_share, "lacking_share": lacking_share}
        refuse_outside({"budget": budget, "unlabelled_share": unlabelled_share} | shares, 0, 1)
        prices = {"harm_weight": harm_weight, "cost_weight": cost_weight, "veto_caution": veto_caution}
        thresholds = {"explained_loss": explained_loss, "near_loss": near_loss, "near_shift": near_shift}
        refuse_outside(prices | thresholds, 0)
        refuse_outside({"full_step_drop": full_step_drop, "statistics_prior": statistics_prior}, 0)
        refuse_outside({"harm_margin": harm_margin}, -math.inf)
        refuse_outside({"trust": trust}, 0, above=True)
        refuse_outside({"steps": steps, "calibration_episodes": calibration_episodes}, 1)
        refuse_tuning(statistics_depths, statistics_strengths)
        if veto_folds == 1 or min(veto_folds, veto_trials) < 0:
            given = f"{veto_folds} and {veto_trials}"
            raise ModmetaError(f"veto_folds must be 0, or 2 or more, and veto_trials 0 or more; got {given}")
        if warm_start is not None and policy_from is not None:
            raise ModmetaError("warm_start and policy_from both say where the policy starts; give one of them")
        super().__init__(
            backbone, units, head, head_options, source, learning_rate, baselines, source_images, cache_dir
        )
        self.trust = trust
        self.full_step_drop = full_step_drop
        self.second_order = second_order
        self.harm_weight = harm_weight
        self.harm_margin = harm_margin
        self.cost_weight = cost_weight
        self.budget = budget
        self.prior_share = prior_share
        self.statistics_depths = list(statistics_depths)
        self.statistics_strengths = list(statistics_strengths)
        self.statistics_prior = statistics_prior
        self.explained_loss = explained_loss
        self.near_loss = near_loss
        self.near_share = near_share
        self.near_shift = near_shift
        self.lacking_share = lacking_share
        self.veto = veto
        self.veto_folds = veto_folds
        self.veto_caution = veto_caution
        self.veto_trials = veto_trials
        self.unlabelled_share = unlabelled_share
        self.signals = SignalMixture(signals)
        self.calibration_episodes = calibration_episodes
        self.warm_start = warm_start
        self.policy_from = policy_from
        self.indicators = IndicatorSet(indicators, indicator_dropout, indicator_noise)
        self.policy = Policy(self.indicators.global_width, self.indicators.unit_width, steps)
        self.record = TrackRecord()
        with torch.random.fork_rng(devices=[]):  # whatever weights a rule draws, all else is the same beside any rule
            self.rule = UPDATE_RULES.get(rule)(self.model.units, steps)
        self._norm_sites = norm_sites(self.model.backbone)
        self.backward_shares = backward_shares(self.model)

    # ------------------------------------------------------------------ meta-training

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the optimisers of the base; the forecast of gain, a mere regression, learns ten times faster."""
        meta, *rest = super().configure_optimizers()
        forecast = list(self.policy.forecast.parameters())
        own = {id(parameter) for parameter in forecast}
        meta.param_groups[0]["params"] = [p for p in meta.param_groups[0]["params"] if id(p) not in own]
        meta.add_param_group({"params": forecast, "lr": 10 * self.learning_rate})
        return [meta, *rest]

    def episode_loss(self, episode: Episode) -> Tensor:
        """Return query loss after the plan, plus the prices of harm, of cost, and of a wrong prediction of gain."""
        # All noise is a function of the episode, so every rank and resumed run draws the same.
        generator = torch.Generator().manual_seed(episode.index)
        support = self._training_support(episode, generator)
        situation = self.situate(support, self._training_budget(generator))
        plan = self.plan(situation, generator)
        state, _ = self.carry_out(plan, support)
        adapted = self.conclude(plan, state, support, situation.features)
        _, ids = episode_ids(episode)
        logits = self.logits(adapted, episode.query)
        after = self.query_loss(logits, episode.query_labels)
        prior = self.fit_head(situation.features, support)(self.prior_features(episode.query, ids))
        before = self.query_loss(prior, episode.query_labels)
        with torch.no_grad():
            gain = (tempered_losses(prior, episode.query_labels) - tempered_losses(logits, episode.query_labels)).mean()
        harm = F.relu(after - before.detach() + self.harm_margin)
        prediction = F.gaussian_nll_loss(plan.gain, gain.to(plan.gain), plan.gain_log_variance.exp(), eps=1e-4)
        # `before` teaches the head's own scalars on episodes whose plan leaves the units closed, too.
        return after + 0.5 * before + self.harm_weight * harm + self.cost_weight * self._cost(plan) + prediction

    def _training_support(self, episode: Episode, generator: torch.Generator) -> Support:
        """Return the episode's support, now and then without its labels where the sources know all classes."""
        support = episode_support(episode, hide=True)
        without = float(torch.rand((), generator=generator)) < self.unlabelled_share
        known = self.sources.view(support.hidden).anchor(support.classes).known
        return replace(support, labels=None) if without and bool(known.all()) else support

    def _training_budget(self, generator: torch.Generator) -> float:
        """Return the budget of a training episode: a policy that is to heed budgets must have seen them all."""
        if "budget" not in self.indicators.names:
            return self.budget
        return float(0.01 ** torch.rand((), generator=generator))  # log-uniform

    def _cost(self, plan: Plan) -> Tensor:
        """Return the expected share of the backbone's depth that gradients pass.

        A stretch of the backbone is paid for if any learning unit at or before it is open.
        """
        learners = sorted((unit for unit in self.model.units if unit.learns), key=lambda unit: unit.depth)
        closed = plan.gates.new_ones(())
        cost = plan.gates.new_zeros(())
        for unit, following in zip(learners, [*learners[1:], None], strict=True):
            closed = closed * (1 - plan.gates[plan.index(unit.name)])
            end = 1.0 if following is None else following.depth
            cost = cost + (end - unit.depth) * (1 - closed)
        return cost

    def setup(self, stage: str) -> None:
        """Make what needs the data module; refuse a table or policy to start from before any work is done."""
        super().setup(stage)
        if self.trainer.ckpt_path:
            return
        if self.warm_start is not None and stage == "fit":
            table_for(self.warm_start, self.policy, self.indicators, self.model.units)
        if self.policy_from is not None and not self.sources.ready:
            self._take_policy(self.policy_from)

    def _take_policy(self, path: str) -> None:
        take_policy(path, self.policy, self.indicators, self.head, self.hparams["head"], self.record)

    def on_test_epoch_start(self) -> None:
        """Start new figures; a policy that was taken over needs the sources measured, and nothing else.

        Raises:
            ModmetaError: if this model was never trained.
        """
        trained = not self.source.epochs or self.phase is not None or bool(self.trainer.ckpt_path)
        if self.policy_from is not None and not self.sources.ready and trained:
            with torch.inference_mode(False):
                self.measure_sources()
        super().on_test_epoch_start()

    def on_sources_measured(self) -> None:
        """Standardise the indicators on the first training episodes, unless the policy brings that with it."""
        if self.policy_from is not None:
            self._take_policy(self.policy_from)
            return
        if self.warm_start is not None:
            table = table_for(self.warm_start, self.policy, self.indicators, self.model.units)
            start_from_table(table, self.policy, self.indicators, self.model.units)
            return
        datamodule = datamodule_of(self)
        rows = []
        for index in range(self.calibration_episodes):
            episode = datamodule.episode("train", index).to(self.device)
            generator = torch.Generator().manual_seed(index)
            support = self._training_support(episode, generator)
            rows.append(self.indicators.raw(self.situate(support, self._training_budget(generator))))
        self.indicators.fit(rows)

    def on_train_epoch_end(self) -> None:
        """Take the record that the veto goes by, once nothing more will be learned."""
        super().on_train_epoch_end()
        trainer = self.trainer
        last = self.current_epoch + 1 == trainer.max_epochs or self.global_step == trainer.max_steps
        if last and self.veto and self.veto_trials and self.sources.ready:
            self._take_record()

    def _take_record(self) -> None:
        datamodule = datamodule_of(self)
        left = dict.fromkeys(self.sources.domains, -(-self.veto_trials // len(self.sources.domains)))
        found, tried = [], range(_FIRST_TRIAL, _FIRST_TRIAL + 20 * self.veto_trials)
        for index in tried:
            episode = datamodule.episode("train", index)
            # Simulated shifts are harsher than new domains are. Where all episodes are shifted, they must do.
            usable = episode.shift is None or index - _FIRST_TRIAL >= len(tried) // 2
            if usable and left.get(episode.domain, 0) > 0:
                left[episode.domain] -= 1
                found.append(self.trial(episode.to(self.device)))
            if not any(left.values()):
                break
        self.record.fit([trial for trial in found if trial.finite])
        self.record.load_state_dict(self.trainer.strategy.broadcast(self.record.state_dict()))

    # ------------------------------------------------------------------ checkpoints

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint whose policy saw other indicators.

        Raises:
            ModmetaError: saying how many numbers it saw, and how many there are now.
        """
        super().on_load_checkpoint(checkpoint)
        own = {part: self.indicators.get_buffer(f"center_{part}").numel() for part in ("global", "unit")}
        state = checkpoint["state_dict"]
        found = {part: state[key].numel() for part in own if (key := f"indicators.center_{part}") in state}
        if found.keys() == own.keys() and found != own:
            raise ModmetaError(
                f"the checkpoint's policy sees {found['global']} indicators per domain and {found['unit']} per unit; "
                f"here {', '.join(self.indicators.names)} give {own['global']} and {own['unit']}: it is of another "
                f"version or choice of indicators; fit again, or take the version that wrote it"
            )
