"""Fits of the two-process test of resuming: ``python resume_worker.py FOLDER``; every rank writes what it found."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from traced import At, fit

from modmeta.learners.interruption import INTERRUPTED, Interruption


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    two = {"devices": 2, "strategy": "ddp"}
    whole = fit(folder, "modular", keep=True, **two)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    report = []
    for name in ("step-2", "step-3"):
        resumed = fit(folder, "modular", resume=folder / f"{name}.ckpt", **two)
        report.append(f"{name} {resumed.ends_like(whole)}")

    def hear() -> None:
        if rank == 1:  # one rank alone, and not the first
            os.kill(os.getpid(), signal.SIGTERM)

    callbacks = [ModelCheckpoint(folder / "kept"), Interruption(), At(hear, step=3)]
    try:
        fit(folder, "modular", callbacks=callbacks, enable_checkpointing=True, **two)
    except SystemExit as stop:
        file = folder / "kept" / INTERRUPTED
        steps = torch.load(file, weights_only=True)["global_step"]
        # The first rank's exit code is the run's.
        report.append(f"interrupted after {steps} {stop.code == (143 if rank == 0 else 0)}")
        resumed = fit(folder, "modular", resume=file, **two)
        report.append(f"resumed {resumed.ends_like(whole)}")
    Path(folder, f"rank-{rank}.txt").write_text("\n".join(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
