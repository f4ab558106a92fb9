"""Fits of the two-process test of the gradient family: ``python ddp_family_worker.py FOLDER DEVICES``."""

from __future__ import annotations

import sys
from pathlib import Path

import family
import tiny
import torch
from torch import Tensor


def main(folder: Path, devices: int) -> None:
    seen: dict[str, dict[str, Tensor]] = {}
    rank = 0
    for name, learner in (("maml", family.gradient(steps=2)), ("reptile", family.reptile(optimizer="sgd"))):
        trainer = tiny.trainer(folder, 1, devices=devices, strategy="ddp" if devices > 1 else "auto")
        trainer.fit(learner, datamodule=family.data(episodes_per_step=4))
        seen[name] = {key: parameter.detach() for key, parameter in learner.parameters_by_name().items()}
        rank = trainer.global_rank
    torch.save(seen, folder / f"{devices}-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
