"""MetaLearner: the LightningModule that every learner over episodes derives from."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from modmeta.adaptation import (
    HEADS,
    Adapted,
    DivergedError,
    Head,
    Plan,
    SourceStatistics,
    Support,
)
from modmeta.adapters import AdaptedBackbone, Bank, UnitConfig, check_alive
from modmeta.data import Episode, SourceBatch
from modmeta.errors import ModmetaError
from modmeta.learners.feature_cache import FeatureCache
from modmeta.learners.metrics import EpisodeMetrics, Result
from modmeta.learners.source import BackboneConfig, SourceConfig, SourcePhase, source_step


class MetaLearner(LightningModule):
    """Meta-trains something over episodes on a frozen backbone.

    As it stands it is a head-only learner: :meth:`adapt` fits a closed-form head to frozen features, and
    meta-training learns that head's two scalars. Subclass it and override :meth:`adapt`, :meth:`inner_loss`,
    :meth:`query_loss` or :meth:`configure_optimizers`; everything else (source training, distribution,
    metrics, checkpoints, the command line) stays.

    One ``fit`` may hold two phases: ``source.epochs`` epochs of supervised training of the backbone over all source
    domains, and then episodes on the frozen backbone.

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
    """

    systems: tuple[str, ...] = ("none", "adapted")
    facts: Mapping[str, tuple[str, ...]] = {"adapted": ("units_updated", "parameters_updated", "seconds")}

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
        self.save_hyperparameters(logger=False)
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
        self.head: Head = HEADS.get(head)(**(head_options or {}))
        self.baselines = nn.ModuleDict({name: HEADS.get(name)() for name in baselines}).requires_grad_(False)
        self.sources = SourceStatistics()
        self.phase: SourcePhase | None = None
        self.results: list[Result] = []
        self._metrics: EpisodeMetrics | None = None
        self._cache: FeatureCache | None = None
        self._fingerprint: str | None = None

    # ------------------------------------------------------------------ what a subclass may override

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
        anchor = self.sources.view(support.hidden).anchor(support.classes)
        logits = self.head.held_out(features, support.labels, support.ways, anchor, ridge)
        return F.cross_entropy(logits, support.labels, reduction="none")

    def query_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of an adapted model on query images, a scalar."""
        return F.cross_entropy(logits, labels)

    def episode_loss(self, episode: Episode) -> Tensor:
        """Return the meta-objective of one training episode, a scalar."""
        adapted = self.adapt(_support(episode, hide=True))
        return self.query_loss(self.logits(adapted, episode.query), episode.query_labels)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the optimiser of what is meta-learned and, with a source phase, that of the backbone."""
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(self.meta_parameters(), lr=self.learning_rate, weight_decay=1e-4)
        ]
        if self.phase is not None:
            optimizers.append(self.phase.optimizer(self.model.backbone))
        return optimizers

    def on_sources_measured(self) -> None:
        """Prepare what needs the source statistics, before the first episode."""

    # ------------------------------------------------------------------ parts

    @property
    def source_epochs(self) -> int:
        """Epochs of source training; the data module gives source batches in these."""
        return self.source.epochs

    def meta_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that episodes train."""
        own = {id(parameter) for parameter in self.model.backbone.parameters()}
        own |= set() if self.phase is None else {id(parameter) for parameter in self.phase.parameters()}
        return [p for p in self.parameters() if id(p) not in own and p.requires_grad]

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
            return self.model.backbone(images)

    def fit_head(
        self, features: Tensor, support: Support, head: Head | None = None, ridge: Tensor | None = None
    ) -> Any:
        """Fit a head to support features; unlabelled ones get the sources' classifier, centred on them.

        Raises:
            ModmetaError: for unlabelled images of classes that no source domain knows.
        """
        anchor = self.sources.view(support.hidden).anchor(support.classes)
        if support.labels is not None:
            return (head or self.head).fit(features, support.labels, support.ways, anchor, ridge)
        if not bool(anchor.known.all()):
            new = [name for name, known in zip(support.classes, anchor.known.tolist(), strict=True) if not known]
            raise ModmetaError(f"class {new[0]!r} is new to the source domains, so its images need labels")
        return anchor.classifier(self.sources.scale, features.mean(0))

    def logits(self, adapted: Adapted, images: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return logits ``(B, C)`` of images under an adapted model; differentiable in it."""
        gates = adapted.plan.gate_of()
        start = self.model.cut_before(self.model.active(gates))
        if start == "features" and not gates:
            return adapted.classifier(self.prior_features(images, ids))
        hidden = self._hidden(images, start, ids)
        return adapted.classifier(self.model(hidden, adapted.state, gates, start=start))

    def _hidden(self, images: Tensor, cut: str | None, ids: Tensor | None) -> Tensor:
        if self._cache is not None:
            return self._cache.get(images, cut, ids)
        with torch.no_grad():
            return images if cut is None else self.model.backbone.run(images, stop=cut)

    # ------------------------------------------------------------------ training

    def setup(self, stage: str) -> None:
        """Make what needs the data module: the source classifier and the feature cache."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if self.source.epochs and self.phase is None and stage == "fit":
            if datamodule is None:
                raise ModmetaError("source training needs a DomainDataModule: pass datamodule=... to the Trainer")
            self.phase = SourcePhase(self.source, self.model.backbone.feature_dim, len(datamodule.classes))
        store = getattr(datamodule, "store", None)
        if store is not None and not (self.source.epochs and stage == "fit"):
            # While the backbone still trains there is nothing frozen to keep.
            self._cache = FeatureCache(self.model, len(store), store.key, self.cache_dir)

    def on_train_epoch_start(self) -> None:
        """Freeze and measure the sources when the episodes begin."""
        if self.current_epoch < self.source_epochs:
            return
        if not self.sources.ready:
            self._average_buffers()
            self.measure_sources()
        backbone = self.model.backbone
        if self._fingerprint is None:
            self._fingerprint = backbone.fingerprint()
        if self._cache is None:
            store = getattr(getattr(self.trainer, "datamodule", None), "store", None)
            if store is not None:
                self._cache = FeatureCache(self.model, len(store), store.key, self.cache_dir)

    def measure_sources(self) -> None:
        """Measure the source domains under the frozen backbone, the same on every rank."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is None or not hasattr(datamodule, "source_images"):
            raise ModmetaError("meta-training needs the source images of a DomainDataModule; pass datamodule=...")
        chunks = datamodule.source_images(self.source_images)
        batches = ((domain, images.to(self.device), labels) for domain, images, labels, _ in chunks)
        self.sources.measure(self.model.backbone, batches, datamodule.classes)
        self.sources.set_extra_state(self.trainer.strategy.broadcast(self.sources.get_extra_state()))
        self.on_sources_measured()

    def training_step(self, batch: list[Episode] | SourceBatch, batch_idx: int) -> None:
        """Take one step: on a source batch in the first phase, on this rank's episodes in the second."""
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        meta = self.meta_parameters()
        if isinstance(batch, SourceBatch):
            assert self.phase is not None
            others = sum((p.sum() * 0.0 for p in meta), torch.zeros((), device=self.device))
            source_step(
                self,
                self.phase,
                self.model.backbone,
                optimizers[1],
                batch,
                batch_idx,
                self.source_epochs,
                others,
            )
            return
        loss, gradients = self.meta_gradient(batch, meta)
        # One backward pass that reaches every parameter with exactly these gradients: what
        # DistributedDataParallel needs to average them, however each episode was computed.
        surrogate = torch.stack([(p * g).sum() for p, g in zip(meta, gradients, strict=True)]).sum()
        rest = [p for p in self.parameters() if p.requires_grad and all(p is not m for m in meta)]
        surrogate = surrogate + sum((p.sum() * 0.0 for p in rest), surrogate.new_zeros(()))
        optimizers[0].zero_grad()
        self.manual_backward(surrogate)
        nn.utils.clip_grad_norm_(meta, 1.0)
        optimizers[0].step()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))

    def meta_gradient(
        self, episodes: Sequence[Episode], parameters: Sequence[nn.Parameter]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the mean loss of some episodes and its gradient, one episode in memory at a time.

        Raises:
            DivergedError: when a loss or gradient is not finite, naming step, episode and domain.
        """
        total = torch.zeros((), device=self.device)
        gradients = [torch.zeros_like(p) for p in parameters]
        for episode in episodes:
            where = f"step {self.global_step}, episode {episode.index}, domain {episode.domain!r}"
            try:
                loss = self.episode_loss(episode)
            except DivergedError as error:
                raise DivergedError(f"{where}: {error}") from error
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            if not all(torch.isfinite(g).all() for g in [loss, *found] if g is not None):
                raise DivergedError(f"{where}: the loss or its gradient is not finite; the last checkpoint is intact")
            total += loss.detach() / len(episodes)
            for sum_, g in zip(gradients, found, strict=True):
                if g is not None:
                    sum_ += g / len(episodes)
        return total, gradients

    def on_train_epoch_end(self) -> None:
        """Log the source accuracy of the epoch."""
        if self.phase is not None and self.current_epoch < self.source_epochs:
            self.log("source/accuracy", self.phase.accuracy.compute(), prog_bar=True)
            self.phase.accuracy.reset()

    def on_fit_end(self) -> None:
        """Make sure that the frozen backbone was left alone.

        Raises:
            ModmetaError: if its fingerprint changed while episodes were trained on.
        """
        if self._fingerprint is not None and self.model.backbone.fingerprint() != self._fingerprint:
            raise ModmetaError("the frozen backbone changed during meta-training; a callback or subclass wrote to it")

    def _average_buffers(self) -> None:
        # Each rank's BatchNorm saw its own half of the source batches; from here on all must be the same.
        for buffer in self.model.backbone.buffers():
            if buffer.is_floating_point():
                buffer.copy_(self.trainer.strategy.reduce(buffer.clone(), reduce_op="mean"))

    # ------------------------------------------------------------------ evaluation

    def evaluate(self, episode: Episode) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
        """Return query logits per system, and further figures per system, of one episode."""
        ids = episode.query_ids if episode.shift is None else None
        support_ids = episode.support_ids if episode.shift is None else None
        support = _support(episode, hide=episode.domain in self.sources.domains)
        view = self.sources.view(support.hidden)
        features = self.prior_features(support.images, support_ids)
        query = self.prior_features(episode.query, ids)
        logits: dict[str, Tensor] = {}
        if bool(view.anchor(support.classes).known.any()):
            logits["source"] = view.classifier(support.classes)(query)
        for name, head in self.baselines.items():
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
        """Start new figures."""
        self._metrics = self._new_metrics("val")

    def on_test_epoch_start(self) -> None:
        """Start new figures.

        Raises:
            ModmetaError: if this model was never trained.
        """
        if not self.sources.ready:
            raise ModmetaError("this model was not trained: give the checkpoint of a fit with --ckpt_path")
        self._metrics = self._new_metrics("test")

    def validation_step(self, batch: list[Episode], batch_idx: int) -> None:
        """Measure the validation episodes; there is nothing to measure while the backbone trains."""
        if self.sources.ready and self._metrics is not None:
            self._measure(batch)

    def test_step(self, batch: list[Episode], batch_idx: int) -> None:
        """Measure the test episodes."""
        self._measure(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the validation figures."""
        if self.sources.ready:
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
                logits, facts = self.evaluate(episode)
                for system, scores in logits.items():
                    if not torch.isfinite(scores).all():
                        raise DivergedError(
                            f"episode {episode.index}, domain {episode.domain!r}: system {system!r} is not finite"
                        )
                self._metrics.update(episode.domain, episode.shots, episode.index, episode.query_labels, logits, facts)

    def _new_metrics(self, split: str) -> EpisodeMetrics | None:
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is None:
            raise ModmetaError("episodes are measured per domain of a DomainDataModule; pass datamodule=...")
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
        self.results = results
        for r in results:
            if r.system == "adapted":
                self.log(f"{split}/{r.domain}/{r.shots}-shot/{r.metric}", r.value, rank_zero_only=True)
        gains = [r.value for r in results if r.system == "adapted" and r.metric == "gain"]
        if gains:
            self.log(f"{split}/gain", sum(gains) / len(gains), prog_bar=True, rank_zero_only=True)

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what a checkpoint must be checked against."""
        backbone = self.model.backbone
        checkpoint["hyper_parameters"] = _plain(dict(self.hparams))
        checkpoint["modmeta"] = {
            "learner": f"{type(self).__module__}.{type(self).__qualname__}",
            "backbone": backbone.name,
            "preprocessing": backbone.preprocessing,
            "fingerprint": backbone.fingerprint(),
            "trained_source": bool(self.source.epochs),
            "units": [unit.name for unit in self.model.units],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another learner, backbone or set of units.

        Raises:
            ModmetaError: saying what was found and what was expected.
        """
        found = checkpoint.get("modmeta")
        if found is None:
            raise ModmetaError("the checkpoint was not written by a modmeta learner")
        backbone = self.model.backbone
        pairs = [
            ("backbone", found["backbone"], backbone.name),
            ("preprocessing", found["preprocessing"], backbone.preprocessing),
            ("units", found["units"], [unit.name for unit in self.model.units]),
        ]
        if not found["trained_source"] and not self.from_checkpoint:
            pairs.append(("backbone fingerprint", found["fingerprint"], backbone.fingerprint()))
        for what, theirs, ours in pairs:
            if theirs != ours:
                raise ModmetaError(f"the checkpoint is for another {what}: it has {theirs}, this model {ours}")
        phase = {key: tensor for key, tensor in checkpoint["state_dict"].items() if key.startswith("phase.")}
        if self.phase is None:
            # The source classifier only serves source training.
            for key in phase:
                del checkpoint["state_dict"][key]

    from_checkpoint = False
    """Whether the backbone was built without its weights, because a checkpoint brings them."""


def _plain(value: Any) -> Any:
    """Return lists, dicts, strings and numbers only: what loading a checkpoint without unpickling allows."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, Mapping) or hasattr(value, "items"):
        return {str(key): _plain(each) for key, each in value.items() if key != "_instantiator"}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value


def _normal(episode: Episode) -> Episode:
    """Copy tensors that were made in inference mode; autograd refuses those."""
    tensors = {name: value.clone() for name, value in vars(episode).items() if isinstance(value, Tensor)}
    return dataclasses.replace(episode, **tensors)


def _support(episode: Episode, hide: bool) -> Support:
    return Support(episode.support, episode.support_labels, episode.classes, hidden=episode.domain if hide else None)
