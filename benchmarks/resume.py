"""Stops fits at random steps, resumes them, and compares what comes out with a fit that was never stopped.

``python benchmarks/resume.py`` stops each learner ten times, by SIGTERM, SIGINT and kill -9 in turn, and prints what of
the end is equal to the bit: weights with policy and source statistics, the optimisers' state, and every logged figure.
After kill -9 a run goes on from the newest checkpoint, one of which is written every three steps. The exit code is 1
if anything differs.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import random
import signal
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger

from modmeta.adapters import UnitConfig
from modmeta.data import DomainDataModule
from modmeta.learners import AtomicCheckpointIO, BackboneConfig, MetaLearner, ModularMetaLearner, SourceConfig
from modmeta.learners.gradient import GradientLearner
from modmeta.learners.interruption import INTERRUPTED, Interruption

STEPS, EPOCHS, EVERY = 4, 3, 3
BACKBONE = BackboneConfig("test_efficientnet", pretrained=False, image_size=32)
UNITS = (UnitConfig("film", group="stage", depth=(0.5, 1.0)),)
WAYS = ("SIGTERM", "SIGINT", "SIGKILL")


class Notes(Logger):
    """Keeps every logged figure that is no time."""

    name, version = "notes", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[str, int | None, float]] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Keep none of them."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keep these."""
        self.rows += [(name, step, float(value)) for name, value in metrics.items() if not name.endswith("seconds")]


class Stop(Callback):
    """Sends this process a signal in the middle of a step, counted from 1."""

    def __init__(self, step: int, way: str) -> None:
        self.step, self.way = step, way

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Send it if it is time."""
        if trainer.global_step + 1 == self.step:
            os.kill(os.getpid(), getattr(signal, self.way))


def modular() -> MetaLearner:
    """Return the modular learner with a source phase of an epoch."""
    return ModularMetaLearner(
        BACKBONE, UNITS, source=SourceConfig(epochs=1), source_images=2, calibration_episodes=2, steps=1, veto=False,
        learning_rate=1e-2,
    )  # fmt: skip


def gradient() -> MetaLearner:
    """Return second-order MAML on a few modules, with a source phase of an epoch."""
    return GradientLearner(BACKBONE, UNITS, ways=3, source=SourceConfig(epochs=1), learning_rate=1e-2)


LEARNERS: dict[str, Callable[[], MetaLearner]] = {"modular": modular, "gradient": gradient}


def fit(learner: str, folder: Path, stop: Stop | None = None, resume: Path | None = None) -> list[Any]:
    """Fit; return weights and all else of the model, the optimisers' state, and the logged figures."""
    torch.manual_seed(0)
    built, notes = LEARNERS[learner](), Notes()
    torch.manual_seed(0 if resume is None else 12345)  # a resumed process has another seed
    data = DomainDataModule(
        val_domains=["slanted"], test_domains=["neon"], ways=3, shots=(2, 3), eval_shots=[2], queries=2,
        steps_per_epoch=STEPS, episodes_per_step=2, val_episodes=1, batch_size=8,
    )  # fmt: skip
    keeper = ModelCheckpoint(folder, "last", every_n_train_steps=EVERY, enable_version_counter=False)
    trainer = Trainer(
        max_epochs=EPOCHS, accelerator="cpu", devices=1, logger=notes, log_every_n_steps=1, num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, plugins=[AtomicCheckpointIO()],
        callbacks=[keeper, Interruption(), *([] if stop is None else [stop])],
    )  # fmt: skip
    trainer.fit(built, datamodule=data, ckpt_path=resume)
    return [copy.deepcopy(built.state_dict()), [o.state_dict() for o in trainer.optimizers], notes.rows]


def stop_and_resume(learner: str, step: int, way: str, folder: Path) -> tuple[Path | None, int, list[Any]]:
    """Return the checkpoint that a stopped fit went on from, the exit status that it had, and its end."""
    child = os.fork()
    if child == 0:
        try:
            fit(learner, folder, Stop(step, way))
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        os._exit(code)
    _, status = os.waitpid(child, 0)
    files = sorted(folder.glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
    resume = files[-1] if files else None
    return resume, os.waitstatus_to_exitcode(status), fit(learner, folder, resume=resume)


def same(one: Any, other: Any) -> bool:
    """Return whether nested dicts, lists, tensors and numbers are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stops", type=int, default=10, help="random steps per learner")
    parser.add_argument("--seed", type=int, default=0, help="of the steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    chosen = random.Random(options.seed)
    failures = 0
    print(f"{options.stops} steps of 1..{STEPS * EPOCHS} per learner, seed {options.seed}")
    print(f"epoch 1 of {EPOCHS} is source training; {STEPS} steps each\n")
    print("| learner | stopped in step | by | exit code | resumed from | weights | optimisers | logged figures |")
    print("|---|---|---|---|---|---|---|---|")
    for learner in LEARNERS:
        with tempfile.TemporaryDirectory() as folder:
            whole = fit(learner, Path(folder))
        for number, step in enumerate(sorted(chosen.sample(range(1, STEPS * EPOCHS + 1), options.stops))):
            way = WAYS[number % len(WAYS)]
            with tempfile.TemporaryDirectory() as folder:
                file, code, (state, optimizers, rows) = stop_and_resume(learner, step, way, Path(folder))
            expected = {"SIGTERM": 143, "SIGINT": 130, "SIGKILL": -9}[way]
            logged = whole[2][len(whole[2]) - len(rows) :]
            equal = [same(state, whole[0]), same(optimizers, whole[1]), same(rows, logged)]
            start = "the beginning" if file is None else file.name
            saved = way == "SIGKILL" or start == INTERRUPTED
            failures += not (all(equal) and code == expected and saved)
            words = " | ".join("equal" if each else "DIFFERENT" for each in equal)
            print(f"| {learner} | {step} | {way} | {code} | {start} | {words} |", flush=True)
    print(f"\n{failures} of {options.stops * len(LEARNERS)} stops left a trace")
    return int(failures > 0)


if __name__ == "__main__":
    raise SystemExit(main())
