"""What every learner is made of: backbone, units, bank, head, sources, and the way from a support to logits."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from modmeta.adaptation import (
    HEADS,
    Adapted,
    Anchor,
    Classifier,
    Head,
    LabelTrust,
    Plan,
    SourceStatistics,
    Support,
    label_trust,
    read_statistics,
)
from modmeta.adapters import AdaptedBackbone, Bank, State, UnitConfig, check_alive
from modmeta.errors import ModmetaError, refuse_outside
from modmeta.learners.feature_cache import FeatureCache
from modmeta.learners.source import BackboneConfig, SourceConfig, SourcePhase


class LearnerParts(LightningModule):
    """The parts that every learner over episodes is made of, and the way from a support set to logits."""

    needs_sources = True
    """Whether adapting looks at what is remembered of the source domains; if not, they are never measured."""

    knows_attributes = False
    """Whether it has attributes of classes, which heads may need."""

    _begun = False

    def __init__(
        self,
        backbone: BackboneConfig,
        units: Sequence[UnitConfig] = (),
        head: str = "anchored_ridge",
        head_options: dict[str, float] | None = None,
        source: SourceConfig = SourceConfig(),
        learning_rate: float = 1e-3,
        baselines: Sequence[str] = (),
        source_images: int = 100,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        refuse_outside({"learning_rate": learning_rate}, 0, above=True)
        refuse_outside({"source_images": source_images}, 1)
        self.save_hyperparameters(logger=False)
        self._forget_others()
        self.automatic_optimization = False
        self.source = source
        self.learning_rate = learning_rate
        self.source_images = source_images
        self.cache_dir = cache_dir
        self.model = AdaptedBackbone(backbone.build(), units)
        check_alive(self.model)
        if not source.epochs:
            self.model.backbone.requires_grad_(False)
        self.bank = Bank(self.model)
        for name in (head, *baselines):
            if getattr(HEADS.get(name), "needs_attributes", False) and not self.knows_attributes:
                raise ModmetaError(f"head {name!r} needs class attributes; take it with a ZeroShotLearner")
        self.head: Head = HEADS.make(head, **(head_options or {}))
        self.baselines = nn.ModuleDict({name: HEADS.get(name)() for name in baselines}).requires_grad_(False)
        self.sources = SourceStatistics()
        self.phase: SourcePhase | None = None
        self._cache: FeatureCache | None = None

    def _forget_others(self) -> None:
        """Keep only the arguments of the class itself: what it sets for its base cannot be given to it again."""
        parameters = inspect.signature(type(self)).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            for name in self.hparams.keys() - parameters.keys():
                del self.hparams[name]

    @property
    def trained(self) -> bool:
        """Whether meta-training has begun, here or in the run that a checkpoint is of."""
        return self.sources.ready if self.needs_sources else self._begun

    def adapt(self, support: Support) -> Adapted:
        """Adapt to a support set; gradients flow to what is meta-learned when they are enabled.

        Args:
            support: the images; the query is never seen.
        """
        features = self.prior_features(support.images)
        return Adapted(self.bank.initial(), self.idle_plan(), self.fit_head(features, support), support.classes)

    def inner_loss(self, features: Tensor, support: Support, ridge: Tensor | None = None) -> Tensor:
        """Return the loss per support image ``(S,)`` that adaptation descends.

        Every image is judged by a head that was fitted without it, so a head that merely remembers its
        support earns nothing.

        Args:
            features: ``(S, D)`` under the adapted modules.
            support: where they come from.
            ridge: factor on the head's ridge strength.
        """
        assert support.labels is not None
        return self.head.support_loss(self.held_out_logits(features, support, ridge), support.labels)

    def held_out_logits(self, features: Tensor, support: Support, ridge: Tensor | None = None) -> Tensor:
        """Return logits ``(S, C)`` of every support image by a head that was fitted without it.

        Args:
            features: ``(S, D)`` of the support, which must be labelled.
            support: where they come from.
            ridge: factor on the head's ridge strength.
        """
        assert support.labels is not None
        anchor = self._anchor(support)
        return self.head.held_out(features, support.labels, support.ways, anchor, ridge)

    @torch.no_grad()
    def wrong_labels(self, features: Tensor, support: Support) -> LabelTrust | None:
        """Return what :func:`~modmeta.adaptation.label_trust` says, by heads that have not seen the image.

        None, where the head takes labels at their word, or where no classifier of the sources could contradict them.

        Args:
            features: ``(S, D)`` of the support, unadapted.
            support: where they come from.
        """
        if support.labels is None or not self.head.label_noise or not self.knows_classes(support):
            return None
        doubt = self.head.doubt(self.held_out_logits(features, support), support.labels)
        return label_trust(doubt, self.head.label_noise)

    def query_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of an adapted model on query images, a scalar."""
        return F.cross_entropy(logits, labels)

    def idle_plan(self) -> Plan:
        """Return the plan that adapts nothing."""
        names = tuple(unit.name for unit in self.model.units)
        zeros = torch.zeros(len(names), device=self.device)
        scalar = torch.zeros((), device=self.device)
        ones = torch.ones(len(names), 1, device=self.device)
        return Plan(names, zeros, zeros[:, None][:, :0], zeros, ones, scalar + 1, scalar, scalar)

    def prior_features(self, images: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return unadapted features ``(B, D)``, without gradient, from the cache where ``ids`` allow it."""
        if self._cache is not None:
            return self._cache.get(images, "features", ids)
        with torch.no_grad():
            return self.model(images, {}, {})

    def fit_head(
        self, features: Tensor, support: Support, head: Head | None = None, ridge: Tensor | None = None
    ) -> Classifier:
        """Fit a head to support features; unlabelled ones get the sources' classifier, centred on them.

        Raises:
            ModmetaError: for unlabelled images of classes that no source domain knows.
        """
        anchor = self._anchor(support)
        if support.labels is not None:
            return (head or self.head).fit(features, support.labels, support.ways, anchor, ridge)
        if anchor is None:
            raise ModmetaError(f"a {type(self).__name__} knows no source domains, so all images need labels")
        if not bool(anchor.known.all()):
            new = [name for name, known in zip(support.classes, anchor.known.tolist(), strict=True) if not known]
            raise ModmetaError(f"class {new[0]!r} is new to the source domains, so its images need labels")
        return anchor.classifier(self.sources.scale, features.mean(0))

    def knows_classes(self, support: Support, head: Head | None = None) -> bool:
        """Return whether a head, by default the learner's own, knows all the classes without any image of them."""
        anchor = self._anchor(support)
        return (head or self.head).anchored and anchor is not None and bool(anchor.known.all())

    def logits(self, adapted: Adapted, images: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return logits ``(B, C)`` of images under an adapted model; differentiable in it."""
        logits = adapted.classifier(self.features(images, adapted.state, adapted.plan, ids))
        return logits if adapted.prior is None else logits + adapted.prior(self.prior_features(images, ids))

    def features(self, images: Tensor, state: State, plan: Plan, ids: Tensor | None = None) -> Tensor:
        """Return features ``(B, D)`` of images under a state and a plan's gates; differentiable in both.

        Args:
            images: ``(B, 3, H, W)``.
            state: the adapter modules' tensors.
            plan: whose gates count.
            ids: ``(B,)`` rows of the image store, where the images are those as they are on disk.
        """
        gates = plan.gate_of()
        start = self.model.cut_before(self.model.active(gates))
        if start == "features" and not gates:
            return self.prior_features(images, ids)
        return self.model(self._hidden(images, start, ids), state, gates, start=start)

    def learned(self, images: Tensor, initial: State | None = None) -> tuple[State, Plan]:
        """Return a state to use as it is, without any inner step, and the plan that opens every unit for it.

        :meth:`features` under them are differentiable in the state, which is how an embedding or what generates
        a state is trained. Units that read statistics read those of the images.

        Args:
            images: support images ``(S, 3, H, W)``.
            initial: the state; by default the bank's initial one, so that the bank is what is trained.
        """
        initial = self.bank.initial() if initial is None else initial
        plan = self.idle_plan()
        plan = replace(plan, gates=torch.ones_like(plan.gates))
        return read_statistics(self.model, initial, plan, images) | {n: initial[n] for n in self.bank.names}, plan

    def _anchor(self, support: Support) -> Anchor | None:
        return self.sources.view(support.hidden).anchor(support.classes) if self.sources.ready else None

    def _hidden(self, images: Tensor, cut: str | None, ids: Tensor | None) -> Tensor:
        if self._cache is not None:
            return self._cache.get(images, cut, ids)
        with torch.no_grad():
            return images if cut is None else self.model(images, {}, {}, stop=cut)
