"""Source training: one supervised model of all source domains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from modmeta.adaptation import DivergedError
from modmeta.backbone import Backbone
from modmeta.data import SourceBatch
from modmeta.data.seeding import rng
from modmeta.errors import ModmetaError, refuse_outside
from modmeta.files import write_atomically
from modmeta.learners.alignment import AlignmentConfig, SourceOutputs


@dataclass(frozen=True)
class BackboneConfig:
    """Which timm model is shared by all domains, and where its weights come from.

    Attributes:
        name: name of a timm model.
        pretrained: true for timm's hub weights, a path for a local safetensors or pth file, false for random ones.
        image_size: side of the images in pixels; None for the model's own.
        seed: seed of random weights.
        taps: modules whose output the features describe, too, such as ``[blocks.4, blocks.5]``.
    """

    name: str
    pretrained: bool | str
    image_size: int | None = None
    seed: int = 0
    taps: Sequence[str] = ()

    def __post_init__(self) -> None:
        refuse_outside({"backbone.seed": self.seed}, 0, 2**63 - 1)

    def build(self) -> Backbone:
        """Create the backbone."""
        return Backbone(self.name, self.pretrained, self.image_size, self.seed, self.taps)


@dataclass(frozen=True)
class SourceConfig:
    """How the backbone is trained on the source domains.

    Attributes:
        epochs: epochs of supervised training; 0 leaves the backbone as it is.
        learning_rate: peak learning rate of AdamW; falls to zero along a cosine after a warm-up.
        weight_decay: weight decay of AdamW.
        label_smoothing: share of the target that is spread over all classes, in 0..1.
        alignment: what makes the domains agree, by name and options; None is empirical risk minimisation.
    """

    epochs: int = 0
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    alignment: AlignmentConfig | None = None

    def __post_init__(self) -> None:
        refuse_outside({"source.epochs": self.epochs, "source.weight_decay": self.weight_decay}, 0)
        refuse_outside({"source.learning_rate": self.learning_rate}, 0, above=True)
        refuse_outside({"source.label_smoothing": self.label_smoothing}, 0, 1)


class SourcePhase(nn.Module):
    """A backbone in training with a linear classifier over all source classes.

    Args:
        config: how it is trained.
        feature_dim: length of the features.
        classes: number of source classes.
        domains: number of source domains.
    """

    def __init__(self, config: SourceConfig, feature_dim: int, classes: int, domains: int) -> None:
        super().__init__()
        self.config = config
        self.classifier = nn.Linear(feature_dim, classes)
        self.accuracy = MulticlassAccuracy(classes, average="micro")
        self.alignment = config.alignment.build(feature_dim, domains) if config.alignment is not None else None

    def loss(self, backbone: Backbone, batch: SourceBatch, progress: float, random: np.random.Generator) -> Tensor:
        """Return the loss of one batch, with gradients to the backbone, the classifier and the alignment.

        Args:
            backbone: the backbone to train.
            batch: source images.
            progress: share of source training that is done, in 0..1.
            random: what an alignment may draw from.
        """
        images, targets = batch.images, batch.labels
        if self.alignment is not None:
            images, targets = self.alignment.inputs(batch, self.classifier.out_features, random)
        with backbone.trainable():
            features = backbone.train_forward(images)
            logits = self.classifier(features)
        self.accuracy.update(logits.detach(), batch.labels)
        smoothing = self.config.label_smoothing
        if self.alignment is None:
            return F.cross_entropy(logits, targets, label_smoothing=smoothing)
        loss: Tensor = self.alignment(SourceOutputs(features, logits, targets, batch.domains, smoothing), progress)
        return loss

    def optimizer(self, backbone: Backbone) -> torch.optim.AdamW:
        """Return AdamW over the backbone, the classifier and what the alignment learns."""
        parameters = [*backbone.parameters(), *self.parameters()]
        return torch.optim.AdamW(parameters, lr=self.config.learning_rate, weight_decay=self.config.weight_decay)

    def learning_rate(self, step: int, steps: int) -> float:
        """Return the rate at ``step`` of ``steps``: a warm-up over a tenth, then a cosine to zero."""
        warm = max(1, steps // 10)
        if step < warm:
            return self.config.learning_rate * (step + 1) / warm
        return self.config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class SourceLearner(LightningModule):
    """Trains or fine-tunes the shared backbone on all source domains at once.

    Gulrajani and Lopez-Paz, "In Search of Lost Domain Generalization", ICLR 2021: well-tuned empirical risk
    minimisation is the bar for learning across domains; ``source.alignment`` takes a method that means to pass it. At
    the end of a fit the run folder holds ``backbone.safetensors``, timm's own tensor names, to go on from.

    Args:
        backbone: the timm model to train.
        source: how to train it; ``epochs`` counts for the learning rate's schedule.
    """

    def __init__(self, backbone: BackboneConfig, source: SourceConfig = SourceConfig(epochs=10)) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.source = source
        self.backbone = backbone.build()
        self.phase: SourcePhase | None = None

    @property
    def source_epochs(self) -> int:
        """Every epoch is one of source batches."""
        return self.trainer.max_epochs or self.source.epochs

    def setup(self, stage: str) -> None:
        """Make the classifier, now that classes and domains are known."""
        if self.phase is None:
            data = datamodule_of(self)
            self.phase = SourcePhase(self.source, self.backbone.own_dim, len(data.classes), len(data.train_domains))

    def training_step(self, batch: SourceBatch, batch_idx: int) -> None:
        """Take one step on a batch of all source domains."""
        assert self.phase is not None
        source_step(self, self.phase, self.backbone, self.optimizers(), batch, batch_idx, self.source_epochs)

    def on_train_epoch_end(self) -> None:
        """Log the training accuracy of the epoch."""
        assert self.phase is not None
        self.log("source/accuracy", self.phase.accuracy.compute(), prog_bar=True)
        self.phase.accuracy.reset()

    def on_fit_end(self) -> None:
        """Write the backbone as ``backbone.safetensors`` into the run folder, for a ``pretrained`` key to name."""
        folder = self.trainer.log_dir
        if folder is None or not self.trainer.is_global_zero:
            return
        tensors = {name: tensor.contiguous() for name, tensor in self.backbone.model.state_dict().items()}
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_atomically(Path(folder, "backbone.safetensors"), save(tensors))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over all that is trained."""
        assert self.phase is not None
        return self.phase.optimizer(self.backbone)


