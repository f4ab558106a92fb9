"""MetaLearner: the LightningModule that every learner over episodes derives from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modmeta.adaptation import DivergedError
from modmeta.data import Episode, ImageStore, SourceBatch
from modmeta.data.seeding import seed_global
from modmeta.errors import ModmetaError
from modmeta.learners.checkpoint import check, check_shapes, describe, plain
from modmeta.learners.feature_cache import FeatureCache
from modmeta.learners.measuring import EpisodeMeasuring, episode_support
from modmeta.learners.out_of_memory import gradient_within_memory, ran_out_of_memory
from modmeta.learners.resume import metric_state, restore_metric, settle_progress
from modmeta.learners.source import SourcePhase, datamodule_of, source_step


class MetaLearner(EpisodeMeasuring):
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

    largest_gradient = 1.0
    """Norm that longer meta-gradients are shortened to."""

    chunk: int | None = None
    """Episodes that :meth:`meta_gradient` is given at once, None for all of a step; halved when memory runs out."""

    _fingerprint: str | None = None

    # ------------------------------------------------------------------ what a subclass may override

    def episode_loss(self, episode: Episode) -> Tensor:
        """Return the meta-objective of one training episode, a scalar."""
        adapted = self.adapt(episode_support(episode, hide=True))
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

    # ------------------------------------------------------------------ training

    @property
    def source_epochs(self) -> int:
        """Epochs of source training; the data module gives source batches in these."""
        return self.source.epochs

    def episode_step(self, batch_idx: int) -> tuple[int, int]:
        """Return the number of a step among those on episodes, below 0 in source training, and how many there are."""
        per_epoch = int(self.trainer.num_training_batches)
        epochs = (self.trainer.max_epochs or 1) - self.source_epochs
        return (self.current_epoch - self.source_epochs) * per_epoch + batch_idx, epochs * per_epoch

    def meta_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that episodes train."""
        own = {id(parameter) for parameter in self.model.backbone.parameters()}
        own |= set() if self.phase is None else {id(parameter) for parameter in self.phase.parameters()}
        return [p for p in self.parameters() if id(p) not in own and p.requires_grad]

    def setup(self, stage: str) -> None:
        """Make what needs the data module: the source classifier and the feature cache."""
        trains_backbone = bool(self.source.epochs) and stage == "fit"
        if trains_backbone and self.phase is None:
            data = datamodule_of(self)
            own_dim = self.model.backbone.own_dim
            self.phase = SourcePhase(self.source, own_dim, len(data.classes), len(data.train_domains))
        if not trains_backbone:  # otherwise there is nothing frozen to keep yet
            self._open_cache()

    def on_train_start(self) -> None:
        """Begin with the episodes where a run is resumed within an epoch of them: that epoch has started already."""
        self._begin_episodes()

    def on_train_epoch_start(self) -> None:
        """Begin with the episodes when it is time."""
        self._begin_episodes()

    def _begin_episodes(self) -> None:
        """Freeze and measure the sources, once the last epoch of source training is over."""
        if self.current_epoch < self.source_epochs:
            return
        if not self.trained:
            self._begun = True
            if self.needs_sources:
                self.measure_sources()
        backbone = self.model.backbone
        if self._fingerprint is None:
            self._fingerprint = backbone.fingerprint()
        if self._cache is None:
            self._open_cache()

    def _open_cache(self) -> None:
        store = getattr(getattr(self.trainer, "datamodule", None), "store", None)
        if store is not None:
            self.keep_features(store, self.cache_dir)

    def keep_features(self, store: ImageStore, folder: str | None = None) -> None:
        """Compute what the frozen backbone makes of each image of a store only once.

        Args:
            store: the images whose rows ``ids`` of :meth:`prior_features` and :meth:`logits` mean.
            folder: where to keep features; None keeps them in memory.
        """
        # Where an image's features depend on its batch, those of another batch are of no use.
        if not self.model.backbone.batch_dependent:
            self._cache = FeatureCache(self.model, len(store), store.key, folder)

    def measure_sources(self) -> None:
        """Measure the source domains under the frozen backbone, the same on every rank."""
        datamodule = datamodule_of(self)
        chunks = datamodule.source_images(self.source_images)
        batches = ((domain, images.to(self.device), labels) for domain, images, labels, _ in chunks)
        backbone, strategy = self.model.backbone, self.trainer.strategy
        self.sources.measure(backbone, batches, datamodule.classes)
        self.sources.set_extra_state(strategy.broadcast(self.sources.get_extra_state()))
        if backbone.taps:
            backbone.tap_scale = strategy.broadcast(backbone.tap_scale)
        self.on_sources_measured()

    def training_step(self, batch: list[Episode] | SourceBatch, batch_idx: int) -> None:
        """Take one step: on a source batch in the first phase, on this rank's episodes in the second.

        Raises:
            DivergedError: when a loss, a gradient or a parameter is not finite.
            ModmetaError: when memory runs out, and smaller parts would not help or change the result.
        """
        where = f"epoch {self.current_epoch}, step {self.global_step}"
        # What is drawn without a generator of its own, such as dropout, is the same in a resumed run.
        seed_global(self._seed, "step", self.current_epoch, batch_idx, self.global_rank)
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        meta = self.meta_parameters()
        if isinstance(batch, SourceBatch):
            assert self.phase is not None
            self._source_step(self.phase, optimizers[1], batch, batch_idx, meta, where)
            return
        loss, gradients = gradient_within_memory(self, batch, meta, where)
        # One backward pass that reaches every parameter with exactly these gradients: what
        # DistributedDataParallel needs to average them, however each episode was computed.
        surrogate = torch.stack([(p * g).sum() for p, g in zip(meta, gradients, strict=True)]).sum()
        rest = [p for p in self.parameters() if p.requires_grad and all(p is not m for m in meta)]
        surrogate = surrogate + sum((p.sum() * 0.0 for p in rest), surrogate.new_zeros(()))
        optimizers[0].zero_grad()
        self.manual_backward(surrogate)
        nn.utils.clip_grad_norm_(meta, self.largest_gradient)
        optimizers[0].step()
        self._refuse_overflow(meta, where)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))

    def _source_step(
        self,
        phase: SourcePhase,
        optimizer: Any,
        batch: SourceBatch,
        batch_idx: int,
        meta: list[nn.Parameter],
        where: str,
    ) -> None:
        others = sum((p.sum() * 0.0 for p in meta), torch.zeros((), device=self.device))
        backbone = self.model.backbone
        try:
            source_step(self, phase, backbone, optimizer, batch, batch_idx, self.source_epochs, others)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not ran_out_of_memory(error):
                raise
            # Half a batch would have other batch statistics.
            raise ModmetaError(
                f"{where}: out of memory in source training; choose a smaller data.batch_size or data.image_size"
            ) from error
        self._average_buffers()
        self._refuse_overflow([*backbone.parameters(), *phase.parameters()], where)

    def _refuse_overflow(self, parameters: Iterable[nn.Parameter], where: str) -> None:
        """Stop before parameters that overflowed in a step get anywhere."""
        moved = list(parameters)
        if torch.stack([torch.isfinite(p).all() for p in moved]).all():
            return
        names = self._names([p for p in moved if not torch.isfinite(p).all()])
        raise DivergedError(f"{where}: the step left {names} not finite; the last checkpoint is intact")

    def _names(self, parameters: Sequence[nn.Parameter]) -> str:
        """Return names of parameters for a message; those of a unit's begin with the unit's own."""
        known = {id(parameter): name for name, parameter in self.named_parameters()}
        known |= {id(parameter): name for name, parameter in zip(self.bank.names, self.bank.prior, strict=True)}
        names = [known[id(parameter)] for parameter in parameters]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    def _refuse_not_finite(
        self,
        episodes: Sequence[Episode],
        losses: Tensor,
        parameters: Sequence[nn.Parameter],
        gradients: Sequence[Tensor],
    ) -> None:
        """Stop before losses ``(N,)`` or the gradient of their mean get anywhere that are not finite."""
        finite = torch.isfinite(losses)
        wrong = [p for p, g in zip(parameters, gradients, strict=True) if not torch.isfinite(g).all()]
        if finite.all() and not wrong:
            return
        first = episodes[int(finite.float().argmin())]
        where = f"step {self.global_step}, episode {first.index}, domain {first.domain!r}"
        # Where the gradient alone is not finite, any of the episodes that it is the mean of may be the cause.
        found = f"the gradient of {self._names(wrong)} in this or a later one" if finite.all() else "the loss"
        raise DivergedError(f"{where}: {found} is not finite; the last checkpoint is intact")

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
            # And in episodes, it is the same on any number of ranks.
            seed_global(self._seed, "episode", episode.index)
            try:
                loss = self.episode_loss(episode)
            except DivergedError as error:
                raise DivergedError(f"{where}: {error}") from error
            if not torch.isfinite(loss):
                raise DivergedError(f"{where}: the loss is {float(loss.detach())}; the last checkpoint is intact")
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            wrong = [p for p, g in zip(parameters, found, strict=True) if g is not None and not torch.isfinite(g).all()]
            if wrong:
                raise DivergedError(
                    f"{where}: the gradient of {self._names(wrong)} is not finite; the last checkpoint is intact"
                )
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
        """Let all ranks know what each one's BatchNorm saw of a batch: a checkpoint holds one rank's buffers."""
        buffers = [buffer for buffer in self.model.backbone.buffers() if buffer.is_floating_point()]
        if self.trainer.world_size == 1 or not buffers:
            return
        mean = self.trainer.strategy.reduce(torch.cat([buffer.flatten() for buffer in buffers]), reduce_op="mean")
        for buffer, part in zip(buffers, mean.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))

    # ------------------------------------------------------------------ checkpoints

    from_checkpoint = False
    """Whether the backbone was built without its weights, because a checkpoint brings them."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what a checkpoint must be checked against, and what a resumed run goes on from."""
        checkpoint["hyper_parameters"] = plain(dict(self.hparams))
        checkpoint["modmeta"] = {**describe(self), "trained": self.trained}
        if self.phase is not None:
            checkpoint["source_accuracy"] = metric_state(self.phase.accuracy)
        settle_progress(self.trainer, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another learner, backbone or set of units.

        Raises:
            ModmetaError: saying what was found and what was expected.
        """
        check(checkpoint.get("modmeta"), self, weights=not self.from_checkpoint)
        self._begun = checkpoint["modmeta"].get("trained", True)
        if self.phase is None:
            # The source classifier only serves source training.
            for key in [key for key in checkpoint["state_dict"] if key.startswith("phase.")]:
                del checkpoint["state_dict"][key]
        elif "source_accuracy" in checkpoint:
            restore_metric(self.phase.accuracy, checkpoint["source_accuracy"], first=self.trainer.is_global_zero)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Take tensors, as of any module.

        Raises:
            ModmetaError: naming the first tensor of another shape.
        """
        check_shapes(state_dict, self)
        return super().load_state_dict(state_dict, *args, **kwargs)
