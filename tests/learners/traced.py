"""Fits that are written down, so that two of them can be compared to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger

from modmeta.adapters import UnitConfig
from modmeta.learners import MetaLearner
from modmeta.learners.gradient import GradientLearner

STEPS, EPOCHS = 2, 3
"""Steps in an epoch, and epochs in a fit: one of source training and two of episodes."""

Row = tuple[str, int | None, float]


class Notes(Logger):
    """Keeps what is logged, as (name, step, value)."""

    name, version = "notes", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Row] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        kept = {key: float(value) for key, value in metrics.items() if key != "epoch" and not key.endswith("seconds")}
        self.rows += [(key, step, value) for key, value in kept.items()]


class Keeper(Callback):
    """Saves a checkpoint wherever a trainer might: after each step, each validation and each epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: list[Path] = []

    def save(self, trainer: Trainer, name: str) -> None:
        self.files.append(self.folder / f"{name}.ckpt")
        trainer.save_checkpoint(self.files[-1])

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.save(trainer, f"step-{trainer.global_step}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer, f"validation-{trainer.global_step}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer, f"epoch-{trainer.global_step}")


class At(Callback):
    """Does something in the middle of a certain training step, counted from 1, or in the validation of an epoch."""

    def __init__(self, act: Callable[[], object], step: int | None = None, validation: int | None = None) -> None:
        self.act, self.step, self.validation = act, step, validation

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step + 1 == self.step:
            self.act()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self.validation == trainer.current_epoch and args[2] == 0:
            self.act()


@dataclass(frozen=True)
class Traced:
    """What a fit left behind."""

    rows: list[Row]
    state: dict[str, Any]
    optimizers: list[dict[str, Any]]
    files: list[Path]

    def ends_like(self, whole: Traced) -> bool:
        """Whether weights, sources and optimisers, and every figure that was logged, are those of another fit."""
        logged = whole.rows[len(whole.rows) - len(self.rows) :]
        return same([self.state, self.optimizers, self.rows], [whole.state, whole.optimizers, logged])


def modular() -> MetaLearner:
    changes: dict[str, Any] = {
        "units": tiny.UNITS[1:2], "source_images": 2, "calibration_episodes": 1, "steps": 1, "veto_trials": 1,
    }  # fmt: skip
    return tiny.modular(source=tiny.source(), learning_rate=1e-2, **changes)


def head_only() -> MetaLearner:
    return tiny.head_only(source=tiny.source(), learning_rate=0.05, source_images=2)


def gradient() -> MetaLearner:
    torch.manual_seed(0)
    units = (UnitConfig("film", group="stage"),)
    return GradientLearner(tiny.BACKBONE, units, ways=3, source=tiny.source(), learning_rate=1e-2)


LEARNERS: dict[str, Callable[[], MetaLearner]] = {"modular": modular, "gradient": gradient, "head_only": head_only}


def fit(
    folder: Path,
    learner: str | MetaLearner = "head_only",
    resume: Path | None = None,
    callbacks: Sequence[Callback] = (),
    keep: bool = False,
    notes: Notes | None = None,
    data: dict[str, Any] | None = None,
    **changes: Any,
) -> Traced:
    """Fit a tiny learner, or go on with a fit."""
    built = LEARNERS[learner]() if isinstance(learner, str) else learner
    notes, keeper = notes or Notes(), Keeper(folder)
    options: dict[str, Any] = {"logger": notes, "log_every_n_steps": 1, "limit_val_batches": 1.0}
    callbacks = [*callbacks, *([keeper] if keep else [])]
    trainer = tiny.trainer(folder, EPOCHS, callbacks=callbacks, **(options | changes))
    torch.manual_seed(0 if resume is None else 99)  # the process's own seed must not matter
    trainer.fit(built, datamodule=tiny.digits(steps_per_epoch=STEPS, **(data or {})), ckpt_path=resume)
    state = {key: copy.deepcopy(value) for key, value in built.state_dict().items()}
    optimizers = [copy.deepcopy(optimizer.state_dict()) for optimizer in trainer.optimizers]
    return Traced(notes.rows, state, optimizers, keeper.files)


def same(one: Any, other: Any) -> bool:
    """Whether nested dicts, lists, tensors and numbers are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