def source_step(
    learner: LightningModule,
    phase: SourcePhase,
    backbone: Backbone,
    optimizer: Any,
    batch: SourceBatch,
    batch_idx: int,
    epochs: int,
    others: Tensor | float = 0.0,
) -> None:
    """Take one supervised step inside a learner with manual optimisation.

    Args:
        learner: the LightningModule.
        phase: classifier and settings.
        backbone: the backbone to train.
        optimizer: the optimiser of all that is trained.
        batch: source images.
        batch_idx: number of the batch in its epoch.
        epochs: epochs of source training.
        others: a zero that touches every other parameter, which DistributedDataParallel insists on.

    Raises:
        DivergedError: when the loss is not finite.
    """
    per_epoch = int(learner.trainer.num_training_batches)
    step = learner.current_epoch * per_epoch + batch_idx
    for group in optimizer.param_groups:
        group["lr"] = phase.learning_rate(step, epochs * per_epoch)
    seed = int(datamodule_of(learner).hparams.get("seed", 0))
    random = rng(seed, "alignment", learner.current_epoch, batch_idx, learner.global_rank)
    loss = phase.loss(backbone, batch, step / max(1, epochs * per_epoch), random)
    if not torch.isfinite(loss):
        raise DivergedError(f"source training, epoch {learner.current_epoch}, step {batch_idx}: the loss is not finite")
    optimizer.zero_grad()
    learner.manual_backward(loss + others)
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 5.0)
    optimizer.step()
    learner.log("source/loss", loss.detach(), prog_bar=True)


def datamodule_of(learner: LightningModule) -> Any:
    """Return the data module of a learner's trainer: a DomainDataModule, or one that offers the same.

    Raises:
        ModmetaError: if the trainer was given bare loaders.
    """
    datamodule = getattr(learner.trainer, "datamodule", None)
    if datamodule is None:
        raise ModmetaError(f"{type(learner).__name__} needs a DomainDataModule: pass datamodule=... to the Trainer")
    return datamodule
