"""A learning rate that falls to zero over the episodes of a fit."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from modmeta.errors import ModmetaError
from modmeta.learners.base import MetaLearner
from modmeta.learners.reptile import ReptileLearner


class CosineDecay(Callback):
    """Lets a meta-learner's rate fall from ``learning_rate`` to zero along half a cosine, once the episodes begin.

    The rate is a function of the step alone, so a resumed run goes on where it was.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is a rate to set, and an end for it to reach.

        Raises:
            ModmetaError: for a learner without episodes or with a schedule of its own, and a fit without an end.
        """
        if not isinstance(pl_module, MetaLearner) or isinstance(pl_module, ReptileLearner):
            raise ModmetaError(f"CosineDecay: a {type(pl_module).__name__} has a schedule of its own; leave it out")
        if trainer.max_epochs is None or trainer.max_epochs < 0:
            raise ModmetaError("CosineDecay: set trainer.max_epochs, where the rate is to reach zero")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the rate of this step."""
        assert isinstance(pl_module, MetaLearner)
        step, total = pl_module.episode_step(batch_idx)
        if 0 <= step < total:
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = pl_module.learning_rate * 0.5 * (1 + math.cos(math.pi * step / total))
