"""ZeroShotLearner: classifies images of classes that it never saw, by what the classes are like."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modmeta.adaptation import Adapted, Classifier, Compatibility, Head, Support
from modmeta.adaptation.heads import Anchor
from modmeta.data import ClassAttributes, Episode, read_attributes
from modmeta.errors import ModmetaError
from modmeta.learners.base import MetaLearner
from modmeta.learners.measuring import episode_ids, episode_support
from modmeta.learners.metrics import EpisodeMetrics
from modmeta.learners.seen_unseen import SeenUnseenMetrics, seen_unseen
from modmeta.learners.source import BackboneConfig, SourceConfig, datamodule_of


class ZeroShotLearner(MetaLearner):
    """A head made of class attributes on frozen features, for any number of support images from none.

    A closed form of features and attributes is fitted to the source domains, and gives every class with attributes its
    weights. Support images correct them by ridge regression. Meta-training learns that head's numbers on episodes
    whose domain, and whose classes in part, the form was fitted without. Measured with ``data.eval_shots`` from 0,
    ``data.test_classes`` and ``data.test_seen_classes``; the system ``none`` is that of the attributes alone.

    Args:
        backbone: the timm model that all domains share.
        attributes: CSV file with a column ``class`` and one column of numbers per attribute, a line for every class
            of training, validation and test; ``digits`` for those of the embedded digits; None takes those that a
            checkpoint brings.
        head_options: options of the head ``attribute``.
        source: source training; off by default.
        learning_rate: of AdamW on everything that is meta-learned.
        baselines: heads that are measured beside this learner, where there are support images.
        source_images: images per class and domain that the closed form and the source statistics are measured on.
        cache_dir: where frozen features are kept; None keeps them in memory.
    """

    zero_shot = True
    knows_attributes = True
    facts: Mapping[str, tuple[str, ...]] = {"adapted": ("seconds",)}

    def __init__(
        self,
        backbone: BackboneConfig,
        attributes: str | None = None,
        head_options: dict[str, float] | None = None,
        source: SourceConfig = SourceConfig(),
        learning_rate: float = 1e-2,
        baselines: Sequence[str] = (),
        source_images: int = 100,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(
            backbone, (), "attribute", head_options, source, learning_rate, baselines, source_images, cache_dir
        )
        self.attributes: ClassAttributes | None = None if attributes is None else read_attributes(attributes)
        self.compatibility = Compatibility()

    # ------------------------------------------------------------------ training

    def setup(self, stage: str) -> None:
        """Make what needs the data module; refuse classes without attributes before any work is done."""
        super().setup(stage)
        if self.attributes is None:
            if not self.trainer.ckpt_path:
                raise ModmetaError("attributes: name a CSV file with the attributes of every class, or a checkpoint")
            return
        datamodule = datamodule_of(self)
        held_out = [name for side in ("val", "test") for name in datamodule.hparams.get(f"{side}_classes") or ()]
        self.attributes.of([*datamodule.classes, *held_out])

    def on_sources_measured(self) -> None:
        """Fit the closed form of features and attributes, the same on every rank."""
        datamodule = datamodule_of(self)
        features: dict[str, list[Tensor]] = {}
        labels: dict[str, list[Tensor]] = {}
        for domain, images, target, _ in datamodule.source_images(self.source_images):
            features.setdefault(domain, []).append(self.prior_features(images.to(self.device)))
            labels.setdefault(domain, []).append(target.to(self.device))
        sources = {domain: (torch.cat(chunks), torch.cat(labels[domain])) for domain, chunks in features.items()}
        self.compatibility.measure(sources, datamodule.classes, self._known().of(datamodule.classes))
        state = self.trainer.strategy.broadcast(self.compatibility.get_extra_state())
        self.compatibility.set_extra_state(state)

    def episode_loss(self, episode: Episode) -> Tensor:
        """Return the query loss of one training episode, a fold of whose classes was never seen."""
        support = episode_support(episode, hide=True)
        support_ids, query_ids = episode_ids(episode)
        anchor = self._attribute_anchor(support, fold=episode.index % self.compatibility.folds)
        features = self.prior_features(support.images, support_ids)
        classifier = self.head.fit(features, episode.support_labels, support.ways, anchor)
        return self.query_loss(classifier(self.prior_features(episode.query, query_ids)), episode.query_labels)

    # ------------------------------------------------------------------ adapting

    def adapt(self, support: Support) -> Adapted:
        """Make a classifier of attributes, and of images where there are some; unlabelled ones centre it.

        Raises:
            ModmetaError: for a class without attributes.
        """
        return self._adapt(support, None)

    def _adapt(self, support: Support, ids: Tensor | None) -> Adapted:
        if not len(support.images):
            classifier = self.describe(support)
        else:
            features = self.prior_features(support.images, ids)
            anchor = self._attribute_anchor(support)
            if support.labels is None:
                classifier = anchor.classifier(self.compatibility.scale, features.mean(0))
            else:
                classifier = self.head.fit(features, support.labels, support.ways, anchor)
        return Adapted(self.bank.initial(), self.idle_plan(), classifier, support.classes)

    def describe(self, support: Support) -> Classifier:
        """Return the classifier of the attributes alone for a support's classes; it looks at none of its images.

        Raises:
            ModmetaError: for a class without attributes.
        """
        return self._attribute_anchor(support, aligned=False).classifier(self.compatibility.scale)

    def _attribute_anchor(self, support: Support, fold: int | None = None, aligned: bool = True) -> Anchor:
        if self.attributes is None or not self.compatibility.classes:
            raise ModmetaError("this model was not trained: give the checkpoint of a fit")
        attributes = self.attributes.of(support.classes)
        return self.compatibility.anchor(support.classes, attributes, support.hidden, fold, aligned)

    # ------------------------------------------------------------------ measuring

    def evaluate(self, episode: Episode) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
        """Return query logits per system, and accuracies on seen and unseen classes per system, of one episode."""
        support_ids, ids = episode_ids(episode)
        support = episode_support(episode, hide=episode.domain in self.sources.domains)
        query = self.prior_features(episode.query, ids)
        view = self.sources.view(support.hidden)
        logits: dict[str, Tensor] = {}
        if bool(view.anchor(support.classes).known.any()):
            logits["source"] = view.classifier(support.classes)(query)
        if len(support.images):
            features = self.prior_features(support.images, support_ids)
            for name, head in self.baselines.items():
                assert isinstance(head, Head)
                logits[name] = self.fit_head(features, support, head)(query)
        logits["none"] = self.describe(support)(query)
        begin = time.perf_counter()
        adapted = self._adapt(support, support_ids)
        seconds = time.perf_counter() - begin
        logits["adapted"] = adapted.classifier(query)
        seen = [name in self.compatibility.classes for name in episode.classes]
        facts = {system: seen_unseen(scores, episode.query_labels, seen) for system, scores in logits.items()}
        facts["adapted"]["seconds"] = seconds
        return logits, facts

    def _new_metrics(self, split: str) -> EpisodeMetrics | None:
        datamodule = datamodule_of(self)
        systems = dict.fromkeys(("source", *self.baselines, *self.systems))
        domains = getattr(datamodule, f"{split}_domains")
        return SeenUnseenMetrics(systems, domains, datamodule.hparams["eval_shots"], self.facts).to(self.device)

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the attributes, so that the checkpoint does not depend on a file beside it."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hyper_parameters"]["attributes"] = None
        checkpoint["class_attributes"] = self._known().to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the attributes of the fit, unless a file was named.

        Raises:
            ModmetaError: if the file has other columns.
        """
        super().on_load_checkpoint(checkpoint)
        found = ClassAttributes.from_dict(checkpoint["class_attributes"])
        if self.attributes is None:
            self.attributes = found
        if self.attributes.names != found.names:
            raise ModmetaError(
                f"the checkpoint is for other attributes: it has {', '.join(found.names)}, the file "
                f"{', '.join(self.attributes.names)}"
            )

    def _known(self) -> ClassAttributes:
        if self.attributes is None:
            raise ModmetaError("attributes: name a CSV file with the attributes of every class")
        return self.attributes
