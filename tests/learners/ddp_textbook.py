"""Fits of the two-process test: ``python ddp_textbook.py FOLDER DEVICES``; every rank writes its weights."""

from __future__ import annotations

import sys
from pathlib import Path

import tiny
import torch
from textbook import tensors

from modmeta.adapters import UnitConfig
from modmeta.learners import (
    AmortizedLearner,
    MemoryLearner,
    MetaLearner,
    MetricLearner,
    SupernetLearner,
    ZeroShotLearner,
)

FILM = (UnitConfig("film", group="all"),)


def learners() -> dict[str, MetaLearner]:
    """Return one tiny learner of each family."""
    torch.manual_seed(0)
    relation = MetricLearner(tiny.BACKBONE, FILM, comparison="relation", pair_loss="mse", source_images=3)
    lstm = MemoryLearner(tiny.BACKBONE, "lstm", 3, embedding=4, network_options={"hidden": 8}, source_images=3)
    amortized = AmortizedLearner(tiny.BACKBONE, FILM, source_images=3)
    supernet = SupernetLearner(tiny.BACKBONE, (*FILM, UnitConfig("bias", group="all")), source_images=3, steps=1)
    described = ZeroShotLearner(tiny.BACKBONE, "digits", source_images=3)
    return {
        "metric": relation, "memory": lstm, "amortized": amortized, "supernet": supernet, "zero_shot": described,
    }  # fmt: skip


def main(folder: Path, devices: int) -> None:
    for name, learner in learners().items():
        trainer = tiny.trainer(folder, 1, devices=devices, strategy="ddp" if devices > 1 else "auto")
        trainer.fit(learner, datamodule=tiny.digits(episodes_per_step=2))
        torch.save(tensors(learner), folder / f"{name}-{devices}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
