"""Tiny learners, data and trainers, for tests and for the processes that they start."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from modmeta.adapters import UnitConfig
from modmeta.data import DomainDataModule
from modmeta.learners import BackboneConfig, MetaLearner, ModularMetaLearner, SourceConfig

BACKBONE = BackboneConfig("test_efficientnet", pretrained=False, image_size=32)
UNITS = (
    UnitConfig("norm_blend", group="all"),
    UnitConfig("film", group="stage", depth=(0.5, 1.0)),
    UnitConfig("projection", {"rank": 2}),
)


_OF_RANKS = ("LOCAL_RANK", "NODE_RANK", "RANK", "GROUP_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def digits(**changes: Any) -> DomainDataModule:
    """Return a data module of which everything is small."""
    options: dict[str, Any] = {
        "root": "digits", "val_domains": ["slanted"], "test_domains": ["neon"], "ways": 3, "shots": (2, 3),
        "eval_shots": [2, 3], "queries": 2, "steps_per_epoch": 2, "episodes_per_step": 2, "val_episodes": 1,
        "test_episodes": 3, "batch_size": 16,
    }  # fmt: skip
    return DomainDataModule(**(options | changes))


def modular(cls: type[ModularMetaLearner] = ModularMetaLearner, **changes: Any) -> ModularMetaLearner:
    """Return a tiny modular learner."""
    options: dict[str, Any] = {
        "backbone": BACKBONE, "units": UNITS, "source_images": 5, "calibration_episodes": 2, "steps": 2,
        "veto_trials": 4,
    }  # fmt: skip
    torch.manual_seed(0)
    return cls(**(options | changes))


def head_only(cls: type[MetaLearner] = MetaLearner, **changes: Any) -> MetaLearner:
    """Return a learner that adapts the head alone."""
    options: dict[str, Any] = {"backbone": BACKBONE, "source_images": 5}
    torch.manual_seed(0)
    return cls(**(options | changes))


def source(epochs: int = 1) -> SourceConfig:
    """Return a source phase of some epochs."""
    return SourceConfig(epochs=epochs)


def trainer(folder: Path, epochs: int, **changes: Any) -> Trainer:
    """Return a quiet trainer on the CPU."""
    options: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    return Trainer(default_root_dir=folder, max_epochs=epochs, **(options | changes))


def for_ranks() -> dict[str, str]:
    """Return the environment of a process that starts ranks.

    The port is one that no process is given by itself: one that is free now may be taken before all ranks are there.
    What a trainer with several ranks has left in this process's own environment would make of that process a lone rank.
    """
    own = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
    port = str(20_000 + os.getpid() % 10_000)
    return own | {"GLOO_SOCKET_IFNAME": "lo", "MASTER_PORT": port}


@dataclass(frozen=True)
class Fitted:
    """A learner after source training and meta-training, its checkpoint and its test results."""

    learner: ModularMetaLearner
    checkpoint: Path
    results: list[dict[str, Any]]
    logged: dict[str, float]
