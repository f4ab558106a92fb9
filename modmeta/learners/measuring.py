"""Measuring a learner on validation and test episodes."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modmeta.adaptation import Adapted, DivergedError, Head, Support
from modmeta.data import Episode
from modmeta.data.seeding import seed_global
from modmeta.errors import ModmetaError
from modmeta.learners.metrics import EpisodeMetrics, Result
from modmeta.learners.parts import LearnerParts
from modmeta.learners.source import datamodule_of


class EpisodeMeasuring(LearnerParts):
    """The half of a learner that measures: every system on the same episodes, per domain and number of shots."""

    systems: tuple[str, ...] = ("none", "adapted")
    facts: Mapping[str, tuple[str, ...]] = {"adapted": ("units_updated", "parameters_updated", "seconds")}

    results: list[Result]
    """The figures of the last validation or test."""

    _metrics: EpisodeMetrics | None

    def evaluate(self, episode: Episode) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
        """Return query logits per system, and further figures per system, of one episode."""
        support_ids, ids = episode_ids(episode)
        support = episode_support(episode, hide=episode.domain in self.sources.domains)
        view = self.sources.view(support.hidden)
        features = self.prior_features(support.images, support_ids)
        query = self.prior_features(episode.query, ids)
        logits: dict[str, Tensor] = {}
        if bool(view.anchor(support.classes).known.any()):
            logits["source"] = view.classifier(support.classes)(query)
        for name, head in self.baselines.items():
            assert isinstance(head, Head)
            logits[name] = self.fit_head(features, support, head)(query)
        logits["none"] = self.fit_head(features, support)(query)
        begin = time.perf_counter()
        adapted = self.adapt(support)
        seconds = time.perf_counter() - begin
        logits["adapted"] = self.logits(adapted, episode.query, ids)
        return logits, {"adapted": {**self.updated(adapted), "seconds": seconds}}

    def updated(self, adapted: Adapted) -> dict[str, float]:
        """Return the shares of units and of the backbone's parameters that an adaptation updated."""
        active = self.model.active(adapted.plan.gate_of())
        backbone = sum(p.numel() for p in self.model.backbone.parameters())
        return {
            "units_updated": len(active) / max(1, len(self.model.units)),
            "parameters_updated": sum(unit.cost.parameters for unit in active) / backbone,
        }

    def on_validation_epoch_start(self) -> None:
        """Start new figures.

        Raises:
            ModmetaError: if this model was never trained, and is not being trained.
        """
        if self.trainer.state.fn == "validate":
            self._refuse_untrained()
        self._metrics = self._new_metrics("val")

    def on_test_epoch_start(self) -> None:
        """Start new figures.

        Raises:
            ModmetaError: if this model was never trained.
        """
        self._refuse_untrained()
        self._metrics = self._new_metrics("test")

    def _refuse_untrained(self) -> None:
        if not self.trained:
            raise ModmetaError("this model was not trained: give the checkpoint of a whole fit with --ckpt_path")

    def validation_step(self, batch: list[Episode], batch_idx: int) -> None:
        """Measure the validation episodes; there is nothing to measure while the backbone trains."""
        if self.trained and self._metrics is not None:
            self._measure(batch)

    def test_step(self, batch: list[Episode], batch_idx: int) -> None:
        """Measure the test episodes."""
        self._measure(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the validation figures."""
        if self.trained:
            self._finish("val")

    def on_test_epoch_end(self) -> None:
        """Log the test figures and keep them in ``results``."""
        self._finish("test")

    def _measure(self, episodes: Sequence[Episode]) -> None:
        assert self._metrics is not None
        # Adaptation takes gradients, which inference mode would forbid.
        with torch.inference_mode(False), torch.no_grad():
            for inference in episodes:
                episode = _normal(inference)
                where = f"episode {episode.index}, domain {episode.domain!r}"
                strange = set(episode.query_labels.tolist()) - set(range(len(episode.classes)))
                if strange:
                    count = len(episode.classes)
                    raise ModmetaError(f"{where}: query label {min(strange)} is none of the {count} of its support")
                seed_global(self._seed, "measured episode", episode.index)
                logits, facts = self.evaluate(episode)
                for system, scores in logits.items():
                    if not torch.isfinite(scores).all():
                        raise DivergedError(f"{where}: system {system!r} is not finite")
                for system, figures in facts.items():
                    for name, value in figures.items():
                        if not math.isfinite(value):
                            raise DivergedError(f"{where}: {name} of system {system!r} is not finite")
                self._metrics.update(episode.domain, episode.shots, episode.index, episode.query_labels, logits, facts)

    @property
    def _seed(self) -> int:
        datamodule = getattr(self._trainer, "datamodule", None)
        return 0 if datamodule is None else int(datamodule.hparams.get("seed", 0))

    def _new_metrics(self, split: str) -> EpisodeMetrics | None:
        datamodule = datamodule_of(self)
        systems = ("source", *self.baselines, *self.systems)
        domains = getattr(datamodule, f"{split}_domains")
        return EpisodeMetrics(dict.fromkeys(systems), domains, datamodule.hparams["eval_shots"], self.facts).to(
            self.device
        )

    def _finish(self, split: str) -> None:
        if self._metrics is None:
            return
        results = self._metrics.compute()
        self._metrics = None
        for r in results:
            if not all(map(math.isfinite, (r.value, r.low, r.high))):
                raise DivergedError(
                    f"{split}, domain {r.domain!r}, {r.shots}-shot: {r.metric} of system {r.system!r} is not finite"
                )
        self.results = results
        for r in results:
            if r.system == "adapted":
                self.log(f"{split}/{r.domain}/{r.shots}-shot/{r.metric}", r.value, rank_zero_only=True)
        gains = [r.value for r in results if r.system == "adapted" and r.metric == "gain"]
        if gains:
            self.log(f"{split}/gain", sum(gains) / len(gains), prog_bar=True, rank_zero_only=True)


def episode_support(episode: Episode, hide: bool) -> Support:
    """Return the support of an episode, its own domain hidden from the sources or not."""
    return Support(episode.support, episode.support_labels, episode.classes, hidden=episode.domain if hide else None)


def episode_ids(episode: Episode) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Return the store's rows of support and query, where the images are those as they are on disk."""
    return (episode.support_ids, episode.query_ids) if episode.shift is None else (None, None)


def _normal(episode: Episode) -> Episode:
    """Copy tensors that were made in inference mode; autograd refuses those."""
    copies: dict[str, Any] = {name: each.clone() for name, each in vars(episode).items() if isinstance(each, Tensor)}
    return dataclasses.replace(episode, **copies)
