"""SIGTERM and SIGINT: the step under way is finished, a checkpoint is saved, and the exit code says what happened."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException

INTERRUPTED = "interrupted.ckpt"
"""What the checkpoint is called; it lies beside the run's others."""


class Interruption(Callback):
    """Stops a run on SIGTERM or SIGINT, after the step under way, where going on changes no bit of what comes out.

    A fit saves a checkpoint beside those of its ModelCheckpoint, if it has one. The process exits with 143 or 130. A
    second signal ends it at once, without saving.

    Between the last step of an epoch and its end a fit of one process breaks its validation off, which starts anew
    when it is resumed. A fit of several ends the epoch first. All ranks stop at the same step.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._ranks = 1

    # ------------------------------------------------------------------ the signals

    def _take_over(self, trainer: Trainer) -> None:
        """Replace the handlers of this process; the trainer puts those that it found back at its end.

        Lightning's own handler exits with 0, and lets ranks wait for each other at any instruction.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        self._ranks = trainer.world_size
        launcher = trainer.strategy.launcher
        children = launcher if isinstance(launcher, _SubprocessScriptLauncher) else None

        def handle(signum: int, frame: FrameType | None) -> None:
            if self.signum is None:
                self.signum = signum
                if children is not None:
                    children.kill(signum)  # asks them to stop, too
            elif trainer.local_rank == 0:  # the others may hear of one signal twice
                if children is not None:
                    children.kill(signal.SIGKILL)
                os._exit(128 + signum)

        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, handle)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen."""
        self._take_over(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen, where no fit does."""
        if not self._in_fit(trainer):
            self._take_over(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen."""
        self._take_over(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen."""
        self._take_over(trainer)

    # ------------------------------------------------------------------ where to stop

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask the trainer to stop behind this step, or where it is the last one, behind the epoch."""
        if self._heard(trainer):
            # Lightning's flag for SIGTERM: it raises SIGTERMException once the figures of the step are logged.
            trainer._signal_connector.received_sigterm = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop, if a signal came behind the last step: nothing else may begin."""
        if self._heard(trainer):
            raise SIGTERMException

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Stop, unless ranks in a fit would have to agree: they may have different numbers of episodes."""
        if self._ranks == 1 or not self._in_fit(trainer):
            self._stop()

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Stop."""
        self._stop()

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Stop."""
        self._stop()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop, where no fit goes on."""
        if not self._in_fit(trainer):
            self._stop()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop."""
        self._stop()

    def _heard(self, trainer: Trainer) -> bool:
        heard = self.signum is not None
        return heard if self._ranks == 1 else not trainer.strategy.reduce_boolean_decision(not heard, all=True)

    def _stop(self) -> None:
        if self.signum is not None:
            raise SIGTERMException

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save, and settle the exit code."""
        if not isinstance(exception, SIGTERMException):
            return
        # A child's exit code other than 0 makes Lightning kill the first rank, whose exit code counts.
        exception.code = 128 + (self.signum or signal.SIGTERM) if trainer.local_rank == 0 else 0
        keeper, trial = trainer.checkpoint_callback, getattr(trainer, "fast_dev_run", False)
        if self._in_fit(trainer) and isinstance(keeper, ModelCheckpoint) and not trial:
            trainer.save_checkpoint(Path(str(keeper.dirpath), INTERRUPTED))

    @staticmethod
    def _in_fit(trainer: Trainer) -> bool:
        return trainer.state.fn == "fit"
