"""SupernetLearner: candidate modules that are trained together, so that placements of them can be compared."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from modmeta.adaptation import Adapted, Plan, Support, inner_loop
from modmeta.adapters import UnitConfig
from modmeta.data import Episode
from modmeta.data.seeding import rng
from modmeta.errors import ModmetaError
from modmeta.learners.base import MetaLearner
from modmeta.learners.measuring import episode_ids, episode_support
from modmeta.learners.placements import Placements
from modmeta.learners.source import BackboneConfig, SourceConfig


class SupernetLearner(MetaLearner):
    """Trains the initial values of all candidate units, each training episode along a random path through them.

    A path opens some units (gate 1; for units that learn nothing, the gate of their configuration) and leaves the
    others out. Each episode draws its path uniformly (Guo et al., "Single Path One-Shot Neural Architecture Search
    with Uniform Sampling", ECCV 2020), adapts its units with their constant rates, and the query loss trains their
    initial values, in first order, and the head. Afterwards one training serves to judge any path, and ``modmeta
    place`` searches for the best one, as Eustratiadis et al., "Neural Fine-Tuning Search for Few-Shot Learning",
    ICLR 2024, do.

    Validation and test measure a random path per episode: the mean over paths.

    Args:
        backbone: the timm model that all domains share.
        units: the candidates; those of the same group compete for one place.
        head: registered name of the head.
        head_options: options of the head.
        source: source training; off by default.
        learning_rate: of AdamW on everything that is meta-learned.
        baselines: heads that are measured beside this learner, on unadapted features and the same episodes.
        source_images: images per class and domain that the source statistics are measured on.
        cache_dir: where frozen features are kept; None keeps them in memory.
        steps: inner gradient steps.
        trust: bound on the root mean square distance of a unit from its initial value.
        at_once: units that may share a place.
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
        trust: float = 0.5,
        at_once: int = 1,
    ) -> None:
        super().__init__(
            backbone, units, head, head_options, source, learning_rate, baselines, source_images, cache_dir
        )
        if not units:
            raise ModmetaError("units: a supernet needs candidates to choose among; run `modmeta modules`")
        if steps < 1:
            raise ModmetaError(f"steps must be 1 or more, got {steps}")
        self.unit_configs = tuple(units)
        self.steps = steps
        self.trust = trust
        self.placements = Placements.of(self.model.units, at_once)
        self.open: Collection[str] = [unit.name for unit in self.model.units]
        """The units that :meth:`adapt` uses."""

    def path_plan(self, names: Collection[str]) -> Plan:
        """Return the plan that opens the units in ``names`` and moves them with their constant rates."""
        units, idle = self.model.units, self.idle_plan()
        gates = [(1.0 if unit.learns else unit.gate) if unit.name in names else 0.0 for unit in units]
        rates = torch.tensor([unit.rate for unit in units], device=self.device)
        return replace(idle, gates=torch.tensor(gates, device=self.device), rates=rates[:, None].expand(-1, self.steps))

    def adapt(self, support: Support) -> Adapted:
        """Adapt the units in ``open``."""
        return self.adapt_along(self.open, support)

    def adapt_along(self, names: Collection[str], support: Support) -> Adapted:
        """Adapt along the path that opens the units in ``names``."""
        plan = self.path_plan(names)
        loss = None if support.labels is None else lambda features: self.inner_loss(features, support).mean()
        state, losses = inner_loop(self.model, self.bank.initial(), plan, support.images, loss, trust=self.trust)
        features = self.features(support.images, state, plan)
        report = {"labelled": support.labels is not None, "support_losses": losses}
        return Adapted(state, plan, self.fit_head(features, support), support.classes, report)

    def path_logits(self, names: Collection[str], episode: Episode) -> Tensor:
        """Return query logits ``(Q, C)`` of an episode after adapting the units in ``names``, its domain hidden."""
        support = episode_support(episode, hide=episode.domain in self.sources.domains)
        return self.logits(self.adapt_along(names, support), episode.query, episode_ids(episode)[1])

    def episode_loss(self, episode: Episode) -> Tensor:
        """Return the query loss of a training episode along its own random path."""
        genome = self.placements.draw(rng(self._seed, "path", episode.index))
        return self.query_loss(self.path_logits(self.placements.open(genome), episode), episode.query_labels)

    def evaluate(self, episode: Episode) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
        """Measure an episode along a random path of its own."""
        before = self.open
        self.open = self.placements.open(self.placements.draw(rng(self._seed, "measured path", episode.index)))
        try:
            return super().evaluate(episode)
        finally:
            self.open = before
